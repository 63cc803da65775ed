"""Storing sides whose codes are of a trellis, by the CUDA C++ kernels in ``store_trellis.cu``; called by :mod:`.store`.

Codes equal the reference's but where float32 rounding decides between two paths, or as for other codes.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from kvfold.codebooks import trellis_levels
from kvfold.codecs.scaling import prescale_candidates
from kvfold.formats import MAX_PRESCALES, TILE, Side
from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime
from kvfold.ops.cuda.formats import HEAD_SIZE

_WARPS = 4  # of a block, as in store_trellis.cu
_BLOCKS = 4  # that an SM runs at once
_FEW_TOKENS = 4  # of a warp of the kernel for few


class _Recipe(ctypes.Structure):
    _fields_ = (
        ("scale_to_unit", ctypes.c_float),
        ("prescales", ctypes.c_int32),
        ("prescale", ctypes.c_float * MAX_PRESCALES),
        ("integers", ctypes.c_int32 * 16),
    )


class _Format(ctypes.Structure):
    _fields_ = (("k", _Recipe), ("v", _Recipe), ("flips", ctypes.c_uint32 * 4))


class Plan(NamedTuple):
    """The kernels of a layout that has such sides.

    Attributes:
        searches: Whether any of them tries several prescales, which the kernel for few tokens does at the same time.
    """

    kernel: runtime.Kernel
    few: runtime.Kernel
    format: _Format
    sides: int
    searches: bool
    blocks: int


def plan(
    layout: PageLayout, defines: dict[str, int | str], flips: tuple[int, ...], device: torch.device
) -> Plan | None:
    """The kernels, with the macros and signs that :mod:`.store` has for its own; None without such a side."""
    k, v = layout.format.k, layout.format.v
    sides = [side for side in (k, v) if side.family == "trellis"]
    if not sides:
        return None
    return Plan(
        runtime.kernel("store_trellis.cu", "store_trellis", device, **defines),
        runtime.kernel("store_trellis.cu", "store_trellis_few", device, **defines),
        _Format(_recipe(k), _recipe(v), (ctypes.c_uint32 * 4)(*flips)),
        len(sides),
        any(side.prescales > 1 for side in sides),
        _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count,
    )


def _recipe(side: Side) -> _Recipe:
    """Zeros of a side with other codes."""
    if side.family != "trellis":
        return _Recipe()
    book = trellis_levels(int(side.bits))
    candidates = prescale_candidates(side.prescales)
    return _Recipe(
        2 * HEAD_SIZE**0.5 / book.step,
        len(candidates),
        (ctypes.c_float * MAX_PRESCALES)(*candidates),
        (ctypes.c_int32 * 16)(*book.integers.tolist()),
    )


def launch(chosen: Plan, call: ctypes.Structure, tokens: int, heads: int, few: bool) -> None:
    """Queue the kernel for few tokens, or for many."""
    few = few and chosen.searches
    items = -(-tokens // (_FEW_TOKENS if few else TILE)) * heads
    kernel = chosen.few if few else chosen.kernel
    kernel.launch((min(items, chosen.blocks), chosen.sides, 1), 32 * _WARPS, 0, call, chosen.format, early=True)
