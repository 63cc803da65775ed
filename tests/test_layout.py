"""The layout: a bijection, the stated sizes, and a second, scalar reading of the same bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold import codecs
from kvfold.errors import FormatError, NotBuiltError
from kvfold.formats import KVFormat, Side
from kvfold.layout import PageLayout, pack_planes, unpack_planes

SIDES = ["1", "2", "3", "4", "5", "6", "7", "8", "2t", "3t", "4t", "f8", "f8cast", "bf16", "f16", "f32"]
HEAD_SIZES = [32, 64, 80, 96, 112, 128, 192, 256, 8, 9, 33, 40, 72, 127, 129, 255, 576]


def side(text: str) -> Side:
    return KVFormat.parse(f"k{text}v{text}").k


def vectors(count: int, head_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, head_size, generator=torch.Generator().manual_seed(seed))


def tile_of(layout: PageLayout, records: torch.Tensor) -> list[int]:
    """The bytes of a tile with these sixteen records; 0xEE where nothing was written."""
    tile = torch.full((layout.tile_bytes,), 0xEE, dtype=torch.uint8)
    tile[layout.addresses()] = records
    return tile.tolist()


# --- a second implementation, from the words of the module alone ------------------------------------------------------
#
# Scalar and slow on purpose: one bit at a time, and no function of kvfold.

WIDTHS_OF_PLANES = {  # a code in planes of 4, 2 and 1 bits, lowest bits first; 8 bits and more whole
    "1": (1,),
    "2": (2,),
    "3": (2, 1),
    "4": (4,),
    "5": (4, 1),
    "6": (4, 2),
    "7": (4, 2, 1),
    "8": (8,),
    "2t": (1, 1),  # of a trellis code the highest bit, the path's, has the last plane for itself
    "3t": (2, 1),
    "4t": (2, 1, 1),
    "f8": (8,),
    "f8cast": (8,),
    "bf16": (16,),
    "f16": (16,),
    "f32": (32,),
}
HAS_SCALE = {"1", "2", "3", "4", "5", "6", "7", "8", "2t", "3t", "4t", "f8"}


def row_bytes(head_size: int, width: int) -> int:
    """A plane's row is padded to whole 32-bit words."""
    return (head_size * width + 31) // 32 * 4


