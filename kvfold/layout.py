"""Where each byte of a page lies, and the reference that packs and unpacks it.

Pages are one uint8 tensor ``[num_pages, num_kv_heads, page_bytes]``. A page of one KV head is a row of **tiles** of 16
tokens, so that pages of 16, 32 and 64 tokens differ only in how many tiles they have, and any two consecutive tiles are
one contiguous copy. A tile is (docs/layout.md has the drawing)

    K plane 0 | K plane 1 ... | V plane 0 | V plane 1 ... | K scales 16 x bf16 | V scales 16 x bf16

and nothing else: it is a permutation of the bytes of its sixteen tokens' records, and always a multiple of 16 bytes.
Behind the tiles a page of a ``+mean`` format has its **key reference**: a vector in the stored basis that was
subtracted from the page's keys before they were quantised, d int8 codes and, in the last two bytes, a bfloat16 scale.

**Planes.** A code of b bits is cut into planes of 4, 2 and 1 bits (``Side.planes``), lowest bits first. In a plane of
w <= 4 bits a 32-bit word has eight nibbles. Element ``e`` lies in nibble ``e % 8``; the ``4/w`` rows of eight elements
that share a word lie side by side inside each nibble, row ``(e // 8) % (4/w)`` at bit ``w * row``. So a word masked
with 0xF.., 0x3.. or 0x1.. has the codes of eight consecutive elements in its eight nibbles, which is what ``prmt`` (a
four-way byte look-up with nibbles as selectors) reads, and planes of different widths combine nibble by nibble. Planes
of 8 bits and more are plain little-endian elements. A plane's row is padded to whole words: for head sizes that are
multiples of 32 nothing is padded.

**K rows are token-major**: token t's row is contiguous. A thread of a tensor-core quad reads a quarter of a row, which
is the A operand of S = K q^T up to a permutation of the coordinates, and that permutation is merged into q.

**V rows are interleaved by four tokens**: word c of the tile's sixteen rows occupies 64 bytes as
``[token // 4][byte of the word][token % 4]``, so that a 32-bit load holds the same byte of four consecutive tokens,
which is what O = V^T p wants, and 16-byte loads of a warp are contiguous.
(Planes wider than 8 bits are token-major in V too.)

A byte of codes belongs to one token: storing a token touches no neighbour and reads nothing back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from kvfold import codecs
from kvfold.formats import SCALE_BYTES, TILE, KVFormat, Side, check_head_size, check_heads, check_page_size


@dataclass(frozen=True)
class PageLayout:
    """The layout of the pages of one KV head: a format, the head sizes and the page size.

    Attributes:
        format: What K and V are stored as.
        head_size: Coordinates of a key.
        head_size_v: Coordinates of a value.
        page_size: Tokens in a page: 16, 32 or 64.

    Raises:
        NotBuiltError: The format needs something that is not built yet.
        FormatError: A head size or page size that does not exist.
    """

    format: KVFormat
    head_size: int
    head_size_v: int
    page_size: int = 64

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        check_heads(self.format, check_head_size(self.head_size), check_head_size(self.head_size_v))

    @staticmethod
    def of(spec: str | KVFormat, head_size: int, head_size_v: int | None = None, page_size: int = 64) -> PageLayout:
        """The layout for a format in any spelling; ``head_size_v`` defaults to ``head_size``."""
        return _layout(KVFormat.parse(spec), head_size, head_size if head_size_v is None else head_size_v, page_size)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's record."""
        return self.format.bytes_per_token(self.head_size, self.head_size_v)

    @cached_property
    def tile_bytes(self) -> int:
        return TILE * self.token_bytes

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a page of one KV head."""
        return self.format.page_bytes(self.page_size, self.head_size, self.head_size_v)

    @cached_property
    def reference(self) -> int:
        """Offset in the page of the key reference (also where it would be, if the format has none)."""
        return self.page_size * self.token_bytes

    @cached_property
    def k_planes(self) -> tuple[int, ...]:
        """Offset in the tile of each plane of K."""
        return _running(0, self.format.k.plane_bytes(self.head_size))[:-1]

    @cached_property
    def v_planes(self) -> tuple[int, ...]:
        """Offset in the tile of each plane of V."""
        start = TILE * sum(self.format.k.plane_bytes(self.head_size))
        return _running(start, self.format.v.plane_bytes(self.head_size_v))[:-1]

    @cached_property
    def k_scales(self) -> int:
        """Offset in the tile of K's 16 scales (also where they would be, if the side stores none)."""
        codes = self.format.k.plane_bytes(self.head_size) + self.format.v.plane_bytes(self.head_size_v)
        return TILE * sum(codes)

    @cached_property
    def v_scales(self) -> int:
        """Offset in the tile of V's 16 scales."""
        return self.k_scales + (TILE * SCALE_BYTES if self.format.k.scaled else 0)

    def page_shape(self, num_pages: int, num_kv_heads: int) -> tuple[int, int, int]:
        """Shape of the uint8 tensor of pages."""
        return (num_pages, num_kv_heads, self.page_bytes)

    def addresses(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 ``[16, token_bytes]``: where in the tile each byte of each token's record lies. A bijection."""
        return _addresses(self, torch.device(device))

    # --- records: the bytes of one token, in the order K planes, V planes, K scale, V scale ---------------------------

    def encode(self, k: torch.Tensor, v: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors ``[..., head_size]`` and ``[..., head_size_v]`` to records ``[..., token_bytes]`` uint8.

        Args:
            reference: ``[..., head_size]`` float32, the key references of their pages in the stored basis.
        """
        parts, scales = [], []
        for x, side, subtracted in ((k, self.format.k, reference), (v, self.format.v, None)):
            codes, scale = codecs.encode(x, side, subtracted)
            parts += pack_planes(codes, side)
            if scale is not None:
                scales.append(scale.unsqueeze(-1).view(torch.uint8))
        return torch.cat([*parts, *scales], dim=-1)

    def decode(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Records ``[..., token_bytes]`` to K and V in float32, *in the stored basis* (rotated where the side is).

        In a ``+mean`` format K lacks its page's reference: add :meth:`decode_reference`.
        """
        k_planes = self.format.k.plane_bytes(self.head_size)
        v_planes = self.format.v.plane_bytes(self.head_size_v)
        k_scale, v_scale = (SCALE_BYTES * side.scaled for side in (self.format.k, self.format.v))
        parts = list(records.split([*k_planes, *v_planes, k_scale, v_scale], dim=-1))
        scales = [part.contiguous().view(torch.bfloat16).squeeze(-1) if part.shape[-1] else None for part in parts[-2:]]
        k_codes = unpack_planes(parts[: len(k_planes)], self.format.k, self.head_size)
        v_codes = unpack_planes(parts[len(k_planes) : -2], self.format.v, self.head_size_v)
        return codecs.decode(k_codes, scales[0], self.format.k), codecs.decode(v_codes, scales[1], self.format.v)

    # --- the key reference of a page ----------------------------------------------------------------------------------

    def encode_reference(self, mean: torch.Tensor) -> torch.Tensor:
        """Vectors ``[..., head_size]`` in the stored basis, finite, to their bytes ``[..., reference_bytes]``."""
        largest = mean.float().abs().amax(dim=-1, keepdim=True)
        scale = (largest / 127).bfloat16()
        inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
        inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
        codes = (mean.float() * inverse).round().clamp(-127, 127).to(torch.int8)
        record = mean.new_zeros((*mean.shape[:-1], self.format.reference_bytes(self.head_size)), dtype=torch.uint8)
        record[..., : self.head_size] = codes.view(torch.uint8)
        record[..., -SCALE_BYTES:] = scale.view(torch.uint8)
        return record

    def decode_reference(self, pages: torch.Tensor) -> torch.Tensor:
        """References ``[..., head_size]`` float32, in the stored basis, of pages ``[..., page_bytes]``, or of what
        lies in them from :attr:`reference` on: whoever picks pages picks from there, and copies no tiles."""
        record = pages[..., -self.format.reference_bytes(self.head_size) :]
        codes = record[..., : self.head_size].contiguous().view(torch.int8)
        return codes.float() * record[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).float()


@lru_cache(maxsize=1024, typed=True)
def _layout(fmt: KVFormat, head_size: int, head_size_v: int, page_size: int) -> PageLayout:
    return PageLayout(fmt, head_size, head_size_v, page_size)


def _running(start: int, row_bytes: tuple[int, ...]) -> tuple[int, ...]:
    offsets = [start]
    for size in row_bytes:
        offsets.append(offsets[-1] + TILE * size)
    return tuple(offsets)


@lru_cache(maxsize=256)
def _addresses(layout: PageLayout, device: torch.device) -> torch.Tensor:
    token = torch.arange(TILE)[:, None]
    columns = []
    k, v = layout.format.k, layout.format.v
    for offset, size in zip(layout.k_planes, k.plane_bytes(layout.head_size), strict=True):
        columns.append(offset + token * size + torch.arange(size))
    for offset, size, width in zip(layout.v_planes, v.plane_bytes(layout.head_size_v), v.planes(), strict=True):
        byte = torch.arange(size)
        if width > 8:
            columns.append(offset + token * size + byte)
        else:
            columns.append(offset + (byte // 4) * 64 + (token // 4) * 16 + (byte % 4) * 4 + token % 4)
    for offset, side in ((layout.k_scales, k), (layout.v_scales, v)):
        if side.scaled:
            columns.append(offset + token * SCALE_BYTES + torch.arange(SCALE_BYTES))
    return torch.cat(columns, dim=1).to(device)


def pack_planes(codes: torch.Tensor, side: Side) -> list[torch.Tensor]:
    """Codes ``[..., d]`` to the rows of each plane, uint8 ``[..., plane_bytes]``."""
    rows, shift = [], 0
    for width, row_bytes in zip(side.planes(), side.plane_bytes(codes.shape[-1]), strict=True):
        if width >= 8:
            row = codes.contiguous().view(torch.uint8)
            rows.append(torch.nn.functional.pad(row, (0, row_bytes - row.shape[-1])))
            continue
        per_nibble = 4 // width
        bits = (codes.to(torch.int64) >> shift) & ((1 << width) - 1)
        bits = torch.nn.functional.pad(bits, (0, row_bytes * 8 // width - bits.shape[-1]))
        bits = bits.unflatten(-1, (row_bytes // 4, per_nibble, 8))  # word, row inside the nibble, nibble
        place = width * torch.arange(per_nibble, device=codes.device)[:, None] + 4 * torch.arange(
            8, device=codes.device
        )
        words = (bits << place).sum(dim=(-2, -1))
        rows.append(words.to(torch.int32).view(torch.uint8).reshape(*codes.shape[:-1], row_bytes))
        shift += width
    return rows


def unpack_planes(rows: list[torch.Tensor], side: Side, head_size: int) -> torch.Tensor:
    """Undo :func:`pack_planes`: the rows of each plane to codes ``[..., head_size]``."""
    if side.planes()[0] >= 8:
        integer = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[side.planes()[0]]
        return rows[0].clone(memory_format=torch.contiguous_format).view(integer)[..., :head_size]
    codes, shift = None, 0
    for row, width in zip(rows, side.planes(), strict=True):
        per_nibble = 4 // width
        words = row.clone(memory_format=torch.contiguous_format).view(torch.int32)[..., None, None]
        place = width * torch.arange(per_nibble, device=row.device)[:, None] + 4 * torch.arange(8, device=row.device)
        bits = ((words >> place) & ((1 << width) - 1)).flatten(-3)[..., :head_size] << shift
        codes = bits if codes is None else codes | bits
        shift += width
    assert codes is not None
    return codes.to(torch.uint8)
