"""The CUDA prefill on the emulator (``tests/emulator``): for machines without a GPU.

In place of the libraries' attention are functions of this file.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import emulator
import pytest
import sanitized
import torch
from cuda_cases import BF16, F16, TOLERANCE, same
from emulator import EmulatedDevice, emulated_device
from emulator.device import EmulatedKernel
from ops_cases import Peak, empty_cache, expected, fill, make_cache, noise, sees

from kvfold import ops
from kvfold.errors import FormatError
from kvfold.layout import PageLayout
from kvfold.ops.cuda import dense, expand, prefill, runtime, windows
from kvfold.rotation import rotate

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    """A GPU of three multiprocessors: so few that small inputs are cut into stretches, and merged across blocks."""
    with emulated_device(multiprocessors=3) as device, ops.backend("cuda"):
        yield device


FA3 = windows.Library(shares=True, in_place=True)


def room_for(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int, heads: int = 1, streams: int = 2, slots: int = 3
) -> int:
    """Make scratch as small as each stream's window of so many tokens, ``rows`` queries of a KV head, and results."""
    size = streams * heads * (tokens * windows.TOKEN_BYTES + rows * slots * windows.VECTOR_BYTES)
    monkeypatch.setattr(windows, "SCRATCH_BYTES", size)
    monkeypatch.setattr(windows, "_LONG", 0.0 if streams > 1 else 1e9)
    windows.plan.cache_clear()
    windows.split.cache_clear()
    return size


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
    num_splits: int = 1,
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
    assert out is None or (out.shape, out.dtype, out.stride(2)) == (q.shape, q.dtype, 1)
    assert num_splits > 0
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


CASES = (
    ("k4v4", BF16, 2, 2, 1.0, 1.0), ("k3v2", F16, 1, 4, 1.0, 1.0), ("k4v4", BF16, 2, 2, 1e10, 1e-8),
    ("k2v3", BF16, 1, 1, 1e-6, 1e12), ("k3v4+mean", BF16, 2, 2, 1.0, 1.0), ("k4v2+mean", F16, 1, 4, 1e3, 1.0),
    ("k4tv2t", F16, 1, 2, 1.0, 1.0), ("k2tv3t+mean", BF16, 2, 1, 1e-3, 1e3),
)  # fmt: skip


@pytest.mark.parametrize("chunk", ["exact", "packed"])
@pytest.mark.parametrize(
    ("engine", "spec", "dtype", "heads", "group", "k_size", "v_size"),
    [*((name, *case) for name in ("cudnn", "fa3") for case in CASES), ("fa3 that allocates", *CASES[0])],
    indirect=["engine"],
)
def test_prefill(
    spec: str, dtype: torch.dtype, heads: int, group: int, k_size: float, v_size: float, chunk: str, engine: str,
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Windows of 48 tokens or so, two at a time, or one for all; a chunk of one token goes to the decode kernel."""
    room_for(monkeypatch, 48, 33 * group, heads)
    expand_heads = mock.Mock(side_effect=expand.expand_heads)
    monkeypatch.setattr(expand, "expand_heads", expand_heads)
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
    assert {call.kwargs["coarse"] for call in expand_heads.call_args_list} == {dtype == BF16}
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
    assert {name for name, _ in device.launches} == {"peaks", "rotate", "expand", "merge", "deal_out", "decode"}


@pytest.mark.parametrize("chunk", ["exact", "packed"])
@pytest.mark.parametrize("engine", ["cudnn", "fa3", "fa3 that allocates"], indirect=True)
@pytest.mark.parametrize(
    "budget", [(32, 48), (48, 202, 1, 1), (80, 202, 1, 2), (150, 202), (150, 202, 3), (64, 48, 1, 1)]
)
def test_chunks_that_exceed_windows(
    budget: tuple[int, ...], chunk: str, engine: str, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries in several parts, windows of some heads or of some of a head's tokens, results that are joined twice."""
    room_for(monkeypatch, *budget)
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (150,), heads=3)
    count = 101
    q, k, v = (noise(count, heads, 128, seed=seed).to(BF16) for seed, heads in enumerate((6, 3, 3)))
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    own = {"k": k, "v": v} if chunk == "exact" else {}
    out, lse = ops.prefill_attention(
        q, cache.pages, cache.table, cache.lengths, torch.tensor([0, count]), layout, scale=0.1, **own
    )
    keys, values = cache.vectors(0)
    if chunk == "exact":
        keys, values = (torch.cat([x, y.double()]) for x, y in zip((keys, values), (k, v), strict=True))
    want = expected(q.float(), keys, values, sees(count, len(keys)), 0.1)
    error = (out.double() - want.truth[0]).norm(dim=-1) / want.truth[0].norm(dim=-1)
    assert error.max() < 2 * TOLERANCE[BF16]
    assert (lse - want.truth[1]).abs().max() < 5e-3
    assert not any(name == "decode" for name, _ in device.launches)


