"""Storing K and V by the CUDA C++ kernel in ``store.cu``: one launch for both, whatever the strides and slots.

Bytes equal the reference's but where float32 rounding decides (the sums run in another order): a coordinate at a
threshold, a scale half-way between two bfloat16, two prescales that are equally good. Such a tie changes a code, or a
vector's scale with the codes that follow from it, and its error stays the same to rounding. A zero vector has scale 0
and a vector with a non-finite coordinate scale NaN; both have codes 0.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch

from kvfold.codebooks import lloyd_max
from kvfold.codecs.scaling import prescale_candidates
from kvfold.errors import FormatError, ShapeError
from kvfold.formats import MAX_PRESCALES, TILE, Side
from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime
from kvfold.rotation import rotation_matrix

HEAD_SIZE = 128
WIDTHS = (2, 3, 4)

_WARPS, _FEW_WARPS = 8, 4  # of a block of either kernel, as in store.cu
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_RULES = {"plain": 0, "unbiased": 1, "nc": 2, "mse": 3}
_FEW = 2048  # vectors (tokens x heads) up to which the kernel for few tokens is faster
_ALIGN_FROM = 64  # tokens from which on tiles follow the slots: for fewer, waiting for the first slot costs more


def supports(layout: PageLayout) -> str | None:
    """Why the kernel cannot store into these pages, or None if it can."""
    if layout.format.mean:
        return "the CUDA store kernel has no key references (+mean)"
    for name, side, size in (("K", layout.format.k, layout.head_size), ("V", layout.format.v, layout.head_size_v)):
        if size != HEAD_SIZE:
            return f"the CUDA store kernel is built for head size {HEAD_SIZE}, and {name} has {size}"
        if side.family != "lloyd" or side.bits not in WIDTHS:
            return (
                f"the CUDA store kernel writes Lloyd–Max codes of 2, 3 and 4 bits, and {name} is stored as {side.name}"
            )
    return None


# --- what the kernel is told ------------------------------------------------------------------------------------------


class _Recipe(ctypes.Structure):
    _fields_ = (
        ("scale_to_unit", ctypes.c_float),
        ("prescales", ctypes.c_int32),
        ("prescale", ctypes.c_float * MAX_PRESCALES),
        ("integers", ctypes.c_int32 * 8),
    )


class _Format(ctypes.Structure):
    _fields_ = (("k", _Recipe), ("v", _Recipe), ("flips", ctypes.c_uint32 * 4))


class _Call(ctypes.Structure):
    """Flat, because nested structures take long to make."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        *((f"k_{name}", ctypes.c_int64) for name in ("token", "head", "coordinate")),
        ("v", ctypes.c_void_p),
        *((f"v_{name}", ctypes.c_int64) for name in ("token", "head", "coordinate")),
        ("slots", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("page_shift", "tokens", "heads", "align")),
    )


def _recipe(side: Side) -> _Recipe:
    book = lloyd_max(int(side.bits), HEAD_SIZE)
    assert book.integers is not None  # up to 4 bits there always are
    candidates = prescale_candidates(side.prescales)
    return _Recipe(
        1 / (HEAD_SIZE**0.5 * book.step),
        len(candidates),
        (ctypes.c_float * MAX_PRESCALES)(*candidates),
        (ctypes.c_int32 * 8)(*book.integers.tolist()),
    )


@lru_cache(maxsize=1)
def _flips() -> tuple[int, ...]:
    """The rotation's signs as each lane of four applies them: bits 15 - n and 31 - n for its register n."""
    negative = rotation_matrix(HEAD_SIZE)[0] < 0  # the first row of a Hadamard matrix is all ones
    lanes = []
    for lane in range(4):
        word = 0
        for n in range(16):
            first = 64 * (n % 2) + 8 * lane + n // 2
            word |= int(negative[first]) << (15 - n) | int(negative[first + 32]) << (31 - n)
        lanes.append(word)
    return tuple(lanes)


class _Plan(NamedTuple):
    kernel: runtime.Kernel
    few: runtime.Kernel
    few_tokens: int  # of a block of the latter
    format: _Format
    blocks: int  # that run at once, of each side
    page_bytes: int
    page_shift: int


