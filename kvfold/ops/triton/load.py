# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Loading: packed tokens back to vectors in the model's basis."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.ops.triton import sides
from kvfold.ops.triton.rotate import rotate_more
from kvfold.ops.triton.unpack import codes_of, reference_of


def load_kv(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.load_kv`."""
    batch, heads = block_table.shape[0], pages.shape[1]
    loaded = []
    for is_value in (False, True):
        side = sides.packed(layout, is_value)
        out = torch.empty(batch, tokens, heads, side.head_size, dtype=torch.float32, device=pages.device)
        terms, factor = sides.rotation_terms(side.head_size, pages.device, inverse=True)
        if out.numel():
            _load[(triton.cdiv(tokens, TILE), batch * heads)](
                pages, pages.view(torch.int16), pages.view(torch.int8), pages.view(torch.bfloat16),
                sides.full_levels(side, pages.device),
                terms, factor,
                block_table, *block_table.stride(), out, heads, tokens,
                S=side, PAGE_SIZE=layout.page_size, PAGE_BYTES=layout.page_bytes, TILE_BYTES=layout.tile_bytes,
                TILE=TILE, REFERENCE=layout.reference if layout.format.mean and not is_value else -1,
                TERMS=terms.shape[0], num_warps=4,
            )  # fmt: skip
        loaded.append(out)
    return loaded[0], loaded[1]


@triton.jit(do_not_specialize=["table_row", "heads", "tokens"])
def _load(
    pages, scale_pages, reference_pages, reference_scales, levels, terms, factor,
    table, table_row, table_page, out, heads, tokens,
    S: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGE_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr, TILE: tl.constexpr,
    REFERENCE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """One tile of one KV head."""
    first = tl.program_id(0) * TILE
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    page = tl.load(table + batch * table_row + first // PAGE_SIZE * table_page).to(tl.int64)
    page_byte = (page * heads + head) * PAGE_BYTES
    tile = page_byte + first % PAGE_SIZE // TILE * TILE_BYTES
    token, column = tl.arange(0, TILE), tl.arange(0, S.padded)
    scale = tl.load(scale_pages + tile // 2 + (S.scales // 2 + token)).to(tl.bfloat16, bitcast=True).to(tl.float32)
    padded: tl.constexpr = S.padded
    x = tl.zeros((TILE, padded), tl.float32)
    for begin in tl.range(0, S.padded, 32):
        coordinate = begin + tl.arange(0, 32)
        code = codes_of(pages, tile, token[:, None], coordinate[None, :], S)
        values = tl.load(levels + code)
        if REFERENCE >= 0:
            reference = reference_of(
                reference_pages,
                reference_scales,
                page_byte,
                coordinate,
                coordinate < S.head_size,
                PAGE_BYTES,
                REFERENCE,
            )
            values = values * scale[:, None] + reference[None, :]
        x = rotate_more(values, terms, begin, x, TERMS, S.padded, S.padded)
    if REFERENCE < 0:
        x = x * scale[:, None]
    x = x * factor
    place = (batch * tokens + first + token) * heads + head
    inside = (first + token < tokens)[:, None] & (column < S.head_size)[None, :]
    tl.store(out + place[:, None] * S.head_size + column[None, :], x, mask=inside)