@pytest.mark.parametrize("lent", [0, 1, 2])
@pytest.mark.parametrize(("heads", "width"), [(2, 1), (6, 1), (4, 2)])
@pytest.mark.parametrize("joins", [False, True])
def test_places_that_are_lent(
    joins: bool, heads: int, width: int, lent: int, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of streams lie where results will be, and the chunk attends to itself in windows that have been read."""
    count, context = 41, 350
    tokens = 96 if joins else context
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: dense._Found(flash_attn_varlen_func, takes_out=True))
    monkeypatch.setattr(windows, "split", lambda *_: (0.0, windows.Split(width, -(-tokens // 16) * 16)))
    found = windows._in_parts(count, count, heads, 2, context, False, windows.Share(1, 2, FA3, lent))
    assert found is not None
    memory = 2 * 2 * width * tokens + (2 * (3 if joins else 1) - lent) * 2 * width * count
    assert sum(found[1].vectors) == memory
    monkeypatch.setattr(windows, "plan", lambda *_: found[1])
    monkeypatch.setattr(windows, "SCRATCH_BYTES", 1)  # or all would be read at once
    kernels = mock.Mock(side_effect=prefill._merge_kernel)
    monkeypatch.setattr(prefill, "_merge_kernel", kernels)
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (context,), heads=heads)
    q, k, v = (noise(count, x, 128, seed=x).to(BF16) for x in (2 * heads, heads, heads))
    with dense.engine("fa3"):
        out, lse = ops.prefill_attention(
            q, cache.pages, cache.table, cache.lengths, torch.tensor([0, count]), layout, scale=0.1, k=k, v=v
        )
    keys, values = (torch.cat([x, y.double()]) for x, y in zip(cache.vectors(0), (k, v), strict=True))
    want = expected(q.float(), keys, values, sees(count, len(keys)), 0.1)
    error = (out.double() - want.truth[0]).norm(dim=-1) / want.truth[0].norm(dim=-1)
    assert error.max() < 2 * TOLERANCE[BF16]
    assert (lse - want.truth[1]).abs().max() < 5e-3
    assert {call.args[2] for call in kernels.call_args_list} == {BF16, F16}, "what joins is compiled without need, too"


@pytest.mark.parametrize("places", [True, False])
@pytest.mark.parametrize("chunk", ["exact", "packed"])
@pytest.mark.parametrize("size", [(700, 1200), (400, 1200), (300, 700), (700, 1200, 1, 1)])
def test_what_a_prefill_takes_is_bounded(
    size: tuple[int, ...], chunk: str, places: bool, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention-3: windows, queries and results, its own in float32 too, whatever chunk and prefix are."""
    peak = Peak()

    def attend(out: torch.Tensor | None = None, num_splits: int = 1, **named: Any) -> tuple[torch.Tensor, ...]:
        assert (out is not None) == places
        with peak.uncounted():
            result, lse = flash_attn_varlen_func(out=out, num_splits=num_splits, **named)
        result = result if places else result.clone()
        inside.append(torch.empty(num_splits, *result.shape) if num_splits > 1 else None)
        inside.clear()
        return result, lse.clone()

    inside: list[torch.Tensor | None] = []
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: dense._Found(attend, takes_out=places))
    most = room_for(monkeypatch, *size)
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (700,), heads=2)
    q, k, v = (noise(600, count, 128, seed=seed).to(BF16) for seed, count in enumerate((4, 2, 2)))
    own = {"k": k, "v": v} if chunk == "exact" else {}
    with dense.engine("fa3"), peak:
        out, lse = ops.prefill_attention(
            q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 600]), layout, scale=0.1, **own
        )
    beside = peak.most - 2 * out.numel() - 4 * lse.numel()
    assert most / 8 < beside <= most + 2**15  # log-sum-exps, peaks, bounds


