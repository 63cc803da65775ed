"""What the kernels are told about one side of a layout: numbers for the compiler, and small tensors.

The kernels are specialised for a :class:`Packed` value, which travels as one compile-time argument. Tables and matrices
are made once per device.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch

from kvfold.codebooks import INT8_BITS, lloyd_max, trellis_levels
from kvfold.codecs import lloyd, trellis
from kvfold.codecs.scaling import prescale_candidates
from kvfold.layout import PageLayout
from kvfold.ops.triton.unpack import INTERPRETED
from kvfold.rotation import rotation_matrix

RULES = {"plain": 0, "unbiased": 1, "nc": 2, "mse": 3}


class Packed(NamedTuple):
    """One side of a layout, as the kernels see it.

    A *unit* is what a thread loads of one token's K at once: ``fields`` consecutive coordinates, so that coordinate
    ``fields * u + f`` is field f of unit u. Field by field, units are columns of a matrix product. A head is cut into
    at least 16 of them, the smallest contraction of a tensor core. (V is loaded by four tokens.)

    A word of a narrow plane has the codes of two or four units. So that neighbouring units are in neighbouring words,
    which are loaded sixteen bytes at a time, units then come in another order, ``unpack.place_of_unit``: with ``deep``
    of them to an element of memory, first the first one of each element, and so on.

    A trellis has one bit more to look up by, as its path bits choose among twice as many levels; where that is done by
    coordinate (``unpack.codes_of``) it is read as Lloyd–Max codes of that width. Decoding reads words of 32 path bits
    (``unpack_trellis``) and has a level in each unit, of K, and in each row, of V.

    Attributes:
        bits: Width of a code as it is looked up.
        head_size: Coordinates of a vector.
        padded: The power of two that head_size is padded to in tiles.
        is_value: Whether the planes are interleaved by four tokens (V) or token-major (K).
        widths: Bits of each plane.
        planes: Offset in the tile of each plane, in bytes.
        row_bytes: Bytes of a token's row in each plane.
        scales: Offset in the tile of the scales.
        fields: Coordinates of a unit of K.
        unit_bytes: Bytes of a unit in a plane of 4 or 8 bits; of a trellis, of the words that are loaded.
        units: Units of a vector of K, padded to a power of two.
        deep: Of narrow planes, the units of K to an element of memory, which is a word of the narrowest plane and one
            or two of others; 1 if there is a plane of 4 bits, and of V.
        rows: Of V's tile: bytes of a vector in a plane of 4 or 8 bits, padded to a power of two, or a trellis' units.
        row_levels: Coordinates of a row: the two of such a byte, or one.
        table: Up to 4 bits: the odd integers ``2 m + 1`` of the magnitudes, eight bytes as two int32.
        unpack: On NVIDIA, the instructions that look up codes: up to 4 bits for either half of a word; of a trellis for
            each of four rows.
        trellis: Whether the last plane has a trellis' path bits.
    """

    bits: int
    head_size: int
    padded: int
    is_value: bool
    widths: tuple[int, ...]
    planes: tuple[int, ...]
    row_bytes: tuple[int, ...]
    scales: int
    fields: int
    unit_bytes: int
    units: int
    deep: int
    rows: int
    row_levels: int
    table: tuple[int, ...]
    unpack: tuple[str, ...]
    trellis: bool


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=256)
def packed(layout: PageLayout, is_value: bool) -> Packed:
    """One side of a layout."""
    side, head_size, planes, scales = (
        (layout.format.v, layout.head_size_v, layout.v_planes, layout.v_scales)
        if is_value
        else (layout.format.k, layout.head_size, layout.k_planes, layout.k_scales)
    )
    coded = side.family == "trellis"
    bits = int(side.bits) + coded
    per_byte = 1 if bits == 8 else 2
    unit_bytes = 4 // per_byte * per_byte
    while unit_bytes > 1 and power_of_two(-(-head_size // (unit_bytes * per_byte))) < 16:
        unit_bytes //= 2
    fields = unit_bytes * per_byte
    if coded:
        unit_bytes, fields = 4, 1
    table: tuple[int, ...] = ()
    unpack: tuple[str, ...] = ()
    if bits <= INT8_BITS:
        integers = trellis_levels(bits - 1).integers if coded else lloyd_max(bits, head_size).integers
        assert integers is not None
        magnitudes = [int(m) for m in integers] * (8 // len(integers))
        table = struct.unpack("<2i", bytes(2 * m + 1 for m in magnitudes))
    if not INTERPRETED.value and torch.version.hip is None:
        if coded:
            unpack = tuple(_look_up_of_trellis(bits, row) for row in range(4))
        elif bits <= INT8_BITS:
            unpack = tuple(_look_up(bits, byte) for byte in (0, 2))
    units = max(128 if coded else 16, power_of_two(-(-head_size // fields)))
    row_bytes, widths = side.plane_bytes(head_size), side.planes()
    narrow = not is_value and not coded and bits <= INT8_BITS and max(widths) < 4
    deep = 4 // min(widths) if narrow and unit_bytes == 4 else 1
    sizes = [deep * width for width in widths]  # of elements, in bytes
    if any(size > 8 or row % size or start % size for size, row, start in zip(sizes, row_bytes, planes, strict=True)):
        deep = 1
    return Packed(
        bits=bits,
        head_size=head_size,
        padded=max(32, power_of_two(head_size)),
        is_value=is_value,
        widths=widths,
        planes=planes,
        row_bytes=row_bytes,
        scales=scales,
        fields=fields,
        unit_bytes=unit_bytes,
        units=units,
        deep=deep,
        rows=units if coded else max(16, power_of_two(-(-head_size // (4 * per_byte)) * 4)),
        row_levels=1 if coded else per_byte,
        table=table,
        unpack=unpack,
        trellis=coded,
    )


def _look_up(bits: int, byte: int) -> str:
    """PTX: levels of two words' codes in two bytes, as four pairs of float16 (of each byte the low, the high nibbles).

    The codes are the selectors of prmt, a look-up in eight bytes, `Packed.table`. An odd integer 2 m + 1 of eight bits
    is, under a byte with nothing but the sign, the subnormal float16 of as many times 2^-24. Tensor cores multiply
    those exactly. Operands $4 and $5 are the words; $6 and $8 (each comes twice) are the table.
    """
    both = byte | (4 + byte) << 4 | (1 + byte) << 8 | (5 + byte) << 12
    index = 0x11111111 * ((1 << (bits - 1)) - 1)
    return f"""{{
        .reg .b32 codes, index, first, second, low_signs, high_signs;
        prmt.b32 codes, $4, $5, {both:#x};
        and.b32 index, codes, {index:#x};
        prmt.b32 first, $6, $8, index;
        shr.u32 index, index, 16;
        prmt.b32 second, $6, $8, index;
        shl.b32 low_signs, codes, {8 - bits};
        and.b32 low_signs, low_signs, 0x80808080;
        shl.b32 high_signs, codes, {4 - bits};
        and.b32 high_signs, high_signs, 0x80808080;
        prmt.b32 $0, first, low_signs, 0x5240;
        prmt.b32 $1, first, high_signs, 0x5341;
        prmt.b32 $2, second, low_signs, 0x7260;
        prmt.b32 $3, second, high_signs, 0x7361;
    }}"""


def _look_up_of_trellis(bits: int, row: int) -> str:
    """PTX: levels of a word of eight indices (unpack_trellis), $4, as four pairs of float16: of the low nibbles of
    bytes 0 and 1, of 2 and 3, and of the high ones. Signs are bits 4 n + row of $5, set where nibble n's is negative.

    As :func:`_look_up`. Sixteen magnitudes are two tables without top bits: what prmt gives for an index with its top
    bit set is the top bit of another byte, eight times, so the look-ups by the index and by its complement give zero
    where they do not apply. Those magnitudes are (odd - 1) / 2. $10 is 2 and $11 is -1, unknown to the compiler: with
    them complements and sums are products, which have a unit of their own beside the one that all else wants.
    """
    first, second = "prmt.b32 first, $6, $7, $4;", "prmt.b32 second, $6, $7, upper;"
    if bits == 5:
        first += """
        mad.lo.u32 other, $4, $11, 0xffffffff;
        prmt.b32 more, $8, $9, other;
        mad.lo.u32 more, more, $10, 0x01010101;
        mad.lo.u32 first, first, $10, more;"""
        second += """
        mad.lo.u32 other, upper, $11, 0xffffffff;
        prmt.b32 more, $8, $9, other;
        mad.lo.u32 more, more, $10, 0x01010101;
        mad.lo.u32 second, second, $10, more;"""
    return f"""{{
        .reg .b32 upper, first, second, other, more, low_signs, high_signs;
        shr.u32 upper, $4, 16;
        {first}
        {second}
        shl.b32 low_signs, $5, {7 - row};
        and.b32 low_signs, low_signs, 0x80808080;
        shl.b32 high_signs, $5, {3 - row};
        and.b32 high_signs, high_signs, 0x80808080;
        prmt.b32 $0, first, low_signs, 0x5240;
        prmt.b32 $1, second, low_signs, 0x7260;
        prmt.b32 $2, first, high_signs, 0x5341;
        prmt.b32 $3, second, high_signs, 0x7361;
    }}"""


def unit_level(side: Packed) -> float:
    """What the kernels' levels are to be multiplied by: half the codebook's step, or 1 above 4 bits."""
    if side.bits > INT8_BITS:
        return 1.0
    return (trellis_levels(side.bits - 1) if side.trellis else lloyd_max(side.bits, side.head_size)).step / 2


def decoded_unit(side: Packed) -> float:
    """The same of decoding, which has trellises of all widths in units of half a step."""
    return trellis_levels(side.bits - 1).step / 2 if side.trellis else unit_level(side)


@lru_cache(maxsize=256)
def trellis_look_up(side: Packed, device: torch.device) -> torch.Tensor:
    """Int32 ``[11]``: bytes of magnitudes by the index that ``unpack_trellis`` makes, for even t and, from 4 on, for
    odd t; then 2, -1 and 0."""
    integers = trellis_levels(side.bits - 1).integers.tolist()
    odd = integers if side.bits == 5 else [2 * m + 1 for m in integers]
    even = []
    for index in range(len(odd)):  # of even t the path's bits are the other way round, and at the top if there are four
        path, refine = (index >> 2, index & 3) if side.bits == 5 else (index & 3, index >> 2)
        even.append(odd[4 * refine + (path >> 1 | path << 1 & 2)])
    # the second eight of sixteen are looked up by the index' complement
    tables = [table[:8] + table[:7:-1] if side.bits == 5 else table * (16 // len(table)) for table in (even, odd)]
    return torch.tensor(
        [*struct.unpack("<8i", bytes(tables[0] + tables[1])), 2, -1, 0], dtype=torch.int32, device=device
    )


@lru_cache(maxsize=256)
def look_up(side: Packed, device: torch.device) -> torch.Tensor:
    """Up to 4 bits: int32 with the table of odd integers (2) and, for each plane, the shifts of four octets' codes: in
    the next word where they are not in this one."""
    shifts = [octet // (4 // width) * 32 + octet % (4 // width) * width for width in side.widths for octet in range(4)]
    return torch.tensor([*side.table, *shifts], dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def split_levels(side: Packed, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """int32 ``[2^bits]``: each level as two 16-bit numbers, its rounding in the upper half, what that lacks below."""
    levels = full_levels(side, device)
    main = levels.to(dtype)
    rest = (levels - main.float()).to(dtype)
    return main.view(torch.int16).int() << 16 | (rest.view(torch.int16).int() & 0xFFFF)


@lru_cache(maxsize=256)
def full_levels(side: Packed, device: torch.device) -> torch.Tensor:
    """float32 ``[2^bits]``: the level of every code, as ``unpack.codes_of`` gives it."""
    if not side.trellis:
        return lloyd.tables(side.bits, side.head_size, device)[0]
    if side.bits > INT8_BITS:
        return trellis.stored_levels(side.bits - 1, device)
    ascending = trellis.tables(side.bits - 1, device)[0]
    positive = ascending[len(ascending) // 2 :]
    return torch.cat([positive, -positive])


@lru_cache(maxsize=256)
def ascending_levels(side: Packed, device: torch.device) -> torch.Tensor:
    """Of a trellis: float32 ``[2^bits]``, by the index ``4 r + subset``."""
    return trellis.tables(side.bits - 1, device)[0]


@lru_cache(maxsize=256)
def thresholds(side: Packed, device: torch.device) -> torch.Tensor:
    """Float32: ``[max(1, 2^(bits-1) - 1)]``, where the index of the magnitude rises; of a trellis ``[4, 2^k']``, where
    the refine bits of each subset rise, then infinity."""
    if side.trellis:
        found = trellis.tables(side.bits - 1, device)[1]
        return torch.nn.functional.pad(found, (0, 1), value=torch.inf).contiguous()
    found = lloyd.tables(side.bits, side.head_size, device)[1]
    return found if len(found) else found.new_full((1,), torch.inf)


@lru_cache(maxsize=64)
def prescales(count: int, device: torch.device) -> torch.Tensor:
    """float32 ``[count]``: the prescales to try, in order."""
    return torch.tensor(prescale_candidates(count), dtype=torch.float32, device=device)


@lru_cache(maxsize=256)
def rotation_terms(
    head_size: int,
    device: torch.device,
    inverse: bool = False,
    fields: int = 1,
    units: int = 0,
    deep: int = 1,
    trellis: bool = False,
) -> tuple[torch.Tensor, float]:
    """The rotation as a sum of bfloat16 matrices, and a factor: a row vector x becomes ``factor * (x @ sum)``.

    For heads of a power of two it is one matrix of signs, and the factor is their norm. Others take three, which
    together are as exact as float32.

    Args:
        inverse: Un-rotate instead.
        fields: With ``units``, ``deep`` and ``trellis``: the columns' order, see :class:`Packed`.

    Returns:
        ``[1 or 3, padded, padded or fields * units]``, zeros beyond the head, and the factor.
    """
    padded = max(32, power_of_two(head_size))
    units = units or padded
    column = torch.arange(fields * units)
    unit = column % units
    place = unit % (units // deep) * deep + unit // (units // deep)
    coordinate = place * fields + column // units
    if trellis:  # unpack_trellis.coordinate_of_column
        field, byte = column // (units // 8), column % (units // 8)
        coordinate = byte // 4 * 32 + field // 2 * 8 + byte % 4 * 2 + field % 2
    rotation = torch.from_numpy(rotation_matrix(head_size))
    matrix = torch.zeros(padded, fields * units, dtype=torch.float64)
    inside = coordinate < head_size
    matrix[:head_size, inside] = (rotation if inverse else rotation.T)[:, coordinate[inside]]
    if not head_size & (head_size - 1):
        return matrix.sign().to(device=device, dtype=torch.bfloat16)[None], head_size**-0.5
    terms = []
    for _ in range(3):
        terms.append(matrix.bfloat16())
        matrix = matrix - terms[-1].double()
    return torch.stack(terms).to(device), 1.0


@lru_cache(maxsize=256)
def inverse_matrix(head_size: int, device: torch.device) -> torch.Tensor:
    """R padded with zeros, float32 ``[padded, padded]``: a row vector y is un-rotated to ``y @ R``."""
    padded = max(32, power_of_two(head_size))
    matrix = torch.zeros(padded, padded, dtype=torch.float64)
    matrix[:head_size, :head_size] = torch.from_numpy(rotation_matrix(head_size))
    return matrix.to(device=device, dtype=torch.float32)
