"""Prefill attention on Hopper: windows of the packed prefix are expanded, and a library's dense attention reads them.

Chunks of hundreds of tokens are bound by the matrix products, and nothing that a hand-written kernel could save is
worth what the libraries' kernels have gained there. So windows of the prefix are de-quantised (``expand.cu``, in the
rotated basis), the library's kernel attends to them with rotated queries, and results are un-rotated (``prefill.cu``);
all of that in 64 MiB (``windows.py``). Chunks of a few tokens go to the decode kernel.

A chunk attends to itself and, apart, to the windows of its prefix, and partial results are joined by their
log-sum-exp. Long work is done on two streams, with a window for each (:func:`_attend_in_windows`). Where all keys and
queries fit at once, FlashAttention-3 (``dense`` says when there is one) makes a single causal call, the chunk's own K
and V rotated into the window behind the prefix.

A window is some KV heads by some tokens (:func:`kvfold.ops.cuda.windows.split`), and float16 whatever q is: bfloat16
would add 2^-9 to every K, V and rotated q, and 4e-3 and more to the result. V alone has 8 significant bits where q is
bfloat16, which is 1e-3 in the result and draws less power. For float16's range K and V are divided by a power of two
below their peak (``expand.find_peaks``), and the powers come back with q and with the result. A token whose V is 2^-24
of the largest loses precision in that; one whose K is small has a small score.
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
from kvfold.ops.cuda import dense, expand, runtime, windows
from kvfold.ops.cuda.decode import decode_attention
from kvfold.ops.cuda.formats import DTYPES, sign_words
from kvfold.ops.cuda.schedule import multiprocessors
from kvfold.ops.lengths import on_host
from kvfold.ops.options import AttentionOptions

_FEW_ROWS = 64  # query rows of a KV head up to which the decode kernel is faster
_CAPACITY = windows.SLOTS + 1  # partial results that are joined at once: those of windows, and the chunk's own

_ROOM = 64.0  # rotated queries are divided by it, see prefill.cu
_LIFT = 1024.0  # K and V of windows are multiplied by it, see common.cuh

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
        *((name, ctypes.c_int64) for name in ("x_row", "x_head", "out_row", "out_head")),
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
    alone: bool, rotated: bool, dtype: torch.dtype, index: int
) -> tuple[runtime.Kernel, type[ctypes.Structure]]:
    """The kernel, and its parameters. There are few kernels, so that serving need not compile what it has not seen."""
    capacity = 1 if alone else _CAPACITY

    class Merge(ctypes.Structure):
        _fields_ = (
            ("parts", _Part * capacity),
            *((name, ctypes.c_void_p) for name in ("out", "lse", "peaks")),
            *((name, ctypes.c_int64) for name in ("out_row", "out_head", "lse_row", "lse_head")),
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
"""What :func:`rotate` reads: ``[n, heads, 128]``, see :func:`_readable`; where it writes: float16 of that shape, the
vectors contiguous and at multiples of 16 bytes; and which of the three it is."""


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
            x.data_ptr(), out.data_ptr(), *x.stride()[:2], *out.stride()[:2], rows, heads, side, blocks
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
    """Join partial results into out ``[n, Hq, 128]`` and lse ``[n, Hq]``, of any strides; one of them may lie there.

    All vectors are contiguous and at multiples of 16 bytes.

    Args:
        rotated: Float16 results over windows: rotated and divided by the power of two below V's peak.
        plain: Results in out's dtype and the model's basis.
        peaks: Those of the windows; None if there are none.
    """
    states = rotated + plain
    kernel, params = _merge_kernel(len(states) == 1, bool(rotated), out.dtype, out.device.index)
    call = params(
        out=out.data_ptr(), lse=lse.data_ptr(), peaks=None if peaks is None else peaks.data_ptr(),
        out_row=out.stride(0), out_head=out.stride(1), lse_row=lse.stride(0), lse_head=lse.stride(1),
        rows=lse.shape[0], heads=lse.shape[1], count=len(states), rotated=len(rotated),
    )  # fmt: skip
    for at, (o, s) in enumerate(states):
        call.parts[at] = _Part(o.data_ptr(), s.data_ptr(), o.stride(0), o.stride(1), s.stride(0), s.stride(1))
    kernel.launch((_blocks(*lse.shape), 1, 1), 128, 0, call, early=True)


# --- windows ----------------------------------------------------------------------------------------------------------

def _library(name: str) -> windows.Library:
    return windows.Library(shares=name == "fa3", in_place=name == "fa3" and dense.writes_into())


class _Reader:
    """De-quantises windows of a sequence."""

    def __init__(self, pages: torch.Tensor, table: torch.Tensor, layout: PageLayout, dtype: torch.dtype) -> None:
        """``dtype`` is that of the queries."""
        self._pages, self._table = pages, table
        self._coarse = dtype == torch.bfloat16  # no precision is lost that the result would have
        self._plan = expand.plan(layout, torch.float16, table.dtype == torch.int64, pages.device)

    def read(self, k: torch.Tensor, v: torch.Tensor, peaks: torch.Tensor, first: int, start: int) -> None:
        """Fill k and v, float16 ``[heads, tokens, 128]``, from head ``first`` and from a tile's token ``start`` on."""
        expand.expand_heads(
            self._plan, self._pages, self._table, k, v, peaks, first=first, start=start, coarse=self._coarse
        )


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
    """Attention by a library that allocates its results: of as many heads at a time as have room, of one at least."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    most = max(1, windows.SCRATCH_BYTES // (len(q) * windows.VECTOR_BYTES))  # query heads
    width, many = max(1, most // group), min(most, group)  # KV heads, and query heads of one of them
    for first in range(0, heads, width):
        of_heads = slice(first, first + width)
        end = min(first + width, heads) * group
        step = width * group if many == group else many
        for begin in range(first * group, end, step):
            some = slice(begin, min(begin + step, end))
            # not kept in a variable beside the next
            out[:, some], lse[:, some] = attend(q[:, some], k[:, of_heads], v[:, of_heads])


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
        library, heads = dense.choose(pages.device), pages.shape[1]
        share = windows.Share(multiprocessors(pages.device.index), 1, _library(library))
        keys = s.context if s.chunk is None else s.context + count
        if library == "fa3" and share.tokens_of(heads, num_heads // heads * count, 1) >= keys:
            _attend_at_once(s, pages, layout, options.scale, share)
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


def _attend_at_once(s: _Sequence, pages: torch.Tensor, layout: PageLayout, scale: float, share: windows.Share) -> None:
    """The result of a chunk of many rows by one causal call: its own K and V are in the window, behind the prefix."""
    count, heads = len(s.q), pages.shape[1]
    q, chunk = _readable(s.q, s.q.dtype), None
    if s.chunk is not None:
        chunk = _readable(s.chunk[0], q.dtype), _readable(s.chunk[1], q.dtype)
    keys = s.context if chunk is None else s.context + count
    peaks = expand.find_peaks(pages, s.table, layout, tokens=s.context, chunk=chunk)
    k, v = torch.empty((2, heads, keys, 128), dtype=torch.float16, device=q.device).unbind()
    _Reader(pages, s.table, layout, q.dtype).read(k[:, : s.context], v[:, : s.context], peaks, 0, 0)
    queries = torch.empty((q.shape[1], count, 128), dtype=torch.float16, device=q.device).transpose(0, 1)
    jobs: list[Job] = [(q, queries, QUERIES)]
    if chunk is not None:
        own_k, own_v = (x[:, s.context :].transpose(0, 1) for x in (k, v))
        jobs += [(chunk[0], own_k, KEYS), (chunk[1], own_v, VALUES)]
    rotate(jobs, peaks)
    among = share.among(windows.blocks_of(q.shape[1] // heads * count, heads))
    state = _attend_to("fa3", queries, k, v, True, scale * _ROOM / _LIFT, among, out=queries)
    merge([state], [], peaks, s.out, s.lse)


def _attend_to(
    library: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, among: int,
    out: torch.Tensor | None = None,
) -> State:  # fmt: skip
    """q ``[n, Hq, 128]``, for cuDNN contiguous by heads, k and v ``[H, m, 128]``. With cuDNN's causal mask n is m.

    ``out`` is a place for the result, ``[n, Hq, 128]``, where the library can use one. That may be q's own: a block
    has read its queries before it writes. So many processors, at most, share the keys of a block as ``among`` says.
    """
    if library == "fa3":
        splits = min(among, -(-k.shape[1] // 128))
        return dense.flash_attention_3(
            q, k.transpose(0, 1), v.transpose(0, 1), causal, scale, out=out, splits=splits
        )
    # without a mask, the query heads of a group are just more queries of their KV head
    q = q.transpose(0, 1)
    queries = q[None] if causal else q.view(1, len(k), -1, 128)
    out, lse = dense.cudnn(queries, k[None], v[None], causal, scale)
    return out.view(q.shape).transpose(0, 1), lse.view(q.shape[:2]).T


# --- many windows -----------------------------------------------------------------------------------------------------


class _Lane:
    """A stream and its memory, for the groups that it serves: a window, rotated queries and partial results of each."""

    def __init__(self, stream: torch.cuda.Stream, memory: torch.Tensor, lent: torch.Tensor | None) -> None:
        """``memory`` is ``[n, 128]``; ``lent``, where queries and the last result lie if it is there, is
        ``[rows, heads * group, 128]``.
        """
        self.stream = stream
        self._memory, self._lent = memory, lent

    def window(self, x: windows.Group, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[heads, end - start, 128]``."""
        size, shape = x.heads * (end - start), (x.heads, end - start, 128)
        return self._memory[:size].view(shape), self._memory[x.window_vectors :][:size].view(shape)

    def queries(self, x: windows.Group) -> torch.Tensor:
        """``[rows, heads * group, 128]``, contiguous by heads unless lent. The last result may go there."""
        if self._lent is not None:
            return self._lent
        return self._memory[2 * x.window_vectors :][: x.vectors].view(-1, x.rows, 128).transpose(0, 1)

    def result(self, x: windows.Group, at: int) -> torch.Tensor:
        """``[rows, heads * group, 128]`` of one that waits to be joined, behind the queries."""
        at += self._lent is None
        return self._memory[2 * x.window_vectors + at * x.vectors :][: x.vectors].view(x.rows, -1, 128)

    def behind_windows(self, rows: int, num_heads: int) -> torch.Tensor:
        """``[rows, num_heads, 128]``, where windows have been read."""
        return self._memory[: rows * num_heads].view(rows, num_heads, 128)


