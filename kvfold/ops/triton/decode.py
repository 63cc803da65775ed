# mypy: disable-error-code="no-untyped-def, import-untyped, assignment, misc"
"""Decoding: split-KV attention of a few query tokens to packed pages.

Three launches: the queries are rotated; each program attends the rows of one KV head (its group of query heads times
the query tokens) to one split of a sequence; the splits are merged and the output is un-rotated.

The attention kernel takes 64 tokens a step, as four interleaved groups: a 32-bit word of V holds the same byte of four
consecutive tokens, so group t is the tokens ``4 i + t``. K and V are unpacked in the registers in which the tensor
core wants them; scales go to the scores and the probabilities, never to the codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.ops.options import AttentionOptions
from kvfold.ops.triton import sides
from kvfold.ops.triton.queries import Order, rotate_queries
from kvfold.ops.triton.unpack import (
    byte_levels,
    convert,
    k_words,
    multiply,
    to_bfloat16,
    two_levels,
    v_words,
    wide_code,
)

STEP = 64
"""Tokens of a step."""

STAGES = 2
"""Steps whose loads are under way."""

WARPS_PER_SM = 8
"""Warps of the attention kernel that an SM holds at a time, by their registers."""

MIN_SPLIT_STEPS = 2
MAX_SPLITS = 256

INVARIANT_SPLITS = 32
"""Most splits of a sequence in the batch-invariant mode, where they depend on the sequence alone."""

INVARIANT_SPLIT_STEPS = 8
"""Fewest steps of a split in that mode."""

FAR = 1 << 30
"""More tokens than a sequence can have, and still safe to add to a position."""


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    options: AttentionOptions,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.decode_attention`.

    Args:
        batch_invariant: Cut each sequence by its own visible length alone, so that its result is the same to the bit
            whatever else is in the batch and however wide the table is. Also set by ``options.batch_invariant``.
    """
    batch_invariant = batch_invariant or getattr(options, "batch_invariant", False)
    batch, num_queries, num_heads, _ = q.shape
    heads = pages.shape[1]
    group = num_heads // heads
    k, v = sides.packed(layout, False), sides.packed(layout, True)
    softcap = options.softcap or 0.0

    factor = options.scale * sides.unit_level(k.bits, k.head_size)
    if not softcap:
        factor *= LOG2_E
    queries = rotate_queries(q, factor, Order(k.fields, k.units))

    rows = num_queries * group
    row_tile = 16 if rows <= 16 else 64
    # one warp holds 16 rows of a head of 128 in its registers
    warps = row_tile // 16 * (1 if max(k.padded, v.padded) <= 128 else 2)
    row_blocks = triton.cdiv(rows, row_tile)
    reach = block_table.shape[1] * layout.page_size
    if options.window is not None:
        reach = min(reach, options.window + num_queries - 1 + STEP)
    steps = max(1, triton.cdiv(reach, STEP))
    if batch_invariant:
        splits, least = min(INVARIANT_SPLITS, triton.cdiv(steps + 1, INVARIANT_SPLIT_STEPS)), INVARIANT_SPLIT_STEPS
        most = INVARIANT_SPLITS
    else:
        room = max(1, _warps(q.device) // (warps * batch * heads * row_blocks))
        splits = most = min(room, MAX_SPLITS, triton.cdiv(steps, MIN_SPLIT_STEPS))
        least = 1

    total = batch * num_queries * num_heads
    columns = v.pairs * (1 if v.bits == 8 else 2)
    partial = torch.empty(total, splits, columns, dtype=torch.float32, device=q.device)
    state = torch.empty(total, splits, 2, dtype=torch.float32, device=q.device)
    mask = options.mask
    _attend[(batch * heads * row_blocks, splits)](
        queries, pages.view(_UNIT_DTYPES[k.unit_bytes]), pages.view(torch.int32), pages.view(torch.int16),
        _table(k, q.device), _table(v, q.device),
        block_table, *block_table.stride(),
        seq_lens, seq_lens.stride(0),
        *_optional(options.first), *_optional(options.query_start),
        *((seq_lens, 0, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())),
        partial, state, heads, group, num_queries, row_blocks, splits, least, most,
        min(options.lag, FAR), FAR if options.window is None else min(options.window, FAR), softcap,
        K=k, V=v, PAGE_SIZE=layout.page_size, PAGE_BYTES=layout.page_bytes, TILE_BYTES=layout.tile_bytes, TILE=TILE,
        ROWS=row_tile, GROUPS=STEP // 4, STACKED=rows <= 8, HAS_FIRST=options.first is not None,
        HAS_START=options.query_start is not None, HAS_MASK=mask is not None, SOFTCAP=bool(softcap),
        num_warps=warps, num_stages=1 if warps > row_tile // 16 and max(k.bits, v.bits) > 4 else STAGES,
    )  # fmt: skip

    out = torch.empty(batch, num_queries, num_heads, v.head_size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=q.device)
    _combine[(total,)](
        partial, state, sides.inverse_matrix(v.head_size, q.device), sides.unit_level(v.bits, v.head_size),
        out, lse, num_heads, num_queries, splits,
        HEAD_SIZE=v.head_size, PADDED=v.padded, COLUMNS=columns,
        SPLITS=INVARIANT_SPLITS if batch_invariant else min(32, sides.power_of_two(splits)),
        num_warps=v.padded // 32 * 2,
    )  # fmt: skip
    return out, lse


LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
_UNIT_DTYPES = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


def _warps(device: torch.device) -> int:
    """Warps that fill a device."""
    if device.type == "cpu":
        return 8  # the interpreter runs them one after the other: enough for several splits
    return torch.cuda.get_device_properties(device).multi_processor_count * WARPS_PER_SM


def _table(side: sides.Packed, device: torch.device) -> torch.Tensor:
    return sides.split_levels(side.bits, side.head_size, device)


def _optional(positions: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if positions is None else (positions, positions.stride(0))


@triton.jit(
    do_not_specialize=[
        "table_row", "mask_row", "mask_query", "heads", "group", "num_queries", "row_blocks", "splits", "least", "most",
        "lag", "window",
    ]
)  # fmt: skip
def _attend(
    queries, k_pages, v_pages, scale_pages, k_levels, v_levels,
    table, table_row, table_page,
    lengths, length_stride, first, first_stride, query_start, query_start_stride,
    mask, mask_row, mask_query, mask_token,
    partial, state, heads, group, num_queries, row_blocks, splits, least, most,
    lag, window, softcap,
    K: tl.constexpr, V: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGE_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    STACKED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_START: tl.constexpr, HAS_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One split of one sequence for a block of rows of one KV head. A row is (query token, head of the group)."""
    program, part = tl.program_id(0), tl.program_id(1)
    block = program % row_blocks
    head = program // row_blocks % heads
    batch = (program // row_blocks // heads).to(tl.int64)
    step: tl.constexpr = 4 * GROUPS

    if STACKED:  # each row twice; the second copy has no output
        index = tl.arange(0, ROWS)
        row = index % (ROWS // 2)
        valid = (row < num_queries * group) & (index < ROWS // 2)
    else:
        row = block * ROWS + tl.arange(0, ROWS)
        valid = row < num_queries * group
    present = row < num_queries * group
    query = row // group
    # where the row lies in queries, partial and state
    place = (batch * num_queries + query) * (heads * group) + head * group + row % group

    # the tokens [begin, end) that a row sees, and that any row of the block may see
    length = tl.load(lengths + batch * length_stride).to(tl.int32)
    start = length - num_queries
    if HAS_START:
        start = tl.load(query_start + batch * query_start_stride).to(tl.int32)
    lowest = 0
    if HAS_FIRST:
        lowest = tl.maximum(tl.load(first + batch * first_stride).to(tl.int32), 0)
    begin = tl.maximum(start + query - window + 1, lowest)
    end = tl.minimum(start + query - lag + 1, length)
    from_token = tl.maximum(start - window + 1, lowest)
    to_token = tl.minimum(start + num_queries - lag, length)
    first_step = from_token // step
    steps = tl.maximum((to_token + step - 1) // step - first_step, 0)
    share = tl.maximum((steps + most - 1) // most, least)
    my_first = first_step + part * share
    my_end = tl.minimum(my_first + share, first_step + steps)

    # the queries, field by field; the rounding's rest with them
    unit = tl.arange(0, K.units)
    fields: tl.constexpr = K.fields
    columns: tl.constexpr = K.fields * K.units
    q_address = queries + place[:, None] * (2 * columns) + unit[None, :]
    if STACKED:
        q_address += (tl.arange(0, ROWS) // (ROWS // 2) * columns)[:, None]
    q_main = ()
    q_rest = ()
    for field in tl.static_range(fields):
        q_main += (tl.load(q_address + field * K.units, mask=present[:, None], other=0.0),)
        if not STACKED:
            q_rest += (tl.load(q_address + columns + field * K.units, mask=present[:, None], other=0.0),)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    pairs: tl.constexpr = V.pairs
    even = tl.zeros((ROWS, pairs), tl.float32)
    odd = tl.zeros((ROWS, pairs), tl.float32)
    four = tl.arange(0, GROUPS)  # a group of four tokens: tokens 4 * four + t of the step
    place_in_tile = four % (TILE // 4)

    for index in tl.range(my_first, my_end):
        token = index * step + 4 * four
        page_index = token // PAGE_SIZE
        page = tl.load(table + batch * table_row + page_index * table_page, mask=token < length, other=0).to(tl.int64)
        base = (page * heads + head) * PAGE_BYTES + token % PAGE_SIZE // TILE * TILE_BYTES
        k_tile, v_tile = base // K.unit_bytes, base // 4

        scores = ()
        for t in tl.static_range(4):
            s = _scores(q_main, q_rest, k_pages, k_tile, 4 * place_in_tile + t, k_levels, K, ROWS, GROUPS, STACKED)
            scale = tl.load(scale_pages + base // 2 + (K.scales // 2 + 4 * place_in_tile + t))
            scale = scale.to(tl.bfloat16, bitcast=True).to(tl.float32)
            s = s * scale[None, :]
            if SOFTCAP:
                s = capped(s, softcap)
            visible = (token + t >= begin[:, None]) & (token + t < end[:, None])
            if HAS_MASK:
                asked = mask + batch * mask_row + query[:, None] * mask_query + (token + t)[None, :] * mask_token
                visible = visible & (tl.load(asked, mask=visible & valid[:, None], other=0) != 0)
            scores += (tl.where(visible, s, float("-inf")),)

        highest = tl.maximum(tl.maximum(scores[0], scores[1]), tl.maximum(scores[2], scores[3]))
        new_top = tl.maximum(top, tl.max(highest, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - safe)
        top = new_top
        total = total * fade[:, None]
        even = even * fade[:, None]
        odd = odd * fade[:, None]

        w0 = v_words(v_pages, v_tile, place_in_tile, V, 0)
        w1, w2 = w0, w0
        if len(V.widths) > 1:
            w1 = v_words(v_pages, v_tile, place_in_tile, V, 1)
        if len(V.widths) > 2:
            w2 = v_words(v_pages, v_tile, place_in_tile, V, 2)
        if V.bits == 3:
            w0 = w0 | w1 << 2
        for t in tl.static_range(4):
            p = tl.exp2(scores[t] - safe[:, None])
            total += p
            scale = tl.load(scale_pages + base // 2 + (V.scales // 2 + 4 * place_in_tile + t))
            scale = scale.to(tl.bfloat16, bitcast=True).to(tl.float32)
            scale = scale + scale * 0.0  # infinity to NaN, which reaches all of a vector's coordinates
            # an unseen token may have any scale, and a seen one of probability 0 a bad one
            p = to_bfloat16(tl.where(scores[t] == float("-inf"), 0.0, p * scale[None, :]))
            if V.bits <= 4:
                low, high = byte_levels(w0, V, t)
                even = multiply(p, low, even)
                odd = multiply(p, high, odd)
            else:
                main, rest = two_levels(v_levels, wide_code(w0, w1, w2, V, t, 0))
                even = multiply(p, rest, multiply(p, main, even))
                if V.bits < 8:
                    main, rest = two_levels(v_levels, wide_code(w0, w1, w2, V, t, 1))
                    odd = multiply(p, rest, multiply(p, main, odd))

    pair = tl.arange(0, V.pairs)
    slot = place * splits + part
    written = valid & (tl.zeros_like(row) + my_first < my_end)
    if V.bits == 8:
        address = partial + slot[:, None] * V.pairs + pair[None, :]
        tl.store(address, even, mask=written[:, None])
    else:
        address = partial + slot[:, None] * (2 * V.pairs) + 2 * pair[None, :]
        tl.store(address, even, mask=written[:, None])
        tl.store(address + 1, odd, mask=written[:, None])
    tl.store(state + slot * 2, top, mask=valid)
    tl.store(state + slot * 2 + 1, tl.sum(total, axis=1), mask=valid)


@triton.jit
def _scores(
    q_main, q_rest, pages, tile, token, levels, K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    STACKED: tl.constexpr,
):  # fmt: skip
    """Scores ``[ROWS, TOKENS]`` of the queries with the unscaled keys."""
    w0 = k_words(pages, tile, token, K, 0)
    w1, w2 = w0, w0
    if len(K.widths) > 1:
        w1 = k_words(pages, tile, token, K, 1)
    if len(K.widths) > 2:
        w2 = k_words(pages, tile, token, K, 2)
    if K.bits == 3:
        w0 = w0 | w1 << 2
    s = tl.zeros((ROWS, TOKENS), tl.float32)
    per_byte: tl.constexpr = 1 if K.bits == 8 else 2
    unit_bytes: tl.constexpr = K.unit_bytes
    for byte in tl.static_range(unit_bytes):
        if K.bits <= 4:
            low, high = byte_levels(w0, K, byte)
            if not STACKED:
                s = multiply(q_rest[2 * byte], low, s)
                s = multiply(q_rest[2 * byte + 1], high, s)
            s = multiply(q_main[2 * byte], low, s)
            s = multiply(q_main[2 * byte + 1], high, s)
        else:
            for half in tl.static_range(per_byte):
                main, rest = two_levels(levels, wide_code(w0, w1, w2, K, byte, half))
                if not STACKED:
                    s = multiply(q_rest[per_byte * byte + half], main, s)
                s = multiply(q_main[per_byte * byte + half], rest, s)
                s = multiply(q_main[per_byte * byte + half], main, s)
    if STACKED:  # the rows of the second half are what the rounding of the first half's lacks
        both = tl.sum(tl.reshape(s, (2, ROWS // 2, TOKENS)), axis=0)
        s = tl.reshape(tl.broadcast_to(both[None, :, :], (2, ROWS // 2, TOKENS)), (ROWS, TOKENS))
    return s


@triton.jit
def capped(s, softcap):
    """``softcap * tanh(s / softcap)``, to base 2. (tanh by exp, which is exact to rounding only away from 0.)"""
    x = tl.abs(s) / softcap
    e = tl.exp(-2.0 * x)
    near = x * (1.0 + x * x * (-1.0 / 3 + x * x * (2.0 / 15 - x * x * (17.0 / 315))))
    t = tl.where(x < 0.1, near, (1.0 - e) / (1.0 + e))
    return tl.where(s < 0, -t, t) * softcap * 1.4426950408889634


@triton.jit(do_not_specialize=["num_heads", "num_queries", "splits"])
def _combine(
    partial, state, matrix, unit, out, lse, num_heads, num_queries, splits,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head, and un-rotate. The order of the sums depends on SPLITS alone."""
    row = tl.program_id(0).to(tl.int64)
    column, each = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    top = tl.full((SPLITS,), float("-inf"), tl.float32)
    for begin in range(0, splits, SPLITS):
        part = begin + each
        top = tl.maximum(top, tl.load(state + (row * splits + part) * 2, mask=part < splits, other=float("-inf")))
    highest = tl.max(top, axis=0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((SPLITS,), tl.float32)
    acc = tl.zeros((PADDED,), tl.float32)
    for begin in range(0, splits, SPLITS):
        part = begin + each
        address = row * splits + part
        mine = tl.load(state + address * 2, mask=part < splits, other=float("-inf"))
        sums = tl.load(state + address * 2 + 1, mask=part < splits, other=0.0)
        weight = tl.exp2(mine - safe)
        total += weight * sums
        # a split without tokens, which saw nothing, has written nothing
        read = (sums != 0.0)[:, None] & (column < HEAD_SIZE)[None, :]
        values = tl.load(partial + address[:, None] * COLUMNS + column[None, :], mask=read, other=0.0)
        acc += tl.sum(values * weight[:, None], axis=0)
    total = tl.sum(total, axis=0)
    acc = tl.where(total == 0.0, 0.0, acc * (unit / tl.where(total == 0.0, 1.0, total)))
    result = tl.zeros((PADDED,), tl.float32)
    result += tl.sum(acc[:, None] * tl.load(matrix + column[:, None] * PADDED + column[None, :]), axis=0)
    tl.store(out + row * HEAD_SIZE + column, convert(result, out.dtype.element_ty), mask=column < HEAD_SIZE)
    head, query, batch = row % num_heads, row // num_heads % num_queries, row // num_heads // num_queries
    logarithm = tl.where(total == 0.0, float("-inf"), (highest + tl.log2(total)) * LN_2)
    tl.store(lse + (batch * num_heads + head) * num_queries + query, logarithm)
