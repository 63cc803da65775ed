"""Decode attention by the CUDA C++ kernel in ``decode.cu``: prepares its constants and launches it once.

One CTA per SM stays for the whole launch; the tokens of all sequences are dealt out evenly to its warps on the device
(``schedule.cu``, a launch ahead where the caller has no schedule), so that the grid depends on nothing but the GPU and
a captured graph serves any lengths. Scratch is kept per stream: graphs that were captured on the same stream must not
be replayed at the same time.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch

from kvfold.codebooks import lloyd_max, trellis_levels
from kvfold.errors import FormatError, ShapeError
from kvfold.formats import Side
from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime, schedule
from kvfold.ops.cuda.formats import DTYPES, HEAD_SIZE, sign_words
from kvfold.ops.options import AttentionOptions, DecodeSchedule

_LOG2_E = 1.4426950408889634
_STAGES = {1: 2, 2: 3}  # at least, of a warp's ring
_RING_BYTES = 128 * 1024  # of a CTA; with more in flight the SMs share the memory's bandwidth less evenly
_ROW_FLOATS = HEAD_SIZE + 4  # of a partial result: outputs, reference, sum, and two more, for 16 bytes and other banks
_SLOTS = {False: 2, True: 1}  # in scratch, for partial results of a CTA, by whether calls are batch-invariant
_PLACES = 2  # of a warp
_SPLITS = 16  # of a sequence in batch-invariant mode
_INVARIANT_SCRATCH = 32 * 2**20
_WORDS = ("T0", "T1", "U0", "U1", "TE0", "TE1", "UE0", "UE1")  # macros of the codebooks' tables
_STREAMS = 64  # with scratch of their own, per device
_MAX_COUNTERS = 16384


# --- constants --------------------------------------------------------------------------------------------------------


def _words(values: list[int]) -> list[str]:
    """Eight bytes as two little-endian words."""
    return [f"0x{int.from_bytes(bytes(v & 255 for v in values[j : j + 4]), 'little'):08x}u" for j in (0, 4)]


def _two_tables(numbers: list[int]) -> list[str]:
    """The tables, two words each, of two look-ups whose sum is the number of a nibble, of 16.

    The first has nibble n below 8 at n, the second, whose selectors are complemented, nibble n from 8 on at 15 - n.
    ``prmt`` repeats the top bit of the byte it finds where the selector's top bit is set. So where one look-up gives
    the number of n, the other gives 0 or -1 by the sign of what it has for n + 8 or n - 8: n's entry makes up for it.
    """
    first, second = [0] * 8, [0] * 8
    for n in range(8):
        signs = [(a, b) for a in (0, -1) for b in (0, -1)]
        a, b = next((a, b) for a, b in signs if (numbers[n] - b < 0) == (a < 0) and (numbers[n + 8] - a < 0) == (b < 0))
        first[n], second[7 - n] = numbers[n] - b, numbers[n + 8] - a
    if max(map(abs, first + second)) > 127:
        raise FormatError(
            f"a codebook of levels up to {max(map(abs, numbers))} does not fit the decode kernel's 7 bits"
        )
    return _words(first) + _words(second)


def look_up(side: Side) -> list[str]:
    """The byte tables of a codebook: two words of each of two look-ups, and as many for words of a trellis' even t.

    A product with the looked-up integer gives the level less one half. Up to eight levels the first table has all, and
    the second is not used. Sixteen are the sum of two look-ups: the nibble is a Lloyd–Max code, or a trellis' refine
    bits as stored and, below, the path's two bits. Of thirty-two levels the tables have the magnitudes. Where t is even
    the path's bits are swapped, and above the refine bits if there are two: decode_codes.cuh makes such nibbles.
    """
    trellis = side.family == "trellis"
    book = trellis_levels(int(side.bits)) if trellis else lloyd_max(int(side.bits), HEAD_SIZE)
    assert book.integers is not None
    m = [int(x) for x in book.integers]
    unused = _words([0] * 8)
    if not trellis and side.bits < 4:
        codes = m + [~x for x in m]
        return _words(codes + [0] * (8 - len(codes))) + 3 * unused
    if not trellis:
        return _two_tables(m + [~x for x in m]) + 2 * unused
    swapped = (0, 2, 1, 3)
    if side.bits == 2:
        ascending = [~x for x in reversed(m)] + m
        return _words(ascending) + unused + _words([ascending[n & 4 | swapped[n & 3]] for n in range(8)]) + unused
    if side.bits == 3:  # of negative levels the lower refine bit is stored complemented
        ascending = [~x for x in reversed(m)] + m
        by_nibble = ascending[4:8] + ascending[:4] + ascending[8:]
    else:
        by_nibble = m
    return _two_tables(by_nibble) + _two_tables([by_nibble[4 * (n & 3) + swapped[n // 4]] for n in range(16)])


@lru_cache(maxsize=64)
def constants(k: Side, v: Side) -> dict[str, int | str]:
    """Macros that ``decode.cu`` takes from the format: widths, tables, steps, the rotation's signs."""
    defines: dict[str, int | str] = {"KBITS": int(k.bits), "VBITS": int(v.bits)}
    for name, side in (("K", k), ("V", v)):
        defines |= {name + word: x for word, x in zip(_WORDS, look_up(side), strict=True)}
        trellis = side.family == "trellis"
        book = trellis_levels(int(side.bits)) if trellis else lloyd_max(int(side.bits), HEAD_SIZE)
        defines |= {f"{name}TRELLIS": int(trellis), f"{name}_STEP": f"{book.step!r}f"}
    return defines | sign_words()