def _attend_in_windows(s: _Sequence, pages: torch.Tensor, layout: PageLayout, scale: float, library: str) -> None:
    """The result of a chunk of many rows, from the windows of its prefix and from its attention to itself.

    Groups of heads are served in turns on two streams, where that takes longer than the host takes for it. So the
    library's kernel for one begins wherever that for another has ended, and windows are expanded where it leaves a
    processor free.
    """
    count, num_heads, _ = s.q.shape
    device, heads = pages.device, pages.shape[1]
    group, prefix = num_heads // heads, s.context if s.chunk is not None else s.context - count
    processors = multiprocessors(device.index)
    plan = windows.plan(count, heads, group, prefix, s.chunk is None, processors, _library(library))
    s = s._replace(q=_readable(s.q, s.q.dtype))
    main = torch.cuda.current_stream(device)
    streams = [runtime.second_stream(device), main][-plan.share.streams :]
    first = streams[0]  # it has the first group, and the other has the chunk's attention to itself before its own
    late_from = plan.lenders[0].first if plan.lenders else heads
    own = late = None
    if s.chunk is not None and not plan.share.library.in_place:  # before there is more
        own = _attend_to_itself(s, s.chunk, range(heads), scale, library, s.out)
    memory = torch.empty((sum(plan.vectors), 128), dtype=torch.float16, device=device).split(plan.vectors)
    lent = [None] * (len(streams) - plan.share.lent) + [_of_group(s.out.view(torch.float16), x) for x in plan.lenders]
    lanes = [_Lane(*args) for args in zip(streams, memory, lent, strict=True)]
    reader = _Reader(pages, s.table, layout, s.q.dtype)
    _merge_kernel(False, False, torch.float16, device.index)  # compiled with the others, though few contexts need it
    # A kernel that begins behind all others on this stream, as early ones that read q, pages and the chunk rely on.
    peaks = expand.no_peaks(device)
    first.wait_event(main.record_event())  # behind what had the memory before
    try:
        with _on(first, main):
            expand.find_peaks(pages, s.table, layout, tokens=s.context, peaks=peaks)
        found = first.record_event()
        if s.chunk is not None and plan.share.library.in_place and late_from:
            own = _attend_to_itself(s, s.chunk, range(late_from), scale, library, s.out)
        attended = main.record_event()
        main.wait_event(found)
        for at, x in enumerate(plan.groups):
            lane = lanes[at % len(lanes)]
            with _on(lane.stream, main):
                states = _partial_results(
                    lane, reader, x, s.q, s.chunk is None, peaks, scale * _ROOM / _LIFT, library, plan
                )
                if s.chunk is not None and plan.lenders and at == len(plan.groups) - 2:
                    place = lane.behind_windows(count, num_heads - late_from * group).view(s.q.dtype)
                    found_late = _attend_to_itself(s, s.chunk, range(late_from, heads), scale, library, place)
                    # the library's log-sum-exp is this stream's memory, and the other one reads it
                    late = found_late[0], s.lse[:, late_from * group :].copy_(found_late[1])
                    attended_late = lane.stream.record_event()
                if at == 0:
                    first.wait_event(attended)
                if late is not None and x is plan.groups[-1]:
                    main.wait_event(attended_late)
                its, begin = (late, late_from) if x.first >= late_from else (own, 0)
                plain = [] if its is None else [(_of_group(its[0], x, begin), _of_group(its[1], x, begin))]
                merge(states, plain, peaks, _of_group(s.out, x), _of_group(s.lse, x))
                states.clear()  # of a library that allocates them, before the next
    finally:
        main.wait_event(first.record_event())  # what is freed here is read there


