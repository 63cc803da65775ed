"""Files of saved pages: a safetensors file with a version and a checksum over every byte of it.

    8 bytes       length of the header
    header        JSON, padded with spaces: "__metadata__" (all strings), "pages", "tables"
    pages         uint8 [num_layers, num_pages, num_kv_heads, page_bytes], each saved page once
    tables        int32 [pages of all sequences]: each sequence's pages in order, one sequence after the other

The checksum is BLAKE2b of the whole file with the checksum's own 64 hexadecimal digits read as zeros, so a flipped bit
is found wherever it is. A header must also be, byte for byte, the one that this module writes for what it says: then
no shape, offset or name in it needs a check of its own.

Written and read layer by layer: nothing here holds a whole cache in memory.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from kvfold.errors import FileFormatError, FormatError, NotBuiltError
from kvfold.formats import TILE, KVFormat
from kvfold.layout import PageLayout

MAGIC = "kvfold-pages"
VERSION = 1

_DIGEST_BYTES = 32
_NO_CHECKSUM = "0" * (2 * _DIGEST_BYTES)
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Geometry:
    """What must agree between a file and the cache that it is read into.

    Attributes:
        format: The canonical name of the format, ``str(KVFormat)``.
        num_layers: Layers of the cache.
        num_kv_heads: KV heads of each layer.
        head_size: Coordinates of a key.
        head_size_v: Coordinates of a value.
        page_size: Tokens in a page.
    """

    format: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    page_size: int

    @property
    def layout(self) -> PageLayout:
        return PageLayout.of(self.format, self.head_size, self.head_size_v, self.page_size)

    def layer_shape(self, num_pages: int) -> tuple[int, int, int]:
        """Shape of the pages of one layer: ``(num_pages, num_kv_heads, page_bytes)``."""
        return self.layout.page_shape(num_pages, self.num_kv_heads)


@dataclass(frozen=True)
class Contents:
    """What a file holds, apart from the bytes.

    Attributes:
        geometry: Format and shapes.
        num_pages: Pages of each layer in the file.
        lengths: Tokens of each sequence.
    """

    geometry: Geometry
    num_pages: int
    lengths: tuple[int, ...]

    @property
    def table_sizes(self) -> list[int]:
        """Pages of each sequence."""
        return [-(-length // self.geometry.page_size) for length in self.lengths]

    @property
    def layer_bytes(self) -> int:
        pages, heads, page_bytes = self.geometry.layer_shape(self.num_pages)
        return pages * heads * page_bytes

    @property
    def data_bytes(self) -> int:
        """Bytes of the file after its header."""
        return self.geometry.num_layers * self.layer_bytes + 4 * sum(self.table_sizes)

    def header(self, checksum: str) -> bytes:
        """The beginning of the file, up to the first byte of the pages."""
        metadata = {"magic": MAGIC, "version": str(VERSION)}
        metadata |= {name: str(value) for name, value in asdict(self.geometry).items()}
        metadata |= {"num_pages": str(self.num_pages), "lengths": json.dumps(self.lengths), "checksum": checksum}
        shape = [self.geometry.num_layers, *self.geometry.layer_shape(self.num_pages)]
        end = self.geometry.num_layers * self.layer_bytes
        pages = {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}
        tables = {"dtype": "I32", "shape": [sum(self.table_sizes)], "data_offsets": [end, self.data_bytes]}
        body = json.dumps({"__metadata__": metadata, "pages": pages, "tables": tables}).encode()
        body += b" " * (-len(body) % 8)
        return len(body).to_bytes(8, "little") + body


def write(
    path: str | os.PathLike[str], geometry: Geometry, pages: torch.Tensor, tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> None:  # fmt: skip
    """Write some sequences, whole or not at all: a temporary file beside ``path`` takes its name in the end.

    A page that several sequences hold is written once, and bytes of tokens that none of these holds as zeros: what an
    earlier sequence left in a page is nobody's business.

    Args:
        path: Replaced if it exists.
        geometry: Of the pages.
        pages: uint8 ``[num_layers, num_pages, num_kv_heads, page_bytes]`` on any device.
        tables: For each sequence its pages.
        lengths: For each sequence its tokens.

    Raises:
        OSError: The file cannot be written. Nothing is left behind.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    filled: dict[int, int] = {}
    for table, length in zip(tables, lengths, strict=True):
        for index, page in enumerate(table):
            filled[page] = max(min(geometry.page_size, length - index * geometry.page_size), filled.get(page, 0))
    row = {page: number for number, page in enumerate(filled)}
    contents = Contents(geometry, len(filled), tuple(lengths))
    header = contents.header(_NO_CHECKSUM)
    digest = blake2b(header, digest_size=_DIGEST_BYTES)
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            for part in chain(_layers(geometry.layout, pages, filled), [_table_bytes(row, tables)]):
                digest.update(part)
                file.write(part)
            file.seek(0)
            file.write(contents.header(digest.hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _layers(layout: PageLayout, pages: torch.Tensor, filled: dict[int, int]) -> Iterator[Any]:
    """For each layer the bytes of the pages in ``filled``, without what lies beyond their tokens."""
    where = torch.tensor(list(filled), dtype=torch.int64, device=pages.device)
    stale = [(row, _bytes_from(layout, held)) for row, held in enumerate(filled.values()) if held < layout.page_size]
    for layer in pages:
        picked = layer[where].cpu()
        for row, columns in stale:
            picked[row][:, columns] = 0
        yield picked.view(-1).numpy()


def _bytes_from(layout: PageLayout, token: int) -> torch.Tensor:
    """Where in a page of one head the bytes of the tokens from ``token`` on lie."""
    tokens = torch.arange(token, layout.page_size)
    return ((tokens // TILE * layout.tile_bytes)[:, None] + layout.addresses()[tokens % TILE]).flatten()


def _table_bytes(row: dict[int, int], tables: Sequence[Sequence[int]]) -> bytes:
    return b"".join(row[page].to_bytes(4, "little") for table in tables for page in table)


class PageFile:
    """A saved file, open and verified to its last byte. Use it in a ``with`` block.

    Attributes:
        contents: Format, shapes, number of pages and lengths.
        tables: For each sequence the numbers of its pages in the file.

    Raises:
        FileFormatError: The file is corrupted, truncated, foreign or of another version; the message says which.
        OSError: The file cannot be read.
    """

    contents: Contents
    tables: list[list[int]]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open(self.path, "rb")  # noqa: SIM115 - closed by __exit__, and below when the file is refused
        try:
            header = self._read_header()
            self._verify_checksum(header)
            self._read_tables()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def require(self, geometry: Geometry) -> None:
        """Raise :class:`FileFormatError` naming every difference, unless the file is of this geometry."""
        pairs = [(f.name, getattr(self.contents.geometry, f.name), getattr(geometry, f.name)) for f in fields(Geometry)]
        differing = [f"{name} {theirs} in the file, {ours} here" for name, theirs, ours in pairs if theirs != ours]
        if differing:
            raise self._refusal(f"does not fit: {'; '.join(differing)} (PagedKVCache.load_file makes one that does)")

    def read_into(self, pages: torch.Tensor, where: Sequence[int]) -> None:
        """Copy the file's pages to the pages ``where`` of each layer of ``pages``, layer by layer."""
        target = torch.tensor(where, dtype=torch.int64, device=pages.device)
        buffer = torch.empty(self.contents.geometry.layer_shape(self.contents.num_pages), dtype=torch.uint8)
        memory: Any = buffer.numpy()
        self._file.seek(self._data_start)
        for layer in pages:
            if self._file.readinto(memory) != buffer.nbytes:
                raise self._refusal("became shorter while it was read")
            layer[target] = buffer.to(pages.device)

    def _refusal(self, reason: str) -> FileFormatError:
        return FileFormatError(f"{self.path} {reason}; nothing was loaded")

    def _read_header(self) -> bytes:
        """The header's bytes; sets ``contents``."""
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise self._refusal(f"is no {MAGIC} file, or truncated: no safetensors header in its {size} bytes")
        header = start + self._file.read(length)
        try:
            metadata = dict(json.loads(header[8:].decode())["__metadata__"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._refusal(f"is no {MAGIC} file, or damaged: it has no readable safetensors metadata") from None
        if metadata.get("magic") != MAGIC:
            raise self._refusal(f"is no {MAGIC} file: its magic is {metadata.get('magic')!r}")
        if metadata.get("version") != str(VERSION):
            raise self._refusal(f"has version {metadata.get('version')!r}, and this kvfold reads version {VERSION}")
        try:
            self.contents = _contents(metadata)
            self._checksum = str(metadata["checksum"])
            expected = self.contents.header(self._checksum)
        except (ValueError, TypeError, KeyError, FormatError, NotBuiltError) as error:
            raise self._refusal(f"is damaged, or names what this kvfold does not know: {error}") from None
        if header != expected:
            raise self._refusal("is damaged: its header contradicts itself")
        self._data_start = len(header)
        if size != len(header) + self.contents.data_bytes:
            raise self._refusal(f"is truncated or damaged: {size} bytes, not {len(header) + self.contents.data_bytes}")
        return header

    def _verify_checksum(self, header: bytes) -> None:
        digest = blake2b(self.contents.header(_NO_CHECKSUM), digest_size=_DIGEST_BYTES)
        self._file.seek(len(header))
        while chunk := self._file.read(_CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != self._checksum:
            raise self._refusal("is damaged: its checksum does not match its bytes")

    def _read_tables(self) -> None:
        self._file.seek(self._data_start + self.contents.geometry.num_layers * self.contents.layer_bytes)
        raw = self._file.read()
        numbers = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
        if set(numbers) != set(range(self.contents.num_pages)):
            raise self._refusal("is damaged: its tables name pages that it does not have, or leave some out")
        rest = iter(numbers)
        self.tables = [[next(rest) for _ in range(size)] for size in self.contents.table_sizes]


def _contents(metadata: dict[str, str]) -> Contents:
    numbers = {f.name: int(metadata[f.name]) for f in fields(Geometry) if f.name != "format"}
    lengths = tuple(json.loads(metadata["lengths"]))
    num_pages = int(metadata["num_pages"])
    if min(numbers.values()) < 1 or num_pages < 0 or any(type(length) is not int or length < 0 for length in lengths):
        raise ValueError("a count is no whole number")
    return Contents(Geometry(format=str(KVFormat.parse(metadata["format"])), **numbers), num_pages, lengths)
