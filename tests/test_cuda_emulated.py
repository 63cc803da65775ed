"""The CUDA C++ kernels, compiled for the host and run on an emulator (``tests/emulator``): for machines without a GPU.

What is tested here is that the kernels compute the right thing, whatever the order of blocks, threads and copies. What
only a GPU can tell (that they compile for one, graphs, streams, speed) is in ``test_gpu_store``, ``test_gpu_decode``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import emulator
import pytest
import torch
from emulator import BLOCKS_BACKWARDS, LATE_COPIES, SEED, THREADS_BACKWARDS, EmulatedDevice, emulated_device
from emulator.device import STRUCTURES
from emulator.ptx import UnknownInstructionError, translate
from ops_cases import Cache, State, decode_records, empty_cache, expected, fill, make_cache, noise, sees

from kvfold import ops
from kvfold.errors import FormatError, ShapeError
from kvfold.layout import PageLayout
from kvfold.ops.cuda import decode, dense, expand, prefill, runtime, store
from kvfold.ops.options import AttentionOptions
from kvfold.rotation import rotate

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 4e-3, F16: 1e-3, F32: 5e-4}
"""Largest error of a row of the output, relative to its norm. Rounding to bfloat16 alone makes 1.7e-3."""


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    """A GPU of three multiprocessors: so few that small inputs are cut into stretches, and merged across blocks."""
    with emulated_device(multiprocessors=3) as device, ops.backend("cuda"):
        yield device


@pytest.fixture
def one_multiprocessor() -> Iterator[EmulatedDevice]:
    """For many steps a warp, in one piece of an item."""
    with emulated_device(multiprocessors=1, largest_piece=4096) as device, ops.backend("cuda"):
        yield device


SCHEDULES = (
    BLOCKS_BACKWARDS, THREADS_BACKWARDS, LATE_COPIES, BLOCKS_BACKWARDS | THREADS_BACKWARDS | LATE_COPIES,
    SEED, 2 * SEED | BLOCKS_BACKWARDS, 3 * SEED | THREADS_BACKWARDS,
)  # fmt: skip


# --- the emulator -----------------------------------------------------------------------------------------------------

FAULTS = {
    "lanes that part": ("if (threadIdx.x == 3) __syncwarp(); else __shfl_sync(~0u, 1, 0);", "different operations"),
    "a barrier that half of a warp reaches": ("if (threadIdx.x < 16) __syncwarp();", "wait for ever"),
    "a mask of some lanes": ("__shfl_sync(0xFFu, 1, 0);", "whole warps only"),
    "a write past shared memory": ("if (threadIdx.x == 0) shared[64] = 1;", "past the dynamic shared memory"),
    "an mbarrier without init": ("wait(address(shared), 0);", "before it is initialised"),
    "a copy that nobody expects": ("init(address(shared)); __syncwarp(); wait(address(shared), 0);", "wait for ever"),
    "a copy that nobody waits for": (
        "if (threadIdx.x == 0) { init(address(shared)); copy(address(shared + 16), (u64)x, 16, address(shared)); }",
        "under way",
    ),
    "an mbarrier that is overwritten": (
        "if (threadIdx.x == 0) init(address(shared)), shared[7] = 0;",
        "not been invalidated",
    ),
    "a copy that is not aligned": (
        "if (threadIdx.x == 0) { init(address(shared)); copy(address(shared + 8), (u64)x, 16, address(shared)); }",
        "not aligned",
    ),
}
FAULTY = """
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void init(u32 bar) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory"); }
__device__ void copy(u32 to, u64 from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ void wait(u32 bar, u32 parity) {
    asm volatile("{\\n.reg .pred P;\\nWAIT:\\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\\n"
                 "@P bra DONE;\\nbra WAIT;\\nDONE:\\n}" ::"r"(bar), "r"(parity) : "memory");
}
extern "C" __global__ void faulty(u32* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    STATEMENTS
}
"""


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_reports(
    name: str, device: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements, message = FAULTS[name]
    (tmp_path / "faulty.cu").write_text(FAULTY.replace("STATEMENTS", statements))
    monkeypatch.setattr(runtime, "FOLDER", tmp_path)
    monkeypatch.setitem(STRUCTURES, "faulty.cu", {})
    kernel = device.kernel("faulty.cu", "faulty", torch.device("cpu"))
    device.schedule = LATE_COPIES
    with pytest.raises(AssertionError, match=message):
        kernel.launch((1, 1, 1), 32, 64, torch.zeros(8))


def test_asm_statements_are_translated() -> None:
    text = 'a; asm volatile("{.reg .pred P;\\nL: mul.rn.sat.f32 %0, %1, 2;}" : "=f"(x[0]) : "f"(f(y)) : "memory"); b;'
    with pytest.raises(UnknownInstructionError, match=r"some\.cu:1.*no L:"):
        translate(text, "some.cu")
    assert "ptx::mul_rn_sat_f32((x[0]), (f(y)), 2);" in translate(text.replace("L: mul", "L:\\nmul"), "some.cu")
    with pytest.raises(UnknownInstructionError, match=r"some\.cu:2.*sin\.approx\.f32"):
        translate('\nasm("sin.approx.f32 %0, %1;" : "=f"(x) : "f"(y));', "some.cu")


# --- structures -------------------------------------------------------------------------------------------------------


def test_python_and_cuda_agree_on_structures(device: EmulatedDevice) -> None:
    """Sizes of the parameters are checked at every launch; here each member's place."""
    layout = PageLayout.of("k4v4", 128)
    inputs, none = (BF16, True), torch.device("cpu")
    kernels = [
        device.kernel("store.cu", "store", none, **store._defines(layout, inputs, inputs)),
        device.kernel("expand.cu", "expand", none, **expand._defines(layout, F16, False)),
        prefill._merge_kernel(layout, 3, True, BF16, 0)[0],
        decode._kernel(layout, 0, 1, BF16, False, False, False)[0],
    ]
    for kernel in kernels:
        for name, (structure, _) in STRUCTURES[kernel.file].items():  # type: ignore[attr-defined]
            offsets = [getattr(structure, field[0]).offset for field in structure._fields_]
            assert kernel.layout(name) == [ctypes.sizeof(structure), *offsets], name  # type: ignore[attr-defined]


# --- store ------------------------------------------------------------------------------------------------------------


def poisoned(layout: PageLayout, num_pages: int, heads: int) -> torch.Tensor:
    return torch.randint(0, 256, layout.page_shape(num_pages, heads), dtype=torch.uint8)


def records(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    return Cache(layout, pages, torch.empty(0), torch.empty(0)).records(slots)


def stored_pages(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout
) -> torch.Tensor:
    """The pages after either kernel stored in a copy of them, that for few tokens and that for many: the same bytes."""
    few, many = pages.clone(), pages.clone()
    for got, vectors in ((few, 2**31), (many, 0)):
        with mock.patch.object(store, "_FEW", vectors):
            ops.store_kv(k, v, got, slots, layout)
    assert torch.equal(few, many), f"the kernels differ in {int((few != many).sum())} bytes"
    return few


def check_store(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout) -> None:
    """The kernel writes the reference's bytes but for ties, and nothing else.

    At most 1e-4 of the bytes differ, or parts of one vector, and the errors of their vectors agree within 2 %.
    """
    got = stored_pages(k, v, pages, slots, layout)
    kept = slots >= 0
    others = torch.tensor(sorted(set(range(len(pages) * layout.page_size)) - set(slots[kept].tolist())))
    assert torch.equal(records(got, others, layout), records(pages, others, layout)), "other tokens' bytes"
    mine, want = records(got, slots[kept], layout), layout.encode(k[kept], v[kept])
    differ = mine != want
    assert int(differ.sum()) <= max(1e-4 * want.numel(), layout.token_bytes / 2), f"{int(differ.sum())} bytes differ"
    tokens = differ.any(-1)
    originals = (k[kept][tokens].double(), v[kept][tokens].double())
    pairs = zip(decode_records(mine[tokens], layout), decode_records(want[tokens], layout), strict=True)
    for original, (x, y) in zip(originals, pairs, strict=True):
        torch.testing.assert_close((x - original).norm(dim=-1), (y - original).norm(dim=-1), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("spec", "dtype", "page_size"),
    [
        ("k4v4", BF16, 64), ("k3v3", F16, 16), ("k2v2", F32, 32), ("k4v2+nc+pre1", F32, 16), ("k2v3+plain", F16, 64),
        ("k3v4+mse+pre5", BF16, 32),
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
def test_consecutive_tokens(tokens: int, begin: int, device: EmulatedDevice) -> None:
    """Prefill writes V four tokens at a time, wherever it begins."""
    layout = PageLayout.of("k4v3+pre1", 128, page_size=32)
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
def test_strides_do_not_matter(stride: str, dtype: torch.dtype, device: EmulatedDevice) -> None:
    layout = PageLayout.of("k4v4+pre1", 128, page_size=16)
    k, v = (STRIDES[stride](noise(20, 3, 128, seed=seed, dtype=dtype)) for seed in (1, 2))
    pages, slots = poisoned(layout, 2, 3), torch.randperm(32)[:20]
    got = stored_pages(k, v, pages, slots.repeat_interleave(2)[::2], layout)
    assert torch.equal(got, stored_pages(k.contiguous(), v.contiguous(), pages, slots, layout))


@pytest.mark.parametrize("spec", ["k4v4+pre1", "k3v3+nc+pre1"])
def test_vectors_of_all_sizes(spec: str, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=16)
    size = 10 ** torch.linspace(-30, 30, 40)[:, None, None]
    k, v = noise(40, 2, 128, seed=1) * size, noise(40, 2, 128, seed=2) * size.flip(0)
    check_store(k, v, poisoned(layout, 4, 2), torch.randperm(64)[:40], layout)


@pytest.mark.parametrize("spec", ["k4v4+pre1", "k4v4"])
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
@pytest.mark.parametrize("spec", ["k4v4", "k3v2", "k2v3+pre5", "k4v4+nc+pre1"])
def test_few_tokens_are_stored(spec: str, tokens: int, device: EmulatedDevice) -> None:
    layout = PageLayout.of(spec, 128, page_size=32)
    k, v = noise(tokens, 2, 128, seed=1, dtype=BF16), noise(tokens, 2, 128, seed=2, dtype=BF16)
    slots = torch.randperm(64)[:tokens]
    slots[1::6] = -1
    for schedule in (0, BLOCKS_BACKWARDS | THREADS_BACKWARDS, SEED):
        device.schedule = schedule
        check_store(k, v, poisoned(layout, 2, 2), slots, layout)


@pytest.mark.parametrize("spec", ["k4v4", "k3v3+nc+pre13"])
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
        ("k3v2", F16, torch.int32, 32), ("k2v4", F16, torch.int32, 16),
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
            wanted = layout.decode(cache.records(cache.slots(b)[start : start + count]))
            for got, want in zip((k_out[b], v_out[b]), wanted, strict=True):
                assert not got[:, count:].any()
                rounded = want.transpose(0, 1).to(dtype)
                assert int((got[:, :count] != rounded).sum()) <= 1e-3 * rounded.numel()
                torch.testing.assert_close(got[:, :count], rounded, rtol=2**-7, atol=0)


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


def test_windows_of_some_heads(device: EmulatedDevice) -> None:
    layout = PageLayout.of("k4v3", 128, page_size=32)
    cache = make_cache(layout, (100,), heads=5)
    plan = expand.plan(layout, F16, False, torch.device("cpu"))
    for first, heads, start, tokens in ((0, 5, 0, 100), (1, 3, 48, 37), (4, 1, 96, 4)):
        memory = torch.full((2, heads, tokens + 3, 128), torch.nan, dtype=F16)
        k, v = memory[:, :, :tokens]
        expand.expand_heads(
            plan, cache.pages, cache.table.int(), k, v, torch.tensor([4.0, 0.5]), first=first, start=start
        )
        wanted = layout.decode(cache.records(cache.slots(0)[start : start + tokens])[:, first : first + heads])
        for got, want, power in zip((k, v), wanted, (4, 0.5), strict=True):
            torch.testing.assert_close(got.float(), want.transpose(0, 1) / power * 1024, rtol=2**-10, atol=1e-6)
        assert memory[:, :, tokens:].isnan().all()


# --- prefill ----------------------------------------------------------------------------------------------------------


def cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the library's attention: weights are rounded to the dtype, as they are there."""
    assert q.dtype == k.dtype == v.dtype
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    out = torch.softmax(scores, -1).to(q.dtype).double() @ v.double()
    return out.to(q.dtype).contiguous(), torch.logsumexp(scores, -1).float()


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool, out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """In place of FlashAttention-3's: the last query of a sequence sees all its keys."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (F16, BF16)
    assert k.shape == v.shape
    assert k.isfinite().all()
    assert v.isfinite().all()
    assert all(x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == x.data_ptr() % 16 == 0 for x in (q, k, v))
    for x, bounds, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert bounds.dtype == torch.int32
        assert int(bounds[0]) == 0
        assert int(bounds[-1]) == len(x)
        assert int(bounds.diff().max()) == longest
    assert out is None or (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
    out, lse = torch.empty_like(q) if out is None else out, torch.empty(q.shape[1], len(q))
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        queries, keys, values = (x.double().transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        keys, values = (x.repeat_interleave(len(queries) // len(keys), dim=0) for x in (keys, values))
        scores = queries @ keys.transpose(-1, -2) * softmax_scale
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril((k1 - k0) - (q1 - q0))
            scores = scores.masked_fill(~seen, -torch.inf)
        weights = torch.softmax(scores, -1).to(q.dtype).double()
        out[q0:q1], lse[:, q0:q1] = (weights @ values).transpose(0, 1).to(q.dtype), torch.logsumexp(scores, -1).float()
    return out, lse


@pytest.fixture(params=["cudnn", "fa3", "fa3 that allocates"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Prefill attention on a library's place, and on chunks of few rows."""
    monkeypatch.setattr(prefill, "_FEW_ROWS", 4)
    monkeypatch.setattr(dense, "cudnn", cudnn)
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    name, _, allocates = request.param.partition(" ")
    found = dense._Found(flash_attn_varlen_func, takes_out=not allocates)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: found)
    with dense.engine(name):
        yield name


@pytest.mark.parametrize("chunk", ["exact", "packed"])
@pytest.mark.parametrize(
    ("spec", "dtype", "heads", "group", "k_size", "v_size"),
    [
        ("k4v4", BF16, 2, 2, 1.0, 1.0), ("k3v2", F16, 1, 4, 1.0, 1.0), ("k4v4", BF16, 2, 2, 1e10, 1e-8),
        ("k2v3", BF16, 1, 1, 1e-6, 1e12),
    ],
)  # fmt: skip
def test_prefill(
    spec: str, dtype: torch.dtype, heads: int, group: int, k_size: float, v_size: float, chunk: str, engine: str,
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Windows of 48 tokens; a chunk of one token goes to the decode kernel."""
    monkeypatch.setattr(prefill, "WINDOW_BYTES", 48 * 4 * heads * 128)
    contexts, chunks = (0, 0, 37, 100, 16, 65, 0, 0), (20, 3, 9, 33, 0, 1, 0, 6)
    layout = PageLayout.of(spec, 128, page_size=16)
    lengths = [context + count for context, count in zip(contexts, chunks, strict=True)]
    cache = empty_cache(layout, lengths, heads)
    own = []
    for b, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        k = (noise(length, heads, 128, seed=2 * b + 1) * k_size).to(dtype)
        v = (noise(length, heads, 128, seed=2 * b + 2) * v_size).to(dtype)
        fill(cache, b, k, v)
        own.append((k[context:], v[context:]))
    q = (noise(sum(chunks), heads * group, 128) / k_size).to(dtype)
    bounds = torch.tensor([0, *chunks]).cumsum(0)
    exact = {name: torch.cat(parts) for name, parts in zip("kv", zip(*own, strict=True), strict=True)}
    lens = torch.tensor(contexts if chunk == "exact" else lengths)
    out, lse = ops.prefill_attention(
        q, cache.pages, cache.table, lens, bounds, layout, scale=128**-0.5, **exact if chunk == "exact" else {}
    )
    for b, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if begin == end:
            continue
        keys, values = cache.vectors(b)
        if chunk == "exact":
            keys, values = (
                torch.cat([x[: contexts[b]], y.double()]) for x, y in zip((keys, values), own[b], strict=True)
            )
        want = expected(q[begin:end].float(), keys, values, sees(end - begin, lengths[b]), 128**-0.5)
        error = (out[begin:end].double() - want.truth[0]).norm(dim=-1) / want.truth[0].norm(dim=-1)
        assert error.max() < 2 * TOLERANCE[dtype], b
        assert (lse[:, begin:end] - want.truth[1]).abs().max() < 5e-3, b
    assert {name for name, _ in device.launches} == {"peaks", "rotate", "expand", "merge", "decode"}


@pytest.mark.parametrize("budget", [80 * 512, 300 * 512, 2**20])
def test_a_chunk_is_cut_as_its_prefix(budget: int, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3: windows that hold part of a chunk, or chunks in several calls."""
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: dense._Found(flash_attn_varlen_func))
    monkeypatch.setattr(prefill, "WINDOW_BYTES", budget)
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (150,), heads=3)
    q, k, v = (noise(101, count, 128, seed=seed).to(BF16) for seed, count in enumerate((6, 3, 3)))
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    sizes = mock.Mock(side_effect=prefill._Windows)
    with dense.engine("fa3"), mock.patch.object(prefill, "_Windows", sizes):
        out, lse = ops.prefill_attention(
            q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 101]), layout, scale=0.1, k=k, v=v
        )
    assert 0 < max(call.args[-1] for call in sizes.call_args_list) * 512 <= budget
    keys, values = (torch.cat([x, y.double()]) for x, y in zip(cache.vectors(0), (k, v), strict=True))
    want = expected(q.float(), keys, values, sees(101, 251), 0.1)
    error = (out.double() - want.truth[0]).norm(dim=-1) / want.truth[0].norm(dim=-1)
    assert error.max() < 2 * TOLERANCE[BF16]
    assert (lse - want.truth[1]).abs().max() < 5e-3
    assert not any(name == "decode" for name, _ in device.launches)


