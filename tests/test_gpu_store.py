"""What the CUDA C++ kernels store and read, against the reference: run with ``pytest -m gpu`` on an H100 or H200."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from unittest import mock

import pytest
import torch
from cuda_cases import check_store, poisoned, records, stored_pages
from ops_cases import decode_records, make_cache, noise

from kvfold.errors import FormatError, ShapeError
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.ops.cuda import expand, runtime, store

pytestmark = pytest.mark.gpu

SPECS = (
    "k4v4", "k3v3", "k2v2", "k4v2+nc+pre1", "k3v4+mse+pre5", "k2v3+plain", "k4v4+pre1", "k4v3+nc+pre13", "k4v4+mean",
    "k3v2+mean+nc+pre1", "k2v3+mean+pre5", "k3tv3t", "k2tv4t+nc+pre1", "k4tv2t+mean+pre5", "k4v3t",
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@lru_cache(maxsize=1)
def gpu() -> torch.device:
    device = torch.device("cuda", 0)
    assert runtime.available(device) is None
    return device


KERNELS = {"few": 2**31, "many": 0}
"""Vectors up to which the kernel for few tokens is used, which is to force one of the two."""


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    with mock.patch.object(store, "_FEW", KERNELS[kernel]):
        yield


def stored(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout
) -> torch.Tensor:
    """The pages after either kernel stored in a copy of them: the bytes are the same."""
    return stored_pages(k, v, pages, slots, layout, gpu())


def check(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout) -> None:
    check_store(k, v, pages, slots, layout, gpu())


# --- store ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_scattered_tokens(spec: str, dtype: torch.dtype, page_size: int) -> None:
    layout = PageLayout.of(spec, 128, page_size=page_size)
    slots = torch.randperm(512)[:333]
    slots[::7] = -1 - slots[::7]
    k, v = noise(333, 3, 128, seed=1, dtype=dtype), noise(333, 3, 128, seed=2, dtype=dtype)
    check(k, v, poisoned(layout, 512 // page_size, 3), slots, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "mean" not in spec])
def test_few_tokens(spec: str, dtype: torch.dtype) -> None:
    """A token's bytes do not depend on how many are stored with it, where pages have no reference."""
    layout = PageLayout.of(spec, 128, page_size=32)
    k, v = noise(40, 3, 128, seed=1, dtype=dtype), noise(40, 3, 128, seed=2, dtype=dtype)
    k[6], v[7], k[9, 1, 4], v[3] = 0, torch.inf, torch.nan, v[3] * 1e-3
    slots, pages = torch.randperm(96)[:40], poisoned(layout, 3, 3)
    slots[5], slots[20] = -1, -7
    whole = stored(k, v, pages, slots, layout)
    for tokens in range(1, 41):
        kept = slots[:tokens][slots[:tokens] >= 0]
        others = torch.tensor(sorted(set(range(96)) - set(kept.tolist())))
        got = stored(k[:tokens], v[:tokens], pages, slots[:tokens], layout)
        assert torch.equal(records(got, kept, layout), records(whole, kept, layout)), tokens
        assert torch.equal(records(got, others, layout), records(pages, others, layout)), f"{tokens}: other tokens"


@pytest.mark.parametrize("tokens", [*range(1, 20), 31, 32, 33, 40])
@pytest.mark.parametrize("spec", SPECS)
def test_few_tokens_are_the_reference_s(spec: str, tokens: int) -> None:
    layout = PageLayout.of(spec, 128, page_size=16)
    k, v = noise(tokens, 8, 128, seed=1, dtype=torch.bfloat16), noise(tokens, 8, 128, seed=2, dtype=torch.bfloat16)
    slots = torch.randperm(64)[:tokens]
    slots[1::6] = -1
    check(k, v, poisoned(layout, 4, 8), slots, layout)


