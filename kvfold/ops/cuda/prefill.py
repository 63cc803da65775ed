"""Prefill attention on Hopper: windows of the packed prefix are expanded, and a library's dense attention reads them.

Chunks of hundreds of tokens are bound by the matrix products, and nothing that a hand-written kernel could save is
worth what the libraries' kernels have gained there. So windows of the prefix, 64 MiB at most at any time, are
de-quantised (``expand.cu``, in the rotated basis), the library's kernel attends to them with rotated queries, and
results are un-rotated (``prefill.cu``). Chunks of a few tokens go to the decode kernel.

With FlashAttention-3 (``dense`` says when) a chunk's own K and V are rotated into the window behind its prefix, and one
causal call has the result of some heads. cuDNN attends to the windows and, apart, to the chunk, and partial results are
joined by their log-sum-exp; so they are where the tokens of one head exceed a window.

A window is some KV heads by some tokens (:func:`_split`), and float16 whatever q is: bfloat16 would add 2^-9 to every
K, V and rotated q, and 4e-3 and more to the result. For float16's range K and V are divided by a power of two below
their peak (``expand.find_peaks``), and the powers come back with q and with the result. A token whose V is 2^-24 of the
largest loses precision in that; one whose K is small has a small score.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import lru_cache
from typing import NamedTuple

import torch

from kvfold.errors import ShapeError
from kvfold.layout import PageLayout
from kvfold.ops.cuda import dense, expand, runtime
from kvfold.ops.cuda.decode import decode_attention
from kvfold.ops.cuda.formats import DTYPES, sign_words
from kvfold.ops.lengths import on_host
from kvfold.ops.options import AttentionOptions

WINDOW_BYTES = 64 * 2**20
"""Of the de-quantised windows that exist at a time: K and V."""

_FEW_ROWS = 64  # query rows of a KV head up to which the decode kernel is faster
_QUERY_BYTES = 32 * 2**20  # of rotated queries at a time
_RESULT_BYTES = 32 * 2**20  # of partial results of a group of heads at a time
_VECTOR_BYTES = 2 * 128  # of such a query or result
_CAPACITY = 16  # partial results that are joined at once, unless there are more

_ROOM = 64.0  # rotated queries are divided by it, see prefill.cu
_LIFT = 1024.0  # K and V of windows are multiplied by it, see common.cuh
_TOKEN_BYTES = 2 * 2 * 128  # of a KV head in a window

State = tuple[torch.Tensor, torch.Tensor]
"""Partial result of a chunk: out ``[n, Hq, 128]`` and log-sum-exp ``[n, Hq]``, of any strides."""


# --- this package's kernels -------------------------------------------------------------------------------------------


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        *((name, ctypes.c_int64) for name in ("out_row", "out_head", "lse_row", "lse_head")),
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_head", "out_head")),
        *((name, ctypes.c_int32) for name in ("rows", "heads", "side", "first")),
    )


class _Rotations(ctypes.Structure):
    _fields_ = (("jobs", _Rotate * 3), ("peaks", ctypes.c_void_p))


def _defines(dtype: torch.dtype) -> dict[str, int | str]:
    return {"CAPACITY": 1, "ROTATED": 1, "QTYPE": DTYPES[dtype], **sign_words()}


@lru_cache(maxsize=64)
def _rotate_kernel(layout: PageLayout, dtype: torch.dtype, index: int) -> runtime.Kernel:
    return runtime.kernel("prefill.cu", "rotate", torch.device("cuda", index), **_defines(dtype))


@lru_cache(maxsize=64)
def _merge_kernel(
    layout: PageLayout, parts: int, rotated: bool, dtype: torch.dtype, index: int
) -> tuple[runtime.Kernel, type[ctypes.Structure]]:
    """The kernel, and its parameters. There are few kernels, so that serving need not compile what it has not seen."""
    capacity = 1 if parts == 1 else max(_CAPACITY, 1 << (parts - 1).bit_length())

    class Merge(ctypes.Structure):
        _fields_ = (
            ("parts", _Part * capacity),
            *((name, ctypes.c_void_p) for name in ("out", "lse", "peaks")),
            *((name, ctypes.c_int64) for name in ("out_row", "lse_row", "lse_head")),
            *((name, ctypes.c_int32) for name in ("rows", "heads", "count", "rotated")),
        )

    defines = _defines(dtype) | {"CAPACITY": capacity, "ROTATED": int(rotated or capacity > 1)}
    return runtime.kernel("prefill.cu", "merge", torch.device("cuda", index), **defines), Merge


def _blocks(rows: int, heads: int) -> int:
    """Of four warps, each of which takes 16 rows of a head."""
    return -(-(-(-rows // 16) * heads) // 4)


def _readable(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x ``[n, H, 128]`` as kernels and libraries read it: vectors contiguous, and at multiples of 16 bytes."""
    x = x.to(dtype)
    if x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16):
        return x
    return x.clone(memory_format=torch.contiguous_format)