@pytest.mark.parametrize(("k_size", "v_size"), [(1e12, 2e37), (1e-30, 1e-38), (3e4, 1e20), (1.0, 1e-20)])
def test_a_chunk_of_another_size_than_its_prefix(
    k_size: float, v_size: float, engine: str, device: EmulatedDevice
) -> None:
    """Whatever bfloat16 can be: nothing overflows, and the larger part of a sum is exact."""
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (70,), heads=1)
    q, k, v = (noise(20, count, 128, seed=seed) for seed, count in ((1, 2), (2, 1), (3, 1)))
    q, k, v = (q / max(k_size, 1.0)).to(BF16), (k * k_size).to(BF16), (v * v_size).to(BF16)
    out, lse = ops.prefill_attention(
        q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 20]), layout, scale=128**-0.5, k=k, v=v
    )
    keys, values = (torch.cat([x, y.double()]) for x, y in zip(cache.vectors(0), (k, v), strict=True))
    want = expected(q.float(), keys, values, sees(20, 90), 128**-0.5)
    error = (out.double() - want.truth[0]).norm(dim=-1) / want.truth[0].norm(dim=-1)
    assert error.max() < 2 * TOLERANCE[BF16]
    assert (lse - want.truth[1]).abs().max() < 5e-3


def test_a_large_token_of_another_head(engine: str, device: EmulatedDevice) -> None:
    """Windows of all heads share a power of two: ordinary vectors beside one of 10 000 times their size are right."""
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (70,), heads=2)
    q, k, v = (noise(20, count, 128, seed=seed).to(BF16) for seed, count in ((1, 4), (2, 2), (3, 2)))
    k[7, 1], v[7, 1] = k[7, 1] * 100, v[7, 1] * 1e4
    out, _ = ops.prefill_attention(
        q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 20]), layout, scale=128**-0.5, k=k, v=v
    )
    keys, values = (torch.cat([x, y.double()])[:, :1] for x, y in zip(cache.vectors(0), (k, v), strict=True))
    want = expected(q[:, :2].float(), keys, values, sees(20, 90), 128**-0.5)
    error = (out[:, :2].double() - want.truth[0]).norm(dim=-1) / want.truth[0].norm(dim=-1)
    assert error.max() < TOLERANCE[BF16]


