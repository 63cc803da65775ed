"""Prefill attention on Hopper: windows of the packed prefix are expanded, and a library's dense attention reads them.

Chunks of hundreds of tokens are bound by the matrix products, and nothing that a hand-written kernel could save is
worth what the libraries' kernels have gained there. So windows of the prefix, 64 MiB at most at any time, are
de-quantised (``expand.cu``, in the rotated basis), the library's kernel attends to them with rotated queries, and
results are un-rotated (``prefill.cu``). Chunks of a few tokens go to the decode kernel.

A chunk attends to itself and, apart, to the windows of its prefix, and partial results are joined by their
log-sum-exp. Long work is done on two streams, with a window for each (:func:`_attend_in_windows`). Where all keys fit
in one window, and not too many queries are waiting, FlashAttention-3 (``dense`` says when there is one) makes a single
causal call, the chunk's own K and V rotated into the window behind the prefix.

A window is some KV heads by some tokens (:func:`_split`), and float16 whatever q is: bfloat16 would add 2^-9 to every
K, V and rotated q, and 4e-3 and more to the result. V alone has 8 significant bits where q is bfloat16, which is 1e-3
in the result and draws less power. For float16's range K and V are divided by a power of two below their peak
(``expand.find_peaks``), and the powers come back with q and with the result. A token whose V is 2^-24 of the largest
loses precision in that; one whose K is small has a small score.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
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
_LONG = 800.0  # microseconds of attention behind which the host's launches for two streams are hidden
_KEYS_PER_MICROSECOND = 81.0  # that a processor reads for 128 query rows, on an H200
_QUERY_BYTES = 16 * 2**20  # of rotated queries at a time
_RESULT_BYTES = 32 * 2**20  # of partial results at a time
SCRATCH_BYTES = WINDOW_BYTES + _QUERY_BYTES + _RESULT_BYTES
"""What a prefill takes at most beside its result, and beside what the library itself takes. A library that allocates
its results, as cuDNN does, has as many partial results again: those of the chunk's attention to itself."""
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
def _rotate_kernel(dtype: torch.dtype, index: int) -> runtime.Kernel:
    return runtime.kernel("prefill.cu", "rotate", torch.device("cuda", index), **_defines(dtype))


