"""Key references in the paged cache: the page before each new one, files, bytes, and random histories."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ops_cases import noise

from kvfold.cache import PagedKVCache
from kvfold.errors import CapacityError
from kvfold.formats import PAGE_SIZES, KVFormat
from kvfold.planner import ModelShape, cache_bytes, plan


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are small: a second thread gains little, and costs much where the cores are busy elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LAYERS, HEADS, DK, DV = 2, 2, 32, 16
SIZES: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_size": DK, "head_size_v": DV}


def make(format: str = "k4v4+mean", num_pages: int = 12, page_size: int = 16) -> PagedKVCache:
    cache = PagedKVCache(format, num_pages=num_pages, page_size=page_size, **SIZES)
    cache.pages.fill_(0xFF)
    return cache


OFFSET = 30 * noise(LAYERS, 1, HEADS, DK, seed=99)


def tokens_of(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K ``[layers, n, H, dk]`` with an offset thirty times as long as its noise, and V."""
    return noise(LAYERS, count, HEADS, DK, seed=seed) + OFFSET, noise(LAYERS, count, HEADS, DV, seed=seed + 1)


def before(cache: PagedKVCache, seq: int) -> list[int]:
    """What the cache remembers of the pages of a sequence: the page before each."""
    return [int(cache._before[page]) for page in cache._held[seq].table]


def assert_near(cache: PagedKVCache, seq: int, k: torch.Tensor) -> None:
    """Every key differs from what was stored by a share of its noise, not of its offset: the reference is there."""
    for layer in range(LAYERS):
        error = (cache.load(layer, seq)[0] - k[layer]).norm(dim=-1) / noise(1, 1, DK).norm()
        assert error.max() < 0.4, error.max()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_cache_remembers_the_page_before(page_size: int) -> None:
    cache = make(page_size=page_size)
    first, second = cache.new_sequence(), cache.new_sequence()
    cache.extend({first: page_size + 1, second: 1})
    assert before(cache, first) == [-1, cache._held[first].table[0]]
    assert before(cache, second) == [-1]
    cache.extend({second: 2 * page_size, first: page_size})  # both in one call, first from inside a page
    for seq in (first, second):
        assert before(cache, seq) == [-1, *cache._held[seq].table[:-1]]
    cache.extend(first, page_size - 1)  # to the end of a page
    cache.extend(first, 0)
    cache.extend(first, 1)  # from a boundary
    assert before(cache, first) == [-1, *cache._held[first].table[:-1]]


def test_before_after_fork_truncate_and_copy_on_write() -> None:
    cache = make()
    parent = cache.new_sequence()
    k, v = tokens_of(40, 0)
    cache.append(parent, k, v)
    child = cache.fork(parent)
    shared = cache._held[parent].table[:]
    assert before(cache, child) == before(cache, parent) == [-1, *shared[:2]]

    more_k, more_v = tokens_of(20, 5)
    cache.append(child, more_k, more_v)  # copies the partly filled page, and opens one behind the copy
    table = cache._held[child].table
    assert table[:2] == shared[:2]
    assert table[2] != shared[2]
    assert before(cache, child)[3] == table[2], "the copy, not the page that it was copied from"
    assert_near(cache, child, torch.cat([k, more_k], dim=1))
    assert_near(cache, parent, k)

    cache.truncate(child, 32)  # to a boundary: its next page follows the page that is left
    again_k, again_v = tokens_of(3, 7)
    cache.append(child, again_k, again_v)
    assert before(cache, child)[2] == shared[1]
    assert_near(cache, child, torch.cat([k[:, :32], again_k], dim=1))

    cache.truncate(parent, 20)  # into a page: it is not opened again, and keeps its reference
    reference = cache.pages[:, shared[1], :, cache.layout.reference :].clone()
    cache.append(parent, again_k, again_v)
    own = cache._held[parent].table[1]
    assert own != shared[1], "the child holds it"
    assert torch.equal(cache.pages[:, own, :, cache.layout.reference :], reference)
    assert_near(cache, parent, torch.cat([k[:, :20], again_k], dim=1))

    cache.truncate(parent, 0)
    cache.append(parent, again_k, again_v)
    assert before(cache, parent) == [-1]
    assert_near(cache, parent, again_k)
    assert_near(cache, child, torch.cat([k[:, :32], again_k], dim=1))


