"""The CUDA C++ kernels that store and de-quantise, on the emulator (``tests/emulator``): for machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import emulator
import pytest
import torch
from cuda_cases import BF16, F16, F32, check_store, poisoned, records, stored_pages
from emulator import BLOCKS_BACKWARDS, SEED, THREADS_BACKWARDS, EmulatedDevice, emulated_device
from ops_cases import empty_cache, fill, make_cache, noise

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops.cuda import expand

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    """A GPU of three multiprocessors: so few that small inputs are cut into stretches, and merged across blocks."""
    with emulated_device(multiprocessors=3) as device, ops.backend("cuda"):
        yield device


# --- store ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "dtype", "page_size"),
    [
        ("k4v4", BF16, 64), ("k3v3", F16, 16), ("k2v2", F32, 32), ("k4v2+nc+pre1", F32, 16), ("k2v3+plain", F16, 64),
        ("k3v4+mse+pre5", BF16, 32), ("k4v4+mean", BF16, 64), ("k3v3+mean+nc+pre1", F32, 16), ("k2v4+mean", F16, 32),
        ("k2tv3t", BF16, 64), ("k4tv2t+nc+pre1", F32, 16), ("k3tv4+mean+mse", F16, 32), ("k2v4t+nc+pre5", BF16, 16),
    ],
)  # fmt: skip
def test_scattered_tokens(spec: str, dtype: torch.dtype, page_size: int, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=page_size)
    slots = torch.randperm(192)[:75]
    slots[::7] = -1 - slots[::7]
    k, v = noise(75, 3, 128, seed=1, dtype=dtype), noise(75, 3, 128, seed=2, dtype=dtype)
    check_store(k, v, poisoned(layout, 192 // page_size, 3), slots, layout)


@pytest.mark.parametrize("begin", [0, 3, 16, 61])
@pytest.mark.parametrize("tokens", [1, 17, 64, 100])
@pytest.mark.parametrize("spec", ["k4v3+pre1", "k3tv4t+pre1"])
def test_consecutive_tokens(spec: str, tokens: int, begin: int, device: EmulatedDevice) -> None:
    """Prefill writes V four tokens at a time, wherever it begins."""
    layout = PageLayout.of(spec, 128, page_size=32)
    k, v = noise(tokens, 2, 128, seed=1, dtype=BF16), noise(tokens, 2, 128, seed=2, dtype=BF16)
    check_store(k, v, poisoned(layout, 6, 2), torch.arange(tokens) + begin, layout)


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd slice": lambda x: torch.nn.functional.pad(x, (1, 2))[:, :, 1:-2],
    "coordinates apart": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "expanded heads": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("spec", ["k4v4+pre1", "k3tv2t+pre1"])
def test_strides_do_not_matter(spec: str, stride: str, dtype: torch.dtype, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=16)
    k, v = (STRIDES[stride](noise(20, 3, 128, seed=seed, dtype=dtype)) for seed in (1, 2))
    pages, slots = poisoned(layout, 2, 3), torch.randperm(32)[:20]
    got = stored_pages(k, v, pages, slots.repeat_interleave(2)[::2], layout)
    assert torch.equal(got, stored_pages(k.contiguous(), v.contiguous(), pages, slots, layout))


@pytest.mark.parametrize("spec", ["k4v4+pre1", "k3v3+nc+pre1", "k4tv2t+pre1"])
def test_vectors_of_all_sizes(spec: str, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=16)
    size = 10 ** torch.linspace(-30, 30, 40)[:, None, None]
    k, v = noise(40, 2, 128, seed=1) * size, noise(40, 2, 128, seed=2) * size.flip(0)
    check_store(k, v, poisoned(layout, 4, 2), torch.randperm(64)[:40], layout)


@pytest.mark.parametrize("spec", ["k4v4+pre1", "k4v4", "k4tv2t", "k3tv3t+pre1"])
def test_zero_and_non_finite_vectors(spec: str, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=16)
    k, v = noise(16, 2, 128, seed=1), noise(16, 2, 128, seed=2)
    k[3], v[4], v[5] = 0, 0, -0.0
    for token, value in ((8, torch.nan), (9, torch.inf), (10, -torch.inf)):
        k[token, 0, 77], v[token, 1, 5] = value, value
    slots = torch.arange(16)
    pages = stored_pages(k, v, poisoned(layout, 1, 2), slots, layout)
    got, want = records(pages, slots, layout), layout.encode(k, v)
    codes = layout.token_bytes - 4
    scales, wanted = (x[..., codes:].contiguous().view(BF16) for x in (got, want))
    assert torch.equal(scales.isnan(), wanted.isnan())
    assert int(scales.isnan().sum()) == 2 * 3
    assert torch.equal(scales == 0, wanted == 0)
    assert (got[..., :codes] == want[..., :codes]).float().mean() > 0.999


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("spec", ["k4v4", "k3v2", "k2v3+pre5", "k4v4+nc+pre1", "k3v4+mean", "k4tv3t", "k2tv3+pre13"])
def test_few_tokens_are_stored(spec: str, tokens: int, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=32)
    k, v = noise(tokens, 2, 128, seed=1, dtype=BF16), noise(tokens, 2, 128, seed=2, dtype=BF16)
    slots = torch.randperm(64)[:tokens]
    slots[1::6] = -1
    for schedule in (0, BLOCKS_BACKWARDS | THREADS_BACKWARDS, SEED):
        device.schedule = schedule
        check_store(k, v, poisoned(layout, 2, 2), slots, layout)


@pytest.mark.parametrize("spec", ["k4v4", "k3v3+nc+pre13", "k3tv4t"])
def test_storing_at_the_smallest_scales(spec: str, device: EmulatedDevice) -> None:
    """Of some prescales the scale rounds to zero, of others it does not."""
    layout = PageLayout.of(spec, 128, page_size=16)
    k, v = (noise(16, 2, 128, seed=seed) * torch.linspace(3e-41, 1.2e-40, 16)[:, None, None] for seed in (1, 2))
    assert stored_pages(k, v, poisoned(layout, 1, 2), torch.arange(16), layout).any()


# --- expand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "dtype", "table", "page_size"),
    [
        ("k4v4", BF16, torch.int32, 64), ("k3v3", F16, torch.int64, 16), ("k2v2", BF16, torch.int64, 32),
        ("k3v2", F16, torch.int32, 32), ("k2v4", F16, torch.int32, 16), ("k4v4+mean", BF16, torch.int32, 64),
        ("k3v2+mean", F16, torch.int64, 16), ("k2tv3t", BF16, torch.int32, 16), ("k3tv4t", F16, torch.int64, 32),
        ("k4tv2t+mean", F16, torch.int32, 64),
    ],
)  # fmt: skip
def test_windows(spec: str, dtype: torch.dtype, table: torch.dtype, page_size: int, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=page_size)
    cache = make_cache(layout, (100, 37, 0, 64), heads=2)
    for starts, tokens in (((0, 0, 0, 0), 104), ((16, 32, 0, 48), 40), ((0, 0, 0, 0), 7)):
        k_out = torch.full((4, 2, tokens, 128), torch.nan, dtype=dtype)
        v_out, begin, lengths = k_out.clone(), torch.tensor(starts, dtype=torch.int32), cache.lengths.int()
        expand.expand_window(cache.pages, cache.table.to(table), layout, begin, lengths, k_out, v_out, tokens=tokens)
        for b, start in enumerate(starts):
            length = int(cache.lengths[b])
            count = max(0, min(length - start, tokens))
            slots = cache.slots(b)[start : start + count]
            keys, values = layout.decode(cache.records(slots))
            if layout.format.mean:
                keys = (keys + cache.references(slots)).float()
            for got, want in zip((k_out[b], v_out[b]), (keys, values), strict=True):
                assert not got[:, count:].any()
                rounded = want.transpose(0, 1).to(dtype)
                # a key that is its page's reference has 15 bits, of which bfloat16 rounds many half-way
                differ = 4e-3 if layout.format.mean else 1e-3
                assert int((got[:, :count] != rounded).sum()) <= differ * rounded.numel()
                near = 1e-5 if layout.format.mean else 0  # a coordinate may cancel the reference's
                torch.testing.assert_close(got[:, :count], rounded, rtol=2**-7, atol=near)


def test_the_largest_scales_are_found(device: EmulatedDevice) -> None:
    layout = PageLayout.of("k3v4", 128, page_size=16)
    cache = empty_cache(layout, (300, 20), heads=2)
    for b, length in enumerate((300, 20)):
        k, v = (noise(length, 2, 128, seed=2 * b + s) * torch.rand(length, 1, 1) * 10**s for s in (1, 2))
        k[length // 2, 1, 3] = torch.nan
        fill(cache, b, k, v)
    starts, lengths = torch.tensor([16, 0], dtype=torch.int32), cache.lengths.int()
    peaks = expand.find_peaks(cache.pages, cache.table, layout, starts, lengths, tokens=290)
    seen = torch.cat([cache.records(cache.slots(0)[16:]), cache.records(cache.slots(1))])
    scales = seen[..., -4:].contiguous().view(BF16).float()  # of K and V
    assert torch.equal(peaks, scales.nan_to_num(0.0).abs().amax(dim=(0, 1)))
    whole = expand.find_peaks(cache.pages, cache.table[1:], layout, tokens=20)
    assert torch.equal(whole, scales[-20:].nan_to_num(0.0).abs().amax(dim=(0, 1)))


@pytest.mark.parametrize("coarse", [False, True])
def test_windows_of_some_heads(coarse: bool, device: EmulatedDevice) -> None:
    layout = PageLayout.of("k4v3", 128, page_size=32)
    cache = empty_cache(layout, (100,), heads=5)
    given = [noise(100, 5, 128, seed=seed) for seed in (1, 2)]
    for x in given:
        x[50, 2, 7] = torch.nan
    fill(cache, 0, *given)
    plan = expand.plan(layout, F16, False, torch.device("cpu"))
    for first, heads, start, tokens in ((0, 5, 0, 100), (1, 3, 48, 37), (4, 1, 96, 4)):
        memory = torch.full((2, heads, tokens + 3, 128), torch.nan, dtype=F16)
        k, v = memory[:, :, :tokens]
        expand.expand_heads(
            plan, cache.pages, cache.table.int(), k, v, torch.tensor([4.0, 0.5]), first=first, start=start,
            coarse=coarse,
        )  # fmt: skip
        wanted = layout.decode(cache.records(cache.slots(0)[start : start + tokens])[:, first : first + heads])
        for got, want, power in zip((k, v), wanted, (4, 0.5), strict=True):
            rounded = coarse and power == 0.5
            rtol = 2**-8 + 2**-11 if rounded else 2**-10  # rounded to 11 bits before
            want = want.transpose(0, 1) / power * 1024
            torch.testing.assert_close(got.float(), want, rtol=rtol, atol=1e-6, equal_nan=True)
            assert torch.equal(got.to(BF16).to(F16).nan_to_num(), got.nan_to_num()) == rounded  # 8 significant bits
        assert memory[:, :, tokens:].isnan().all()
