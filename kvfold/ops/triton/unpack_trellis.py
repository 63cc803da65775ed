# mypy: disable-error-code="no-untyped-def, import-untyped, assignment"
"""A trellis' planes to levels, in registers, for decoding (see kvfold/codecs/trellis.py and docs/kernels.md).

A word of the path's plane has a bit of 32 coordinates of K's token, or of eight coordinates of four tokens of V. From
it, the two bits before it and the planes above, :func:`_indices` makes four words of nibbles, which say which magnitude
each of the 32 has; the look-up turns these into pairs of float16, and joins and reshapes, which move nothing between
threads, into the left side of a product. Its columns (of K, :func:`coordinate_of_column`) or rows (of V,
:func:`coordinate_of_row`) are coordinates.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def coordinate_of_column(S: tl.constexpr):
    """Coordinate of each column of K's tile: field ``2 row + n`` of byte b of word i is coordinate
    ``32 i + 8 row + 2 b + n``, and all bytes of a field are side by side."""
    bytes_of_field: tl.constexpr = S.units // 8
    column = tl.arange(0, S.units)
    byte, field = column % bytes_of_field, column // bytes_of_field
    return byte // 4 * 32 + field // 2 * 8 + byte % 4 * 2 + field % 2


@triton.jit
def coordinate_of_row(S: tl.constexpr):
    """Coordinate of each row of V's tile: the same, but of a field's bytes the even ones come before the odd ones."""
    bytes_of_field: tl.constexpr = S.units // 8
    row = tl.arange(0, S.units)
    place, field = row % bytes_of_field, row // bytes_of_field
    byte = place % (bytes_of_field // 2) * 2 + place // (bytes_of_field // 2)
    return byte // 4 * 32 + field // 2 * 8 + byte % 4 * 2 + field % 2


@triton.jit
def magnitudes(look_up, S: tl.constexpr):
    """The look-up's words, in registers: where the instructions are NVIDIA's own, else none, as memory will do.

    They depend on the lane, as far as the compiler knows. What is the same in all lanes it keeps in uniform registers,
    of which it makes a copy for every use.
    """
    found = ()
    if S.trellis and len(S.unpack) > 0:
        one = tl.zeros((1, 1), tl.int32)
        zero = tl.load(look_up + 10 + one)
        for word in tl.static_range(10):
            found += (
                tl.inline_asm_elementwise(
                    "{ .reg .b32 lane; mov.u32 lane, %laneid; mad.lo.u32 $0, lane, $2, $1; }", "=r,r,r",
                    [tl.load(look_up + word + one), zero], dtype=tl.int32, is_pure=True, pack=1,
                ),
            )  # fmt: skip
    return found


@triton.jit
def known(pointer, inside, S: tl.constexpr):
    """The integer at a pointer, less than 2^31, where ``inside``, else 0, as if no load were needed.

    The compiler's stages of loads (``num_stages``) would give what depends on a load a stage less. So this is read some
    steps ahead of the loop, and even if there is no step: ``inside`` must hold for no place that may not be read.
    """
    if len(S.unpack) > 0:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }", "=r,l,r",
            [pointer.to(tl.int64), inside.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.load(pointer, mask=inside, other=0)


@triton.jit
def k_levels(pages, tile, token, look_up, table, S: tl.constexpr):
    """Levels of K ``[tokens, columns]`` in float16, in units of ``unpack.level_unit``.

    ``pages`` points to int32; ``tile`` ``[tokens]`` is where each token's tile begins, in bytes.
    """
    last: tl.constexpr = len(S.widths) - 1
    u = _k_plane(pages, tile, token, S, last, 1, 0)
    two_up = u << 2 | ((_k_plane(pages, tile, token, S, last, 1, -1) >> 30) & 3)
    low, high, top = u, u, u
    if S.widths[0] == 2:
        if S.planes[0] % 8 == 0 and S.row_bytes[0] % 8 == 0 and S.row_bytes[0] == S.units // 4:
            both = _k_words_of_two(pages, tile, token, S)
            low, high = both.to(tl.int32), (both >> 32).to(tl.int32)
        else:
            low, high = _k_plane(pages, tile, token, S, 0, 2, 0), _k_plane(pages, tile, token, S, 0, 2, 1)
    if S.widths[last - 1] == 1:
        top = _k_plane(pages, tile, token, S, last - 1, 1, 0)
    levels = _levels(u, two_up, low, high, top, look_up, table, S)
    return tl.reshape(tl.permute(levels, (0, 5, 6, 4, 1, 2, 3)), (levels.shape[0], S.units))


@triton.jit
def v_levels(pages, tile, four, look_up, table, S: tl.constexpr):
    """Levels of V ``[rows, tokens]`` likewise: of groups of four tokens, which are side by side.

    ``tile`` is where each group's tile begins, in bytes, ``four`` its place there, 0 to 3.
    """
    last: tl.constexpr = len(S.widths) - 1
    first, second = _v_plane(pages, tile, four, S, last, 1, 0)
    u = _rows(first, second)
    before = _rows(_v_bytes_before(pages, tile, four, S), first)
    two_up = ((u << 2) & -0x03030304) | ((before >> 6) & 0x03030303)
    low, high, top = u, u, u
    if S.widths[0] == 2:
        first, second = _v_plane(pages, tile, four, S, 0, 2, 0)
        low = _rows(first, second)
        first, second = _v_plane(pages, tile, four, S, 0, 2, 1)
        high = _rows(first, second)
    if S.widths[last - 1] == 1:
        first, second = _v_plane(pages, tile, four, S, last - 1, 1, 0)
        top = _rows(first, second)
    levels = _levels(u, two_up, low, high, top, look_up, table, S)
    return tl.reshape(tl.permute(levels, (5, 6, 4, 0, 1, 2, 3)), (S.units, 4 * levels.shape[1]))


@triton.jit
def tokens_of_groups(a, b, c, d):
    """Rows of four tiles ``[groups, columns]``, of tokens 0 to 3 of each group, in the tokens' order."""
    x = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(x, (0, 2, 3, 1)), (4 * a.shape[0], a.shape[1]))