def test_a_page_that_changes_hands_forgets_what_was_before_it() -> None:
    cache = make(num_pages=3)
    one = cache.new_sequence()
    cache.append(one, *tokens_of(48, 0))
    assert before(cache, one) == [-1, 0, 1]
    cache.free(one)
    other = cache.new_sequence()
    k, v = tokens_of(20, 3)
    for token in range(20):
        cache.append(other, k[:, token : token + 1], v[:, token : token + 1])
    table = cache._held[other].table
    assert before(cache, other) == [-1, table[0]]
    assert_near(cache, other, k)


def test_other_formats_remember_nothing() -> None:
    cache = make("k4v4")
    cache.extend(cache.new_sequence(), 40)
    assert cache._before.tolist() == [-1] * 12


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_saved_and_restored(tmp_path: Path, page_size: int) -> None:
    """Beside other sequences, in other pages; then each goes on where it was, at a boundary and inside a page."""
    source, target = make("k4tv4t+mean", 6, page_size), make("k4tv4t+mean", 20, page_size)
    k, v = tokens_of(2 * page_size + 5, 0)
    seqs = [source.new_sequence(), source.new_sequence()]
    source.append(seqs[0], k, v)
    source.append(seqs[1], k[:, :page_size], v[:, :page_size])
    occupant = target.new_sequence()
    target.append(occupant, *tokens_of(3, 50))
    source.save(tmp_path / "file")
    restored = target.restore(tmp_path / "file")
    for one, other in zip(seqs, restored, strict=True):
        for layer in range(LAYERS):
            assert torch.equal(source.load(layer, one)[0], target.load(layer, other)[0])
    more_k, more_v = tokens_of(page_size, 9)
    for token in range(page_size):
        for cache, pair in ((source, seqs), (target, restored)):
            for seq in pair:
                cache.append(seq, more_k[:, token : token + 1], more_v[:, token : token + 1])
    for one, other, length in zip(seqs, restored, (2 * page_size + 5, page_size), strict=True):
        assert_near(target, other, torch.cat([k[:, :length], more_k], dim=1))
        for layer in range(LAYERS):
            assert torch.equal(source.load(layer, one)[0], target.load(layer, other)[0])
    assert_near(target, occupant, tokens_of(3, 50)[0])


def test_a_file_holds_the_reference_and_no_stale_token(tmp_path: Path) -> None:
    from kvfold.storage import PageFile

    cache = make()
    seq = cache.new_sequence()
    cache.append(seq, *tokens_of(20, 0))
    cache.truncate(seq, 17)
    cache.save(tmp_path / "file")
    pages = torch.empty(LAYERS, 2, HEADS, cache.layout.page_bytes, dtype=torch.uint8)
    with PageFile(tmp_path / "file") as file:
        file.read_into(pages, [0, 1])
    held = cache.pages[:, cache._held[seq].table]
    assert torch.equal(pages[..., cache.layout.reference :], held[..., cache.layout.reference :])
    stale = cache.layout.addresses()[1:].flatten()
    assert not pages[:, 1][..., stale].any()
    assert held[:, 1][..., stale].any()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("format", ["k4v4+mean", "k3tv3t+mean", "k2tvf8+mean"])
def test_planned_bytes_are_allocated_bytes(format: str, page_size: int) -> None:
    cache = make(format, page_size=page_size)
    shape, page = ModelShape.uniform(LAYERS, HEADS, DK, DV), cache.layout.page_bytes * LAYERS * HEADS
    assert (
        cache.bytes_allocated
        == cache.pages.nbytes
        == 12 * page
        == cache_bytes(shape, format, 12 * page_size, page_size)
    )
    assert cache.layout.page_bytes == page_size * cache.layout.token_bytes + 48
    cache.extend(cache.new_sequence(), page_size + 1)
    assert cache.bytes_in_use == 2 * page == cache_bytes(shape, format, page_size + 1, page_size)
    assert cache.bytes_per_token == LAYERS * HEADS * KVFormat.parse(format).bytes_per_token(DK, DV)
    fits = PagedKVCache.for_memory(format, 5 * page - 1, page_size=page_size, **SIZES)
    assert fits.num_pages == 4
    row = plan(shape, 5 * page - 1, page_size, [format], page_size)[-1]
    assert row.tokens == 4 * page_size
    assert row.bytes_per_token == page / page_size
    assert row.bits_per_element == pytest.approx(KVFormat.parse(format).bits_per_element(DK, DV, page_size))


