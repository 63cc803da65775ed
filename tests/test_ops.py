"""What is stored, byte for byte, and attention to it against a dense computation in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from ops_cases import (
    EPS,
    FORMATS,
    Cache,
    Expected,
    assert_close,
    decode_records,
    dense,
    empty_cache,
    expected,
    fill,
    make_cache,
    noise,
    sees,
)

from kvfold import ops
from kvfold.errors import FormatError, ShapeError
from kvfold.formats import PAGE_SIZES
from kvfold.layout import PageLayout
from kvfold.ops import cpu_kernels, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (
    (32, 32),
    (64, 64),
    (80, 80),
    (96, 96),
    (112, 112),
    (128, 128),
    (192, 192),
    (256, 256),
    (33, 33),
    (96, 64),
    (33, 128),
)
LENGTHS = (0, 1, 16, 17, 64, 100, 128)
FEW = ("k4v4", "k3v5", "k8v2", "k4tv3t", "k3v2t+mean", "kf8v4", "bf16")
"""Formats where every plane, scale and family occurs, for tests that are about something else."""


def layout_id(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- store ------------------------------------------------------------------------------------------------------------


def assert_same_bytes(
    got: torch.Tensor, want: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PageLayout,
    references: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Records agree but for ties, where float32 rounding decides: at most 1e-4 of the bytes, or parts of one vector.

    A tie is a coordinate at a threshold, two paths of a trellis of equal error, a scale half-way between two bfloat16,
    or two prescales that are equally good. It costs nothing: the vector's error is the same within 2 % (half a step of
    bfloat16, on either side of the scale).
    """
    differ = got != want
    assert int(differ.sum()) <= max(1e-4 * got.numel(), layout.token_bytes / 2)
    tokens = differ.any(-1)
    originals = (k[tokens].double(), v[tokens].double())
    subtracted = None if references is None else references[tokens]
    mine, other = (decode_records(each[tokens], layout, subtracted) for each in (got, want))
    for original, x, y in zip(originals, mine, other, strict=True):
        torch.testing.assert_close((x - original).norm(dim=-1), (y - original).norm(dim=-1), rtol=0.02, atol=0)


def stored(name: str, k: torch.Tensor, v: torch.Tensor, cache: Cache, slots: torch.Tensor) -> torch.Tensor:
    """A copy of the cache's pages after one implementation stored the first sequence in them."""
    pages = cache.pages.clone()
    with ops.backend(name):
        ops.store_kv(k, v, pages, slots, cache.layout, previous=cache.previous(0))
    return pages


