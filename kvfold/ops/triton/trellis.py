# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Storing a trellis: Viterbi's algorithm for a block of vectors, one vector a lane; see :mod:`kvfold.codecs.trellis`.

Three launches a side: vectors are rotated into scratch; for every prescale the best path is found forwards and traced
back; the codes of the best prescale are packed. A step needs a coordinate of every vector, so coordinates lie in rows
of scratch, and so do the decisions, four bits a step, and the codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvfold.layout import PageLayout
from kvfold.ops.triton import sides
from kvfold.ops.triton.rotate import rotate_more
from kvfold.ops.triton.scaling import judged
from kvfold.ops.triton.unpack import reference_of, to_bfloat16

_VECTORS = 64  # of a block that searches
_ROTATED = 16  # of a block that rotates


def encode(
    x: torch.Tensor, layout: PageLayout, is_value: bool, pages: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 ``[d, T * H]`` and scales float32 ``[T * H]`` of one side's vectors ``[T, H, d]``."""
    side, given = sides.packed(layout, is_value), layout.format.v if is_value else layout.format.k
    tokens, heads, head_size = x.shape
    count, device = tokens * heads, x.device
    terms, factor = sides.rotation_terms(head_size, device)
    octets = -(-head_size // 32) * 4
    rows = torch.empty(side.padded, count, dtype=torch.float32, device=device)
    _rotate_to_rows[(triton.cdiv(count, _ROTATED),)](
        x, *x.stride(), terms, factor, pages.view(torch.int8), pages.view(torch.bfloat16), slots, slots.stride(0),
        rows, count, heads,
        HEAD_SIZE=head_size, PADDED=side.padded, TERMS=terms.shape[0], PAGE_SIZE=layout.page_size,
        PAGE_BYTES=layout.page_bytes, REFERENCE=layout.reference if layout.format.mean and not is_value else -1,
        ROWS=_ROTATED, num_warps=4,
    )  # fmt: skip
    decisions = torch.empty(octets, count, dtype=torch.int32, device=device)
    trial, codes = torch.empty(2, head_size, count, dtype=torch.uint8, device=device)
    scales = torch.empty(count, dtype=torch.float32, device=device)
    _search[(triton.cdiv(count, _VECTORS),)](
        rows, decisions, trial, codes, scales, sides.thresholds(side, device), sides.ascending_levels(side, device),
        sides.prescales(given.prescales, device), count,
        HEAD_SIZE=head_size, OCTETS=octets, BITS=int(given.bits), RULE=sides.RULES[given.scale],
        PRESCALES=given.prescales, VECTORS=_VECTORS, num_warps=2,
    )  # fmt: skip
    return codes, scales


@triton.jit(do_not_specialize=["count", "heads"])
def _rotate_to_rows(
    x, x_token, x_head, x_coordinate, terms, factor, reference_pages, reference_scales, slots, slot_stride,
    rows, count, heads,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PAGE_BYTES: tl.constexpr, REFERENCE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotated vectors, less the key references of their pages, as columns: ``rows[coordinate, vector]``."""
    vector = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = vector < count
    token, head = (vector // heads).to(tl.int64), vector % heads
    base = x + token * x_token + head * x_head
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    for first in tl.range(0, PADDED, 32):
        coordinate = first + tl.arange(0, 32)
        inside = present[:, None] & (coordinate < HEAD_SIZE)[None, :]
        part = tl.load(base[:, None] + coordinate[None, :] * x_coordinate, mask=inside, other=0.0)
        acc = rotate_more(part, terms, first, acc, TERMS, PADDED, PADDED)
    acc = acc * factor
    column = tl.arange(0, PADDED)
    if REFERENCE >= 0:
        slot = tl.maximum(tl.load(slots + token * slot_stride, mask=present, other=0), 0)
        page_byte = (slot // PAGE_SIZE * heads + head) * PAGE_BYTES
        inside = (column < HEAD_SIZE)[None, :]
        acc -= reference_of(
            reference_pages, reference_scales, page_byte[:, None], column[None, :], inside, PAGE_BYTES, REFERENCE
        )
    tl.store(rows + column[None, :].to(tl.int64) * count + vector[:, None], acc, mask=present[:, None])


@triton.jit
def _refine(z, thresholds, subset, BITS: tl.constexpr):
    """The refine bits of the nearest level in a subset, by bisection."""
    r = subset * 0
    for bit in tl.static_range(BITS - 1):
        r = _further(r, z, thresholds + subset * (1 << (BITS - 1)), 1 << (BITS - 2 - bit))
    return r


@triton.jit
def _further(r, z, thresholds, step: tl.constexpr):
    """A step of the bisection: ``step`` further where the threshold that many on lies below."""
    return r + tl.where(z > tl.load(thresholds + r + (step - 1)), step, 0)


@triton.jit
def _stored_refine(r, BITS: tl.constexpr):
    """See :func:`kvfold.codecs.trellis.stored_refine`."""
    positive: tl.constexpr = 1 << (BITS - 2)
    return tl.where(r < positive, positive - 1 - r, r)


@triton.jit
def _error(z, thresholds, levels, subset: tl.constexpr, BITS: tl.constexpr):
    """The squared distance from the nearest level in a subset."""
    at = z.to(tl.int32) * 0 + subset
    e = z - tl.load(levels + 4 * _refine(z, thresholds, at, BITS) + subset)
    return e * e


@triton.jit(do_not_specialize=["count"])
def _search(
    rows, decisions, trial, codes, scales, thresholds, levels, prescales, count,
    HEAD_SIZE: tl.constexpr, OCTETS: tl.constexpr, BITS: tl.constexpr, RULE: tl.constexpr, PRESCALES: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """A block of vectors: kvfold.codecs.scaling.encode with kvfold.codecs.trellis, step by step."""
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    present = vector < count
    wide = vector.to(tl.int64)
    largest = tl.zeros((VECTORS,), tl.float32)
    spoilt = tl.zeros((VECTORS,), tl.float32)
    for e in range(HEAD_SIZE):
        y = tl.load(rows + e * count.to(tl.int64) + wide, mask=present, other=0.0)
        largest = tl.maximum(largest, tl.abs(y))
        spoilt += y * 0.0
    finite = (spoilt == 0.0) & (largest < float("inf"))
    divisor = tl.where(finite & (largest > 0), largest, 1.0)
    squares = tl.zeros((VECTORS,), tl.float32)
    for e in range(HEAD_SIZE):
        y = tl.load(rows + e * count.to(tl.int64) + wide, mask=present, other=0.0)
        y = tl.where(finite, y / divisor, 0.0)
        squares += y * y
    rms = tl.sqrt(squares) / (HEAD_SIZE**0.5)

    best_sine = tl.zeros((VECTORS,), tl.float32)
    best_scale = tl.zeros((VECTORS,), tl.float32)
    for candidate in range(PRESCALES):
        scale = to_bfloat16(rms * tl.load(prescales + candidate) * divisor).to(tl.float32)
        usable = scale > 0
        inverse = tl.where(usable & finite, divisor / tl.where(usable, scale, 1.0), 0.0)
        # costs of the states (u_{t-1}, u_{t-2})
        c00 = tl.zeros((VECTORS,), tl.float32)
        c01, c10, c11 = c00 + 1e30, c00 + 1e30, c00 + 1e30
        for octet in range(OCTETS):
            word = tl.zeros((VECTORS,), tl.int32)
            for bit in tl.static_range(8):
                t = octet * 8 + bit
                e = t // 32 * 32 + t % 4 * 8 + t % 32 // 4
                if e < HEAD_SIZE:
                    y = tl.load(rows + e * count.to(tl.int64) + wide, mask=present, other=0.0)
                    z = tl.where(finite, y / divisor, 0.0) * inverse
                    e0 = _error(z, thresholds, levels, 0, BITS)
                    e1 = _error(z, thresholds, levels, 1, BITS)
                    e2 = _error(z, thresholds, levels, 2, BITS)
                    e3 = _error(z, thresholds, levels, 3, BITS)
                    p00, q00, p01, q01 = c00 + e0, c01 + e2, c10 + e1, c11 + e3
                    p10, q10, p11, q11 = c00 + e2, c01 + e0, c10 + e3, c11 + e1
                    word |= (q00 < p00).to(tl.int32) << (4 * bit)
                    word |= (q01 < p01).to(tl.int32) << (4 * bit + 1)
                    word |= (q10 < p10).to(tl.int32) << (4 * bit + 2)
                    word |= (q11 < p11).to(tl.int32) << (4 * bit + 3)
                    c00, c01 = tl.minimum(p00, q00), tl.minimum(p01, q01)
                    c10, c11 = tl.minimum(p10, q10), tl.minimum(p11, q11)
                else:
                    word |= (c01 < c00).to(tl.int32) << (4 * bit)
                    word |= (c11 < c10).to(tl.int32) << (4 * bit + 1)
                    c00, c01 = tl.minimum(c00, c01), tl.minimum(c10, c11)
                    c10, c11 = c00 * 0.0 + 1e30, c00 * 0.0 + 1e30
            tl.store(decisions + octet * count.to(tl.int64) + wide, word, mask=present)
        state = tl.where(c01 < c00, 1, 0)
        least = tl.minimum(c00, c01)
        state = tl.where(c10 < least, 2, state)
        state = tl.where(c11 < tl.minimum(least, c10), 3, state)

        zz = tl.zeros((VECTORS,), tl.float32)
        ze = tl.zeros((VECTORS,), tl.float32)
        ee = tl.zeros((VECTORS,), tl.float32)
        for back in range(OCTETS):
            octet = OCTETS - 1 - back
            word = tl.load(decisions + octet * count.to(tl.int64) + wide, mask=present, other=0)
            for step in tl.static_range(8):
                t = octet * 8 + 7 - step
                e = t // 32 * 32 + t % 4 * 8 + t % 32 // 4
                path, before = state >> 1, state & 1
                two_before = (word >> (28 - 4 * step + state)) & 1
                if e < HEAD_SIZE:
                    y = tl.load(rows + e * count.to(tl.int64) + wide, mask=present, other=0.0)
                    z = tl.where(finite, y / divisor, 0.0) * inverse
                    subset = 2 * (path ^ two_before) + before
                    r = _refine(z, thresholds, subset, BITS)
                    error = z - tl.load(levels + 4 * r + subset)
                    zz += z * z
                    ze += z * error
                    ee += error * error
                    code = (_stored_refine(r, BITS) | path << (BITS - 1)).to(tl.uint8)
                    tl.store(trial + e * count.to(tl.int64) + wide, code, mask=present)
                state = 2 * before + two_before
        sine, stored = judged(scale, zz, ze, ee, RULE)
        better = (sine < best_sine) | (candidate == 0)
        best_sine = tl.where(better, sine, best_sine)
        best_scale = tl.where(better, stored, best_scale)
        # each lane reads what it wrote itself
        for e in range(HEAD_SIZE):
            code = tl.load(trial + e * count.to(tl.int64) + wide, mask=present & better, other=0)
            tl.store(codes + e * count.to(tl.int64) + wide, code, mask=present & better)
    best_scale = tl.where(finite, tl.where(rms > 0, best_scale, 0.0), float("nan"))
    tl.store(scales + wide, best_scale, mask=present)
