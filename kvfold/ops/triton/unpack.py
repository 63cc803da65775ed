# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Packed bytes to levels, in registers: what the attention kernels and ``load_kv`` share.

Levels of up to 4 bits are the odd integers ``2 m + 1`` with a sign, which 16-bit numbers hold exactly; the codebook's
half step goes into the scores and the output. Wider levels are the sum of two 16-bit numbers. Decoding takes float16,
prefill bfloat16.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

constexpr_function = triton.constexpr_function if hasattr(triton, "constexpr_function") else tl.constexpr_function
"""In Triton 3.4 it is part of the language."""

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter, which has no bfloat16 products and no inline assembly."""


@triton.jit
def multiply(a, b, acc):
    """``acc + a @ b`` of bfloat16 or float16 tiles, in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def to_bfloat16(x):
    """Round float32 to the nearest bfloat16, ties to even, which the interpreter's own cast does not."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def convert(x, dtype: tl.constexpr):
    """Round a float32 tile to another floating dtype."""
    if dtype == tl.bfloat16:
        return to_bfloat16(x)
    else:
        return x.to(dtype)


@triton.jit
def split(x):
    """A float32 tile as the sum of two bfloat16 tiles."""
    main = to_bfloat16(x)
    return main, to_bfloat16(x - main.to(tl.float32))


# --- words: codes of eight coordinates, aligned in the nibbles of a word ----------------------------------------------


# What words are combined with must be loaded, too, or be constant. Triton gives loads, and what is made of nothing but
# loads, the layout of a tensor core's operand; a shift or a scalar from elsewhere would send all levels through shared
# memory.


@triton.jit
def place_of_unit(S: tl.constexpr):
    """Which of K's units, in memory, come one after the other."""
    unit = tl.arange(0, S.units)
    if S.deep > 1:
        unit = unit % (S.units // S.deep) * S.deep + unit // (S.units // S.deep)
    return unit


@triton.jit
def column_of_unit(S: tl.constexpr, width: tl.constexpr):
    """Which element of a row of K's plane each unit is in."""
    unit = tl.arange(0, S.units)
    if S.deep > 1:  # the octet over S.deep, so that the compiler sees that neighbours are neighbours
        return unit % (S.units // S.deep)
    elif width >= 4:
        return unit
    else:
        return unit // (4 // S.unit_bytes) // (4 // width) * (4 // S.unit_bytes) + unit % (4 // S.unit_bytes)


@constexpr_function
def octets_of_element(S, width):
    """How many octets of coordinates have codes in what a narrow plane is loaded in."""
    return S.deep if S.deep > 1 else 4 // width


@constexpr_function
def element_bytes(S, width):
    """Of what K's plane of a width is loaded in."""
    return S.deep * width if S.deep > 1 else S.unit_bytes


@triton.jit
def row_shift(look_up, octet, S: tl.constexpr, plane: tl.constexpr):
    """How far in a narrow plane's nibbles, of the element that is loaded, the codes of an octet of coordinates lie."""
    deep: tl.constexpr = octets_of_element(S, S.widths[plane])
    if S.bits <= 4:
        return tl.load(look_up + (2 + 4 * plane + octet % deep))
    else:
        return octet % deep * S.widths[plane]


@triton.jit
def k_words(pages, tile, token, look_up, S: tl.constexpr, plane: tl.constexpr):
    """A plane's codes of K ``[tokens, units]``, each nibble (or byte) one coordinate's, other bits zero.

    ``pages`` points to elements of S.unit_bytes; ``tile`` ``[tokens]`` is where each token's tile begins, in bytes.
    """
    width: tl.constexpr = S.widths[plane]
    size: tl.constexpr = element_bytes(S, width)
    place = place_of_unit(S)
    octet = place // (4 // S.unit_bytes)
    if size == 8:
        pages = pages.to(tl.pointer_type(tl.int64))
    row = tile // size + (S.planes[plane] + token * S.row_bytes[plane]) // size
    address = pages + (row[:, None] + column_of_unit(S, width)[None, :])
    if S.units * S.fields > S.head_size:
        words = tl.load(address, mask=(place * S.fields < S.head_size)[None, :], other=0)
    else:  # no mask: that would keep the compiler from loading sixteen bytes at a time
        words = tl.load(address).to(tl.int64 if size == 8 else tl.int32)
    if width < 4:
        words = words >> row_shift(look_up, octet, S, plane)[None, :]
        words = words.to(tl.int32) & (0x11111111 * ((1 << width) - 1))
    return words.to(tl.int32)


@triton.jit
def v_words(pages, tile, four, look_up, S: tl.constexpr, plane: tl.constexpr):
    """A plane's codes of V ``[pairs, groups of four tokens]``: byte t of a word has two coordinates of token t, or one.

    ``pages`` points to int32; ``tile`` is where each group's tile begins, in bytes, ``four`` its place there, 0 to 3.
    """
    width: tl.constexpr = S.widths[plane]
    pair = tl.arange(0, S.rows)
    word = pair // 4
    if width < 4:
        octet = word
        word = octet // (4 // width)
    row = tile // 4 + (S.planes[plane] // 4 + four * 4)
    address = pages + (row[None, :] + (word * 16 + pair % 4)[:, None])
    per_byte: tl.constexpr = 1 if S.bits == 8 else 2
    if S.rows * per_byte > S.head_size:
        words = tl.load(address, mask=(pair * per_byte < S.head_size)[:, None], other=0)
    else:
        words = tl.load(address)
    if width < 4:
        words = words >> row_shift(look_up, octet, S, plane)[:, None]
        words = words & (0x11111111 * ((1 << width) - 1))
    return words


@triton.jit
def words_of(pages, tile, place, look_up, S: tl.constexpr):
    """The codes of K ``[tokens, units]`` in the nibbles of up to three words, of which the first has 4 bits or fewer;
    those of V ``[rows, groups of four tokens]`` likewise in their bytes. ``place``: of token or group in its tile."""
    w0 = _words(pages, tile, place, look_up, S, 0)
    w1, w2 = w0, w0
    if len(S.widths) > 1:
        w1 = _words(pages, tile, place, look_up, S, 1)
    if len(S.widths) > 2:
        w2 = _words(pages, tile, place, look_up, S, 2)
    if S.bits == 3:
        w0 = w0 | w1 << 2
    return w0, w1, w2


@triton.jit
def _words(pages, tile, place, look_up, S: tl.constexpr, plane: tl.constexpr):
    if S.is_value:
        return v_words(pages, tile, place, look_up, S, plane)
    else:
        return k_words(pages, tile, place, look_up, S, plane)


@triton.jit
def table_level(code, S: tl.constexpr, dtype: tl.constexpr = tl.bfloat16):
    """Codes of up to 4 bits to levels, without instructions of any vendor's own."""
    index = code & ((1 << (S.bits - 1)) - 1)
    four = tl.where(index < 4, S.table[0], S.table[1]) if S.bits == 4 else S.table[0]
    odd = ((four >> (index % 4 * 8)) & 255).to(tl.float32)
    return tl.where((code & (1 << (S.bits - 1))) != 0, -odd, odd).to(dtype)


@constexpr_function
def level_unit(S):
    """What the decode kernel's levels are in units of: its own instructions give subnormal numbers of float16."""
    return 2.0**-24 if len(S.unpack) > 0 else 1.0


@triton.jit
def levels_of_two_bytes(words, look_up, S: tl.constexpr, byte: tl.constexpr):
    """Levels in two bytes of words of up to 4 bits, in float16: of each byte the low and then the high nibble."""
    if len(S.unpack) > 0:
        one = tl.zeros((1, 1), tl.int32)
        table0, table1 = tl.load(look_up + one), tl.load(look_up + 1 + one)
        low0, high0, low1, high1 = tl.inline_asm_elementwise(
            S.unpack[byte // 2], "=r,=r,=r,=r,r,r,r,r,r,r", [words, table0, table1],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        low0 = table_level(words >> (8 * byte), S, tl.float16)
        high0 = table_level(words >> (8 * byte + 4), S, tl.float16)
        low1 = table_level(words >> (8 * byte + 8), S, tl.float16)
        high1 = table_level(words >> (8 * byte + 12), S, tl.float16)
    return low0, high0, low1, high1


@triton.jit
def wide_code(w0, w1, w2, S: tl.constexpr, byte: tl.constexpr, half: tl.constexpr):
    """Codes of 5 to 8 bits in one byte of the words of up to three planes: of one nibble, or at 8 bits of the byte."""
    if S.bits == 8:
        return (w0 >> (8 * byte)) & 255
    else:
        code = (w0 >> (8 * byte + 4 * half)) & 15
        code |= ((w1 >> (8 * byte + 4 * half)) & 15) << 4
        if len(S.widths) > 2:
            code |= ((w2 >> (8 * byte + 4 * half)) & 15) << 6
        return code


@triton.jit
def two_levels(levels, code):
    """Codes of any width to levels as two tiles of bfloat16, from a table of pairs."""
    pair = tl.load(levels + code)
    main = (pair & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return main, (pair << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def two_halves(levels, code):
    """The same in float16."""
    pair = tl.load(levels + code)
    main = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return main, pair.to(tl.int16).to(tl.float16, bitcast=True)


# --- coordinates one by one: a tile in any shape ----------------------------------------------------------------------


@triton.jit
def codes_of(pages, tile, token, coordinate, S: tl.constexpr):
    """Codes by coordinate: ``tile`` (in bytes), ``token`` and ``coordinate`` broadcast to the shape of the result."""
    code = _plane_codes(pages, tile, token, coordinate, S, 0)
    last: tl.constexpr = len(S.widths) - S.trellis
    for plane in tl.static_range(1, last):
        code = code | _plane_codes(pages, tile, token, coordinate, S, plane)
    if S.trellis:
        t = coordinate // 32 * 32 + coordinate % 8 * 4 + coordinate // 8 % 4
        path = _path_bit(pages, tile, token, coordinate, t, S) ^ _path_bit(pages, tile, token, coordinate, t - 2, S)
        code = code << 2 | path << 1 | _path_bit(pages, tile, token, coordinate, t - 1, S)
        if S.bits <= 4:
            half: tl.constexpr = 1 << (S.bits - 1)
            if S.bits == 3:  # written as below, ptxas 12.8.93 makes wrong code of it (docs/quality.md, Limits)
                code = tl.where(code < half, 2 * half - 1 - code, code - half)
            else:
                code = code ^ tl.where(code < half, half + 3, half)
    return code


@triton.jit
def _path_bit(pages, tile, token, coordinate, t, S: tl.constexpr):
    """A trellis' path bit t, in the order of its bits; 0 before the first."""
    plane: tl.constexpr = len(S.widths) - 1
    byte = tl.maximum(t, 0) // 8
    if S.is_value:
        address = byte // 4 * 64 + token // 4 * 16 + byte % 4 * 4 + token % 4
    else:
        address = token * S.row_bytes[plane] + byte
    inside = (coordinate < S.head_size) & (t >= 0)
    found = tl.load(pages + tile + (S.planes[plane] + address), mask=inside, other=0).to(tl.int32)
    return (found >> (tl.maximum(t, 0) % 8)) & 1


@triton.jit
def reference_of(pages, scales, page_byte, coordinate, inside, PAGE_BYTES: tl.constexpr, REFERENCE: tl.constexpr):
    """Coordinates of key references, float32: ``page_byte``, where pages begin, and ``coordinate`` are broadcast.

    ``pages`` points to int8, ``scales`` to bfloat16.
    """
    code = tl.load(pages + page_byte + (REFERENCE + coordinate), mask=inside, other=0).to(tl.float32)
    return code * tl.load(scales + (page_byte + (PAGE_BYTES - 2)) // 2).to(tl.float32)


@triton.jit
def _plane_codes(pages, tile, token, coordinate, S: tl.constexpr, plane: tl.constexpr):
    """What a plane has of the codes, at its place in them."""
    width: tl.constexpr = S.widths[plane]
    before: tl.constexpr = bits_before(S.widths, plane)
    if width == 8:
        byte = coordinate
        shift = coordinate * 0
    else:
        byte = coordinate // (32 // width) * 4 + coordinate % 8 // 2
        shift = coordinate % 2 * 4 + coordinate // 8 % (4 // width) * width
    if S.is_value:
        address = byte // 4 * 64 + token // 4 * 16 + byte % 4 * 4 + token % 4
    else:
        address = token * S.row_bytes[plane] + byte
    found = tl.load(pages + tile + (S.planes[plane] + address), mask=coordinate < S.head_size, other=0).to(tl.int32)
    return ((found >> shift) & ((1 << width) - 1)) << before


@constexpr_function
def bits_before(widths, plane):
    """Bits of a code in the planes before this one."""
    return sum(widths[:plane])