def bit_address(token: int, element: int, bit: int, width: int, head_size: int, is_value: bool) -> tuple[int, int]:
    """Byte inside a plane, and bit inside the byte, of one bit of one element of one token."""
    if width >= 8:  # plain little-endian elements
        position = element * width + bit
        word, inside = position // 32, position % 32
    else:
        elements_of_word = 32 // width
        rows = 4 // width  # rows of eight elements that share a word
        nibble = element % 8
        row = (element // 8) % rows
        word, inside = element // elements_of_word, 4 * nibble + width * row + bit
    byte_of_word = inside // 8
    if is_value and width <= 8:  # [word][token // 4][byte of the word][token % 4]
        return 64 * word + 16 * (token // 4) + 4 * byte_of_word + token % 4, inside % 8
    return token * row_bytes(head_size, width) + 4 * word + byte_of_word, inside % 8


def read_code(tile: list[int], start: int, name: str, head_size: int, token: int, element: int, is_value: bool) -> int:
    """The code of one element of one token, from the tile's bytes; ``start`` is where the side's planes begin."""
    code = shift = 0
    for width in WIDTHS_OF_PLANES[name]:
        for bit in range(width):
            byte, place = bit_address(token, element, bit, width, head_size, is_value)
            code |= (tile[start + byte] >> place & 1) << (shift + bit)
        start += 16 * row_bytes(head_size, width)
        shift += width
    return code


def read_scale(tile: list[int], start: int, token: int) -> int:
    return tile[start + 2 * token] | tile[start + 2 * token + 1] << 8


SCALAR = [
    ("4", "4", 128, 128),
    ("3", "3", 128, 128),
    ("2", "1", 64, 64),
    ("8", "4", 96, 96),
    ("4", "8", 64, 64),
    ("5", "7", 80, 80),
    ("6", "3", 112, 112),
    ("7", "2", 40, 72),
    ("3", "5", 33, 127),
    ("1", "6", 9, 8),
    ("f8", "3", 64, 64),
    ("f8cast", "f8", 72, 40),
    ("bf16", "4", 40, 64),
    ("4", "bf16", 64, 33),
    ("f16", "f32", 9, 17),
    ("f8cast", "f8cast", 33, 9),
    ("4t", "2t", 128, 64),
    ("2t", "3t", 80, 96),
    ("3t", "4t", 33, 40),
    ("4", "3t", 64, 9),
]


@pytest.mark.parametrize(
    ("k_name", "v_name", "d_k", "d_v"), SCALAR, ids=[f"k{k}v{v}-d{d_k}-d{d_v}" for k, v, d_k, d_v in SCALAR]
)
def test_a_second_reading_finds_every_code_and_scale(k_name: str, v_name: str, d_k: int, d_v: int) -> None:
    layout = PageLayout.of(f"k{k_name}v{v_name}", d_k, d_v)
    k, v = vectors(16, d_k, seed=1), vectors(16, d_v, seed=2)
    tile = tile_of(layout, layout.encode(k, v))

    start = 0
    scales = 16 * sum(
        row_bytes(size, width) for name, size in ((k_name, d_k), (v_name, d_v)) for width in WIDTHS_OF_PLANES[name]
    )
    for name, x, is_value in ((k_name, k, False), (v_name, v, True)):
        head_size = x.shape[-1]
        codes, scale = codecs.encode(x, side(name))
        unsigned = codes.long() & ((1 << codes.element_size() * 8) - 1)
        read = [[read_code(tile, start, name, head_size, t, e, is_value) for e in range(head_size)] for t in range(16)]
        assert read == unsigned.tolist()
        start += 16 * sum(row_bytes(head_size, width) for width in WIDTHS_OF_PLANES[name])
        if name in HAS_SCALE:
            assert scale is not None
            patterns = scale.view(torch.int16).long() & 0xFFFF
            assert [read_scale(tile, scales, t) for t in range(16)] == patterns.tolist()
            scales += 32
    assert scales == len(tile)


# --- sizes and the bijection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v_name", SIDES, ids=lambda name: f"v{name}")
@pytest.mark.parametrize("k_name", SIDES, ids=lambda name: f"k{name}")
def test_addresses_are_a_bijection_onto_the_tile(k_name: str, v_name: str) -> None:
    fmt = KVFormat.parse(f"k{k_name}v{v_name}")
    for head_size, head_size_v in zip(HEAD_SIZES, HEAD_SIZES[3:] + HEAD_SIZES[:3], strict=True):
        for layout in (PageLayout(fmt, head_size, head_size), PageLayout(fmt, head_size, head_size_v)):
            what = f"head sizes {layout.head_size} and {layout.head_size_v}"
            assert layout.token_bytes == fmt.bytes_per_token(layout.head_size, layout.head_size_v), what
            assert layout.tile_bytes == 16 * layout.token_bytes, what
            assert layout.tile_bytes % 16 == 0, what
            addresses = layout.addresses()
            assert addresses.shape == (16, layout.token_bytes), what
            assert np.array_equal(np.sort(addresses.flatten().numpy()), np.arange(layout.tile_bytes)), what


@pytest.mark.parametrize("name", [f"k{name}v{name}" for name in SIDES])
def test_parts_of_the_tile_follow_each_other(name: str) -> None:
    for head_size in HEAD_SIZES:
        layout = PageLayout.of(name, head_size, 2 * head_size if head_size <= 512 else head_size)
        k, v = layout.format.k, layout.format.v
        expected, offset = [], 0
        for size in [*k.plane_bytes(layout.head_size), *v.plane_bytes(layout.head_size_v)]:
            expected.append(offset)
            offset += 16 * size
        assert [*layout.k_planes, *layout.v_planes] == expected
        assert layout.k_scales == offset
        assert layout.v_scales == offset + 32 * k.scaled
        assert layout.v_scales + 32 * v.scaled == layout.tile_bytes
        starts = (*expected, layout.k_scales, layout.v_scales)
        assert all(start % 16 == 0 for start in starts), "16-byte loads are aligned"


def test_worked_example_of_the_documentation() -> None:
    layout = PageLayout.of("k4v4", 128)
    assert (layout.k_planes, layout.v_planes) == ((0,), (1024,))
    assert (layout.k_scales, layout.v_scales) == (2048, 2080)
    assert (layout.token_bytes, layout.tile_bytes, layout.page_bytes) == (132, 2112, 8448)
    # the code of coordinate 77 of token 6
    where = layout.addresses()[6].tolist()
    assert where[38] == 6 * 64 + 4 * 9 + 2 == 422  # K: word 9, nibble 5 = high half of byte 2
    assert where[64 + 38] == 1024 + 64 * 9 + 16 * 1 + 4 * 2 + 2 == 1626
    assert where[128:] == [2060, 2061, 2092, 2093]


def test_worked_example_of_a_key_reference() -> None:
    layout = PageLayout.of("k4v4+mean", 128)
    assert (layout.reference, layout.page_bytes) == (8448, 8592)
    assert layout.tile_bytes == 2112, "a tile knows no reference"
    page = torch.full((layout.page_bytes,), 0xEE, dtype=torch.uint8)
    page[layout.reference :] = layout.encode_reference(torch.linspace(-127, 127, 128))
    assert page[8448:8576].view(torch.int8).tolist() == torch.linspace(-127, 127, 128).round().int().tolist()
    assert page[8576:8590].tolist() == [0] * 14
    assert page[8590:].tolist() == [0x80, 0x3F], "1.0 as a bfloat16"


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_a_page_is_a_row_of_tiles(page_size: int) -> None:
    layout = PageLayout.of("k3v4", 96, 80, page_size)
    assert layout.page_bytes == page_size // 16 * layout.tile_bytes
    assert layout.page_shape(7, 3) == (7, 3, layout.page_bytes)
    assert torch.equal(layout.addresses(), PageLayout.of("k3v4", 96, 80, 16).addresses()), "a tile knows no page size"


def test_page_sizes_cost_the_same_per_token() -> None:
    assert len({PageLayout.of("k5v2", 80, page_size=size).page_bytes // size for size in (16, 32, 64)}) == 1


def test_head_size_of_v_defaults_to_that_of_k() -> None:
    assert PageLayout.of("k4v4", 96) == PageLayout.of("turboquant", 96, 96)
    assert PageLayout.of("k4v4", 96) is PageLayout.of(KVFormat.parse("k4v4"), 96, 96, 64)


def test_a_layout_is_frozen_and_hashable() -> None:
    layout = PageLayout.of("k4v4", 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.page_size = 16  # type: ignore[misc]
    assert len({layout, PageLayout.of("k4v4", 64), PageLayout.of("k4v4", 64, page_size=32)}) == 2


# --- what the kernels rely on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIDES)
def test_k_rows_are_contiguous(name: str) -> None:
    layout = PageLayout.of(f"k{name}v{name}", 80)
    where, start = layout.addresses(), 0
    for size in layout.format.k.plane_bytes(80):
        for token in range(16):
            assert torch.equal(where[token, start : start + size].diff(), torch.ones(size - 1, dtype=torch.int64))
        start += size


@pytest.mark.parametrize("name", [name for name in SIDES if name not in ("bf16", "f16", "f32")])
def test_four_consecutive_tokens_of_v_share_a_32_bit_load(name: str) -> None:
    layout = PageLayout.of(f"k{name}v{name}", 80)
    k_bytes = sum(layout.format.k.plane_bytes(80))
    where = layout.addresses()[:, k_bytes : k_bytes + sum(layout.format.v.plane_bytes(80))]
    for first in range(0, 16, 4):
        assert torch.all(where[first] % 4 == 0)
        for step in range(1, 4):
            assert torch.equal(where[first + step], where[first] + step)


@pytest.mark.parametrize("name", ["bf16", "f16", "f32"])
def test_wide_planes_of_v_are_token_major(name: str) -> None:
    layout = PageLayout.of(f"k{name}v{name}", 40)
    size = layout.format.v.plane_bytes(40)[0]
    where = layout.addresses()[:, -size:]
    assert torch.equal(where, 16 * size + torch.arange(16 * size).view(16, size))


@pytest.mark.parametrize("name", [*map(str, range(1, 8)), "2t", "3t", "4t"])
def test_a_masked_word_holds_eight_consecutive_codes_in_its_nibbles(name: str) -> None:
    """What a byte look-up with nibbles as selectors reads, with planes combined nibble by nibble."""
    s, bits = side(name), int(name[0])
    codes = torch.randint(0, 2**bits, (1, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    rows = [row.contiguous().view(torch.int32).long().flatten() & 0xFFFFFFFF for row in pack_planes(codes, s)]
    for group in range(8):  # eight elements 8 * group ... 8 * group + 7
        selectors = shift = 0
        for words, width in zip(rows, s.planes(), strict=True):
            per_word = 4 // width  # groups of eight in a word
            mask = int(f"{(1 << width) - 1:x}" * 8, 16)
            selectors |= (int(words[group // per_word]) >> width * (group % per_word) & mask) << shift
            shift += width
        # A plane of 4 bits fills the nibble; what lies above it is a selector of its own.
        first, low = int(rows[0][group // (4 // s.planes()[0])]), codes[0, 8 * group : 8 * group + 8]
        nibbles = selectors if bits <= 4 else first
        assert [nibbles >> 4 * nibble & 15 for nibble in range(8)] == (low & 15).tolist()


# --- planes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*map(str, range(1, 9)), "2t", "3t", "4t"]),
    st.integers(1, 300),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_planes_round_trip(name: str, head_size: int, count: int, seed: int) -> None:
    s, bits = side(name), int(name[0])
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (count, head_size), dtype=np.uint8))
    rows = pack_planes(codes, s)
    assert [row.shape for row in rows] == [(count, size) for size in s.plane_bytes(head_size)]
    assert all(row.dtype == torch.uint8 for row in rows)
    assert torch.equal(unpack_planes(rows, s, head_size), codes)
    # as many ones in the planes as in the codes: the padding is zero, so that equal codes are equal bytes
    ones = sum(np.unpackbits(row.contiguous().numpy()).sum() for row in rows)
    assert ones == np.unpackbits(codes.numpy()).sum()


@pytest.mark.parametrize("name", [*map(str, range(1, 9)), "2t", "3t", "4t"])
@pytest.mark.parametrize("fill", ["zeros", "ones"])
def test_planes_of_the_extreme_codes(name: str, fill: str) -> None:
    s, bits = side(name), int(name[0])
    codes = torch.full((2, 64), 0 if fill == "zeros" else 2**bits - 1, dtype=torch.uint8)
    rows = pack_planes(codes, s)
    assert all(torch.all(row == (0 if fill == "zeros" else 255)) for row in rows)
    assert torch.equal(unpack_planes(rows, s, 64), codes)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("bf16", torch.int16), ("f16", torch.int16), ("f32", torch.int32)]), st.integers(1, 70), st.data()
)
def test_wide_planes_round_trip(kind: tuple[str, torch.dtype], head_size: int, data: st.DataObject) -> None:
    name, dtype = kind
    info = torch.iinfo(dtype)
    values = data.draw(st.lists(st.integers(info.min, info.max), min_size=head_size, max_size=head_size))
    codes = torch.tensor([values, values[::-1]], dtype=dtype)
    rows = pack_planes(codes, side(name))
    assert rows[0].shape[-1] == side(name).plane_bytes(head_size)[0]
    assert torch.equal(unpack_planes(rows, side(name), head_size), codes)


# --- records ----------------------------------------------------------------------------------------------------------

RECORDS = [
    "k4v4", "k3v3", "k8v4", "k5v7", "k1v2", "k2tv4t", "k3tv3", "kf8v3", "kf8castvf8", "kbf16v6", "k4vf32", "exact",
]  # fmt: skip


@pytest.mark.parametrize("sizes", [(128, 128), (96, 80), (33, 40)], ids=str)
@pytest.mark.parametrize("name", RECORDS)
def test_records_decode_to_what_the_codecs_say(name: str, sizes: tuple[int, int]) -> None:
    layout = PageLayout.of(name, *sizes)
    k, v = vectors(6, sizes[0], seed=1).view(2, 3, -1), vectors(6, sizes[1], seed=2).view(2, 3, -1)
    records = layout.encode(k, v)
    assert records.shape == (2, 3, layout.token_bytes)
    assert records.dtype == torch.uint8
    for x, decoded, s in zip((k, v), layout.decode(records), (layout.format.k, layout.format.v), strict=True):
        assert torch.equal(decoded, codecs.decode(*codecs.encode(x, s), s))


@pytest.mark.parametrize("name", RECORDS)
def test_no_records_at_all(name: str) -> None:
    layout = PageLayout.of(name, 64)
    k, v = layout.decode(layout.encode(torch.empty(0, 64), torch.empty(0, 64)))
    assert k.shape == v.shape == (0, 64)


@pytest.mark.parametrize("name", RECORDS)
def test_one_record_decodes_as_in_a_batch(name: str) -> None:
    """Also where a record is no multiple of four bytes, because only one side stores a scale."""
    layout = PageLayout.of(name, 64)
    records = layout.encode(vectors(3, 64), vectors(3, 64, seed=9))
    expected = layout.decode(records)
    for one in (records[1], records[1:2], records[1:2].clone()):
        for decoded, wanted in zip(layout.decode(one), expected, strict=True):
            assert torch.equal(decoded.flatten(), wanted[1])


@pytest.mark.parametrize("name", ["k4v3", "k4vf32", "kf8castv4"])
def test_records_are_read_from_anywhere(name: str) -> None:
    """A view into a larger buffer is not contiguous, and begins at no even address in general."""
    layout = PageLayout.of(name, 64)
    records = layout.encode(vectors(5, 64), vectors(5, 64, seed=9))
    wide = torch.zeros(5, layout.token_bytes + 3, dtype=torch.uint8)
    wide[:, 1:-2] = records
    for got, expected in zip(layout.decode(wide[:, 1:-2]), layout.decode(records), strict=True):
        assert torch.equal(got, expected)


def test_a_vector_that_is_not_finite_stays_inside_its_record() -> None:
    layout = PageLayout.of("k4v4", 64)
    k, v = vectors(4, 64), vectors(4, 64, seed=1)
    k[2, 5] = float("nan")
    decoded_k, decoded_v = layout.decode(layout.encode(k, v))
    assert decoded_k.isnan().any(-1).tolist() == [False, False, True, False]
    assert not decoded_v.isnan().any()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k4qv4q", "k4v4q", "k4av4", "2.5", "k4qv4+mean", "vllm:4bit_nc", "metal:q8_0/q3_0"])
def test_formats_that_are_not_built(name: str) -> None:
    with pytest.raises(NotBuiltError, match="not built yet"):
        PageLayout.of(name, 128)


@pytest.mark.parametrize("sizes", [(0, 128), (-1, 128), (1025, 128), (128, 1025), (128, -4), (128, 0)], ids=str)
def test_head_sizes_that_do_not_exist(sizes: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="head size"):
        PageLayout.of("k4v4", *sizes)


@pytest.mark.parametrize("page_size", [0, 1, 8, 48, 128, "64"])
def test_page_sizes_that_do_not_exist(page_size: object) -> None:
    with pytest.raises(FormatError, match="page_size"):
        PageLayout.of("k4v4", 128, page_size=page_size)  # type: ignore[arg-type]


def test_sizes_are_integers() -> None:
    """Equal numbers share a cache entry: a float that slips in once would answer for the integer ever after."""
    with pytest.raises(FormatError):
        PageLayout.of("k4v4", 24, page_size=32.0)  # type: ignore[arg-type]
    PageLayout.of("k4v4", 28)
    with pytest.raises(FormatError):
        PageLayout.of("k4v4", 28.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["k4v4", "k4vbf16", "kbf16v4", "k8vf8"])
def test_heads_too_small_to_rotate(name: str) -> None:
    with pytest.raises(FormatError, match=r"too small.*use bf16"):
        PageLayout.of(name, 7)
    assert PageLayout.of(name, 8).token_bytes > 0


@pytest.mark.parametrize("name", ["kf8vf8", "bf16", "fp32", "fp8_cast"])
def test_small_heads_may_be_kept_without_rotation(name: str) -> None:
    layout = PageLayout.of(name, 1)
    x = torch.full((3, 1), 448.0)  # the scale of fp8 is then 1
    assert all(torch.equal(decoded, x) for decoded in layout.decode(layout.encode(x, x)))
