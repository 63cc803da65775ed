"""The CUDA C++ decode kernel against attention in float64: run with ``pytest -m gpu`` on an H100 or H200."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_cases import scheduled
from ops_cases import Cache, State, empty_cache

from kvfold import ops
from kvfold.bench.ours import random_pages
from kvfold.errors import FormatError
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.ops.cuda import decode

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
BACKEND = "cuda"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 4e-3, F16: 1e-3, F32: 5e-4}
"""Largest error of a row of the output, relative to its norm. Rounding to bfloat16 alone makes 1.7e-3."""
RAGGED = (0, 1, 15, 16, 31, 32, 33, 64, 128, 200, 777, 1024)


# --- pages and queries ------------------------------------------------------------------------------------------------


def stored(
    lengths: Sequence[int], spec: str = "k4v4", *, heads: int = 2, page_size: int = 64, head_size: int = 128,
    k: torch.Tensor | None = None, v: torch.Tensor | None = None,
) -> Cache:  # fmt: skip
    """Sequences on the GPU, in pages of no pattern; all that is not stored is NaN, as are the pages of unused entries.

    K and V ``[sum(lengths), heads, head_size]`` are normal unless they are given.
    """
    layout = PageLayout.of(spec, head_size, page_size=page_size)
    cache = empty_cache(layout, lengths, heads)
    slots = torch.cat([cache.slots(b) for b in range(len(lengths))]).to(DEVICE)
    pages, table, ends = cache.pages.to(DEVICE), cache.table.to(DEVICE), cache.lengths.to(DEVICE, torch.int32)
    normal = torch.randn(2, len(slots), heads, head_size, device=DEVICE)
    if len(slots):
        before = [cache.previous(b) for b in range(len(lengths))]
        previous = torch.cat([x for x in before if x is not None]).to(DEVICE) if layout.format.mean else None
        reference.store_kv(
            normal[0] if k is None else k, normal[1] if v is None else v, pages, slots, layout, previous
        )  # fmt: skip
    return Cache(layout, pages, table, ends)


def queries(cache: Cache, group: int = 4, tokens: int = 1, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Normal queries ``[B, tokens, H * group, d]``."""
    shape = (len(cache.table), tokens, group * cache.pages.shape[1], cache.layout.head_size)
    return torch.randn(shape, device=DEVICE).to(dtype)


def pick(cache: Cache, rows: list[int]) -> Cache:
    return replace(cache, table=cache.table[rows], lengths=cache.lengths[rows])


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same values, two elements apart."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(-2)[..., ::2]


# --- the kernel and the truth -----------------------------------------------------------------------------------------

Truth = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(cache: Cache, q: torch.Tensor, *, backend: str | None = None, **options: Any) -> State:
    options.setdefault("scale", cache.layout.head_size**-0.5)
    with ops.backend(backend or BACKEND):
        return ops.decode_attention(q, cache.pages, cache.table, cache.lengths, cache.layout, **options)


def truth(
    cache: Cache, q: torch.Tensor, *, scale: float | None = None, first: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None, lag: int = 0, window: int | None = None, softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> Truth:  # fmt: skip
    """Attention in float64 over what ``load_kv`` of the reference reads.

    Returns:
        out ``[B, Tq, Hq, d]``, the log-sum-exp ``[B, Hq, Tq]`` and its allowed error: 2e-3, or 1e-5 of the largest
        score that the query may have where this is more, because q is 16-bit fixed point.
    """
    batch, num_queries, num_heads, size = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, num_heads, num_queries), -torch.inf, dtype=torch.float64, device=q.device)
    allowed = torch.full_like(lse, 2e-3)
    for b, length in enumerate(cache.lengths.tolist()):
        if not length:
            continue
        loaded = reference.load_kv(cache.pages, cache.table[b : b + 1], cache.layout, length)
        k, v = (x[0].double().transpose(0, 1) for x in loaded)  # [H, n, d]
        rows = q[b].double().unflatten(1, (len(k), -1)) * (size**-0.5 if scale is None else scale)
        rows = rows.permute(1, 2, 0, 3)  # [H, group, Tq, d]
        token = torch.arange(length, device=q.device)
        start = length - num_queries if query_start is None else int(query_start[b])
        position = torch.arange(num_queries, device=q.device)[:, None] + start
        seen = (token <= position - lag) & (token >= (0 if first is None else int(first[b])))
        if window is not None:
            seen &= token > position - window
        if mask is not None:
            seen &= mask[b, :, :length]
        scores = rows @ k[:, None].transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        top = scores.logsumexp(-1)
        weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top)[..., None])
        bad = v.isnan().any(-1)  # 0 * NaN is NaN: who does not see a token does not meet its value
        spoilt = (seen & bad[:, None]).any(-1)[:, None, :, None]
        mixed = (weights @ v.nan_to_num()[:, None]).masked_fill(spoilt, torch.nan)
        out[b] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
        lse[b] = top.flatten(0, 1)
        largest = rows.norm(dim=-1) * k.norm(dim=-1).nan_to_num().amax(-1)[:, None, None]
        allowed[b] = torch.maximum(allowed[b], 1e-5 * largest.flatten(0, 1))
    return out, lse, allowed


