"""Kernels of :mod:`kvfold.ops.cpu`, compiled by numba. No torch here, and all in one file: numba's disk cache notices
changes of the file that a compiled function stands in, not of those that it imports.

Each kernel is a C function ``void(int64_t *)`` whose argument describes the arrays and scalars, so that it can run on
torch's own pool of OpenMP threads (:mod:`kvfold.ops.cpu_threads` says why): every thread takes tasks off an atomic
counter until none are left, so the result does not depend on how many there are.

Storing takes pages as bytes, reading takes them as 32-bit words (a page is a whole number of words). Floating-point
contraction and re-association are allowed, assumptions about NaN and infinity are not: both must come through as they
do in an uncompressed cache.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

TILE = 16
SPLIT_TOKENS = 512
# numpy's error model: a division by zero gives an infinity or NaN. Python's would raise inside a C callback, where
# nobody catches it and the rest of the tasks is lost.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}

Side = namedtuple(
    "Side", "widths offsets row_bytes scale_offset interleaved low_planes levels pair_levels path path_words tile_words"
)
"""What a kernel needs to know of one side.

widths, offsets, row_bytes  [planes] bits, place in the tile, bytes of a token's row
scale_offset                in the tile; -1 if the side stores none
interleaved                 whether rows are interleaved by four tokens
low_planes                  planes that share the low nibble of a code; the others make the high one
levels                      float32, by code; to store a trellis by index, ascending
pair_levels                 [256] two float32 levels in a float64, by two codes in a byte; empty above 4 bits
path                        of a trellis: place of the path bits' plane; -1 for others
path_words                  words of a token's row there
tile_words                  words of a tile

To read a trellis, the two bits that choose a level's subset are made of the path bits and put, as two planes of one
bit, behind a copy of the tile; the planes are these two and the refine bits' then, and levels are looked up as ever.
"""


@intrinsic
def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def _take(typingctx, counter):  # type: ignore[no-untyped-def]
    """Atomically add one to the int64 at an address; returns what was there."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), codegen


@njit(**_OPTIONS)
def _array(arguments, at, dtype):  # type: ignore[no-untyped-def]
    """The array that three numbers at ``at`` describe: address, number of elements (flat)."""
    return carray(_pointer(arguments[at]), (arguments[at + 1],), dtype)


@njit(**_OPTIONS)
def _matrix(flat, at, rows, columns):  # type: ignore[no-untyped-def]
    return flat[at : at + rows * columns].reshape((rows, columns))


@njit(**_OPTIONS)
def _side(arguments, at):  # type: ignore[no-untyped-def]
    return Side(
        _array(arguments, at, np.int64),
        _array(arguments, at + 2, np.int64),
        _array(arguments, at + 4, np.int64),
        arguments[at + 6],
        arguments[at + 7] != 0,
        arguments[at + 8],
        _array(arguments, at + 9, np.float32),
        _array(arguments, at + 11, np.float64),
        arguments[at + 13],
        arguments[at + 14],
        arguments[at + 15],
    )


@intrinsic
def _bits_of_float(typingctx, x):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _float_of_bits(typingctx, x):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@njit(inline="always", **_OPTIONS)
def _to_bf16(x):  # type: ignore[no-untyped-def]
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = _bits_of_float(np.float32(x))
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint32(0x7FC0)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(inline="always", **_OPTIONS)
def _from_bf16(bits):  # type: ignore[no-untyped-def]
    return _float_of_bits(np.uint32(bits) << np.uint32(16))


