"""Prefill attention on Hopper: windows of the packed prefix are expanded, and a library's dense attention reads them.

Chunks of hundreds of tokens are bound by the matrix products, and nothing that a hand-written kernel could save is
worth what the libraries' kernels have gained there. So a window of at most 64 MiB of the prefix is de-quantised into
bfloat16 (``expand.cu``, in the rotated basis), cuDNN's or FlashAttention's kernel attends to it, and partial results
are joined by their log-sum-exp and un-rotated (``merge.cu``). Queries are rotated by a product with the Hadamard matrix
of +1/8 and -1/8, which every dtype holds exactly. Chunks of a few tokens go to the decode kernel.

Rounding: rotated q, the window's K and V and its result are rounded to q's dtype, in bfloat16 by 2^-9 each. For normal
scores that is 4e-3 of the result, for peaked ones more; what is exact in a dense cache of bfloat16 is no better.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import lru_cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime
from kvfold.ops.cuda.decode import constants, decode_attention
from kvfold.ops.cuda.expand import expand_window
from kvfold.ops.options import AttentionOptions
from kvfold.rotation import rotation_matrix

WINDOW_BYTES = 64 * 2**20
"""Of a de-quantised window: K and V of all heads."""

_FEW_ROWS = 64  # query rows of a KV head up to which the decode kernel is faster
_DTYPES = {torch.bfloat16: 0, torch.float16: 1}

_NORM = 8 / 128**0.5  # of the matrix below

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


@lru_cache(maxsize=64)
def _hadamard(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The rotation times sqrt(128) / 8, ``[128, 128]`` of +1/8 and -1/8, which every dtype holds exactly."""
    return (torch.from_numpy(rotation_matrix(128) * 128**0.5).round() / 8).to(device=device, dtype=dtype)


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


@lru_cache(maxsize=64)
def _merge_kernel(
    layout: PageLayout, rotated: int, parts: int, dtype: torch.dtype, index: int
) -> tuple[runtime.Kernel, type[ctypes.Structure]]:
    class Params(ctypes.Structure):
        _fields_ = (
            ("parts", _Part * parts),
            *((name, ctypes.c_void_p) for name in ("out", "lse")),
            *((name, ctypes.c_int64) for name in ("lse_row", "lse_head")),
            *((name, ctypes.c_int32) for name in ("rows", "heads")),
        )

    signs = {n: v for n, v in constants(layout.format.k, layout.format.v).items() if n.startswith("SIGN")}
    kernel = runtime.kernel(
        "merge.cu", "merge", torch.device("cuda", index),
        PARTS=parts, ROTATED=rotated, QTYPE=_DTYPES[dtype], **signs,
    )  # fmt: skip
    return kernel, Params


def merge(rotated: list[State], plain: list[State], layout: PageLayout, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Join partial results, in the pages' basis and in the model's, into out ``[n, Hq, 128]``, contiguous, and lse
    ``[n, Hq]``, of any strides, in the model's basis."""
    states = rotated + plain
    kernel, params = _merge_kernel(layout, len(rotated), len(states), out.dtype, out.device.index)
    parts = (_Part * len(states))(
        *(_Part(o.data_ptr(), s.data_ptr(), o.stride(0), o.stride(1), s.stride(0), s.stride(1)) for o, s in states)
    )
    rows, heads = lse.shape
    kernel.launch(
        (-(-rows * heads // 8), 1, 1), 256, 0,
        params(parts, out.data_ptr(), lse.data_ptr(), lse.stride(0), lse.stride(1), rows, heads),
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
        rotated, plain = _sequence(
            q[begin:end], pages, block_table[b : b + 1], contexts[b], context_lens[b : b + 1], layout, options, chunk
        )
        merge(rotated, plain, layout, out[begin:end], lse[:, begin:end].T)
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
) -> tuple[list[State], list[State]]:
    """The partial results of one sequence's chunk, in the pages' basis and in the model's."""
    count, num_heads, _ = q.shape
    group = num_heads // pages.shape[1]
    # first, as it is long enough for the host to prepare the rest meanwhile
    plain = [] if chunk is None else [_causal(q, *chunk, options.scale)]
    if count * group <= _FEW_ROWS:
        if context:
            start = context_len if chunk is not None else context_len - count
            few = options._replace(query_start=start)
            out, lse = decode_attention(q[None], pages, table, context_len, layout, few)
            plain.append((out[0], lse[0].T))
        return [], plain
    prefix = context if chunk is not None else context - count
    if not context:
        return [], plain
    rotated, scale = q @ _hadamard(q.device, q.dtype).T, options.scale * _NORM
    packed = _prefix(rotated, pages, table, prefix, layout, scale)
    if chunk is None:  # the chunk's own tokens are read from the pages too
        own = _expand(pages, table, layout, prefix // 16 * 16, context, q.dtype)
        own_k, own_v = (x[0, :, prefix % 16 :].transpose(0, 1) for x in own)
        packed.append(_causal(rotated, own_k, own_v, scale))
    return packed, plain


def _prefix(
    rotated: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, tokens: int, layout: PageLayout, scale: float
) -> list[State]:
    """Attention to the first tokens of a sequence, all of which every query sees, window by window."""
    count, num_heads, _ = rotated.shape
    heads = pages.shape[1]
    # without a mask, the query heads of a group are just more queries of their KV head
    folded = rotated.view(count, heads, num_heads // heads, 128).permute(1, 2, 0, 3).reshape(1, heads, -1, 128)
    window = WINDOW_BYTES // (2 * heads * 128 * rotated.element_size()) // 16 * 16
    states = []
    for start in range(0, tokens, window):
        end = min(start + window, tokens)
        k, v = _expand(pages, table, layout, start, end, rotated.dtype)
        out, lse = _dense(folded, k, v, False, scale)
        out = out.view(heads, num_heads // heads, count, 128).permute(2, 0, 1, 3)
        states.append((out.flatten(1, 2), lse.view(num_heads, count).T))
    return states


def _expand(
    pages: torch.Tensor, table: torch.Tensor, layout: PageLayout, start: int, end: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens start (a multiple of 16) to end of one sequence: K and V ``[1, H, end - start, 128]``."""
    k, v = (torch.empty((1, pages.shape[1], end - start, 128), dtype=dtype, device=pages.device) for _ in range(2))
    starts, lengths = _range(pages.device, start), _range(pages.device, end)
    expand_window(pages, table, layout, starts, lengths, k, v, tokens=end - start)
    return k, v


@lru_cache(maxsize=4096)
def _range(device: torch.device, position: int) -> torch.Tensor:
    return torch.full((1,), position, dtype=torch.int32, device=device)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> State:
    """A chunk's attention to itself: q ``[n, Hq, 128]``, k and v ``[n, H, 128]``."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(q.dtype).transpose(0, 1).repeat_interleave(group, dim=0).unsqueeze(0) for x in (k, v))
    out, lse = _dense(q.transpose(0, 1).unsqueeze(0), keys, values, True, scale)
    return out[0].transpose(0, 1), lse[0].T