Input = tuple[torch.dtype, bool]
"""Of K or V: dtype, and whether its vectors can be loaded 16 bytes at a time."""


def _defines(layout: PageLayout, k: Input, v: Input) -> dict[str, int | str]:
    defines: dict[str, int | str] = {"TILE_BYTES": layout.tile_bytes}
    for name, side, planes, scales, given in (
        ("K", layout.format.k, layout.k_planes, layout.k_scales, k),
        ("V", layout.format.v, layout.v_planes, layout.v_scales, v),
    ):
        defines |= {
            f"{name}_BITS": int(side.bits),
            f"{name}_RULE": _RULES[side.scale],
            f"{name}_SEARCH": int(side.prescales > 1),
            f"{name}_TYPE": _DTYPES[given[0]],
            f"{name}_VECTOR": int(given[1]),
            f"{name}_PLANE0": planes[0],
            f"{name}_PLANE1": planes[-1],
            f"{name}_SCALES": scales,
        }
    return defines


@lru_cache(maxsize=1024)
def _plan(layout: PageLayout, k: Input, v: Input, device: torch.device) -> _Plan:
    if reason := supports(layout):
        raise FormatError(f"{reason}; use ops.backend('auto'), which chooses an implementation that can")
    defines = _defines(layout, k, v)
    searches = layout.format.k.prescales > 1 or layout.format.v.prescales > 1
    return _Plan(
        runtime.kernel("store.cu", "store", device, **defines),
        runtime.kernel("store.cu", "store_few", device, **defines),
        _FEW_WARPS * (1 if searches else 4),
        _Format(_recipe(layout.format.k), _recipe(layout.format.v), (ctypes.c_uint32 * 4)(*_flips())),
        torch.cuda.get_device_properties(device).multi_processor_count,
        layout.page_bytes,
        layout.page_size.bit_length() - 1,
    )


# --- store ------------------------------------------------------------------------------------------------------------

_PER_LOAD = {dtype: 16 // dtype.itemsize for dtype in _DTYPES}


def _input(name: str, dtype: torch.dtype, address: int, strides: tuple[int, ...]) -> Input:
    per_load = _PER_LOAD.get(dtype)
    if per_load is None:
        raise ShapeError(f"the CUDA store kernel takes {name} as bfloat16, float16 or float32, not {dtype}")
    return dtype, strides[2] == 1 and not (address % 16 or strides[0] % per_load or strides[1] % per_load)


def store_kv(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout) -> None:
    """See :func:`kvfold.ops.store_kv`, for layouts that :func:`supports` and bf16, f16 or f32 tensors.

    Raises:
        FormatError: The layout is not supported.
        ShapeError: K or V has another dtype, or the pages do not begin at a multiple of 16 bytes.
        CudaError: The kernel cannot be compiled or launched.
    """
    k_address, v_address, pages_address = k.data_ptr(), v.data_ptr(), pages.data_ptr()
    k_strides, v_strides = k.stride(), v.stride()
    if pages_address % 16:
        raise ShapeError("pages begin at a multiple of 16 bytes; do not slice them out of a buffer at odd offsets")
    plan = _plan(
        layout, _input("k", k.dtype, k_address, k_strides), _input("v", v.dtype, v_address, v_strides), pages.device
    )
    tokens, heads = len(k), pages.shape[1]
    align = tokens >= _ALIGN_FROM
    slots = slots.contiguous()
    call = _Call(
        k_address, *k_strides, v_address, *v_strides,
        slots.data_ptr(), pages_address, plan.page_bytes, plan.page_shift, tokens, heads, align,
    )  # fmt: skip
    if tokens * heads <= _FEW:
        plan.few.launch((-(-tokens // plan.few_tokens), heads, 2), 32 * _FEW_WARPS, 0, call, plan.format, early=True)
    else:
        tiles = (tokens + (TILE + 2 if align else TILE - 1)) // TILE * heads
        plan.kernel.launch((min(tiles, plan.blocks), 2, 1), 32 * _WARPS, 0, call, plan.format, early=True)