@njit(inline="always", **_OPTIONS)
def _byte_address(plane, row_bytes, token, byte, interleaved):  # type: ignore[no-untyped-def]
    """Where in the tile byte ``byte`` of a token's row lies; see kvfold/layout.py."""
    if interleaved:
        return plane + (byte // 4) * 64 + (token // 4) * 16 + (byte % 4) * 4 + token % 4
    return plane + token * row_bytes + byte


@njit(**_OPTIONS)
def _nearest(z, codes, chosen, levels, thresholds, bits):  # type: ignore[no-untyped-def]
    """The nearest levels of z, as kvfold/codecs/lloyd.py takes them."""
    sign = np.uint8(1 << (bits - 1))
    d = z.shape[0]
    for i in range(d):
        codes[i] = 0
    for t in range(thresholds.shape[0]):
        limit = thresholds[t]
        for i in range(d):
            codes[i] += np.uint8(abs(z[i]) > limit)
    for i in range(d):
        level = levels[codes[i]]
        if z[i] < 0:
            codes[i] |= sign
            level = -level
        chosen[i] = level


@njit(**_OPTIONS)
def _best_path(z, codes, chosen, levels, thresholds, bits, order, steps):  # type: ignore[no-untyped-def]
    """The path of least squared error, as kvfold/codecs/trellis.py finds it. ``steps`` is scratch ``[len(order)]``."""
    d = z.shape[0]
    between = thresholds.shape[0] // 4  # thresholds of a subset
    refine = np.zeros((4, d), dtype=np.uint8)
    error = np.empty((4, d), dtype=np.float32)
    for s in range(4):
        for t in range(between):
            limit = thresholds[s * between + t]
            for i in range(d):
                refine[s, i] += np.uint8(z[i] > limit)
        for i in range(d):
            e = z[i] - levels[4 * refine[s, i] + s]
            error[s, i] = e * e
    far = np.float32(1e30)
    c00, c01, c10, c11 = np.float32(0), far, far, far  # of states (u_{t-1}, u_{t-2})
    for t in range(order.shape[0]):
        i = order[t]
        if i < 0:
            b0, b1 = c01 < c00, c11 < c10
            c00, c01, c10, c11 = min(c00, c01), min(c10, c11), far, far
            steps[t] = np.uint8(b0) | np.uint8(b1) << 1
            continue
        e0, e1, e2, e3 = error[0, i], error[1, i], error[2, i], error[3, i]
        p00, q00 = c00 + e0, c01 + e2  # to (0, 0): from (0, 0) by subset 0, from (0, 1) by 2
        p01, q01 = c10 + e1, c11 + e3
        p10, q10 = c00 + e2, c01 + e0
        p11, q11 = c10 + e3, c11 + e1
        steps[t] = np.uint8(q00 < p00) | np.uint8(q01 < p01) << 1 | np.uint8(q10 < p10) << 2 | np.uint8(q11 < p11) << 3
        c00, c01, c10, c11 = min(p00, q00), min(p01, q01), min(p10, q10), min(p11, q11)
    state, least = 0, c00
    if c01 < least:
        state, least = 1, c01
    if c10 < least:
        state, least = 2, c10
    if c11 < least:
        state = 3
    for t in range(order.shape[0] - 1, -1, -1):
        path, before = state >> 1, state & 1
        two_before = (steps[t] >> state) & 1
        i = order[t]
        if i >= 0:
            subset = 2 * (path ^ two_before) + before
            r = refine[subset, i]
            codes[i] = r | path << (bits - 1)
            chosen[i] = levels[4 * r + subset]
        state = 2 * before + two_before
    positive = np.uint8(1 << (bits - 2))
    for i in range(d):  # refine bits as they are stored
        codes[i] ^= np.uint8(0) if codes[i] & positive else np.uint8(positive - 1)


@njit(**_OPTIONS)
def _quantise(  # type: ignore[no-untyped-def]
    x, codes, trial, chosen, unit, z, steps, order, levels, thresholds, prescales, rule, bits
):
    """Fill ``codes``; return the bits of the scale to store. Follows kvfold/codecs/scaling.py step by step."""
    d = x.shape[0]
    largest = np.float32(0)
    for i in range(d):
        if (_bits_of_float(x[i]) & np.uint32(0x7F800000)) == np.uint32(0x7F800000):  # infinite or NaN
            largest = np.float32(np.inf)
        else:
            largest = max(largest, abs(x[i]))
    if largest == np.inf or largest == 0:
        # the codes of a vector of zeros
        for i in range(d):
            z[i] = 0
        if order.shape[0]:
            _best_path(z, codes, chosen, levels, thresholds, bits, order, steps)
        else:
            _nearest(z, codes, chosen, levels, thresholds, bits)
        return np.uint32(0x7FC0) if largest == np.inf else np.uint32(0)
    squares = np.float32(0)
    for i in range(d):
        unit[i] = x[i] / largest
        squares += unit[i] * unit[i]
    rms = np.sqrt(squares) / np.float32(np.sqrt(d))
    best = np.float32(np.inf)
    stored = np.uint32(0)
    for candidate in range(prescales.shape[0]):
        scale = _from_bf16(_to_bf16(rms * prescales[candidate] * largest))
        inverse = largest / scale if scale > 0 else np.float32(0)
        for i in range(d):
            z[i] = unit[i] * inverse
        if order.shape[0]:
            _best_path(z, trial, chosen, levels, thresholds, bits, order, steps)
        else:
            _nearest(z, trial, chosen, levels, thresholds, bits)
        zz = np.float32(0)
        ze = np.float32(0)
        ee = np.float32(0)
        for i in range(d):
            e = z[i] - chosen[i]
            zz += z[i] * z[i]
            ze += z[i] * e
            ee += e * e
        zz0 = zz - ze
        z0z0 = zz - np.float32(2) * ze + ee
        sine = (zz * ee - ze * ze) / (zz * z0z0)
        if candidate == 0 or sine < best:
            best = sine
            for i in range(d):
                codes[i] = trial[i]
            if scale > 0:
                if rule == 1:
                    scale = scale * zz / zz0
                elif rule == 2:
                    scale = scale * np.sqrt(zz / z0z0)
                elif rule == 3:
                    scale = scale * zz0 / z0z0
            stored = _to_bf16(scale)
    return stored


@njit(**_OPTIONS)
def _write_planes(codes, tile, row, side):  # type: ignore[no-untyped-def]
    shift = np.uint32(0)
    for p in range(side.widths.shape[0]):
        width = side.widths[p]
        row_bytes = side.row_bytes[p]
        plane = side.offsets[p]
        if width == 8:
            for byte in range(row_bytes):
                tile[_byte_address(plane, row_bytes, row, byte, side.interleaved)] = codes[byte]
            continue
        per_nibble = 4 // width
        mask = np.uint32((1 << width) - 1)
        for word in range(row_bytes // 4):
            bits = np.uint32(0)
            for r in range(per_nibble):
                for n in range(8):
                    code = np.uint32(codes[(word * per_nibble + r) * 8 + n])
                    bits |= ((code >> shift) & mask) << np.uint32(width * r + 4 * n)
            for byte in range(4):
                at = _byte_address(plane, row_bytes, row, word * 4 + byte, side.interleaved)
                tile[at] = (bits >> np.uint32(8 * byte)) & np.uint32(0xFF)
        shift += np.uint32(width)


@njit(**_OPTIONS)
def _read_nibbles(tile, first, last, side, nibbles):  # type: ignore[no-untyped-def]
    """Combine planes first to last of a tile into words of eight nibbles, one per eight elements.

    nibbles is ``[16, rows]`` for token-major sides and ``[rows, 16]`` for interleaved ones, whose words hold a byte
    each of four tokens: masking and shifting treat both alike, because a nibble never mixes tokens.
    """
    shift = np.uint32(0)
    for p in range(first, last):
        width = side.widths[p]
        halvings = 2 - (width >> 1)  # 4 / width elements of a nibble are 2^halvings
        within = (1 << halvings) - 1
        mask = np.uint32(((1 << width) - 1) * 0x11111111)
        plane = side.offsets[p] // 4
        if side.interleaved:
            for row in range(nibbles.shape[0]):
                source = plane + (row >> halvings) * TILE
                down = np.uint32(width * (row & within))
                for x in range(TILE):
                    part = ((tile[source + x] >> down) & mask) << shift
                    nibbles[row, x] = part if p == first else nibbles[row, x] | part
        else:
            words = side.row_bytes[p] // 4
            for t in range(TILE):
                for row in range(nibbles.shape[1]):
                    down = np.uint32(width * (row & within))
                    part = ((tile[plane + t * words + (row >> halvings)] >> down) & mask) << shift
                    nibbles[t, row] = part if p == first else nibbles[t, row] | part
        shift += np.uint32(width)


@njit(**_OPTIONS)
def _spread_paths(tile, side, spread):  # type: ignore[no-untyped-def]
    """Copy a tile and put the planes of u_{t-1} and of u_t xor u_{t-2} behind it, for the path bits u of all tokens."""
    words = side.path_words
    for x in range(side.tile_words):
        spread[x] = tile[x]
    path, one, two = side.path // 4, side.tile_words, side.tile_words + TILE * words
    if not side.interleaved:
        for t in range(TILE):
            before = np.uint32(0)
            for c in range(words):
                u = tile[path + t * words + c]
                spread[one + t * words + c] = u << np.uint32(1) | before >> np.uint32(31)
                spread[two + t * words + c] = u ^ (u << np.uint32(2) | before >> np.uint32(30))
                before = u
        return
    # a word holds a byte each of four tokens: the carry of a byte comes from the word of the byte before
    for four in range(4):
        before = np.uint32(0)
        for c in range(words):
            for byte in range(4):
                at = c * TILE + four * 4 + byte
                u = tile[path + at]
                spread[one + at] = (u << np.uint32(1)) & np.uint32(0xFEFEFEFE) | (before >> np.uint32(7)) & np.uint32(
                    0x01010101
                )
                moved = (u << np.uint32(2)) & np.uint32(0xFCFCFCFC) | (before >> np.uint32(6)) & np.uint32(0x03030303)
                spread[two + at] = u ^ moved
                before = u


@njit(**_OPTIONS)
def _scratch(d, side):  # type: ignore[no-untyped-def]
    """Buffers of :func:`_read_tile`: sixteen vectors padded to eight elements, two of nibbles, and a tile."""
    rows = (d + 7) // 8
    shape = (rows, TILE) if side.interleaved else (TILE, rows)
    return (
        np.empty((TILE, rows * 8), dtype=np.float32),
        np.zeros(shape, dtype=np.uint32),
        np.zeros(shape, dtype=np.uint32),
        np.empty(side.tile_words + 2 * TILE * side.path_words, dtype=np.uint32),
    )


@njit(**_OPTIONS)
def _read_tile(stored, side, scratch):  # type: ignore[no-untyped-def]
    """De-quantise the sixteen vectors of a tile (uint32 words) into ``scratch[0]``, without their scales."""
    values, low, high, spread = scratch
    tile = stored
    if side.path >= 0:
        _spread_paths(stored, side, spread)
        tile = spread
    if side.widths[0] == 8:
        codes = tile.view(np.uint8)
        for t in range(TILE):
            for byte in range(min(side.row_bytes[0], values.shape[1])):
                at = _byte_address(side.offsets[0], side.row_bytes[0], t, byte, side.interleaved)
                values[t, byte] = side.levels[codes[at]]
        return
    if side.widths[0] == 4 and side.low_planes == side.widths.shape[0]:
        bytes_low = tile[side.offsets[0] // 4 :].view(np.uint8)  # a 4-bit plane is what the nibbles would be
    else:
        _read_nibbles(tile, 0, side.low_planes, side, low)
        bytes_low = low.reshape(-1).view(np.uint8)
    if side.low_planes == side.widths.shape[0]:
        pairs = values.view(np.float64)
        if side.interleaved:
            for row in range(values.shape[1] // 8):
                for x in range(64):
                    pairs[x // 16 * 4 + x % 4, row * 4 + x // 4 % 4] = side.pair_levels[bytes_low[row * 64 + x]]
        else:
            flat = pairs.reshape(-1)
            for x in range(flat.shape[0]):
                flat[x] = side.pair_levels[bytes_low[x]]
        return
    _read_nibbles(tile, side.low_planes, side.widths.shape[0], side, high)
    bytes_high = high.reshape(-1).view(np.uint8)
    for t in range(TILE):
        for pair in range(values.shape[1] // 2):
            at = t * (values.shape[1] // 2) + pair
            if side.interleaved:
                at = pair // 4 * 64 + t // 4 * 16 + pair % 4 * 4 + t % 4
            values[t, 2 * pair] = side.levels[(bytes_low[at] & 15) | (bytes_high[at] & 15) << 4]
            values[t, 2 * pair + 1] = side.levels[(bytes_low[at] >> 4) | (bytes_high[at] >> 4) << 4]


@njit(inline="always", **_OPTIONS)
def _scale_of(tile, side, t):  # type: ignore[no-untyped-def]
    if side.scale_offset < 0:
        return np.float32(1)
    word = tile[side.scale_offset // 4 + t // 2]
    return _from_bf16((word >> np.uint32(16 * (t % 2))) & np.uint32(0xFFFF))


@njit(inline="always", **_OPTIONS)
def _exp(x):  # type: ignore[no-untyped-def]
    """exp for x <= 0 to two units in the last place, in plain arithmetic so that loops over it vectorise."""
    bounded = x if x > np.float32(-87) else np.float32(-87)
    power = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    f = (bounded - power * np.float32(0.693359375)) + power * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + np.float32(1)
    result = p * _float_of_bits(np.uint32((np.int32(power) + np.int32(127)) << np.int32(23)))
    if x <= np.float32(-87):
        result = np.float32(0)
    return result if x == x else x


@njit(**_OPTIONS)
def _score_reference(q, words, scores):  # type: ignore[no-untyped-def]
    """The products of q ``[rows, d]`` with the key reference (uint32 words) of a page; see kvfold/layout.py."""
    rows, d = q.shape
    codes = words.view(np.int8)
    last = (d + 2 + 15) // 16 * 4 - 1
    scale = _from_bf16(words[last] >> np.uint32(16))
    for r in range(rows):
        dot = np.float32(0)
        for i in range(d):
            dot += q[r, i] * np.float32(codes[i])
        scores[r] = dot * scale


@njit(**_OPTIONS)
def _split(  # type: ignore[no-untyped-def]
    q, group, pages, page_stride, block_table, begin, end, position, lag, window, softcap, mask, mask_tokens,
    tiles_per_page, tile_words, reference_at, k_side, v_side, k_scratch, v_scratch, scores, from_reference, out, top,
    total,
):  # fmt: skip
    """One split of one KV head: scores of all its tokens, their softmax, then the values."""
    rows, dk = q.shape
    dv = out.shape[1]
    for r in range(rows):
        top[r] = -np.inf
        total[r] = 0
        for i in range(dv):
            out[r, i] = 0
    if begin >= end:
        return
    first_tile = begin // TILE
    last_tile = (end + TILE - 1) // TILE
    base = first_tile * TILE
    count = (last_tile - first_tile) * TILE
    values = k_scratch[0]
    for index in range(first_tile, last_tile):
        page = np.int64(block_table[index // tiles_per_page])
        tile = pages[page * page_stride + index % tiles_per_page * tile_words :]
        _read_tile(tile, k_side, k_scratch)
        if reference_at >= 0 and (index == first_tile or index % tiles_per_page == 0):
            _score_reference(q, pages[page * page_stride + reference_at :], from_reference)
        for t in range(TILE):
            token = index * TILE + t
            scale = _scale_of(tile, k_side, t)
            for r in range(rows):
                query = position + r // group
                seen = begin <= token and token < end and token <= query - lag
                if window > 0:
                    seen = seen and token > query - window
                if mask_tokens > 0 and seen:
                    seen = mask[r // group * mask_tokens + token]
                score = np.float32(-np.inf)
                if seen:
                    dot = np.float32(0)
                    for i in range(dk):
                        dot += q[r, i] * values[t, i]
                    score = dot * scale + from_reference[r]
                    if softcap > 0:
                        score = softcap * np.float32(np.tanh(score / softcap))
                    if not score <= top[r]:  # not max(): a NaN must win
                        top[r] = score
                scores[r, token - base] = score
    for r in range(rows):
        acc = np.float32(0)
        highest = top[r]
        if highest == -np.inf:
            for t in range(count):
                scores[r, t] = -1
        else:
            for t in range(count):
                weight = _exp(scores[r, t] - highest)
                acc += weight
                scores[r, t] = weight if scores[r, t] != -np.inf else np.float32(-1)  # -1: not seen
        total[r] = acc
    values = v_scratch[0]
    for index in range(first_tile, last_tile):
        page = np.int64(block_table[index // tiles_per_page])
        tile = pages[page * page_stride + index % tiles_per_page * tile_words :]
        _read_tile(tile, v_side, v_scratch)
        for t in range(max(0, begin - index * TILE), min(TILE, end - index * TILE)):
            scale = _scale_of(tile, v_side, t)
            for r in range(rows):
                weight = scores[r, index * TILE + t - base]
                if weight < 0:  # a NaN in V must not reach a query that does not see it
                    continue
                weight *= scale
                for i in range(dv):
                    out[r, i] += weight * values[t, i]


@njit(**_OPTIONS)
def _merge(part_out, part_top, part_sum, splits, rows, dv, out, lse):  # type: ignore[no-untyped-def]
    for r in range(rows):
        top = np.float32(-np.inf)
        for s in range(splits):
            if not part_top[s * rows + r] <= top:  # not max(): a NaN must win
                top = part_top[s * rows + r]
        for i in range(dv):
            out[r * dv + i] = 0
        lse[r] = top
        if top == -np.inf:
            continue
        total = np.float32(0)
        for s in range(splits):
            part = s * rows + r
            if part_top[part] == -np.inf:
                continue
            weight = _exp(part_top[part] - top)
            total += weight * part_sum[part]
            for i in range(dv):
                out[r * dv + i] += weight * part_out[part * dv + i]
        for i in range(dv):
            out[r * dv + i] /= total
        lse[r] = top + np.log(total)


@cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
def store_side(pointer):  # type: ignore[no-untyped-def]
    """Quantise rotated vectors y ``[T, H, d]`` and write one side of their records into the pages."""
    arguments = carray(pointer, (64,), np.int64)
    tasks, heads, d, page_size, tile_bytes, page_bytes, rule, bits = arguments[1:9]
    y = _array(arguments, 10, np.float32)
    pages = _array(arguments, 12, np.uint8)
    slots = _array(arguments, 14, np.int64)
    thresholds = _array(arguments, 16, np.float32)
    prescales = _array(arguments, 18, np.float32)
    order = _array(arguments, 20, np.int64)
    side = _side(arguments, 22)
    padded = (d + 31) // 32 * 32
    codes = np.zeros(padded, dtype=np.uint8)
    trial = np.zeros(d, dtype=np.uint8)
    steps = np.zeros(padded, dtype=np.uint8)
    chosen = np.empty(d, dtype=np.float32)
    unit = np.empty(d, dtype=np.float32)
    z = np.empty(d, dtype=np.float32)
    while True:
        token = _take(arguments[0])
        if token >= tasks:
            return
        slot = slots[token]
        if slot < 0:
            continue
        row = slot % TILE
        for head in range(heads):
            x = y[(token * heads + head) * d : (token * heads + head + 1) * d]
            stored = _quantise(
                x, codes[:d], trial, chosen, unit, z, steps, order, side.levels, thresholds, prescales, rule, bits
            )
            tile = pages[(slot // page_size * heads + head) * page_bytes + slot % page_size // TILE * tile_bytes :]
            _write_planes(codes, tile, row, side)
            scale_at = side.scale_offset + 2 * row
            tile[scale_at] = stored & np.uint32(0xFF)
            tile[scale_at + 1] = stored >> np.uint32(8)


@cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
def load_tiles(pointer):  # type: ignore[no-untyped-def]
    """De-quantise consecutive tiles of one sequence into out ``[H, tiles * 16, d]``."""
    arguments = carray(pointer, (64,), np.int64)
    tasks, heads, d, page_size, tile_words, page_words, first_tile = arguments[1:8]
    out = _array(arguments, 10, np.float32)
    pages = _array(arguments, 12, np.uint32)
    block_table = _array(arguments, 14, np.int32)
    side = _side(arguments, 20)
    tiles = tasks // heads
    per_page = page_size // TILE
    scratch = _scratch(d, side)
    while True:
        task = _take(arguments[0])
        if task >= tasks:
            return
        head, index = task // tiles, task % tiles
        position = first_tile + index
        page = np.int64(block_table[position // per_page])
        tile = pages[(page * heads + head) * page_words + position % per_page * tile_words :]
        _read_tile(tile, side, scratch)
        for t in range(TILE):
            scale = _scale_of(tile, side, t)
            at = (task * TILE + t) * d
            for i in range(d):
                out[at + i] = scratch[0][t, i] * scale


@cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
def decode_splits(pointer):  # type: ignore[no-untyped-def]
    """Attention of q ``[B, H, rows, dk]`` (scaled, rotated); see ops.reference.attend for who sees what.

    A task is one split of one KV head; whoever finishes a head's last split merges them, in the order of the splits.
    Fills out ``[B, H, rows, dv]`` and the log-sum-exp ``[B, H, rows]``; ``part_*`` are scratch ``[B, H, splits, rows(,
    dv)]``.
    """
    arguments = carray(pointer, (128,), np.int64)
    tasks, heads, splits, rows, dk, dv, page_size, tile_words, page_words, pages_per_row = arguments[1:11]
    group, lag, window, masked, mask_tokens = arguments[11:16]
    softcap = _array(arguments, 16, np.float64)[0]
    q = _array(arguments, 18, np.float32)
    pages = _array(arguments, 20, np.uint32)
    block_table = _array(arguments, 22, np.int32)
    first = _array(arguments, 24, np.int64)
    lengths = _array(arguments, 26, np.int64)
    positions = _array(arguments, 28, np.int64)
    mask = _array(arguments, 30, np.bool_)
    part_out = _array(arguments, 32, np.float32)
    part_top = _array(arguments, 34, np.float32)
    part_sum = _array(arguments, 36, np.float32)
    out = _array(arguments, 38, np.float32)
    lse = _array(arguments, 40, np.float32)
    finished = arguments[42]
    reference_at = arguments[44]
    k_side, v_side = _side(arguments, 45), _side(arguments, 61)
    k_scratch, v_scratch = _scratch(dk, k_side), _scratch(dv, v_side)
    scores = np.empty((rows, SPLIT_TOKENS), dtype=np.float32)
    from_reference = np.zeros(rows, dtype=np.float32)
    queries = rows // group
    while True:
        task = _take(arguments[0])
        if task >= tasks:
            return
        b, head, split = task // (heads * splits), task // splits % heads, task % splits
        query_head = b * heads + head
        visible = mask[b * queries * mask_tokens : (b + 1) * queries * mask_tokens] if masked else mask
        _split(
            _matrix(q, query_head * rows * dk, rows, dk), group, pages[head * page_words :],
            heads * page_words, block_table[b * pages_per_row :], max(first[b], split * SPLIT_TOKENS),
            min(lengths[b], (split + 1) * SPLIT_TOKENS), positions[b], lag, window, np.float32(softcap), visible,
            mask_tokens, page_size // TILE, tile_words, reference_at, k_side, v_side, k_scratch, v_scratch, scores,
            from_reference, _matrix(part_out, task * rows * dv, rows, dv), part_top[task * rows : (task + 1) * rows],
            part_sum[task * rows : (task + 1) * rows],
        )  # fmt: skip
        if _take(finished + 8 * query_head) == splits - 1:
            begin = query_head * splits * rows
            _merge(
                part_out[begin * dv :], part_top[begin:], part_sum[begin:], splits, rows, dv,
                out[query_head * rows * dv :], lse[query_head * rows :],
            )  # fmt: skip
