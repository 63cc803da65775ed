"""Files of saved pages: what comes back, and that anything else is refused with the cache unchanged."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvfold import storage
from kvfold.cache import PagedKVCache
from kvfold.errors import CapacityError, FileFormatError, UnknownSequenceError
from kvfold.storage import VERSIONS, Geometry, PageFile

LAYERS, HEADS, DK, DV = 2, 2, 16, 24
SIZES: dict[str, Any] = {
    "format": "k4v4", "num_layers": LAYERS, "num_kv_heads": HEADS, "head_size": DK, "head_size_v": DV, "page_size": 16,
}  # fmt: skip


def make(num_pages: int = 12, **changes: Any) -> PagedKVCache:
    cache = PagedKVCache(num_pages=num_pages, **(SIZES | changes))
    cache.pages.fill_(0xFF)
    return cache


def append(cache: PagedKVCache, seq: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = (cache.num_layers, tokens, cache.num_kv_heads)
    k = torch.randn(*heads, cache.layout.head_size, generator=generator)
    cache.append(seq, k, torch.randn(*heads, cache.layout.head_size_v, generator=generator))


def family(**changes: Any) -> PagedKVCache:
    """Sequences 0 (40 tokens), 1 (37 of its tokens and 4 of its own), 2 (a fork of 1), 4 (empty), 5 (16)."""
    cache = make(**changes)
    first = cache.new_sequence()
    append(cache, first, 40, 0)
    second = cache.fork(first)
    cache.truncate(second, 37)
    append(cache, second, 4, 1)
    cache.fork(second)
    cache.free(cache.new_sequence())
    cache.new_sequence()
    append(cache, cache.new_sequence(), 16, 2)
    return cache


def contents(cache: PagedKVCache, seqs: list[int]) -> list[list[torch.Tensor]]:
    return [[x for layer in range(cache.num_layers) for x in cache.load(layer, seq)] for seq in seqs]


def sharing(cache: PagedKVCache, seqs: list[int]) -> list[list[int]]:
    """Block tables with pages renumbered in order of appearance."""
    number: dict[int, int] = {}
    tables = [cache._held[seq].table for seq in seqs]
    return [[number.setdefault(page, len(number)) for page in table] for table in tables]


def assert_same(one: PagedKVCache, seqs: list[int], other: PagedKVCache, others: list[int]) -> None:
    assert [one.length(seq) for seq in seqs] == [other.length(seq) for seq in others]
    assert sharing(one, seqs) == sharing(other, others)
    for xs, ys in zip(contents(one, seqs), contents(other, others), strict=True):
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(x, y)


def state(cache: PagedKVCache) -> Any:
    return (
        {seq: (list(held.table), held.length) for seq, held in cache._held.items()}, sorted(cache._allocator.free),
        list(cache._allocator.references), cache.pages.numpy().tobytes(),
    )  # fmt: skip


class Refused:
    """A cache with something in it, which must refuse a file and stay as it is to the byte."""

    def __init__(self, **changes: Any) -> None:
        self.cache = make(**changes)
        append(self.cache, self.cache.new_sequence(), 20, 7)
        self.before = state(self.cache)

    def __call__(self, path: Path, message: str) -> None:
        for load in (self.cache.restore, PagedKVCache.load_file):
            with pytest.raises(FileFormatError, match=message) as caught:
                load(path)
            assert str(path) in str(caught.value)
            assert "nothing was loaded" in str(caught.value)
        assert state(self.cache) == self.before


EXACT = "k4v4+sinks3+tail6"


@pytest.fixture
def saved_exact(tmp_path: Path) -> Path:
    """The family in a format with exact tokens, of which a truncated sequence has fewer."""
    path = tmp_path / "exact.safetensors"
    family(format=EXACT, dtype=torch.float32).save(path)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "cache.safetensors"
    family().save(path)
    return path


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("format", ["k4v4", "k3v2+plain", "k4v3t+mean", "kf8v3", "kf8castvf8cast", "kf32vbf16"])
def test_round_trip(tmp_path: Path, format: str, page_size: int) -> None:
    cache, path = family(format=format, page_size=page_size), tmp_path / "file"
    cache.save(path)
    loaded = PagedKVCache.load_file(path)
    assert loaded.sequences == [0, 1, 2, 3, 4]
    assert loaded.format == cache.format
    assert loaded.layout == cache.layout
    assert (loaded.num_pages, loaded.free_pages) == (cache.num_pages - cache.free_pages, 0)
    assert_same(cache, cache.sequences, loaded, loaded.sequences)


def test_restore_beside_what_is_there(saved: Path) -> None:
    source, cache = family(), make(20)
    old = cache.new_sequence()
    append(cache, old, 20, 7)
    cache.free(cache.new_sequence())
    before = contents(cache, [old])
    new = cache.restore(saved)
    assert new == [2, 3, 4, 5, 6]
    again = cache.restore(saved)
    assert cache.free_pages == 20 - 2 - 2 * (source.num_pages - source.free_pages)
    for restored in (new, again):
        assert_same(source, source.sequences, cache, restored)
    assert all(torch.equal(x, y) for x, y in zip(contents(cache, [old])[0], before[0], strict=True))


@pytest.mark.parametrize("format", ["k4v4", "k4v3t+mean"])
def test_restored_sequences_are_written_as_before(tmp_path: Path, format: str) -> None:
    """Copy on write, growth, attention and freeing: a restored cache goes on where the saved one would have."""
    family(format=format).save(tmp_path / "file")
    caches = family(format=format), PagedKVCache.load_file(tmp_path / "file", num_pages=12)
    caches[1].pages[:, caches[1]._allocator.free] = 0xFF
    assert caches[0].free_pages == caches[1].free_pages
    names = [cache.sequences for cache in caches]
    for cache, (first, second, third, empty, _) in zip(caches, names, strict=True):
        append(cache, third, 3, 11)
        append(cache, empty, 3, 12)
        append(cache, second, 20, 13)
        cache.free(first)
    kept = [[seqs[i] for i in (1, 2, 3, 4)] for seqs in names]
    assert_same(caches[0], kept[0], caches[1], kept[1])
    q = torch.randn(4, 1, 4, DK)
    outs = [cache.decode(1, q, seqs, scale=0.25) for cache, seqs in zip(caches, kept, strict=True)]
    assert torch.equal(outs[0][0], outs[1][0])
    assert outs[0][0].isfinite().all()
    for cache in caches:
        for seq in cache.sequences:
            cache.free(seq)
        assert cache.free_pages == cache.num_pages


def test_chosen_sequences_only(tmp_path: Path) -> None:
    cache, path = family(), tmp_path / "file"
    cache.save(path, [5, 1])
    with PageFile(path) as file:
        assert file.contents.num_pages == 4
        assert file.contents.lengths == (16, 41)
        assert file.tables == [[0], [1, 2, 3]]
    loaded = PagedKVCache.load_file(path)
    assert_same(cache, [5, 1], loaded, [0, 1])
    with pytest.raises(UnknownSequenceError):
        cache.save(path, [1, 3])
    assert_same(cache, [5, 1], PagedKVCache.load_file(path), [0, 1])  # the failed save left the file alone


@pytest.mark.parametrize("seqs", [[], [4]])
def test_empty_files(tmp_path: Path, seqs: list[int]) -> None:
    cache, path = family(), tmp_path / "file"
    cache.save(path, seqs)
    loaded = PagedKVCache.load_file(path)
    assert (loaded.sequences, loaded.num_pages, loaded.free_pages) == (seqs and [0], 1, 1)
    assert len(cache.restore(path)) == len(seqs)


def test_the_file_is_safetensors_and_says_what_it_is(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata, pages, tables = file.metadata(), file.get_tensor("pages"), file.get_tensor("tables")
    checksum = metadata.pop("checksum")
    assert metadata == {
        "magic": "kvfold-pages", "version": "1", "format": "k4v4", "num_layers": "2", "num_kv_heads": "2",
        "head_size": "16", "head_size_v": "24", "page_size": "16", "num_pages": "5", "lengths": "[40, 41, 41, 0, 16]",
    }  # fmt: skip
    assert pages.shape == (LAYERS, 5, HEADS, make().layout.page_bytes)
    assert (tables.dtype, tables.tolist()) == (torch.int32, [0, 1, 2, 0, 1, 3, 0, 1, 3, 4])
    whole = saved.read_bytes()
    assert blake2b(whole.replace(checksum.encode(), b"0" * 64), digest_size=32).hexdigest() == checksum


def test_tokens_of_others_are_not_saved(tmp_path: Path) -> None:
    """What a freed or truncated sequence left in a page stays out of the file; so equal sequences are equal files."""
    path = tmp_path / "file"
    images = []
    for poison in (0x00, 0xAB):
        cache = make()
        cache.pages.fill_(poison)
        seq = cache.new_sequence()
        append(cache, seq, 37, 0)
        keeper = cache.fork(seq)
        cache.truncate(seq, 21)
        cache.save(path, [seq])
        images.append(path.read_bytes())
        with PageFile(path) as file:
            alone = torch.empty(LAYERS, 2, HEADS, cache.layout.page_bytes, dtype=torch.uint8)
            file.read_into(alone, [0, 1])
        where = cache.layout.addresses()
        assert not alone[:, 1][:, :, where[5:]].any()
        assert torch.equal(alone[:, 1][:, :, where[:5]], cache.pages[:, 1][:, :, where[:5]])
        for both in ([seq, keeper], [keeper, seq]):  # with its holder the page's other tokens are somebody's
            cache.save(path, both)
            assert_same(cache, both, PagedKVCache.load_file(path), [0, 1])
    assert images[0] == images[1]


# --- exact sinks and tails: version 2 ---------------------------------------------------------------------------------


def exact_tokens(cache: PagedKVCache, seqs: list[int]) -> list[torch.Tensor]:
    """K and V ``[num_layers, n, H, d]`` of the exact tokens of each sequence, in order of position."""
    assert cache.exact is not None
    places = [cache.exact.places([cache._held[seq]]) for seq in seqs]
    return [x.flatten(1, 2)[:, where] for where in places for x in (cache.exact.k, cache.exact.v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", [EXACT, "k4v4+sinks20", "k4v3t+mean+tail9"])
def test_exact_tokens_round_trip(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    cache, path = make(format=format, dtype=dtype), tmp_path / "file"
    for n in (0, 2, 25, 41):
        k, v = (torch.randn(LAYERS, n, HEADS, size).to(dtype) for size in (DK, DV))
        cache.append(cache.new_sequence(), k, v)
    cache.truncate(3, 38)
    cache.save(path)
    fresh = make(20, format=format, dtype=dtype)
    fresh.free(fresh.new_sequence())
    others = PagedKVCache.load_file(path, num_pages=20), fresh
    for other, seqs in zip(others, ([0, 1, 2, 3], fresh.restore(path)), strict=True):
        assert other.exact is not None
        assert other.exact.dtype == dtype
        assert_same(cache, cache.sequences, other, seqs)
        assert [other._held[seq].exact_from for seq in seqs] == [cache._held[seq].exact_from for seq in [0, 1, 2, 3]]
        for x, y in zip(exact_tokens(cache, [0, 1, 2, 3]), exact_tokens(other, seqs), strict=True):
            assert torch.equal(x, y)
        # they go on alike
        q = torch.randn(4, 1, 4, DK).to(dtype)
        k, v = (torch.randn(LAYERS, 4, HEADS, size).to(dtype) for size in (DK, DV))
        outs = []
        for one, names in ((PagedKVCache.load_file(path, num_pages=20), [0, 1, 2, 3]), (other, seqs)):
            slots = one.extend(dict.fromkeys(names, 1))
            one.store(1, k[1], v[1], slots)
            outs.append(one.decode(1, q, names, scale=0.25)[0])
        assert torch.equal(*outs)


def test_a_file_with_exact_tokens_says_what_it_is(saved_exact: Path) -> None:
    with safe_open(saved_exact, "pt") as file:
        metadata = file.metadata()
        exact_k, exact_v = file.get_tensor("exact_k"), file.get_tensor("exact_v")
        assert set(file.keys()) == {"pages", "tables", "exact_k", "exact_v"}
    assert {name: metadata[name] for name in ("version", "dtype", "lengths", "exact_from")} == {
        "version": "2", "dtype": "float32", "lengths": "[40, 41, 41, 0, 16]", "exact_from": "[34, 35, 35, 0, 10]",
    }  # fmt: skip
    assert exact_k.shape == (LAYERS, 4 * (3 + 6), HEADS, DK)
    assert exact_v.shape == (LAYERS, 4 * (3 + 6), HEADS, DV)
    cache = family(format=EXACT, dtype=torch.float32)
    ks, vs = (torch.cat(exact_tokens(cache, cache.sequences)[i::2], dim=1) for i in (0, 1))
    assert torch.equal(exact_k, ks)
    assert torch.equal(exact_v, vs)


def test_exact_tokens_of_others_are_not_saved(tmp_path: Path) -> None:
    images = []
    for poison in (0.0, torch.nan):
        cache = make(format=EXACT, dtype=torch.float32)
        seq = cache.new_sequence()
        assert cache.exact is not None
        cache.exact.k.fill_(poison)
        append(cache, seq, 2, 0)
        cache.save(tmp_path / "file")
        images.append((tmp_path / "file").read_bytes())
    assert images[0] == images[1]


def test_damaged_files_with_exact_tokens(saved_exact: Path) -> None:
    whole = saved_exact.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(2)
    refused = Refused(format=EXACT, dtype=torch.float32)
    for place in [*range(header), *chance.sample(range(header, len(whole)), 200), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= chance.randrange(1, 256)
        saved_exact.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            refused.cache.restore(saved_exact)
    for length in (header, len(whole) - 1, len(whole) - 4 * DV, *chance.sample(range(len(whole)), 30)):
        saved_exact.write_bytes(whole[:length])
        refused(saved_exact, "truncated|damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1"}, {"dtype": "float64"}, {"dtype": "F32"}, {"dtype": "bfloat16"}, {"format": "k4v4"},
        {"format": "k4v4+sinks3+tail5"}, {"exact_from": "[33, 35, 35, 0, 10]"}, {"exact_from": "[35, 35, 35, 0, 10]"},
        {"exact_from": "[34, 35, 35, 0, 17]"}, {"exact_from": "[34, 35, 35, 0]"}, {"exact_from": "[34, 35, 35, -1, 9]"},
        {"exact_from": "34"}, {"exact_from": "[34, 35, 35, 0.0, 10]"},
    ],
)  # fmt: skip
def test_forged_metadata_of_exact_tokens(saved_exact: Path, change: dict[str, object]) -> None:
    forge(saved_exact, lambda header: header["__metadata__"].update(change))
    Refused(format=EXACT, dtype=torch.float32)(saved_exact, "damaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.bfloat16}, "dtype float32 in the file, bfloat16 here"),
        ({"format": "k4v4"}, r"format k4v4\+sinks3\+tail6 in the file, k4v4 here; dtype float32 in the file, None"),
        ({"format": "k4v4+tail6"}, r"format k4v4\+sinks3\+tail6 in the file, k4v4\+tail6 here"),
    ],
)
def test_other_caches_of_exact_tokens(saved_exact: Path, changes: dict[str, Any], message: str) -> None:
    cache = make(**{"format": EXACT, "dtype": torch.float32} | changes)
    before = state(cache)
    with pytest.raises(FileFormatError, match=message):
        cache.restore(saved_exact)
    assert state(cache) == before


def test_a_file_that_loses_its_exact_tokens_while_it_is_read(
    saved_exact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Refused(format=EXACT, dtype=torch.float32).cache
    before, tokens = state(cache), exact_tokens(cache, [0])
    read_into = PageFile.read_into

    def read_into_and_cut(file: PageFile, *args: Any) -> None:
        read_into(file, *args)
        os.truncate(saved_exact, saved_exact.stat().st_size - 100)

    monkeypatch.setattr(PageFile, "read_into", read_into_and_cut)
    with pytest.raises(FileFormatError, match="shorter while it was read"):
        cache.restore(saved_exact)
    assert state(cache)[:3] == before[:3]
    for x, y in zip(exact_tokens(cache, [0]), tokens, strict=True):
        assert torch.equal(x, y)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    before = saved.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*{"write": (storage, "_table_bytes"), "rename": (os, "replace")}[moment], fail)
    with pytest.raises(OSError, match="disk full"):
        make().save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_replaces(saved: Path) -> None:
    cache = make()
    append(cache, cache.new_sequence(), 3, 5)
    cache.save(str(saved))
    assert PagedKVCache.load_file(str(saved)).seq_lens([0]).tolist() == [3]
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file_is_an_ordinary_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PagedKVCache.load_file(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        family().save(tmp_path / "no folder" / "file")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_any_flipped_byte(saved: Path) -> None:
    """Every byte of the header and of the tables, and many of the pages; each with one bit or several flipped."""
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    places = [*range(header), *chance.sample(range(header, len(whole)), 600), *range(len(whole) - 40, len(whole))]
    refused = Refused()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= chance.choice([1 << chance.randrange(8), 0x20, chance.randrange(1, 256)])
        saved.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            refused.cache.restore(saved)
    assert state(refused.cache) == refused.before
    saved.write_bytes(whole)
    refused.cache.restore(saved)


def test_any_truncation(saved: Path) -> None:
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(1)
    lengths = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 40, len(whole) - 4, len(whole) - 1]
    refused = Refused()
    for length in lengths + chance.sample(range(len(whole)), 100):
        saved.write_bytes(whole[:length])
        refused(saved, "truncated|damaged")
    for more in (b"\0", b"\0" * 4, whole):
        saved.write_bytes(whole + more)
        refused(saved, "truncated or damaged")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"hello", b"Once upon a time there was a cache.\n" * 50, bytes(1000), b"\xff" * 1000,
        (8).to_bytes(8, "little") + b"[[[[[[[[", (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (2).to_bytes(8, "little") + b"{}", (8).to_bytes(8, "little") + b'"string"', (4).to_bytes(8, "little") + b"1234",
        (20).to_bytes(8, "little") + b'{"__metadata__": []}', (22).to_bytes(8, "little") + b'{"__metadata__": null}',
        (19).to_bytes(8, "little") + b'{"__metadata__": 1}', (9).to_bytes(8, "little") + b'{"\xff": 1} ',
    ],
)  # fmt: skip
def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    Refused()(path, "is no kvfold-pages file")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"magic": "other"}])
def test_other_safetensors_files(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(4, 4)}, path, metadata)
    Refused()(path, "is no kvfold-pages file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "k4v3"}, "format k4v4 in the file, k4v3 here"),
        ({"format": "k4v4+plain"}, r"format k4v4 in the file, k4v4\+plain here"),
        ({"num_layers": 3}, "num_layers 2 in the file, 3 here"),
        ({"num_kv_heads": 1}, "num_kv_heads 2 in the file, 1 here"),
        ({"head_size": 24, "head_size_v": 16}, "head_size 16 in the file, 24 here; head_size_v 24 in the file, 16"),
        ({"page_size": 32}, "page_size 16 in the file, 32 here"),
    ],
)
def test_other_caches(saved: Path, changes: dict[str, Any], message: str) -> None:
    cache = make(**changes)
    append(cache, cache.new_sequence(), 20, 7)
    before = state(cache)
    with pytest.raises(FileFormatError, match=message):
        cache.restore(saved)
    assert state(cache) == before


def test_too_few_free_pages(saved: Path) -> None:
    cache = make(6)
    append(cache, cache.new_sequence(), 20, 7)
    before = state(cache)
    with pytest.raises(CapacityError, match="5 pages are needed and 4 of 6 are free"):
        cache.restore(saved)
    assert state(cache) == before
    with pytest.raises(CapacityError):
        PagedKVCache.load_file(saved, num_pages=4)


def test_a_file_that_shrinks_while_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Refused().cache
    before, used = state(cache), cache.block_table([0])[0].long()
    pages = cache.pages[:, used].clone()
    read_tables = PageFile._read_tables

    def read_tables_and_cut(file: PageFile) -> None:
        read_tables(file)
        os.truncate(saved, saved.stat().st_size - 1000)

    monkeypatch.setattr(PageFile, "_read_tables", read_tables_and_cut)
    with pytest.raises(FileFormatError, match="shorter while it was read"):
        cache.restore(saved)
    assert state(cache)[:3] == before[:3]
    assert torch.equal(cache.pages[:, used], pages)


# --- forgeries: a right checksum over wrong contents ------------------------------------------------------------------


def forge(path: Path, change: Callable[[dict[str, Any]], None], tables: list[int] | None = None) -> None:
    """Change the header or the tables of a saved file, and give it the checksum that belongs to it."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    change(header)
    if tables is not None:
        data = data[:-40] + b"".join(page.to_bytes(4, "little") for page in tables)

    def with_checksum(checksum: str) -> bytes:
        header["__metadata__"]["checksum"] = checksum
        body = json.dumps(header).encode()
        body += b" " * (-len(body) % 8)
        return len(body).to_bytes(8, "little") + body + data

    path.write_bytes(with_checksum(blake2b(with_checksum("0" * 64), digest_size=32).hexdigest()))