def test_parts_of_a_prefill_can_be_called_again(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """``benchmarks/prefill_limits.py``: windows that were expanded again for other heads are there as they were."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    limits = importlib.import_module("prefill_limits")
    results: list[torch.Tensor] = []

    def attend(**named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flash_attn_varlen_func(**named)
        results.append(out.clone())
        return out, lse

    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: dense._Found(attend, takes_out=True))
    room_for(monkeypatch, 160, 202, slots=1)  # the keys of one head, twice
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (150,), heads=3)
    q, k, v = (noise(101, count, 128, seed=seed).to(BF16) for seed, count in enumerate((6, 3, 3)))
    original = dense.flash_attention_3
    with dense.engine("fa3"), limits.watched() as seen:
        ops.prefill_attention(
            q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 101]), layout, scale=0.1, k=k, v=v
        )
    assert dense.flash_attention_3 is original
    assert len(results) == 4  # the chunk's own
    for result, call in zip(list(results), limits.attention_of(seen), strict=True):
        assert torch.equal(call()[0], result)
    assert seen.window_bytes == 3 * 150 * 512
    for calls, attended in ((seen.windows + seen.around, 0), (seen.in_order, 4)):
        device.launches.clear()
        results.clear()
        for call in calls:
            call()
        launches = [name for name, _ in device.launches]
        assert {name: launches.count(name) for name in launches} == {"expand": 3, "rotate": 3, "merge": 3, "peaks": 1}
        assert len(results) == attended
    for changed, args in zip(limits.attention_of(seen, limits.in_bfloat16), seen.attention, strict=True):
        for x, y in zip(changed.args[:3], args[:3], strict=True):
            assert (x.dtype, x.stride()) == (BF16, y.stride())
            assert torch.allclose(x.float(), y.float(), rtol=2**-8)


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


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("room", [2**26, 2**18])
def test_nan_in_the_pages_reaches_the_result(
    room: int, side: str, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where FlashAttention-3 says that nothing was seen, as it does where its sum is NaN; all at once or not."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        spoilt = (k.isnan() | v.isnan()).any(dim=(0, 2)).repeat_interleave(q.shape[1] // k.shape[1])
        unseen = k.isnan().any(dim=(0, 2)).repeat_interleave(q.shape[1] // k.shape[1])
        out, lse = flash_attn_varlen_func(q=q, k=k.nan_to_num(), v=v.nan_to_num(), **named)
        out[:, spoilt], lse[unseen] = torch.nan, -torch.inf
        return out, lse

    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: dense._Found(attend, takes_out=True))
    monkeypatch.setattr(windows, "SCRATCH_BYTES", room)
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = empty_cache(layout, (250,), heads=3)
    given = {name: noise(250, 3, 128, seed=seed) for seed, name in enumerate("kv")}
    given[side][70, 1, 5] = torch.nan
    fill(cache, 0, *given.values())
    q, k, v = (noise(40, count, 128, seed=seed).to(BF16) for seed, count in ((4, 6), (5, 3), (6, 3)))
    with dense.engine("fa3"):
        out, _ = ops.prefill_attention(
            q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 40]), layout, scale=0.1, k=k, v=v
        )
    assert out[:, 2:4].isnan().all()
    assert out[:, :2].isfinite().all()
    assert out[:, 4:].isfinite().all()
    launched = [name for name, _ in device.launches]
    assert (launched.count("expand") == 1) == (room == 2**26)


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
            assert function(q=None, num_splits=5) == 5  # it shares keys among SMs
            assert dense._of_package().takes_splits
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


@pytest.mark.parametrize("lent", [0, 1, 2])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_read_was_complete(
    packed: bool, heads: int, lent: int, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every join comes behind what wrote what it reads, on either stream: by what waits for what, not by luck."""
    if lent and (packed or heads % 2):
        return
    clocks, current = {1: {1: 0}, 2: {2: 0}}, [1]  # of each stream: what of each is behind it

    class Stream:
        def __init__(self, number: int) -> None:
            self.cuda_stream = number

        def record_event(self) -> dict[int, int]:
            return dict(clocks[self.cuda_stream])

        def wait_event(self, event: dict[int, int]) -> None:
            mine = clocks[self.cuda_stream]
            mine |= {stream: max(count, mine.get(stream, 0)) for stream, count in event.items()}

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream.cuda_stream)
        yield
        current.pop()

    def done() -> tuple[int, int]:
        """On the current stream, from now on: which, and its number there."""
        stream = current[-1]
        clocks[stream][stream] += 1
        return stream, clocks[stream][stream]

    def behind(other: tuple[int, int]) -> bool:
        return clocks[current[-1]].get(other[0], 0) >= other[1]

    streams = {number: Stream(number) for number in clocks}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[current[-1]])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(runtime, "second_stream", lambda device: streams[2])
    wrote: dict[str, list[tuple[int, int]]] = {"peaks": [], "itself": [], "joined": []}
    of_heads: dict[int, tuple[int, int]] = {}
    itself, join, find, expand_heads = prefill._attend_to_itself, prefill.merge, expand.find_peaks, expand.expand_heads

    def attends_to_itself(s: Any, chunk: Any, which: range, *rest: Any) -> Any:
        result = itself(s, chunk, which, *rest)
        of_heads.update(dict.fromkeys(which, done()))
        return result

    def merges(rotated: Any, plain: Any, peaks: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
        if rotated:
            first = out.storage_offset() // 128 % (2 * heads) // 2
            if not packed:
                assert behind(of_heads[first])
            assert behind(wrote["peaks"][0])
            wrote["joined"].append(done())
        join(rotated, plain, peaks, out, lse)

    def finds(*args: Any, **named: Any) -> Any:
        wrote["peaks"].append(done())
        return find(*args, **named)

    def expands(*args: Any, **named: Any) -> None:
        assert behind(wrote["peaks"][0])
        expand_heads(*args, **named)

    for owner, name, function in (
        (prefill, "_attend_to_itself", attends_to_itself), (prefill, "merge", merges),
        (expand, "find_peaks", finds), (expand, "expand_heads", expands),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, function)
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: dense._Found(flash_attn_varlen_func, takes_out=True))
    monkeypatch.setattr(windows, "split", lambda *_: (0.0, windows.Split(1, 160)))
    found = windows._in_parts(41, 41, heads, 2, 150, packed, windows.Share(1, 2, FA3, lent))
    assert found is not None
    monkeypatch.setattr(windows, "plan", lambda *_: found[1])
    monkeypatch.setattr(windows, "SCRATCH_BYTES", 1)
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (191 if packed else 150,), heads=heads)
    q, k, v = (noise(41, count, 128, seed=seed).to(BF16) for seed, count in enumerate((2 * heads, heads, heads)))
    own = {} if packed else {"k": k, "v": v}
    with dense.engine("fa3"):
        ops.prefill_attention(
            q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 41]), layout, scale=0.1, **own
        )
    assert len(wrote["joined"]) == heads
    assert {stream for stream, _ in wrote["joined"]} == ({1, 2} if heads > 1 else {2})
    assert all(behind(join) for join in wrote["joined"]), "the caller's stream"
    assert packed or set(of_heads) == set(range(heads))