def compare(got: State, want: Truth, tolerance: float | None = None) -> None:
    """Every row of the output, and every log-sum-exp, is the truth to what its dtype allows; so are NaN and nothing."""
    (out, lse), (true_out, true_lse, allowed) = got, want
    assert out.shape == true_out.shape
    assert lse.shape == true_lse.shape
    assert lse.dtype == F32
    assert torch.equal(out.isfinite(), true_out.isfinite()), "finite outputs"
    error = (out.double() - true_out).nan_to_num().norm(dim=-1)
    limit = (tolerance or TOLERANCE[out.dtype]) * true_out.nan_to_num().norm(dim=-1)
    far = error > limit
    assert not far.any(), f"out: rows are {(error / limit)[far].max():.3g} times what is allowed from the truth"
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf), "who sees nothing"
    assert torch.equal(lse.isnan(), true_lse.isnan()), "who sees NaN"
    error = torch.where(true_lse.isfinite(), lse.double() - true_lse, 0.0).abs()
    far = error > allowed
    assert not far.any(), f"log-sum-exp: the largest error is {error[far].max():.3g}"


def check(cache: Cache, q: torch.Tensor, times: int = 1, batch_invariant: bool = False, **options: Any) -> State:
    """The kernel's result equals the truth; ``times`` puts the batch's sequences into the batch so many times.

    Copies share their pages, so that every warp gets many steps at little cost; each copy is cut elsewhere.
    """
    many = pick(cache, list(range(len(cache.table))) * times)
    got = attend(many, q.repeat(times, 1, 1, 1), batch_invariant=batch_invariant, **options)
    compare(got, tuple(x.repeat(times, *[1] * (x.dim() - 1)) for x in truth(cache, q, **options)))
    return got


def same(one: State, other: State) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


# --- formats and shapes -----------------------------------------------------------------------------------------------

FORMATS = [(f"k{k}v{v}", 64, 4, BF16) for k in (2, 3, 4) for v in (2, 3, 4)]
EIGHT_ROWS = [("k4v4", 64, 8, BF16), ("k3v3", 64, 8, BF16), ("k2v3", 64, 8, BF16)]
PAGES = [("k4v4", 16, 4, BF16), ("k4v4", 32, 4, BF16), ("k3v2", 16, 4, BF16)]
DTYPES = [("k4v4", 64, 4, F16), ("k4v4", 64, 4, F32), ("k4v4", 64, 8, F32)]
MEANS = [(spec, size, group, BF16) for spec in ("k4v4+mean", "k2v3+mean") for size in (16, 32, 64) for group in (4, 8)]


TRELLISES = [
    (spec, size, group, BF16)
    for spec in ("k2tv2t", "k3tv3t", "k4tv4t", "k2tv4+mean", "k3v4t+mean", "k4tv3t+mean")
    for size, group in ((64, 4), (64, 8), (32, 4), (16, 8))
]


@pytest.mark.parametrize(
    ("spec", "page_size", "group", "dtype"), FORMATS + EIGHT_ROWS + PAGES + DTYPES + MEANS + TRELLISES
)
def test_formats_page_sizes_and_dtypes(spec: str, page_size: int, group: int, dtype: torch.dtype) -> None:
    cache = stored((*RAGGED, 48, 4000), spec, heads=3, page_size=page_size)
    check(cache, queries(cache, group, dtype=dtype))


