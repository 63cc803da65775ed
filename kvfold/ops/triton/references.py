# mypy: disable-error-code="no-untyped-def, import-untyped"
"""The key references of pages that are opened: :func:`kvfold.ops.references.open_pages` without the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.ops.triton import sides
from kvfold.ops.triton.unpack import codes_of, reference_of, to_bfloat16


def open_pages(
    k: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, previous: torch.Tensor, layout: PageLayout
) -> None:
    """See :func:`kvfold.ops.references.open_pages`. Programs of tokens that open no page end at once."""
    side = sides.packed(layout, False)
    tokens, heads, _ = k.shape
    _open[(tokens, heads)](
        k, *k.stride(), pages, pages.view(torch.int8), pages.view(torch.bfloat16), slots, slots.stride(0),
        previous, previous.stride(0), sides.full_levels(side, k.device), sides.inverse_matrix(side.head_size, k.device),
        tokens,
        K=side, SINKS=layout.format.sinks, PAGE_SIZE=layout.page_size, PAGE_BYTES=layout.page_bytes,
        TILE_BYTES=layout.tile_bytes, TILE=TILE, REFERENCE=layout.reference, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _open(
    k, k_token, k_head, k_coordinate, pages, code_pages, scale_pages, slots, slot_stride, previous, previous_stride,
    levels, matrix, tokens,
    K: tl.constexpr, SINKS: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGE_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr,
    TILE: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    """A token and a KV head: if the token opens its page, the page's reference is chosen and written."""
    token, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + token * slot_stride)
    if (slot >= 0) & (slot % PAGE_SIZE == 0):
        before = tl.load(previous + token * previous_stride)
        each, column = tl.arange(0, PAGE_SIZE), tl.arange(0, K.padded)
        # tokens of this call in the page, and the last ones of the page before
        here = tl.load(slots + (token + each) * slot_stride, mask=token + each < tokens, other=-1)
        own = tl.min(tl.where(here == slot + each, PAGE_SIZE, each), axis=0)
        there = tl.load(slots + (token - 1 - each) * slot_stride, mask=token - 1 - each >= 0, other=-1)
        follows = (before >= 0) & (there == before * PAGE_SIZE + (PAGE_SIZE - 1) - each)
        fresh = tl.min(tl.where(follows, PAGE_SIZE, each), axis=0)

        begins = before < 0
        take_own = (own >= PAGE_SIZE // 4) | begins
        if take_own | (fresh >= PAGE_SIZE // 2):
            first = tl.where(take_own, token, token - fresh)
            count = tl.where(take_own, own, fresh)
            address = k + (first + each)[:, None] * k_token + head * k_head + (column * k_coordinate)[None, :]
            inside = (each < count)[:, None] & (column < K.head_size)[None, :]
            keys = tl.load(address, mask=inside, other=0.0).to(tl.float32)
            counted = each < count
            if SINKS:  # which are read exactly, from elsewhere
                counted = counted & ((each >= SINKS) | (not begins) | (own <= SINKS))
            mean = _mean(keys, counted, K)
            if begins and not SINKS:
                mean = _first(keys, each, counted, mean, K)
            _write_rotated(mean, matrix, code_pages, scale_pages, (slot // PAGE_SIZE * heads + head) * PAGE_BYTES,
                           K, PAGE_BYTES, REFERENCE)  # fmt: skip
        else:
            page_byte = (before * heads + head) * PAGE_BYTES
            tile = page_byte + each // TILE * TILE_BYTES
            code = codes_of(pages, tile[:, None], (each % TILE)[:, None], column[None, :], K)
            scale = tl.load(scale_pages + tile // 2 + (K.scales // 2 + each % TILE)).to(tl.float32)
            held = (column < K.head_size)[None, :]
            reference = reference_of(
                code_pages, scale_pages, page_byte, column[None, :], held, PAGE_BYTES, REFERENCE
            )  # fmt: skip
            keys = tl.where(held, tl.load(levels + code) * scale[:, None] + reference, 0.0)
            mean = _mean(keys, each < PAGE_SIZE - fresh, K)
            _write(mean, tl.max(tl.abs(mean), axis=0), column, code_pages, scale_pages,
                   (slot // PAGE_SIZE * heads + head) * PAGE_BYTES, K, PAGE_BYTES, REFERENCE)  # fmt: skip


@triton.jit
def _first(keys, each, counted, mean, K: tl.constexpr):
    """Of a sequence's first keys ``[n, padded]`` the first where it stands apart and is near, else their mean."""
    finite = counted & (tl.sum(keys * 0.0, axis=1) == 0.0)
    sized = tl.where(finite[:, None], keys, 0.0)
    sized /= tl.maximum(tl.max(tl.max(tl.abs(sized), axis=1), axis=0), 1e-30)
    is_first, is_other = finite & (each == 0), finite & (each > 0)
    count = tl.sum(is_other.to(tl.int32), axis=0).to(tl.float32)
    centre = tl.sum(tl.where(is_other[:, None], sized, 0.0), axis=0) / tl.maximum(count, 1.0)
    away = sized - centre[None, :]
    distances, squares = tl.sum(away * away, axis=1), tl.sum(sized * sized, axis=1)
    distance = tl.sum(tl.where(is_first, distances, 0.0), axis=0) * count
    spread = tl.sum(tl.where(is_other, distances, 0.0), axis=0)
    near = distance + spread <= 2.0 * tl.sum(tl.where(is_other, squares, 0.0), axis=0)
    good = (tl.sum(is_first.to(tl.int32), axis=0) > 0) & (distance >= 1.5 * spread) & near
    return tl.where(good, tl.sum(tl.where((each == 0)[:, None], keys, 0.0), axis=0), mean)


@triton.jit
def _mean(keys, counted, K: tl.constexpr):
    """Of keys ``[n, padded]``, those that are counted and finite; zero where that is nearer to most of them."""
    finite = counted & (tl.sum(keys * 0.0, axis=1) == 0.0)
    keys = tl.where(finite[:, None], keys, 0.0)
    count = tl.maximum(tl.sum(finite.to(tl.int32), axis=0), 1)
    mean = tl.sum(keys / count.to(tl.float32), axis=0)
    largest = tl.maximum(tl.max(tl.max(tl.abs(keys), axis=1), axis=0), 1e-30)
    scaled, centre = keys / largest, mean / largest
    away = scaled - centre[None, :]
    nearer = tl.sum(away * away, axis=1) < tl.sum(scaled * scaled, axis=1)
    good = (2 * tl.sum((nearer & finite).to(tl.int32), axis=0) >= count) & (tl.sum(mean * 0.0, axis=0) == 0.0)
    return tl.where(good, mean, 0.0)


@triton.jit
def _write_rotated(
    mean, matrix, codes, scales, page_byte, K: tl.constexpr, PAGE_BYTES: tl.constexpr, REFERENCE: tl.constexpr
):  # fmt: skip
    """Rotate a vector, 32 coordinates at a time, and write it."""
    column, padded = tl.arange(0, K.padded), K.padded
    largest = tl.sum(mean * 0.0, axis=0)
    for first in range(0, padded, 32):
        largest = tl.maximum(largest, tl.max(tl.abs(_rotated(mean, matrix, first, column, K)), axis=0))
    for first in range(0, padded, 32):
        part = _rotated(mean, matrix, first, column, K)
        _write(part, largest, first + tl.arange(0, 32), codes, scales, page_byte, K, PAGE_BYTES, REFERENCE)


@triton.jit
def _rotated(mean, matrix, first, column, K: tl.constexpr):
    rows = first + tl.arange(0, 32)
    return tl.sum(tl.load(matrix + rows[:, None] * K.padded + column[None, :]) * mean[None, :], axis=1)


@triton.jit
def _write(
    part, largest, coordinate, codes, scales, page_byte, K: tl.constexpr, PAGE_BYTES: tl.constexpr,
    REFERENCE: tl.constexpr,
):  # fmt: skip
    """Some coordinates of a reference whose largest one is ``largest``; see PageLayout.encode_reference."""
    scale = to_bfloat16(largest / 127.0)
    wide = scale.to(tl.float32)
    inverse = tl.where(wide > 0, 1.0 / tl.where(wide > 0, wide, 1.0), 0.0)
    inverse = tl.where(inverse < float("inf"), inverse, 0.0)
    even = (part * inverse + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
    code = tl.minimum(tl.maximum(even, -127.0), 127.0).to(tl.int8)
    tl.store(codes + page_byte + (REFERENCE + coordinate), code, mask=coordinate < K.head_size)
    tl.store(scales + (page_byte + (PAGE_BYTES - 2)) // 2, scale)
