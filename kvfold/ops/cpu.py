"""The operations on a CPU, compiled by numba: the same bytes and the same attention as the reference, fast.

Storing and decoding work on the packed bytes, tile by tile: a tile's codes are unpacked into a scratch of 16 vectors
that stays in the first-level cache, looked up in a table of levels, multiplied, and forgotten. Sequences are cut into
splits of a fixed number of tokens, so that the cores are busy with one sequence and the result of a sequence does not
depend on what else is in the batch.

Sides that are kept exact have no codes: those formats run on the reference.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kvfold.codecs import lloyd, trellis
from kvfold.codecs.fp8 import decode as decode_fp8
from kvfold.codecs.scaling import prescale_candidates
from kvfold.formats import TILE, Side
from kvfold.layout import PageLayout
from kvfold.ops import cpu_kernels as kernels
from kvfold.ops import cpu_threads, reference, references
from kvfold.ops.options import AttentionOptions
from kvfold.rotation import rotate, unrotate

WRITES_OUT = SCHEDULES = False

MAX_QUERIES = 16
"""More query tokens than this go through windows and matrix products instead."""

_RULES = {"plain": 0, "unbiased": 1, "nc": 2, "mse": 3}


def available(device: torch.device) -> str | None:
    """Why these kernels cannot be used on a device, or None if they can."""
    return None if device.type == "cpu" else f"it runs on the CPU, and the tensors are on {device}"


def supports(layout: PageLayout) -> str | None:
    """Why these kernels cannot serve a layout: never, what is kept exact is handed on to the reference."""
    return None


def _compiled(layout: PageLayout) -> bool:
    return not (layout.format.k.lossless or layout.format.v.lossless)


def _side_tensors(layout: PageLayout, is_value: bool, stored: bool) -> list[int | torch.Tensor]:
    """One side as the kernels take it, to store or to read it; see kvfold.ops.cpu_kernels.Side."""
    side, head_size, offsets, scales = (
        (layout.format.v, layout.head_size_v, layout.v_planes, layout.v_scales)
        if is_value
        else (layout.format.k, layout.head_size, layout.k_planes, layout.k_scales)
    )
    widths, row_bytes, low, path = side.planes(), side.plane_bytes(head_size), 1 if side.bits > 4 else 4, -1
    if side.family == "trellis" and not stored:
        path, path_bytes = offsets[-1], row_bytes[-1]
        spread = (layout.tile_bytes, layout.tile_bytes + TILE * path_bytes)
        widths, offsets = (1, 1, *widths[:-1]), (*spread, *offsets[:-1])
        row_bytes, low = (path_bytes, path_bytes, *row_bytes[:-1]), 3
    levels = _levels(side, head_size, stored)
    pairs = torch.empty(0)
    if len(levels) <= 16:
        codes = torch.arange(256)
        padded = levels.repeat(16)[:16]
        pairs = torch.stack([padded[codes & 15], padded[codes >> 4]], dim=1).view(torch.float64).flatten()
    return [
        torch.tensor(widths),
        torch.tensor(offsets),
        torch.tensor(row_bytes),
        scales if side.scaled else -1,
        int(is_value),
        min(low, len(widths)),
        levels,
        pairs,
        path,
        0 if path < 0 else row_bytes[0] // 4,
        layout.tile_bytes // 4,
    ]


@lru_cache(maxsize=512)
def _kept_side(layout: PageLayout, is_value: bool, stored: bool) -> tuple[list[int], list[int | torch.Tensor]]:
    """A side as integers, and the tensors whose addresses are among them, which must live as long."""
    tensors = _side_tensors(layout, is_value, stored)
    return cpu_threads.describe(tensors), tensors


def _side(layout: PageLayout, is_value: bool, stored: bool = False) -> list[int]:
    return _kept_side(layout, is_value, stored)[0]


def _levels(side: Side, head_size: int, stored: bool) -> torch.Tensor:
    if side.family == "trellis":
        bits, device = int(side.bits), torch.device("cpu")
        return trellis.tables(bits, device)[0] if stored else trellis.stored_levels(bits, device)
    if side.rotated:
        return lloyd.tables(int(side.bits), head_size, torch.device("cpu"))[0]
    return decode_fp8(torch.arange(256, dtype=torch.uint8), None, side)


@lru_cache(maxsize=16)
def _prescales(count: int) -> torch.Tensor:
    return torch.tensor(prescale_candidates(count))


@lru_cache(maxsize=64)
def _trellis_order(head_size: int) -> torch.Tensor:
    return torch.tensor(trellis.positions(head_size))


_NO_ORDER = torch.empty(0, dtype=torch.int64)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout,
    previous: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`kvfold.ops.store_kv`."""
    tokens, heads = k.shape[:2]
    if not (layout.format.k.rotated and layout.format.v.rotated):
        return reference.store_kv(k, v, pages, slots, layout, previous)
    slots = slots.contiguous()
    if previous is not None:
        references.open_pages(k, pages, slots, previous, layout)
    for x, side, is_value in ((k, layout.format.k, False), (v, layout.format.v, True)):
        rotated = rotate(x).contiguous()
        if layout.format.mean and not is_value:
            rotated -= references.of_slots(pages, slots, layout)
        if side.family == "trellis":
            thresholds, order = trellis.tables(int(side.bits), x.device)[1], _trellis_order(x.shape[-1])
        else:
            thresholds, order = lloyd.tables(int(side.bits), x.shape[-1], x.device)[1], _NO_ORDER
        arguments = [tokens, heads, x.shape[-1], layout.page_size, layout.tile_bytes, layout.page_bytes]
        arguments += [_RULES[side.scale], int(side.bits), 0]
        arguments += cpu_threads.describe([rotated, pages, slots, thresholds, _prescales(side.prescales), order])
        cpu_threads.run(kernels.store_side, arguments + _side(layout, is_value, stored=True), tokens)


