"""De-quantising a window of every sequence by the CUDA C++ kernel in ``expand.cu``, in the stored (rotated) basis.

Prefill attends to a long prefix window by window: a window is expanded and given to a library's attention. Values equal
the layout's ``decode``, rounded to the output's dtype (V, where it is wanted so, to 8 significant bits), but where
float32 rounding decides: the level is multiplied by its unit and the scale in another order.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch

from kvfold.codebooks import lloyd_max, trellis_levels
from kvfold.errors import FormatError, ShapeError
from kvfold.formats import TILE, Side
from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime
from kvfold.ops.cuda.formats import HEAD_SIZE, side_defines, supports

_WARPS = 8  # of a block, as in expand.cu
_PEAK_BLOCKS = 1056  # as many as an H200 holds at once: more warps wait for memory together
_DTYPES = (torch.bfloat16, torch.float16)

SMALLEST_PEAK = 2.0**-100
"""Below it nothing is scaled up: the reciprocal and its products stay finite."""


# --- what the kernel is told ------------------------------------------------------------------------------------------


class _Levels(ctypes.Structure):
    _fields_ = (("upper", ctypes.c_uint8 * 8), ("lower", ctypes.c_uint8 * 8), ("unit", ctypes.c_float))


class _Window(ctypes.Structure):
    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("page_bytes", ctypes.c_int64),
        ("page_stride", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("peaks", ctypes.c_void_p),
        ("page_shift", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("start", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("coarse", ctypes.c_int32),
    )


class _Chunk(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("k_row", "k_head", "v_row", "v_head")),
        *((name, ctypes.c_int32) for name in ("rows", "heads", "half")),
    )


def _levels(side: Side) -> _Levels:
    """Bytes of the levels in units of half a step: by code, or with 4 bits the positive ones, as the sign is a bit.

    Of a trellis by index, ascending, or the positive ones if there are 16; of 32 the magnitudes' integers.
    """
    trellis = side.family == "trellis"
    book = trellis_levels(int(side.bits)) if trellis else lloyd_max(int(side.bits), HEAD_SIZE)
    assert book.integers is not None  # up to 4 bits there always are
    eight = ctypes.c_uint8 * 8
    if trellis and side.bits == 4:
        return _Levels(eight(*book.integers[:8].tolist()), eight(*book.integers[8:].tolist()), book.step / 2)
    odd = torch.from_numpy(2 * book.integers + 1).float()
    if len(odd) < 8:
        odd = torch.cat([-odd.flip(0), odd] if trellis else [odd, -odd])
    bits = odd.bfloat16().view(torch.int16).int().tolist()
    upper, lower = ([word >> shift & 0xFF for word in bits] for shift in (8, 0))
    return _Levels(eight(*upper), eight(*lower), book.step / 2)


def _defines(layout: PageLayout, dtype: torch.dtype, wide_table: bool) -> dict[str, int | str]:
    return {
        "TILE_BYTES": layout.tile_bytes,
        **side_defines("K", layout.format.k, layout.k_planes, layout.k_scales),
        **side_defines("V", layout.format.v, layout.v_planes, layout.v_scales),
        "MEAN": int(layout.format.mean),
        "FLOAT16": int(dtype == torch.float16),
        "WIDE_TABLE": int(wide_table),
    }


class Plan(NamedTuple):
    """The kernels for pages of a layout on a device."""

    kernel: runtime.Kernel
    peaks: runtime.Kernel
    k: _Levels
    v: _Levels
    page_bytes: int
    page_shift: int


@lru_cache(maxsize=1024)
def plan(layout: PageLayout, dtype: torch.dtype, wide_table: bool, device: torch.device) -> Plan:
    """For windows of a dtype, and block tables of int64 (wide) or int32.

    Raises:
        FormatError: The layout is not supported.
        CudaError: The kernels cannot be compiled.
    """
    if reason := supports(layout):
        raise FormatError(f"{reason}; use ops.backend('auto'), which chooses an implementation that can")
    defines = _defines(layout, dtype, wide_table)
    return Plan(
        runtime.kernel("expand.cu", "expand", device, **defines),
        runtime.kernel("expand.cu", "peaks", device, **defines),
        _levels(layout.format.k),
        _levels(layout.format.v),
        layout.page_bytes,
        layout.page_size.bit_length() - 1,
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
    chosen = plan(layout, k_out.dtype, block_table.dtype == torch.int64, pages.device)
    window = _window(
        chosen, pages, block_table, k_out.data_ptr(), v_out.data_ptr(), peaks, 0, heads, tokens,
        starts.data_ptr(), lengths.data_ptr(), rows=tokens,
    )  # fmt: skip
    _expand(chosen, window)


def expand_heads(
    chosen: Plan,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    peaks: torch.Tensor,
    *,
    first: int,
    start: int,
    coarse: bool = False,
) -> None:
    """:func:`expand_window` for a range of heads and tokens of one sequence, and without checks.

    Pages and the block table were complete before :func:`find_peaks` was called, and nothing has been written to them
    since: they are read while the kernels ahead end.

    Args:
        chosen: The :func:`plan`.
        block_table: ``[1, P]``.
        k_out: ``[heads, tokens, 128]``: heads from ``first`` on, tokens from ``start`` on, a multiple of 16; the
            sequence has all of them. Those of a head are contiguous; the heads may be further apart.
        v_out: The same for V, of the same strides.
        coarse: Round V to 8 significant bits, as bfloat16 has: what multiplies float16 by it draws less power.
    """
    heads, tokens, _ = k_out.shape
    window = _window(
        chosen, pages, block_table, k_out.data_ptr(), v_out.data_ptr(), peaks, first, heads, tokens,
        None, None, start, start + tokens, k_out.stride(0) // HEAD_SIZE, coarse,
    )  # fmt: skip
    _expand(chosen, window, early=True)


def no_peaks(device: torch.device) -> torch.Tensor:
    """Float32 ``[2]``: what :func:`find_peaks` begins with."""
    return torch.full((2,), SMALLEST_PEAK, dtype=torch.float32, device=device)


def find_peaks(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout,
    starts: torch.Tensor | None = None, lengths: torch.Tensor | None = None,
    *, tokens: int, dtype: torch.dtype = torch.float16, chunk: tuple[torch.Tensor, torch.Tensor] | None = None,
    peaks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Float32 ``[2]``: the largest finite scales of K and of V among the windows' tokens, and 2^-100 at least. Sixteen
    times those of the pages' key references count for K.

    Arguments are as of :func:`expand_window`, ``dtype`` of the windows that will be expanded. Without starts and
    lengths every sequence's first ``tokens`` tokens are looked at. ``chunk`` are K and V, 16-bit floats ``[n, H, 128]``
    with vectors at multiples of 16 bytes, that come into the windows too, rotated: then eight times their largest
    finite element counts as well. ``peaks`` are those of :func:`no_peaks`, if they have been made before.
    """
    chosen = plan(layout, dtype, block_table.dtype == torch.int64, pages.device)
    peaks = no_peaks(pages.device) if peaks is None else peaks
    heads = pages.shape[1]
    window = _window(
        chosen, pages, block_table, None, None, peaks, 0, heads, tokens,
        None if starts is None else starts.data_ptr(), None if lengths is None else lengths.data_ptr(), 0, tokens,
    )  # fmt: skip
    own, own_items = _Chunk(), 0
    if chunk is not None:
        k, v = chunk
        own = _Chunk(
            k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1), len(k), heads,
            k.dtype == torch.float16,
        )  # fmt: skip
        own_items = -(-len(k) // TILE) * heads
    items = own_items + -(-(-(-tokens // TILE) * heads * window.batch) // 4)
    grid = (max(1, min(_PEAK_BLOCKS, -(-items // _WARPS))), 1, 1)
    chosen.peaks.launch(grid, 32 * _WARPS, 0, window, own, early=True)
    return peaks


def _window(
    chosen: Plan, pages: torch.Tensor, table: torch.Tensor, k: int | None, v: int | None, peaks: torch.Tensor | None,
    first: int, heads: int, tokens: int, starts: int | None, lengths: int | None, start: int = 0, length: int = 0,
    rows: int = 0, coarse: bool = False,
) -> _Window:  # fmt: skip
    """In the order of the structure's fields, because naming them takes longer, and a prefill has dozens of windows."""
    head_bytes = chosen.page_bytes
    return _Window(
        pages.data_ptr() + first * head_bytes, table.data_ptr(), table.stride(0), head_bytes,
        pages.shape[1] * head_bytes, starts, lengths, k, v, None if peaks is None else peaks.data_ptr(),
        chosen.page_shift, table.shape[0], heads, tokens, start, length, rows, coarse,
    )  # fmt: skip


def _expand(chosen: Plan, window: _Window, early: bool = False) -> None:
    """``early``: pages and table were complete before the kernel ahead began, and there are no starts and lengths."""
    items = -(-window.tokens // TILE) * window.heads * window.batch
    chosen.kernel.launch((-(-items // _WARPS), 1, 1), 32 * _WARPS, 0, window, chosen.k, chosen.v, early=early)
