# mypy: disable-error-code="no-untyped-def, import-untyped, assignment, misc"
"""Decoding: split-KV attention of a few query tokens to packed pages.

Three launches: the queries are rotated; each program attends the rows of one KV head (its group of query heads times
the query tokens) to one split of a sequence; the splits are merged and the output is un-rotated.

The attention kernel takes 64 tokens a step, as four interleaved groups: a 32-bit word of V holds the same byte of four
consecutive tokens, so group t is the tokens ``4 i + t``. K and V are unpacked in the registers in which the tensor
core wants them; scales go to the scores and the probabilities, never to the codes. They are the products' left sides,
of 16 rows; queries and weights are the right ones, of 8 columns, which is less than a tensor core has rows: four query
heads fill them, as each is the sum of two float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.ops.options import AttentionOptions
from kvfold.ops.triton import sides
from kvfold.ops.triton.queries import Order, rotate_queries_to_half
from kvfold.ops.triton.unpack import (
    convert,
    level_unit,
    levels_of_two_bytes,
    multiply,
    place_of_unit,
    two_halves,
    wide_code,
    words_of,
)
from kvfold.ops.triton.unpack_trellis import (
    coordinate_of_column,
    coordinate_of_row,
    k_levels,
    known,
    magnitudes,
    tokens_of_groups,
    v_levels,
)

STEP = 64
"""Tokens of a step."""

STAGES = 2
"""Steps whose loads are under way, see :func:`_stages`."""

WARPS_PER_SM = 8
"""Warps of the attention kernel that an SM holds at a time, by their registers."""

LEAST_COLUMNS = 8 if hasattr(triton, "constexpr_function") else 16
"""Of a product's right side, which Triton 3.4 wants as wide as its left side is high. Up to 4 rows have two each."""

MIN_SPLIT_STEPS = 2
MAX_SPLITS = 256

INVARIANT_SPLITS = 32
"""Most splits of a sequence in the batch-invariant mode, where they depend on the sequence alone."""

INVARIANT_SPLIT_STEPS = 8
"""Fewest steps of a split in that mode."""