def test_a_table_of_any_strides(engine: str, device: EmulatedDevice) -> None:
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (70,), heads=1)
    q, k, v = (noise(20, count, 128, seed=seed).to(BF16) for seed, count in ((1, 2), (2, 1), (3, 1)))
    wide = cache.table.repeat_interleave(2, 1)[:, ::2]
    assert wide.stride(1) == 2
    results = [
        ops.prefill_attention(q, cache.pages, table, cache.lengths, torch.tensor([0, 20]), layout, scale=0.1, k=k, v=v)
        for table in (cache.table, wide)
    ]
    assert same(*results)


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for another torch, it fails with anything: the next one is tried, or cuDNN taken, and the reason told."""
    (tmp_path / "kvfold_broken").mkdir()
    (tmp_path / "kvfold_broken" / "__init__.py").write_text("raise ImportError('undefined symbol: x')")
    (tmp_path / "kvfold_flash.py").write_text("def flash_attn_varlen_func(q, num_splits=1): return num_splits")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.delitem(sys.modules, dense._VLLM, raising=False)
    for packages in (("kvfold_broken.interface",), ("kvfold_broken.interface", "kvfold_flash")):
        monkeypatch.setattr(dense, "_PACKAGES", packages)
        dense._of_package.cache_clear()
        if len(packages) == 2:
            assert dense.choose(torch.device("cuda", 0)) == "fa3"
            function = dense._of_package().function
            assert function is not None
            assert function(q=None) == 0  # it shares keys among SMs
        else:
            with dense.engine("fa3"), pytest.raises(FormatError, match=r"cannot be imported .*undefined symbol"):
                dense.choose(torch.device("cuda", 0))
    dense._of_package.cache_clear()


def test_which_library_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert dense.choose(torch.device("cpu")) == "cudnn"
    with pytest.raises(FormatError, match="unknown prefill engine 'fa4'"), dense.engine("fa4"):
        pass
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_PACKAGES", ("no_such_module", "no_such_package.no_such_module"))
    monkeypatch.delitem(sys.modules, dense._VLLM, raising=False)
    dense._of_package.cache_clear()
    assert dense.choose(gpu) == "cudnn"
    with dense.engine("fa3"), pytest.raises(FormatError, match=r"not in this process; import vllm.*dense\.engine"):
        dense.choose(gpu)
    module = SimpleNamespace(FA3_AVAILABLE=True, flash_attn_varlen_func=lambda **_: None)
    monkeypatch.setitem(sys.modules, dense._VLLM, module)  # type: ignore[arg-type]
    assert dense.choose(gpu) == "fa3"
    with dense.engine("cudnn"):
        assert dense.choose(gpu) == "cudnn"
    dense._of_package.cache_clear()


def test_how_keys_are_cut() -> None:
    room = 64 * 2**20
    assert prefill._split(8192, 8, 30720, room, 132) == (4, 32768)  # whole heads, and nothing to join
    assert prefill._split(8192, 8, 32768, room, 132, 2064, True) == (4, 32768)  # exactly
    assert prefill._split(2048, 8, 30720, room, 132) == (8, 16384)  # of four heads: 64 blocks for 132 processors
    assert prefill._split(68, 8, 30720, room, 132, 33, True) == (4, 32768)  # FlashAttention-3 shares them among all
    assert prefill._split(8192, 8, 8000, room, 132) == (8, 16384)  # all at once
    for rows, heads, keys in ((1, 1, 10**6), (300, 3, 5), (5000, 5, 40000), (100, 2, 0)):
        split = prefill._split(rows, heads, keys, room, 132)
        assert 0 < split.heads <= heads
        assert split.tokens % 16 == 0 < split.tokens
        assert split.heads * split.tokens * 512 <= room
    for keys, rows, tokens in ((100, 30, 48), (100, 4, 96), (97, 1, 48), (32, 32, 48), (300, 60, 80)):
        cuts = prefill._cuts(keys, rows, tokens)
        assert cuts[0][0] == 0
        assert cuts[-1][1] == keys
        assert cuts[-1][0] <= keys - rows
        assert all(start % 16 == 0 and 0 < end - start <= tokens for start, end in cuts)
        assert all(one[1] == two[0] for one, two in pairwise(cuts))


def test_vectors_are_rotated(device: EmulatedDevice) -> None:
    layout = PageLayout.of("k4v4", 128)
    for dtype in (BF16, F16):
        q, k, v = (noise(rows, heads, 128, seed=rows).to(dtype) for rows, heads in ((5, 4), (35, 3), (16, 3)))
        k[3, 1], q[2, 2] = k[3, 1] * 100, 60000
        k = k.transpose(0, 1).contiguous().transpose(0, 1)
        peaks = torch.tensor([5e3, 3e3])
        outs = [torch.full((x.shape[1], len(x) + 2, 128), torch.nan, dtype=F16) for x in (q, k, v)]
        jobs = [(x, out[:, 2:], side) for x, out, side in zip((q, k, v), outs, range(3), strict=True)]
        prefill.rotate(jobs, peaks, layout)
        for x, out, factor in zip((q, k, v), outs, (4096 / 64, 1024 / 4096, 1024 / 2048), strict=True):
            want = (rotate(x.float()) * factor).clamp(-65504, 65504).transpose(0, 1)
            torch.testing.assert_close(out[:, 2:].float(), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
            assert out[:, :2].isnan().all()


def test_peaks_of_a_chunk(device: EmulatedDevice) -> None:
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (40,), heads=2)
    alone = expand.find_peaks(cache.pages, cache.table, layout, tokens=40)
    for dtype in (BF16, F16):
        k, v = (noise(21, 2, 128, seed=seed).to(dtype) for seed in (1, 2))
        k[20, 1, 127], k[3, 0, 5], v[2, 1, 64] = -50.0, torch.inf, torch.nan
        v *= 1e-3
        got = expand.find_peaks(cache.pages, cache.table, layout, tokens=40, chunk=(k, v))
        assert got.tolist() == [400.0, alone[1]]
    v[7, 0, 127] = 300.0
    got = expand.find_peaks(cache.pages, cache.table, layout, tokens=0, chunk=(k, v))
    assert got.tolist() == [400.0, 2400.0]


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


@pytest.mark.parametrize(
    ("spec", "page_size", "group", "dtype"),
    [
        ("k2v2", 16, 4, BF16), ("k2v3", 32, 4, F16), ("k2v4", 64, 4, F32),
        ("k3v2", 32, 4, F32), ("k3v3", 64, 4, BF16), ("k3v4", 16, 4, F16),
        ("k4v2", 64, 4, F16), ("k4v3", 16, 4, F32), ("k4v4", 32, 4, BF16),
        ("k2v3", 16, 8, BF16), ("k3v2", 64, 8, BF16), ("k4v4", 32, 8, F32),
    ],
)  # fmt: skip
def test_formats(spec: str, page_size: int, group: int, dtype: torch.dtype, device: EmulatedDevice) -> None:
    cache = stored((0, 1, 15, 16, 31, 32, 33, 64, 48, 500), spec, page_size, heads=3)
    check(cache, queries(cache, group, dtype=dtype))


@pytest.mark.parametrize("num_queries", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_groups_and_query_tokens(group: int, num_queries: int, device: EmulatedDevice) -> None:
    cache = stored((0, 1, 5, 32, 33, 64, 300))
    check(cache, queries(cache, group, num_queries))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (33, 3), (70, 5)])
def test_batches(batch: int, heads: int, device: EmulatedDevice) -> None:
    """More sequences than a warp has lanes, and more items than there are warps: several whole ones a warp."""
    cache = stored([0 if b % 7 == 3 else 1 + b * 7919 % 100 for b in range(batch)], heads=heads)
    check(cache, queries(cache))


def test_a_warp_copies_several_short_items_before_it_begins(one_multiprocessor: EmulatedDevice) -> None:
    """Three items of one step and one of two, again and again: the next one must be known to all lanes."""
    cache = stored((1, 1, 1, 64) * 16, heads=1)
    check(cache, queries(cache))


@pytest.mark.parametrize(("length", "window", "unseen"), [(40, None, [3, 4]), (100, 10, [0, 1, 2, 3, 4, 7])], ids=str)
def test_entries_of_unseen_pages_may_be_anything(
    length: int, window: int | None, unseen: list[int], device: EmulatedDevice
) -> None:
    """Two pages of 16 are a step, and one of them may be before the window or behind the end."""
    cache = make_cache(PageLayout.of("k4v4", 128, page_size=16), (length,), heads=1)
    table = torch.cat([cache.table, cache.table[:, :1]], dim=1).int()
    table[:, unseen] = -1
    q = queries(cache)
    got = decode.decode_attention(
        q, cache.pages, table, cache.lengths, cache.layout, AttentionOptions(128**-0.5, window=window)
    )
    compare(got, truth(cache, q, window=window) if window else truth(cache, q))


def test_pages_at_odd_addresses_are_refused(device: EmulatedDevice) -> None:
    """The copies that read them need 16 bytes; queries anywhere are copied."""
    cache, q = stored((40,)), noise(1, 1, 8, 128).to(BF16)
    odd = torch.empty(cache.pages.numel() + 1, dtype=torch.uint8)[1:].view(cache.pages.shape).copy_(cache.pages)
    with pytest.raises(ShapeError, match="pages have to begin at a multiple of 16 bytes"):
        attend(replace(cache, pages=odd), q)
    k = v = noise(80, 2, 128).to(BF16)
    with pytest.raises(ShapeError, match="pages have to begin at a multiple of 16 bytes"):
        ops.prefill_attention(
            noise(80, 8, 128).to(BF16), odd, cache.table, cache.lengths, torch.tensor([0, 80]), cache.layout, scale=0.1,
            k=k, v=v,
        )  # fmt: skip
    odd_q = torch.empty(q.numel() + 1, dtype=BF16)[1:].view(q.shape).copy_(q)
    assert same(attend(cache, odd_q), attend(cache, q))


@pytest.mark.parametrize("lengths", [(6144, 6144), (3000, 0, 9000), (400, 7000)], ids=str)
def test_long_pieces(lengths: tuple[int, ...], one_multiprocessor: EmulatedDevice) -> None:
    """A dozen steps and more in a piece; in the first two batches every warp gets one."""
    cache = stored(lengths, heads=1)
    check(cache, queries(cache))


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 1), (1, 0, 0), (0,) * 33 + (40,)], ids=str)
def test_batches_of_next_to_nothing(lengths: tuple[int, ...], device: EmulatedDevice) -> None:
    cache = stored(lengths)
    check(cache, queries(cache))
    check(cache, queries(cache), batch_invariant=True)


def test_one_long_sequence_among_short_ones(device: EmulatedDevice) -> None:
    """All blocks have parts of the long one's items, and the last to come merges them."""
    cache = stored((3, 5000, 0, 65), "k3v4", heads=1)
    check(cache, queries(cache))


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("invariant", [False, True])
def test_the_order_of_blocks_threads_and_copies_changes_no_bit(
    invariant: bool, group: int, device: EmulatedDevice
) -> None:
    """Nor does what scratch holds."""
    cache = stored((900, 1, 0, 64, 333, 40), page_size=16)
    q = queries(cache, group)
    want = check(cache, q, batch_invariant=invariant)
    for schedule in SCHEDULES:
        device.schedule = schedule
        for floats in decode._scratch(None).floats.values():
            floats.fill_(torch.nan)
        assert same(attend(cache, q, batch_invariant=invariant), want), schedule
        assert not decode._scratch(None).counters.any()


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("invariant", [False, True])
def test_inputs_that_are_ready_change_no_bit(invariant: bool, page_size: int, device: EmulatedDevice) -> None:
    cache = stored((900, 1, 0, 64, 333, 40), page_size=page_size)
    q = queries(cache)
    want = attend(cache, q, batch_invariant=invariant)
    assert same(attend(cache, q, batch_invariant=invariant, inputs_ready=True), want)
    # these are copied first, by a kernel that is ahead then
    strided = q.transpose(1, 3).contiguous().transpose(1, 3)
    assert same(attend(cache, strided, batch_invariant=invariant, inputs_ready=True), want)
    given = torch.full_like(q, torch.nan)
    got = attend(cache, q, batch_invariant=invariant, out=given)
    assert got[0] is given
    assert same(got, want)


