"""The run-time of the CUDA C++ kernels, as far as it goes without a GPU: cache, arguments, errors, and compiling."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import sanitized
import torch

from kvfold.layout import PageLayout
from kvfold.ops.cuda import expand, formats, references, runtime, store, store_trellis


def nvrtc_is_there() -> bool:
    try:
        runtime._nvrtc()
    except runtime.CudaError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not nvrtc_is_there(), reason="cuda-bindings or NVRTC is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the package's, with a kernel that includes a header that includes another."""
    texts = {
        "twice.cu": '#include "outer.cuh"\nextern "C" __global__ void twice(float* x) { *x = f(FACTOR); }\n',
        "outer.cuh": '#pragma once\n# include "inner.cuh"\n__device__ float f(float x) { return g(x); }\n',
        "inner.cuh": "#pragma once\n__device__ float g(float x) { return 2 * x; }\n",
        "other.cuh": "not included",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(runtime, "FOLDER", tmp_path)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path


# --- the cache --------------------------------------------------------------------------------------------------------


def test_sources_are_a_file_and_what_it_includes(folder: Path) -> None:
    assert list(runtime.sources("twice.cu")) == ["twice.cu", "outer.cuh", "inner.cuh"]


def test_the_key_depends_on_everything_that_the_bytes_depend_on() -> None:
    base: dict[str, Any] = {
        "texts": {"a.cu": "x", "b.cuh": "y"},
        "defines": (("A", "1"),),
        "arch": "sm_90a",
        "version": (13, 0),
    }
    changes: list[dict[str, Any]] = [
        {},
        {"texts": {"a.cu": "x", "b.cuh": "z"}},
        {"texts": {"a.cu": "xy", "b.cuh": ""}},
        {"texts": {"a.cu": "x", "c.cuh": "y"}},
        {"defines": (("A", "2"),)},
        {"defines": (("A", "1"), ("B", "1"))},
        {"arch": "sm_100a"},
        {"version": (13, 1)},
    ]
    keys = [runtime.cache_key(**{**base, **change}) for change in changes]
    assert len(set(keys)) == len(keys)
    assert keys[0] == runtime.cache_key(**{**base, "texts": dict(reversed(base["texts"].items()))})


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    runtime.write_atomically(path, b"first")

    def fail(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no room"):
            runtime.write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_many_writers_and_readers_never_see_a_part(tmp_path: Path) -> None:
    path, texts, seen = tmp_path / "file", [bytes([i]) * 100_000 for i in range(4)], set()
    runtime.write_atomically(path, texts[0])

    def work(text: bytes) -> None:
        for _ in range(20):
            runtime.write_atomically(path, text)
            seen.add(path.read_bytes())

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_in_the_cache_is_not_compiled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_cubin(file: str, defines: runtime.Defines, arch: str) -> bytes:
        compiled.append(defines)
        return f"{file} {defines} {len(compiled)}".encode()

    monkeypatch.setattr(runtime, "compile_cubin", compile_cubin)
    monkeypatch.setattr(runtime, "_nvrtc_version", lambda: (13, 0))
    one, two = (("FACTOR", "1"),), (("FACTOR", "2"),)
    first = runtime.cubin("twice.cu", one, "sm_90a")
    assert runtime.cubin("twice.cu", one, "sm_90a") == first
    assert runtime.cubin("twice.cu", two, "sm_90a") != first
    assert compiled == [one, two]
    again = runtime.cubin("twice.cu", one, "sm_90a", fresh=True)
    assert again != first
    assert runtime.cubin("twice.cu", one, "sm_90a") == again
    (folder / "inner.cuh").write_text("changed")
    runtime.cubin("twice.cu", one, "sm_90a")
    assert compiled == [one, two, one, one]
    assert len(list((folder / "cache" / "cuda").iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").write_text("in the way")
    monkeypatch.setenv("KVFOLD_CACHE", str(folder / "file"))
    monkeypatch.setattr(runtime, "compile_cubin", lambda *_: b"code")
    monkeypatch.setattr(runtime, "_nvrtc_version", lambda: (13, 0))
    assert runtime.cubin("twice.cu", (), "sm_90a") == b"code"
    assert "KVFOLD_CACHE" in caplog.text


# --- arguments --------------------------------------------------------------------------------------------------------


def read(address: int, index: int, kind: type[Any]) -> Any:
    pointer = ctypes.c_void_p.from_address(address + 8 * index).value
    assert pointer is not None
    return kind.from_address(pointer).value


class Pair(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int64), ("y", ctypes.c_double))


def test_arguments_are_written_as_the_kernel_reads_them() -> None:
    arguments, tensor, pair = runtime._Arguments(), torch.zeros(4), Pair(1 << 40, 2.5)
    args = (tensor, None, True, -7, 1.5, ctypes.c_int64(-1 << 40), pair, torch.nn.Parameter(tensor))
    for _ in range(2):
        address = arguments.fill(args)
        kinds: tuple[type[Any], ...] = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32)
        assert [read(address, i, kind) for i, kind in enumerate(kinds)] == [tensor.data_ptr(), 0, 1, -7]
        assert read(address, 4, ctypes.c_float) == 1.5
        assert read(address, 5, ctypes.c_int64) == -1 << 40
        assert ctypes.c_void_p.from_address(address + 8 * 6).value == ctypes.addressof(pair)
        assert read(address, 7, ctypes.c_uint64) == tensor.data_ptr()


def test_arguments_of_other_types_or_number_may_follow() -> None:
    arguments = runtime._Arguments()
    arguments.fill((ctypes.c_int64(3), 1))
    address = arguments.fill((5, 1))
    assert read(address, 0, ctypes.c_int32) == 5
    address = arguments.fill((1, 2, 3))
    assert [read(address, i, ctypes.c_int32) for i in range(3)] == [1, 2, 3]
    arguments.fill(())


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 1e300])
def test_numbers_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(OverflowError):
        runtime._Arguments().fill((1, value))