class Machine(RuleBasedStateMachine):
    """Sequences that grow, fork, shrink and end. What a token became when it was stored is what it stays."""

    @initialize()
    def begin(self) -> None:
        self.cache = make(num_pages=7)
        self.k: dict[int, torch.Tensor] = {}  # what was given, [layers, n, H, dk]
        self.stored: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.seed = 0

    def loaded(self, seq: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self.cache.load(layer, seq) for layer in range(LAYERS)]

    def some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.k)))

    @precondition(lambda self: len(self.k) < 5)
    @rule()
    def new(self) -> None:
        seq = self.cache.new_sequence()
        self.k[seq] = torch.empty(LAYERS, 0, HEADS, DK)
        self.stored[seq] = self.loaded(seq)

    @precondition(lambda self: self.k)
    @rule(data=st.data(), size=st.integers(1, 3), most=st.sampled_from([1, 4, 40]))
    def extend(self, data: st.DataObject, size: int, most: int) -> None:
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.k)), min_size=1, max_size=size, unique=True))
        counts = {seq: data.draw(st.integers(0, most)) for seq in seqs}
        begins = {seq: -(-self.cache.length(seq) // 16) for seq in seqs}
        try:
            slots = self.cache.extend(counts)
        except CapacityError:
            return
        for seq, first in begins.items():
            table = self.cache._held[seq].table
            for page in range(first, len(table)):
                assert int(self.cache._before[table[page]]) == (table[page - 1] if page else -1)
        self.seed += 1
        parts = [tokens_of(count, 100 * self.seed + seq) for seq, count in counts.items()]
        k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        for layer in range(LAYERS):
            self.cache.store(layer, k[layer], v[layer], slots)
        for (seq, count), (own, _) in zip(counts.items(), parts, strict=True):
            self.k[seq] = torch.cat([self.k[seq], own], dim=1)
            after = self.loaded(seq)
            if count:
                for layer, (old, new) in enumerate(zip(self.stored[seq], after, strict=True)):
                    for x, y in zip(old, new, strict=True):
                        assert torch.equal(x, y[: len(x)]), layer
            self.stored[seq] = after

    @precondition(lambda self: 0 < len(self.k) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = self.some(data)
        child = self.cache.fork(seq)
        self.k[child], self.stored[child] = self.k[seq], copy.deepcopy(self.stored[seq])

    @precondition(lambda self: self.k)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = self.some(data)
        length = data.draw(st.integers(0, self.cache.length(seq)) | st.just(self.cache.length(seq) // 16 * 16))
        self.cache.truncate(seq, length)
        self.k[seq] = self.k[seq][:, :length]
        self.stored[seq] = [(k[:length], v[:length]) for k, v in self.stored[seq]]

    @precondition(lambda self: self.k)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.some(data)
        self.cache.free(seq)
        del self.k[seq], self.stored[seq]

    @rule()
    def poison(self) -> None:
        self.cache.pages[:, self.cache._allocator.free] = 0xFF

    @invariant()
    def everything_is_as_it_was_stored(self) -> None:
        for seq, k in self.k.items():
            for (one, two), (x, y) in zip(self.loaded(seq), self.stored[seq], strict=True):
                assert torch.equal(one, x)
                assert torch.equal(two, y)
            if k.shape[1]:
                assert_near(self.cache, seq, k)


class TestSequences(Machine.TestCase):  # type: ignore[valid-type,misc]
    settings = settings(
        max_examples=25, stateful_step_count=30, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