@pytest.mark.parametrize("packed", [False, True])
def test_two_streams_where_it_takes_long(packed: bool, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on which, and what waits for what: nothing is read that the other stream may still write."""
    seen: list[str] = []

    class Stream:
        def __init__(self, number: int) -> None:
            self.cuda_stream = number

        def record_event(self) -> str:
            seen.append(f"{self.cuda_stream} marks")
            return str(self.cuda_stream)

        def wait_event(self, event: str) -> None:
            seen.append(f"{self.cuda_stream} waits for {event}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def watch(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def called(*args: Any, **named: Any) -> Any:
            seen.append(f"{current[-1].cuda_stream} {what}")
            return function(*args, **named)

        monkeypatch.setattr(owner, name, called)

    def attend(**named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            assert made[named[name].data_ptr()] == current[-1].cuda_stream
        return flash_attn_varlen_func(**named)

    def arange(*args: Any, **named: Any) -> torch.Tensor:
        result = plain_arange(*args, **named)
        made[result.data_ptr()] = current[-1].cuda_stream
        kept.append(result)
        return result

    current, made, kept, plain_arange = [Stream(1)], {}, [], torch.arange
    second = Stream(2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(runtime, "second_stream", lambda device: second)
    for owner, name, what in (
        (prefill, "_attend_to", "attends"), (prefill, "_attend_to_itself", "attends to itself"),
        (prefill, "rotate", "rotates"), (prefill, "merge", "merges"), (expand, "find_peaks", "looks for peaks"),
        (expand, "expand_heads", "expands"), (expand, "no_peaks", "begins"),
    ):  # fmt: skip
        watch(owner, name, what)
    monkeypatch.setattr(dense, "_no_hopper", lambda device: None)
    monkeypatch.setattr(dense, "_flash_attention_3", lambda: dense._Found(attend, takes_out=True))
    monkeypatch.setattr(torch, "arange", arange)
    room_for(monkeypatch, 160, 82, slots=1)
    layout = PageLayout.of("k4v4", 128, page_size=16)
    cache = make_cache(layout, (150,), heads=3)
    q, k, v = (noise(41, count, 128, seed=seed).to(BF16) for seed, count in enumerate((6, 3, 3)))
    own = {} if packed else {"k": k, "v": v}
    reads = ["expands", "rotates", "attends", *(["expands", "attends"] if packed else [])]
    attends_first = [] if packed else ["1 attends to itself"]

    def group(stream: int, first: bool = False) -> list[str]:
        return [*(f"{stream} {what}" for what in reads), *(["2 waits for 1"] if first else []), f"{stream} merges"]

    for long in (0.0, 1e9):
        dense._bounds.cache_clear()
        monkeypatch.setattr(windows, "_LONG", long)
        windows.plan.cache_clear()
        seen.clear()
        with dense.engine("fa3"):
            ops.prefill_attention(
                q, cache.pages, cache.table, cache.lengths, torch.tensor([0, 41]), layout, scale=0.1, **own
            )
        if long == 0.0:
            assert seen == [
                "1 begins", "1 marks", "2 waits for 1", "2 looks for peaks", "2 marks", *attends_first, "1 marks",
                "1 waits for 2", *group(2, first=True), *group(1), *group(2), "2 marks", "1 waits for 2",
            ]  # fmt: skip
        else:
            assert not any("2" in what for what in seen)
            assert "1 merges" in seen
    dense._bounds.cache_clear()


def test_vectors_are_rotated(device: EmulatedDevice) -> None:
    for dtype in (BF16, F16):
        q, k, v = (noise(rows, heads, 128, seed=rows).to(dtype) for rows, heads in ((5, 4), (35, 3), (16, 3)))
        k[3, 1], q[2, 2] = k[3, 1] * 100, 60000
        k = k.transpose(0, 1).contiguous().transpose(0, 1)
        peaks = torch.tensor([5e3, 3e3])
        by_heads, by_rows = (torch.full((4, 37, 128), torch.nan, dtype=F16) for _ in range(2))
        by_heads, by_rows = by_heads[:3].transpose(0, 1), by_rows.view(37, 4, 128)[:, 1:]  # with gaps
        outs = [torch.full((7, 4, 128), torch.nan, dtype=F16), by_heads, by_rows[:18]]
        jobs = [(x, out[2:], side) for x, out, side in zip((q, k, v), outs, range(3), strict=True)]
        prefill.rotate(jobs, peaks)
        for x, out, factor in zip((q, k, v), outs, (4096 / 64, 1024 / 4096, 1024 / 2048), strict=True):
            want = (rotate(x.float()) * factor).clamp(-65504, 65504)
            torch.testing.assert_close(out[2:].float(), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
            assert out[:2].isnan().all()
        assert by_rows[18:].isnan().all()


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


# --- sanitized.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launched", [True, False])
def test_cases_for_the_sanitizer_are_right_and_wrong_if_no_kernel_runs(
    launched: bool, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first case of each kind."""
    monkeypatch.setattr(dense, "cudnn", cudnn)
    if not launched:
        monkeypatch.setattr(EmulatedKernel, "launch", lambda *args, **options: None)
    cases = list({case.kind: case for case in reversed(sanitized.CASES)}.values())
    assert len(cases) == 6
    assert sanitized.check(cases, torch.device("cpu")) == (0 if launched else 6)
