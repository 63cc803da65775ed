"""Prefill attention on Hopper: windows of the packed prefix are expanded, and a library's dense attention reads them.

Chunks of hundreds of tokens are bound by the matrix products, and nothing that a hand-written kernel could save is
worth what the libraries' kernels have gained there. So a window of at most 64 MiB of the prefix is de-quantised
(``expand.cu``, in the rotated basis), cuDNN's or FlashAttention's kernel attends to it with rotated queries, and
partial results are un-rotated and joined by their log-sum-exp (``prefill.cu``). Chunks of a few tokens go to the decode
kernel.

Windows are float16 whatever q is: bfloat16 would add 2^-9 to every K, V and rotated q, and 4e-3 and more to the result.
For float16's range K and V are divided by a power of two below their largest scale, and the powers come back with q and
with the result. A token whose V is 2^-20 of the largest is lost in that; one whose K is small has a small score.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime
from kvfold.ops.cuda.decode import constants, decode_attention
from kvfold.ops.cuda.expand import expand_window, find_peaks
from kvfold.ops.options import AttentionOptions

WINDOW_BYTES = 64 * 2**20
"""Of a de-quantised window: K and V of all heads."""

_FEW_ROWS = 64  # query rows of a KV head up to which the decode kernel is faster
_DTYPES = {torch.bfloat16: 0, torch.float16: 1}

_ROOM = 64.0  # rotated queries are divided by it, see prefill.cu

State = tuple[torch.Tensor, torch.Tensor]
"""Partial result of a chunk: out ``[n, Hq, 128]`` and log-sum-exp ``[n, Hq]``, of any strides."""


# --- lengths on the host ----------------------------------------------------------------------------------------------

_known = WeakTensorKeyDictionary()


def _on_host(lengths: torch.Tensor) -> list[int]:
    """The values of a tensor, read once for all layers of a model as long as nobody writes to it."""
    if lengths.is_inference():  # writes to such a tensor leave no trace
        return lengths.tolist()
    version, values = _known.get(lengths, (None, []))
    if version != lengths._version:
        values = lengths.tolist()
        _known[lengths] = lengths._version, values
    return values


# --- pieces -----------------------------------------------------------------------------------------------------------


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[1, H, n, d]`` to ``[1, H, m, d]`` by cuDNN, or by FlashAttention where cuDNN does not serve it.

    Returns:
        out ``[1, H, n, d]`` and log-sum-exp ``[1, H, n]``.
    """
    if _cudnn_serves(q.device):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.view(out.shape[:3])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


@lru_cache(maxsize=64)
def _cudnn_serves(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        *((name, ctypes.c_int64) for name in ("out_row", "out_head", "lse_row", "lse_head")),
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out", "peaks")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head")),
        *((name, ctypes.c_int32) for name in ("rows", "heads")),
    )


class _Kernels(NamedTuple):
    rotate: runtime.Kernel
    merge: runtime.Kernel
    merge_params: type[ctypes.Structure]


@lru_cache(maxsize=64)
def _kernels(layout: PageLayout, rotated: int, parts: int, dtype: torch.dtype, index: int) -> _Kernels:
    class Merge(ctypes.Structure):
        _fields_ = (
            ("parts", _Part * parts),
            *((name, ctypes.c_void_p) for name in ("out", "lse", "peaks")),
            *((name, ctypes.c_int64) for name in ("lse_row", "lse_head")),
            *((name, ctypes.c_int32) for name in ("rows", "heads")),
        )

    device = torch.device("cuda", index)
    defines: dict[str, int | str] = {"PARTS": parts, "ROTATED": rotated, "QTYPE": _DTYPES[dtype]}
    defines |= {n: v for n, v in constants(layout.format.k, layout.format.v).items() if n.startswith("SIGN")}
    rotate_kernel, merge_kernel = (
        runtime.kernel("prefill.cu", entry, device, **defines) for entry in ("rotate", "merge")
    )
    return _Kernels(rotate_kernel, merge_kernel, Merge)


