# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Prefill: causal attention of a varlen batch of chunks to their packed prefixes, and to themselves.

Two passes over blocks of rows (query tokens times the heads of a group). The first attends the rotated queries to the
packed prefix, tile by tile: a tile of K and of V is unpacked on the fly, and serves all rows of the block. The second,
where the chunk's own K and V are at hand, goes on from there with the plain queries.

The grid depends on shapes alone: a block finds its sequence by bisection of ``cu_seqlens``. Only where rotated queries
and results would exceed :data:`SCRATCH_BYTES` are lengths read on the host (once for all layers, see
:mod:`kvfold.ops.lengths`), and the batch is cut into several launches, between sequences and inside of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.ops.lengths import on_host
from kvfold.ops.options import AttentionOptions
from kvfold.ops.triton import sides
from kvfold.ops.triton.decode import FAR, LN_2, LOG2_E, capped
from kvfold.ops.triton.queries import Order, rotate_queries
from kvfold.ops.triton.unpack import INTERPRETED, codes_of, convert, multiply, table_level, to_bfloat16, two_levels
from kvfold.rotation import unrotate

ROWS = 64
TOKENS = 64

SCRATCH_BYTES = 64 * 2**20
"""Of rotated queries and results over the prefix at a time."""


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
    """See :func:`kvfold.ops.prefill_attention`."""
    total, num_heads, _ = q.shape
    k_side, v_side = sides.packed(layout, False), sides.packed(layout, True)
    out = torch.empty(total, num_heads, v_side.head_size, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, total, dtype=torch.float32, device=q.device)
    if not total:
        return out, lse
    chunk = None if k is None or v is None else (k, v)
    # queries and results over the prefix, or those and the un-rotated ones
    row_bytes = max(4 * k_side.padded + 4 * v_side.head_size, 8 * v_side.head_size)
    most = max(1, SCRATCH_BYTES // (row_bytes * num_heads))
    parts: Iterable[_Part]
    if total <= most:
        parts = [_Part(0, total, 0, block_table, context_lens, cu_seqlens, 0, options.mask)]
    else:
        parts = _parts(block_table, context_lens, cu_seqlens, options.mask, chunk is None, most)
    for part in parts:
        own = None if chunk is None else (chunk[0][part.own : part.end], chunk[1][part.own : part.end])
        of_part = options._replace(mask=part.mask)
        _attend(
            q[part.begin : part.end], pages, part, layout, of_part, k_side, v_side, own,
            out[part.begin : part.end], lse[:, part.begin :],
        )  # fmt: skip
    return out, lse


class _Part(NamedTuple):
    """Sequences that are served at once, or some queries of a sequence.

    Attributes:
        begin: The first of their tokens in the batch. end: Behind the last.
        own: The first token of their chunks: ``begin - skipped``.
        table: Their rows. context: int, ``[b]``. bounds: int, ``[b + 1]``, from 0 on.
        skipped: Tokens of the chunk before the first query, if it is one sequence.
        mask: See :class:`~kvfold.ops.options.AttentionOptions`.
    """

    begin: int
    end: int
    own: int
    table: torch.Tensor
    context: torch.Tensor
    bounds: torch.Tensor
    skipped: int
    mask: torch.Tensor | None


def _parts(
    table: torch.Tensor, context: torch.Tensor, bounds: torch.Tensor, mask: torch.Tensor | None, packed: bool, most: int
) -> Iterator[_Part]:
    """The batch cut into parts of at most ``most`` tokens."""
    starts = on_host(bounds)
    b = 0
    while b + 1 < len(starts):
        begin, last = starts[b], b
        while last + 2 < len(starts) and starts[last + 2] - begin <= most:
            last += 1
        end = starts[last + 1]
        if end - begin <= most:
            rows = slice(b, last + 1)
            own_bounds = bounds[b : last + 2] - begin
            own_mask = None if mask is None else mask[rows]
            if end > begin:
                yield _Part(begin, end, begin, table[rows], context[rows], own_bounds, 0, own_mask)
        else:
            for at in range(begin, end, most):
                until = min(at + most, end)
                own_bounds = torch.arange(0, until - at + 1, until - at, dtype=torch.int32, device=bounds.device)
                seen = context[b : b + 1] - (end - until) if packed else context[b : b + 1]
                own_mask = None if mask is None else mask[b : b + 1, at - begin : until - begin]
                yield _Part(at, until, begin, table[b : b + 1], seen, own_bounds, at - begin, own_mask)
        b = last + 1


def _attend(
    q: torch.Tensor, pages: torch.Tensor, part: _Part, layout: PageLayout, options: AttentionOptions,
    k_side: sides.Packed, v_side: sides.Packed, chunk: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The two passes for a part, whose results are written to ``out`` and ``lse``, whose rows may be longer."""
    total, num_heads, _ = q.shape
    batch, heads = part.context.shape[0], pages.shape[1]
    group = num_heads // heads
    mixed = torch.empty(total, num_heads, v_side.head_size, dtype=torch.float32, device=q.device)
    softcap, mask = options.softcap or 0.0, options.mask
    factor = options.scale * sides.unit_level(k_side) * (1.0 if softcap else LOG2_E)

    def grid(rows: int) -> tuple[int, int]:
        # a chunk ends in the middle of a block, so that each sequence may add one
        return triton.cdiv(total * group, rows) + batch, heads

    large = max(k_side.padded, v_side.padded) > 128
    shared = (
        part.context, part.context.stride(0), part.bounds, part.bounds.stride(0), batch, part.skipped,
        *((q, 0, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())),
        heads, group, lse.stride(0), FAR if options.window is None else min(options.window, FAR), softcap,
    )  # fmt: skip
    flags = {"HAS_WINDOW": options.window is not None, "HAS_MASK": mask is not None, "SOFTCAP": bool(softcap)}
    _prefix[grid(ROWS)](
        rotate_queries(q[None], factor, Order(1, k_side.padded)),
        pages, pages.view(torch.int16), pages.view(torch.int8), 1.0 / sides.unit_level(k_side),
        _table(k_side, q.device), _table(v_side, q.device), sides.unit_level(v_side),
        part.table, *part.table.stride(), mixed, lse, *shared,
        K=k_side, V=v_side, PACKED=chunk is None, PAGE_SIZE=layout.page_size, PAGE_BYTES=layout.page_bytes,
        TILE_BYTES=layout.tile_bytes, TILE=TILE, REFERENCE=layout.reference if layout.format.mean else -1,
        ROWS=ROWS, TOKENS=TOKENS // 2 if large else TOKENS, num_warps=8, num_stages=1, **flags,
    )  # fmt: skip
    mixed = unrotate(mixed)
    if chunk is None:
        out.copy_(mixed)
        return

    k, v = chunk
    q_exact = q
    if not q.dtype == k.dtype == v.dtype:
        q_exact, k, v = q.float(), k.float(), v.float()
    wide = q_exact.element_size() * (k_side.padded + v_side.padded) > 512
    rows = ROWS // 2 if large and q_exact.element_size() == 4 else ROWS
    _chunk[grid(rows)](
        q_exact, *q_exact.stride(), k, *k.stride(), v, *v.stride(),
        options.scale * (1.0 if softcap else LOG2_E), mixed, lse, out, *shared,
        HEAD_SIZE=k_side.head_size, HEAD_SIZE_V=v_side.head_size, PADDED=k_side.padded, PADDED_V=v_side.padded,
        PRECISION="tf32x3" if q.is_cuda and torch.version.hip is None else "ieee",
        ROWS=rows, TOKENS=TOKENS // 2 if wide else TOKENS,
        num_warps=8 if wide else 4, num_stages=1 if wide else 2, **flags,
    )  # fmt: skip


def _table(side: sides.Packed, device: torch.device) -> torch.Tensor:
    return sides.split_levels(side, device)


@triton.jit
def _my_rows(block, context_lens, context_stride, bounds, bound_stride, batch, group, ROWS: tl.constexpr):
    """Which sequence a block belongs to, and its first row there.

    Sequence b's blocks begin at ``bounds[b] * group // ROWS + b``, which leaves room for all of them.
    """
    low, high = block * 0, block * 0 + (batch - 1)
    while low < high:
        middle = (low + high + 1) // 2
        start = tl.load(bounds + middle * bound_stride).to(tl.int32) * group // ROWS + middle
        if start <= block:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(bounds + low * bound_stride).to(tl.int32)
    length = tl.load(bounds + (low + 1) * bound_stride).to(tl.int32) - begin
    first_row = (block - (begin * group // ROWS + low)) * ROWS
    context = tl.load(context_lens + low * context_stride).to(tl.int32)
    return low, begin, length, context, first_row


_VARYING = ["batch", "skipped", "mask_row", "mask_query", "heads", "group", "lse_head", "window"]
"""Arguments whose value is not worth a kernel of its own."""

_ANYWHERE = ["table", "context_lens", "bounds", "lse"]
"""Pointers into what may be a part of something, whose alignment is not worth one either: serving must not compile."""


@triton.jit(do_not_specialize=[*_VARYING, "table_row"], do_not_specialize_on_alignment=_ANYWHERE)
def _prefix(
    queries, pages, scale_pages, reference_pages, reference_unit, k_levels, v_levels, unit,
    table, table_row, table_page, mixed, lse,
    context_lens, context_stride, bounds, bound_stride, batch, skipped, mask, mask_row, mask_query, mask_token,
    heads, group, lse_head, window, softcap,
    K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr, TILE: tl.constexpr,
    REFERENCE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A block of rows of one KV head against its sequence's packed tokens: normalised, in V's rotated basis."""
    b, begin, length, context, first_row = _my_rows(
        tl.program_id(0), context_lens, context_stride, bounds, bound_stride, batch, group, ROWS
    )
    head = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    if first_row < length * group:
        query = row // group
        valid = row < length * group
        place = (begin + query).to(tl.int64) * (heads * group) + head * group + row % group
        start = context - length if PACKED else context + skipped
        position = start + query
        last = tl.minimum(start + (first_row + ROWS - 1) // group, start + length - 1)
        to_token = tl.minimum(context, last + 1)
        from_token = tl.maximum(start + first_row // group - window + 1, 0)

        k_coordinate, v_coordinate = tl.arange(0, K.padded), tl.arange(0, V.padded)
        address = queries + place[:, None] * (2 * K.padded) + k_coordinate[None, :]
        q_main = tl.load(address, mask=valid[:, None], other=0.0)
        q_rest = tl.load(address + K.padded, mask=valid[:, None], other=0.0)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((ROWS,), tl.float32)
        padded: tl.constexpr = V.padded
        acc = tl.zeros((ROWS, padded), tl.float32)
        for left in tl.range(from_token // TOKENS * TOKENS, to_token, TOKENS):
            token = left + tl.arange(0, TOKENS)
            entry = table + b.to(tl.int64) * table_row + token // PAGE_SIZE * table_page
            page = tl.load(entry, mask=token < context, other=0).to(tl.int64)
            page_byte = (page * heads + head) * PAGE_BYTES
            tile = page_byte + token % PAGE_SIZE // TILE * TILE_BYTES
            code = codes_of(pages, tile[None, :], (token % TILE)[None, :], k_coordinate[:, None], K)
            if K.bits <= 4:
                level = table_level(code, K)
                s = multiply(q_main, level, multiply(q_rest, level, tl.zeros((ROWS, TOKENS), tl.float32)))
            else:
                level, rest = two_levels(k_levels, code)
                s = multiply(q_rest, level, tl.zeros((ROWS, TOKENS), tl.float32))
                s = multiply(q_main, level, multiply(q_main, rest, s))
            scale = _scale(scale_pages, tile, token % TILE, K, token < context)
            s = s * scale[None, :]
            if REFERENCE >= 0:
                code_at = reference_pages + (page_byte[None, :] + (REFERENCE + k_coordinate)[:, None])
                held = (k_coordinate < K.head_size)[:, None] & (token < context)[None, :]
                reference = to_bfloat16(tl.load(code_at, mask=held, other=0).to(tl.float32))
                more = multiply(q_main, reference, multiply(q_rest, reference, tl.zeros((ROWS, TOKENS), tl.float32)))
                bits = tl.load(scale_pages + (page_byte + (PAGE_BYTES - 2)) // 2, mask=token < context, other=0)
                s += more * (bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * reference_unit)[None, :]
            if SOFTCAP:
                s = capped(s, softcap)
            visible = (token[None, :] <= position[:, None]) & (token < context)[None, :] & valid[:, None]
            if HAS_WINDOW:
                visible = visible & (token[None, :] > position[:, None] - window)
            if HAS_MASK:
                asked = mask + b.to(tl.int64) * mask_row + query[:, None] * mask_query + token[None, :] * mask_token
                visible = visible & (tl.load(asked, mask=visible, other=0) != 0)
            s = tl.where(visible, s, float("-inf"))
            top, safe, fade = _raised(top, s)
            p = tl.exp2(s - safe[:, None])
            sums = sums * fade + tl.sum(p, axis=1)
            scale = _scale(scale_pages, tile, token % TILE, V, token < context)
            scale = scale + scale * 0.0  # infinity to NaN, which reaches all of a vector's coordinates
            p = to_bfloat16(tl.where(visible, p * scale[None, :], 0.0))
            code = codes_of(pages, tile[:, None], (token % TILE)[:, None], v_coordinate[None, :], V)
            acc = acc * fade[:, None]
            if V.bits <= 4:
                acc = multiply(p, table_level(code, V), acc)
            else:
                level, rest = two_levels(v_levels, code)
                acc = multiply(p, rest, multiply(p, level, acc))

        acc = tl.where((sums == 0.0)[:, None], 0.0, acc * (unit / tl.where(sums == 0.0, 1.0, sums))[:, None])
        inside = valid[:, None] & (v_coordinate < V.head_size)[None, :]
        tl.store(mixed + place[:, None] * V.head_size + v_coordinate[None, :], acc, mask=inside)
        _store_lse(lse, top, sums, begin + query, head * group + row % group, lse_head, valid)


@triton.jit
def _scale(pages, tile, token, S: tl.constexpr, inside):
    """Scales of some tokens in float32; 0 for tokens that are not there."""
    bits = tl.load(pages + tile // 2 + (S.scales // 2 + token), mask=inside, other=0)
    return bits.to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _raised(top, s):
    """The online softmax's new maximum, the same or 0 where nothing was seen, and the factor of what was summed."""
    raised = tl.maximum(top, tl.max(s, axis=1))
    safe = tl.where(raised == float("-inf"), 0.0, raised)
    return raised, safe, tl.exp2(top - safe)


@triton.jit
def _store_lse(lse, top, sums, token, head, lse_head, valid):
    seen = sums != 0.0
    logarithm = tl.where(seen, (top + tl.log2(tl.where(seen, sums, 1.0))) * LN_2, float("-inf"))
    tl.store(lse + head.to(tl.int64) * lse_head + token, logarithm, mask=valid)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANYWHERE[1:])
def _chunk(
    q, q_token, q_head, q_coordinate, k, k_token, k_head, k_coordinate, v, v_token, v_head, v_coordinate,
    factor, mixed, lse, out,
    context_lens, context_stride, bounds, bound_stride, batch, skipped, mask, mask_row, mask_query, mask_token,
    heads, group, lse_head, window, softcap,
    HEAD_SIZE: tl.constexpr, HEAD_SIZE_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A block of rows of one KV head against its own chunk, on top of the result over the prefix."""
    b, begin, length, context, first_row = _my_rows(
        tl.program_id(0), context_lens, context_stride, bounds, bound_stride, batch, group, ROWS
    )
    head = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    if first_row < length * group:
        query = row // group
        valid = row < length * group
        q_index, my_head = (begin + query).to(tl.int64), head * group + row % group
        column, column_v = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
        address = q + (q_index * q_token + my_head * q_head)[:, None] + (column * q_coordinate)[None, :]
        queries = tl.load(address, mask=valid[:, None] & (column < HEAD_SIZE)[None, :], other=0.0)

        inside_v = valid[:, None] & (column_v < HEAD_SIZE_V)[None, :]
        place = (q_index * (heads * group) + my_head)[:, None] * HEAD_SIZE_V + column_v[None, :]
        acc = tl.load(mixed + place, mask=inside_v, other=0.0)
        # the prefix counts as one token of this score
        top = tl.load(lse + my_head.to(tl.int64) * lse_head + begin + query, mask=valid, other=float("-inf")) / LN_2
        sums = tl.where(top == float("-inf"), 0.0, 1.0)

        # from here on `at` is where a query stands in its chunk, and `length` all that the chunk has up to the last one
        at = skipped + query
        last = skipped + tl.minimum((first_row + ROWS - 1) // group, length - 1)
        length += skipped
        from_token = tl.maximum(skipped + first_row // group - window + 1, 0) // TOKENS * TOKENS
        # tokens that every row sees need no mask
        all_see = (skipped + first_row // group) // TOKENS * TOKENS
        if HAS_WINDOW or HAS_MASK:
            all_see = from_token
        k_base = k + begin.to(tl.int64) * k_token + head * k_head
        v_base = v + begin.to(tl.int64) * v_token + head * v_head
        for left in tl.range(from_token, all_see, TOKENS):
            token = (left + tl.arange(0, TOKENS)).to(tl.int64)
            keys = _vectors(k_base, token[None, :], k_token, column[:, None], k_coordinate, length, HEAD_SIZE)
            s = _product(queries, keys, tl.zeros((ROWS, TOKENS), tl.float32), PRECISION) * factor
            if SOFTCAP:
                s = capped(s, softcap)
            top, safe, fade = _raised(top, s)
            p = tl.exp2(s - safe[:, None])
            sums = sums * fade + tl.sum(p, axis=1)
            values = _vectors(v_base, token[:, None], v_token, column_v[None, :], v_coordinate, length, HEAD_SIZE_V)
            acc = _product(convert(p, values.dtype), values, acc * fade[:, None], PRECISION)
        for left in tl.range(all_see, last + 1, TOKENS):
            token = (left + tl.arange(0, TOKENS)).to(tl.int64)
            keys = _vectors(k_base, token[None, :], k_token, column[:, None], k_coordinate, length, HEAD_SIZE)
            s = _product(queries, keys, tl.zeros((ROWS, TOKENS), tl.float32), PRECISION) * factor
            if SOFTCAP:
                s = capped(s, softcap)
            visible = (token[None, :] <= at[:, None]) & (token < length)[None, :]
            if HAS_WINDOW:
                visible = visible & (token[None, :] > at[:, None] - window)
            if HAS_MASK:
                asked = mask + b.to(tl.int64) * mask_row + query[:, None] * mask_query
                asked = asked + (context + token)[None, :] * mask_token
                visible = visible & (tl.load(asked, mask=visible & valid[:, None], other=0) != 0)
            s = tl.where(visible, s, float("-inf"))
            top, safe, fade = _raised(top, s)
            p = tl.exp2(s - safe[:, None])
            sums = sums * fade + tl.sum(p, axis=1)
            values = _vectors(v_base, token[:, None], v_token, column_v[None, :], v_coordinate, length, HEAD_SIZE_V)
            # 0 times NaN is NaN: a bad value reaches only the rows that see its token
            bad = tl.sum(values.to(tl.float32) * 0.0, axis=1) != 0.0
            values = tl.where(bad[:, None], 0.0, values).to(values.dtype)
            spoilt = tl.max((visible & bad[None, :]).to(tl.int32), axis=1) > 0
            acc = _product(convert(p, values.dtype), values, acc * fade[:, None], PRECISION)
            acc = tl.where(spoilt[:, None], float("nan"), acc)

        acc = tl.where((sums == 0.0)[:, None], 0.0, acc / tl.where(sums == 0.0, 1.0, sums)[:, None])
        tl.store(out + place, convert(acc, out.dtype.element_ty), mask=inside_v)
        _store_lse(lse, top, sums, begin + query, my_head, lse_head, valid)


@triton.jit
def _vectors(base, token, token_stride, column, stride, length, HEAD_SIZE: tl.constexpr):
    """Vectors of some tokens of the chunk, in the shape that token and column broadcast to."""
    return tl.load(
        base + token * token_stride + column * stride, mask=(token < length) & (column < HEAD_SIZE), other=0.0
    )


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
