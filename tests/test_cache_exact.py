"""Exact sinks and tails of the paged cache: against float64, sequence by sequence and query by query."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold import cache as cache_module
from kvfold import ops
from kvfold.cache import PagedKVCache
from kvfold.errors import CapacityError, ShapeError
from kvfold.formats import KVFormat
from kvfold.planner import ModelShape, cache_bytes, plan

LAYERS, HEADS = 2, 2
FORMATS = ["k4v4+sinks3+tail5", "k4v4+tail20", "k4v4+sinks5", "k3v4t+mean+sinks18+tail17", "k2v3+sinks1+tail1"]


def make(format: str, num_pages: int = 24, **sizes: Any) -> PagedKVCache:
    """A small cache full of NaN."""
    sizes = {
        "num_layers": LAYERS, "num_kv_heads": HEADS, "head_size": 32, "head_size_v": 32, "page_size": 16,
        "dtype": torch.float32, "num_sequences": 2,
    } | sizes  # fmt: skip
    cache = PagedKVCache(format, num_pages=num_pages, **sizes)
    cache.pages.fill_(0xFF)
    assert cache.exact is not None
    cache.exact.k.fill_(torch.nan)
    cache.exact.v.fill_(torch.nan)
    return cache


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what queries read, in float64 ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """A sequence as it should be: K and V ``[num_layers, n, H, d]`` as they came, and where its exact tail begins."""

    k: torch.Tensor
    v: torch.Tensor
    exact_from: int = 0

    @property
    def length(self) -> int:
        return self.k.shape[1]

    def grown(self, k: torch.Tensor, v: torch.Tensor, tail: int) -> Truth:
        if not k.shape[1]:
            return self
        k, v = torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)
        return Truth(k, v, max(self.exact_from, k.shape[1] - tail))

    def cut(self, length: int) -> Truth:
        return Truth(self.k[:, :length], self.v[:, :length], min(self.exact_from, length))


def reads_exactly(
    fmt: KVFormat, position: int, token: int, exact_from: int, chunk: tuple[int, int] | None = None
) -> bool:
    """Whether a query at a position reads a token exactly. ``chunk``: where the queries' chunk begins and ends, if it
    comes with them."""
    if token < fmt.sinks or (chunk is not None and token >= chunk[0]):
        return True
    if chunk is None:
        return exact_from <= token and position - fmt.tail < token
    single = chunk[1] - chunk[0] == 1
    return max(exact_from, chunk[0] - fmt.tail + single) <= token


def dense(
    cache: PagedKVCache, layer: int, seq: int, truth: Truth, q: torch.Tensor, exact_from: int, scale: float,
    softcap: float | None = None, window: int | None = None, own: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of the last tokens' q ``[Tq, Hq, dk]`` in float64: out ``[Tq, Hq, dv]`` and ``[Hq, Tq]``."""
    packed_k, packed_v = cache.load(layer, seq)
    group, start = q.shape[1] // HEADS, truth.length - len(q)
    outs, lses = [], []
    for t, position in enumerate(range(start, truth.length)):
        seen = [j for j in range(position + 1) if window is None or j > position - window]
        if not seen:
            outs.append(torch.zeros(q.shape[1], truth.v.shape[-1]).double())
            lses.append(torch.full((q.shape[1],), -torch.inf).double())
            continue
        chunk = (start, truth.length) if own else None
        exact = [reads_exactly(cache.format, position, j, exact_from, chunk) for j in seen]
        choice = torch.tensor(exact)[:, None, None]
        k, v = (
            torch.where(choice, x[layer][seen].double(), packed[seen].double()).repeat_interleave(group, dim=1)
            for x, packed in ((truth.k, packed_k), (truth.v, packed_v))
        )
        scores = torch.einsum("hd,nhd->hn", q[t].double(), k) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        outs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses, dim=1)


