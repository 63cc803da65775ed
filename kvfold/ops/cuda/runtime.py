"""Compiles the package's CUDA C++ files on the machine that runs them, keeps the result, and launches kernels.

A ``.cu`` file is compiled by NVRTC, which torch's CUDA wheels bring and ``cuda-bindings`` reaches, so that neither a
CUDA toolkit nor a compiler is needed to install or to run. What varies (widths, page size, dtypes) are macros, given as
``defines``: each set of them is a cubin of its own. A cubin is kept under ``<cache folder>/cuda`` (the cache folder is
:func:`kvfold.models.cache_folder`), named by a hash of all that went into it, so a second process only loads it.

Launching is on the path of every decoded token. :meth:`Kernel.launch` calls the driver through ctypes with buffers that
are made once per thread, on torch's current stream; it allocates nothing on the device and never waits, so it can be
captured into a CUDA graph.

Compiled code is for one architecture (``sm_90a`` on an H100 or H200): such a cubin may use every instruction of its
chip, and every driver of the same CUDA major version loads it, however old.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kvfold.errors import KVFoldError
from kvfold.models import cache_folder

FOLDER = Path(__file__).parent
"""Where the ``.cu`` and ``.cuh`` files lie."""

MIN_CAPABILITY = (9, 0)

_OPTIONS = ("--std=c++17",)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
_INVALID_CONTEXT = 201


class CudaError(KVFoldError, RuntimeError):
    """A CUDA kernel of the package cannot be compiled, loaded or launched."""


# --- can it be used? --------------------------------------------------------------------------------------------------


def available(device: torch.device) -> str | None:
    """Why the CUDA implementation cannot be used on ``device``, or None if it can. Compiles nothing."""
    if device.type != "cuda":
        return f"the CUDA kernels need a CUDA device, and the tensors are on {device}"
    if torch.version.cuda is None:
        return "the CUDA kernels need an NVIDIA GPU and a torch that is built for CUDA"
    return _unavailable(_index(device))


@lru_cache(maxsize=64)
def _unavailable(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return (
            f"the CUDA kernels are for compute capability {_dotted(MIN_CAPABILITY)} and above (H100, H200), "
            f"and {name} has {_dotted(capability)}"
        )
    try:
        nvrtc = _nvrtc()
        supported = _checked(nvrtc.nvrtcGetSupportedArchs()[:2], "listing NVRTC's architectures")
    except CudaError as error:
        return str(error)
    if capability[0] * 10 + capability[1] not in supported:
        return f"NVRTC {_dotted(_nvrtc_version())} does not know compute capability {_dotted(capability)}; upgrade it"
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name for a compute capability, with the instructions that only this chip has: (9, 0) is ``sm_90a``."""
    return f"sm_{capability[0]}{capability[1]}a"


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """The NVRTC bindings, checked to have a library behind them."""
    wanted = f"=={torch.version.cuda.split('.')[0]}.*" if torch.version.cuda else ""
    way_out = f"pip install 'cuda-bindings{wanted}' nvidia-cuda-nvrtc"
    try:
        nvrtc: Any = import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise CudaError(
            f"the CUDA kernels are compiled with NVRTC through cuda-bindings ({error}): {way_out}"
        ) from None
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-bindings raises a RuntimeError of its own for a library it does not find
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CudaError(f"cuda-bindings does not find the NVRTC library ({reason}): {way_out}") from None
    return nvrtc


@lru_cache(maxsize=1)
def _nvrtc_version() -> tuple[int, int]:
    major, minor = _checked(_nvrtc().nvrtcVersion(), "asking NVRTC for its version")
    return int(major), int(minor)


def _checked(result: tuple[Any, ...], doing: str) -> Any:
    """The value of a call of cuda-bindings, which returns ``(status, value...)``."""
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"{doing} failed with {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values) if values else None


# --- compile ----------------------------------------------------------------------------------------------------------

