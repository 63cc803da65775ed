"""The paged cache against a dense float64 computation and against a naive model of its sequences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold import ops
from kvfold.cache import PagedKVCache
from kvfold.errors import CapacityError, FormatError, KVFoldError, NotBuiltError, ShapeError, UnknownSequenceError
from kvfold.formats import KVFormat
from kvfold.planner import ModelShape, cache_bytes

LAYERS, HEADS, GROUP, DK, DV = 2, 2, 2, 16, 24
# CPU kernels, trellis, key references, mixed, NaN in 0xFF codes, exact
FORMATS = ["k4v4", "k3v2+plain", "k3tv4t", "k4v3t+mean", "kf8v3", "kf8castvf8cast", "kf32vbf16"]


def make(format: str = "k4v4", num_pages: int = 12, page_size: int = 16, **sizes: Any) -> PagedKVCache:
    """A small cache whose pages are full of 0xFF: NaN as scales, fp8 codes and exact values."""
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_size": DK, "head_size_v": DV} | sizes
    cache = PagedKVCache(format, num_pages=num_pages, page_size=page_size, **sizes)
    assert not cache.pages.any()
    cache.pages.fill_(0xFF)
    return cache


def vectors(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(LAYERS, tokens, HEADS, DK, generator=generator)
    return k, torch.randn(LAYERS, tokens, HEADS, DV, generator=generator)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention in float64 of the last tokens: q [Tq, Hq, dk], k [T, H, dk], v [T, H, dv] to [Tq, Hq, dv], [Hq, Tq]."""
    q, k, v = q.double(), k.double().repeat_interleave(GROUP, 1), v.double().repeat_interleave(GROUP, 1)
    scores = torch.einsum("qhd,thd->hqt", q, k) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    position, token = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    visible = (token <= position) & (token > position - (len(k) if window is None else window))
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("hqt,thd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def assert_close(got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-4, atol=2e-5)


def state(cache: PagedKVCache) -> Any:
    """All that must not change when something is refused: pages in use, tables, lengths, counts."""
    tables = {seq: (list(held.table), held.length) for seq, held in cache._held.items()}
    used = sorted({page for table, _ in tables.values() for page in table})
    return tables, sorted(cache._allocator.free), list(cache._allocator.references), cache.pages[:, used].clone()


def assert_unchanged(cache: PagedKVCache, before: Any) -> None:
    after = state(cache)
    assert after[:3] == before[:3]
    assert torch.equal(after[3], before[3])


# --- contents and attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_decode_is_attention_to_the_dequantised_tokens(format: str, page_size: int, backend: str) -> None:
    cache = make(format, page_size=page_size)
    lengths = {cache.new_sequence(): n for n in (1, 37, 64)}
    with ops.backend(backend):
        for seq, n in lengths.items():
            k, v = vectors(n, seed=seq)
            for begin in range(0, n, 20):  # in pieces that end inside pages
                cache.append(seq, k[:, begin : begin + 20], v[:, begin : begin + 20])
        for options in ({}, {"softcap": 3.0}, {"window": 9}):
            q = torch.randn(3, 1, HEADS * GROUP, DK, generator=torch.Generator().manual_seed(9))
            for layer in range(LAYERS):
                out, lse = cache.decode(layer, q, list(lengths), scale=0.3, **options)
                for b, seq in enumerate(lengths):
                    assert_close((out[b], lse[b]), dense(q[b], *cache.load(layer, seq), 0.3, **options))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_loaded_is_what_was_appended(format: str) -> None:
    cache, (k, v) = make(format), vectors(45)
    seq = cache.new_sequence()
    cache.append(seq, k, v)
    for layer in range(LAYERS):
        for x, loaded, side in zip((k, v), cache.load(layer, seq), (cache.format.k, cache.format.v), strict=True):
            assert loaded.dtype == torch.float32
            error = ((loaded - x[layer]).norm() / x[layer].norm()).item()
            assert error <= {8: 0.04, 4: 0.12, 3: 0.22, 2: 0.4, 16: 0.004, 32: 0.0}[int(side.bits)]


def test_several_queries_are_the_last_tokens() -> None:
    cache, (k, v) = make(), vectors(40)
    seq = cache.new_sequence()
    cache.append(seq, k, v)
    q = torch.randn(1, 5, HEADS * GROUP, DK)
    out, lse = cache.decode(1, q, [seq], scale=0.25)
    assert_close((out[0], lse[0]), dense(q[0], *cache.load(1, seq), 0.25))


@pytest.mark.parametrize("exact", [False, True], ids=["chunk=packed", "chunk=exact"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_prefill(exact: bool, as_tensor: bool) -> None:
    """Lengths include the chunk in both modes, and an exact chunk may be stored after its attention."""
    cache = make("k4v3")
    old, new = (0, 20, 33), (18, 7, 0)
    seqs = [cache.new_sequence() for _ in old]
    for seq, n in zip(seqs, old, strict=True):
        cache.append(seq, *vectors(n, seed=seq))
    k, v = vectors(sum(new), seed=99)
    slots = cache.extend(dict(zip(seqs, new, strict=True)))
    assert [cache.length(seq) for seq in seqs] == [18, 27, 33]
    bounds = [0, 18, 25, 25]
    q = torch.randn(25, HEADS * GROUP, DK)
    for layer in range(LAYERS):
        chunk = {"k": k[layer], "v": v[layer]} if exact else {}
        if not exact:
            cache.store(layer, k[layer], v[layer], slots)
        cu_seqlens = torch.tensor(bounds) if as_tensor else bounds
        out, lse = cache.prefill(layer, q, seqs, cu_seqlens, scale=0.25, window=21, softcap=9.0, **chunk)
        cache.store(layer, k[layer], v[layer], slots)
        for seq, begin, end in zip(seqs[:2], bounds, bounds[1:], strict=False):
            all_k, all_v = cache.load(layer, seq)
            if exact:
                all_k[-(end - begin) :], all_v[-(end - begin) :] = k[layer, begin:end], v[layer, begin:end]
            assert_close((out[begin:end], lse[:, begin:end]), dense(q[begin:end], all_k, all_v, 0.25, 9.0, 21))


def test_attention_to_nothing() -> None:
    cache = make()
    out, lse = cache.decode(0, torch.randn(1, 1, 4, DK), [cache.new_sequence()], scale=1.0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert [x.shape for x in cache.load(0, 0)] == [(0, HEADS, DK), (0, HEADS, DV)]


def test_a_step_sees_lengths_and_pages_as_they_are_now() -> None:
    """Block tables are made once per step; nothing that changes them may leave an old one in use."""
    cache, q = make(), torch.randn(1, 1, 4, DK)
    seq = cache.new_sequence()

    def check() -> None:
        out, lse = cache.decode(0, q, [seq], scale=0.25)
        assert_close((out[0], lse[0]), dense(q[0], *cache.load(0, seq), 0.25))

    cache.append(seq, *vectors(16))
    check()
    cache.append(seq, *vectors(3, seed=1))
    check()
    cache.truncate(seq, 5)
    check()
    child = cache.fork(seq)
    cache.append(seq, *vectors(3, seed=2))  # moves the last page
    check()
    cache.free(child)
    check()
    cache.free(seq)
    with pytest.raises(UnknownSequenceError):
        cache.decode(0, q, [seq], scale=0.25)


# --- sharing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["parent", "child"])
def test_copy_on_write(writer: str) -> None:
    cache = make()
    parent = cache.new_sequence()
    cache.append(parent, *vectors(20))
    child = cache.fork(parent)
    assert cache.free_pages == 10
    before = [cache.load(layer, parent) for layer in range(LAYERS)]
    used = cache.pages[:, cache.block_table([parent])[0].long()].clone()
    one, other = (parent, child) if writer == "parent" else (child, parent)
    cache.append(one, *vectors(3, seed=5))
    assert cache.free_pages == 9  # the full page stays shared, the partly filled one is copied
    assert cache.block_table([one, other])[:, 0].unique().numel() == 1
    assert cache.block_table([one, other])[:, 1].unique().numel() == 2
    assert torch.equal(cache.pages[:, cache.block_table([other])[0].long()], used)
    for layer in range(LAYERS):
        for index in (0, 1):
            assert torch.equal(cache.load(layer, other)[index], before[layer][index])
            assert torch.equal(cache.load(layer, one)[index][:20], before[layer][index])
    cache.append(other, *vectors(3, seed=6))
    assert cache.free_pages == 9  # its last holder writes in place
    cache.free(one)
    cache.free(other)
    assert cache.free_pages == cache.num_pages


def test_nothing_is_copied_at_a_page_boundary_or_for_nothing() -> None:
    cache = make()
    parent = cache.new_sequence()
    cache.append(parent, *vectors(16))
    child = cache.fork(parent)
    assert cache.extend(child, 0).shape == (0,)
    cache.extend(child, 1)
    assert cache.free_pages == 10
    assert cache.block_table([parent, child]).tolist() == [[0, 0], [0, 1]]
    cache.truncate(child, 7)
    assert cache.extend(child, 0).dtype == torch.int64
    assert cache.block_table([child]).tolist() == [[0]]
    cache.extend(child, 1)  # the page is full in the parent
    assert cache.block_table([parent]).tolist() == [[0]]
    assert cache.block_table([child]).tolist() != [[0]]


def test_truncate_gives_back_whole_pages_that_nobody_else_holds() -> None:
    cache = make()
    parent = cache.new_sequence()
    cache.append(parent, *vectors(50))
    child = cache.fork(parent)
    for seq, length, free in ((child, 17, 8), (parent, 33, 9), (parent, 32, 10), (parent, 0, 10), (child, 16, 11)):
        cache.truncate(seq, length)
        assert (cache.length(seq), cache.free_pages) == (length, free)
    cache.free(parent)
    assert cache.free_pages == 11
    cache.truncate(child, 0)
    assert cache.free_pages == 12


def test_holders_of_one_page_that_grow_together_need_one_copy_less() -> None:
    cache = make(num_pages=3)
    parent = cache.new_sequence()
    cache.append(parent, *vectors(5))
    family = [parent, cache.fork(parent), cache.fork(parent)]
    slots = cache.extend(dict.fromkeys(family, 2))
    assert cache.free_pages == 0
    assert len(set(slots.tolist())) == 6
    assert sorted(slots.tolist()) == [page * 16 + offset for page in range(3) for offset in (5, 6)]


# --- capacity and errors ----------------------------------------------------------------------------------------------


def test_capacity_error_leaves_everything_as_it_was() -> None:
    cache = make(num_pages=4)
    parent = cache.new_sequence()
    cache.append(parent, *vectors(20))
    child, empty = cache.fork(parent), cache.new_sequence()
    before = state(cache)
    with pytest.raises(CapacityError, match=r"3 pages are needed and 2 of 4 are free: free or truncate"):
        cache.extend(child, 29)  # a copy and two more
    with pytest.raises(CapacityError):
        cache.extend({empty: 16, parent: 12, child: 13})  # 1, 1 copied, 1 more
    with pytest.raises(CapacityError):
        cache.append(child, *vectors(29))
    assert_unchanged(cache, before)
    cache.append(child, *vectors(28))
    assert cache.free_pages == 0
    with pytest.raises(CapacityError, match="0 of 4"):
        cache.extend(empty, 1)


def test_a_batch_is_reserved_whole_or_not_at_all() -> None:
    cache = make()
    one, other = cache.new_sequence(), cache.new_sequence()
    before = state(cache)
    for seq, count in ((other, -1), (77, 1), (other, 1.5), (other, None), (other, True)):
        with pytest.raises(KVFoldError):
            cache.extend({one: 3, seq: count})  # type: ignore[dict-item]
        assert_unchanged(cache, before)
    for arguments in ((one,), ({one: 1}, 1), (one, -1), (one, "3")):
        with pytest.raises(ShapeError):
            cache.extend(*arguments)
    assert_unchanged(cache, before)
    assert cache.extend({}).shape == (0,)
    assert cache.extend({one: 17, other: 1}).tolist() == [*range(17), 32]


def test_unknown_and_freed_sequences() -> None:
    cache = make()
    seq = cache.new_sequence()
    cache.free(seq)
    calls: list[Any] = [
        cache.free, cache.fork, cache.length, lambda s: cache.extend(s, 1), lambda s: cache.truncate(s, 0),
        lambda s: cache.load(0, s), lambda s: cache.block_table([s]), lambda s: cache.seq_lens([s]),
        lambda s: cache.decode(0, torch.zeros(1, 1, 4, DK), [s], scale=1.0), lambda s: cache.append(s, *vectors(1)),
        lambda s: cache.prefill(0, torch.zeros(0, 4, DK), [s], [0, 0], scale=1.0),
        lambda s: cache.save("/nonexistent/file", [s]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UnknownSequenceError, match=r"^sequence 0 was freed; new_sequence\(\)"):
            call(seq)
        for unknown in (5, -1, None, "0"):
            with pytest.raises(KeyError, match=r"is none of this cache"):
                call(unknown)
    assert cache.new_sequence() == 1
    assert cache.free_pages == cache.num_pages


def test_wrong_layers_lengths_and_shapes() -> None:
    cache = make()
    seq = cache.new_sequence()
    cache.append(seq, *vectors(20))
    before = state(cache)
    k, v = vectors(2)
    q = torch.zeros(1, 1, 4, DK)
    for layer in (-1, LAYERS, True, None, 0.0):
        for call in (
            lambda at: cache.load(at, seq),
            lambda at: cache.store(at, k[0], v[0], torch.tensor([40, 41])),
            lambda at: cache.decode(at, q, [seq], scale=1.0),
            lambda at: cache.prefill(at, q[0], [seq], [0, 1], scale=1.0),
        ):
            with pytest.raises(ShapeError, match="one of the 2 layers, 0 to 1"):
                call(layer)
    for length in (-1, 21, 1.5, None):
        with pytest.raises(ShapeError):
            cache.truncate(seq, length)  # type: ignore[arg-type]
    for bad in ((k[:1], v[:1]), (k[0], v[0]), (k, v[:, :1]), (v, k), (k.long(), v), (k[:, :, :1], v), (k, v[..., :8])):
        with pytest.raises(ShapeError, match="is a floating tensor"):
            cache.append(seq, *bad)
    for q_bad in (q[0], q.expand(2, -1, -1, -1), q[..., :8], q[:, :, :3], q.long()):
        with pytest.raises(ShapeError):
            cache.decode(0, q_bad, [seq], scale=1.0)
    for bounds in ([0], [0, 2], [1, 1], [0, 1, 1], [], [0, 0]):
        with pytest.raises(ShapeError, match="cu_seqlens"):
            cache.prefill(0, q[0], [seq], bounds, scale=1.0)
    with pytest.raises(ShapeError, match=r"shorter than its chunk of 21: extend\(\)"):
        cache.prefill(0, torch.zeros(21, 4, DK), [seq], [0, 21], scale=1.0)
    with pytest.raises(ShapeError, match="together"):
        cache.prefill(0, q[0], [seq], [0, 1], scale=1.0, k=k[0, :1])
    with pytest.raises(ShapeError, match="the batch is empty"):
        cache.decode(0, q[:0], [], scale=1.0)
    for options in ({"window": 0}, {"window": -3}, {"softcap": 0.0}, {"softcap": -1.0}):
        with pytest.raises(ShapeError):
            cache.decode(0, q, [seq], scale=1.0, **options)
    assert_unchanged(cache, before)


def test_what_a_cache_cannot_be() -> None:
    with pytest.raises(NotBuiltError, match="not built"):
        make("k3qv3q")
    with pytest.raises(FormatError, match="did you mean"):
        make("k4v44")
    with pytest.raises(FormatError):
        make(page_size=48)
    with pytest.raises(FormatError):
        make(head_size=4)
    bad: list[Any] = [0, -1, 1.5]
    for name in ("num_pages", "num_layers", "num_kv_heads"):
        for count in bad:
            with pytest.raises(ShapeError, match=name):
                make(**{name: count})
    with pytest.raises(ShapeError, match="num_sequences"):
        make(num_sequences=-1)


# --- accounting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_bytes(format: str, page_size: int) -> None:
    cache = make(format, page_size=page_size)
    assert cache.bytes_allocated == cache.pages.nbytes == LAYERS * 12 * HEADS * cache.layout.page_bytes
    shape = ModelShape.uniform(LAYERS, HEADS, DK, DV)
    assert cache.bytes_allocated == cache_bytes(shape, format, 12 * page_size, page_size)
    assert cache.bytes_per_token == LAYERS * HEADS * KVFormat.parse(format).bytes_per_token(DK, DV)
    assert cache.pages.is_contiguous()
    assert cache.bytes_in_use == 0
    seq = cache.new_sequence()
    cache.extend(seq, page_size + 1)
    cache.fork(seq)
    assert cache.bytes_in_use == cache_bytes(shape, format, page_size + 1, page_size) == 2 * cache.pages[:, 0].nbytes


def test_for_memory() -> None:
    sizes: Any = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_size": DK, "head_size_v": DV, "page_size": 32}
    page = 32 * LAYERS * HEADS * KVFormat.parse("k4v2").bytes_per_token(DK, DV)
    for memory, pages in ((page, 1), (10 * page - 1, 9), (10 * page, 10)):
        cache = PagedKVCache.for_memory("k4v2", memory, **sizes)
        assert (cache.num_pages, cache.pages.nbytes) == (pages, pages * page)
        assert cache.pages.nbytes <= memory
    with pytest.raises(CapacityError, match=str(page)):
        PagedKVCache.for_memory("k4v2", page - 1, **sizes)
    with pytest.raises(ShapeError):
        PagedKVCache.for_memory("k4v2", -1, **sizes)


def test_block_tables() -> None:
    cache = make()
    seqs = [cache.new_sequence() for _ in range(3)]
    assert cache.block_table(seqs).shape == (3, 1)
    assert cache.block_table([]).shape == (0, 1)
    cache.extend({seqs[0]: 17, seqs[2]: 33})
    table = cache.block_table(seqs)
    assert (table.dtype, table.tolist()) == (torch.int32, [[0, 1, 0], [0, 0, 0], [2, 3, 4]])
    assert cache.seq_lens(seqs).tolist() == [17, 0, 33]
    assert cache.sequences == seqs
    assert repr(cache) == "PagedKVCache(k4v4, 3 sequences, 5 of 12 pages in use)"


# --- against a naive model --------------------------------------------------------------------------------------------

BANK = 64
BANK_K, BANK_V = vectors(BANK, seed=3)


def dequantised_bank() -> tuple[torch.Tensor, torch.Tensor]:
    """What each token of the bank becomes, each stored alone in a page of its own."""
    cache = make(num_pages=1)
    tokens = []
    for token in range(BANK):
        seq = cache.new_sequence()
        cache.append(seq, BANK_K[:, token : token + 1], BANK_V[:, token : token + 1])
        tokens.append([cache.load(layer, seq) for layer in range(LAYERS)])
        cache.free(seq)
    k = torch.stack([torch.cat([token[layer][0] for token in tokens]) for layer in range(LAYERS)])
    return k, torch.stack([torch.cat([token[layer][1] for token in tokens]) for layer in range(LAYERS)])


class Machine(RuleBasedStateMachine):
    """Sequences as lists of pages, a page a Python list of tokens (indices of the bank) that forks share."""

    @initialize()
    def begin(self) -> None:
        self.bank = dequantised_bank()
        self.cache = make(num_pages=7)
        self.model: dict[int, tuple[list[list[int]], int]] = {}

    def pages_in(self, model: dict[int, tuple[list[list[int]], int]]) -> int:
        return len({id(page) for pages, _ in model.values() for page in pages})

    def grow(self, model: dict[int, tuple[list[list[int]], int]], seq: int, tokens: list[int]) -> None:
        pages, length = model[seq]
        if tokens and length % 16:
            if sum(page is pages[-1] for others, _ in model.values() for page in others) > 1:
                pages[-1] = list(pages[-1])
            del pages[-1][length % 16 :]
        for token in tokens:
            if length % 16 == 0:
                pages.append([])
            pages[-1].append(token)
            length += 1
        model[seq] = (pages, length)

    def some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    @precondition(lambda self: len(self.model) < 6)
    @rule()
    def new(self) -> None:
        self.model[self.cache.new_sequence()] = ([], 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), size=st.integers(1, 3))
    def extend(self, data: st.DataObject, size: int) -> None:
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=size, unique=True))
        batches = st.sampled_from([3, 40]).flatmap(lambda most: st.lists(st.integers(0, BANK - 1), max_size=most))
        tokens = {seq: data.draw(batches) for seq in seqs}
        grown = copy.deepcopy(self.model)  # keeps what is shared shared
        for seq, new in tokens.items():
            self.grow(grown, seq, new)
        counts = {seq: len(new) for seq, new in tokens.items()}
        if self.pages_in(grown) > 7:
            with pytest.raises(CapacityError):
                self.cache.extend(counts)
            return
        slots = self.cache.extend(counts)
        flat = torch.tensor([token for new in tokens.values() for token in new], dtype=torch.int64)
        for layer in range(LAYERS):
            self.cache.store(layer, BANK_K[layer, flat], BANK_V[layer, flat], slots)
        self.model = grown

    @precondition(lambda self: 0 < len(self.model) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = self.some(data)
        pages, length = self.model[seq]
        self.model[self.cache.fork(seq)] = (list(pages), length)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = self.some(data)
        pages, length = self.model[seq]
        length = data.draw(st.integers(0, length))
        self.cache.truncate(seq, length)
        self.model[seq] = (pages[: -(-length // 16)], length)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.some(data)
        self.cache.free(seq)
        del self.model[seq]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=st.integers(0, 99))
    def decode(self, data: st.DataObject, seed: int) -> None:
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=4))
        q = torch.randn(len(seqs), 1, HEADS * GROUP, DK, generator=torch.Generator().manual_seed(seed))
        out, lse = self.cache.decode(1, q, seqs, scale=0.25)
        for b, seq in enumerate(seqs):
            k, v = (bank[1, self.tokens(seq)] for bank in self.bank)
            if len(k):
                assert_close((out[b], lse[b]), dense(q[b], k, v, 0.25))
            else:
                assert not out[b].any()

    @rule()
    def poison(self) -> None:
        self.cache.pages[:, self.cache._allocator.free] = 0xFF

    def tokens(self, seq: int) -> list[int]:
        pages, length = self.model[seq]
        return [token for page in pages for token in page][:length] if length else []

    @invariant()
    def contents_are_those_of_the_model(self) -> None:
        assert self.cache.sequences == sorted(self.model)
        for seq, (_, length) in self.model.items():
            assert self.cache.length(seq) == length
            for layer in range(LAYERS):
                for loaded, bank in zip(self.cache.load(layer, seq), self.bank, strict=True):
                    assert torch.equal(loaded, bank[layer, self.tokens(seq)])

    @invariant()
    def pages_are_counted_exactly(self) -> None:
        tables = [held.table for held in self.cache._held.values()]
        held, free = [page for table in tables for page in table], self.cache._allocator.free
        assert self.cache.free_pages == 7 - self.pages_in(self.model)
        assert len(free) == len(set(free))
        assert set(free) | set(held) == set(range(7))
        assert not set(free) & set(held)
        assert self.cache._allocator.references == [held.count(page) for page in range(7)]


class TestAgainstNaiveModel(Machine.TestCase):  # type: ignore[valid-type,misc]
    settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def test_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples of docs/paged_cache.md run, one after the other, and print what their comments say."""
    text = (Path(__file__).parents[1] / "docs" / "paged_cache.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks)
    exec(compile(code, "paged_cache.md", "exec"), {})
    promised = [line.split("# ", 1)[1] for line in code.splitlines() if line.strip().startswith("print(")]
    assert capsys.readouterr().out.splitlines() == promised
