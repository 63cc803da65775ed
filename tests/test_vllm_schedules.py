"""One schedule of a step's decode attention for all layers, against the real vLLM on the CPU, where none is needed.

So what makes schedules is replaced by what only keeps the lengths that it is given.
"""

# ruff: noqa: I001 (the stand-in comes before vLLM)
from __future__ import annotations

from typing import Any

import pytest
import torch

import vllm_stand_in as stand_in  # skips where vLLM is not installed
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops.options import DecodeSchedule
from vllm_served import PACKED, Served, speculating
from vllm_stand_in import Engine, config


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch) -> list[DecodeSchedule | None]:
    """What calls of decode attention are given, where an implementation has a use for schedules."""
    seen: list[DecodeSchedule | None] = []
    real = ops.decode_attention

    def make(seq_lens: torch.Tensor, layout: PageLayout, heads: int, kv_heads: int, query_tokens: int, out: Any) -> Any:
        data = torch.zeros(64, dtype=torch.int32) if out is None else out.data.fill_(-1)
        data[: len(seq_lens)] = seq_lens
        return DecodeSchedule(data, len(seq_lens), query_tokens, kv_heads, heads // kv_heads, 0, None, False, False)

    def attend(*args: Any, schedule: DecodeSchedule | None = None, **kwargs: Any) -> Any:
        seen.append(schedule)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "schedule_decode", make)
    monkeypatch.setattr(ops, "decode_attention", attend)
    return seen


def test_a_step_has_one_schedule_for_all_layers(schedules: list[DecodeSchedule | None]) -> None:
    engine = Engine(speculating(3), layers=({}, {}))
    served = [Served(engine, layer) for layer in (0, 1)]
    a, b = served[0].add(100), served[0].add(100)
    served[0].step({a: 50, b: 60})  # chunks alone
    assert schedules == []
    metadata, slots = engine.step([(a, 50, 4), (b, 60, 1)])
    q, k, v = (torch.randn(5, heads * 64).to(engine.dtype) for heads in (4, 2, 2))
    for layer in (0, 1):
        engine.run(metadata, slots, q, k, v, layer)
    fours, ones, *again = schedules
    assert again == [fours, ones]
    assert fours is not None
    assert ones is not None
    assert fours[1:] == (1, 4, 2, 2, 0, None, False, False)
    assert ones[1:] == (1, 1, 2, 2, 0, None, False, False)
    assert (fours.data[0], ones.data[0]) == (54, 61)
    assert fours.data.data_ptr() != ones.data.data_ptr()


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_graphs_schedule_is_renewed_where_it_lies(drafts: int, schedules: list[DecodeSchedule | None]) -> None:
    engine, n = Engine(speculating(drafts) if drafts else config()), 1 + drafts
    seqs = [engine.add() for _ in range(4)]
    captured = next(iter(engine.step([(seq, 70, n) for seq in seqs], capture=True)[0].values()))
    (decodes,) = captured.decodes
    assert decodes.schedule is not None
    assert decodes.schedule.batch == 4
    later = next(iter(engine.step([(seq, 140 + seq, n) for seq in seqs[:3]])[0].values()))
    assert later.decodes[0].schedule.batch == 3
    assert decodes.schedule.data[:3].tolist() == [140 + n, 141 + n, 142 + n]


def test_rows_that_all_fill_up_a_graph_have_an_empty_schedule(schedules: list[DecodeSchedule | None]) -> None:
    """As the second half of a batch may be: what the graph's schedule said before would be read otherwise."""
    engine = Engine(config())
    metadata, _ = engine.step([(engine.add(), 70, 1) for _ in range(4)])
    (decodes,) = next(iter(metadata.values())).decodes
    assert decodes.schedule is not None
    batch = CommonAttentionMetadata(
        query_start_loc=torch.zeros(3, dtype=torch.int32), query_start_loc_cpu=torch.zeros(3, dtype=torch.int32),
        seq_lens=torch.zeros(2, dtype=torch.int32), num_reqs=2, num_actual_tokens=0, max_query_len=1, max_seq_len=1,
        block_table_tensor=torch.zeros(2, 4, dtype=torch.int32), slot_mapping=torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    assert engine.builder.build(0, batch).decodes == []
    assert decodes.schedule.data.tolist() == [-1] * 64


def test_schedules_are_of_the_first_rows(schedules: list[DecodeSchedule | None]) -> None:
    """Rows of one length, then of another, and so on: memory is for a few."""
    engine = Engine(speculating(3))
    rows = [(engine.add(), 70, 1 + i % 2) for i in range(7)]
    batch = next(iter(engine.step(rows)[0].values()))
    assert [decodes.schedule is not None for decodes in batch.decodes] == [True] * 4 + [False] * 3


def test_batch_invariance_needs_no_schedule(
    schedules: list[DecodeSchedule | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in.selector.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    served = Served(Engine(config(additional=PACKED)))
    served.step({served.add(70): 64})
    assert schedules == [None]