Defines = tuple[tuple[str, str], ...]
"""Macros in the order of their names."""


def sources(file: str) -> dict[str, str]:
    """The text of ``file`` and of every header of the package that it includes, by name; ``file`` comes first."""
    texts: dict[str, str] = {}
    todo = [file]
    while todo:
        name = todo.pop()
        if name not in texts:
            texts[name] = (FOLDER / name).read_text(encoding="utf-8")
            todo += _INCLUDE.findall(texts[name])
    return texts


def cache_key(texts: dict[str, str], defines: Defines, arch: str, version: tuple[int, int]) -> str:
    """A hash of everything that the bytes of a cubin depend on."""
    parts = [arch, _dotted(version), *_OPTIONS]
    parts += [f"{name}={value}" for name, value in defines]
    for name in sorted(texts):
        parts += [name, texts[name]]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # lengths, so that no two lists of parts run together
    return digest.hexdigest()[:32]


def compile_cubin(file: str, defines: Defines, arch: str) -> bytes:
    """Compile a file of the package, without looking into the cache.

    Raises:
        CudaError: NVRTC is missing, or does not compile the file; the message has its log.
    """
    nvrtc = _nvrtc()
    texts = sources(file)
    headers = [name for name in texts if name != file]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            texts[file].encode(),
            file.encode(),
            len(headers),
            [texts[name].encode() for name in headers],
            [name.encode() for name in headers],
        ),
        f"handing {file} to NVRTC",
    )
    try:
        options = [f"--gpu-architecture={arch}", *_OPTIONS, *(f"-D{name}={value}" for name, value in defines)]
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(status) != 0:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program), "reading NVRTC's log"))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaError(
                f"NVRTC {_dotted(_nvrtc_version())} does not compile kvfold's {file} with {' '.join(options)}:\n"
                f"{log.decode(errors='replace').strip(chr(0)).strip()}\n"
                "ops.backend('triton') or ops.backend('reference') do without it"
            )
        cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program), f"compiling {file}"))  # NVRTC writes into it
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin), f"compiling {file}")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cubin_path(file: str, defines: Defines, arch: str) -> Path:
    """Where the compiled file is kept. It need not exist."""
    key = cache_key(sources(file), defines, arch, _nvrtc_version())
    return cache_folder() / "cuda" / f"{Path(file).stem}-{arch}-{key}.cubin"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that others may be reading or writing at this moment: they see all of it or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cubin(file: str, defines: Defines, arch: str, fresh: bool = False) -> bytes:
    """The compiled file, from the cache where it is there; ``fresh`` compiles and overwrites what is."""
    path = cubin_path(file, defines, arch)
    if not fresh:
        try:
            return path.read_bytes()
        except OSError:
            pass  # not there, or not readable: compiling is the way to have it
    data = compile_cubin(file, defines, arch)
    try:
        write_atomically(path, data)
    except OSError as error:
        logging.getLogger("kvfold").warning(
            "compiled CUDA kernels cannot be kept (%s), so every process compiles them; "
            "set KVFOLD_CACHE to a folder that can be written",
            error,
        )
    return data


# --- load -------------------------------------------------------------------------------------------------------------


def kernel(file: str, entry: str, device: torch.device, **defines: int | str) -> Kernel:
    """A kernel of the package on a device: compiled if nobody did yet, loaded once per process.

    Args:
        file: Name of a ``.cu`` file beside this module.
        entry: Name of an ``extern "C" __global__`` function in it.
        device: A CUDA device; without an index it is the current one.
        **defines: Macros: ``-DNAME=value``.

    Raises:
        CudaError: NVRTC is missing or refuses the file, or the driver does not load the result.
    """
    return _kernel(file, entry, _index(device), tuple(sorted(defines.items())))


_loading = threading.RLock()