QUERIES, KEYS, VALUES = 0, 1, 2

Job = tuple[torch.Tensor, torch.Tensor, int]
"""What :func:`rotate` reads: ``[n, heads, 128]``, see :func:`_readable`; where it writes: float16 ``[heads, n, 128]``,
rows contiguous; and which of the three it is."""


def rotate(jobs: list[Job], peaks: torch.Tensor, layout: PageLayout) -> None:
    """Rotate up to three tensors of one dtype in one launch.

    Keys and values are divided by the power of two below their peak; queries are multiplied by that of the keys, and
    divided by 64.
    """
    call = _Rotations(peaks=peaks.data_ptr())
    blocks = 0
    for at, (x, out, side) in enumerate(jobs):
        rows, heads, _ = x.shape
        call.jobs[at] = _Rotate(
            x.data_ptr(), out.data_ptr(), x.stride(0), x.stride(1), out.stride(0), rows, heads, side, blocks
        )
        blocks += _blocks(rows, heads)
    for at in range(len(jobs), 3):
        call.jobs[at].first = blocks
    x = jobs[0][0]
    _rotate_kernel(layout, x.dtype, x.device.index).launch((blocks, 1, 1), 128, 0, call)


def merge(
    rotated: list[State],
    plain: list[State],
    peaks: torch.Tensor | None,
    layout: PageLayout,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Join partial results into out ``[n, Hq, 128]``, heads contiguous, and lse ``[n, Hq]``, of any strides.

    All vectors are contiguous and at multiples of 16 bytes.

    Args:
        rotated: Float16 results over windows: rotated and divided by the power of two below V's peak.
        plain: Results in out's dtype and the model's basis.
        peaks: Those of the windows; None if there are none.
    """
    states = rotated + plain
    kernel, params = _merge_kernel(layout, len(states), bool(rotated), out.dtype, out.device.index)
    call = params(
        out=out.data_ptr(), lse=lse.data_ptr(), peaks=None if peaks is None else peaks.data_ptr(),
        out_row=out.stride(0), lse_row=lse.stride(0), lse_head=lse.stride(1), rows=lse.shape[0], heads=lse.shape[1],
        count=len(states), rotated=len(rotated),
    )  # fmt: skip
    for at, (o, s) in enumerate(states):
        call.parts[at] = _Part(o.data_ptr(), s.data_ptr(), o.stride(0), o.stride(1), s.stride(0), s.stride(1))
    kernel.launch((_blocks(*lse.shape), 1, 1), 128, 0, call)


# --- windows ----------------------------------------------------------------------------------------------------------

# What a library's kernel takes on an H200, in keys that a block of 128 query rows reads: 81 of them a microsecond.
_CALL_COST = 650  # of a launch, with the blocks that begin and end
_MERGE_COST = 1 / 400  # of joining another vector of 128


class _Split(NamedTuple):
    """How a sequence's keys are cut: windows of some KV heads by some tokens, the last of each smaller."""

    heads: int
    tokens: int


@lru_cache(maxsize=4096)
def _split(
    rows: int, heads: int, keys: int, room: int, processors: int, least: int = 16, shares: bool = False
) -> _Split:
    """The windows of at most ``room`` bytes, and ``least`` tokens, that ``rows`` queries of a KV head read fastest.

    Few heads with all tokens need no joining; many heads make enough blocks for all processors where queries are few,
    unless the library ``shares`` the keys of a block among processors then, as FlashAttention-3 does. Partial results
    of a group are there together: where there is a choice, they have room.
    """

    def waves(width: int) -> float:
        blocks = -(-rows // 128) * width
        return 1 / (processors // blocks) if shares and blocks < processors else -(-blocks // processors)

    def cost(split: _Split) -> float:
        groups, rest = divmod(heads, split.heads)
        times = max(1, -(-keys // split.tokens))
        reading = (groups * waves(split.heads) + (waves(rest) if rest else 0)) * keys
        return reading + _CALL_COST * times * (groups + (rest > 0)) + _MERGE_COST * times * rows * heads

    splits = [_Split(width, room // (_TOKEN_BYTES * width) // 16 * 16) for width in range(1, heads + 1)]
    fitting = [split for split in splits if split.tokens >= least]
    within = [split for split in fitting if _results(rows, keys, split) * _VECTOR_BYTES <= _RESULT_BYTES]
    return min(within or fitting[:1], key=cost)


def _results(rows: int, keys: int, split: _Split) -> int:
    """Vectors of the partial results of a group of heads."""
    return max(1, -(-keys // split.tokens)) * rows * split.heads


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Windows:
    """Windows of a sequence, one after the other in the same memory."""

    def __init__(
        self, pages: torch.Tensor, table: torch.Tensor, layout: PageLayout, peaks: torch.Tensor, vectors: int
    ) -> None:
        """``vectors`` are the tokens times heads of the largest."""
        self._pages, self._table, self._peaks = pages, table, peaks
        self._plan = expand.plan(layout, torch.float16, table.dtype == torch.int64, pages.device)
        self._memory = torch.empty(2, vectors * 128, dtype=torch.float16, device=pages.device)

    def read(self, first: int, heads: int, start: int, end: int, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V float16 ``[heads, end - start, 128]`` of heads and tokens from ``first`` and ``start`` on.

        ``start`` is a multiple of 16. From token ``stored`` on nothing is written.
        """
        tokens = end - start
        k, v = (half[: heads * tokens * 128].view(heads, tokens, 128) for half in self._memory)
        if start < stored:
            of_pages = slice(min(end, stored) - start)
            expand.expand_heads(
                self._plan, self._pages, self._table, k[:, of_pages], v[:, of_pages], self._peaks,
                first=first, start=start,
            )  # fmt: skip
        return k, v


# --- the operation ----------------------------------------------------------------------------------------------------


class _Sequence(NamedTuple):
    """A chunk of a sequence, and where its result goes.

    Attributes:
        q: ``[n, Hq, 128]``.
        chunk: K and V ``[n, H, 128]``; None if the chunk's tokens are read from the pages.
        table: ``[1, P]``.
        context: Tokens to read from the pages, the chunk's included if ``chunk`` is None.
        context_len: The same, ``[1]`` on the device.
        out: ``[n, Hq, 128]``, contiguous.
        lse: ``[n, Hq]``.
    """

    q: torch.Tensor
    chunk: tuple[torch.Tensor, torch.Tensor] | None
    table: torch.Tensor
    context: int
    context_len: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


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
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.prefill_attention`. Reads the lengths on the host, once for all layers."""
    if options.window is not None or options.softcap is not None or options.mask is not None or q.dtype.itemsize != 2:
        result, lse = _elsewhere(q, pages, block_table, context_lens, cu_seqlens, layout, options, k, v)
        return result if out is None else out.copy_(result), lse
    if pages.data_ptr() % 16:
        raise ShapeError("pages have to begin at a multiple of 16 bytes for the CUDA kernels; pass a tensor that does")
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    bounds, contexts = on_host(cu_seqlens), on_host(context_lens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device).T
    at_once = k is not None and dense.choose(pages.device) == "fa3"
    todo = itertools.groupby(range(len(contexts)), lambda b: at_once and not contexts[b])
    for beginning, rows in ((key, list(group)) for key, group in todo):
        if k is not None and v is not None and beginning:
            _attend_to_beginnings(q, k, v, rows[0], bounds[rows[0] : rows[-1] + 2], cu_seqlens, options.scale, out, lse)
            continue
        for b in rows:
            begin, end = bounds[b : b + 2]
            if begin == end:
                continue
            chunk = None if k is None or v is None else (_rows(k, begin, end), _rows(v, begin, end))
            sequence = _Sequence(
                _rows(q, begin, end), chunk, _rows(block_table, b, b + 1), contexts[b], _rows(context_lens, b, b + 1),
                _rows(out, begin, end), _rows(lse, begin, end),
            )  # fmt: skip
            _attend(sequence, pages, layout, options)
    return out, lse.T


def _rows(x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """``x[begin:end]``, sooner where that is all."""
    return x if end - begin == x.shape[0] else x.narrow(0, begin, end - begin)


def _attend_to_beginnings(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, bounds: list[int], cu_seqlens: torch.Tensor,
    scale: float, out: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The results of neighbouring chunks with nothing in the pages, from the one numbered ``first`` on, in one call.

    ``bounds`` are where they begin and the last ends, ``cu_seqlens`` those of all on the device.
    """
    begin, end = bounds[0], bounds[-1]
    longest = max(y - x for x, y in itertools.pairwise(bounds))
    if not longest:
        return
    starts = cu_seqlens[first : first + len(bounds)]
    own_q, own_k, own_v = (_readable(_rows(x, begin, end), q.dtype) for x in (q, k, v))
    starts = (starts - begin if begin else starts).int()
    _, states = dense.flash_attention_3(own_q, own_k, own_v, True, scale, starts, longest, _rows(out, begin, end))
    lse[begin:end] = states


def _elsewhere(
    q: torch.Tensor, pages: torch.Tensor, block_table: torch.Tensor, context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor, layout: PageLayout, options: AttentionOptions,
    k: torch.Tensor | None, v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the libraries' dense kernels do not know: windows, soft caps, masks, float32."""
    from kvfold.ops import _module, reference

    other = _module("triton") if _triton_serves(pages.device, layout) else reference
    result = other.prefill_attention(q, pages, block_table, context_lens, cu_seqlens, layout, options, k, v)
    return result[0], result[1]


@lru_cache(maxsize=64)
def _triton_serves(device: torch.device, layout: PageLayout) -> bool:
    from kvfold.ops import _why_not

    return _why_not("triton", device, layout) is None


def _attend(s: _Sequence, pages: torch.Tensor, layout: PageLayout, options: AttentionOptions) -> None:
    """The result of a sequence's chunk."""
    count, num_heads, _ = s.q.shape
    if s.context and count * num_heads // pages.shape[1] > _FEW_ROWS:
        attend = _attend_at_once if dense.choose(pages.device) == "fa3" else _attend_apart
        attend(s, pages, layout, options.scale)
        return
    plain = [] if s.chunk is None else [_causal(s.q, *s.chunk, options.scale)]
    if s.context:
        start = s.context_len if s.chunk is not None else s.context_len - count
        few = options._replace(query_start=start)
        out, lse = decode_attention(s.q[None], pages, s.table, s.context_len, layout, few)
        plain.append((out[0], lse[0].T))
    merge([], plain, None, layout, s.out, s.lse)


# --- prefix and chunk at once: FlashAttention-3 -----------------------------------------------------------------------


def _attend_at_once(s: _Sequence, pages: torch.Tensor, layout: PageLayout, scale: float) -> None:
    """The result of a chunk of many rows: its own K and V are in the windows, behind those of the pages."""
    count, heads = len(s.q), pages.shape[1]
    q = _readable(s.q, s.q.dtype)
    chunk = None if s.chunk is None else (_readable(s.chunk[0], q.dtype), _readable(s.chunk[1], q.dtype))
    peaks = expand.find_peaks(pages, s.table, layout, tokens=s.context, chunk=chunk)
    room, before = WINDOW_BYTES, s.context - (count if chunk is None else 0)
    most = _most_queries(before + count, q.shape[1], heads, room)
    parts = -(-count // most)  # about as large as each other: each reads all keys
    most = min(-(-count // (128 * parts)) * 128, most)
    for begin in range(0, count, most):
        end = min(begin + most, count)
        rows = (end - begin) * (q.shape[1] // heads)
        split = _split(rows, heads, before + end, room, _processors(pages.device), end - begin + 16, True)
        windows = _Windows(pages, s.table, layout, peaks, split.heads * min(split.tokens, before + end))
        part = s._replace(q=q[begin:end], chunk=chunk, out=s.out[begin:end], lse=s.lse[begin:end])
        _attend_causally(part, windows, split, before + end, heads, peaks, layout, scale * _ROOM / _LIFT)
        del windows  # before there are others


def _most_queries(keys: int, num_heads: int, heads: int, room: int) -> int:
    """How many queries are served at a time, so that they, rotated, and partial results are bounded, as windows are.

    The last window has all keys that only some of the queries see, so these are as many as fit, at most.
    """
    windows = -(-keys // (room // _TOKEN_BYTES))  # of one head, at least
    fitting = min(_QUERY_BYTES // num_heads, _RESULT_BYTES // (num_heads // heads * windows)) // _VECTOR_BYTES
    return max(min(fitting // 128 * 128, room // _TOKEN_BYTES - 16), 16)


def _attend_causally(
    s: _Sequence, windows: _Windows, split: _Split, keys: int, heads: int, peaks: torch.Tensor, layout: PageLayout,
    scale: float,
) -> None:  # fmt: skip
    """The result of queries that are the last of a sequence's ``keys`` tokens; the chunk may have begun before them."""
    count, num_heads, _ = s.q.shape
    group = num_heads // heads
    queries = torch.empty((num_heads, count, 128), dtype=torch.float16, device=s.q.device)
    jobs: list[Job] = [(s.q, queries, QUERIES)]
    for first in range(0, heads, split.heads):
        width = min(split.heads, heads - first)
        group_heads = slice(first * group, (first + width) * group)
        states = []
        for start, end in _cuts(keys, count, split.tokens):
            k, v = windows.read(first, width, start, end, s.context)
            if s.chunk is not None and end > s.context:
                own = slice(max(start, s.context) - s.context, end - s.context)
                at = max(s.context - start, 0)
                for x, to, side in zip(s.chunk, (k, v), (KEYS, VALUES), strict=True):
                    jobs.append((x[own, first : first + width], to[:, at:], side))
            if jobs:
                rotate(jobs, peaks, layout)
                jobs = []
            q, k, v = (x.transpose(0, 1) for x in (queries[group_heads], k, v))
            states.append(dense.flash_attention_3(q, k, v, end == keys, scale))
        merge(states, [], peaks, layout, s.out[:, group_heads], s.lse[:, group_heads])


def _cuts(keys: int, rows: int, tokens: int) -> list[tuple[int, int]]:
    """Where windows of a number of tokens begin and end; the last has the last ``rows`` keys, and may be the larger for
    it. That number is 16 more than ``rows`` at least."""
    starts = list(range(0, keys, tokens))
    starts[-1] = min(starts[-1], (keys - rows) // 16 * 16)
    return list(zip(starts, [*starts[1:], keys], strict=True))


# --- prefix and chunk apart: cuDNN ------------------------------------------------------------------------------------


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> State:
    """A chunk's attention to itself: q ``[n, Hq, 128]``, k and v ``[n, H, 128]``."""
    q, k, v = (_readable(x, q.dtype).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = dense.cudnn(q, k, v, True, scale)
    return out[0].transpose(0, 1), lse[0].T


def _attend_apart(s: _Sequence, pages: torch.Tensor, layout: PageLayout, scale: float) -> None:
    """The result of a chunk of many rows, from the windows of its prefix and from its attention to itself.

    That is launched first, to keep the GPU busy while the host prepares the rest.
    """
    count, num_heads, _ = s.q.shape
    heads = pages.shape[1]
    group = num_heads // heads
    plain = [] if s.chunk is None else [_causal(s.q, *s.chunk, scale)]
    prefix = s.context if s.chunk is not None else s.context - count
    split = _split(group * count, heads, prefix, WINDOW_BYTES, _processors(pages.device))

    peaks, rotated_scale = expand.find_peaks(pages, s.table, layout, tokens=s.context), scale * _ROOM / _LIFT
    queries = torch.empty((num_heads, count, 128), dtype=torch.float16, device=s.q.device)
    rotate([(_readable(s.q, s.q.dtype), queries, QUERIES)], peaks, layout)
    # the chunk's own tokens, if they are in the pages too; before the others, so that these take their memory
    packed = [] if s.chunk is not None else [_causal_packed(s, pages, queries, prefix, layout, peaks, rotated_scale)]
    # without a mask, the query heads of a group are just more queries of their KV head
    folded = queries.view(1, heads, -1, 128)
    windows = _Windows(pages, s.table, layout, peaks, split.heads * min(split.tokens, prefix))
    for first in range(0, heads, split.heads):
        width = min(split.heads, heads - first)
        group_heads, shape = slice(first * group, (first + width) * group), (width * group, count)
        states = []
        for start in range(0, prefix, split.tokens):
            k, v = windows.read(first, width, start, min(start + split.tokens, prefix), prefix)
            out, lse = dense.cudnn(folded[:, first : first + width], k[None], v[None], False, rotated_scale)
            states.append((out.view(*shape, 128).transpose(0, 1), lse.view(shape).T))
        states += _of_heads(packed, group_heads)
        merge(states, _of_heads(plain, group_heads), peaks, layout, s.out[:, group_heads], s.lse[:, group_heads])


def _of_heads(states: list[State], heads: slice) -> list[State]:
    return [(out[:, heads], lse[:, heads]) for out, lse in states]


def _causal_packed(
    s: _Sequence, pages: torch.Tensor, queries: torch.Tensor, prefix: int, layout: PageLayout, peaks: torch.Tensor,
    scale: float,
) -> State:  # fmt: skip
    """A chunk's attention to itself from the pages, where it begins at ``prefix``: rotated queries ``[Hq, n, 128]``."""
    heads, start = pages.shape[1], prefix // 16 * 16
    group, tokens = len(queries) // heads, s.context - start
    width = max(1, min(heads, WINDOW_BYTES // (_TOKEN_BYTES * tokens)))
    windows, states = _Windows(pages, s.table, layout, peaks, width * tokens), []
    for first in range(0, heads, width):
        k, v = windows.read(first, min(width, heads - first), start, s.context, s.context)
        own_k, own_v = (x[:, prefix - start :].transpose(0, 1) for x in (k, v))
        own_q = queries[first * group : (first + width) * group].transpose(0, 1)
        states.append(_causal(own_q, own_k, own_v, scale))
    if len(states) == 1:
        return states[0]
    return torch.cat([out for out, _ in states], dim=1), torch.cat([lse for _, lse in states], dim=1)