@pytest.mark.parametrize("num_queries", range(1, 9))
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 16])
@pytest.mark.parametrize("spec", ["k4v4", "k4v4+mean", "k3tv4t"])
def test_groups_and_query_tokens(spec: str, group: int, num_queries: int) -> None:
    cache = stored((0, 1, 5, 32, 33, 64, 500), spec)
    check(cache, queries(cache, group, num_queries))


@pytest.mark.parametrize("heads", [1, 3, 8, 32])
@pytest.mark.parametrize("batch", [1, 2, 31, 33, 300])
def test_batches_and_heads(batch: int, heads: int) -> None:
    lengths = [0 if b % 7 == 3 else 1 + b * 7919 % 300 for b in range(batch)]
    cache = stored(lengths, heads=heads)
    check(cache, queries(cache))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (0, 0, 1), (1, 0, 0)], ids=str)
def test_batches_of_next_to_nothing(lengths: tuple[int, ...]) -> None:
    cache = stored(lengths) if lengths else pick(stored((1,)), [])
    check(cache, queries(cache))
    out, lse = attend(replace(cache, table=cache.table[:, :0], lengths=cache.lengths * 0), queries(cache))
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("spec", ["k4v4", "k2v2"])
def test_long_contexts(spec: str) -> None:
    cache = stored((3, 200_000, 0, 65), spec)
    check(cache, queries(cache))


def test_pages_beyond_four_gigabytes() -> None:
    cache = stored((777, 100), heads=1)
    pages = torch.empty(cache.layout.page_shape(600_000, 1), dtype=torch.uint8, device=DEVICE)
    moved = len(pages) - len(cache.pages)
    pages[moved:] = cache.pages
    check(replace(cache, pages=pages, table=cache.table + moved), queries(cache))


# --- strides and integers ---------------------------------------------------------------------------------------------

STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fused with K and V": lambda q: torch.cat([q, q, q], dim=2)[:, :, : q.shape[2]],
    "heads before tokens": lambda q: q.transpose(1, 2).contiguous().transpose(1, 2),
    "not aligned": lambda q: torch.nn.functional.pad(q, (1, 2))[..., 1:-2],
    "coordinates apart": apart,
    "one query for all": lambda q: q[:1].expand_as(q),
}


@pytest.mark.parametrize("stride", STRIDES)
def test_strides_of_queries_do_not_matter(stride: str) -> None:
    cache = stored(RAGGED)
    q = STRIDES[stride](queries(cache, group=2, tokens=2))
    assert same(check(cache, q), attend(cache, q.contiguous()))


def test_integers_of_both_widths_and_with_strides() -> None:
    cache = stored((40, 0, 700, 65))
    q = queries(cache, group=2, tokens=2)
    vectors = {"first": torch.tensor([3, 0, 64, 70]), "query_start": torch.tensor([38, 0, 500, 63])}
    vectors = {name: x.to(DEVICE, torch.int32) for name, x in vectors.items()}
    want = check(cache, q, **vectors)
    for wide in range(16):
        lengths, table, first, start = (
            apart(x.long()) if wide >> bit & 1 else x
            for bit, x in enumerate((cache.lengths, cache.table, *vectors.values()))
        )
        other = replace(cache, lengths=lengths, table=table)
        assert same(attend(other, q, first=first, query_start=start), want)


@pytest.mark.parametrize("page_size", [16, 64])
def test_tables(page_size: int) -> None:
    cache = stored((48, 0, 4 * page_size, 3 * page_size - 7), page_size=page_size)
    q, table = queries(cache), cache.table
    want = check(cache, q)
    spare = table[1:2, :1].expand(len(table), 5)  # a poisoned page
    tables = [
        table.long(), table[:, :-1], table[:, :-1].contiguous(), table.T.contiguous().T, torch.cat([table, spare], 1),
    ]  # fmt: skip
    for other in tables:
        assert same(attend(replace(cache, table=other), q), want)


# --- who sees what ----------------------------------------------------------------------------------------------------