@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=layout_id)
@pytest.mark.parametrize("spec", FORMATS)
def test_the_cpu_stores_the_reference_bytes(spec: str, sizes: tuple[int, int]) -> None:
    for index, page_size in enumerate(PAGE_SIZES):
        layout = PageLayout.of(spec, *sizes, page_size)
        cache = empty_cache(layout, [40], seed=index)
        k, v = (noise(40, 2, size, seed=index, dtype=DTYPES[index]) for size in sizes)
        slots = cache.slots(0)
        want = Cache(layout, stored("reference", k, v, cache, slots), cache.table, cache.lengths)
        got = Cache(layout, stored("cpu", k, v, cache, slots), cache.table, cache.lengths)
        assert_same_bytes(got.records(slots), want.records(slots), k, v, layout, want.references(slots))
        assert torch.equal(got.pages[:, :, layout.reference :], want.pages[:, :, layout.reference :])


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    "every-second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "coordinates-apart": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "expanded-heads": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
    "expanded-tokens": lambda x: x[:1].expand(x.shape[0], -1, -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("spec", FEW)
def test_strides_do_not_matter(spec: str, stride: str, dtype: torch.dtype, backend: str) -> None:
    layout = PageLayout.of(spec, 64, 80, 16)
    cache = empty_cache(layout, [40])
    k, v = (STRIDES[stride](noise(40, 3, size, seed=size, dtype=dtype)) for size in (64, 80))
    cache = Cache(
        layout, cache.pages.new_full(layout.page_shape(len(cache.pages), 3), 0xFF), cache.table, cache.lengths
    )
    slots = cache.slots(0)
    assert torch.equal(
        stored(backend, k, v, cache, slots), stored(backend, k.contiguous(), v.contiguous(), cache, slots)
    )


@pytest.mark.parametrize("spec", [*FORMATS, "f32"])
def test_only_the_addressed_records_change(spec: str, backend: str) -> None:
    layout = PageLayout.of("kf32vf32" if spec == "f32" else spec, 64, 33, 32)
    pages = torch.randint(0, 256, layout.page_shape(4, 2), dtype=torch.uint8)
    if layout.format.mean:
        pages[:, :, layout.reference :] = layout.encode_reference(noise(4, 2, 64, seed=3))
    before = Cache(layout, pages.clone(), torch.empty(0), torch.empty(0))
    slots = torch.randperm(4 * 32)[:50]
    slots[::7] = -1 - slots[::7]
    k, v = noise(50, 2, 64, seed=1), noise(50, 2, 33, seed=2)
    ops.store_kv(k, v, pages, slots, layout, previous=torch.full((50,), -1))
    after = Cache(layout, pages, before.table, before.lengths)
    kept = slots >= 0
    others = torch.tensor(sorted(set(range(4 * 32)) - set(slots.tolist())))
    assert torch.equal(after.records(others), before.records(others))
    opened = (slots[kept & (slots % 32 == 0)] // 32).tolist() if layout.format.mean else []
    assert 0 < len(opened) < 4 or not layout.format.mean
    closed = sorted(set(range(4)) - set(opened))
    assert torch.equal(after.pages[closed][:, :, layout.reference :], before.pages[closed][:, :, layout.reference :])
    references, k, v = after.references(slots[kept]), k[kept], v[kept]
    want = layout.encode(k, v, None if references is None else references.float())
    assert_same_bytes(after.records(slots[kept]), want, k, v, layout, references)


def test_all_slots_negative_stores_nothing(backend: str) -> None:
    cache = make_cache(PageLayout.of("k4v4", 32, page_size=16), [20])
    pages = cache.pages.clone()
    ops.store_kv(noise(5, 2, 32), noise(5, 2, 32), pages, torch.tensor([-1, -1, -2, -16, -(2**40)]), cache.layout)
    assert torch.equal(pages, cache.pages)


@pytest.mark.parametrize("spec", ["k4v3", "k3tv4t"])
def test_storing_token_by_token_gives_the_same_bytes(spec: str, backend: str) -> None:
    """How many tokens are stored together may change a tie (matrix products round differently), and nothing else."""
    layout = PageLayout.of(spec, 64, 128, 16)
    cache = empty_cache(layout, [48])
    k, v = noise(48, 2, 64, seed=1), noise(48, 2, 128, seed=2)
    slots = cache.slots(0)
    one_by_one = Cache(layout, cache.pages.clone(), cache.table, cache.lengths)
    for t in range(48):
        ops.store_kv(k[t : t + 1], v[t : t + 1], one_by_one.pages, slots[t : t + 1], layout)
    together = Cache(layout, stored(backend, k, v, cache, slots), cache.table, cache.lengths)
    assert_same_bytes(one_by_one.records(slots), together.records(slots), k, v, layout)


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=layout_id)
@pytest.mark.parametrize("spec", FORMATS)
def test_load_gives_what_the_records_say(spec: str, sizes: tuple[int, int], backend: str) -> None:
    layout = PageLayout.of(spec, *sizes, 32)
    cache = make_cache(layout, [50, 50])
    loaded = ops.load_kv(cache.pages, cache.table, layout, 50)
    for x, sides in zip(loaded, zip(cache.vectors(0), cache.vectors(1), strict=True), strict=True):
        truth = torch.stack(sides)
        assert x.dtype == torch.float32
        roundings = 2 + 2 * x.shape[-1] ** 0.5  # of a sum as long as the rotation is wide
        assert ((x - truth).norm(dim=-1) <= roundings * EPS * truth.norm(dim=-1)).all()


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 33, 50])
def test_load_of_the_first_tokens(tokens: int, backend: str) -> None:
    layout = PageLayout.of("k4v3", 64, page_size=16)
    cache = make_cache(layout, [50, 50])
    for part, whole in zip(
        ops.load_kv(cache.pages, cache.table.long(), layout, tokens),
        ops.load_kv(cache.pages, cache.table, layout, 50),
        strict=True,
    ):
        assert part.shape == (2, tokens, 2, 64)
        torch.testing.assert_close(part, whole[:, :tokens], rtol=1e-6, atol=1e-6)


# --- decode -----------------------------------------------------------------------------------------------------------


