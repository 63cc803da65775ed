"""De-quantising a window of every sequence by the CUDA C++ kernel in ``expand.cu``, in the stored (rotated) basis.

Prefill attends to a long prefix window by window: a window is expanded and given to a library's attention. Values equal
the layout's ``decode``, rounded to the output's dtype, but where float32 rounding decides: the level is multiplied by
its unit and the scale in another order.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch

from kvfold.codebooks import lloyd_max
from kvfold.errors import FormatError, ShapeError
from kvfold.formats import TILE, Side
from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime
from kvfold.ops.cuda.store import HEAD_SIZE, WIDTHS

_WARPS = 8  # of a block, as in expand.cu
_DTYPES = (torch.bfloat16, torch.float16)


def supports(layout: PageLayout) -> str | None:
    """Why the kernel cannot read these pages, or None if it can."""
    for name, side, size in (("K", layout.format.k, layout.head_size), ("V", layout.format.v, layout.head_size_v)):
        if size != HEAD_SIZE:
            return f"the CUDA expand kernel is built for head size {HEAD_SIZE}, and {name} has {size}"
        if side.family != "lloyd" or side.bits not in WIDTHS:
            return (
                f"the CUDA expand kernel reads Lloyd–Max codes of 2, 3 and 4 bits, and {name} is stored as {side.name}"
            )
    return None


# --- what the kernel is told ------------------------------------------------------------------------------------------


class _Levels(ctypes.Structure):
    _fields_ = (("upper", ctypes.c_uint8 * 8), ("lower", ctypes.c_uint8 * 8), ("unit", ctypes.c_float))


class _Window(ctypes.Structure):
    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("page_bytes", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("peaks", ctypes.c_void_p),
        ("page_shift", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
    )


def _levels(side: Side) -> _Levels:
    """Bytes of the levels in units of half a step: by code, or with 4 bits the positive ones, as the sign is a bit."""
    book = lloyd_max(int(side.bits), HEAD_SIZE)
    assert book.integers is not None  # up to 4 bits there always are
    odd = torch.from_numpy(2 * book.integers + 1).float()
    if len(odd) < 8:
        odd = torch.cat([odd, -odd])
    bits = odd.bfloat16().view(torch.int16).int().tolist()
    upper, lower = ([word >> shift & 0xFF for word in bits] for shift in (8, 0))
    eight = ctypes.c_uint8 * 8
    return _Levels(eight(*upper), eight(*lower), book.step / 2)


def _defines(layout: PageLayout, dtype: torch.dtype, wide_table: bool) -> dict[str, int | str]:
    return {
        "TILE_BYTES": layout.tile_bytes,
        "K_BITS": int(layout.format.k.bits),
        "K_PLANE0": layout.k_planes[0],
        "K_PLANE1": layout.k_planes[-1],
        "K_SCALES": layout.k_scales,
        "V_BITS": int(layout.format.v.bits),
        "V_PLANE0": layout.v_planes[0],
        "V_PLANE1": layout.v_planes[-1],
        "V_SCALES": layout.v_scales,
        "FLOAT16": int(dtype == torch.float16),
        "WIDE_TABLE": int(wide_table),
    }


class _Plan(NamedTuple):
    kernel: runtime.Kernel
    peaks: runtime.Kernel
    k: _Levels
    v: _Levels


@lru_cache(maxsize=1024)
def _plan(layout: PageLayout, dtype: torch.dtype, wide_table: bool, device: torch.device) -> _Plan:
    if reason := supports(layout):
        raise FormatError(f"{reason}; use ops.backend('auto'), which chooses an implementation that can")
    defines = _defines(layout, dtype, wide_table)
    return _Plan(
        runtime.kernel("expand.cu", "expand", device, **defines),
        runtime.kernel("expand.cu", "peaks", device, **defines),
        _levels(layout.format.k),
        _levels(layout.format.v),
    )


# --- expand -----------------------------------------------------------------------------------------------------------


def expand_window(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    layout: PageLayout,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    *,
    tokens: int,
    peaks: torch.Tensor | None = None,
) -> None:
    """De-quantise ``tokens`` tokens of every sequence, from a start of its own, into ``k_out`` and ``v_out``.

    Nothing is read beyond a sequence's length, so a window may reach past it and past the block table.

    Args:
        pages: uint8 ``[num_pages, H, page_bytes]``.
        block_table: int32 or int64 ``[B, P]``, rows contiguous.
        starts: int32 ``[B]``: position of each window's first token, a multiple of 16 (the caller's promise).
        lengths: int32 ``[B]``: tokens of each sequence; rows of the window from there on become zero.
        k_out: bf16 or f16 ``[B, H, tokens, 128]``, contiguous: K in the stored basis, rotated.
        v_out: The same for V.
        peaks: float32 ``[2]`` of :func:`find_peaks`: K and V are divided by the power of two below their peak. Default:
            they are not divided.

    Raises:
        FormatError: The layout is not supported.
        ShapeError: A tensor has the wrong shape, dtype or stride.
        CudaError: The kernel cannot be compiled or launched.
    """
    batch, heads = len(block_table), pages.shape[1]
    shape = (batch, heads, tokens, HEAD_SIZE)
    for name, x in (("k_out", k_out), ("v_out", v_out)):
        if x.shape != shape or x.dtype != k_out.dtype or x.dtype not in _DTYPES or not x.is_contiguous():
            raise ShapeError(
                f"{name} is contiguous bfloat16 or float16 {list(shape)}, as the other, not {x.dtype} {list(x.shape)}"
            )
    for name, x in (("starts", starts), ("lengths", lengths)):
        if x.dtype != torch.int32 or x.shape != (batch,) or not x.is_contiguous():
            raise ShapeError(f"{name} is contiguous int32 [{batch}], not {x.dtype} {list(x.shape)}")
    if block_table.dtype not in (torch.int32, torch.int64) or block_table.stride(1) != 1:
        raise ShapeError("block_table is int32 or int64 with contiguous rows")
    if pages.data_ptr() % 16 or k_out.data_ptr() % 16 or v_out.data_ptr() % 16:
        raise ShapeError("pages, k_out and v_out begin at multiples of 16 bytes")
    plan = _plan(layout, k_out.dtype, block_table.dtype == torch.int64, pages.device)
    items = -(-tokens // TILE) * heads * batch
    plan.kernel.launch(
        (-(-items // _WARPS), 1, 1),
        32 * _WARPS,
        0,
        _Window(
            pages.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            layout.page_bytes,
            starts.data_ptr(),
            lengths.data_ptr(),
            k_out.data_ptr(),
            v_out.data_ptr(),
            None if peaks is None else peaks.data_ptr(),
            layout.page_size.bit_length() - 1,
            batch,
            heads,
            tokens,
        ),
        plan.k,
        plan.v,
    )


def find_peaks(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout, starts: torch.Tensor, lengths: torch.Tensor,
    *, tokens: int, dtype: torch.dtype = torch.float16,
) -> torch.Tensor:  # fmt: skip
    """The largest finite scales of K and of V among the windows' tokens, float32 ``[2]``; arguments as of
    :func:`expand_window`, ``dtype`` of the windows that will be expanded."""
    plan = _plan(layout, dtype, block_table.dtype == torch.int64, pages.device)
    peaks = torch.zeros(2, dtype=torch.float32, device=pages.device)
    plan.peaks.launch(
        (min(264, -(-tokens // (TILE * _WARPS)) * pages.shape[1] * len(block_table)), 1, 1),
        32 * _WARPS,
        0,
        _Window(
            pages=pages.data_ptr(),
            table=block_table.data_ptr(),
            table_stride=block_table.stride(0),
            page_bytes=layout.page_bytes,
            starts=starts.data_ptr(),
            lengths=lengths.data_ptr(),
            peaks=peaks.data_ptr(),
            page_shift=layout.page_size.bit_length() - 1,
            batch=len(block_table),
            heads=pages.shape[1],
            tokens=tokens,
        ),
    )
    return peaks