FIRST, START = [0, -3, 10, 64, 999, 2000], [0, 3, 20, 300, 1100, 999]  # of sequences of VISIBLE tokens
VISIBLE = (0, 1, 33, 300, 1000, 1000)
VISIBILITY: dict[str, dict[str, Any]] = {
    "window": {"window": 70},
    "window of one": {"window": 1},
    "window beyond all": {"window": 2**30},
    "lag": {"lag": 40},
    "nothing between lag and window": {"lag": 5, "window": 5},
    "lag and window": {"lag": 33, "window": 200},
    "first": {"first": FIRST},
    "query start": {"query_start": START},
    "query start, lag, window and first": {"query_start": START, "lag": 3, "window": 150, "first": FIRST},
    "small soft cap": {"softcap": 0.5},
    "soft cap and window": {"softcap": 20.0, "window": 90, "scale": 1.0},
    "mask": {"mask": 0.7},
    "mask of few": {"mask": 0.01},
    "mask and window": {"mask": 0.5, "window": 99, "query_start": START},
    "everything": {"mask": 0.6, "window": 400, "lag": 2, "softcap": 3.0, "first": FIRST, "query_start": START},
}


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", VISIBILITY)
def test_visibility(name: str, group: int) -> None:
    options = dict(VISIBILITY[name])
    if "mask" in options and "softcap" in options and group == 1:
        pytest.skip("the same code as with more rows, and another second of compiling")
    cache = stored(VISIBLE)
    for vector in options.keys() & {"first", "query_start"}:
        options[vector] = torch.tensor(options[vector], device=DEVICE)
    if "mask" in options:
        mask = torch.rand(len(VISIBLE), 4, 1024, device=DEVICE) < options["mask"]
        mask[2, 1] = False
        options["mask"] = mask[..., :1001]
    q = queries(cache, group, tokens=4)
    got = check(cache, q, **options)
    if "mask" in options:
        assert same(attend(cache, q, **{**options, "mask": apart(options["mask"])}), got)


SUFFER: dict[str, tuple[int, dict[str, Any], list[bool]]] = {
    "by causality": (48, {}, [False, False, True, True]),
    "by lag": (50, {"lag": 2}, [False, False, True, True]),
    "by window": (58, {"window": 10}, [True, True, False, False]),
    "by a mask": (49, {"mask": True}, [False, True, True, False]),
}


@pytest.mark.parametrize("hidden", SUFFER)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("group", [1, 4])
def test_only_queries_that_see_a_bad_token_suffer(group: int, side: str, hidden: str) -> None:
    """Token 50 of head 1 is NaN, and two of four queries see it."""
    start, options, suffering = SUFFER[hidden]
    vectors = {name: torch.randn(100, 2, 128, device=DEVICE) for name in "kv"}
    vectors[side][50, 1, 77] = torch.nan
    cache = stored((100,), **vectors)
    if "mask" in options:
        mask = torch.ones(1, 4, 100, dtype=torch.bool, device=DEVICE)
        mask[0, 3, 50] = False
        options = {"mask": mask}
    out, _ = check(cache, queries(cache, group, tokens=4), query_start=torch.tensor([start], device=DEVICE), **options)
    bad = out[0].isnan().all(-1)  # [Tq, Hq]
    assert not bad[:, :group].any()
    assert bad[:, group:].all(-1).tolist() == suffering


def test_a_bad_query_spoils_only_itself() -> None:
    cache = stored((300, 64))
    q = queries(cache)
    q[0, 0, 5, 99] = torch.nan
    out, _ = check(cache, q)
    assert out.isnan().any(-1).sum() == 1


# --- what is hard for fixed point -------------------------------------------------------------------------------------