@pytest.mark.parametrize("group", [4, 8])
def test_batch_invariance(group: int, device: EmulatedDevice) -> None:
    cache = stored((300, 0, 1200, 1, 31, 700), heads=1)
    q = queries(cache, group)
    out, lse = check(cache, q, batch_invariant=True)
    rows = list(range(len(q)))
    wider = torch.cat([cache.table, cache.table[1:2, :1].expand(len(q), 9)], dim=1)
    for some in ([2], [3], [1, 5], rows[::-1]):
        for table in (cache.table, wider):
            got = attend(pick(replace(cache, table=table), some), q[some], batch_invariant=True)
            assert same(got, (out[some], lse[some])), some


def test_batch_invariance_when_launches_are_split(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = stored((100, 0, 600, 33, 64), heads=2)
    q = queries(cache)
    want = check(cache, q, batch_invariant=True)
    monkeypatch.setattr(decode, "_INVARIANT_SCRATCH", 2 * 4 * 18 * 32 * decode._SPLITS * 2)  # two sequences' partials
    device.launches.clear()
    assert same(attend(cache, q, batch_invariant=True), want)
    assert [grid[2] for _, grid in device.launches] == [2, 2, 1]


# --- decode: who sees what --------------------------------------------------------------------------------------------

FIRST, START = [0, -3, 10, 64, 399], [0, 3, 20, 200, 500]  # of sequences of VISIBLE tokens
VISIBLE = (0, 1, 33, 300, 400)
VISIBILITY: dict[str, dict[str, Any]] = {
    "window": {"window": 70},
    "window of one": {"window": 1},
    "lag": {"lag": 40},
    "nothing between lag and window": {"lag": 5, "window": 5},
    "first": {"first": FIRST},
    "query start, lag, window and first": {"query_start": START, "lag": 3, "window": 150, "first": FIRST},
    "soft cap and window": {"softcap": 20.0, "window": 90, "scale": 1.0},
    "mask": {"mask": 0.7},
    "mask of few, window": {"mask": 0.05, "window": 99, "query_start": START},
    "everything": {"mask": 0.6, "window": 200, "lag": 2, "softcap": 3.0, "first": FIRST, "query_start": START},
}


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", VISIBILITY)
def test_visibility(name: str, group: int, device: EmulatedDevice) -> None:
    options = dict(VISIBILITY[name])
    cache = stored(VISIBLE, page_size=32)
    for vector in options.keys() & {"first", "query_start"}:
        options[vector] = torch.tensor(options[vector])
    if "mask" in options:
        options["mask"] = torch.rand(len(VISIBLE), 3, 410) < options["mask"]
        options["mask"][2, 1] = False
    q = queries(cache, group, tokens=3)
    want = check(cache, q, **options)
    narrow = {name: x.int() if name in ("first", "query_start") else x for name, x in options.items()}
    assert same(attend(replace(cache, lengths=cache.lengths.int(), table=cache.table.long()), q, **narrow), want)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("group", [1, 4])
def test_only_queries_that_see_a_bad_token_suffer(group: int, side: str, device: EmulatedDevice) -> None:
    """Token 50 of head 1 is NaN, and two of three queries see it."""
    vectors = {name: noise(100, 2, 128, seed=seed) for seed, name in enumerate("kv")}
    vectors[side][50, 1, 77] = torch.nan
    cache = empty_cache(PageLayout.of("k4v4", 128), (100,))
    fill(cache, 0, **vectors)
    for options, suffering in (
        ({"query_start": torch.tensor([49])}, [False, True, True]),
        ({"query_start": torch.tensor([58]), "window": 10}, [True, True, False]),
    ):
        out, _ = check(cache, queries(cache, group, tokens=3), **options)
        bad = out[0].isnan().all(-1)  # [Tq, Hq]
        assert not bad[:, :group].any()
        assert bad[:, group:].all(-1).tolist() == suffering


# --- decode: what is hard for fixed point -----------------------------------------------------------------------------

# Made of normal k and v, of u, which is part of every query (u times u is a score of 11.3), and of t, 0 to 1 by token.
HARD: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "peaked scores": lambda k, v, u, t: (8 * k, v),
    "rising scores": lambda k, v, u, t: (k + 5 * t * u, v),
    "scores that rise steeply": lambda k, v, u, t: (0.1 * k + 40 * t * u, v),
    "falling scores": lambda k, v, u, t: (k + 5 * (1 - t) * u, v),
    "scores in waves": lambda k, v, u, t: (k + 3 * torch.sin(300 * t) * u, v),
    "very low scores": lambda k, v, u, t: (k - 20 * u, v),
    "a sink": lambda k, v, u, t: (torch.where(t == t[5], u * (11 / 11.3), 0.1 * k), v),
    "zero keys": lambda k, v, u, t: (0 * k, v),
    "zero values": lambda k, v, u, t: (k, 0 * v),
    "a common mean": lambda k, v, u, t: (k, v + 3 * u),
    "enormous values": lambda k, v, u, t: (0.1 * k + 2.2 * t * u, 1e30 * v),
    "the largest values first": lambda k, v, u, t: (k, v * 10 ** (20 - 40 * t)),
    "the largest values last": lambda k, v, u, t: (k, v * 10 ** (40 * t - 20)),
}


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("name", HARD)
def test_hard(name: str, group: int, one_multiprocessor: EmulatedDevice) -> None:
    tokens = 1500
    u = noise(128, seed=3)
    u *= 128**0.5 / u.norm()
    k, v = HARD[name](
        noise(tokens, 1, 128, seed=1), noise(tokens, 1, 128, seed=2), u, torch.linspace(0, 1, tokens)[:, None, None]
    )
    cache = empty_cache(PageLayout.of("k4v4", 128), (tokens,), heads=1)
    fill(cache, 0, k.contiguous(), v.contiguous())
    q = (u + 0.3 * queries(cache, group, dtype=F32)).to(BF16)
    check(cache, q)  # a few tokens a warp
    check(cache, q, times=12)  # hundreds