@lru_cache(maxsize=256)
def _kernel(
    layout: PageLayout, index: int, blocks: int, dtype: torch.dtype, softcap: bool, masked: bool, fixed: bool
) -> tuple[runtime.Kernel, int, int, int]:
    """The kernel, its threads, its shared bytes and the floats of a partial result."""
    warps = schedule.WARPS[blocks]
    query_bytes = (1024 + 32) * blocks
    pages = 2 if layout.page_size == 16 else 1  # of a step
    reference_bytes = layout.page_bytes - layout.reference
    slot_bytes = 2 * layout.tile_bytes + pages * reference_bytes + 16  # a step and its barrier
    stages = max(_STAGES[blocks], _RING_BYTES // warps // slot_bytes)
    slice_bytes = -(-(stages * slot_bytes + query_bytes) // 128) * 128
    kernel = runtime.kernel(
        "decode.cu", "decode", torch.device("cuda", index), **constants(layout.format.k, layout.format.v),
        PAGE=layout.page_size, NB=blocks, WARPS=warps, STAGES=stages, SLICE=slice_bytes, QTYPE=DTYPES[dtype],
        SOFTCAP=softcap, MASKED=masked, FIXED=fixed, MEAN=layout.format.mean,
        ROW_FLOATS=_ROW_FLOATS, SLOTS=_SLOTS[fixed], PLACES=_PLACES,
    )  # fmt: skip
    return kernel, 32 * warps, slice_bytes * warps, schedule.ROWS * blocks * _ROW_FLOATS


# --- scratch ----------------------------------------------------------------------------------------------------------


class _Scratch:
    """Of one device: counters of every stream, zeroed once and left at zero by each launch, and room for partials."""

    def __init__(self, index: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("decode_attention needs one call before a CUDA graph is captured, to set up its scratch")
        self.counters = torch.zeros(_STREAMS, _MAX_COUNTERS, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.synchronize(index)
        self.places: dict[int, int] = {}
        self.floats: dict[int, torch.Tensor] = {}
        self.outgrown: list[torch.Tensor] = []
        self.lock = threading.Lock()

    def of_stream(self, stream: int, floats: int) -> tuple[int, int]:
        """Addresses of the partials and the counters of a stream."""
        partials = self.floats.get(stream)
        if partials is None or partials.numel() < floats:
            with self.lock:
                partials = self._grow(stream, floats)
        place = self.places[stream]
        return partials.data_ptr(), self.counters.data_ptr() + 4 * _MAX_COUNTERS * place

    def _grow(self, stream: int, floats: int) -> torch.Tensor:
        """Partials of a stream, and counters if it is new."""
        partials = self.floats.get(stream)
        if partials is not None and partials.numel() >= floats:  # another thread was first
            return partials
        if stream not in self.places and len(self.places) == _STREAMS:
            raise RuntimeError(f"decode_attention runs on at most {_STREAMS} streams of a device in one process")
        if partials is not None:
            self.outgrown.append(partials)  # a captured graph may write there
        partials = torch.empty(floats, dtype=torch.float32, device=self.counters.device)
        self.places.setdefault(stream, len(self.places))
        self.floats[stream] = partials
        return partials


_scratch = lru_cache(maxsize=64)(_Scratch)


# --- the operation ----------------------------------------------------------------------------------------------------


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    options: AttentionOptions,
    out: torch.Tensor | None = None,
    made: DecodeSchedule | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.decode_attention`; ``made`` is its ``schedule``. Any number of query tokens is right, few
    are fast.
    """
    if pages.data_ptr() % 16:
        raise ShapeError("pages have to begin at a multiple of 16 bytes for the CUDA kernels; pass a tensor that does")
    positions = (seq_lens, options.first, options.query_start)
    given = (q, block_table, options.mask, *positions)
    if q.stride(3) != 1 or q.data_ptr() % 16 or any(s * q.element_size() % 16 for s in q.stride()[:3]):
        q = q.clone(memory_format=torch.contiguous_format)
    batch, num_queries, num_heads, _ = q.shape
    heads = pages.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    table = block_table if block_table.dtype == torch.int32 and block_table.stride(1) == 1 else _table(block_table)
    if not table.shape[1]:
        return out.zero_(), lse.fill_(-torch.inf)
    mask = options.mask
    if mask is not None and mask.stride(2) != 1:
        mask = mask.contiguous()
    group, index = num_heads // heads, q.device.index
    blocks = schedule.blocks_of(num_queries, group)
    kernel, threads, shared_bytes, partial = _kernel(
        layout, index, blocks, q.dtype, options.softcap is not None, mask is not None, options.batch_invariant
    )
    scratch, sms = _scratch(index), schedule.multiprocessors(index)
    params, read = schedule.params_of(batch, num_queries, heads, group, options.lag, options.window, positions)
    params.pages, params.table, params.q, params.out = pages.data_ptr(), table.data_ptr(), q.data_ptr(), out.data_ptr()
    params.lse, params.page_stride, params.splits = lse.data_ptr(), pages.stride(0), _SPLITS
    params.q_stride_b, params.q_stride_t, params.q_stride_h = q.stride(0), q.stride(1), q.stride(2)
    params.table_stride, params.pages_per_sequence = table.stride(0), table.shape[1]
    params.table_bytes, params.q_bytes = _reach(table), _reach(q)
    params.minus_one, params.low_nibbles, params.scale_log2 = 0xFFFFFFFF, 0x0F0F0F0F, options.scale * _LOG2_E
    if mask is not None:
        params.mask, params.mask_stride_b, params.mask_stride_t = mask.data_ptr(), mask.stride(0), mask.stride(1)
    if options.softcap is not None:
        params.softcap_log2 = options.softcap * _LOG2_E
        params.softcap_inv = 1 / params.softcap_log2
    stream = torch.cuda.current_stream(q.device).cuda_stream
    if not options.batch_invariant:
        floats = sms * (_SLOTS[False] + _PLACES * threads // 32) * partial
        own = schedule.words(index, blocks)  # behind the partial results, for calls that are given no schedule
        params.scratch, params.counters = scratch.of_stream(stream, floats + own)
        if made is not None:
            params.schedule = made.data.data_ptr()
        else:
            schedule.launch(params, index, blocks, params.scratch + 4 * floats)
        params.ready = _ready(options, made is not None, given, (q, table, mask, *read))
        kernel.launch((sms, 1, 1), threads, shared_bytes, params, early=True)
        return out, lse
    params.ready = _ready(options, True, given, (q, table, mask, *read))
    items = heads * params.row_blocks
    if items > _MAX_COUNTERS:
        raise ShapeError(
            f"batch-invariant decode_attention takes at most {_MAX_COUNTERS * schedule.ROWS * blocks // heads} query "
            f"rows of a KV head, and {num_queries} query tokens of {num_heads // heads} heads are more; use "
            "prefill_attention"
        )
    floats = items * _SPLITS * _SLOTS[True] * partial  # of a sequence
    at_once = max(1, min(_INVARIANT_SCRATCH // (4 * floats), _MAX_COUNTERS // items, 65535))
    params.scratch, params.counters = scratch.of_stream(stream, min(at_once, batch) * floats)
    for begin in range(0, batch, at_once):
        params.begin = begin
        kernel.launch((_SPLITS, items, min(at_once, batch - begin)), threads, shared_bytes, params, early=True)
    return out, lse


def _ready(
    options: AttentionOptions,
    scheduled: bool,
    given: tuple[torch.Tensor | None, ...],
    read: tuple[torch.Tensor | None, ...],
) -> bool:
    """Whether what the kernel reads, but for the pages, was complete before the kernel ahead began."""
    # a copy made here is what the kernel ahead writes, as is a schedule
    return options.inputs_ready and scheduled and all(a is b for a, b in zip(given, read, strict=True))


def _reach(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last, as far as 32 bits go."""
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return min(elements * x.element_size(), 2**32 - 1)


def _table(block_table: torch.Tensor) -> torch.Tensor:
    return block_table.to(torch.int32).contiguous()
