"""How the CUDA prefill cuts keys into windows: arithmetic, and where it puts what it says that it needs."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch

from kvfold.errors import CapacityError
from kvfold.ops.cuda import prefill, windows

FA3 = windows.Library(shares=True, in_place=True)


def test_how_keys_are_cut() -> None:
    one = windows.Share(132, 1, FA3)
    two = windows.Share(66, 2, FA3)

    def cut(share: windows.Share, *given: int) -> windows.Split:
        found = windows.split(*given, share)
        assert found is not None
        return found[1]

    assert cut(two._replace(lent=1), 8192, 8, 30720, 0) == (2, 30720)  # whole heads, and nothing to join
    assert cut(one, 2048, 8, 30720, 0) == (8, 10240)  # of four heads there would be 64 blocks
    assert cut(one, 68, 8, 30720, 0) == (3, 30720)  # FlashAttention-3 shares them among all
    assert cut(one, 4096, 8, 8000, 0) == (8, 8000)  # all at once
    assert cut(two, 4096, 8, 8000, 0) == (4, 8000)
    for rows, heads, keys, own in ((1, 1, 10**6, 0), (300, 3, 5, 300), (5000, 5, 40000, 0), (100, 2, 0, 100)):
        for share in (one, two):
            split = cut(share, rows, heads, keys, own)
            assert 0 < split.heads <= heads
            assert split.tokens % 16 == 0 < split.tokens
            assert split.tokens <= share.tokens_of(split.heads, rows, min(windows.SLOTS, -(-keys // split.tokens) + 1))


@pytest.mark.parametrize(
    ("count", "heads", "group", "prefix"),
    [(2048, 8, 4, 30720), (8192, 8, 4, 30720), (40000, 8, 4, 17), (2048, 32, 1, 10**6), (300, 1, 32, 10**6),
     (70000, 4, 8, 1), (65, 3, 1, 5), (2048, 8, 4, 32768), (2048, 8, 4, 120_000), (8192, 8, 4, 24_000),
     (20, 1, 64, 10**7), (16384, 8, 4, 16384), (512, 8, 5, 20_000), (1024, 6, 4, 30_000), (4096, 5, 3, 131_072),
     (1024, 10, 4, 12_000), (1500, 8, 3, 16_384), (4096, 5, 3, 10**6), (2048, 2, 64, 131072),
     (8193, 4, 8, 500_000), (20_000, 8, 8, 200_000)],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("library", [FA3, FA3._replace(in_place=False), windows.Library(False, False)])
def test_who_reads_what(
    library: windows.Library, packed: bool, count: int, heads: int, group: int, prefix: int
) -> None:
    """All queries read all keys before them once, and what exists at a time is bounded."""
    plan = windows.plan(count, heads, group, prefix, packed, 132, library)
    served = sorted((x.begin, x.first, x.rows, x.heads) for x in plan.groups)
    assert served[0][:2] == (0, 0)
    for (begin, first, rows, width), (next_begin, next_first, *_) in pairwise([*served, (count, 0, 0, 0)]):
        assert (next_begin, next_first) == ((begin, first + width) if next_begin == begin else (begin + rows, 0))
        assert next_begin == begin or first + width == heads
    inside = 0
    for x in plan.groups:
        cuts = list(x.windows)
        before = prefix + x.begin if packed else prefix
        if packed:
            start, end = cuts.pop(0)
            assert (end, start % 16) == (before + x.rows, 0)
            assert 0 <= before - start < 16
        assert [start for start, _ in cuts] + [before] == [0] + [end for _, end in cuts]
        assert all(start % 16 == 0 for start, _ in x.windows)
        results = 0 if library.in_place else min(len(x.windows), windows.SLOTS) * x.vectors * 256
        inside = max(inside, results + (plan.among(x) * 4 * 128 * x.vectors if plan.among(x) > 1 else 0))
    if plan.lenders:
        assert (len(plan.lenders), packed) in ((1, False), (2, False))
        assert {(x.heads, x.begin) for x in plan.groups} == {(plan.lenders[0].heads, 0)}
        assert len(plan.groups) % 2 == 0
    assert sum(plan.vectors) * 256 + plan.share.streams * inside <= windows.SCRATCH_BYTES
    for stream, vectors in enumerate(plan.vectors):
        lent = torch.empty(0) if stream >= plan.share.streams - plan.share.lent else None
        memory = torch.empty(vectors, 128, dtype=torch.float16, device="meta")
        lane = prefill._Lane(mock.Mock(), memory, lent)
        for x in plan.groups:
            parts = [y for start, end in x.windows for y in lane.window(x, start, end)]
            after = 2 * x.window_vectors * 128
            assert all(y.storage_offset() + y.numel() <= after for y in parts)
            waiting = min(len(x.windows), windows.SLOTS) - 1 if library.in_place else 0
            places = [lane.result(x, at) for at in range(waiting)]
            places = [lane.queries(x), *places] if lent is None else places
            starts = [y.storage_offset() for y in places]
            assert starts == [after + at * x.vectors * 128 for at in range(len(places))]
            assert {tuple(y.shape) for y in places} <= {(x.rows, x.heads * group, 128)}
        if plan.lenders and not stream:
            late = lane.behind_windows(count, (heads - plan.lenders[0].first) * group)
            assert late.numel() <= 2 * 128 * min(x.window_vectors for x in plan.groups)


@pytest.mark.parametrize("lent", [0, 1, 2])
def test_lending_where_it_saves_a_window(lent: int) -> None:
    """Two heads' keys fit if their queries are elsewhere; nobody lends a place for nothing."""
    context = {0: 28672, 1: 30720, 2: 32768}[lent]
    plan = windows.plan(2048, 8, 4, context, False, 132, FA3)
    assert (plan.share.lent, len(plan.lenders)) == (lent, lent)
    assert [(x.heads, x.windows) for x in plan.groups] == [(2, ((0, context),))] * 4
    assert sum(plan.vectors) * 256 <= windows.SCRATCH_BYTES
    without = FA3._replace(in_place=False)
    assert windows.plan(2048, 8, 4, context, False, 132, without).share.lent == 0
    assert windows.plan(2048, 8, 4, context, True, 132, FA3).share.lent == 0


def test_a_smaller_group_shares_keys_among_more_processors_as_far_as_there_is_room() -> None:
    plan = windows.plan(192, 8, 4, 20_000, False, 132, FA3)
    assert [(x.heads, plan.among(x)) for x in plan.groups] == [(5, 4), (3, 6)]
    assert windows.plan(2048, 8, 4, 30720, False, 132, FA3).among(plan.groups[1]) == 1
    cudnn = windows.plan(192, 8, 4, 20_000, False, 132, windows.Library(shares=False, in_place=False))
    assert {cudnn.among(x) for x in cudnn.groups} == {1}


def test_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "SCRATCH_BYTES", 2**20)
    windows.split.cache_clear()
    try:
        with pytest.raises(CapacityError, match=r"512 query heads .* read 9000 tokens.* a shorter context, or"):
            windows.plan.__wrapped__(3, 1, 512, 9000, False, 132, FA3)
    finally:
        windows.split.cache_clear()
