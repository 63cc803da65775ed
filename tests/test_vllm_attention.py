"""Against the real vLLM on the CPU: batches become metadata, and layers attend as plain attention does.

Layers, specs, caches, groups and builders are made by vLLM's own functions (:mod:`vllm_stand_in`); a step's metadata
comes from its ``build_attn_metadata``.
"""

# ruff: noqa: I001 (the stand-in comes before vLLM)
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vllm_stand_in as stand_in  # skips where vLLM is not installed
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.spec_decode.utils import extend_all_queries_by_N
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

from kvfold import ops
from kvfold.errors import ShapeError, UnsupportedModelError
from kvfold.integrations.vllm import impl as impl_module
from kvfold.integrations.vllm.impl import as_pages
from kvfold.layout import PageLayout
from kvfold.ops import cuda, reference
from kvfold.ops.cuda import windows
from vllm_served import PACKED, SLACK, Served, speculating
from vllm_stand_in import Engine, config


@pytest.fixture(params=["exact", "packed"])
def additional(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"turboquant": {"chunk": request.param}}


# --- attention --------------------------------------------------------------------------------------------------------


def test_a_request_from_its_first_chunk_on(additional: dict[str, Any]) -> None:
    served = Served(Engine(config(additional=additional)))
    a = served.add(300)
    for count in (70, 1, 130, 2, 1, 1, 95):
        served.step({a: count})