def load_range(
    pages: torch.Tensor, block_table_row: torch.Tensor, layout: PageLayout, lo: int, hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens lo to hi of one sequence, in the stored basis; see :func:`kvfold.ops.reference.load_range`."""
    if not _compiled(layout):
        return reference.load_range(pages, block_table_row, layout, lo, hi)
    first_tile, end_tile = lo // TILE, -(-hi // TILE)
    row = block_table_row.to(torch.int32).contiguous()
    heads, tiles = pages.shape[1], end_tile - first_tile
    loaded = []
    for is_value, head_size in ((False, layout.head_size), (True, layout.head_size_v)):
        x = torch.empty(heads, tiles * TILE, head_size)
        arguments = [heads * tiles, heads, head_size, layout.page_size, layout.tile_bytes // 4, layout.page_bytes // 4]
        arguments += [first_tile, 0, 0, *cpu_threads.describe([x]), pages.data_ptr(), pages.numel() // 4]
        arguments += [*cpu_threads.describe([row]), 0, 0, 0, 0, *_side(layout, is_value)]
        cpu_threads.run(kernels.load_tiles, arguments, heads * tiles)
        loaded.append(x[:, lo - first_tile * TILE : hi - first_tile * TILE])
    if layout.format.mean:
        first, last = lo // layout.page_size, -(-hi // layout.page_size)
        of_tokens = references.of_tokens(pages, block_table_row[first:last], layout)
        loaded[0] += of_tokens[:, lo - first * layout.page_size : hi - first * layout.page_size]
    return loaded[0], loaded[1]


def load_kv(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.load_kv`."""
    return reference.load_kv(pages, block_table, layout, tokens, load_range)


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.decode_attention`."""
    batch, num_queries, num_heads, _ = q.shape
    if not _compiled(layout) or num_queries > MAX_QUERIES:
        return reference.decode_attention(q, pages, block_table, seq_lens, layout, options, load_range)
    scale, first, query_start, lag, window, softcap, mask, *_ = options  # the splits are fixed already
    heads, group = pages.shape[1], num_heads // pages.shape[1]
    rotated = rotate(q) if layout.format.k.rotated else q.float()
    queries = (
        (rotated * scale).view(batch, num_queries, heads, group, layout.head_size).permute(0, 2, 1, 3, 4).contiguous()
    )
    lengths = seq_lens.to(torch.int64).contiguous()
    starts = torch.zeros_like(lengths) if first is None else first.to(torch.int64).contiguous()
    positions = lengths - num_queries if query_start is None else query_start.to(torch.int64).contiguous()
    table = block_table.to(torch.int32).contiguous()
    visible = torch.empty(0, dtype=torch.bool) if mask is None else mask.contiguous()
    splits, rows = max(1, -(-int(lengths.max()) // kernels.SPLIT_TOKENS)), num_queries * group
    part_out = torch.empty(batch, heads, splits, rows, layout.head_size_v)
    parts = torch.empty(2, batch, heads, splits, rows)
    out = torch.empty(batch, heads, num_queries, group, layout.head_size_v)
    lse = torch.empty(batch, heads, num_queries, group)
    finished = torch.zeros(batch * heads, dtype=torch.int64)
    cap = torch.tensor([softcap or 0.0], dtype=torch.float64)
    arguments = [batch * heads * splits, heads, splits, rows, layout.head_size, layout.head_size_v, layout.page_size]
    arguments += [layout.tile_bytes // 4, layout.page_bytes // 4, table.shape[1], group, lag, window or 0]
    arguments += [int(mask is not None), 0 if mask is None else mask.shape[-1]]
    arguments += [*cpu_threads.describe([cap, queries]), pages.data_ptr(), pages.numel() // 4]
    arguments += cpu_threads.describe(
        [table, starts, lengths, positions, visible, part_out, parts[0], parts[1], out, lse]
    )
    arguments += [*cpu_threads.describe([finished]), layout.reference // 4 if layout.format.mean else -1]
    arguments += [*_side(layout, False), *_side(layout, True)]
    cpu_threads.run(kernels.decode_splits, arguments, batch * heads * splits)
    result = out.permute(0, 2, 1, 3, 4).flatten(2, 3)
    result = unrotate(result) if layout.format.v.rotated else result
    return result.to(q.dtype), lse.transpose(2, 3).flatten(1, 2)


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
    return reference.prefill_attention(
        q, pages, block_table, context_lens, cu_seqlens, layout, options, k, v, load_range
    )