def _partial_results(
    lane: _Lane, reader: _Reader, x: windows.Group, q: torch.Tensor, packed: bool, peaks: torch.Tensor, scale: float,
    library: str, plan: windows.Plan,
) -> list[State]:  # fmt: skip
    """Of the windows, on the current stream: three at most, as two are joined where there is another but the last."""
    queries = lane.queries(x)
    states: list[State] = []
    for at, (start, end) in enumerate(x.windows):
        last = at == len(x.windows) - 1
        k, v = lane.window(x, start, end)
        reader.read(k, v, peaks, x.first, start)
        if not at:
            rotate([(_of_group(q, x), queries, QUERIES)], peaks)
        if len(states) == windows.SLOTS - 1 and not last:
            joined, lse = states[0]
            merge([], states, None, joined, lse)
            states = states[:1]
        own = packed and not at
        if own:  # the window begins with the tile of the first
            k, v = k[:, -x.rows :], v[:, -x.rows :]
        place = None if not plan.share.library.in_place else queries if last else lane.result(x, len(states))
        states.append(_attend_to(library, queries, k, v, own, scale, plan.among(x), place))
    return states


def _of_group(x: torch.Tensor, which: windows.Group, begin: int = 0) -> torch.Tensor:
    """What of x ``[n, heads, ...]``, query heads from KV head ``begin`` on, is its."""
    rows = _rows(x, which.begin, which.begin + which.rows)
    return rows.narrow(1, (which.first - begin) * which.group, which.heads * which.group)