def check_decode(
    cache: Cache, q: torch.Tensor, *, scale: float | None = None, softcap: float | None = None, **options: Any
) -> None:
    """Decode a batch and hold it against float64, sequence by sequence."""
    scale = cache.layout.head_size**-0.5 if scale is None else scale
    out, lse = ops.decode_attention(
        q, cache.pages, cache.table, cache.lengths, cache.layout, scale=scale, softcap=softcap, **options
    )
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    wanted = []
    for b, length in enumerate(cache.lengths.tolist()):
        seen = {
            name: value if value is None or name in ("lag", "window") else value[b] if name == "mask" else int(value[b])
            for name, value in options.items()
        }
        wanted.append(expected(q[b], *cache.vectors(b), sees(q.shape[1], length, **seen), scale, softcap))
    assert_close((out, lse), Expected.stack(wanted))


@pytest.mark.parametrize("num_queries", [1, 2, 5, 8])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_decode_groups_and_queries(group: int, num_queries: int, backend: str) -> None:
    cache = make_cache(PageLayout.of("k4v4", 64, page_size=16), LENGTHS, seed=group)
    check_decode(cache, noise(len(LENGTHS), num_queries, 2 * group, 64, seed=num_queries))


@pytest.mark.parametrize("spec", FORMATS)
def test_decode_formats(spec: str, backend: str) -> None:
    for sizes, page_size in (((64, 64), 64), ((33, 80), 16), ((128, 96), 32)):
        cache = make_cache(PageLayout.of(spec, *sizes, page_size), (1, 20, 65))
        check_decode(cache, noise(3, 2, 4, sizes[0]))


@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=layout_id)
def test_decode_head_sizes(sizes: tuple[int, int], backend: str) -> None:
    for spec in ("k4v3", "k7v1", "kf8v2", "k4tv2t", "k2tv3t+mean"):
        cache = make_cache(PageLayout.of(spec, *sizes, 16), (33, 7, 48))
        check_decode(cache, noise(3, 1, 6, sizes[0]))


@pytest.mark.parametrize("spec", ["k4v4", "k3tv4+mean"])
def test_decode_across_splits(spec: str, backend: str) -> None:
    edge = cpu_kernels.SPLIT_TOKENS
    cache = make_cache(PageLayout.of(spec, 32), (edge - 1, edge, edge + 1, 2 * edge + 17, 3), heads=1)
    check_decode(cache, noise(5, 2, 2, 32))