@pytest.mark.parametrize("begin", [0, 1, 2, 3, 16, 61])
@pytest.mark.parametrize("tokens", [1, 8, 63, 64, 100, 256])
@pytest.mark.parametrize("spec", ["k4v4", "k3v3", "k2v2", "k4tv3t"])
def test_consecutive_tokens(spec: str, tokens: int, begin: int) -> None:
    """Prefill writes V four tokens at a time, wherever it begins."""
    layout = PageLayout.of(spec, 128, page_size=32)
    k, v = noise(tokens, 2, 128, seed=1, dtype=torch.bfloat16), noise(tokens, 2, 128, seed=2, dtype=torch.bfloat16)
    check(k, v, poisoned(layout, 12, 2), torch.arange(tokens) + begin, layout)


def test_two_sequences_of_which_one_is_out_of_step() -> None:
    layout = PageLayout.of("k4v3", 128, page_size=64)
    slots = torch.cat([torch.arange(70) + 2, torch.arange(70) + 129, torch.full((5,), -1), torch.arange(40) + 256])
    k, v = noise(len(slots), 5, 128, seed=1), noise(len(slots), 5, 128, seed=2)
    check(k, v, poisoned(layout, 5, 5), slots, layout)


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat([x, x], dim=2)[:, :, :128],
    "odd slice": lambda x: torch.nn.functional.pad(x, (1, 2))[:, :, 1:-2],
    "coordinates apart": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "expanded heads": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
    "expanded tokens": lambda x: x[:1].expand(x.shape[0], -1, -1),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", STRIDES)
def test_strides_do_not_matter(stride: str, dtype: torch.dtype, kernel: str) -> None:
    layout, device = PageLayout.of("k4v3", 128, page_size=16), gpu()
    k, v = (STRIDES[stride](noise(40, 3, 128, seed=seed, dtype=dtype).to(device)) for seed in (1, 2))
    pages = poisoned(layout, 4, 3).to(device)
    again, slots = pages.clone(), torch.randperm(64, device=device)[:40]
    with forced(kernel):
        store.store_kv(k, v, pages, slots, layout)
        store.store_kv(k.contiguous(), v.contiguous(), again, slots, layout)
        assert torch.equal(pages, again)
        store.store_kv(k, v.contiguous(), pages, slots, layout)
        assert torch.equal(pages, again)


def test_k_and_v_of_different_dtypes_and_slots_with_strides() -> None:
    layout, device = PageLayout.of("k4v4", 128, page_size=16), gpu()
    k, v = noise(40, 3, 128, seed=1, dtype=torch.bfloat16), noise(40, 3, 128, seed=2)
    pages = poisoned(layout, 4, 3)
    slots = torch.randperm(64)[:40]
    want, got = stored(k.float(), v, pages, slots, layout), pages.to(device)
    store.store_kv(k.to(device), v.to(device), got, slots.repeat_interleave(2).to(device)[::2], layout)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-12, 1e-5, 1e5, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", ["k4v4", "k3v2+nc+pre1", "k3tv4t"])
def test_sizes(spec: str, dtype: torch.dtype, size: float) -> None:
    layout = PageLayout.of(spec, 128, page_size=16)
    k, v = (noise(40, 2, 128, seed=1) * size).to(dtype), (noise(40, 2, 128, seed=2) * size).to(dtype)
    k[::3] = noise(14, 2, 128, seed=3).to(dtype)  # with usual vectors in the same tile
    check(k, v, poisoned(layout, 4, 2), torch.randperm(64)[:40], layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["k4v4", "k3v3+nc+pre1", "k2v2+plain", "k4v4+mse+pre1", "k4tv2t", "k3tv3t+pre1"])