def _on(stream: torch.cuda.Stream, current: torch.cuda.Stream) -> AbstractContextManager[object]:
    """Inside, ``stream`` is torch's current one, which it may be already."""
    return nullcontext() if stream is current else torch.cuda.stream(stream)


def _attend_to_itself(
    s: _Sequence, chunk: tuple[torch.Tensor, torch.Tensor], heads: range, scale: float, library: str, out: torch.Tensor
) -> State:
    """A chunk's attention to its own K and V of some KV heads, of all of them where the library allocates.

    It goes to the first heads of ``out``.
    """
    k, v = (_readable(x, s.q.dtype) for x in chunk)
    if library == "fa3" and dense.writes_into():
        group, some = s.q.shape[1] // k.shape[1], slice(heads.start, heads.stop)
        q = s.q[:, heads.start * group : heads.stop * group]
        return dense.flash_attention_3(q, k[:, some], v[:, some], True, scale, out=out[:, : q.shape[1]])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        return dense.flash_attention_3(q, k, v, True, scale) if library == "fa3" else _causal(q, k, v, scale)

    lse = torch.empty_like(s.lse)
    _attend_by_heads(attend, s.q, k, v, out, lse)
    return out, lse


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> State:
    """A chunk's attention to itself by cuDNN: q ``[n, Hq, 128]``, k and v ``[n, H, 128]``."""
    q, k, v = (_readable(x, q.dtype).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = dense.cudnn(q, k, v, True, scale)
    return out[0].transpose(0, 1), lse[0].T
