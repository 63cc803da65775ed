"""What the tests of the CUDA kernels share, on a GPU and on the emulator: storing and attending, and what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from ops_cases import Cache, State, decode_records, empty_cache, expected, make_cache, noise, sees

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.ops.cuda import decode, store
from kvfold.ops.options import DecodeSchedule

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 4e-3, F16: 1e-3, F32: 5e-4}
"""Largest error of a row of the output, relative to its norm. Rounding to bfloat16 alone makes 1.7e-3."""


# --- store ------------------------------------------------------------------------------------------------------------


def poisoned(layout: PageLayout, num_pages: int, heads: int) -> torch.Tensor:
    """Pages of random bytes, but for key references, which are there if any of the others is somebody's."""
    pages = torch.randint(0, 256, layout.page_shape(num_pages, heads), dtype=torch.uint8)
    if layout.format.mean:
        pages[..., layout.reference :] = layout.encode_reference(noise(num_pages, heads, layout.head_size, seed=3))
    return pages


def records(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    return Cache(layout, pages, torch.empty(0), torch.empty(0)).records(slots)


CPU = torch.device("cpu")
"""Where the emulator runs."""


def stored_pages(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout,
    device: torch.device = CPU,
) -> torch.Tensor:  # fmt: skip
    """The pages after either kernel stored in a copy of them, that for few tokens and that for many: the same bytes."""
    few, many = pages.to(device, copy=True), pages.to(device, copy=True)
    k, v, slots = k.to(device), v.to(device), slots.to(device)
    previous = torch.full_like(slots, -1) if layout.format.mean else None
    for got, vectors in ((few, 2**31), (many, 0)):
        with mock.patch.object(store, "_FEW", vectors), ops.backend("cuda"):
            ops.store_kv(k, v, got, slots, layout, previous=previous)
    assert torch.equal(few, many), f"the kernels differ in {int((few != many).sum())} bytes"
    return few.cpu()


def check_store(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout,
    device: torch.device = CPU,
) -> None:  # fmt: skip
    """The kernel writes the reference's bytes but for ties, and nothing else.

    At most 1e-4 of the bytes differ, or parts of one vector, and the errors of their vectors agree within 2 %. Key
    references are taken as they are.
    """
    got = stored_pages(k, v, pages, slots, layout, device)
    kept = slots >= 0
    others = torch.tensor(sorted(set(range(len(pages) * layout.page_size)) - set(slots[kept].tolist())))
    assert torch.equal(records(got, others, layout), records(pages, others, layout)), "other tokens' bytes"
    opened = torch.zeros(len(pages), dtype=torch.bool)
    opened[slots[kept & (slots % layout.page_size == 0)] // layout.page_size] = True
    assert torch.equal(got[~opened][..., layout.reference :], pages[~opened][..., layout.reference :]), "references"
    references = Cache(layout, got, torch.empty(0), torch.empty(0)).references(slots[kept])
    subtracted = None if references is None else references.float()
    mine, want = records(got, slots[kept], layout), layout.encode(k[kept], v[kept], subtracted)
    differ = mine != want
    assert int(differ.sum()) <= max(1e-4 * want.numel(), layout.token_bytes / 2), f"{int(differ.sum())} bytes differ"
    tokens = differ.any(-1)
    originals = (k[kept][tokens].double(), v[kept][tokens].double())
    references = None if references is None else references[tokens]
    pairs = zip(*(decode_records(x[tokens], layout, references) for x in (mine, want)), strict=True)
    for original, (x, y) in zip(originals, pairs, strict=True):
        torch.testing.assert_close((x - original).norm(dim=-1), (y - original).norm(dim=-1), rtol=0.02, atol=0)


# --- key references ---------------------------------------------------------------------------------------------------

Calls = list[list[tuple[int, int, int]]]
"""Calls of ``store_kv``, each for tokens begin to end of some sequences: ``(b, begin, end)``."""


def shifted(cache: Cache, b: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sequence; K's mean wanders, so that no two pages would choose the same."""
    tokens, heads = int(cache.lengths[b]), cache.pages.shape[1]
    walk = 0.3 * noise(tokens, heads, 128, seed=10 * b + 1).cumsum(0) + 3
    return (noise(tokens, heads, 128, seed=10 * b + 2) + walk).to(dtype), noise(tokens, heads, 128, seed=10 * b + 3)


def opening_cases(layout: PageLayout) -> tuple[Cache, Calls]:
    """Pages that are opened with keys of their own, or too few of them and those of the page before.

    These are as they are stored, or of the same call, in part or all.
    """
    page, quarter = layout.page_size, layout.page_size // 4
    cuts = [
        [page + quarter], [page + quarter - 1], [page - 1, page, page + 1], [quarter - 1, 2 * page],
        [page // 2, page + 1], [page // 2 + 1, page + 1],
    ]  # fmt: skip
    cache = empty_cache(layout, [5 * page // 2] * len(cuts))
    calls: Calls = [[] for _ in range(4)]
    for b, places in enumerate(cuts):
        for call, part in zip(calls, pairwise([0, *places, 5 * page // 2]), strict=False):
            call.append((b, *part))
    return cache, calls


Vectors = list[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each sequence."""


def bad_keys() -> tuple[Cache, Calls, Vectors]:
    """Keys that are not finite, one that is huge, and pages of huge, of zero, of bad and of tiny ones."""
    cache = empty_cache(PageLayout.of("k4v4+mean", 128, page_size=16), [96])
    k, v = shifted(cache, 0, F32)
    k[3, 1, 5], k[7, 0, 0] = torch.nan, torch.inf
    k[20, 0] *= 1e4
    k[32:48] *= 1e30
    k[48:64], k[64:80] = 0, torch.nan
    k[80:] *= 1e-36
    return cache, [[(0, 0, 96)]], [(k, v)]


def first_keys(spec: str = "k4v4+mean") -> tuple[Cache, Calls, Vectors]:
    """Sequences whose first key is short, one of the others, long, bad, zero, tiny with all others, or alone."""
    cache = empty_cache(PageLayout.of(spec, 128, page_size=16), [16, 16, 16, 16, 16, 9, 1])
    vectors = []
    for b, size in enumerate((0.3, None, 4.0, torch.nan, 0.0, 0.3, 1.0)):
        k, v = shifted(cache, b, F32)
        if size is not None:
            k[0] = size * noise(2, 128, seed=b)
        vectors.append((k * (1e-30 if b == 5 else 1), v))
    return cache, [[(b, 0, length) for b, length in enumerate(cache.lengths.tolist())]], vectors


def store_in_steps(cache: Cache, calls: Calls, vectors: Vectors, device: torch.device = CPU) -> None:
    """The kernels choose the references that the reference chooses, in calls one after the other.

    Every call begins with what the reference has written, so that a tie in one does not show in the next.
    """
    pages = cache.pages.clone()
    for parts in calls:
        slots = torch.cat([cache.slots(b)[begin:end] for b, begin, end in parts])
        previous = torch.cat([cache.previous(b)[begin:end] for b, begin, end in parts])  # type: ignore[index]
        k, v = (torch.cat([vectors[b][side][begin:end] for b, begin, end in parts]) for side in (0, 1))
        got = pages.to(device, copy=True)
        with ops.backend("cuda"):
            ops.store_kv(
                *(x.to(device) for x in (k, v)), got, slots.to(device), cache.layout, previous=previous.to(device)
            )
        reference.store_kv(k, v, pages, slots, cache.layout, previous)
        touched = slots.div(cache.layout.page_size, rounding_mode="floor").unique()
        others = torch.ones(len(pages), dtype=torch.bool)
        others[touched] = False
        assert torch.equal(got.cpu()[others], pages[others])
        compare_references(got.cpu()[touched], pages[touched], cache.layout)


def compare_references(got: torch.Tensor, want: torch.Tensor, layout: PageLayout) -> None:
    """Of pages: scales are the same, and so are the codes but for few that differ by one."""
    mine, its = (x[..., layout.reference :] for x in (got, want))
    assert torch.equal(mine[..., 128:], its[..., 128:]), "scales, and the zeros before them"
    codes = [x[..., :128].contiguous().view(torch.int8).int() for x in (mine, its)]
    assert (codes[0] - codes[1]).abs().max() <= 1
    assert (codes[0] != codes[1]).float().mean() < 0.01


# --- decode -----------------------------------------------------------------------------------------------------------

Truth = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def truth(
    cache: Cache, q: torch.Tensor, scale: float = 128**-0.5, softcap: float | None = None, **options: Any
) -> Truth:
    """Out ``[B, Tq, Hq, d]`` in float64, the log-sum-exp and its allowed error.

    That is 2e-3, or 1e-5 of the largest score that the query may have where this is more, because q is 16-bit fixed
    point.
    """
    parts = []
    for b, length in enumerate(cache.lengths.tolist()):
        seen = {
            name: value if name in ("lag", "window") else value[b] if name == "mask" else int(value[b])
            for name, value in options.items()
        }
        visible = sees(q.shape[1], length, **seen)
        want = expected(q[b].float(), *cache.vectors(b), visible, scale, softcap)
        parts.append((*want.truth, (1e-5 * want.condition.nan_to_num()).clamp(min=2e-3)))
    out, lse, allowed = (torch.stack(part) for part in zip(*parts, strict=True))
    return out, lse, allowed


def compare(got: State, want: Truth) -> None:
    """Every row of the output, and every log-sum-exp, is the truth to what its dtype allows; so are NaN and nothing."""
    (out, lse), (true_out, true_lse, allowed) = got, want
    assert torch.equal(out.isfinite(), true_out.isfinite()), "finite outputs"
    error = (out.double() - true_out).nan_to_num().norm(dim=-1)
    limit = TOLERANCE[out.dtype] * true_out.nan_to_num().norm(dim=-1)
    far = error > limit
    assert not far.any(), f"out: rows are {(error / limit)[far].max():.3g} times what is allowed from the truth"
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf), "who sees nothing"
    assert torch.equal(lse.isnan(), true_lse.isnan()), "who sees NaN"
    far = torch.where(true_lse.isfinite(), lse.double() - true_lse, 0.0).abs() > allowed
    assert not far.any(), "log-sum-exp"


def attend(cache: Cache, q: torch.Tensor, **options: Any) -> State:
    options.setdefault("scale", 128**-0.5)
    return ops.decode_attention(q, cache.pages, cache.table, cache.lengths, cache.layout, **options)


def scheduled(cache: Cache, q: torch.Tensor, **options: Any) -> DecodeSchedule | None:
    """The schedule of :func:`attend`'s call with these options, complete when it is returned."""
    made = ops.schedule_decode(
        cache.lengths, cache.layout, q.shape[2], cache.pages.shape[1], query_tokens=q.shape[1],
        **{name: value for name, value in options.items() if name in ("first", "query_start", "lag", "window")},
    )  # fmt: skip
    if cache.pages.is_cuda:
        torch.cuda.synchronize()
    return made


def check(cache: Cache, q: torch.Tensor, times: int = 1, batch_invariant: bool = False, **options: Any) -> State:
    """The kernel's result equals the truth; ``times`` puts the batch's sequences into the batch so many times."""
    many = pick(cache, list(range(len(cache.table))) * times)
    got = attend(many, q.repeat(times, 1, 1, 1), batch_invariant=batch_invariant, **options)
    out, lse, allowed = truth(cache, q, **options)
    compare(got, (out.repeat(times, 1, 1, 1), lse.repeat(times, 1, 1), allowed.repeat(times, 1, 1)))
    assert not decode._scratch(None).counters.any(), "counters"
    return got


def stored(lengths: Sequence[int], spec: str = "k4v4", page_size: int = 64, heads: int = 2) -> Cache:
    return make_cache(PageLayout.of(spec, 128, page_size=page_size), lengths, heads)


def pick(cache: Cache, rows: list[int]) -> Cache:
    return replace(cache, table=cache.table[rows], lengths=cache.lengths[rows])


def queries(cache: Cache, group: int = 4, tokens: int = 1, dtype: torch.dtype = BF16) -> torch.Tensor:
    return noise(len(cache.table), tokens, group * cache.pages.shape[1], 128, seed=7).to(dtype)


def same(one: State, other: State) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