def test_a_row_that_sees_nothing_while_sums_of_others_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All values are the same, so every row's result is, too; one row sees the last hundred of 128 000 tokens alone."""
    tokens, x = 128_000, noise(128, seed=3).expand(64, 1, 128).contiguous()
    monkeypatch.setattr(decode, "_WARPS", {1: 4, 2: 8})  # so each has a sequence
    with emulated_device(1, largest_piece=4096), ops.backend("cuda"):
        cache = empty_cache(PageLayout.of("k2v2", 128), (64,), heads=1)
        fill(cache, 0, x, x)
        long = replace(cache, table=cache.table[:1, :1].expand(4, tokens // 64), lengths=torch.full((4,), tokens))
        mask = torch.ones(4, 4, tokens, dtype=torch.bool)
        mask[:, 0, :-100] = False
        q = queries(cache, 1, 4)
        out, _ = attend(long, q.expand(4, -1, -1, -1), mask=mask, query_start=long.lengths)
        want, _ = attend(cache, q, query_start=torch.tensor([64]))
    assert ((out - want).float().norm(dim=-1) < 0.01 * want.float().norm(dim=-1)).all()


@pytest.mark.parametrize("group", [4, 8])
def test_sums_that_would_overflow(group: int, one_multiprocessor: EmulatedDevice) -> None:
    """The largest weights, of values that do not cancel, in so many steps of a warp that it looks at its sums."""
    tokens = 20_000
    x = noise(128, seed=3).expand(64, 1, 128).contiguous()
    cache = empty_cache(PageLayout.of("k2v2", 128), (64,), heads=1)
    fill(cache, 0, x, x)
    q = queries(cache, group)
    warps = decode._WARPS[1 if group == 4 else 2]
    long = replace(
        cache, table=cache.table[:1, :1].expand(warps, tokens // 64 + 1), lengths=torch.full((warps,), tokens)
    )
    out, lse = attend(long, q.expand(warps, -1, -1, -1))
    want_out, want_lse, allowed = truth(cache, q)  # all tokens are the same
    want_lse += torch.log(torch.tensor(tokens / 64))
    compare((out, lse), tuple(x.expand(warps, *x.shape[1:]) for x in (want_out, want_lse, allowed)))