def test_zero_and_non_finite_vectors(spec: str, dtype: torch.dtype) -> None:
    layout = PageLayout.of(spec, 128, page_size=16)
    k, v = noise(32, 2, 128, seed=1, dtype=dtype), noise(32, 2, 128, seed=2, dtype=dtype)
    k[3], v[4], k[5, :, ::2], v[5] = 0, 0, 0, -0.0
    for token, value in ((8, torch.nan), (9, torch.inf), (10, -torch.inf)):
        k[token, 0, 77], v[token, 1, 5] = value, value
    k[11] = torch.inf
    slots = torch.arange(32)
    got = records(stored(k, v, poisoned(layout, 2, 2), slots, layout), slots, layout)
    want = layout.encode(k, v)
    codes = layout.token_bytes - 4
    scales, wanted = (x[..., codes:].contiguous().view(torch.bfloat16) for x in (got, want))
    assert torch.equal(scales.isnan(), wanted.isnan())
    assert int(scales.isnan().sum()) == 2 * 3 + 2
    assert torch.equal(scales == 0, wanted == 0)
    same = (got[..., :codes] == want[..., :codes]).float().mean()
    assert same > 0.999, "codes"


def test_vectors_of_simple_structure() -> None:
    """Here coordinates are exactly equal or zero, so that ties are everywhere: the errors are the same."""
    layout = PageLayout.of("k4v4", 128, page_size=16)
    k = torch.zeros(6, 1, 128)
    k[0], k[1], k[2, :, 3], k[3, :, [1, 9]], k[4, :, ::2], k[5] = 1, -1, 2, 1.5, 1, torch.arange(128.0)
    slots = torch.arange(6)
    got = records(stored(k, k, poisoned(layout, 1, 1), slots, layout), slots, layout)
    for x, y in zip(decode_records(got, layout), decode_records(layout.encode(k, k), layout), strict=True):
        errors = [(z - k).norm(dim=-1) / k.norm(dim=-1) for z in (x, y)]
        torch.testing.assert_close(errors[0], errors[1], rtol=0, atol=2e-3, check_dtype=False)


def test_no_tokens() -> None:
    layout, device = PageLayout.of("k4v4", 128), gpu()
    k, pages = (
        torch.empty(0, 2, 128, device=device),
        torch.zeros(layout.page_shape(1, 2), dtype=torch.uint8, device=device),
    )
    store.store_kv(k, k, pages, torch.empty(0, dtype=torch.int64, device=device), layout)
    assert not pages.any()