SCRATCH_BYTES = 32 * 2**20
"""Of rotated queries and partial results at a time; a batch that needs more is cut."""

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
    k, v = sides.packed(layout, False), sides.packed(layout, True)
    launch = _launch(q, pages, block_table, layout, options, k, v, batch_invariant)
    row_bytes = 4 * (k.fields * k.units + 1) + 4 * launch.splits * (_columns(v) + 2)
    at_once = max(1, SCRATCH_BYTES // (row_bytes * num_queries * num_heads))
    if at_once > 16:
        at_once -= at_once % 16  # results begin at multiples of 16 bytes, as kernels are compiled for
    out = torch.empty(batch, num_queries, num_heads, v.head_size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=q.device)
    if 0 < batch <= at_once:  # nearly always, and slices take the host's time
        _attend_and_combine(q, pages, block_table, seq_lens, layout, options, k, v, launch, batch_invariant, out, lse)
        return out, lse
    for begin in range(0, batch, at_once):
        some = slice(begin, begin + at_once)
        of_some = options._replace(
            first=_rows(options.first, some), query_start=_rows(options.query_start, some),
            mask=_rows(options.mask, some),
        )  # fmt: skip
        _attend_and_combine(
            q[some], pages, block_table[some], seq_lens[some], layout, of_some, k, v, launch, batch_invariant,
            out[some], lse[some],
        )  # fmt: skip
    return out, lse


class _Launch(NamedTuple):
    """Shapes of a launch.

    Attributes:
        row_tile: Rows of a program. row_blocks: Programs for the rows of a KV head. warps: Of a program.
        splits: Of a sequence. least: Steps of a split, at least. most: Splits that a sequence's steps are dealt out to.
    """

    row_tile: int
    row_blocks: int
    warps: int
    splits: int
    least: int
    most: int


def _launch(
    q: torch.Tensor, pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout, options: AttentionOptions,
    k: sides.Packed, v: sides.Packed, batch_invariant: bool,
) -> _Launch:  # fmt: skip
    batch, num_queries, num_heads, _ = q.shape
    heads = pages.shape[1]
    rows = num_queries * (num_heads // heads)
    row_tile = 4 if rows <= 4 else 8 if rows <= 8 else 16 if rows <= 16 else 64
    row_tile = max(row_tile, LEAST_COLUMNS // 2 if rows <= 4 else LEAST_COLUMNS)
    # one warp holds 16 rows of a head of 128 in its registers
    warps = max(1, row_tile // 16) * (1 if max(k.padded, v.padded) <= 128 else 2)
    row_blocks = triton.cdiv(rows, row_tile)
    reach = block_table.shape[1] * layout.page_size
    if options.window is not None:
        reach = min(reach, options.window + num_queries - 1 + STEP)
    steps = max(1, triton.cdiv(reach, STEP))
    if batch_invariant:
        splits = min(INVARIANT_SPLITS, triton.cdiv(steps + 1, INVARIANT_SPLIT_STEPS))
        return _Launch(row_tile, row_blocks, warps, splits, INVARIANT_SPLIT_STEPS, INVARIANT_SPLITS)
    room = max(1, _warps(q.device) // (warps * max(batch, 1) * heads * row_blocks))
    splits = min(room, MAX_SPLITS, triton.cdiv(steps, MIN_SPLIT_STEPS))
    return _Launch(row_tile, row_blocks, warps, splits, 1, splits)


def _stages(k: sides.Packed, v: sides.Packed, launch: _Launch) -> int:
    """Steps whose loads are under way: one if there is no room for two, or if their way is longer than the wait.

    With two the next step's words come by shared memory, as soon as this step's are no longer needed. Of keys in
    several narrow planes, as far as their nibbles are looked up, they are so many copies that a warp alone is slower by
    them than by waiting for what it loads at once. Keys of a trellis need few copies, and leave room for one step more
    (docs/kernels.md).
    """
    if launch.warps > max(1, launch.row_tile // 16) and max(k.bits, v.bits) > 4:
        return 1
    if k.trellis:
        return STAGES + 1
    return 1 if launch.warps == 1 and k.bits <= 4 and len(k.widths) > 1 else STAGES


def _attend_and_combine(
    q: torch.Tensor, pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, layout: PageLayout,
    options: AttentionOptions, k: sides.Packed, v: sides.Packed, launch: _Launch, batch_invariant: bool,
    out: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The three launches for some of the sequences, whose results are written to ``out`` and ``lse``."""
    batch, num_queries, num_heads, _ = q.shape
    heads = pages.shape[1]
    group = num_heads // heads
    softcap = options.softcap or 0.0
    factor = options.scale * sides.decoded_unit(k)
    if not softcap:
        factor *= LOG2_E
    queries, units = rotate_queries_to_half(q, factor, Order(k.fields, k.units, k.deep, k.trellis))
    row_tile, row_blocks, warps, splits, least, most = launch
    total, columns = batch * num_queries * num_heads, _columns(v)
    partial = torch.empty(total, splits, columns, dtype=torch.float32, device=q.device)
    state = torch.empty(total, splits, 2, dtype=torch.float32, device=q.device)
    mask = options.mask
    _attend[(batch * heads * row_blocks, splits)](
        queries, units, pages.view(_UNIT_DTYPES[k.unit_bytes]), pages.view(torch.int32), pages.view(torch.int64),
        _table(k, q.device), _table(v, q.device), pages.view(torch.int8), pages.view(torch.bfloat16),
        1.0 / sides.decoded_unit(k),
        block_table, *block_table.stride(),
        seq_lens, seq_lens.stride(0),
        *_optional(options.first), *_optional(options.query_start),
        *((seq_lens, 0, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())),
        partial, state, heads, group, num_queries, row_blocks, splits, least, most,
        min(options.lag, FAR), FAR if options.window is None else min(options.window, FAR), softcap,
        K=k, V=v, PAGE_SIZE=layout.page_size, PAGE_BYTES=layout.page_bytes, TILE_BYTES=layout.tile_bytes, TILE=TILE,
        REFERENCE=layout.reference if layout.format.mean else -1, ROWS=row_tile, GROUPS=STEP // 4,
        STACKED=num_queries * group <= 4,
        HAS_BEGIN=options.window is not None or options.first is not None, HAS_FIRST=options.first is not None,
        HAS_START=options.query_start is not None, HAS_MASK=mask is not None, SOFTCAP=bool(softcap),
        num_warps=warps, num_stages=_stages(k, v, launch),
    )  # fmt: skip
    _combine[(total,)](
        partial, state, sides.inverse_matrix(v.head_size, q.device), sides.decoded_unit(v),
        out, lse, num_heads, num_queries, splits,
        HEAD_SIZE=v.head_size, PADDED=v.padded, COLUMNS=columns,
        SPLITS=INVARIANT_SPLITS if batch_invariant else min(32, sides.power_of_two(splits)),
        num_warps=v.padded // 32 * 2,
    )  # fmt: skip


def _columns(v: sides.Packed) -> int:
    """Of a partial result."""
    return v.rows * v.row_levels


def _rows(x: torch.Tensor | None, some: slice) -> torch.Tensor | None:
    return None if x is None else x[some]


LAST = tl.constexpr(FAR - 1)
"""Of positions where tables are read ahead of what is asked for: after it and some steps there is still no overflow."""

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(16384.0)
LEAST_LIMIT = tl.constexpr(1e-30)  # whose reciprocal is finite
_UNIT_DTYPES = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


def _warps(device: torch.device) -> int:
    """Warps that fill a device."""
    if device.type == "cpu":
        return 8  # the interpreter runs them one after the other: enough for several splits
    return torch.cuda.get_device_properties(device).multi_processor_count * WARPS_PER_SM


def _table(side: sides.Packed, device: torch.device) -> torch.Tensor:
    if side.trellis:
        return sides.trellis_look_up(side, device)
    if side.bits <= 4:
        return sides.look_up(side, device)
    return sides.split_levels(side, device, torch.float16)


def _optional(positions: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if positions is None else (positions, positions.stride(0))


@triton.jit(
    do_not_specialize=[
        "table_row", "mask_row", "mask_query", "heads", "group", "num_queries", "row_blocks", "splits", "least", "most",
        "lag", "window",
    ],
    do_not_specialize_on_alignment=["table", "lengths", "first", "query_start"],  # parts of a batch begin anywhere
)  # fmt: skip
def _attend(
    queries, units, k_pages, v_pages, scale_pages, k_table, v_table,
    reference_pages, reference_scales, reference_unit,
    table, table_row, table_page,
    lengths, length_stride, first, first_stride, query_start, query_start_stride,
    mask, mask_row, mask_query, mask_token,
    partial, state, heads, group, num_queries, row_blocks, splits, least, most,
    lag, window, softcap,
    K: tl.constexpr, V: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGE_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr,
    TILE: tl.constexpr, REFERENCE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, STACKED: tl.constexpr,
    HAS_BEGIN: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_START: tl.constexpr, HAS_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One split of one sequence for a block of rows of one KV head. A row is (query token, head of the group)."""
    program, part = tl.program_id(0), tl.program_id(1)
    block = program % row_blocks
    head = program // row_blocks % heads
    batch = (program // row_blocks // heads).to(tl.int64)
    step: tl.constexpr = 4 * GROUPS

    row = block * ROWS + tl.arange(0, ROWS)
    present = row < num_queries * group
    query = row // group
    # where the row lies in queries, partial and state
    place = (batch * num_queries + query) * (heads * group) + head * group + row % group

    # the tokens [begin, end) that a row sees, and that any row of the block may see
    length = tl.load(lengths + batch * length_stride).to(tl.int32)
    start = length - num_queries
    if HAS_START:
        start = tl.load(query_start + batch * query_start_stride).to(tl.int32)
        if K.trellis or V.trellis:
            start = tl.minimum(start, LAST)
    lowest = 0
    if HAS_FIRST:
        lowest = tl.maximum(tl.load(first + batch * first_stride).to(tl.int32), 0)
        if K.trellis or V.trellis:
            lowest = tl.minimum(lowest, LAST)
    begin = tl.maximum(start + query - window + 1, lowest)
    end = tl.minimum(start + query - lag + 1, length)
    from_token = tl.maximum(start - window + 1, lowest)
    to_token = tl.minimum(start + num_queries - lag, length)
    first_step = from_token // step
    steps = tl.maximum((to_token + step - 1) // step - first_step, 0)
    share = tl.maximum((steps + most - 1) // most, least)
    my_first = first_step + part * share
    my_end = tl.minimum(my_first + share, first_step + steps)

    # the queries, field by field; the rounding's rest beside them, in columns of its own if STACKED
    unit = tl.arange(0, K.units)
    fields: tl.constexpr = K.fields
    q_columns: tl.constexpr = K.fields * K.units
    columns: tl.constexpr = ROWS * (2 if STACKED else 1)
    column_place = _doubled(place, STACKED)
    q_address = queries + column_place[None, :] * (2 * q_columns) + unit[:, None]
    if STACKED:
        q_address += (tl.arange(0, columns) % 2 * q_columns)[None, :]
    q_mask = _doubled(present.to(tl.int32), STACKED)[None, :] != 0
    q_main = ()
    q_rest = ()
    for field in tl.static_range(fields):
        q_main += (tl.load(q_address + field * K.units, mask=q_mask, other=0.0),)
        if not STACKED:
            q_rest += (tl.load(q_address + q_columns + field * K.units, mask=q_mask, other=0.0),)
    q_unit = tl.load(units + place, mask=present, other=0.0) / level_unit(K)

    # weights are probabilities times V's scales; those of a row go to float16 so that the largest yet, `limit`, becomes
    # LARGEST. Then what float16 cannot hold is less than 2^-38 of it.
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    limit = tl.full((ROWS,), LEAST_LIMIT, tl.float32)
    total = tl.zeros((GROUPS, ROWS), tl.float32)
    rows: tl.constexpr = V.rows
    even = tl.zeros((rows, columns), tl.float32)
    odd = tl.zeros((rows, columns), tl.float32)  # of rows of two levels
    four = tl.arange(0, GROUPS)  # a group of four tokens: tokens 4 * four + t of the step
    place_in_tile = four % (TILE // 4)
    k_magnitudes = magnitudes(k_table, K)
    v_magnitudes = k_magnitudes
    if V.trellis and not (K.trellis and K.bits == V.bits):
        v_magnitudes = magnitudes(v_table, V)

    for index in tl.range(my_first, my_end):
        # where the step's tiles lie, in bytes: `tile` from `begin_byte` on, which is all that changes in large pages
        token = index * step + 4 * four
        if PAGE_SIZE % step == 0:
            page_index = index * step // PAGE_SIZE
            entry = table + batch * table_row + page_index * table_page
            if K.trellis or V.trellis:
                page = known(entry, index * step < length, K).to(tl.int64)
            else:
                page = tl.load(entry).to(tl.int64)
            begin_byte = (page * heads + head) * PAGE_BYTES
            tile = (index * step % PAGE_SIZE + 4 * four) // TILE * TILE_BYTES
        else:
            page_index = token // PAGE_SIZE
            entry = table + batch * table_row + page_index * table_page
            if K.trellis or V.trellis:
                page = known(entry, token < length, K)
            else:
                page = tl.load(entry, mask=token < length, other=0)
            begin_byte = batch * 0
            tile = (page.to(tl.int64) * heads + head) * PAGE_BYTES + token % PAGE_SIZE // TILE * TILE_BYTES
        k_here = k_pages + begin_byte // K.unit_bytes
        v_here = v_pages + begin_byte // 4
        scales_here = scale_pages + begin_byte // 8

        if REFERENCE >= 0:
            page_byte = begin_byte + 0 * tile
            if PAGE_SIZE % step != 0:
                page_byte = (page.to(tl.int64) * heads + head) * PAGE_BYTES
            from_reference = _reference_scores(
                q_main, q_rest, reference_pages, reference_scales, page_byte, K, PAGE_BYTES, REFERENCE, ROWS, GROUPS,
                STACKED,
            ) * (q_unit * (level_unit(K) * reference_unit))[None, :]  # fmt: skip
        k_scales = tl.load(scales_here + (tile // 8 + (K.scales // 8 + place_in_tile)))
        scores = ()
        for t in tl.static_range(4):
            s = _scores(
                q_main, q_rest, k_here, tile, 4 * place_in_tile + t, k_table, k_magnitudes, K, ROWS, GROUPS, STACKED
            )
            s = s * (_scale(k_scales, t)[:, None] * q_unit[None, :])
            if REFERENCE >= 0:
                s += from_reference
            if SOFTCAP:
                s = capped(s, softcap)
            visible = token[:, None] + t < end[None, :]
            if HAS_BEGIN:
                visible = visible & (token[:, None] + t >= begin[None, :])
            if HAS_MASK:
                asked = mask + batch * mask_row + query[None, :] * mask_query + (token + t)[:, None] * mask_token
                visible = visible & (tl.load(asked, mask=visible & present[None, :], other=0) != 0)
            scores += (tl.where(visible, s, float("-inf")),)

        highest = tl.maximum(tl.maximum(scores[0], scores[1]), tl.maximum(scores[2], scores[3]))
        new_top = tl.maximum(top, tl.max(highest, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - safe)
        top = new_top
        total = total * fade[None, :]

        v_scales = tl.load(scales_here + (tile // 8 + (V.scales // 8 + place_in_tile)))
        weights = ()
        for t in tl.static_range(4):
            p = tl.exp2(scores[t] - safe[None, :])
            total += p
            scale = _scale(v_scales, t)
            scale = scale + scale * 0.0  # infinity to NaN, which reaches all of a vector's coordinates
            # an unseen token may have any scale, and a seen one of probability 0 a bad one
            weights += (tl.where(scores[t] == float("-inf"), 0.0, p * scale[:, None]),)

        highest = tl.maximum(
            tl.maximum(tl.abs(weights[0]), tl.abs(weights[1])), tl.maximum(tl.abs(weights[2]), tl.abs(weights[3]))
        )
        faded = limit * fade
        limit = tl.maximum(tl.maximum(faded, tl.max(highest, axis=0)), LEAST_LIMIT)
        shrink = _doubled(faded / limit, STACKED)
        even = even * shrink[None, :]
        odd = odd * shrink[None, :]
        to_half = LARGEST / limit

        if V.trellis:
            p = ()
            for t in tl.static_range(4):
                p += (_doubled((weights[t] * to_half[None, :]).to(tl.float16), STACKED),)
            levels = v_levels(v_here, tile, place_in_tile, v_table, v_magnitudes, V)
            even = multiply(levels, tokens_of_groups(p[0], p[1], p[2], p[3]), even)
        else:
            w0, w1, w2 = words_of(v_here, tile, place_in_tile, v_table, V)
            for two in tl.static_range(0, 4, 2):
                p0 = _doubled((weights[two] * to_half[None, :]).to(tl.float16), STACKED)
                p1 = _doubled((weights[two + 1] * to_half[None, :]).to(tl.float16), STACKED)
                if V.bits <= 4:
                    low0, high0, low1, high1 = levels_of_two_bytes(w0, v_table, V, two)
                    even = multiply(low1, p1, multiply(low0, p0, even))
                    odd = multiply(high1, p1, multiply(high0, p0, odd))
                else:
                    for t in tl.static_range(2):
                        p = p0 if t == 0 else p1
                        main, rest = two_halves(v_table, wide_code(w0, w1, w2, V, two + t, 0))
                        even = multiply(main, p, multiply(rest, p, even))
                        if V.bits < 8:
                            main, rest = two_halves(v_table, wide_code(w0, w1, w2, V, two + t, 1))
                            odd = multiply(main, p, multiply(rest, p, odd))

    v_unit = _doubled(limit * (1.0 / LARGEST / level_unit(V)), STACKED)
    even = even * v_unit[None, :]
    odd = odd * v_unit[None, :]
    coordinate = tl.arange(0, V.rows) * V.row_levels
    if V.trellis:
        coordinate = coordinate_of_row(V)
    slot = place * splits + part
    column_slot = column_place * splits + part
    # of two columns of a row, both have the sums
    written = _doubled((present & (tl.zeros_like(row) + my_first < my_end)).to(tl.int32), STACKED) != 0
    if STACKED:
        written = written & (tl.arange(0, columns) % 2 == 0)
    address = partial + column_slot[None, :] * (V.rows * V.row_levels) + coordinate[:, None]
    tl.store(address, even, mask=written[None, :])
    if V.row_levels == 2:
        tl.store(address + 1, odd, mask=written[None, :])
    tl.store(state + slot * 2, top, mask=present)
    tl.store(state + slot * 2 + 1, tl.sum(total, axis=0), mask=present)


@triton.jit
def _scores(
    q_main, q_rest, pages, tile, token, look_up, magnitudes, K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    STACKED: tl.constexpr,
):  # fmt: skip
    """Scores ``[TOKENS, ROWS]`` of the queries with the unscaled keys."""
    s = tl.zeros((TOKENS, ROWS * (2 if STACKED else 1)), tl.float32)
    per_byte: tl.constexpr = 1 if K.bits == 8 else 2
    unit_bytes: tl.constexpr = K.unit_bytes
    if K.trellis:
        level = k_levels(pages, tile, token, look_up, magnitudes, K)
        if not STACKED:
            s = multiply(level, q_rest[0], s)
        s = multiply(level, q_main[0], s)
    elif K.bits <= 4:
        w0, w1, w2 = words_of(pages, tile, token, look_up, K)
        for first in tl.static_range(0, unit_bytes, 2):
            low0, high0, low1, high1 = levels_of_two_bytes(w0, look_up, K, first)
            if not STACKED:
                s = multiply(high0, q_rest[2 * first + 1], multiply(low0, q_rest[2 * first], s))
            s = multiply(high0, q_main[2 * first + 1], multiply(low0, q_main[2 * first], s))
            if unit_bytes > 1:
                if not STACKED:
                    s = multiply(high1, q_rest[2 * first + 3], multiply(low1, q_rest[2 * first + 2], s))
                s = multiply(high1, q_main[2 * first + 3], multiply(low1, q_main[2 * first + 2], s))
    else:
        w0, w1, w2 = words_of(pages, tile, token, look_up, K)
        for byte in tl.static_range(unit_bytes):
            for half in tl.static_range(per_byte):
                main, rest = two_halves(look_up, wide_code(w0, w1, w2, K, byte, half))
                if not STACKED:
                    s = multiply(main, q_rest[per_byte * byte + half], s)
                s = multiply(rest, q_main[per_byte * byte + half], s)
                s = multiply(main, q_main[per_byte * byte + half], s)
    if STACKED:  # the second column is what the rounding of the first one's query lacks
        s = tl.sum(tl.reshape(s, (TOKENS, ROWS, 2)), axis=2)
    return s


@triton.jit
def _reference_scores(
    q_main, q_rest, pages, scales, page_byte, K: tl.constexpr, PAGE_BYTES: tl.constexpr, REFERENCE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STACKED: tl.constexpr,
):  # fmt: skip
    """Scores ``[TOKENS, ROWS]`` of the queries with the key references of the pages that begin at ``page_byte``."""
    place = place_of_unit(K)
    s = tl.zeros((TOKENS, ROWS * (2 if STACKED else 1)), tl.float32)
    fields: tl.constexpr = K.fields
    for field in tl.static_range(fields):
        coordinate = place * fields + field
        if K.trellis:
            coordinate = coordinate_of_column(K)
        address = pages + (page_byte[:, None] + (REFERENCE + coordinate)[None, :])
        code = tl.load(address, mask=(coordinate < K.head_size)[None, :], other=0).to(tl.float16)
        if not STACKED:
            s = multiply(code, q_rest[field], s)
        s = multiply(code, q_main[field], s)
    if STACKED:
        s = tl.sum(tl.reshape(s, (TOKENS, ROWS, 2)), axis=2)
    return s * tl.load(scales + (page_byte + (PAGE_BYTES - 2)) // 2).to(tl.float32)[:, None]


@triton.jit
def _doubled(x, STACKED: tl.constexpr):
    """Each row's value in its two columns, side by side."""
    if not STACKED:
        return x
    elif len(x.shape) == 1:
        return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], 2)), (2 * x.shape[0],))
    else:
        return tl.reshape(tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], 2)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def _scale(four, t: tl.constexpr):
    """One of four tokens' bfloat16 scales in an int64, as float32."""
    two = (four >> (t // 2 * 32)).to(tl.int32)
    bits = two & -65536 if t % 2 else two << 16
    return bits.to(tl.float32, bitcast=True)


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
