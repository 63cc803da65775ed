"""Storing K and V by the CUDA C++ kernel in ``store.cu``: one launch for both, whatever the strides and slots.

With key references a launch of :mod:`kvfold.ops.cuda.references` goes ahead, which opens pages. Sides with codes of a
trellis are stored by a launch of :mod:`kvfold.ops.cuda.store_trellis`.

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
from kvfold.ops.cuda import runtime, store_trellis
from kvfold.ops.cuda.formats import DTYPES, HEAD_SIZE, side_defines, supports
from kvfold.ops.cuda.references import open_pages
from kvfold.rotation import rotation_matrix

_WARPS, _FEW_WARPS = 8, 4  # of a block of either kernel, as in store.cu
_RULES = {"plain": 0, "unbiased": 1, "nc": 2, "mse": 3}
_FEW = 2048  # vectors (tokens x heads) up to which the kernel for few tokens is faster
_ALIGN_FROM = 64  # tokens from which on tiles follow the slots: for fewer, waiting for the first slot costs more


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
    """Zeros of a side with other codes."""
    if side.family != "lloyd":
        return _Recipe()
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


class _Lloyd(NamedTuple):
    """Of the sides with Lloyd–Max codes."""

    kernel: runtime.Kernel
    few: runtime.Kernel
    few_tokens: int  # of a block of the latter
    format: _Format
    sides: int
    blocks: int  # that run at once, of each side


class _Plan(NamedTuple):
    lloyd: _Lloyd | None
    trellis: store_trellis.Plan | None
    page_bytes: int
    page_shift: int


Input = tuple[torch.dtype, bool]
"""Of K or V: dtype, and whether its vectors can be loaded 16 bytes at a time."""


def _defines(layout: PageLayout, k: Input, v: Input) -> dict[str, int | str]:
    defines: dict[str, int | str] = {"TILE_BYTES": layout.tile_bytes, "MEAN": int(layout.format.mean)}
    for name, side, planes, scales, given in (
        ("K", layout.format.k, layout.k_planes, layout.k_scales, k),
        ("V", layout.format.v, layout.v_planes, layout.v_scales, v),
    ):
        defines |= side_defines(name, side, planes, scales) | {
            f"{name}_RULE": _RULES[side.scale],
            f"{name}_SEARCH": int(side.prescales > 1),
            f"{name}_TYPE": DTYPES[given[0]],
            f"{name}_VECTOR": int(given[1]),
        }
    return defines


@lru_cache(maxsize=1024)
def _plan(layout: PageLayout, k: Input, v: Input, device: torch.device) -> _Plan:
    if reason := supports(layout):
        raise FormatError(f"{reason}; use ops.backend('auto'), which chooses an implementation that can")
    defines = _defines(layout, k, v)
    sides = [side for side in (layout.format.k, layout.format.v) if side.family == "lloyd"]
    lloyd = None
    if sides:
        lloyd = _Lloyd(
            runtime.kernel("store.cu", "store", device, **defines),
            runtime.kernel("store.cu", "store_few", device, **defines),
            _FEW_WARPS * (1 if any(side.prescales > 1 for side in sides) else 4),
            _Format(_recipe(layout.format.k), _recipe(layout.format.v), (ctypes.c_uint32 * 4)(*_flips())),
            len(sides),
            torch.cuda.get_device_properties(device).multi_processor_count,
        )
    trellis = store_trellis.plan(layout, defines, _flips(), device)
    return _Plan(lloyd, trellis, layout.page_bytes, layout.page_size.bit_length() - 1)


# --- store ------------------------------------------------------------------------------------------------------------

_PER_LOAD = {dtype: 16 // dtype.itemsize for dtype in DTYPES}


def _input(name: str, dtype: torch.dtype, address: int, strides: tuple[int, ...]) -> Input:
    per_load = _PER_LOAD.get(dtype)
    if per_load is None:
        raise ShapeError(f"the CUDA store kernel takes {name} as bfloat16, float16 or float32, not {dtype}")
    return dtype, strides[2] == 1 and not (address % 16 or strides[0] % per_load or strides[1] % per_load)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout,
    previous: torch.Tensor | None = None,
) -> None:  # fmt: skip
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
    k_input = _input("k", k.dtype, k_address, k_strides)
    plan = _plan(layout, k_input, _input("v", v.dtype, v_address, v_strides), pages.device)
    tokens, heads = len(k), pages.shape[1]
    align = tokens >= _ALIGN_FROM
    slots = slots.contiguous()
    if layout.format.mean and previous is not None:
        open_pages(k, pages, slots, previous, layout, k_input[1])
    call = _Call(
        k_address, *k_strides, v_address, *v_strides,
        slots.data_ptr(), pages_address, plan.page_bytes, plan.page_shift, tokens, heads, align,
    )  # fmt: skip
    few = tokens * heads <= _FEW
    if plan.trellis is not None:
        store_trellis.launch(plan.trellis, call, tokens, heads, few)
    if plan.lloyd is not None:
        _launch(plan.lloyd, call, tokens, heads, few, align)


def _launch(chosen: _Lloyd, call: _Call, tokens: int, heads: int, few: bool, align: bool) -> None:
    if few:
        grid = (-(-tokens // chosen.few_tokens), heads, chosen.sides)
        chosen.few.launch(grid, 32 * _FEW_WARPS, 0, call, chosen.format, early=True)
    else:
        tiles = (tokens + (TILE + 2 if align else TILE - 1)) // TILE * heads
        grid = (min(tiles, chosen.blocks), chosen.sides, 1)
        chosen.kernel.launch(grid, 32 * _WARPS, 0, call, chosen.format, early=True)