def ragged_mask(num_queries: int, seed: int = 3) -> torch.Tensor:
    """Half of the tokens; for one sequence none at all."""
    mask = torch.rand(len(LENGTHS), num_queries, max(LENGTHS) + 9, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[4] = False
    return mask


VISIBILITY: dict[str, dict[str, Any]] = {
    "window-1": {"window": 1},
    "window-16": {"window": 16},
    "window-50": {"window": 50},
    "window-huge": {"window": 10**6},
    "softcap": {"softcap": 2.5},
    "lag-1": {"lag": 1},
    "lag-30": {"lag": 30},
    "first": {"first": torch.tensor([0, 0, 3, 16, 64, 17, 200])},
    "query-before-the-end": {"query_start": torch.tensor([0, 0, 3, 5, -3, 40, 80])},
    "query-beyond-the-end": {"query_start": torch.tensor([0, 10, 16, 30, 64, 1000, 129])},
    "mask": {"mask": ragged_mask(3)},
    "all": {
        "window": 40, "softcap": 3.0, "lag": 2, "first": torch.tensor([0, 0, 1, 2, 3, 4, 50]),
        "query_start": torch.tensor([0, 3, 14, 20, 60, 100, 120]), "mask": ragged_mask(3, seed=4),
    },
}  # fmt: skip


@pytest.mark.parametrize("spec", ["k4v4", "k3v5", "k3tv4+mean", "bf16"])
@pytest.mark.parametrize("options", VISIBILITY.values(), ids=VISIBILITY)
def test_decode_visibility(options: dict[str, Any], spec: str, backend: str) -> None:
    cache = make_cache(PageLayout.of(spec, 32, 64, 16), LENGTHS)
    check_decode(cache, noise(len(LENGTHS), 3, 4, 32), **options)


@pytest.mark.parametrize("spec", ["k4v4", "k4v3t+mean"])
def test_lag_and_first_split_at_a_token_across_splits(spec: str, backend: str) -> None:
    """The beginning of the visible tokens falls in the second split, the end in the third."""
    length = 2 * cpu_kernels.SPLIT_TOKENS + 90
    cache = make_cache(PageLayout.of(spec, 32), (length, 40), heads=1)
    first = torch.tensor([cpu_kernels.SPLIT_TOKENS + 77, 2])
    check_decode(cache, noise(2, 3, 2, 32), first=first, lag=20, window=700)


@pytest.mark.parametrize("num_queries", [16, 17, 40])
@pytest.mark.parametrize("spec", ["k4v4", "k8v3", "kf8castv4", "k2tv4t+mean"])
def test_decode_of_many_queries(spec: str, num_queries: int, backend: str) -> None:
    cache = make_cache(PageLayout.of(spec, 64, page_size=32), (0, 20, 90))
    check_decode(cache, noise(3, num_queries, 4, 64), window=30)


@pytest.mark.parametrize("options", [{}, {"window": 45}, {"lag": 20}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("num_queries", [3, 20])
@pytest.mark.parametrize("spec", ["k4v4", "k3tv3+mean", "exact"])
def test_decode_in_small_windows(
    spec: str, num_queries: int, options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix is de-quantised window by window: here of one tile, which only a very long one would need otherwise."""
    monkeypatch.setattr(reference, "WINDOW_BYTES", 1)
    monkeypatch.setattr(reference, "_QUERY_BLOCK", 7)
    cache = make_cache(PageLayout.of(spec, 32, 64, 32), (0, 1, 40, 100))
    check_decode(cache, noise(4, num_queries, 4, 32), scale=0.5, **options)


@pytest.mark.parametrize("num_queries", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_the_output_is_the_float32_result_in_the_dtype_of_q(dtype: torch.dtype, num_queries: int, backend: str) -> None:
    cache = make_cache(PageLayout.of("k4v4", 64, page_size=16), (40, 17))
    q = noise(2, num_queries, 4, 64, dtype=dtype)
    call = (cache.pages, cache.table, cache.lengths, cache.layout)
    out, lse = ops.decode_attention(q, *call, scale=0.125)
    exact_out, exact_lse = ops.decode_attention(q.float(), *call, scale=0.125)
    assert out.dtype == dtype
    assert torch.equal(out, exact_out.to(dtype))
    assert torch.equal(lse, exact_lse)


def test_strides_and_integer_types_of_the_arguments_do_not_matter(backend: str) -> None:
    cache = make_cache(PageLayout.of("k4v3", 64, page_size=16), (40, 17, 3))
    q, mask = noise(3, 2, 4, 64), torch.rand(3, 2, 50) < 0.7
    first = torch.tensor([1, 5, 0])
    plain = ops.decode_attention(
        q, cache.pages, cache.table, cache.lengths, cache.layout, scale=0.1, mask=mask, first=first,
        query_start=cache.lengths - 2,
    )  # fmt: skip
    other = ops.decode_attention(
        q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), cache.pages, cache.table.long().T.contiguous().T,
        cache.lengths.int(), cache.layout, scale=0.1, mask=mask.repeat_interleave(2, 2)[..., ::2], first=first.int(),
        query_start=torch.stack([cache.lengths - 2, first], dim=1)[:, 0],
    )  # fmt: skip
    for x, y in zip(plain, other, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


def test_results_are_written_where_the_caller_wants_them(backend: str) -> None:
    cache = make_cache(PageLayout.of("k4v3", 64, page_size=16), (40, 7))
    arguments = (cache.pages, cache.table, cache.lengths)
    q, bounds = noise(2, 3, 4, 64), torch.tensor([0, 4, 6])
    calls: list[tuple[torch.Tensor, Callable[..., tuple[torch.Tensor, torch.Tensor]]]] = [
        (q, lambda **own: ops.decode_attention(q, *arguments, cache.layout, scale=0.1, **own)),
        (q.flatten(0, 1), lambda **own: ops.prefill_attention(
            q.flatten(0, 1), *arguments, bounds, cache.layout, scale=0.1, **own
        )),
    ]  # fmt: skip
    for like, call in calls:
        out = torch.full_like(like, torch.nan)
        got, lse = call(out=out)
        want, want_lse = call()
        assert got is out
        assert torch.equal(got, want)
        assert torch.equal(lse, want_lse)
        for wrong in (like.double(), like[:-1], like.mT.contiguous().mT):
            with pytest.raises(ShapeError, match="out is a contiguous"):
                call(out=wrong)


@pytest.mark.parametrize("fill_byte", [0x00, 0x7F, 0xFF])
@pytest.mark.parametrize("spec", FORMATS)
def test_bytes_that_nobody_wrote_do_not_leak(spec: str, fill_byte: int, backend: str) -> None:
    """The results are the same, to the bit, whatever unused pages and tails of pages hold."""
    cache = make_cache(PageLayout.of(spec, 32, page_size=16), (0, 1, 15, 20, 40))
    pages = torch.full_like(cache.pages, fill_byte)
    other = Cache(cache.layout, pages, cache.table, cache.lengths)
    for b in range(5):
        slots = cache.slots(b)
        k = noise(len(slots), 2, 32, seed=2 * b + 1)
        fill(other, b, k, noise(len(slots), 2, 32, seed=2 * b + 2))
    for num_queries in (2, 20):
        q = noise(5, num_queries, 2, 32)
        results = [
            ops.decode_attention(q, each.pages, each.table, each.lengths, each.layout, scale=0.2)
            for each in (cache, other)
        ]
        for x, y in zip(*results, strict=True):
            assert not x.isnan().any()
            assert torch.equal(x, y)


def test_sequences_that_see_nothing_give_zero_and_minus_infinity(backend: str) -> None:
    cache = make_cache(PageLayout.of("k4v4", 32, page_size=16), (0, 20, 20, 20))
    q = noise(4, 2, 4, 32)
    call = (q, cache.pages, cache.table, cache.lengths, cache.layout)
    mask = torch.ones(4, 2, 20, dtype=torch.bool)
    mask[3] = False
    out, lse = ops.decode_attention(*call, scale=0.2, first=torch.tensor([0, 20, 0, 0]), mask=mask)
    for b in (0, 1, 3):
        assert torch.equal(out[b], torch.zeros_like(out[b]))
        assert torch.equal(lse[b], torch.full_like(lse[b], -torch.inf))
    assert (out[2] != 0).all()
    assert lse[2].isfinite().all()


@pytest.mark.parametrize("at", [0, 1, 16, 37, 99, 100])
def test_merged_parts_equal_the_whole(at: int, backend: str) -> None:
    cache = make_cache(PageLayout.of("k4v4", 64, page_size=16), (100,))
    q = noise(1, 4, 6, 64)
    options: dict[str, Any] = {"scale": 0.125, "query_start": torch.tensor([96])}
    head = ops.decode_attention(q, cache.pages, cache.table, torch.tensor([at]), cache.layout, **options)
    tail = ops.decode_attention(
        q, cache.pages, cache.table, cache.lengths, cache.layout, first=torch.tensor([at]), **options
    )
    out, lse = ops.merge_states([head, tail])
    assert_close((out[0], lse[0]), expected(q[0], *cache.vectors(0), sees(4, 100), 0.125))


def test_merging_a_part_that_saw_nothing_changes_nothing() -> None:
    state = (noise(2, 3, 4, 8), noise(2, 4, 3, seed=1))
    nothing = (torch.zeros_like(state[0]), torch.full_like(state[1], -torch.inf))
    for parts in ([state, nothing], [nothing, state]):
        for x, y in zip(ops.merge_states(parts), state, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    out, lse = ops.merge_states([nothing, nothing])
    assert torch.equal(out, nothing[0])
    assert torch.equal(lse, nothing[1])


def test_a_sink_logit_is_one_more_score_without_a_value(backend: str) -> None:
    cache = make_cache(PageLayout.of("k8v8", 32, page_size=16), (40,))
    q, sinks = noise(1, 2, 4, 32), torch.tensor([-torch.inf, 0.0, 3.0, 100.0])
    state = ops.decode_attention(q, cache.pages, cache.table, cache.lengths, cache.layout, scale=0.2)
    out = ops.apply_sink_logits(*state, sinks)
    k, v = cache.vectors(0)
    true, true_lse = dense(q[0], k, v, sees(2, 40), 0.2)
    share = true_lse.exp() / (true_lse.exp() + sinks.double().exp()[:, None])
    torch.testing.assert_close(out[0].double(), true * share.T[..., None], rtol=1e-5, atol=1e-7)


# --- the same result whatever else happens ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_queries", [1, 2, 5])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 1), (1, 2), (3, 1), (2, 4)], ids=lambda n: str(n))
def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch(heads: int, group: int, num_queries: int) -> None:
    lengths = (700, 1, 17, 512, 64)
    cache = make_cache(PageLayout.of("k4v4", 64, page_size=16), lengths, heads)
    q = noise(len(lengths), num_queries, heads * group, 64)
    with ops.backend("cpu"):
        together = ops.decode_attention(q, cache.pages, cache.table, cache.lengths, cache.layout, scale=0.125)
        for b in range(len(lengths)):
            row = cache.row(b)
            alone = ops.decode_attention(q[b : b + 1], row.pages, row.table, row.lengths, row.layout, scale=0.125)
            for x, y in zip(alone, together, strict=True):
                assert torch.equal(x[0], y[b])


@pytest.mark.parametrize("spec", ["k4v4", "k3v8", "k3tv4t", "kf8v2"])
def test_threads_and_repetition_change_no_bit(spec: str) -> None:
    cache = make_cache(PageLayout.of(spec, 64, page_size=16), (1500, 3, 600))
    q = noise(3, 2, 8, 64)
    k, v = noise(300, 2, 64, seed=1), noise(300, 2, 64, seed=2)
    slots = torch.randperm(len(cache.pages) * 16)[:300]
    results = []
    before = torch.get_num_threads()
    try:
        with ops.backend("cpu"):
            for threads in (1, 2, 3, 1, 2):
                torch.set_num_threads(threads)
                out, lse = ops.decode_attention(q, cache.pages, cache.table, cache.lengths, cache.layout, scale=0.125)
                loaded = ops.load_kv(cache.pages, cache.table, cache.layout, 1500)[0][0]
                results.append((out, lse, loaded, stored("cpu", k, v, cache, slots)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


# --- prefill ----------------------------------------------------------------------------------------------------------

CONTEXTS = (0, 33, 16, 0, 5)
CHUNKS = (17, 9, 1, 0, 30)


def prefill_case(
    layout: PageLayout, group: int
) -> tuple[Cache, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch in which some requests begin, others continue and one has no tokens: cache, q, k, v, cu_seqlens."""
    lengths = [context + chunk for context, chunk in zip(CONTEXTS, CHUNKS, strict=True)]
    cache = empty_cache(layout, lengths)
    chunks = []
    for b, (context, length) in enumerate(zip(CONTEXTS, lengths, strict=True)):
        k, v = noise(length, 2, layout.head_size, seed=2 * b + 1), noise(length, 2, layout.head_size_v, seed=2 * b + 2)
        fill(cache, b, k, v)
        chunks.append((k[context:], v[context:]))
    k, v = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    cu_seqlens = torch.tensor([0, *CHUNKS]).cumsum(0)
    return cache, noise(len(k), 2 * group, layout.head_size), k, v, cu_seqlens


@pytest.mark.parametrize(
    "option", [{}, {"window": 12}, {"softcap": 2.0}, {"mask": True}], ids=["plain", "window", "softcap", "mask"]
)
@pytest.mark.parametrize("spec", ["k4v4", "k3v5", "k4tv3t+mean", "kf8v4", "exact"])
@pytest.mark.parametrize("chunk", ["exact", "packed"])
def test_prefill(chunk: str, spec: str, option: dict[str, Any], backend: str) -> None:
    layout = PageLayout.of(spec, 64, 32, 16)
    cache, q, k, v, bounds = prefill_case(layout, group=2)
    option = dict(option)
    if "mask" in option:
        option["mask"] = torch.rand(len(CHUNKS), max(CHUNKS), 64) < 0.6
    context = torch.tensor(CONTEXTS) if chunk == "exact" else cache.lengths
    own: dict[str, Any] = {"k": k, "v": v} if chunk == "exact" else {}
    got = ops.prefill_attention(
        q, cache.pages, cache.table, context.int(), bounds.int(), layout, scale=0.125, **own, **option
    )
    wanted = []
    for b, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        keys, values = cache.vectors(b)
        if chunk == "exact":
            keys = torch.cat([keys[: CONTEXTS[b]], k[begin:end].double()])
            values = torch.cat([values[: CONTEXTS[b]], v[begin:end].double()])
        mask = option["mask"][b, : end - begin] if "mask" in option else None
        visible = sees(end - begin, len(keys), window=option.get("window"), mask=mask)
        wanted.append(expected(q[begin:end], keys, values, visible, 0.125, option.get("softcap")))
    assert_close(got, Expected.stack(wanted, varlen=True))


def test_a_packed_prefill_equals_decoding_token_by_token(backend: str) -> None:
    layout = PageLayout.of("k4v4", 64, page_size=16)
    cache = make_cache(layout, (50,))
    q = noise(50, 4, 64)
    out, lse = ops.prefill_attention(
        q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 50]), layout, scale=0.125
    )
    steps = [
        ops.decode_attention(q[None, t : t + 1], cache.pages, cache.table, torch.tensor([t + 1]), layout, scale=0.125)
        for t in range(50)
    ]
    want = expected(q, *cache.vectors(0), sees(50, 50), 0.125)
    assert_close((out, lse), want)
    assert_close((torch.cat([o[0] for o, _ in steps]), torch.cat([each[0] for _, each in steps], dim=1)), want)


@lru_cache(maxsize=1)
def _prompt() -> tuple[Cache, torch.Tensor, Expected]:
    """A prompt of 300 tokens, its queries, and what they give."""
    cache, q = make_cache(PageLayout.of("k3v4", 32, page_size=16), (300,), heads=1), noise(300, 2, 32)
    return cache, q, expected(q, *cache.vectors(0), sees(300, 300, window=120), 0.2)


@pytest.mark.parametrize(
    "cuts", [(0, 300), (0, 16, 32, 300), (0, 1, 2, 3, 150, 299, 300), (0, 257, 300)], ids=layout_id
)
def test_where_a_packed_prompt_is_cut_does_not_matter(cuts: tuple[int, ...], backend: str) -> None:
    cache, q, want = _prompt()
    parts = [
        ops.prefill_attention(
            q[begin:end], cache.pages, cache.table, torch.tensor([end]), torch.tensor([0, end - begin]),
            cache.layout, scale=0.2, window=120,
        )
        for begin, end in pairwise(cuts)
    ]  # fmt: skip
    assert_close((torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)), want)


@pytest.mark.parametrize(
    "option",
    [{}, {"window": 6}, {"softcap": 2.0}, {"first": torch.tensor([4, 13])}],
    ids=["plain", "window", "softcap", "first"],
)
def test_exact_attention(option: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens at positions 3 to 13 and 10 to 20; queries from 8 and 10 on, in blocks of 16."""
    monkeypatch.setattr(reference, "_SCORE_ELEMENTS", 1)
    q, k, v = noise(2, 20, 6, 40), noise(2, 10, 2, 40, seed=1), noise(2, 10, 2, 24, seed=2)
    key_start, query_start = torch.tensor([3, 10]), torch.tensor([8, 10])
    out, lse = ops.exact_attention(q, k, v, scale=0.2, key_start=key_start, query_start=query_start, **option)
    for b in range(2):
        shift = int(key_start[b])
        seen = {name: int(value[b]) - shift if name == "first" else value for name, value in option.items()}
        softcap = seen.pop("softcap", None)
        visible = sees(20, 10, query_start=int(query_start[b]) - shift, **seen)
        assert_close((out[b], lse[b]), expected(q[b], k[b].double(), v[b].double(), visible, 0.2, softcap))


# --- scores that are hard on a softmax ------------------------------------------------------------------------------


def hard_keys(kind: str, tokens: int, head_size: int) -> tuple[torch.Tensor, float]:
    """Keys, and the scale of the scores, that make an online softmax work."""
    k = noise(tokens, 1, head_size, seed=1)
    if kind == "peaked":
        return k, 8.0
    if kind == "rising":  # every token beats all before it, so that every tile rescales
        return noise(1, 1, head_size) * torch.linspace(0.1, 10, tokens)[:, None, None], 0.5
    if kind == "falling":
        return noise(1, 1, head_size) * torch.linspace(10, 0.1, tokens)[:, None, None], 0.5
    if kind == "constant":
        return noise(1, 1, head_size, seed=1).expand(tokens, -1, -1), 0.125
    if kind == "zero":
        return torch.zeros(tokens, 1, head_size), 0.125
    if kind == "uniform coordinates":
        return torch.ones(tokens, 1, head_size) * torch.linspace(-1, 1, tokens)[:, None, None], 0.125
    at = {"one huge first": 0, "one huge in the middle": tokens // 2, "one huge last": tokens - 1}[kind]
    k[at] *= 1e4
    return k, 0.125


HARD = (
    "peaked", "rising", "falling", "constant", "zero", "uniform coordinates", "one huge first",
    "one huge in the middle", "one huge last",
)  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1], ids=["towards", "away"])
@pytest.mark.parametrize("spec", ["k4v4", "kf8v3", "k3tv4t+mean", "exact"])
@pytest.mark.parametrize("kind", HARD)
def test_hard_scores(kind: str, spec: str, sign: int, backend: str) -> None:
    tokens = cpu_kernels.SPLIT_TOKENS + 60
    layout = PageLayout.of(spec, 32, page_size=64)
    cache = empty_cache(layout, [tokens], heads=1)
    k, scale = hard_keys(kind, tokens, 32)
    fill(cache, 0, k, noise(tokens, 1, 32, seed=9))
    q = torch.cat([sign * noise(1, 1, 1, 32), sign * noise(1, 1, 1, 32, seed=1)], dim=2)
    check_decode(cache, q, scale=scale)


@pytest.mark.parametrize("spec", ["k1v1", "k4v4", "k8v8", "k2tv4t", "k3tv3t+mean", "kf8vf8", "kf8castv4", "exact"])
def test_zero_vectors_are_stored_as_zero(spec: str, backend: str) -> None:
    layout = PageLayout.of(spec, 32, page_size=16)
    cache = empty_cache(layout, [5])
    zeros = torch.zeros(5, 2, 32)
    ops.store_kv(zeros, zeros, cache.pages, cache.slots(0), layout, previous=cache.previous(0))
    for x in ops.load_kv(cache.pages, cache.table, layout, 5):
        assert torch.equal(x, torch.zeros_like(x))
    out, lse = ops.decode_attention(noise(1, 1, 2, 32), cache.pages, cache.table, cache.lengths, layout, scale=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 5).log(), rtol=1e-6, atol=0)


# --- which implementation ---------------------------------------------------------------------------------------------

WITHOUT_NUMBA = """
import logging, sys
sys.modules["numba"] = None
import torch
from kvfold import ops
from kvfold.errors import FormatError, ShapeError
from kvfold.layout import PageLayout

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
logging.getLogger("kvfold").addHandler(handler)

layout = PageLayout.of("k4v4", 32, page_size=16)
pages = torch.zeros(layout.page_shape(2, 1), dtype=torch.uint8)
table, lengths = torch.tensor([[0, 1]]), torch.tensor([20])
ops.store_kv(torch.randn(20, 1, 32), torch.randn(20, 1, 32), pages, torch.arange(20), layout)
q = torch.randn(1, 1, 2, 32)
out, lse = ops.decode_attention(q, pages, table, lengths, layout, scale=0.2)
with ops.backend("reference"):
    again, _ = ops.decode_attention(q, pages, table, lengths, layout, scale=0.2)
assert torch.equal(out, again) and lse.isfinite().all() and (out != 0).any()
assert len(messages) == 1 and messages[0][0] == "WARNING" and "numba" in messages[0][1], messages
try:
    with ops.backend("cpu"):
        ops.decode_attention(q, pages, table, lengths, layout, scale=0.2)
except FormatError as error:
    assert "kvfold[cpu]" in str(error), error
    print("done")
"""


def test_without_numba_the_reference_works_and_warns_once() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, timeout=100, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr


def test_the_backend_is_chosen_by_device_and_can_be_overridden() -> None:
    from kvfold.ops import cpu

    device, layout = torch.device("cpu"), PageLayout.of("k4v4", 64)
    assert ops.choose(device, layout) is cpu
    with ops.backend("reference"):
        assert ops.choose(device, layout) is reference
        with ops.backend("cpu"):
            assert ops.choose(device, layout) is cpu
        assert ops.choose(device, layout) is reference
    assert ops.choose(device, layout) is cpu


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_a_backend_that_cannot_serve_a_device_says_why(name: str) -> None:
    device = torch.device("cpu" if name == "cuda" else "meta")
    with ops.backend(name), pytest.raises(FormatError, match=rf"(?i){name}.*tensors are on {device}"):
        ops.choose(device, PageLayout.of("k4v4", 128))


def test_tables_live_as_long_as_their_addresses_are_used() -> None:
    from kvfold.ops import cpu

    layout = PageLayout.of("k4v4", 32, page_size=16)
    alive = weakref.ref(cpu._kept_side(layout, False, False)[1][0])
    many = itertools.product(range(1, 9), range(1, 9), (16, 32, 64), (False, True), (False, True))
    for k, v, page_size, is_value, stored in many:  # more than are kept
        cpu._side(PageLayout.of(f"k{k}v{v}", 32, page_size=page_size), is_value, stored)
        cpu._side(layout, False)
    assert alive() is not None