@pytest.mark.parametrize("name", ["turboquant", "kvfold_k8v4", "kvfold_k3v2", "kvfold_k2v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_formats_dtypes_and_head_sizes(name: str, dtype: torch.dtype, head_size: int) -> None:
    served = Served(Engine(config(name), dtype=dtype, head_size=head_size))
    a, b = served.add(200), served.add(100)
    served.step({a: 150, b: 20})
    served.step({a: 1, b: 1})
    served.step({a: 1, b: 79})


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_mha_gqa_and_mqa(heads: int, kv_heads: int) -> None:
    served = Served(Engine(config(), heads=heads, kv_heads=kv_heads))
    a, b = served.add(130), served.add(130)
    served.step({a: 129, b: 64})
    served.step({a: 1, b: 1})


@pytest.mark.parametrize("block_size", [64, 256])
def test_batch_invariance_makes_every_token_a_row(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in chunks of any length, beside others, as drafts and one by one."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    results = []
    for counts, others in (((150,), 0), ((70, 1, 79), 40), ((100, *[1] * 50), 1), ((149, 1), 3), ((64, 4, 82), 0)):
        served = Served(Engine(config(additional=PACKED), block_size=block_size))
        a, b = served.add(150), served.add(300)
        parts = [served.step({b: others, a: n} if others else {a: n})[a] for n in counts]
        results.append(torch.cat(parts))
    assert all(torch.equal(result, results[0]) for result in results)
    cfg = config(additional=PACKED)
    support = Engine(cfg).builder.get_cudagraph_support
    assert support(cfg, None) == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert support(cfg, None) == AttentionCGSupport.UNIFORM_BATCH


def test_tokens_of_a_prompt_share_its_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of them is a row: a table with a row for each takes 128 MiB for 16,384 at a length of 131,072."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    engine = Engine(config(additional=PACKED))
    a, b, c, d = (engine.add() for _ in range(4))
    (batch,) = engine.step([(a, 70, 1), (b, 7, 1), (c, 0, 9), (d, 64, 3)])[0].values()
    rows = [(its.begin, its.end, its.query_len, its.seq_lens.tolist()) for its in batch.decodes]
    assert rows == [(0, 2, 1, [71, 8]), (2, 11, 1, [*range(1, 10)]), (11, 14, 1, [65, 66, 67])]
    assert not batch.chunks
    plain, *shared = (its.block_table for its in batch.decodes)
    assert plain.shape == (2, shared[0].shape[1])
    assert all(table.stride(0) == 0 for table in shared)
    assert len({its.block_table.untyped_storage().data_ptr() for its in batch.decodes}) == 1


def test_a_short_request_goes_on_beside_first_chunks(additional: dict[str, Any]) -> None:
    """Upstream #46460: the longest row begins, so that max_query_len == max_seq_len, and the other has a prefix."""
    served = Served(Engine(config(additional=additional)))
    short, long = served.add(60), served.add(200)
    served.step({short: 40})
    served.step({short: 20, long: 200})
    batch = next(iter(served.engine.step([(short, 40, 20), (long, 0, 200)])[0].values()))
    assert [chunks.context_lens.tolist() for chunks in batch.chunks] == [[40, 0]]


def test_decodes_and_chunks_in_one_batch(additional: dict[str, Any]) -> None:
    served = Served(Engine(config(additional=additional), num_blocks=32))
    seqs = [served.add(400) for _ in range(5)]
    served.step({seqs[0]: 64, seqs[1]: 65, seqs[2]: 1})
    served.step({seqs[0]: 1, seqs[1]: 1, seqs[2]: 1, seqs[3]: 128, seqs[4]: 30})
    served.step({seqs[2]: 1, seqs[0]: 100, seqs[4]: 7})
    served.step(dict.fromkeys(seqs, 1))


def test_rows_in_any_order() -> None:
    """vLLM puts decodes first; if once it does not, results are right all the same."""
    served = Served(Engine(config()))
    a, b, c, d = (served.add(200) for _ in range(4))
    served.step({a: 50, b: 50, c: 50, d: 50})
    served.step({a: 20, b: 1, c: 30, d: 1})


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layers_of_several_formats(layer: int, additional: dict[str, Any]) -> None:
    """A batch has metadata of its own for layers of each format, all with the same block table."""
    asked = {"turboquant": {**additional["turboquant"], "format": "k3v3@1=k8v8@2=k4v2"}}
    engine = Engine(config(additional=asked), num_blocks=32, layers=({}, {}, {}))
    assert [len(group.layer_names) for group in engine.groups[0]] == [1, 1, 1]
    served = Served(engine, layer)
    one, other = served.add(150), served.add(90)
    served.step({one: 100})
    served.step({one: 1, other: 70})
    served.step({one: 1, other: 1})
    served.step({other: 19, one: 40})


def test_a_prefix_hit_reads_what_another_stored(additional: dict[str, Any]) -> None:
    served = Served(Engine(config(additional=additional)))
    a = served.add(200)
    served.step({a: 130})
    b = served.add(200, of=a, shared=128)
    assert served.engine.blocks[b] == served.engine.blocks[a][:2]
    served.step({a: 1, b: 20})
    served.step({a: 1, b: 1})


def test_recompute_after_preemption_gives_the_same_bytes() -> None:
    served = Served(Engine(config(additional=PACKED)))
    a = served.add(150)
    served.step({a: 100})
    for _ in range(10):
        last = served.step({a: 1})[a]
    engine = served.engine
    engine._free += engine.blocks[a]
    engine.blocks[a], served.done[a] = [], 0
    served.step({a: 109})
    torch.testing.assert_close(served.step({a: 1})[a], last, rtol=0, atol=0)


def test_packed_chunks_do_not_depend_on_where_they_end() -> None:
    """Stored bytes and, but for the order of sums, results: what the equality of greedy outputs rests on."""
    whole, cut = (Served(Engine(config(additional=PACKED))) for _ in range(2))
    a, b = whole.add(180), cut.add(180)
    together = whole.step({a: 180})[a]
    apart = torch.cat([cut.step({b: count})[b] for count in (64, 1, 40, 75)])
    torch.testing.assert_close(together, apart, rtol=2e-2, atol=2e-3)
    left, right = ([as_pages(s.engine.layers[0].kv_cache, 2, s.layout)[p] for p in s._pages(0)] for s in (whole, cut))
    assert all(torch.equal(x, y) for x, y in zip(left[:2], right[:2], strict=True))  # whole pages


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_large_blocks_are_consecutive_pages(block_size: int, additional: dict[str, Any]) -> None:
    engine = Engine(config(additional=additional), block_size=block_size, num_blocks=1024 // block_size)
    assert engine.kernel_blocks == [block_size]
    served = Served(engine)
    a, b = served.add(400), served.add(300)
    served.step({a: 300, b: 65})
    served.step({a: 1, b: 1})
    served.step({a: 60, b: 1})


def test_soft_cap(additional: dict[str, Any]) -> None:
    served = Served(Engine(config(additional=additional), layers=({"logits_soft_cap": 2.0},)))
    a = served.add(100)
    served.step({a: 90})
    served.step({a: 1})
    assert Engine(config(), layers=({"logits_soft_cap": 0.0},)).layers[0].impl.softcap is None


def test_layers_have_caches_of_their_own() -> None:
    engine = Engine(config(), layers=({}, {}, {}))
    for layer in (2, 0, 1):
        served = Served(engine, layer)
        engine.blocks, served.done = [], []
        a = served.add(70)
        served.step({a: 69})
        served.step({a: 1})
    caches = [layer.kv_cache for layer in engine.layers]
    assert len({cache.data_ptr() for cache in caches}) == 3


def test_a_layer_that_shares_a_cache_stores_nothing() -> None:
    engine = Engine(config(), layers=({}, {"kv_sharing_target_layer_name": "model.layers.0.attn"}))
    assert len(engine.specs) == 1
    first, second = Served(engine, 0), Served(engine, 1)
    a = first.add(100)
    second.keys, second.values, second.q = first.keys, first.values, first.q
    for count in (80, 1):
        second.done = list(first.done)
        first.step({a: count})
        before = engine.layers[0].kv_cache.clone()
        second.step({a: count})
        assert torch.equal(before, engine.layers[0].kv_cache)


def test_by_the_backends_name_alone() -> None:
    served = Served(Engine(config("auto", "turboquant")))
    a = served.add(100)
    served.step({a: 90})
    served.step({a: 1})


def test_other_layers_may_stay_uncompressed() -> None:
    """Upstream #50709: pages of bf16 and ours in one group, each layer's cache dense."""
    engine = Engine(config(kv_cache_dtype_skip_layers=["0"]), layers=({}, {}), num_blocks=4)
    served = Served(engine, 1)
    a = served.add(100)
    metadata, slots = engine.step([(a, 0, 90)])
    assert engine.layers[0].kv_cache.dtype == torch.bfloat16
    del metadata[engine.layers[0].layer_name]  # its backend's kernels need a GPU
    q, k, v = (x[a][:90].flatten(1) for x in (served.q, served.keys, served.values))
    out = engine.run(metadata, slots, q, k, v, 1).unflatten(1, (engine.heads, -1))
    wanted = served.expected(a, 0, 90, True)
    assert (out.double() - wanted).norm() / wanted.norm() < SLACK[torch.bfloat16]


# --- speculation ------------------------------------------------------------------------------------------------------


def test_drafts_are_verified_as_decodes(additional: dict[str, Any]) -> None:
    """Upstream #52475, #53180, #40831: several query tokens of a row, each seeing the tokens up to its own."""
    served = Served(Engine(speculating(3, additional=additional)))
    a, b, c = (served.add(300) for _ in range(3))
    served.step({a: 100, b: 63, c: 10})
    served.step({a: 4, b: 4, c: 4})
    # the second draft of a was refused: its tokens are written over
    served.done[a] -= 2
    for store, seed in ((served.keys, 5), (served.values, 6), (served.q, 7)):
        store[a][102:] = torch.randn(store[a][102:].shape, generator=torch.Generator().manual_seed(seed)).to(store[a])
    served.step({a: 4, b: 4, c: 4})
    served.step({a: 4, b: 4, c: 1})  # a row without drafts
    served.step({a: 2, b: 3, c: 1})
    served.step({a: 1, b: 1, c: 50})


def test_rows_of_different_lengths_are_a_call_each() -> None:
    engine = Engine(speculating(3))
    seqs = [engine.add() for _ in range(6)]
    rows = list(zip(seqs, (70, 70, 70, 70, 70, 0), (4, 4, 1, 1, 2, 90), strict=True))
    batch = next(iter(engine.step(rows)[0].values()))
    assert [(d.begin, d.end, d.query_len) for d in batch.decodes] == [(0, 8, 4), (8, 10, 1), (10, 12, 2)]
    assert [d.seq_lens.tolist() for d in batch.decodes] == [[74, 74], [71, 71], [72]]
    (chunks,) = batch.chunks
    assert (chunks.begin, chunks.end, chunks.cu_seqlens.tolist()) == (12, 102, [0, 90])


def test_without_speculation_two_tokens_are_a_chunk() -> None:
    engine = Engine(config())
    batch = next(iter(engine.step([(engine.add(), 70, 2)])[0].values()))
    assert not batch.decodes
    assert batch.chunks[0].context_lens.tolist() == [70]


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_graphs_are_for_uniform_decodes() -> None:
    engine = Engine(config())
    assert engine.graphs.min_cg_support == AttentionCGSupport.UNIFORM_BATCH


@pytest.mark.parametrize("drafts", [0, 3])
def test_rows_and_tokens_that_fill_up_a_graph_change_nothing(drafts: int) -> None:
    served = Served(Engine(speculating(drafts) if drafts else config()))
    a, b = served.add(200), served.add(200)
    served.step({a: 70, b: 120})
    n = 1 + drafts
    for _ in range(3):
        served.step({a: n, b: n}, pad_rows=2, pad_tokens=2 * n)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("block_size", [64, 128])
def test_a_captured_batch_is_one_call_on_tensors_that_stay(drafts: int, block_size: int) -> None:
    engine = Engine(speculating(drafts) if drafts else config(), block_size=block_size)
    n = 1 + drafts
    seqs = [engine.add() for _ in range(4)]
    captured = next(iter(engine.step([(seq, 70, n) for seq in seqs], capture=True)[0].values()))
    (decodes,) = captured.decodes
    assert (decodes.begin, decodes.end, decodes.query_len, captured.chunks) == (0, 4 * n, n, [])
    later = next(iter(engine.step([(seq, 140, n) for seq in seqs])[0].values()))
    if block_size > 64:  # the table of pages is the builder's own; other tensors are vLLM's
        assert decodes.block_table.data_ptr() == later.decodes[0].block_table.data_ptr()
        assert torch.equal(decodes.block_table, later.decodes[0].block_table)  # so a replay reads the new one


def test_a_graph_that_is_not_uniform_is_refused() -> None:
    engine = Engine(speculating(3))
    a, b = engine.add(), engine.add()
    with pytest.raises(UnsupportedModelError, match="cudagraph-capture-sizes"):
        engine.step([(a, 70, 4), (b, 70, 1)], capture=True)


def test_inputs_are_ready_behind_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    for name in ("store_kv", "decode_attention", "prefill_attention"):
        real = getattr(ops, name)

        def spy(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            calls.append((_name, kwargs.get("inputs_ready", False)))
            return _real(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    served = Served(Engine(speculating(3)))
    a, b, c = (served.add(100) for _ in range(3))
    served.step({a: 50, b: 50})
    calls.clear()
    served.step({a: 4, b: 1, c: 40})  # two lengths of decodes, which write their results in place
    assert calls == [
        ("store_kv", False), ("decode_attention", True), ("decode_attention", True), ("prefill_attention", False),
    ]  # fmt: skip


def test_a_layer_that_shares_a_cache_has_nothing_stored_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = ops.decode_attention
    monkeypatch.setattr(ops, "decode_attention", lambda *a, **k: (seen.append(k["inputs_ready"]), real(*a, **k))[1])
    engine = Engine(config(), layers=({}, {"kv_sharing_target_layer_name": "model.layers.0.attn"}))
    metadata, slots = engine.step([(engine.add(), 0, 1)])
    q, k, v = (torch.randn(1, heads * 64).to(engine.dtype) for heads in (4, 2, 2))
    for layer in (0, 1):
        engine.run(metadata, slots, q, k, v, layer)
    assert seen == [True, False]


def test_batch_invariance_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = ops.decode_attention
    monkeypatch.setattr(ops, "decode_attention", lambda *a, **k: (seen.append(k["batch_invariant"]), real(*a, **k))[1])
    for value in (False, True):
        monkeypatch.setattr(stand_in.selector.envs, "VLLM_BATCH_INVARIANT", value, raising=False)
        served = Served(Engine(config(additional=PACKED)))
        a = served.add(70)
        served.step({a: 64})
        served.step({a: 1})
    assert seen == [False, True, True]  # chunks are rows too then


# --- draft models -----------------------------------------------------------------------------------------------------


def test_rows_of_a_draft_model_are_longer_than_the_hosts_bound() -> None:
    """V2's speculator: rows of one more than is verified; the bound knows neither of that nor of what was rejected."""
    engine, new = Engine(speculating(3)), 5
    starts = np.array([0, new, new + 11], dtype=np.int32)
    metadata = build_attn_metadata(
        attn_groups=engine.groups, num_reqs=2, num_tokens=new + 11, query_start_loc_gpu=torch.from_numpy(starts),
        query_start_loc_cpu=torch.from_numpy(starts), max_query_len=11,
        seq_lens=torch.tensor([104, 11], dtype=torch.int32), max_seq_len=4096,
        block_tables=[torch.zeros(2, 64, dtype=torch.int32)], slot_mappings=torch.zeros(1, 16, dtype=torch.int64),
        kv_cache_config=engine.cache_config, seq_lens_cpu_upper_bound=torch.tensor([106, 10], dtype=torch.int32),
        is_prefilling=torch.zeros(2, dtype=torch.bool),
    )  # fmt: skip
    (chunks,) = next(iter(metadata.values())).chunks
    assert chunks.context_lens.tolist() == [104 - new, 0]


def test_v1_lengthens_the_rows_of_a_draft_model() -> None:
    engine, bounds = Engine(speculating(3)), torch.tensor([0, 10], dtype=torch.int32)
    prompt = CommonAttentionMetadata(
        query_start_loc=bounds, query_start_loc_cpu=bounds, seq_lens=torch.tensor([10], dtype=torch.int32), num_reqs=1,
        num_actual_tokens=10, max_query_len=10, max_seq_len=10, slot_mapping=torch.zeros(10, dtype=torch.int64),
        block_table_tensor=torch.zeros(1, 64, dtype=torch.int32), is_prefilling=torch.ones(1, dtype=torch.bool),
        seq_lens_cpu_upper_bound=torch.tensor([10], dtype=torch.int32),
    )  # fmt: skip
    longer = extend_all_queries_by_N(prompt, 1, torch.arange(8, dtype=torch.int32), torch.zeros(11, dtype=torch.int64))
    (chunks,) = engine.builder.build_for_drafting(longer, 0).chunks
    assert chunks.context_lens.tolist() == [0]


# --- the host's part --------------------------------------------------------------------------------------------------


def test_lengths_of_chunks_are_one_tensor_for_all_layers_and_no_inference_tensors() -> None:
    """The prefill reads lengths on the host once for each tensor; of inference tensors it cannot know that it has."""
    engine = Engine(config(), layers=({}, {}, {}))
    with torch.inference_mode():
        metadata, _ = engine.step([(engine.add(), 0, 90)])
    first, *others = metadata.values()
    assert all(one is first for one in others)
    chunks = first.chunks[0]
    for lengths in (chunks.context_lens, chunks.seq_lens, chunks.cu_seqlens):
        assert not lengths.is_inference()


def test_a_batch_whose_lengths_the_host_does_not_know() -> None:
    engine = Engine(config())
    batch = next(iter(engine.step([(engine.add(), 70, 30), (engine.add(), 0, 10)], known=False)[0].values()))
    assert batch.chunks[0].context_lens.tolist() == [70, 0]


def test_a_batch_that_sees_the_future_is_refused() -> None:
    engine = Engine(config())
    batch = stand_in.types.SimpleNamespace(causal=False)
    with pytest.raises(UnsupportedModelError, match="behind the query"):
        engine.builder.build(0, batch)


class Compiled:
    """In place of :func:`kvfold.ops.cuda.runtime.kernel`: which kernels are asked for. They do nothing."""

    def __init__(self) -> None:
        self.asked: set[tuple[Any, ...]] = set()

    def __call__(self, file: str, entry: str, device: torch.device, **defines: int | str) -> Any:
        self.asked.add((file, entry, *sorted(defines.items())))
        return SimpleNamespace(launch=lambda *args, **options: None)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("library", ["fa3", "cudnn"])
@pytest.mark.parametrize("invariant", ["0", "1"])
def test_serving_compiles_nothing_that_the_warm_up_has_not(
    invariant: str, library: str, kv_heads: int, additional: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernels are compiled when they are first asked for, which takes seconds."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", invariant)
    kernels, none = Compiled(), SimpleNamespace(multi_processor_count=132)

    def attend(q: torch.Tensor, *args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(q), torch.zeros(q.shape[:-1])

    stream = SimpleNamespace(cuda_stream=0, record_event=lambda: None, wait_event=lambda event: None)

    for owner, name, value in (
        (cuda.runtime, "kernel", kernels), (cuda, "available", lambda device: None),
        (cuda.dense, "choose", lambda device: library), (cuda.dense, "cudnn", attend),
        (cuda.dense, "flash_attention_3", attend), (cuda.dense, "writes_into", lambda: True),
        (torch.cuda, "get_device_properties", lambda index: none),
        (torch.cuda, "current_stream", lambda device: stream), (cuda.runtime, "second_stream", lambda device: stream),
        (torch.cuda, "is_current_stream_capturing", lambda: False), (torch.cuda, "synchronize", lambda index: None),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, value)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: zeros(*a, **{n: x for n, x in k.items() if n != "device"}))
    modules = (cuda.decode, cuda.expand, cuda.prefill, cuda.store, windows)

    def forget() -> None:
        for module in modules:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()

    monkeypatch.setattr(windows, "SCRATCH_BYTES", 2**23)  # so that some contexts are read in many windows
    forget()
    try:
        with ops.backend("cuda"):
            shape = {"head_size": 128, "heads": 8, "kv_heads": kv_heads, "num_blocks": 40}
            engine = Engine(speculating(3, additional=additional), **shape)
            impl = engine.layers[0].impl
            impl_module._warm.clear()
            q, k, v = (torch.zeros(2048, heads, 128, dtype=engine.dtype) for heads in (8, kv_heads, kv_heads))
            impl.warm_up(q, k, v, PageLayout.of(impl.format, 128, page_size=64))
            warm = set(kernels.asked)
            a, b, c = engine.add(), engine.add(), engine.add()
            for rows in (
                [(a, 0, 300), (b, 0, 5)], [(a, 300, 4), (b, 5, 1)], [(a, 304, 1), (b, 6, 9), (c, 0, 100)],
                [(c, 100, 400), (a, 305, 17)], [(c, 500, 300)],
            ):  # fmt: skip
                metadata, slots = engine.step(rows)
                count = len(slots)
                engine.run(metadata, slots, q[:count].flatten(1), k[:count].flatten(1), v[:count].flatten(1))
    finally:
        forget()
    assert kernels.asked == warm


def test_the_run_that_measures_memory_gives_zeros_and_warms_up() -> None:
    engine = Engine(config())
    T, d = 40, engine.head_size
    q, k, v = (torch.randn(T, heads * d).to(engine.dtype) for heads in (engine.heads, engine.kv_heads, engine.kv_heads))
    out = engine.run(None, torch.full((T,), -1), q, k, v)
    assert not out.any()
    impl = engine.layers[0].impl
    impl._max_rows, impl._max_tokens = 3, 200
    impl_module._warm.clear()
    for _ in range(2):  # the second is nothing
        impl.warm_up(q.unflatten(1, (-1, d)), k.unflatten(1, (-1, d)), v.unflatten(1, (-1, d)), impl._layout)
    assert len(impl_module._warm) == 1
    assert not engine.layers[0].kv_cache.any()


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that is made and no view."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_long_context_needs_no_more_memory_than_a_window(
    backend: str, additional: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream #40420, #41565, #41726, #43357: a workspace of the whole context is out of memory some day.

    The window is made small here. What is as long as a context is its list of pages.
    """
    monkeypatch.setattr(reference, "WINDOW_BYTES", 2**18)
    engine = Engine(config(additional=additional), num_blocks=64)
    with ops.backend(backend):
        served = Served(engine)
        a = served.add(4000)
        served.step({a: 3800})
        served.step({a: 60})
        for new in (60, 1):
            metadata, slots = engine.step([(a, served.done[a], new)])
            own = slice(served.done[a], served.done[a] + new)
            q, k, v = (x[a][own].flatten(1) for x in (served.q, served.keys, served.values))
            with Allocations() as seen:
                engine.run(metadata, slots, q, k, v)
            context = 4 * sum(x[a][: own.stop].numel() for x in (served.keys, served.values))
            assert 0 < seen.largest <= 2 * 2**18 < context / 4
            served.done[a] += new


def test_an_output_with_gaps_is_written_all_the_same() -> None:
    served = Served(Engine(config()))
    a, b = served.add(100), served.add(100)
    served.step({a: 70})
    engine, impl = served.engine, served.engine.layers[0].impl
    metadata, _ = engine.step([(a, 70, 1), (b, 0, 30)])
    q, k, v = (torch.cat([x[a][70:71], x[b][:30]]) for x in (served.q, served.keys, served.values))
    whole, gaps = torch.zeros_like(q), torch.zeros(31, engine.heads, 2 * engine.head_size, dtype=q.dtype)[..., ::2]
    for out in (whole, gaps):
        impl.forward(None, q, k, v, engine.layers[0].kv_cache, next(iter(metadata.values())), out)
    assert torch.equal(whole, gaps)
    assert whole.any()


@pytest.mark.parametrize("argument", ["output_scale", "output_block_scale"])
def test_quantised_outputs_are_refused(argument: str) -> None:
    engine = Engine(config())
    q = torch.zeros(1, 4, 64)
    with pytest.raises(NotImplementedError, match="fuse_attn_quant"):
        engine.layers[0].impl.forward(None, q, q, q, q, None, q, **{argument: torch.ones(1)})


def test_pages_that_do_not_lie_one_after_the_other_are_refused() -> None:
    layout = PageLayout.of("k4v4", 64)
    cache = torch.zeros(4, 2, 64, layout.token_bytes, dtype=torch.uint8)
    assert as_pages(cache, 2, layout).shape == (4, 2, layout.page_bytes)
    for other in (cache[::2], cache.transpose(1, 2).contiguous().transpose(1, 2), cache[..., :-4]):
        with pytest.raises(ShapeError, match="vLLM padded its blocks"):
            as_pages(other, 2, layout)