@lru_cache(maxsize=64)
def _merge_kernel(
    parts: int, rotated: bool, dtype: torch.dtype, index: int
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


def rotate(jobs: list[Job], peaks: torch.Tensor) -> None:
    """Rotate up to three tensors of one dtype in one launch. They were complete before :func:`expand.find_peaks` began.

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
    _rotate_kernel(x.dtype, x.device.index).launch((blocks, 1, 1), 128, 0, call, early=True)


def merge(
    rotated: list[State],
    plain: list[State],
    peaks: torch.Tensor | None,
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
    kernel, params = _merge_kernel(len(states), bool(rotated), out.dtype, out.device.index)
    call = params(
        out=out.data_ptr(), lse=lse.data_ptr(), peaks=None if peaks is None else peaks.data_ptr(),
        out_row=out.stride(0), lse_row=lse.stride(0), lse_head=lse.stride(1), rows=lse.shape[0], heads=lse.shape[1],
        count=len(states), rotated=len(rotated),
    )  # fmt: skip
    for at, (o, s) in enumerate(states):
        call.parts[at] = _Part(o.data_ptr(), s.data_ptr(), o.stride(0), o.stride(1), s.stride(0), s.stride(1))
    kernel.launch((_blocks(*lse.shape), 1, 1), 128, 0, call, early=True)


# --- windows ----------------------------------------------------------------------------------------------------------

# What a library's kernel takes on an H200, in keys that a block of 128 query rows reads.
_CALL_COST = 650  # of a launch, with the blocks that begin and end
_MERGE_COST = 1 / 400  # of joining another vector of 128


class _Split(NamedTuple):
    """How a sequence's keys are cut: windows of some KV heads by some tokens, the last of each smaller."""

    heads: int
    tokens: int


@lru_cache(maxsize=4096)
def _split(rows: int, heads: int, keys: int, own: int, room: int, processors: int, shares: bool) -> _Split:
    """The windows of at most ``room`` bytes that ``rows`` queries of a KV head read fastest.

    ``own`` more keys are read from a window of their own. Few heads with all tokens need no joining; many heads make
    enough blocks for all processors where queries are few, unless the library ``shares`` the keys of a block among
    processors then, as FlashAttention-3 does. Where there is a choice, the queries and results of two groups of heads
    have room.
    """

    def windows(split: _Split) -> int:
        return max(1, -(-keys // split.tokens)) + (own > 0)

    def waves(width: int) -> float:
        blocks = -(-rows // 128) * width
        return 1 / (processors // blocks) if shares and blocks < processors else -(-blocks // processors)

    def cost(split: _Split) -> float:
        groups, rest = divmod(heads, split.heads)
        reading = (groups * waves(split.heads) + (waves(rest) if rest else 0)) * keys
        times = windows(split)
        return reading + _CALL_COST * times * (groups + (rest > 0)) + _MERGE_COST * times * rows * heads

    def has_room(split: _Split) -> bool:
        vector_bytes = 2 * rows * split.heads * _VECTOR_BYTES
        return vector_bytes <= _QUERY_BYTES and vector_bytes * windows(split) <= _RESULT_BYTES

    splits = [_Split(width, room // (_TOKEN_BYTES * width) // 16 * 16) for width in range(1, heads + 1)]
    fitting = [split for split in splits if split.tokens >= own + 16]  # own keys begin in a tile
    return min([split for split in fitting if has_room(split)] or fitting[:1], key=cost)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Windows:
    """Windows of a sequence, one after the other in the same memory."""

    def __init__(
        self, pages: torch.Tensor, table: torch.Tensor, layout: PageLayout, dtype: torch.dtype, vectors: int
    ) -> None:
        """``dtype`` is that of the queries, ``vectors`` are the tokens times heads of the largest."""
        self._pages, self._table = pages, table
        self._coarse = dtype == torch.bfloat16  # no precision is lost that the result would have
        self._plan = expand.plan(layout, torch.float16, table.dtype == torch.int64, pages.device)
        self._memory = torch.empty(2, vectors * 128, dtype=torch.float16, device=pages.device).unbind()

    def read(
        self, peaks: torch.Tensor, first: int, heads: int, start: int, end: int, stored: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V float16 ``[heads, end - start, 128]`` of heads and tokens from ``first`` and ``start`` on.

        ``start`` is a multiple of 16. From token ``stored`` on nothing is written.
        """
        tokens = end - start
        k, v = (half[: heads * tokens * 128].view(heads, tokens, 128) for half in self._memory)
        if start < stored:
            of_pages = (k, v) if end <= stored else (k[:, : stored - start], v[:, : stored - start])
            expand.expand_heads(
                self._plan, self._pages, self._table, *of_pages, peaks,
                first=first, start=start, coarse=self._coarse,
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
    own_out, own_lse = _rows(out, begin, end), _rows(lse, begin, end)
    if dense.writes_into():
        own_lse.copy_(dense.flash_attention_3(own_q, own_k, own_v, True, scale, starts, longest, own_out)[1])
    else:
        attend = partial(dense.flash_attention_3, causal=True, scale=scale, bounds=starts, longest=longest)
        _attend_by_heads(attend, own_q, own_k, own_v, own_out, own_lse)


def _attend_by_heads(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], State],
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """Attention by a library that allocates its results, of so many heads at a time as these may have room for."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    width = max(1, _RESULT_BYTES // (len(q) * group * _VECTOR_BYTES))
    for first in range(0, heads, width):
        of_heads, of_queries = slice(first, first + width), slice(first * group, (first + width) * group)
        # not kept in a variable beside the next
        out[:, of_queries], lse[:, of_queries] = attend(q[:, of_queries], k[:, of_heads], v[:, of_heads])


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
        library = dense.choose(pages.device)
        window_bytes = (s.context + (0 if s.chunk is None else count)) * pages.shape[1] * _TOKEN_BYTES
        fits = window_bytes <= WINDOW_BYTES and count * num_heads * _VECTOR_BYTES <= _QUERY_BYTES
        if library == "fa3" and fits:
            _attend_at_once(s, pages, layout, options.scale)
        else:
            _attend_in_windows(s, pages, layout, options.scale, library)
        return
    if s.chunk is not None and not s.context:
        _attend_by_heads(partial(_causal, scale=options.scale), s.q, *s.chunk, s.out, s.lse)
        return
    plain = [] if s.chunk is None else [_causal(s.q, *s.chunk, options.scale)]
    if s.context:
        start = s.context_len if s.chunk is not None else s.context_len - count
        few = options._replace(query_start=start)
        out, lse = decode_attention(s.q[None], pages, s.table, s.context_len, layout, few)
        plain.append((out[0], lse[0].T))
    merge([], plain, None, s.out, s.lse)


# --- all keys in one window: FlashAttention-3 -------------------------------------------------------------------------


def _attend_at_once(s: _Sequence, pages: torch.Tensor, layout: PageLayout, scale: float) -> None:
    """The result of a chunk of many rows by one causal call: its own K and V are in the window, behind the prefix."""
    count, heads = len(s.q), pages.shape[1]
    q, chunk = _readable(s.q, s.q.dtype), None
    if s.chunk is not None:
        chunk = _readable(s.chunk[0], q.dtype), _readable(s.chunk[1], q.dtype)
    keys = s.context if chunk is None else s.context + count
    peaks = expand.find_peaks(pages, s.table, layout, tokens=s.context, chunk=chunk)
    k, v = _Windows(pages, s.table, layout, q.dtype, heads * keys).read(peaks, 0, heads, 0, keys, s.context)
    queries = torch.empty((q.shape[1], count, 128), dtype=torch.float16, device=q.device)
    jobs: list[Job] = [(q, queries, QUERIES)]
    if chunk is not None:
        jobs += [(chunk[0], k[:, s.context :], KEYS), (chunk[1], v[:, s.context :], VALUES)]
    rotate(jobs, peaks)
    state = _attend_to("fa3", queries, k, v, True, scale * _ROOM / _LIFT)
    merge([state], [], peaks, s.out, s.lse)


def _attend_to(
    library: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float,
    out: torch.Tensor | None = None,
) -> State:  # fmt: skip
    """q ``[Hq, n, 128]``, contiguous, k and v ``[H, m, 128]``. With cuDNN's causal mask n is m.

    ``out`` is a place for the result, ``[n, Hq, 128]``, where the library can use one.
    """
    if library == "fa3":
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return dense.flash_attention_3(q, k, v, causal, scale, out=out)
    # without a mask, the query heads of a group are just more queries of their KV head
    queries = q[None] if causal else q.view(1, len(k), -1, 128)
    out, lse = dense.cudnn(queries, k[None], v[None], causal, scale)
    return out.view(q.shape).transpose(0, 1), lse.view(q.shape[:2]).T


# --- many windows -----------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Some queries, some KV heads, and the windows that they read one after the other.

    Attributes:
        begin: First of the chunk's queries.
        rows: Their number.
        first: KV head.
        heads: KV heads.
        windows: Tokens: from one on, and before another.
    """

    begin: int
    rows: int
    first: int
    heads: int
    windows: tuple[tuple[int, int], ...]


@lru_cache(maxsize=1024)
def _groups(
    count: int, heads: int, group: int, prefix: int, packed: bool, room: int, processors: int, shares: bool
) -> tuple[_Group, ...]:
    """Who reads a prefix of ``prefix`` tokens; with ``packed`` the first window ends with the queries' own tokens.

    Windows are of ``room`` bytes at most. Two groups are served at a time: their rotated queries and partial results
    are bounded, too. Queries are cut where those of one head are more; then each part reads all keys before it.
    """
    most = _most_queries(prefix + count if packed else prefix, group, packed, room)
    parts = -(-count // most)
    most = min(-(-count // (128 * parts)) * 128, most)  # about as many as each other
    groups = []
    for begin in range(0, count, most):
        rows, before = min(most, count - begin), prefix + begin if packed else prefix
        split = _split(group * rows, heads, before, rows if packed else 0, room, processors, shares)
        windows = [(at, min(at + split.tokens, before)) for at in range(0, before, split.tokens)]
        if packed:
            windows.insert(0, (before // 16 * 16, before + rows))
        for first in range(0, heads, split.heads):
            groups.append(_Group(begin, rows, first, min(split.heads, heads - first), tuple(windows)))
    return tuple(groups)


def _most_queries(keys: int, group: int, packed: bool, room: int) -> int:
    """How many queries of a KV head's ``group`` fit, with as many partial results as there are windows of one head."""
    windows = max(1, -(-keys // (room // _TOKEN_BYTES))) + packed
    fitting = min(_QUERY_BYTES, _RESULT_BYTES // windows) // (2 * group * _VECTOR_BYTES)
    fitting = min(fitting, room // _TOKEN_BYTES - 16)  # own keys begin in a tile
    return max(fitting // (128 if fitting >= 128 else 16), 1) * (128 if fitting >= 128 else 16)


class _Lane:
    """A stream, with memory for a window and for a group's rotated queries and partial results."""

    def __init__(self, stream: torch.cuda.Stream, windows: _Windows, memory: torch.Tensor, places: bool) -> None:
        """``memory`` is ``[n, 128]``, and has ``places`` for results unless the library allocates them."""
        self.stream, self.windows = stream, windows
        self._memory, self._places = memory, places

    def queries(self, num_heads: int, rows: int) -> torch.Tensor:
        """Memory ``[num_heads, rows, 128]``."""
        return self._memory[: num_heads * rows].view(num_heads, rows, 128)

    def result(self, at: int, num_heads: int, rows: int) -> torch.Tensor | None:
        """Memory ``[rows, num_heads, 128]`` for that of a window, behind the queries."""
        size = num_heads * rows
        return self._memory[(at + 1) * size :][:size].view(rows, num_heads, 128) if self._places else None


def _attend_in_windows(s: _Sequence, pages: torch.Tensor, layout: PageLayout, scale: float, library: str) -> None:
    """The result of a chunk of many rows, from the windows of its prefix and from its attention to itself.

    Groups of heads are served in turns on two streams, where that takes longer than the host takes for it. So the
    library's kernel for one begins wherever that for another has ended, and windows are expanded where it leaves a
    processor free.
    """
    count, num_heads, _ = s.q.shape
    device, heads, processors = pages.device, pages.shape[1], _processors(pages.device)
    group, prefix = num_heads // heads, s.context if s.chunk is not None else s.context - count
    takes = -(-count * num_heads // 128) * prefix / (processors * _KEYS_PER_MICROSECOND)
    number = 2 if heads > 1 and takes >= _LONG else 1
    groups = _groups(count, heads, group, prefix, s.chunk is None, WINDOW_BYTES // number, processors, library == "fa3")
    s = s._replace(q=_readable(s.q, s.q.dtype))
    main = torch.cuda.current_stream(device)
    lanes = _lanes([main, runtime.second_stream(device)][:number], s, pages, layout, groups, group, library)
    other = lanes[-1].stream  # it has the first group
    # A kernel that begins behind all others on this stream, as early ones that read q, pages and the chunk rely on.
    peaks = expand.no_peaks(device)
    other.wait_event(main.record_event())  # behind what had the memory before
    try:
        with _on(other, main):
            expand.find_peaks(pages, s.table, layout, tokens=s.context, peaks=peaks)
        found = other.record_event()
        own = None if s.chunk is None else _attend_to_itself(s, s.chunk, scale, library)
        attended = main.record_event()
        main.wait_event(found)
        for at, x in enumerate(groups):
            lane = lanes[(at + 1) % number]
            with _on(lane.stream, main):
                states = _partial_results(lane, x, s, own is None, peaks, group, scale * _ROOM / _LIFT, library)
                if at == 0:
                    other.wait_event(attended)
                plain = [] if own is None else [(_of_group(own[0], x, group), _of_group(own[1], x, group))]
                merge(states, plain, peaks, _of_group(s.out, x, group), _of_group(s.lse, x, group))
    finally:
        main.wait_event(other.record_event())  # what is freed here is read there


def _lanes(
    streams: list[torch.cuda.Stream], s: _Sequence, pages: torch.Tensor, layout: PageLayout,
    groups: tuple[_Group, ...], group: int, library: str,
) -> list[_Lane]:  # fmt: skip
    """One for each stream, with room for each of the groups."""
    vectors = max(x.heads * (end - start) for x in groups for start, end in x.windows)
    places = library == "fa3" and dense.writes_into()
    rows = max(x.heads * group * x.rows * (1 + places * len(x.windows)) for x in groups)
    lanes = []
    for stream in streams:
        windows = _Windows(pages, s.table, layout, s.q.dtype, vectors)
        memory = torch.empty(rows, 128, dtype=torch.float16, device=pages.device)
        lanes.append(_Lane(stream, windows, memory, places))
    return lanes


def _partial_results(
    lane: _Lane, x: _Group, s: _Sequence, packed: bool, peaks: torch.Tensor, group: int, scale: float, library: str
) -> list[State]:
    """Of each window, on the current stream."""
    queries = lane.queries(x.heads * group, x.rows)
    states = []
    for at, (start, end) in enumerate(x.windows):
        k, v = lane.windows.read(peaks, x.first, x.heads, start, end, end)
        if not at:
            rotate([(_of_group(s.q, x, group), queries, QUERIES)], peaks)
        own = packed and not at
        if own:  # the window begins with the tile of the first
            k, v = k[:, -x.rows :], v[:, -x.rows :]
        states.append(_attend_to(library, queries, k, v, own, scale, lane.result(at, *queries.shape[:2])))
    return states


def _of_group(x: torch.Tensor, which: _Group, group: int) -> torch.Tensor:
    """What of x ``[n, Hq, ...]`` is its."""
    return _rows(x, which.begin, which.begin + which.rows).narrow(1, which.first * group, which.heads * group)


def _on(stream: torch.cuda.Stream, current: torch.cuda.Stream) -> AbstractContextManager[object]:
    """Inside, ``stream`` is torch's current one, which it may be already."""
    return nullcontext() if stream is current else torch.cuda.stream(stream)


def _attend_to_itself(s: _Sequence, chunk: tuple[torch.Tensor, torch.Tensor], scale: float, library: str) -> State:
    """A chunk's attention to its own K and V: in ``s.out`` if the library puts it there, or if it is large."""
    k, v = (_readable(x, s.q.dtype) for x in chunk)
    if library == "fa3" and dense.writes_into():
        return dense.flash_attention_3(s.q, k, v, True, scale, out=s.out)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        return dense.flash_attention_3(q, k, v, True, scale) if library == "fa3" else _causal(q, k, v, scale)

    if s.q.numel() * 2 <= _RESULT_BYTES:
        return attend(s.q, k, v)
    lse = torch.empty_like(s.lse)
    _attend_by_heads(attend, s.q, k, v, s.out, lse)
    return s.out, lse


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> State:
    """A chunk's attention to itself by cuDNN: q ``[n, Hq, 128]``, k and v ``[n, H, 128]``."""
    q, k, v = (_readable(x, q.dtype).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = dense.cudnn(q, k, v, True, scale)
    return out[0].transpose(0, 1), lse[0].T