def assert_close(got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


# --- one sequence after the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("format", FORMATS)
def test_decode_step_by_step(format: str, backend: str) -> None:
    """From the empty sequence on, over page borders, with every option."""
    cache = make(format)
    fmt, seqs = cache.format, [cache.new_sequence() for _ in range(3)]
    truths = [Truth(torch.empty(LAYERS, 0, HEADS, 32), torch.empty(LAYERS, 0, HEADS, 32)) for _ in seqs]
    with ops.backend(backend):
        for step in range(40):
            counts = [1, step % 2, 3 * (step % 5 == 0)]
            k, v = noise(LAYERS, sum(counts), HEADS, 32, seed=step), noise(LAYERS, sum(counts), HEADS, 32, seed=-step)
            slots = cache.extend(dict(zip(seqs, counts, strict=True)))
            parts = zip(truths, k.split(counts, 1), v.split(counts, 1), strict=True)
            truths = [truth.grown(*new, fmt.tail) for truth, *new in parts]
            option: dict[str, Any] = ({}, {"softcap": 2.0}, {"window": 1 + step % 9})[step % 3]
            q = noise(3, 1, 3 * HEADS, 32, seed=step)
            for layer in range(LAYERS):
                cache.store(layer, k[layer], v[layer], slots)
                out, lse = cache.decode(layer, q, seqs, scale=0.3, **option)
                for b, (seq, truth) in enumerate(zip(seqs, truths, strict=True)):
                    wanted = dense(cache, layer, seq, truth, q[b], truth.exact_from, 0.3, **option)
                    assert_close((out[b], lse[b]), wanted)


@pytest.mark.parametrize("sizes", [(32, 64), (64, 128), (128, 32)], ids=str)
@pytest.mark.parametrize("mode", ["packed", "exact", "exact, stored before"])
@pytest.mark.parametrize("format", FORMATS)
def test_prefill(format: str, mode: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk after chunk, ragged, in blocks of queries."""
    monkeypatch.setattr(cache_module, "QUERY_BLOCK", 8)
    cache = make(format, head_size=sizes[0], head_size_v=sizes[1])
    seqs = [cache.new_sequence() for _ in range(3)]
    truths = [Truth(*(torch.empty(LAYERS, 0, HEADS, size) for size in sizes)) for _ in seqs]
    steps = ([2, 9, 0], [30, 1, 4], [1, 1, 1], [6, 18, 3], [0, 3, 40])
    for step, counts in enumerate(steps):
        k, v = (noise(LAYERS, sum(counts), HEADS, size, seed=step + size) for size in sizes)
        slots = cache.extend(dict(zip(seqs, counts, strict=True)))
        before = [truth.exact_from for truth in truths]
        parts = zip(truths, k.split(counts, 1), v.split(counts, 1), strict=True)
        truths = [truth.grown(*new, cache.format.tail) for truth, *new in parts]
        q, bounds = noise(sum(counts), 2 * HEADS, sizes[0], seed=step), [0, *itertools.accumulate(counts)]
        option: dict[str, Any] = ({}, {"softcap": 2.0}, {"window": 7})[step % 3]
        for layer in range(LAYERS):
            own = {} if mode == "packed" else {"k": k[layer], "v": v[layer]}
            if mode != "exact":
                cache.store(layer, k[layer], v[layer], slots)
            out, lse = cache.prefill(layer, q, seqs, bounds, scale=0.3, **own, **option)
            if mode == "exact":
                cache.store(layer, k[layer], v[layer], slots)
            for seq, truth, known, begin, end in zip(seqs, truths, before, bounds, bounds[1:], strict=False):
                if begin < end:
                    wanted = dense(cache, layer, seq, truth, q[begin:end], known, 0.3, **option, own=bool(own))
                    assert_close((out[begin:end], lse[:, begin:end]), wanted)


def test_a_chunk_of_which_only_the_last_tokens_ask() -> None:
    """Right after the store their tails are whole, afterwards what the ring has."""
    cache = make("k2v2+sinks2+tail6")
    seq, other = cache.new_sequence(), cache.new_sequence()
    k, v = noise(LAYERS, 30, HEADS, 32), noise(LAYERS, 30, HEADS, 32, seed=1)
    slots, q = cache.extend({other: 1, seq: 29}), noise(1, 5, HEADS, 32, seed=2)
    truth = Truth(k[:, 1:], v[:, 1:], 23)
    for layer in range(LAYERS):
        cache.store(layer, k[layer], v[layer], slots)
        for bounds in ([0, 5], None):
            if bounds is None:
                out, lse = cache.decode(layer, q, [seq], scale=0.3)
            else:
                out, lse = (x[None] for x in cache.prefill(layer, q[0], [seq], bounds, scale=0.3))
            assert_close((out[0], lse[0]), dense(cache, layer, seq, truth, q[0], 0, 0.3))
    out, lse = cache.decode(0, q, [seq], scale=0.3)
    assert_close((out[0], lse[0]), dense(cache, 0, seq, truth, q[0], 23, 0.3))
    # one of whom there is more beside one of whom there is not
    out, lse = cache.decode(1, q[:, :1].expand(2, 1, -1, -1), [seq, other], scale=0.3)
    out, lse = cache.decode(1, q.expand(2, -1, -1, -1), [seq, other], scale=0.3)
    assert_close((out[0], lse[0]), dense(cache, 1, seq, truth, q[0], 0, 0.3))
    alone = cache.decode(1, q, [other], scale=0.3)
    assert torch.equal(out[1], alone[0][0])


def test_storing_twice_changes_nothing() -> None:
    cache = make("k2v2+sinks2+tail6")
    seq = cache.new_sequence()
    cache.append(seq, noise(LAYERS, 9, HEADS, 32), noise(LAYERS, 9, HEADS, 32))
    k, v, q = noise(8, HEADS, 32, seed=3), noise(8, HEADS, 32, seed=4), noise(8, HEADS, 32)
    slots = cache.extend(seq, 8)
    cache.store(0, k, v, slots)
    once = cache.prefill(0, q, [seq], [0, 8], scale=0.3)
    cache.store(0, k, v, slots)
    for x, y in zip(once, cache.prefill(0, q, [seq], [0, 8], scale=0.3), strict=True):
        assert torch.equal(x, y)


# --- against the transformers cache -----------------------------------------------------------------------------------


class Reference:
    """A sequence in the layers of the transformers cache."""

    def __init__(self, fmt: KVFormat, chunk: str, group: int) -> None:
        layers = pytest.importorskip("kvfold.integrations.transformers.layers")
        self.config = SimpleNamespace(_attn_implementation="kvfold")
        self.layers = [layers.PackedLayer(self.config, fmt, 16, chunk) for _ in range(LAYERS)]
        self.module: Any = SimpleNamespace(num_key_value_groups=group, is_causal=True)

    def step(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of q ``[n, Hq, dk]`` after an update with k and v ``[n, H, d]``."""
        attention = pytest.importorskip("kvfold.integrations.transformers.attention")
        keys, values = self.layers[layer].update(*(x.transpose(0, 1)[None] for x in (k, v)))
        out, _ = attention.attention_forward(
            self.module, q.transpose(0, 1)[None], keys, values, None, scaling=0.3
        )  # [1, n, Hq, dv]
        return out[0]

    def crop(self, count: int) -> None:
        for layer in self.layers:
            layer.crop(-count)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    format=st.sampled_from(FORMATS), chunk=st.sampled_from(["packed", "exact"]),
    sizes=st.sampled_from([(32, 32), (64, 32), (128, 128)]), group=st.sampled_from([1, 2, 5]),
    history=st.lists(
        st.one_of(
            st.lists(st.sampled_from([0, 1, 1, 2, 7, 20, 33]), min_size=3, max_size=3),
            st.just([1, 1, 1]),
            st.tuples(st.integers(0, 2), st.integers(1, 9)),
        ), min_size=2, max_size=9,
    ),
)  # fmt: skip
def test_the_transformers_cache_gives_the_same(
    format: str, chunk: str, sizes: tuple[int, int], group: int, history: list[Any]
) -> None:
    """The same histories of chunks, tokens and truncations, each sequence in layers of its own there."""
    cache = make(format, num_pages=60, head_size=sizes[0], head_size_v=sizes[1])
    seqs = [cache.new_sequence() for _ in range(3)]
    references = [Reference(cache.format, chunk, group) for _ in seqs]
    for number, event in enumerate(history):
        if isinstance(event, tuple):
            which, count = event
            count = min(count, cache.length(seqs[which]))
            cache.truncate(seqs[which], cache.length(seqs[which]) - count)
            references[which].crop(count)
            continue
        counts = {seq: n for seq, n in zip(seqs, event, strict=True) if n}
        if not counts:
            continue
        total, bounds = sum(counts.values()), [0, *itertools.accumulate(counts.values())]
        first = any(not cache.length(seq) for seq in counts)
        slots = cache.extend(counts)
        for layer in range(LAYERS):
            q = noise(total, group * HEADS, sizes[0], seed=9 * number + layer)
            k, v = (noise(total, HEADS, size, seed=9 * number + layer + size) for size in sizes)
            # of one token, and not the first, the transformers cache reads the token itself as it is stored
            single = total == len(counts) and not first
            own = {"k": k, "v": v} if chunk == "exact" and not single else {}
            if number % 2 or not own:
                cache.store(layer, k, v, slots)
            if single:
                out = cache.decode(layer, q[:, None], list(counts), scale=0.3)[0][:, 0]
            else:
                out, _ = cache.prefill(layer, q, list(counts), bounds, scale=0.3, **own)
            cache.store(layer, k, v, slots)
            for seq, begin, end in zip(counts, bounds, bounds[1:], strict=False):
                part = slice(begin, end)
                wanted = references[seq].step(layer, q[part], k[part], v[part])
                alone = chunk == "exact" and end - begin == 1 and not cache.format.tail and not single
                if not alone or references[seq].layers[layer].length == 1:
                    torch.testing.assert_close(out[part], wanted, rtol=1e-5, atol=1e-5)


# --- many sequences: any history --------------------------------------------------------------------------------------

BANK = 97
BANK_K, BANK_V = noise(LAYERS, BANK, HEADS, 32, seed=3), noise(LAYERS, BANK, HEADS, 32, seed=4)


class Machine(RuleBasedStateMachine):
    """Sequences as :class:`Truth`, and what is at hand as the last step left it."""

    format = ""

    @initialize()
    def begin(self) -> None:
        self.cache = make(self.format, num_pages=20)
        self.truths: dict[int, Truth] = {}
        self.at_hand: dict[int, int] = {}  # in the last layer, if the last step brought a chunk: where the tail began

    def some(self, data: st.DataObject, most: int = 1, unique: bool = True) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.truths)), min_size=1, max_size=most, unique=unique))

    @precondition(lambda self: len(self.truths) < 6)
    @rule()
    def new(self) -> None:
        self.truths[self.cache.new_sequence()] = Truth(BANK_K[:, :0], BANK_V[:, :0])

    @precondition(lambda self: self.truths)
    @rule(
        data=st.data(), mode=st.sampled_from(["decode", "packed", "exact", "exact, stored"]),
        offset=st.integers(0, BANK), window=st.sampled_from([None, None, 4, 19]),
    )  # fmt: skip
    def step(self, data: st.DataObject, mode: str, offset: int, window: int | None) -> None:
        seqs = self.some(data, 3)
        size = data.draw(st.sampled_from([1, 1, 2, 3]))
        counts = {seq: size if mode == "decode" else data.draw(st.sampled_from([0, 1, 3, 8, 25])) for seq in seqs}
        total = sum(counts.values())
        try:
            slots = self.cache.extend(counts)
        except CapacityError:
            return
        tokens = torch.arange(offset, offset + total) % BANK
        k, v = BANK_K[:, tokens], BANK_V[:, tokens]
        before = {seq: self.truths[seq].exact_from for seq in seqs}
        split = list(counts.values())
        for seq, *new in zip(seqs, k.split(split, 1), v.split(split, 1), strict=True):
            self.truths[seq] = self.truths[seq].grown(*new, self.cache.format.tail)
        self.at_hand = {seq: before[seq] for seq in seqs if counts[seq] > 1 and self.cache.format.tail}
        q, bounds = noise(total, 2 * HEADS, 32, seed=offset), [0, *itertools.accumulate(split)]
        options: dict[str, Any] = {"scale": 0.3, "window": window}
        for layer in range(LAYERS):
            own = {"k": k[layer], "v": v[layer]} if "exact" in mode else {}
            if mode != "exact":
                self.cache.store(layer, k[layer], v[layer], slots)
            if mode == "decode":
                out, lse = self.cache.decode(layer, q.unflatten(0, (-1, size)), seqs, **options)
                out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
            else:
                out, lse = self.cache.prefill(layer, q, seqs, bounds, **own, **options)
            if mode == "exact":
                self.cache.store(layer, k[layer], v[layer], slots)
            for seq, begin, end in zip(seqs, bounds, bounds[1:], strict=False):
                if begin < end:
                    known = before[seq] if own or seq in self.at_hand else self.truths[seq].exact_from
                    self.check(layer, seq, q[begin:end], (out[begin:end], lse[:, begin:end]), known, bool(own), window)

    def check(
        self, layer: int, seq: int, q: torch.Tensor, got: tuple[torch.Tensor, torch.Tensor], exact_from: int,
        own: bool = False, window: int | None = None,
    ) -> None:  # fmt: skip
        truth = self.truths[seq]
        assert_close(got, dense(self.cache, layer, seq, truth, q, exact_from, 0.3, window=window, own=own))

    @precondition(lambda self: self.truths)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), queries=st.integers(1, 4), seed=st.integers(0, 99))
    def decode(self, data: st.DataObject, layer: int, queries: int, seed: int) -> None:
        """At any time, of any sequences, of more queries than the last step had tokens."""
        seqs = self.some(data, 4, unique=False)
        q = noise(len(seqs), queries, 3 * HEADS, 32, seed=seed)
        out, lse = self.cache.decode(layer, q, seqs, scale=0.3)
        for b, seq in enumerate(seqs):
            truth = self.truths[seq]
            known = truth.exact_from
            if layer == LAYERS - 1 and queries > 1:
                known = self.at_hand.get(seq, known)
            self.check(layer, seq, q[b], (out[b], lse[b]), known)

    @precondition(lambda self: 0 < len(self.truths) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        (seq,) = self.some(data)
        self.truths[self.cache.fork(seq)] = self.truths[seq]

    @precondition(lambda self: self.truths)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        (seq,) = self.some(data)
        length = data.draw(st.integers(0, self.truths[seq].length))
        self.cache.truncate(seq, length)
        self.truths[seq] = self.truths[seq].cut(length)
        self.at_hand = {}

    @precondition(lambda self: self.truths)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        (seq,) = self.some(data)
        self.cache.free(seq)
        del self.truths[seq]
        self.at_hand = {}

    @rule(folder=st.just(None), beside=st.booleans())
    def save_and_load(self, folder: None, beside: bool) -> None:
        path = self.path / "cache.safetensors"
        self.cache.save(path)
        if beside:
            other = make(self.format, num_pages=20)
            other.free(other.new_sequence())
            new = other.restore(path)
        else:
            other = PagedKVCache.load_file(path, num_pages=20)
            new = other.sequences
        self.cache, self.truths = other, dict(zip(new, self.truths.values(), strict=True))
        self.at_hand = {}

    @rule()
    def poison(self) -> None:
        """What no sequence has may hold anything."""
        self.cache.pages[:, self.cache._allocator.free] = 0xFF
        exact = self.cache.exact
        assert exact is not None
        stale = torch.ones(exact.k.shape[1] * exact.width, dtype=torch.bool)
        stale[exact.places(self.cache._held.values())] = False
        for layer in range(LAYERS):
            for x in exact.tokens(layer):
                x[stale] = torch.nan

    @invariant()
    def everything_is_counted(self) -> None:
        cache, rows = self.cache, [held.row for held in self.cache._held.values()]
        assert len(set(rows)) == len(rows) == len(self.truths)
        assert cache.exact is not None
        assert all(0 <= row < cache.exact.k.shape[1] for row in rows)
        row_bytes = LAYERS * HEADS * cache.exact.width * (32 + 32) * 4
        pages = cache.num_pages - cache.free_pages
        assert cache.bytes_in_use == pages * cache.pages[:, 0].nbytes + len(rows) * row_bytes
        assert cache.bytes_allocated == cache.pages.nbytes + cache.exact.k.nbytes + cache.exact.v.nbytes
        for seq, truth in self.truths.items():
            assert (cache.length(seq), cache._held[seq].exact_from) == (truth.length, truth.exact_from)


@pytest.mark.parametrize(
    "format", ["k4v4+sinks3+tail20", "k4v4+tail7", "k4v4+sinks19", "k3v4+mean+sinks2+tail17"], ids=str
)
def test_any_history(format: str, tmp_path: Path) -> None:
    machine = type("Formatted", (Machine,), {"format": format, "path": tmp_path})
    case = machine.TestCase
    case.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    case("runTest").runTest()


# --- rows -------------------------------------------------------------------------------------------------------------


def filled(format: str, lengths: Sequence[int], **sizes: Any) -> PagedKVCache:
    cache = make(format, **sizes)
    for number, n in enumerate(lengths):
        k, v = noise(LAYERS, n, HEADS, 32, seed=number), noise(LAYERS, n, HEADS, 32, seed=-number - 1)
        cache.append(cache.new_sequence(), k, v)
    return cache


def test_a_freed_row_goes_to_another_sequence_that_sees_nothing_of_it() -> None:
    cache = filled("k4v4+sinks4+tail8", [20, 30])
    assert cache.exact is not None
    assert cache.exact.k.shape[1] == 2
    cache.free(0)
    cache.append(cache.new_sequence(), *(noise(LAYERS, 3, HEADS, 32, seed=seed) for seed in (7, 8)))
    assert cache.exact.k.shape[1] == 2
    assert cache._held[2].row == 0
    truth = Truth(noise(LAYERS, 3, HEADS, 32, seed=7), noise(LAYERS, 3, HEADS, 32, seed=8))
    q = noise(1, 3, 4, 32)
    out, lse = cache.decode(0, q, [2], scale=0.3)
    assert_close((out[0], lse[0]), dense(cache, 0, 2, truth, q[0], 0, 0.3))


@pytest.mark.parametrize("gone", ["before", "between layers"])
def test_what_was_reserved_for_a_freed_sequence_does_not_reach_the_next_one(gone: str) -> None:
    cache = filled("k4v4+sinks4+tail8", [20, 20])
    k, v, q = noise(2, HEADS, 32), noise(2, HEADS, 32), noise(1, 1, 4, 32)
    slots = cache.extend({0: 1, 1: 1})
    if gone == "between layers":
        cache.store(0, k, v, slots)
    cache.free(1)
    child = cache.fork(0)
    assert cache.exact is not None
    before = cache.exact.k[:, cache._held[child].row].clone()
    for layer in range(LAYERS):
        cache.store(layer, k, v, slots)
        assert torch.equal(cache.exact.k[layer, cache._held[child].row], before[layer])
        assert cache.decode(layer, q, [0], scale=0.3)[0].isfinite().all()


def test_forks_go_apart() -> None:
    cache = filled("k2v2+sinks2+tail8", [12], num_sequences=0)
    truth = Truth(noise(LAYERS, 12, HEADS, 32, seed=0), noise(LAYERS, 12, HEADS, 32, seed=-1), 4)
    cache.fork(0)
    truths = [truth, truth]
    for step in range(12):
        k, v = noise(LAYERS, 2, HEADS, 32, seed=50 + step), noise(LAYERS, 2, HEADS, 32, seed=90 + step)
        slots, q = cache.extend({1: 1, 0: 1}), noise(2, 1, 4, 32, seed=step)
        truths = [one.grown(k[:, [1 - b]], v[:, [1 - b]], 8) for b, one in enumerate(truths)]
        for layer in range(LAYERS):
            cache.store(layer, k[layer], v[layer], slots)
            out, lse = cache.decode(layer, q, [0, 1], scale=0.3)
            for b in (0, 1):
                wanted = dense(cache, layer, b, truths[b], q[b], truths[b].exact_from, 0.3)
                assert_close((out[b], lse[b]), wanted)


# --- accounting, dtypes and errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_agree_with_the_planner(format: str, dtype: torch.dtype) -> None:
    shape = ModelShape.uniform(LAYERS, HEADS, 32, 64)
    shape = replace(shape, itemsize=dtype.itemsize)
    cache = make(format, num_pages=9, dtype=dtype, head_size_v=64, num_sequences=3)
    assert cache.bytes_in_use == 0
    for _ in range(3):
        cache.extend(cache.new_sequence(), 33)
    assert cache.free_pages == 0
    assert cache.bytes_in_use == cache.bytes_allocated == cache_bytes(shape, format, 33, 16, sequences=3)
    cache.free(1)
    assert cache.bytes_in_use == cache_bytes(shape, format, 33, 16, sequences=2)


def test_for_memory_counts_the_rows() -> None:
    sizes: Any = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_size": 32, "page_size": 16}
    shape, format = ModelShape.uniform(LAYERS, HEADS, 32), "k4v4+sinks4+tail16"
    for memory in (cache_bytes(shape, format, 160, 16), cache_bytes(shape, format, 160, 16) - 1):
        cache = PagedKVCache.for_memory(format, memory, **sizes)
        assert cache.num_pages * 16 == plan(shape, memory, 100, [format], 16)[-1].tokens
        assert cache.bytes_allocated <= memory
        cache.extend(cache.new_sequence(), cache.num_pages * 16)
        assert cache.bytes_in_use == cache.bytes_allocated <= memory
    memory = cache_bytes(shape, format, 160, 16, sequences=5)
    assert PagedKVCache.for_memory(format, memory, num_sequences=5, **sizes).num_pages == 50
    with pytest.raises(CapacityError, match=r"a page of all layers takes \d+ bytes, the exact tokens of 5 sequences"):
        PagedKVCache.for_memory(format, memory // 20, num_sequences=5, **sizes)


def test_the_dtype_of_exact_tokens() -> None:
    cache = make("k2v2+sinks2+tail6", dtype=torch.bfloat16)
    seq = cache.new_sequence()
    k, v = (noise(LAYERS, 5, HEADS, 32, seed=seed) for seed in (0, 1))
    for wrong in (torch.float32, torch.float16):
        with pytest.raises(ShapeError, match=rf"k is {wrong}.*in torch.bfloat16: make it with dtype={wrong}"):
            cache.append(seq, k.to(wrong), v.to(wrong))
        assert cache.length(seq) == 0
        slots = cache.extend(seq, 5)
        with pytest.raises(ShapeError, match="make it with dtype"):
            cache.store(0, k[0].to(wrong), v[0].to(wrong), slots)
        cache.truncate(seq, 0)
    k, v = k.bfloat16(), v.bfloat16()
    cache.append(seq, k, v)
    q = noise(1, 1, 4, 32).bfloat16()
    out, lse = cache.decode(0, q, [seq], scale=0.3)
    assert out.dtype == torch.bfloat16
    wanted = dense(cache, 0, seq, Truth(k, v), q[0], 0, 0.3)
    torch.testing.assert_close(out[0].double(), wanted[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse[0].double(), wanted[1], rtol=1e-5, atol=1e-5)
    for unkept in (torch.float64, torch.float8_e4m3fn):  # no dtype of a cache would keep them
        with pytest.raises(ShapeError, match=rf"k is {unkept}.*: cast k first"):
            cache.append(seq, k.to(unkept), v.to(unkept))
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_size": 32}
    for bad in (torch.float64, torch.int8, "bfloat16"):
        with pytest.raises(ShapeError, match=f"exact tokens are kept in bfloat16, float16 or float32, not in {bad}"):
            make("k2v2+tail6", dtype=bad)
        with pytest.raises(ShapeError, match=f"exact tokens are kept in bfloat16, float16 or float32, not in {bad}"):
            PagedKVCache.for_memory("k2v2+tail6", 1 << 20, **sizes, dtype=bad)
    wide = make("k2v2+tail6", dtype=torch.float32)
    wide.append(wide.new_sequence(), k, v)
    assert wide.exact is not None
    assert torch.equal(wide.exact.k[:, 0, :5], k.float())


def test_slots_are_those_of_the_last_step() -> None:
    cache = make("k2v2+tail6")
    one, other = cache.new_sequence(), cache.new_sequence()
    k, v = noise(3, HEADS, 32), noise(3, HEADS, 32)
    old = cache.extend(one, 3)
    new = cache.extend(other, 3)
    for slots in (old, new[:2], new.flip(0), new.clone()):
        with pytest.raises(ShapeError, match=r"slots are not those of the last extend\(\)"):
            cache.store(0, k[: len(slots)], v[: len(slots)], slots)
    cache.store(0, k, v, new.view(-1))
    cache.store(0, k[:0], v[:0], cache.extend({}))
    with pytest.raises(ShapeError):
        cache.store(0, k[:2], v[:2], cache.extend(one, 3))


def test_an_exact_chunk_begins_where_the_stored_tokens_end() -> None:
    cache = make("k2v2+tail6")
    seq = cache.new_sequence()
    k, v, q = noise(5, HEADS, 32), noise(5, HEADS, 32), noise(5, 4, 32)
    slots = cache.extend(seq, 5)
    with pytest.raises(ShapeError, match=r"extended at position 0, and its chunk begins at 2: store what lies between"):
        cache.prefill(0, q[:3], [seq], [0, 3], scale=0.3, k=k[:3], v=v[:3])
    with pytest.raises(ShapeError, match="together"):
        cache.prefill(0, q, [seq], [0, 5], scale=0.3, v=v)
    cache.store(0, k, v, slots)
    cache.prefill(0, q[:3], [seq], [0, 3], scale=0.3, k=k[2:], v=v[2:])


@pytest.mark.parametrize("format", FORMATS)
def test_queries_of_another_shape_are_refused_by_their_name(format: str) -> None:
    cache = filled(format, [20])
    for bad in (noise(1, 1, 4, 16), noise(1, 1, 4, 32).int()):
        with pytest.raises(ShapeError, match=r"q is a floating tensor \[\.\.\., query heads, 32\] on cpu, not torch"):
            cache.decode(0, bad, [0], scale=0.3)
        for tokens in (0, 1):
            with pytest.raises(ShapeError, match=r"q is a floating tensor \[\.\.\., query heads, 32\] on cpu, not"):
                cache.prefill(0, bad[0, :tokens], [0], [0, tokens], scale=0.3)


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_to_attend_with_or_to(format: str) -> None:
    cache = make(format)
    seqs = [cache.new_sequence(), cache.new_sequence()]
    out, lse = cache.decode(0, noise(2, 1, 4, 32), seqs, scale=0.3)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert cache.decode(0, noise(2, 0, 4, 32), seqs, scale=0.3)[0].shape == (2, 0, 4, 32)
    for own in ({}, {"k": noise(0, HEADS, 32), "v": noise(0, HEADS, 32)}):
        out, lse = cache.prefill(0, noise(0, 4, 32), seqs, [0, 0, 0], scale=0.3, **own)
        assert (out.shape, lse.shape) == ((0, 4, 32), (4, 0))


def test_a_one_bit_cache_whose_tokens_are_all_exact_loses_nothing() -> None:
    cache = filled("k1v1+sinks20+tail30", [45])
    k, v = noise(LAYERS, 45, HEADS, 32, seed=0), noise(LAYERS, 45, HEADS, 32, seed=-1)
    q = noise(1, 1, 4, 32)
    out, lse = cache.decode(1, q, [0], scale=0.3)
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = ops.exact_attention(q, k[1:], v[1:], scale=0.3, key_start=zero, query_start=zero + 44)
    torch.testing.assert_close(out, wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-6)
