"""Key references (``+mean``) in the CUDA C++ kernels on the emulator (``tests/emulator``): for machines without GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import emulator
import pytest
import torch
from cuda_cases import (
    BF16,
    F16,
    F32,
    attend,
    bad_keys,
    check,
    first_keys,
    opening_cases,
    queries,
    same,
    scheduled,
    shifted,
    store_in_steps,
    stored,
)
from emulator import BLOCKS_BACKWARDS, LATE_COPIES, SEED, THREADS_BACKWARDS, EmulatedDevice, emulated_device
from ops_cases import Cache, empty_cache, fill, noise

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops.cuda import references

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    """A GPU of three multiprocessors: so few that small inputs are cut into stretches, and merged across blocks."""
    with emulated_device(multiprocessors=3) as device, ops.backend("cuda"):
        yield device


# --- opening pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [0, 2**31])
@pytest.mark.parametrize(
    ("page_size", "dtype", "spec"),
    [
        (16, BF16, "k4v4"),
        (32, F16, "k3v2"),
        (64, F32, "k2v3"),
        (16, F32, "k2tv4"),
        (32, F16, "k3tv2t"),
        (64, BF16, "k4tv3t"),
    ],
)
def test_pages_are_opened_as_the_reference_opens_them(
    spec: str, dtype: torch.dtype, page_size: int, few: int, device: EmulatedDevice
) -> None:
    cache, steps = opening_cases(PageLayout.of(f"{spec}+mean", 128, page_size=page_size))
    vectors = [shifted(cache, b, dtype) for b in range(len(cache.table))]
    with mock.patch.object(references, "_FEW", few):
        store_in_steps(cache, steps, vectors)


def test_bad_keys_do_not_count(device: EmulatedDevice) -> None:
    store_in_steps(*bad_keys())


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
def test_first_keys_that_stand_apart_or_are_sinks(sinks: int, device: EmulatedDevice) -> None:
    store_in_steps(*first_keys(f"k4v4+mean+sinks{sinks}" if sinks else "k4v4+mean"))


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "coordinates apart": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("stride", STRIDES)
def test_strides_and_schedules_do_not_matter(stride: str, dtype: torch.dtype, device: EmulatedDevice) -> None:
    layout = PageLayout.of("k4v4+mean", 128, page_size=16)
    cache = empty_cache(layout, [40])
    k, v = shifted(cache, 0, dtype)
    slots, previous = cache.slots(0), cache.previous(0)
    assert previous is not None
    want = cache.pages.clone()
    ops.store_kv(k, v, want, slots, layout, previous=previous)
    for schedule in (BLOCKS_BACKWARDS | THREADS_BACKWARDS, SEED):
        device.schedule, got = schedule, cache.pages.clone()
        ops.store_kv(STRIDES[stride](k), v, got, slots, layout, previous=previous.repeat_interleave(2)[::2])
        assert torch.equal(got, want)
    assert [name for name, _ in device.launches[:2]] == ["open_pages", "store_few"]


# --- attending --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(("group", "num_queries"), [(1, 8), (4, 1), (4, 2), (8, 1), (8, 3)])
def test_groups_and_query_tokens(group: int, num_queries: int, page_size: int, device: EmulatedDevice) -> None:
    cache = stored((0, 1, 5, 32, 33, 64, 300), "k4v4+mean", page_size)
    check(cache, queries(cache, group, num_queries))


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("page_size", [16, 64])
def test_keys_of_a_large_common_offset(page_size: int, group: int, device: EmulatedDevice) -> None:
    """Scores are in the tens, most of them the reference's part, which differs from page to page."""
    cache = empty_cache(PageLayout.of("k4v4+mean", 128, page_size=page_size), (700,), heads=1)
    k, v = noise(700, 1, 128, seed=1), noise(700, 1, 128, seed=2)
    fill(cache, 0, k + 8 * noise(1, 1, 128, seed=3) + 0.1 * noise(700, 1, 128, seed=4).cumsum(0), v)
    check(cache, queries(cache, group))
    check(cache, queries(cache, group), softcap=20.0, window=333)


@pytest.mark.parametrize("options", [{"window": 70}, {"lag": 40}, {"first": [0, 10, 64]}, {"mask": 0.5}], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_visibility(page_size: int, options: dict[str, object], device: EmulatedDevice) -> None:
    """References of pages that nobody sees may be anything."""
    cache = stored((33, 64, 300), "k3v4+mean", page_size)
    given = dict(options)
    if "first" in given:
        given["first"] = torch.tensor(given["first"])
    if "mask" in given:
        given["mask"] = torch.rand(3, 3, 310) < given["mask"]
    check(cache, queries(cache, 4, tokens=3), **given)


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_the_order_of_blocks_threads_and_copies_changes_no_bit(page_size: int, device: EmulatedDevice) -> None:
    cache = stored((500, 1, 0, 64, 333), "k4v4+mean", page_size)
    q = queries(cache)
    for invariant in (False, True):
        want = check(cache, q, batch_invariant=invariant)
        ready = {"inputs_ready": True, "schedule": scheduled(cache, q)}
        assert same(attend(cache, q, batch_invariant=invariant, **ready), want)
        for schedule in (BLOCKS_BACKWARDS | THREADS_BACKWARDS | LATE_COPIES, LATE_COPIES, SEED):
            device.schedule = schedule
            assert same(attend(cache, q, batch_invariant=invariant), want), schedule
        device.schedule = 0


def test_sequences_that_share_pages(device: EmulatedDevice) -> None:
    """Pieces that begin in the middle of a page, whose reference was copied for another warp."""
    cache = stored((640,), "k2v2+mean", 64, heads=1)
    many = Cache(cache.layout, cache.pages, cache.table.expand(3, -1), torch.tensor([640, 480, 33]))
    check(many, queries(many))