def test_arguments_of_unknown_types_are_refused() -> None:
    with pytest.raises(TypeError, match="argument 1 is a str"):
        runtime._Arguments().fill((1, "text"))


def test_every_thread_has_its_own_arguments() -> None:
    arguments, addresses = runtime._Arguments(), [0]
    first = arguments.fill((1,))
    thread = threading.Thread(target=lambda: addresses.append(arguments.fill((2,))))
    thread.start()
    thread.join()
    assert addresses[1] != first
    assert read(first, 0, ctypes.c_int32) == 1


# --- what is missing is said ------------------------------------------------------------------------------------------


def test_other_devices_are_refused_with_the_reason() -> None:
    reason = runtime.available(torch.device("cpu"))
    assert reason is not None
    assert "CUDA device" in reason


def test_older_gpus_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    runtime._unavailable.cache_clear()
    try:
        reason = runtime.available(torch.device("cuda", 0))
    finally:
        runtime._unavailable.cache_clear()
    assert reason is not None
    assert "A100 has 8.0" in reason
    assert "9.0" in reason


def test_without_cuda_bindings_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    runtime._nvrtc.cache_clear()
    try:
        with pytest.raises(runtime.CudaError, match="pip install 'cuda-bindings"):
            runtime._nvrtc()
    finally:
        runtime._nvrtc.cache_clear()


def test_importing_the_package_imports_neither_cuda_nor_triton() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import kvfold, kvfold.ops; "  # torch may import them itself
        "print([name for name in set(sys.modules) - before if name.partition('.')[0] in ('cuda', 'triton')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.strip() == "[]"


# --- compiling --------------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_defines_and_headers_reach_the_compiler(folder: Path) -> None:
    small = runtime.cubin("twice.cu", (("FACTOR", "1"),), "sm_90a")
    assert small[:4] == b"\x7fELF"
    assert small != runtime.cubin("twice.cu", (("FACTOR", "3"),), "sm_90a")
    assert small == runtime.cubin_path("twice.cu", (("FACTOR", "1"),), "sm_90a").read_bytes()


@needs_nvrtc
def test_what_does_not_compile_is_shown(folder: Path) -> None:
    with pytest.raises(runtime.CudaError, match="FACTOR") as caught:
        runtime.compile_cubin("twice.cu", (), "sm_90a")
    assert "reference" in str(caught.value)


@needs_nvrtc
@pytest.mark.parametrize(
    ("spec", "dtype", "vector"),
    [
        ("k4v4", torch.bfloat16, True),
        ("k3v3+pre1", torch.float16, True),
        ("k2v4+nc", torch.float32, False),
        ("k3v2+mse+pre5", torch.bfloat16, False),
        ("k4v3+plain", torch.float32, True),
        ("k4tv3t+mean", torch.bfloat16, True),
        ("k2v2t+mean", torch.float16, False),
        ("k3tv4+pre1", torch.float32, True),
    ],
)
def test_store_and_expand_compile(spec: str, dtype: torch.dtype, vector: bool) -> None:
    layout = PageLayout.of(spec, 128)
    given = (dtype, vector)
    for file, defines in (
        ("store.cu", store._defines(layout, given, given)),
        ("store_trellis.cu", store._defines(layout, given, given)),
        ("references.cu", references._defines(layout, *given)),
        ("expand.cu", expand._defines(layout, torch.float16 if vector else torch.bfloat16, vector)),
    ):
        macros = tuple((name, str(value)) for name, value in sorted(defines.items()))
        assert runtime.compile_cubin(file, macros, "sm_90a")[:4] == b"\x7fELF"


# --- what the store kernel is told ------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_do_is_refused_with_the_reason() -> None:
    for spec in ("k4v3+mse", "k3v4+mean", "k4tv2", "k2v3t+mean"):
        assert formats.supports(PageLayout.of(spec, 128, page_size=16)) is None
    for spec, size, words in (("k4v4", 64, "head size 128"), ("k8v4", 128, "2, 3 and 4 bits"), ("bf16", 128, "K")):
        reason = formats.supports(PageLayout.of(spec, size))
        assert reason is not None
        assert words in reason


def test_structures_have_the_sizes_that_the_kernel_expects() -> None:
    assert [ctypes.sizeof(kind) for kind in (store._Call, store._Format)] == [104, 2 * 4 * (2 + 13 + 8) + 16]
    assert [ctypes.sizeof(kind) for kind in (store_trellis._Format, references._Opening)] == [
        2 * 4 * (2 + 13 + 16) + 16, 8 * 8 + 4 * 3 + 4 * 32 + 4,
    ]  # fmt: skip
    assert [ctypes.sizeof(kind) for kind in (expand._Levels, expand._Window, expand._Chunk)] == [20, 112, 64]
    assert struct.calcsize("P") == 8


# --- sanitized.py -----------------------------------------------------------------------------------------------------


def test_cases_for_the_sanitizer_are_listed_anywhere_and_run_on_a_gpu_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sanitized.main(["--list", "decode", "mean"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(set(listed)) > 1
    assert all("decode" in line and "mean" in line for line in listed)
    with pytest.raises(SystemExit, match="2"):
        sanitized.main(["nonsense"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    assert sanitized.main([]) == 1
    assert capsys.readouterr().err == "sanitized.py cannot run: there is no CUDA device\n"
