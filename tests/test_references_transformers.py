"""Key references under transformers: a model whose keys have a large common offset, as Qwen2's have.

Eight bits with references are close to the uncompressed model; without, or with a reference that is lost on the way,
the offset spoils every key. So the same bound tells whether references survive whatever happens to a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from tiny_models import CONFIGS, prompt
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, PreTrainedModel

from kvfold import KVCache, attach, detach

FORMAT, CLOSE = "k8v8+mean", 0.06
"""Relative error of logits: measured .02 to .04 with references; without, .25 to .5, and .11 where chunks are exact."""


@cache
def _model() -> PreTrainedModel:
    """Qwen2 with a bias of K ten times as long as its noise, in the quarter of pairs that turn slowest."""
    torch.manual_seed(0)
    options = {name: value for name, value in CONFIGS["llama"].items() if name != "head_dim"}
    config = transformers.AutoConfig.for_model("qwen2", **options | {"hidden_size": 128})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None  # run to the full length
    model.generation_config.pad_token_id = 0
    slow = [*range(12, 16), *range(28, 32)]
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        offset = torch.zeros(2, 32)
        offset[:, slow] = torch.randn(2, len(slow), generator=generator)
        offset = 128 * torch.nn.functional.normalize(offset, dim=-1)
        layer.self_attn.k_proj.bias.data = offset.flatten()
    return model


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    attach(_model())
    yield _model()
    detach(_model())
    torch.set_num_threads(threads)


IDS = prompt(rows=2, tokens=60)["input_ids"]


def logits(model: Any, ids: torch.Tensor, kept: Any, cuts: list[int], **kwargs: Any) -> torch.Tensor:
    """Feed tokens call by call, as ``cuts`` say; logits of all but the first call."""
    parts = []
    with torch.no_grad():
        for begin, end in pairwise(cuts):
            own = {
                name: value[:, begin:end] if name == "position_ids" else value[:, :end]
                for name, value in kwargs.items()
            }
            parts.append(model(ids[:, begin:end], past_key_values=kept, **own).logits)
    return torch.cat(parts[1:], dim=1)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


CUTS = {
    "decode": [0, *range(30, 61)],
    "from nothing": list(range(61)),
    "chunks": [0, 7, 14, 30, 33, 48, 60],
    "a page and one": [0, 16, 17, 32, 33, 60],
}


@pytest.mark.parametrize("max_length", [None, 64], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunk", ["exact", "packed"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_prefill_and_decoding(model: Any, cuts: list[int], chunk: str, max_length: int | None) -> None:
    want = logits(model, IDS, DynamicCache(config=model.config), cuts)
    options: dict[str, Any] = {"chunk": chunk, "page_size": 16, "max_length": max_length}
    with_mean = error(logits(model, IDS, KVCache(model.config, FORMAT, **options), cuts), want)
    assert with_mean < CLOSE
    assert error(logits(model, IDS, KVCache(model.config, "k8v8", **options), cuts), want) > 3 * with_mean


@pytest.mark.parametrize("own", [True, False], ids=["kvfold", "sdpa"])
def test_left_padding(model: Any, own: bool) -> None:
    """Row 0 begins with seven pads, which are stored too and count in the mean of the first page."""
    if not own:
        detach(model)
    inputs = prompt(rows=2, tokens=60, padding=7)
    mask = inputs["attention_mask"]
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cuts = [0, 20, 33, *range(34, 61)]
    want = logits(model, inputs["input_ids"], DynamicCache(config=model.config), cuts, **kwargs)
    for fmt, close in ((FORMAT, True), ("k8v8", False)):
        got = logits(model, inputs["input_ids"], KVCache(model.config, fmt, page_size=16), cuts, **kwargs)
        assert (error(got, want) < CLOSE) is close
        assert (error(got[0], want[0]) < 1.5 * CLOSE) is close


@pytest.mark.parametrize("max_length", [None, 64], ids=["dynamic", "static"])
@pytest.mark.parametrize("length", [20, 16, 32, 31, 17])
def test_crop(model: Any, length: int, max_length: int | None) -> None:
    """Inside a page, which keeps the reference that it has, and at boundaries, after which a page is opened anew."""
    wrong = IDS.flip(1)
    cuts = [length, *range(length + 3, 61)]
    plain = DynamicCache(config=model.config)
    cropped = KVCache(model.config, FORMAT, page_size=16, max_length=max_length)
    results = []
    for kept in (plain, cropped):
        logits(model, IDS, kept, [0, length - 2, length])
        logits(model, wrong, kept, [0, 1, 18])
        kept.crop(-18)
        assert int(kept.get_seq_length()) == length
        results.append(logits(model, IDS, kept, cuts))
    assert error(results[1], results[0]) < CLOSE


@pytest.mark.parametrize("length", [20, 32])
def test_rows_take_their_references_with_them(model: Any, length: int) -> None:
    """Beams, repeats and selections, and then more pages."""
    order = torch.tensor([1, 1, 0])
    results = []
    for kept in (DynamicCache(config=model.config), KVCache(model.config, FORMAT, page_size=16)):
        logits(model, IDS, kept, [0, length - 1, length])
        kept.batch_repeat_interleave(2)  # rows 0 0 1 1
        kept.batch_select_indices(torch.tensor([0, 2, 3]))  # 0 1 1
        kept.reorder_cache(order)  # 1 1 0
        rows = torch.stack([IDS[0], IDS[1], IDS[1].flip(0)])
        results.append(logits(model, rows, kept, [length, length + 1, *range(length + 2, 61)]))
    assert error(results[1], results[0]) < CLOSE


def test_a_fixed_cache_reorders_its_rows_in_place(model: Any) -> None:
    results = []
    for kept in (DynamicCache(config=model.config), KVCache(model.config, FORMAT, page_size=16, max_length=64)):
        logits(model, IDS, kept, [0, 19, 20])
        kept.reorder_cache(torch.tensor([1, 1]))
        results.append(logits(model, IDS, kept, [20, *range(21, 61)]))
    assert error(results[1], results[0]) < CLOSE


def test_beam_search(model: Any) -> None:
    """The best beams are as probable as without compression, though ties may fall otherwise."""
    options: dict[str, Any] = {
        "max_new_tokens": 24, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True,
        "output_scores": True,
    }  # fmt: skip
    inputs = prompt(rows=2, tokens=30, padding=4)
    want = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    got = model.generate(**inputs, past_key_values=KVCache(model.config, FORMAT, page_size=16), **options)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=0.05, atol=0)
    kept = KVCache(model.config, FORMAT, page_size=16)
    scored = logits(model, got.sequences, kept, [0, *range(30, 54)], **_masked(inputs, 54))
    plain = DynamicCache(config=model.config)
    assert error(scored, logits(model, got.sequences, plain, [0, *range(30, 54)], **_masked(inputs, 54))) < CLOSE


def _masked(inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    given = inputs["attention_mask"]
    mask = torch.cat([given, given.new_ones(len(given), tokens - given.shape[1])], dim=1)
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("max_length", [None, 64], ids=["dynamic", "static"])
def test_an_assistant_model(model: Any, max_length: int | None) -> None:
    """Drafts are stored, and cropped where they were wrong: over page boundaries, and into pages they have opened."""
    assistant = copy.deepcopy(model)
    detach(assistant)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    inputs = prompt(rows=1, tokens=10)
    kept = KVCache(model.config, FORMAT, page_size=16, max_length=max_length)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, past_key_values=kept, assistant_model=assistant)
    assert ids.shape == (1, 50)
    # what the cache holds in the end: one step more beside the uncompressed model on the same tokens
    tokens = int(kept.get_seq_length())
    assert tokens >= 48
    with torch.no_grad():
        got = model(ids[:, -1:], past_key_values=kept).logits[:, -1]
        seen = torch.cat([ids[:, :tokens], ids[:, -1:]], dim=1)
        want = model(seen, past_key_values=DynamicCache(config=model.config)).logits[:, -1]
    assert error(got, want) < 1.5 * CLOSE


def test_a_compiled_step_opens_pages(model: Any) -> None:
    """The fixed cache under torch.compile: one graph, also where a page is opened; the references are eager's."""
    kept = [KVCache(model.config, FORMAT, max_length=64, page_size=16) for _ in range(2)]
    for each in kept:
        logits(model, IDS, each, [0, 13, 14])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    cuts = list(range(14, 36))
    compiled, eager = logits(step, IDS, kept[0], cuts), logits(model, IDS, kept[1], cuts)
    assert counter.frame_count <= 2  # no recompilation per step
    assert torch.allclose(compiled, eager, atol=2e-4, rtol=1e-4)
    assert error(compiled, logits(model, IDS, _after(model, 14), cuts)) < CLOSE
    pages = [each.compressed_layers[1].pages for each in kept]
    begin = kept[0].compressed_layers[1].layout.reference
    assert pages[0][:, :3, :, begin:].any(-1).all()
    assert not pages[0][:, 3:].any()
    assert torch.equal(pages[0][:, :, :, begin:], pages[1][:, :, :, begin:])


def _after(model: Any, tokens: int) -> DynamicCache:
    plain = DynamicCache(config=model.config)
    logits(model, IDS, plain, [0, tokens - 1, tokens])
    return plain
