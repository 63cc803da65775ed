# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Storing: rotate, search the prescales, quantise, pack and write, in one launch for K and V."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvfold.formats import TILE, Side
from kvfold.layout import PageLayout
from kvfold.ops.triton import sides
from kvfold.ops.triton.references import open_pages
from kvfold.ops.triton.rotate import rotate_more
from kvfold.ops.triton.scaling import judged
from kvfold.ops.triton.trellis import encode
from kvfold.ops.triton.unpack import bits_before, reference_of, to_bfloat16

_FEW = 1024
"""Up to so many vectors the blocks are small, so that all SMs have some."""


def store_kv(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout,
    previous: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`kvfold.ops.store_kv`."""
    tokens, heads = k.shape[:2]
    if not tokens * heads:
        return
    if previous is not None:
        open_pages(k, pages, slots, previous, layout)
    k_side, v_side = sides.packed(layout, False), sides.packed(layout, True)
    k_arguments, k_terms = _side_arguments(k, layout.format.k, k_side)
    v_arguments, v_terms = _side_arguments(v, layout.format.v, v_side)
    k_encoded = encode(k, layout, False, pages, slots) if k_side.trellis else (pages, pages)
    v_encoded = encode(v, layout, True, pages, slots) if v_side.trellis else (pages, pages)
    # a block's vectors lie in the registers of its warps
    rows = 32 if tokens * heads > _FEW and max(layout.head_size, layout.head_size_v) <= 128 else 16
    _store[(triton.cdiv(tokens * heads, rows), 2)](
        *k_arguments, *k_encoded, *v_arguments, *v_encoded,
        pages, pages.view(torch.int8), pages.view(torch.bfloat16), slots, slots.stride(0), tokens * heads, heads,
        K=k_side, V=v_side, K_RULE=sides.RULES[layout.format.k.scale], V_RULE=sides.RULES[layout.format.v.scale],
        K_PRESCALES=layout.format.k.prescales, V_PRESCALES=layout.format.v.prescales,
        PAGE_SIZE=layout.page_size, PAGE_BYTES=layout.page_bytes, TILE_BYTES=layout.tile_bytes, TILE=TILE, ROWS=rows,
        REFERENCE=layout.reference if layout.format.mean else -1,
        K_TERMS=k_terms.shape[0], V_TERMS=v_terms.shape[0],
        num_warps=8 if rows == 32 or max(k_side.padded, v_side.padded) > 128 else 4,
    )  # fmt: skip


def _side_arguments(x: torch.Tensor, side: Side, packed: sides.Packed) -> tuple[list[object], torch.Tensor]:
    """The kernel's arguments of one side, and among them the terms of the rotation."""
    head_size, device = x.shape[-1], x.device
    terms, factor = sides.rotation_terms(head_size, device)
    tables = (sides.thresholds(packed, device), sides.full_levels(packed, device))
    return [x, *x.stride(), terms, factor, *tables, sides.prescales(side.prescales, device)], terms


@triton.jit(do_not_specialize=["rows", "heads"])
def _store(
    k, k_token, k_head, k_coordinate, k_terms, k_factor, k_thresholds, k_levels, k_prescales, k_codes, k_scales,
    v, v_token, v_head, v_coordinate, v_terms, v_factor, v_thresholds, v_levels, v_prescales, v_codes, v_scales,
    pages, reference_pages, reference_scales, slots, slot_stride, rows, heads,
    K: tl.constexpr, V: tl.constexpr, K_RULE: tl.constexpr, V_RULE: tl.constexpr,
    K_PRESCALES: tl.constexpr, V_PRESCALES: tl.constexpr, K_TERMS: tl.constexpr, V_TERMS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    REFERENCE: tl.constexpr,
):  # fmt: skip
    """A block of vectors of one side. A row is a vector: token times heads plus head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // heads).to(tl.int64), row % heads
    slot = tl.load(slots + token * slot_stride, mask=row < rows, other=-1)
    kept = slot >= 0
    slot = tl.where(kept, slot, 0)
    offset = (slot % PAGE_SIZE).to(tl.int32)
    tile = (slot // PAGE_SIZE * heads + head) * PAGE_BYTES + offset // TILE * TILE_BYTES
    if tl.program_id(1) == 0:  # names of their own in each branch: K's tensors may have another shape than V's
        if K.trellis:
            _store_encoded(k_codes, k_scales, row, rows, pages, tile, offset % TILE, kept, K)
        else:
            key = _rotated(k + token * k_token + head * k_head, k_coordinate, k_terms, k_factor, kept, K_TERMS, K)
            if REFERENCE >= 0:
                page_byte = (slot // PAGE_SIZE * heads + head) * PAGE_BYTES
                coordinate = tl.arange(0, K.padded)[None, :]
                inside = kept[:, None] & (coordinate < K.head_size)
                key -= reference_of(
                    reference_pages, reference_scales, page_byte[:, None], coordinate, inside, PAGE_BYTES, REFERENCE
                )
            k_code, k_scale = _quantise(key, k_thresholds, k_levels, k_prescales, K_RULE, K_PRESCALES, K)
            _write(pages, tile, offset % TILE, kept, k_code, k_scale, K)
    else:
        if V.trellis:
            _store_encoded(v_codes, v_scales, row, rows, pages, tile, offset % TILE, kept, V)
        else:
            value = _rotated(v + token * v_token + head * v_head, v_coordinate, v_terms, v_factor, kept, V_TERMS, V)
            v_code, v_scale = _quantise(value, v_thresholds, v_levels, v_prescales, V_RULE, V_PRESCALES, V)
            _write(pages, tile, offset % TILE, kept, v_code, v_scale, V)


@triton.jit
def _store_encoded(codes, scales, row, rows, pages, tile, token, kept, S: tl.constexpr):
    """Write vectors that a search has encoded: codes ``[d, rows]``."""
    coordinate = tl.arange(0, S.padded)[None, :]
    address = codes + coordinate.to(tl.int64) * rows + row[:, None]
    code = tl.load(address, mask=kept[:, None] & (coordinate < S.head_size), other=0).to(tl.int32)
    _write(pages, tile, token, kept, code, tl.load(scales + row, mask=kept, other=0.0), S)


@triton.jit
def _rotated(x, stride, terms, factor, kept, TERMS: tl.constexpr, S: tl.constexpr):
    """Load vectors and rotate them: float32 ``[rows, padded]``."""
    rows: tl.constexpr = kept.shape[0]
    padded: tl.constexpr = S.padded
    acc = tl.zeros((rows, padded), tl.float32)
    for first in tl.range(0, S.padded, 32):
        coordinate = first + tl.arange(0, 32)
        inside = kept[:, None] & (coordinate < S.head_size)[None, :]
        part = tl.load(x[:, None] + coordinate[None, :] * stride, mask=inside, other=0.0)
        acc = rotate_more(part, terms, first, acc, TERMS, S.padded, S.padded)
    return acc * factor


@triton.jit
def _quantise(y, thresholds, levels, prescales, RULE: tl.constexpr, PRESCALES: tl.constexpr, S: tl.constexpr):
    """Rotated vectors to codes and scales: ``kvfold.codecs.lloyd.encode``, step by step.

    A coordinate that is not finite leaves no finite one in the rotated vector, so that the largest tells all.
    """
    largest = tl.max(tl.abs(y), axis=1)
    finite = (tl.sum((y * 0.0), axis=1) == 0.0) & (largest < float("inf"))
    divisor = tl.where(finite & (largest > 0), largest, 1.0)
    y = tl.where(finite[:, None], y / divisor[:, None], 0.0)
    rms = tl.sqrt(tl.sum(y * y, axis=1)) / (S.head_size**0.5)
    inside = (tl.arange(0, S.padded) < S.head_size)[None, :]

    best_sine = largest * 0.0
    best_scale = largest * 0.0
    best_code = y.to(tl.int32) * 0
    further: tl.constexpr = S.bits - 1
    for candidate in range(PRESCALES):
        scale = to_bfloat16(rms * tl.load(prescales + candidate) * divisor).to(tl.float32)
        usable = scale > 0
        z = y * tl.where(usable, divisor / tl.where(usable, scale, 1.0), 0.0)[:, None]
        index = tl.zeros_like(best_code)
        size = tl.abs(z)
        for bit in tl.static_range(further):  # how many thresholds lie below, by bisection
            index = _further(index, size, thresholds, 1 << (S.bits - 2 - bit))
        code = index + tl.where(z < 0, 1 << (S.bits - 1), 0)
        code = tl.where(inside, code, 0)
        error = tl.where(inside, z - tl.load(levels + code), 0.0)
        zz, ze, ee = tl.sum(z * z, axis=1), tl.sum(z * error, axis=1), tl.sum(error * error, axis=1)
        sine, stored = judged(scale, zz, ze, ee, RULE)
        better = (sine < best_sine) | (candidate == 0)
        best_sine = tl.where(better, sine, best_sine)
        best_scale = tl.where(better, stored, best_scale)
        best_code = tl.where(better[:, None], code, best_code)
    best_scale = tl.where(finite, tl.where(rms > 0, best_scale, 0.0), float("nan"))
    return best_code, best_scale


@triton.jit
def _further(index, size, thresholds, step: tl.constexpr):
    """A step of the bisection: ``step`` further where the threshold that many on lies below."""
    return index + tl.where(size > tl.load(thresholds + index + (step - 1)), step, 0)


@triton.jit
def _write(pages, tile, token, kept, code, scale, S: tl.constexpr):
    """Pack codes ``[rows, padded]`` and write each vector's bytes and scale into its tile."""
    for plane in tl.static_range(len(S.widths)):
        _write_plane(pages, tile, token, kept, code, S, plane)
    bits = to_bfloat16(scale).to(tl.int16, bitcast=True).to(tl.int32)
    address = pages + tile + (S.scales + 2 * token)
    tl.store(address, (bits & 255).to(tl.uint8), mask=kept)
    tl.store(address + 1, ((bits >> 8) & 255).to(tl.uint8), mask=kept)


@triton.jit
def _write_plane(pages, tile, token, kept, code, S: tl.constexpr, plane: tl.constexpr):
    width: tl.constexpr = S.widths[plane]
    bits = (code >> bits_before(S.widths, plane)) & ((1 << width) - 1)
    if width == 8:
        packed = bits
    else:
        deep: tl.constexpr = 4 // width  # rows of eight coordinates side by side in a nibble
        rows: tl.constexpr = code.shape[0]
        words: tl.constexpr = S.padded // (8 * deep)
        bits = tl.reshape(bits, (rows, words, deep, 4, 2))
        bits = tl.sum(bits << (tl.arange(0, 2) * 4)[None, None, None, None, :], axis=4)
        bits = tl.sum(bits << (tl.arange(0, deep) * width)[None, None, :, None], axis=2)
        packed = tl.reshape(bits, (rows, words * 4))
    byte = tl.arange(0, S.padded * width // 8)[None, :]
    if S.is_value:
        place = (byte // 4 * 64 + byte % 4 * 4) + (token // 4 * 16 + token % 4)[:, None]
    else:
        place = byte + (token * S.row_bytes[plane])[:, None]
    address = pages + tile[:, None] + (S.planes[plane] + place)
    tl.store(address, packed.to(tl.uint8), mask=kept[:, None] & (byte < S.row_bytes[plane]))