def rotate(q: torch.Tensor, peaks: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """q ``[n, Hq, 128]`` rotated, times the power of two below K's peak, divided by 64: float16 ``[Hq, n, 128]``."""
    if q.stride(2) != 1 or q.data_ptr() % 8 or q.stride(0) % 4 or q.stride(1) % 4:
        q = q.contiguous()
    count, heads, _ = q.shape
    out = torch.empty((heads, count, 128), dtype=torch.float16, device=q.device)
    _kernels(layout, 1, 1, q.dtype, q.device.index).rotate.launch(
        (-(-count * heads // 8), 1, 1), 256, 0,
        _Rotate(q.data_ptr(), out.data_ptr(), peaks.data_ptr(), q.stride(0), q.stride(1), count, heads),
    )  # fmt: skip
    return out


def merge(
    rotated: list[State],
    plain: list[State],
    peaks: torch.Tensor | None,
    layout: PageLayout,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Join partial results into out ``[n, Hq, 128]``, contiguous, and lse ``[n, Hq]``, of any strides.

    Args:
        rotated: Float16 results over windows: rotated and divided by the power of two below V's peak.
        plain: Results in out's dtype and the model's basis.
        peaks: Those of the windows; None if there are none.
    """
    states = rotated + plain
    kernels = _kernels(layout, len(rotated), len(states), out.dtype, out.device.index)
    parts = (_Part * len(states))(
        *(_Part(o.data_ptr(), s.data_ptr(), o.stride(0), o.stride(1), s.stride(0), s.stride(1)) for o, s in states)
    )
    rows, heads = lse.shape
    kernels.merge.launch(
        (-(-rows * heads // 8), 1, 1), 256, 0,
        kernels.merge_params(
            parts, out.data_ptr(), lse.data_ptr(), None if peaks is None else peaks.data_ptr(), lse.stride(0),
            lse.stride(1), rows, heads,
        ),
    )  # fmt: skip


# --- the operation ----------------------------------------------------------------------------------------------------


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    layout: PageLayout,
    options: AttentionOptions,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.prefill_attention`. Reads the lengths on the host, once for all layers."""
    from kvfold.ops import _module, reference

    if options.window is not None or options.softcap is not None or options.mask is not None or q.dtype.itemsize != 2:
        # dense kernels of the libraries know none of these
        other = _module("triton") if _triton_serves(pages.device, layout) else reference
        result = other.prefill_attention(q, pages, block_table, context_lens, cu_seqlens, layout, options, k, v)
        return result[0], result[1]
    bounds, contexts = _on_host(cu_seqlens), _on_host(context_lens)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        chunk = None if k is None or v is None else (k[begin:end], v[begin:end])
        rotated, plain, peaks = _sequence(
            q[begin:end], pages, block_table[b : b + 1], contexts[b], context_lens[b : b + 1], layout, options, chunk
        )
        merge(rotated, plain, peaks, layout, out[begin:end], lse[:, begin:end].T)
    return out, lse


@lru_cache(maxsize=64)
def _triton_serves(device: torch.device, layout: PageLayout) -> bool:
    from kvfold.ops import _why_not

    return _why_not("triton", device, layout) is None


def _sequence(
    q: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    context: int,
    context_len: torch.Tensor,
    layout: PageLayout,
    options: AttentionOptions,
    chunk: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[list[State], list[State], torch.Tensor | None]:
    """The partial results of one sequence's chunk, in the pages' basis and in the model's, and the prefix's peaks."""
    count, num_heads, _ = q.shape
    heads = pages.shape[1]
    # first, as it is long enough for the host to prepare the rest meanwhile
    plain = [] if chunk is None else [_causal(q.transpose(0, 1), *chunk, options.scale)]
    if not context:
        return [], plain, None
    if count * num_heads // heads <= _FEW_ROWS:
        start = context_len if chunk is not None else context_len - count
        few = options._replace(query_start=start)
        out, lse = decode_attention(q[None], pages, table, context_len, layout, few)
        return [], [*plain, (out[0], lse[0].T)], None
    prefix = context if chunk is not None else context - count
    whole = _range(pages.device, 0), _range(pages.device, context)
    peaks = find_peaks(pages, table, layout, *whole, tokens=context)
    queries, scale = rotate(q, peaks, layout), options.scale * _ROOM
    # without a mask, the query heads of a group are just more queries of their KV head
    folded = queries.view(1, heads, -1, 128)
    window = WINDOW_BYTES // (4 * heads * 128) // 16 * 16
    rotated = []
    for begin in range(0, prefix, window):
        out, lse = _dense(
            folded, *_expand(pages, table, layout, begin, min(begin + window, prefix), peaks), False, scale
        )
        rotated.append((out.view(num_heads, count, 128).transpose(0, 1), lse.view(num_heads, count).T))
    if chunk is None:  # the chunk's own tokens are read from the pages too
        own = _expand(pages, table, layout, prefix // 16 * 16, context, peaks)
        own_k, own_v = (x[0, :, prefix % 16 :].transpose(0, 1) for x in own)
        rotated.append(_causal(queries, own_k, own_v, scale))
    return rotated, plain, peaks


def _expand(
    pages: torch.Tensor, table: torch.Tensor, layout: PageLayout, start: int, end: int, peaks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens start (a multiple of 16) to end of one sequence: K and V float16 ``[1, H, end - start, 128]``."""
    shape = (1, pages.shape[1], end - start, 128)
    k, v = (torch.empty(shape, dtype=torch.float16, device=pages.device) for _ in range(2))
    starts, lengths = _range(pages.device, start), _range(pages.device, end)
    expand_window(pages, table, layout, starts, lengths, k, v, tokens=end - start, peaks=peaks)
    return k, v


@lru_cache(maxsize=4096)
def _range(device: torch.device, position: int) -> torch.Tensor:
    return torch.full((1,), position, dtype=torch.int32, device=device)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> State:
    """A chunk's attention to itself: q ``[Hq, n, 128]``, k and v ``[n, H, 128]``."""
    group = q.shape[0] // k.shape[1]
    keys, values = (x.to(q.dtype).transpose(0, 1).repeat_interleave(group, dim=0).unsqueeze(0) for x in (k, v))
    out, lse = _dense(q.unsqueeze(0), keys, values, True, scale)
    return out[0].transpose(0, 1), lse[0].T