def test_a_forgery_without_changes_is_a_good_file(saved: Path, saved_exact: Path) -> None:
    for path in (saved, saved_exact):
        before = path.read_bytes()
        forge(path, lambda header: None)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("format", "version"), [("k4v4", "1"), ("k2tv2t", "1"), ("k4v3t", "1.1"), ("k4tv2+tail4", "2.1")]
)
def test_versions(format: str, version: str) -> None:
    geometry = Geometry(format, 1, 1, 64, 64, 16, "float32" if "tail" in format else None)
    assert geometry.version == version
    assert version in VERSIONS


def test_files_of_codes_that_have_changed_say_so(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    family(format="k4v3t").save(path)
    forge(path, lambda header: header["__metadata__"].update(version="1"))
    Refused()(path, "has version '1', and the bytes of k4v3t have changed since: its files are of version 1.1 now")


@pytest.mark.parametrize("version", ["0", "3", "1.0", "", 1, None])
def test_other_versions(saved: Path, version: object) -> None:
    forge(saved, lambda header: header["__metadata__"].update(version=version))
    Refused()(saved, f"has version {version!r}, and this kvfold reads versions 1, 1.1, 2 and 2.1")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "k4v9"}, {"format": "k3qv3q"}, {"format": "turboquant"}, {"format": 4}, {"format": None},
        {"num_layers": "0"}, {"num_layers": "1"}, {"num_layers": "-2"}, {"num_layers": "x"}, {"num_layers": 2},
        {"num_layers": "9" * 30}, {"num_layers": "٢"}, {"num_kv_heads": "4"}, {"head_size": "0"}, {"head_size": "4000"},
        {"head_size_v": "8"}, {"page_size": "48"}, {"page_size": "32"}, {"num_pages": "-1"}, {"num_pages": "4"},
        {"num_pages": "9" * 5000}, {"lengths": "[40, 41, 41, 0]"}, {"lengths": "[40, 41, 41, -1, 16]"},
        {"lengths": "[40, 41, 41, 0, 16.0]"}, {"lengths": "[40, 41, 41, 0, 33]"}, {"lengths": "{}"}, {"lengths": "5"},
        {"lengths": [40, 41, 41, 0, 16]}, {"lengths": "["}, {"lengths": "[40, true, 41, 0, 16]"}, {"extra": "1"},
        {"version": "2"}, {"format": "k4v4+tail6"}, {"dtype": "float32"}, {"exact_from": "[40, 41, 41, 0, 16]"},
    ],
)  # fmt: skip
def test_forged_metadata(saved: Path, change: dict[str, object]) -> None:
    forge(saved, lambda header: header["__metadata__"].update(change))
    Refused()(saved, "damaged")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pages", {"shape": [4, 5, 1, 832]}), ("pages", {"dtype": "I8"}), ("tables", {"shape": [9]}),
        ("tables", {"data_offsets": [0, 40]}), ("pages", {"data_offsets": [0, 10**15]}), ("more", {}),
    ],
)  # fmt: skip
def test_forged_tensors(saved: Path, name: str, change: dict[str, object]) -> None:
    forge(saved, lambda header: header.setdefault(name, {}).update(change))
    Refused()(saved, "contradicts itself")


@pytest.mark.parametrize(
    "tables",
    [[0, 1, 2, 0, 1, 3, 0, 1, 3, 5], [0, 1, 2, 0, 1, 3, 0, 1, 3, 3], [0, 1, 2, 0, 1, 3, 0, 1, 3, 2**32 - 1]],
    ids=["beyond", "left out", "negative"],
)
def test_forged_tables(saved: Path, tables: list[int]) -> None:
    forge(saved, lambda header: None, tables)
    Refused()(saved, "its tables name pages that it does not have, or leave some out")
