"""A stand-in for a GPU of a few SMs: what ``kvfold.ops.cuda`` launches runs on the emulator, on tensors of the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from emulator.build import build
from kvfold.ops import cuda
from kvfold.ops.cuda import decode, expand, prefill, references, runtime, schedule, store, store_trellis, windows

BLOCKS_BACKWARDS, THREADS_BACKWARDS, LATE_COPIES, SEED = 1, 2, 4, 8
"""Bits of a schedule, as in ``block.h``: blocks from the last to the first, threads likewise, and copies that arrive
when they are waited for instead of at once; a multiple of SEED seeds a random order. None may change a result."""

Layouts = Mapping[str, tuple[type[ctypes.Structure], Mapping[str, str]]]


def _members(structure: type[ctypes.Structure], names: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(names.get(field[0], field[0]) for field in structure._fields_)


_CALL_NAMES = {
    "k": "k.data", "v": "v.data",
    **{f"{side}_{name}": f"{side}.{name}" for side in "kv" for name in ("token", "head", "coordinate")},
    **{name: f"target.{name}" for name in ("slots", "pages", "page_bytes", "page_shift", "tokens", "heads", "align")},
}  # fmt: skip
STRUCTURES: dict[str, Layouts] = {
    "store.cu": {"Call": (store._Call, _CALL_NAMES), "Recipe": (store._Recipe, {}), "Format": (store._Format, {})},
    "expand.cu": {"Window": (expand._Window, {}), "Levels": (expand._Levels, {}), "Chunk": (expand._Chunk, {})},
    "prefill.cu": {"Part": (prefill._Part, {}), "Rotate": (prefill._Rotate, {}), "Rotations": (prefill._Rotations, {})},
    "schedule.cu": {
        "Params": (schedule.Params, {}),
        "Share": (
            schedule.Share,
            {"sequence": "item.x", "head": "item.y", "first_step": "item.z", "steps": "item.w"},
        ),
    },
    "decode.cu": {"Params": (schedule.Params, {})},
    "store_trellis.cu": {
        "Call": (store._Call, _CALL_NAMES),
        "Recipe": (store_trellis._Recipe, {}),
        "Format": (store_trellis._Format, {}),
    },
    "references.cu": {"Opening": (references._Opening, {})},
}
"""The structures that Python and a file share: the C++ name, Python's class, and members that are named differently."""


class EmulatedKernel:
    """In place of :class:`kvfold.ops.cuda.runtime.Kernel`."""

    def __init__(self, device: EmulatedDevice, file: str, entry: str, defines: runtime.Defines) -> None:
        self.file, self.name = file, entry
        layouts = {name: _members(*structure) for name, structure in STRUCTURES[file].items()}
        self._device = device
        self._library = _load(build(file, defines, layouts))
        self._launch, self._parameters = self._library[f"launch_{entry}"], self._library[f"parameters_{entry}"]
        self._launch.argtypes = [*[ctypes.c_uint] * 4, ctypes.c_size_t, ctypes.c_uint, ctypes.c_bool, ctypes.c_void_p]
        self._launch.restype = ctypes.c_char_p
        self._arguments = runtime._Arguments()

    def parameter_sizes(self) -> list[int]:
        """Bytes of each of the kernel's parameters."""
        sizes = (ctypes.c_size_t * 32)()
        return list(sizes[: self._parameters(sizes)])

    def layout(self, structure: str) -> list[int]:
        """Bytes of a C++ structure and the offsets of its members, in the order of the fields of Python's class."""
        values = (ctypes.c_size_t * 128)()
        if not self._library.structure_layout(structure.encode(), values):
            raise KeyError(structure)
        return list(values[: 1 + len(STRUCTURES[self.file][structure][0]._fields_)])

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared_bytes: int, *args: Any, early: bool = False
    ) -> None:
        """Run the kernel to its end; arguments as of the real one's ``launch``.

        Raises:
            AssertionError: The kernel did what a GPU leaves undefined, or waits for ever; or it is launched early, and
                a thread ends without having waited for the kernels ahead.
        """
        if not all(grid):
            return
        given, wanted = [_bytes(arg) for arg in args], self.parameter_sizes()
        assert given == wanted, f"{self.name} takes parameters of {wanted} bytes, and gets {given}"
        self._device.launches.append((self.name, grid))
        address = self._arguments.fill(args)
        error = self._launch(*grid, threads, shared_bytes, self._device.schedule, early, address)
        assert error is None, f"{self.file}, {self.name}: {error.decode()}"


def _bytes(arg: Any) -> int:
    if isinstance(arg, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)):
        return ctypes.sizeof(arg)
    return 8 if arg is None or isinstance(arg, torch.Tensor) else 4


@lru_cache(maxsize=256)
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


class EmulatedDevice:
    """Its multiprocessors, the order in which things happen on it, and what was launched: names and grids."""

    def __init__(self, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors
        self.schedule = 0
        self.launches: list[tuple[str, tuple[int, int, int]]] = []

    def kernel(self, file: str, entry: str, device: torch.device, **defines: int | str) -> EmulatedKernel:
        """In place of :func:`kvfold.ops.cuda.runtime.kernel`."""
        macros = {name: int(value) if isinstance(value, bool) else value for name, value in defines.items()}
        return EmulatedKernel(self, file, entry, tuple(sorted((name, str(value)) for name, value in macros.items())))


class _OnHost(TorchFunctionMode):
    """Makes on the CPU what is asked for on a CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _forget() -> None:
    """Empty the package's caches, which hold kernels."""
    for module in (decode, expand, prefill, references, schedule, store, windows):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextmanager
def emulated_device(multiprocessors: int = 3, largest_piece: int = 1) -> Iterator[EmulatedDevice]:
    """Inside, ``ops.backend("cuda")`` serves tensors of the CPU, and what it launches is emulated.

    Decode attention cuts items into pieces of at most ``largest_piece`` steps, or cuts the line of all steps.

    The library's dense attention, which prefill attention calls, is none of the package's kernels and not emulated.
    """
    device = EmulatedDevice(multiprocessors)
    stream = SimpleNamespace(cuda_stream=0, record_event=lambda: None, wait_event=lambda event: None)
    patches = {
        (runtime, "kernel"): device.kernel,
        (cuda, "available"): lambda device: None,
        (torch.cuda, "get_device_properties"): lambda device: SimpleNamespace(multi_processor_count=multiprocessors),
        (torch.cuda, "current_stream"): lambda device=None: stream,
        (runtime, "second_stream"): lambda device: stream,
        (torch.cuda, "is_current_stream_capturing"): lambda: False,
        (torch.cuda, "synchronize"): lambda device=None: None,
        (schedule, "_LARGEST_PIECE"): largest_piece,
    }
    _forget()
    entered = [mock.patch.object(owner, name, value) for (owner, name), value in patches.items()]
    for patch in entered:
        patch.start()
    try:
        with _OnHost():
            yield device
    finally:
        for patch in reversed(entered):
            patch.stop()
        _forget()