@lru_cache(maxsize=4096)
def _kernel(file: str, entry: str, index: int, defines: tuple[tuple[str, int | str], ...]) -> Kernel:
    macros = tuple((name, str(int(value) if isinstance(value, bool) else value)) for name, value in defines)
    with _loading:
        driver, module = _driver(), _module(file, index, macros)
        with _context(index):
            function = _checked(driver.cuModuleGetFunction(module, entry.encode()), f"finding {entry} in {file}")
    return Kernel(f"{entry} of {file}", index, int(function))


@lru_cache(maxsize=4096)
def _module(file: str, index: int, defines: Defines) -> Any:
    driver = _driver()
    arch = architecture(torch.cuda.get_device_capability(index))
    with _context(index):
        status, module = driver.cuModuleLoadData(cubin(file, defines, arch))
        if int(status) != 0:  # a damaged file in the cache is no reason to fail
            status, module = driver.cuModuleLoadData(cubin(file, defines, arch, fresh=True))
        return _checked((status, module), f"loading the compiled {file} for {arch}")


@lru_cache(maxsize=1)
def _driver() -> Any:
    _nvrtc()  # for its errors: both are cuda-bindings
    return import_module("cuda.bindings.driver")


@lru_cache(maxsize=64)
def _primary_context(index: int) -> Any:
    """The context that torch uses on this device, which stays alive as long as the process."""
    driver = _driver()
    device = _checked(driver.cuDeviceGet(index), f"opening CUDA device {index}")
    return _checked(driver.cuDevicePrimaryCtxRetain(device), f"opening CUDA device {index}")


@contextmanager
def _context(index: int) -> Iterator[None]:
    """Work on a device that need not be the current one, even while a graph is being captured."""
    driver = _driver()
    torch.cuda.init()
    _checked(driver.cuCtxPushCurrent(_primary_context(index)), f"using CUDA device {index}")
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = _checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), "relaxing stream capture")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)
        driver.cuCtxPopCurrent()


# --- launch -----------------------------------------------------------------------------------------------------------

_SLOT = 8


class _Signature:
    """How arguments of certain types are written: eight bytes each, so that every value is aligned."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.tensors, self.nulls, self.ctypes = [], [], []
        code = ["<"]
        for i, kind in enumerate(kinds):
            if issubclass(kind, torch.Tensor):
                self.tensors.append(i)
                code.append("Q")
            elif kind is type(None):
                self.nulls.append(i)
                code.append("Q")
            elif kind is int or kind is bool:
                code.append("i4x")
            elif kind is float:
                code.append("f4x")
            elif issubclass(kind, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)):
                self.ctypes.append(i)
                code.append("Q")
            else:
                raise TypeError(f"argument {i} is a {kind.__name__}; kernels take tensors, numbers and ctypes values")
        self.pack_into = struct.Struct("".join(code)).pack_into


_signature = lru_cache(maxsize=1024)(_Signature)


class _Arguments(threading.local):
    """A kernel's arguments in memory, as ``cuLaunchKernel`` reads them: an array of pointers to values.

    One per thread, because the driver reads it while ctypes has let go of the interpreter's lock.
    """

    def __init__(self) -> None:
        self._kinds: tuple[type, ...] | None = None

    def _prepare(self, kinds: tuple[type, ...]) -> None:
        self._signature = _signature(kinds)
        self._slots = ctypes.create_string_buffer(_SLOT * (len(kinds) + 1))
        start = ctypes.addressof(self._slots)
        self._pointers = (ctypes.c_void_p * (len(kinds) + 1))(*range(start, start + _SLOT * len(kinds), _SLOT))
        self._address = ctypes.addressof(self._pointers)
        self._kinds = kinds

    def fill(self, args: tuple[Any, ...]) -> int:
        """Write the values; the address of the array of pointers, valid while ``args`` live and until the next call.

        Raises:
            TypeError: An argument is none of tensor, None, bool, int, float and ctypes instance.
            OverflowError: An int does not fit 32 bits, or a float float32.
        """
        kinds = tuple(map(type, args))
        if kinds != self._kinds:
            self._prepare(kinds)
        signature, values = self._signature, list(args)
        for i in signature.tensors:
            values[i] = values[i].data_ptr()
        for i in signature.nulls:
            values[i] = 0
        for i in signature.ctypes:
            self._pointers[i] = ctypes.addressof(values[i])
            values[i] = 0
        try:
            signature.pack_into(self._slots, 0, *values)
        except struct.error as error:
            raise OverflowError(f"{error} ({args}): integers are int32; pass a ctypes.c_int64") from None
        return self._address


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class _Launching(threading.local):
    """How the driver is told a launch's shape, of each thread."""

    def __init__(self) -> None:
        self.config = _Config(threads_y=1, threads_z=1, attributes=ctypes.pointer(_EARLY))
        self.address = ctypes.addressof(self.config)


