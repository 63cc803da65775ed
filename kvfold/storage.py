"""Files of saved pages: a safetensors file with a version and a checksum over every byte of it.

    8 bytes       length of the header
    header        JSON, padded with spaces: "__metadata__" (all strings), "pages", "tables"
    pages         uint8 [num_layers, num_pages, num_kv_heads, page_bytes], each saved page once
    tables        int32 [pages of all sequences]: each sequence's pages in order, one sequence after the other
    exact_k       [num_layers, exact tokens of all sequences, num_kv_heads, head_size] in the metadata's dtype
    exact_v       [num_layers, exact tokens of all sequences, num_kv_heads, head_size_v]

The last two are in files of version 2: those of formats with exact sinks or a tail. Of each sequence they have the
sinks, and then the tokens from its ``exact_from`` on that are no sinks, in order. Other files are of version 1. Formats
with ``3t`` or ``4t``, whose bytes have changed, have versions 2.1 and 1.1.

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
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvfold.errors import FileFormatError, FormatError, NotBuiltError
from kvfold.exact_rows import DTYPES as EXACT_DTYPES
from kvfold.exact_rows import kept
from kvfold.formats import TILE, KVFormat
from kvfold.layout import PageLayout

MAGIC = "kvfold-pages"
VERSIONS = ("1", "1.1", "2", "2.1")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in EXACT_DTYPES}

_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
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
        dtype: Of exact tokens, a key of :data:`DTYPES`; None if the format has none.
    """

    format: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    page_size: int
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (DTYPES if self.version.startswith("2") else (None,)):
            raise ValueError(f"{self.dtype} is no dtype of exact tokens of {self.format}")

    @property
    def version(self) -> str:
        """Of files of this geometry."""
        fmt = KVFormat.parse(self.format)
        # the bytes of these codes have changed since the first versions
        changed = any(side.family == "trellis" and side.bits > 2 for side in (fmt.k, fmt.v))
        return ("2" if fmt.sinks or fmt.tail else "1") + (".1" if changed else "")

    @property
    def layout(self) -> PageLayout:
        return PageLayout.of(self.format, self.head_size, self.head_size_v, self.page_size)

    def layer_shape(self, num_pages: int) -> tuple[int, int, int]:
        """Shape of the pages of one layer: ``(num_pages, num_kv_heads, page_bytes)``."""
        return self.layout.page_shape(num_pages, self.num_kv_heads)

    def exact_shapes(self, tokens: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of the exact K and V of one layer: ``(tokens, num_kv_heads, head size)``."""
        heads = (tokens, self.num_kv_heads)
        return (*heads, self.head_size), (*heads, self.head_size_v)


@dataclass(frozen=True)
class Contents:
    """What a file holds, apart from the bytes.

    Attributes:
        geometry: Format and shapes.
        num_pages: Pages of each layer in the file.
        lengths: Tokens of each sequence.
        exact_from: First position of each sequence's exact tail; its length if it has none.
    """

    geometry: Geometry
    num_pages: int
    lengths: tuple[int, ...]
    exact_from: tuple[int, ...]

    def __post_init__(self) -> None:
        tail = KVFormat.parse(self.geometry.format).tail
        pairs = zip(self.lengths, self.exact_from, strict=True)
        if any(not max(0, length - tail) <= first <= length for length, first in pairs):
            raise ValueError("an exact tail begins where it cannot")

    @property
    def table_sizes(self) -> list[int]:
        """Pages of each sequence."""
        return [-(-length // self.geometry.page_size) for length in self.lengths]

    @property
    def layer_bytes(self) -> int:
        pages, heads, page_bytes = self.geometry.layer_shape(self.num_pages)
        return pages * heads * page_bytes

    @property
    def exact_tokens(self) -> int:
        """Exact tokens of all sequences."""
        fmt = KVFormat.parse(self.geometry.format)
        pairs = zip(self.lengths, self.exact_from, strict=True)
        return sum(len(part) for length, first in pairs for part in kept(fmt, length, first))

    @property
    def tensors(self) -> dict[str, tuple[str, list[int], int]]:
        """The tensors of the file in their order: dtype, shape and bytes."""
        layers = self.geometry.num_layers
        shape = [layers, *self.geometry.layer_shape(self.num_pages)]
        tensors = {
            "pages": ("U8", shape, layers * self.layer_bytes),
            "tables": ("I32", [sum(self.table_sizes)], 4 * sum(self.table_sizes)),
        }
        if self.geometry.dtype is not None:
            size = DTYPES[self.geometry.dtype].itemsize
            for name, each in zip(("exact_k", "exact_v"), self.geometry.exact_shapes(self.exact_tokens), strict=True):
                tensors[name] = (_SAFETENSORS[self.geometry.dtype], [layers, *each], layers * prod(each) * size)
        return tensors

    def offset(self, name: str) -> int:
        """Bytes between the header and a tensor."""
        sizes = {each: size for each, (_, _, size) in self.tensors.items()}
        return sum(sizes[each] for each in list(sizes)[: list(sizes).index(name)])

    @property
    def data_bytes(self) -> int:
        """Bytes of the file after its header."""
        return sum(size for _, _, size in self.tensors.values())

    def header(self, checksum: str) -> bytes:
        """The beginning of the file, up to the first byte of the pages."""
        metadata = {"magic": MAGIC, "version": self.geometry.version}
        metadata |= {name: str(value) for name, value in asdict(self.geometry).items() if value is not None}
        metadata |= {"num_pages": str(self.num_pages), "lengths": json.dumps(self.lengths)}
        if self.geometry.dtype is not None:
            metadata["exact_from"] = json.dumps(self.exact_from)
        metadata["checksum"] = checksum
        entries: dict[str, Any] = {"__metadata__": metadata}
        begin = 0
        for name, (dtype, shape, size) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        body = json.dumps(entries).encode()
        body += b" " * (-len(body) % 8)
        return len(body).to_bytes(8, "little") + body


class Exact(NamedTuple):
    """The exact tokens of the sequences that are written.

    Attributes:
        k: ``[num_layers, rows, tokens of a row, num_kv_heads, head_size]`` on any device. v: with head_size_v.
        exact_from: As in :class:`Contents`.
        where: Which tokens of all rows, in the order of the file.
    """

    k: torch.Tensor
    v: torch.Tensor
    exact_from: Sequence[int]
    where: Sequence[int]


def write(
    path: str | os.PathLike[str], geometry: Geometry, pages: torch.Tensor, tables: Sequence[Sequence[int]],
    lengths: Sequence[int], exact: Exact | None = None,
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
        exact: Their exact tokens, of a format that has any.

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
    contents = Contents(geometry, len(filled), tuple(lengths), tuple(lengths if exact is None else exact.exact_from))
    header = contents.header(_NO_CHECKSUM)
    digest = blake2b(header, digest_size=_DIGEST_BYTES)
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            packed = _layers(geometry.layout, pages, filled)
            for part in chain(packed, [_table_bytes(row, tables)], _exact_layers(exact)):
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


def _exact_layers(exact: Exact | None) -> Iterator[Any]:
    """For each layer the bytes of the exact K, and then for each of the exact V."""
    if exact is None:
        return
    where = torch.tensor(exact.where, dtype=torch.int64, device=exact.k.device)
    for x in (exact.k, exact.v):
        for layer in x:
            yield layer.flatten(0, 1)[where].cpu().view(-1).view(torch.uint8).numpy()


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

    def read_exact_into(self, k: torch.Tensor, v: torch.Tensor, where: Sequence[int]) -> None:
        """Copy the file's exact tokens to the tokens ``where`` of all rows, layer by layer: as in :class:`Exact`."""
        target = torch.tensor(where, dtype=torch.int64, device=k.device)
        shapes = self.contents.geometry.exact_shapes(self.contents.exact_tokens)
        self._file.seek(self._data_start + self.contents.offset("exact_k"))
        for x, shape in zip((k, v), shapes, strict=True):
            buffer = torch.empty(prod(shape) * x.itemsize, dtype=torch.uint8)
            memory: Any = buffer.numpy()
            for layer in x:
                if self._file.readinto(memory) != buffer.nbytes:
                    raise self._refusal("became shorter while it was read")
                layer.flatten(0, 1)[target] = buffer.view(x.dtype).view(shape).to(x.device)

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
        if metadata.get("version") not in VERSIONS:
            known = f"{', '.join(VERSIONS[:-1])} and {VERSIONS[-1]}"
            raise self._refusal(f"has version {metadata.get('version')!r}, and this kvfold reads versions {known}")
        try:
            self.contents = _contents(metadata)
            self._checksum = str(metadata["checksum"])
            expected = self.contents.header(self._checksum)
        except (ValueError, TypeError, KeyError, FormatError, NotBuiltError) as error:
            raise self._refusal(f"is damaged, or names what this kvfold does not know: {error}") from None
        version = self.contents.geometry.version
        if f"{metadata['version']}.1" == version:
            raise self._refusal(
                f"has version {metadata['version']!r}, and the bytes of {self.contents.geometry.format} have changed "
                f"since: its files are of version {version} now; store the tokens anew and save them"
            )
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
        self._file.seek(self._data_start + self.contents.offset("tables"))
        raw = self._file.read(4 * sum(self.contents.table_sizes))
        numbers = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
        if set(numbers) != set(range(self.contents.num_pages)):
            raise self._refusal("is damaged: its tables name pages that it does not have, or leave some out")
        rest = iter(numbers)
        self.tables = [[next(rest) for _ in range(size)] for size in self.contents.table_sizes]


def _contents(metadata: dict[str, str]) -> Contents:
    numbers = {f.name: int(metadata[f.name]) for f in fields(Geometry) if f.name not in ("format", "dtype")}
    lengths = tuple(json.loads(metadata["lengths"]))
    exact_from = tuple(json.loads(metadata["exact_from"])) if "dtype" in metadata else lengths
    num_pages = int(metadata["num_pages"])
    counts = (*lengths, *exact_from)
    if min(numbers.values()) < 1 or num_pages < 0 or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("a count is no whole number")
    geometry = Geometry(format=str(KVFormat.parse(metadata["format"])), **numbers, dtype=metadata.get("dtype"))
    return Contents(geometry, num_pages, lengths, exact_from)
