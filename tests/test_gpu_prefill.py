"""The CUDA prefill against attention in float64, with each library: run with ``pytest -m gpu`` on an H100 or H200."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from ops_cases import Cache, empty_cache

from kvfold import ops
from kvfold.errors import FormatError
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.ops.cuda import dense, prefill, runtime, windows

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
BF16, F16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 4e-3, F16: 1e-3}
"""Largest error of a chunk's output, relative to its norm. Rounding to bfloat16 alone makes 1.7e-3."""


@pytest.fixture(params=["cudnn", "fa3"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with suppress(Exception):  # the tests may use it, though kvfold does not import it
        importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    with dense.engine(request.param), ops.backend("cuda"):
        try:
            dense.choose(DEVICE)
        except FormatError as error:
            pytest.skip(str(error))
        yield request.param


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def stored(lengths: Sequence[int], spec: str, heads: int, k_size: float = 1.0) -> Cache:
    layout = PageLayout.of(spec, 128, page_size=64)
    cache = empty_cache(layout, lengths, heads)
    pages, table = cache.pages.to(DEVICE), cache.table.to(DEVICE)
    for b, length in enumerate(lengths):
        if length:
            k, v = random(length, heads, 128) * k_size, random(length, heads, 128)
            previous = cache.previous(b)
            reference.store_kv(
                k, v, pages, cache.slots(b).to(DEVICE), layout, None if previous is None else previous.to(DEVICE)
            )
    return Cache(layout, pages, table, cache.lengths.to(DEVICE, torch.int32))


def cut(monkeypatch: pytest.MonkeyPatch, room: int, long: float) -> None:
    """Scratch of so many bytes, and two streams for what takes longer than that."""
    monkeypatch.setattr(windows, "SCRATCH_BYTES", room)
    monkeypatch.setattr(windows, "_LONG", long)
    monkeypatch.setattr(windows, "split", windows.split.__wrapped__)
    monkeypatch.setattr(windows, "plan", windows.plan.__wrapped__)


def check(
    contexts: Sequence[int], chunks: Sequence[int], spec: str = "k4v4", heads: int = 2, group: int = 4,
    packed: bool = False, dtype: torch.dtype = BF16, sizes: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:  # fmt: skip
    """Chunks behind contexts; ``sizes`` are those of stored K, and of the chunks' own K and V."""
    lengths = [context + (count if packed else 0) for context, count in zip(contexts, chunks, strict=True)]
    cache = stored(lengths, spec, heads, sizes[0])
    total = sum(chunks)
    q = (random(total, heads * group, 128) / max(sizes[1], 1.0)).to(dtype)
    k, v = ((random(total, heads, 128) * size).to(dtype) for size in sizes[1:])
    bounds = torch.tensor([0, *chunks]).cumsum(0).int().to(DEVICE)
    own = {} if packed else {"k": k, "v": v}
    given = torch.full_like(q, torch.nan)
    out, lse = ops.prefill_attention(
        q, cache.pages, cache.table, cache.lengths, bounds, cache.layout, scale=128**-0.5, out=given, **own
    )
    assert out is given
    begin = 0
    for b, (context, count) in enumerate(zip(contexts, chunks, strict=True)):
        rows = slice(begin, begin + count)
        begin += count
        parts = []
        if lengths[b]:
            parts.append(reference.load_kv(cache.pages, cache.table[b : b + 1], cache.layout, lengths[b]))
            parts[0] = tuple(x[0, : lengths[b]].double() for x in parts[0])
        if not packed:
            parts.append((k[rows].double(), v[rows].double()))
        keys, values = (torch.cat(x) for x in zip(*parts, strict=True))
        seen = torch.arange(context + count, device=DEVICE) <= torch.arange(
            context, context + count, device=DEVICE
        ).unsqueeze(1)
        for head in range(heads):  # one at a time: scores are float64
            queries = slice(head * group, (head + 1) * group)
            scores = torch.einsum("tgd,nd->gtn", q[rows, queries].double(), keys[:, head]) * 128**-0.5
            scores = scores.masked_fill(~seen, -torch.inf)
            want = torch.einsum("gtn,nd->tgd", torch.softmax(scores, -1), values[:, head])
            error = (out[rows, queries].double() - want).norm() / want.norm()
            assert error <= TOLERANCE[dtype], (b, head)
            # float16 rounds q and K: an error of each score that grows with both
            near = 3e-3 + 1e-4 * q[rows, queries].double().norm(dim=-1).T * keys[:, head].norm(dim=-1).max() * 128**-0.5
            assert ((lse[queries, rows] - torch.logsumexp(scores, -1)).abs() < near).all(), (b, head)


@pytest.mark.parametrize("packed", [False, True], ids=["exact", "packed"])
@pytest.mark.parametrize(
    ("spec", "contexts", "chunks", "heads", "group"),
    [
        ("k4v4", (0, 100, 777, 3000), (130, 64, 5, 300), 2, 4),
        ("k3v2", (0, 20000, 40), (500, 100, 1), 8, 1),
        ("k4v4", (30720,), (2048,), 4, 2),
        ("k4v3+mean", (0, 5000, 40, 64), (130, 300, 1, 64), 4, 2),
        ("k3tv4t", (0, 5000, 40), (130, 300, 1), 4, 2),
        ("k4tv2t+mean", (3000,), (300,), 2, 4),
        ("k4v4", (0, 0, 0, 500, 0, 0), (130, 1, 700, 300, 5, 64), 4, 4),
    ],
)
def test_batches(
    spec: str, contexts: tuple[int, ...], chunks: tuple[int, ...], heads: int, group: int, packed: bool, engine: str
) -> None:
    check(contexts, chunks, spec, heads, group, packed)


def test_float16(engine: str) -> None:
    check((5000,), (200,), heads=8, group=8, dtype=F16)


@pytest.mark.parametrize("sizes", [(4.0, 1.0, 1.0), (1.0, 1e12, 2e37), (1.0, 3e4, 1e20), (1.0, 1.0, 1e-20)], ids=str)
def test_sizes(sizes: tuple[float, float, float], engine: str) -> None:
    check((5000,), (200,), sizes=sizes)


def test_few_queries_of_a_long_context(engine: str) -> None:
    check((35000,), (64,), heads=8, group=4)
    check((35000,), (18,), heads=8, group=4)


@pytest.mark.parametrize("packed", [False, True], ids=["exact", "packed"])
def test_many_windows(packed: bool, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2**20, 1e9)
    check((5000, 0, 300), (300, 130, 65), "k4v3", 4, 4, packed)


@pytest.mark.parametrize("packed", [False, True], ids=["exact", "packed"])
@pytest.mark.parametrize(
    ("context", "count", "heads", "group", "lent"),
    [(30720, 2048, 8, 4, 1), (32768, 2048, 8, 4, 2), (50000, 2048, 4, 4, 1), (5000, 700, 5, 2, 0), (900, 65, 2, 8, 0)],
)
def test_two_streams(
    context: int, count: int, heads: int, group: int, lent: int, packed: bool, engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same bits as on one, time after time, while what they have freed is used by others.

    ``lent``: streams whose queries lie in the result, where that is possible.
    """
    cache = stored([context + (count if packed else 0)], "k4v4", heads)
    q, k, v = (random(count, x, 128).to(BF16) for x in (heads * group, heads, heads))
    own = {} if packed else {"k": k, "v": v}
    bounds = torch.tensor([0, count], dtype=torch.int32, device=DEVICE)

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.prefill_attention(
            q, cache.pages, cache.table, cache.lengths, bounds, cache.layout, scale=128**-0.5, **own
        )

    cut(monkeypatch, context * 512 + 8 * count * group * 256 if context < 10000 else windows.SCRATCH_BYTES, 0.0)
    shares: list[windows.Share] = []
    plan = windows.plan

    def watched(*args: Any) -> windows.Plan:
        found = plan(*args)
        shares.append(found.share)
        return found

    monkeypatch.setattr(windows, "plan", watched)
    one = torch.cuda.current_stream()
    with monkeypatch.context() as on_one:
        on_one.setattr(runtime, "second_stream", lambda device: one)  # the same windows, one behind the other
        want = result()
    itself = prefill._attend_to_itself

    def late(*args: Any) -> Any:
        torch.cuda._sleep(4_000_000)  # some milliseconds
        return itself(*args)

    for time in range(8):
        monkeypatch.setattr(prefill, "_attend_to_itself", late if time % 2 else itself)
        dense._bounds.cache_clear()  # lengths are made anew, on either stream
        got = result()
        for _ in range(6):
            torch.full((2**22,), torch.nan, device=DEVICE)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    may_lend = engine == "fa3" and dense.writes_into() and not packed
    assert {(share.streams, share.lent) for share in shares} == {(2, lent if may_lend else 0)}


def test_chunks_that_exceed_a_window(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2**20, 1e9)
    check((1000,), (1300,), heads=2, group=2)


@pytest.mark.parametrize("packed", [False, True], ids=["exact", "packed"])
@pytest.mark.parametrize(
    ("context", "count"),
    [(30720, 2048), (32768, 2048), (120_000, 2048), (24_000, 8192), (120_000, 8192), (30720, 512), (32768, 65),
     (6000, 2048), (0, 8192)],
)  # fmt: skip
@pytest.mark.parametrize(("heads", "group"), [(8, 4), (8, 5), (6, 4), (5, 3)])
def test_it_takes_no_more_than_it_says(
    heads: int, group: int, context: int, count: int, packed: bool, engine: str
) -> None:
    """All that is allocated beside the result, what FlashAttention-3 makes itself too, but for log-sum-exps."""
    if engine != "fa3" or not dense.writes_into():
        pytest.skip("what cuDNN allocates is its own")
    layout = PageLayout.of("k4v4", 128, page_size=64)
    cache = empty_cache(layout, [context + (count if packed else 0)], heads)
    pages, table = cache.pages.zero_().to(DEVICE), cache.table.to(DEVICE)
    lengths, bounds = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cache.lengths.tolist(), [0, count]))
    q, k, v = (random(count, x, 128).to(BF16) for x in (heads * group, heads, heads))
    own = {} if packed else {"k": k, "v": v}
    taken = 0
    for _ in range(2):  # the first compiles, and makes what is kept
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = ops.prefill_attention(q, pages, table, lengths, bounds, layout, scale=128**-0.5, **own)
        taken = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
    assert taken <= windows.SCRATCH_BYTES + 4 * lse.nbytes + 2**18
    assert taken > 2**22 or not context


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("at_once", [True, False])
def test_nan_in_the_pages_reaches_the_result(
    at_once: bool, side: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention-3 has no log-sum-exp of a sum that is NaN; in enough blocks that no processors share keys."""
    if engine != "fa3":
        pytest.skip("what cuDNN makes of NaN is its own")
    context, count, heads, group = 3000, 1024, 2, 16
    cut(monkeypatch, windows.SCRATCH_BYTES if at_once else 2000 * 512 + 3 * 256 * count * group, 1e9)
    layout = PageLayout.of("k4v4", 128, page_size=64)
    cache = empty_cache(layout, [context], heads)
    pages = cache.pages.to(DEVICE)
    given = {name: random(context, heads, 128) for name in "kv"}
    given[side][700, 1, 5] = torch.nan
    reference.store_kv(*given.values(), pages, cache.slots(0).to(DEVICE), layout, None)
    q, k, v = (random(count, x, 128).to(BF16) for x in (heads * group, heads, heads))
    lengths, bounds = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([context], [0, count]))
    out, _ = ops.prefill_attention(
        q, pages, cache.table.to(DEVICE), lengths, bounds, layout, scale=128**-0.5, k=k, v=v
    )
    assert out[:, group:].isnan().all()
    assert out[:, :group].isfinite().all()