@triton.jit
def _k_plane(
    pages, tile, token, S: tl.constexpr, plane: tl.constexpr, stride: tl.constexpr, first: tl.constexpr,
):  # fmt: skip
    """Words ``first``, ``first + stride`` and so on of K's rows in a plane ``[tokens, words]``; 0 where none is."""
    words: tl.constexpr = S.row_bytes[plane] // 4
    word = tl.arange(0, S.units // 32) * stride + first
    row = tile // 4 + (S.planes[plane] + token * S.row_bytes[plane]) // 4
    address = pages + (row[:, None] + word[None, :])
    if first < 0 or (S.units // 32 - 1) * stride + first >= words:
        return tl.load(address, mask=((word >= 0) & (word < words))[None, :], other=0)
    else:  # a mask would keep the compiler from loading sixteen bytes at a time
        return tl.load(address)


@triton.jit
def _k_words_of_two(pages, tile, token, S: tl.constexpr):
    """Words of K's plane of two bits, two by two ``[tokens, words]``: what belongs to a word of the path."""
    row = tile // 8 + (S.planes[0] + token * S.row_bytes[0]) // 8
    return tl.load(pages.to(tl.pointer_type(tl.int64)) + (row[:, None] + tl.arange(0, S.units // 32)[None, :]))


@triton.jit
def _v_plane(pages, tile, four, S: tl.constexpr, plane: tl.constexpr, stride: tl.constexpr, first: tl.constexpr):
    """Bytes of four tokens of words ``first``, ``first + stride`` and so on of a plane of V, two by two: the first ones
    and the second ones ``[pairs, groups]``; 0 where there is none."""
    words: tl.constexpr = S.row_bytes[plane] // 4
    pair = tl.arange(0, S.units // 16)
    word = pair // 2 * stride + first
    row = tile // 8 + (S.planes[plane] // 8 + four * 2)
    address = pages.to(tl.pointer_type(tl.int64)) + ((word * 8 + pair % 2)[:, None] + row[None, :])
    if (S.units // 32 - 1) * stride + first >= words:
        both = tl.load(address, mask=(word < words)[:, None], other=0)
    else:
        both = tl.load(address)
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def _v_bytes_before(pages, tile, four, S: tl.constexpr):
    """The bytes before such pairs' first ones in the path's plane ``[pairs, groups]``; 0 before the first of all."""
    plane: tl.constexpr = len(S.widths) - 1
    pair = tl.arange(0, S.units // 16)
    byte = tl.maximum(2 * pair - 1, 0)
    row = tile // 4 + (S.planes[plane] // 4 + four * 4)
    address = pages + ((byte // 4 * 16 + byte % 4)[:, None] + row[None, :])
    return tl.load(address, mask=((pair > 0) & (byte < S.row_bytes[plane]))[:, None], other=0)


@triton.jit
def _rows(a, b):
    """Rows of ``a``, then those of ``b``."""
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * a.shape[0], a.shape[1]))


@triton.jit
def _levels(u, two_up, low, high, top, look_up, table, S: tl.constexpr):
    """Levels of 32 coordinates to a word ``[a, b, 2, 2, 2, 2, 2]``: of byte 2 x + y, nibble n and row 2 c + d of the
    bits at ``[:, :, x, y, n, c, d]``."""
    if S.widths[0] == 2 and len(S.widths) == 2:
        top = ((low >> 1) & 0x11111111) | ((low >> 2) & 0x22222222) | ((high << 1) & 0x44444444) | (high & -0x77777778)
    sign = ~top
    w0, w1, w2, w3 = _indices(u, two_up, low, high, sign, S)
    return tl.join(
        tl.join(_of_row(w0, sign, look_up, table, S, 0), _of_row(w2, sign, look_up, table, S, 2)),
        tl.join(_of_row(w1, sign, look_up, table, S, 1), _of_row(w3, sign, look_up, table, S, 3)),
    )


@triton.jit
def _indices(u, two_up, low, high, sign, S: tl.constexpr):
    """Which magnitude, in the nibbles of four words, which are those of coordinates with t modulo 4 of 0 to 3.

    ``u`` has the path's bits, ``two_up`` these two up, ``sign`` a bit that is set where the level is negative, for
    which the path's two bits are complemented. The bit u_t xor u_{t-2} is above u_{t-1} for odd t, else below.
    """
    upper = u ^ two_up ^ sign
    if S.bits < 5:
        even = (upper & 0x55555555) | ((two_up ^ (sign << 1)) & -0x55555556)
        odd = ((u ^ (sign >> 1)) & 0x55555555) | (upper & -0x55555556)
    else:
        even = _select(upper, two_up ^ (sign << 1), 0x55555555, S)
        odd = _select(u ^ (sign >> 1), upper, 0x55555555, S)
    if S.bits == 3:
        return even & 0x33333333, odd & 0x33333333, (even >> 2) & 0x33333333, (odd >> 2) & 0x33333333
    elif S.bits == 4:
        return (
            (even & 0x33333333) | ((low << 2) & 0x44444444), (odd & 0x33333333) | (low & 0x44444444),
            ((even >> 2) & 0x33333333) | ((high << 2) & 0x44444444), ((odd >> 2) & 0x33333333) | (high & 0x44444444),
        )  # fmt: skip
    else:  # refine bits are below the path's where t is even, which saves two shifts
        return (
            _select(low, even << 2, 0x33333333, S), _select(odd, low, 0x33333333, S),
            _select(high, even, 0x33333333, S), _select(odd >> 2, high, 0x33333333, S),
        )  # fmt: skip


@triton.jit
def _select(a, b, mask: tl.constexpr, S: tl.constexpr):
    """Bits of ``a`` where ``mask`` has ones, else of ``b``: one instruction, of which the compiler makes no others."""
    if len(S.unpack) > 0:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xe4;", "=r,r,r,r", [a, b, mask], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (a & mask) | (b & ~mask)


@triton.jit
def _of_row(w, sign, look_up, table, S: tl.constexpr, row: tl.constexpr):
    """Levels of the coordinates in a word of indices ``[a, b, 2, 2, 2]``: of byte 2 x + y, nibble n at
    ``[:, :, x, y, n]``."""
    if len(S.unpack) > 0:
        of_t: tl.constexpr = row % 2 * 4
        if S.bits == 5:
            a, b, c, d = tl.inline_asm_elementwise(
                S.unpack[row], "=r,=r,=r,=r,r,r,r,r,r,r,r,r",
                [w, sign, table[of_t], table[of_t + 1], table[of_t + 2], table[of_t + 3], table[8], table[9]],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                S.unpack[row], "=r,=r,=r,=r,r,r,r,r", [w, sign, table[of_t], table[of_t + 1]],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        return tl.join(_of_pairs(a, b), _of_pairs(c, d))
    else:
        return tl.join(_of_nibbles(w, sign, look_up, S, row, 0), _of_nibbles(w, sign, look_up, S, row, 1))


@triton.jit
def _of_pairs(a, b):
    """Two words of two float16 as four side by side, two by two."""
    return tl.join(tl.join(_half(a), _half(b)), tl.join(_half(a >> 16), _half(b >> 16)))


@triton.jit
def _half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _of_nibbles(w, sign, look_up, S: tl.constexpr, row: tl.constexpr, n: tl.constexpr):
    """The same of one nibble of each byte, without instructions of any vendor's own."""
    return tl.join(
        tl.join(_level(w, sign, look_up, S, row, n, 0), _level(w, sign, look_up, S, row, n, 2)),
        tl.join(_level(w, sign, look_up, S, row, n, 1), _level(w, sign, look_up, S, row, n, 3)),
    )


@triton.jit
def _level(w, sign, look_up, S: tl.constexpr, row: tl.constexpr, n: tl.constexpr, byte: tl.constexpr):
    nibble: tl.constexpr = 2 * byte + n
    index = (w >> (4 * nibble)) & 15
    if S.bits == 5:
        index = tl.where(index < 8, index, 23 - index)
    table = tl.load(look_up + (row % 2 * 4 + index // 4))
    magnitude = (table >> (index % 4 * 8)) & 255
    if S.bits == 5:
        magnitude = 2 * magnitude + 1
    odd = magnitude.to(tl.float32)
    return tl.where((sign >> (4 * nibble + row)) & 1 != 0, -odd, odd).to(tl.float16)