# Made of normal k and v, of u, which is part of every query (u times u is a score of 11.3), and of t, 0 to 1 by token.
HARD: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "peaked scores": lambda k, v, u, t: (8 * k, v),
    "rising scores": lambda k, v, u, t: (k + 5 * t * u, v),
    "falling scores": lambda k, v, u, t: (k + 5 * (1 - t) * u, v),
    "scores in waves": lambda k, v, u, t: (k + 3 * torch.sin(300 * t) * u, v),
    "very low scores": lambda k, v, u, t: (k - 20 * u, v),
    "constant keys": lambda k, v, u, t: (k[:1].expand_as(k), v),
    "one huge key": lambda k, v, u, t: (torch.where(t == t[len(t) // 3], 50.0, 1.0) * k, v),
    "a sink": lambda k, v, u, t: (torch.where(t == t[5], u * (11 / 11.3), 0.1 * k), v),
    "zero keys": lambda k, v, u, t: (0 * k, v),
    "zero values": lambda k, v, u, t: (k, 0 * v),
    "some zeros": lambda k, v, u, t: (k * (torch.rand_like(t) < 0.6), v * (torch.rand_like(t) < 0.6)),
    "a common mean": lambda k, v, u, t: (k, v + 3 * u),
    "values of all sizes": lambda k, v, u, t: (k, v * 10 ** (40 * torch.rand_like(t) - 20)),
    "enormous values": lambda k, v, u, t: (0.1 * k + 2.2 * t * u, 1e30 * v),
    "the largest values first": lambda k, v, u, t: (k, v * 10 ** (20 - 40 * t)),
    "the largest values last": lambda k, v, u, t: (k, v * 10 ** (40 * t - 20)),
}


def hard(name: str, tokens: int, heads: int, group: int) -> tuple[Cache, torch.Tensor]:
    u = torch.randn(128, device=DEVICE)
    u *= 128**0.5 / u.norm()
    t = torch.linspace(0, 1, tokens, device=DEVICE)[:, None, None]
    k, v = HARD[name](*torch.randn(2, tokens, heads, 128, device=DEVICE), u, t)
    cache = stored((tokens,), heads=heads, k=k, v=v)
    return cache, (u + 0.3 * queries(cache, group, dtype=F32)).to(BF16)


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("name", HARD)
def test_hard(name: str, group: int) -> None:
    cache, q = hard(name, 8192, heads=4, group=group)
    check(cache, q)  # a few tokens a warp
    check(cache, q, times=64)  # a thousand


def test_one_sink_and_a_hundred_thousand_others() -> None:
    cache, q = hard("a sink", 100_000, heads=2, group=4)
    check(cache, q)
    check(cache, q, times=128)


@pytest.mark.parametrize("group", [4, 8])
def test_sums_that_would_overflow(group: int) -> None:
    """The largest weights, of values that do not cancel, for a hundred thousand tokens of a warp."""
    u = torch.randn(128, device=DEVICE)
    same_vectors = u.expand(131_072, 4, 128)
    cache = stored((131_072,), heads=4, k=same_vectors, v=same_vectors)
    check(cache, queries(cache, group), times=480)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("group", [4, 8])
def test_runs_give_the_same_bits_whatever_scratch_holds(group: int, invariant: bool) -> None:
    cache = stored([1 + b * 7919 % 3000 for b in range(40)], heads=8)
    q = queries(cache, group)
    want = check(cache, q, batch_invariant=invariant)
    scratch = decode._scratch(DEVICE.index)
    for _ in range(5):
        for floats in scratch.floats.values():
            floats.fill_(torch.nan)
        assert same(attend(cache, q, batch_invariant=invariant), want)
        assert not scratch.counters.any()


LARGE = {
    "many steps of 2 bits": ((131_072,), "k2v2", 8, 4),
    "eight rows": ((32_768, 32_768), "k4v4", 8, 8),
    "many heads": ((32_768, 32_768), "k2v2", 32, 1),
    "cut anywhere": (tuple(1 + b * 7919 % 300 for b in range(300)), "k4v4", 8, 4),
    "one piece a warp": ((4096,) * 8, "k3v3", 8, 4),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_full_device_gives_the_same_bits_a_hundred_times(case: str) -> None:
    """A barrier that the hardware wrote back over a result showed in nearly every call of these, in no small one."""
    lengths, spec, heads, group = LARGE[case]
    layout = PageLayout.of(spec, 128)
    cache = empty_cache(layout, lengths, heads)
    pages = random_pages(layout, len(cache.pages), heads, DEVICE)
    cache = Cache(layout, pages, cache.table.to(DEVICE), cache.lengths.to(DEVICE, torch.int32))
    q = queries(cache, group, dtype=F32)
    want = attend(cache, q)
    for _ in range(100):
        assert same(attend(cache, q), want)
    compare(want, truth(cache, q), 1e-3)  # random bytes: thousands of values cancel to a hundredth of their size


@pytest.mark.parametrize("group", [4, 8])
def test_batch_invariance(group: int) -> None:
    cache = stored((500, 0, 4097, 1, 31, 20_000, 32, 16_385))
    q = queries(cache, group)
    out, lse = check(cache, q, batch_invariant=True)
    rows = list(range(len(q)))
    wider = torch.cat([cache.table, cache.table[1:2, :1].expand(len(q), 900)], dim=1)
    for some in ([5], [3], [2, 5], rows[::-1], rows * 2, [7] * 300):
        for table in (cache.table, wider):
            got = attend(pick(replace(cache, table=table), some), q[some], batch_invariant=True)
            assert same(got, (out[some], lse[some])), some


def test_batch_invariance_of_more_sequences_than_scratch_is_for() -> None:
    cache = stored([1 + b * 7919 % 700 for b in range(300)], heads=8)
    q = queries(cache)
    out, lse = check(cache, q, batch_invariant=True)
    for b in (0, 150, 299):
        assert same(attend(pick(cache, [b]), q[b : b + 1], batch_invariant=True), (out[b : b + 1], lse[b : b + 1]))


def test_batch_invariance_of_what_is_seen() -> None:
    cache = stored((900, 3000), heads=2)
    q = queries(cache, group=4, tokens=2)
    options = {"window": 1000, "lag": 5}
    out, lse = check(cache, q, batch_invariant=True, **options)
    assert same(attend(pick(cache, [1]), q[1:], batch_invariant=True, **options), (out[1:], lse[1:]))


# --- graphs, streams, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("invariant", [False, True])
def test_a_captured_graph_serves_what_comes_next(invariant: bool) -> None:
    cache = stored((3000, 2000, 1000, 3000), heads=4)
    q = queries(cache)
    attend(cache, q, batch_invariant=invariant)  # compiles, and sets up the scratch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(cache, q, batch_invariant=invariant)
    whole = cache.table.clone()
    batches = [((3000, 2000, 1000, 3000), [0, 1, 2, 3]), ((5, 0, 2999, 64), [1, 2, 3, 0]), ((0, 0, 0, 0), [0] * 4)]
    for lengths, rows in batches:
        cache.lengths.copy_(torch.tensor(lengths))
        cache.table.copy_(whole[rows])
        q.copy_(queries(cache))
        graph.replay()
        torch.cuda.synchronize()
        compare(captured, truth(cache, q))
        assert same(attend(cache, q, batch_invariant=invariant), captured)
    allocated = torch.cuda.memory_allocated()
    for _ in range(10):
        graph.replay()
        attend(cache, q, batch_invariant=invariant)
    assert torch.cuda.memory_allocated() == allocated


def test_a_captured_graph_serves_what_its_schedule_is_renewed_for() -> None:
    """With other lengths, of some of the sequences, the last ones being empty then, and with inputs that are ready."""
    cache = stored((3000, 2000, 1000, 3000), heads=4)
    q = queries(cache)
    with ops.backend(BACKEND):
        made = scheduled(cache, q)
        attend(cache, q, schedule=made)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attend(cache, q, schedule=made, inputs_ready=True)
        for lengths in ((3000, 2000, 1000, 3000), (5, 0, 999, 64), (3000, 1, 0, 0), (40, 0, 0, 0), (0, 0, 0, 0)):
            rows = max((b + 1 for b, length in enumerate(lengths) if length), default=1)
            cache.lengths.copy_(torch.tensor(lengths))
            ops.schedule_decode(cache.lengths[:rows], cache.layout, q.shape[2], 4, out=made)
            q.copy_(queries(cache))
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            compare(captured, truth(cache, q))
            assert same(attend(cache, q), captured)


def test_a_graph_keeps_its_scratch_when_a_later_call_needs_more() -> None:
    cache = stored((3000, 3000), heads=4)
    few, many, scratch = queries(cache, group=4), queries(cache, group=8), decode._scratch(DEVICE.index)
    want, stream, graph = attend(cache, few), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    scratch.floats.clear()
    with torch.cuda.stream(stream):
        attend(cache, few)
        with torch.cuda.graph(graph, stream=stream):
            captured = attend(cache, few)
        size = max(x.numel() for x in scratch.floats.values())
        attend(cache, many)
        others = [torch.zeros(size, device=DEVICE) for _ in range(4)]  # where freed scratch would be
        graph.replay()
    torch.cuda.synchronize()
    assert same(captured, want)
    assert not any(x.any() for x in others)


def test_two_streams_at_once() -> None:
    caches = [stored((3000, 70, 1), heads=2), stored((64,) * 40, heads=2)]
    batches = [[queries(cache) for _ in range(20)] for cache in caches]
    want = [[attend(cache, q) for q in batch] for cache, batch in zip(caches, batches, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got: list[list[State]] = [[], []]
    for n in range(20):
        for stream, cache, batch, results in zip(streams, caches, batches, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(attend(cache, batch[n]))
    torch.cuda.synchronize()
    assert all(same(x, y) for mine, wanted in zip(got, want, strict=True) for x, y in zip(mine, wanted, strict=True))
    assert not decode._scratch(DEVICE.index).counters.any()


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("group", [4, 8])
def test_scratch_is_small_and_calls_keep_nothing(group: int, invariant: bool) -> None:
    cache = stored([100] * 300, heads=8)
    q, scratch = queries(cache, group), decode._scratch(DEVICE.index)
    torch.cuda.synchronize()
    scratch.floats.clear()
    attend(cache, q, batch_invariant=invariant)
    kept = [scratch.counters, *scratch.floats.values()]
    assert sum(x.numel() * x.element_size() for x in kept) <= 64 * 2**20
    allocated = torch.cuda.memory_allocated()
    for _ in range(20):
        attend(cache, q, batch_invariant=invariant)
    assert torch.cuda.memory_allocated() == allocated


# --- parts, and what is not served ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
def test_parts_are_merged_to_the_whole(tokens: int) -> None:
    cache = stored((1000, 33, 4000))
    q = queries(cache, tokens=tokens, dtype=F32)
    want = truth(cache, q)
    middle, start = cache.lengths // 2, cache.lengths - tokens
    beginning = attend(replace(cache, lengths=middle), q, query_start=start)
    compare(ops.merge_states([beginning, attend(cache, q, first=middle)]), want)
    compare(ops.merge_states([attend(cache, q, lag=30), attend(cache, q, window=30)]), want)


@pytest.mark.parametrize(
    ("spec", "head_size", "reason"),
    [("k5v5", 128, "2, 3 and 4 bits"), ("k4v4", 64, "head size 128, and K has 64")],
)
def test_what_is_not_served_is_refused_or_done_another_way(spec: str, head_size: int, reason: str) -> None:
    cache = stored((100, 7), spec, head_size=head_size)
    q = queries(cache)
    with pytest.raises(FormatError, match=reason):
        attend(cache, q)
    compare(attend(cache, q, backend="auto"), truth(cache, q))


def test_auto_chooses_the_cuda_kernels_for_what_they_serve() -> None:
    for spec in ("k4v3", "k4v4+mean", "k3tv4t"):
        assert ops.choose(DEVICE, PageLayout.of(spec, 128)).__name__ == "kvfold.ops.cuda"
    assert ops.choose(DEVICE, PageLayout.of("k5v5", 128)).__name__ != "kvfold.ops.cuda"


# --- with the store ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [False, True], ids=["", "ready"])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("spec", ["k4v4", "k4v4+mean", "k3tv4"])
def test_decode_sees_what_the_store_before_it_wrote(spec: str, graph: bool, invariant: bool, ready: bool) -> None:
    """All kernels start before the one ahead of them has ended; thirty layers write and read the same pages.

    With key references the tokens open pages, from their own keys.
    """
    layers, cache = 30, stored((513 if "mean" in spec else 500,) * 8, spec, heads=8)
    q = queries(cache)
    ends = cache.lengths.long() - 1
    slots = cache.table.long()[torch.arange(8, device=DEVICE), ends // 64] * 64 + ends % 64
    k, v = torch.randn(2, layers, 8, 8, 128, device=DEVICE).to(BF16)

    with ops.backend(BACKEND):
        made = scheduled(cache, q) if ready else None

    def run(wait: bool = False) -> list[torch.Tensor]:
        outs = []
        for layer in range(layers):
            ops.store_kv(k[layer], v[layer], cache.pages, slots, cache.layout, previous=torch.full_like(slots, -1))
            if wait:
                torch.cuda.synchronize()
            outs.append(attend(cache, q, batch_invariant=invariant, inputs_ready=ready, schedule=made)[0])
            if wait:
                torch.cuda.synchronize()
        return outs

    with ops.backend(BACKEND):
        wanted = torch.stack(run(wait=True))
        assert not torch.equal(wanted[0], wanted[1])
        if not graph:
            for _ in range(10):
                assert torch.equal(torch.stack(run()), wanted)
            return
        stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        with torch.cuda.graph(captured, stream=stream):
            outs = run()
        for _ in range(10):
            captured.replay()
            torch.cuda.synchronize()
            assert torch.equal(torch.stack(outs), wanted)