_EARLY = _Attribute(6, 0, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@lru_cache(maxsize=1)
def _cu_launch_kernel() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1" if os.name != "nt" else "nvcuda.dll")
    except OSError as error:
        raise CudaError(f"the NVIDIA driver's library cannot be opened ({error}); install the driver") from None
    function = library.cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


@lru_cache(maxsize=64)
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One of each device, for what may be done beside the current stream's work."""
    return torch.cuda.Stream(device)


class Kernel:
    """A compiled kernel, loaded on one device. Made by :func:`kernel`."""

    def __init__(self, name: str, index: int, function: int) -> None:
        self.name = name
        self._index = index
        self._function = function
        self._arguments = _Arguments()
        self._shared_bytes = 0
        self._call = _cu_launch_kernel()
        self._launching = _Launching()

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared_bytes: int, *args: Any, early: bool = False
    ) -> None:
        """Queue the kernel on torch's current stream of its device.

        Args:
            grid: Blocks in x, y and z. None in any of them launches nothing.
            threads: Threads of a block.
            shared_bytes: Dynamic shared memory of a block; the kernel's limit is raised as needed.
            *args: In the order of the kernel's parameters. A tensor is a pointer to its first element, None the null
                pointer, bool and int are int32, float is float32; a ctypes instance is passed by value as it is.
            early: Every thread calls ``wait_for_predecessors`` before it writes, or reads what the kernels ahead may
                still write, so blocks may start before these have ended (programmatic dependent launch).

        Raises:
            CudaError: The driver refuses the launch.
        """
        x, y, z = grid
        if not (x and y and z):
            return
        if shared_bytes > self._shared_bytes:
            self._raise_shared_limit(shared_bytes)
        index = self._index
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                self.launch(grid, threads, shared_bytes, *args, early=early)
            return
        config = self._launching.config
        config.x, config.y, config.z, config.threads, config.shared_bytes = x, y, z, threads, shared_bytes
        config.stream, config.num_attributes = torch._C._cuda_getCurrentRawStream(index), early
        address = self._arguments.fill(args)
        status = self._call(self._launching.address, self._function, address, None)
        if status == _INVALID_CONTEXT:  # a thread that has not used the device yet
            _checked(_driver().cuCtxSetCurrent(_primary_context(index)), f"using CUDA device {index}")
            status = self._call(self._launching.address, self._function, address, None)
        if status:
            raise CudaError(
                f"launching {self.name} with grid {grid}, {threads} threads and {shared_bytes} bytes of shared memory "
                f"failed with {_driver().CUresult(status).name}"
            )

    def _raise_shared_limit(self, shared_bytes: int) -> None:
        driver = _driver()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        function = driver.CUfunction(self._function)
        with _context(self._index):
            _checked(
                driver.cuFuncSetAttribute(function, attribute, shared_bytes),
                f"giving {self.name} {shared_bytes} bytes of shared memory per block",
            )
        self._shared_bytes = shared_bytes