def test_slots_beyond_two_gigabytes() -> None:
    layout, device = PageLayout.of("k4v4", 128, page_size=64), gpu()
    pages = torch.empty(layout.page_shape(300_000, 1), dtype=torch.uint8, device=device)
    k, v = noise(64, 1, 128, seed=1, dtype=torch.bfloat16), noise(64, 1, 128, seed=2, dtype=torch.bfloat16)
    slots = torch.arange(64) + 299_999 * 64
    store.store_kv(k.to(device), v.to(device), pages, slots.to(device), layout)
    assert torch.equal(
        pages[-1:].cpu(), stored(k, v, torch.zeros(1, 1, layout.page_bytes, dtype=torch.uint8), slots % 64, layout)
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", ["k4v4", "k3tv4t", "k3tv4"])
def test_a_captured_graph_stores_what_comes_next(spec: str, kernel: str) -> None:
    layout, device = PageLayout.of(spec, 128, page_size=16), gpu()
    k, v = (noise(8, 2, 128, seed=seed, dtype=torch.bfloat16).to(device) for seed in (1, 2))
    slots = torch.arange(8, device=device)
    pages = poisoned(layout, 4, 2).to(device)
    graph = torch.cuda.CUDAGraph()
    with forced(kernel), torch.cuda.graph(graph):
        store.store_kv(k, v, pages, slots, layout)
    for seed in (3, 5):
        k.copy_(noise(8, 2, 128, seed=seed))
        v.copy_(noise(8, 2, 128, seed=seed + 1))
        slots.copy_(torch.randperm(64)[:8])
        want = pages.clone()
        store.store_kv(k, v, want, slots, layout)
        graph.replay()
        assert torch.equal(pages, want)


def test_the_current_stream_is_used() -> None:
    layout, device = PageLayout.of("k4v4", 128, page_size=16), gpu()
    k = noise(64, 2, 128, dtype=torch.bfloat16).to(device)
    slots, pages = torch.arange(64, device=device), poisoned(layout, 4, 2).to(device)
    want = pages.clone()
    store.store_kv(k, k, want, slots, layout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = k.clone()
        store.store_kv(late, late, pages, slots, layout)
    stream.synchronize()
    assert torch.equal(pages, want)


def test_what_cannot_be_stored_is_refused() -> None:
    device = gpu()
    slots = torch.arange(4, device=device)
    k = torch.zeros(4, 1, 128, device=device)
    layout = PageLayout.of("k4v4", 128)
    pages = torch.zeros(layout.page_shape(1, 1), dtype=torch.uint8, device=device)
    with pytest.raises(ShapeError, match="float64"):
        store.store_kv(k.double(), k, pages, slots, layout)
    with pytest.raises(ShapeError, match="16 bytes"):
        store.store_kv(
            k, k, torch.zeros(pages.numel() + 1, dtype=torch.uint8, device=device)[1:].view(pages.shape), slots, layout
        )
    layout = PageLayout.of("k8v4", 128)
    with pytest.raises(FormatError, match="2, 3 and 4 bits"):
        store.store_kv(k, k, torch.zeros(layout.page_shape(1, 1), dtype=torch.uint8, device=device), slots, layout)


# --- expand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("table", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "spec", ["k4v4", "k3v3", "k2v2", "k3v2", "k2v4", "k4v4+mean", "k3v2+mean", "k2tv3t", "k4tv2t+mean", "k3tv4t"]
)
def test_a_window_is_expanded(spec: str, table: torch.dtype, dtype: torch.dtype, page_size: int) -> None:
    layout, device = PageLayout.of(spec, 128, page_size=page_size), gpu()
    cache = make_cache(layout, (300, 37, 0, 128), heads=2)
    pages, lengths = cache.pages.to(device), cache.lengths.int().to(device)
    for starts, tokens in (((0, 0, 0, 0), 304), ((16, 32, 0, 112), 100), ((288, 48, 16, 64), 64), ((0, 0, 0, 0), 7)):
        k_out = torch.full((4, 2, tokens, 128), torch.nan, dtype=dtype, device=device)
        v_out = k_out.clone()
        begin = torch.tensor(starts, dtype=torch.int32, device=device)
        block_table = cache.table.to(device, table)
        expand.expand_window(pages, block_table, layout, begin, lengths, k_out, v_out, tokens=tokens)
        for b, start in enumerate(starts):
            length = int(cache.lengths[b])
            count = max(0, min(length - start, tokens))
            wanted = reference.load_range(cache.pages, cache.table[b], layout, 0, length)
            for got, want in zip((k_out[b].cpu(), v_out[b].cpu()), wanted, strict=True):
                assert not got[:, count:].any()
                rounded = want[:, start : start + count].to(dtype)
                # a key that is its page's reference has 15 bits, of which bfloat16 rounds many half-way
                differ = 4e-3 if layout.format.mean else 1e-3
                assert int((got[:, :count] != rounded).sum()) <= differ * rounded.numel()
                near = 1e-5 if layout.format.mean else 0  # a coordinate may cancel the reference's
                torch.testing.assert_close(got[:, :count], rounded, rtol=2**-7, atol=near)


def test_windows_that_cannot_be_expanded_are_refused() -> None:
    layout, device = PageLayout.of("k4v4", 128), gpu()
    pages = torch.zeros(layout.page_shape(1, 1), dtype=torch.uint8, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    ints, out = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, 1, 16, 128, device=device)
    with pytest.raises(ShapeError, match="bfloat16 or float16"):
        expand.expand_window(pages, table, layout, ints, ints, out, out, tokens=16)
    half = out.bfloat16()
    with pytest.raises(ShapeError, match="starts"):
        expand.expand_window(pages, table, layout, ints.long(), ints, half, half, tokens=16)
