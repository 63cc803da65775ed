"""The same operations and caches on a CUDA device: run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import prompt, tiny
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvfold import KVCache, ops
from kvfold.integrations.transformers.attention import LazyPackedKV
from kvfold.layout import PageLayout

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("fmt", ["k4v4", "k3v3", "k2v2", "k8v5", "kf8vf8", "bf16"])
def test_pages_and_attention_equal_the_cpus(fmt: str, head_size: int, page_size: int) -> None:
    layout = PageLayout.of(fmt, head_size, None, page_size)
    tokens, heads = 3 * page_size + 5, 2
    k, v = torch.randn(2, tokens, heads, head_size)
    slots = torch.randperm(6)[:4].mul(page_size)[:, None].add(torch.arange(page_size)).flatten()[:tokens]
    table = (slots[::page_size] // page_size).int()[None]
    lengths = torch.tensor([tokens])
    q = torch.randn(1, 3, 8, head_size)
    results = []
    for device in ("cpu", "cuda"):
        pages = torch.full(layout.page_shape(6, heads), 0xFF, dtype=torch.uint8, device=device)
        ops.store_kv(k.to(device), v.to(device), pages, slots.to(device), layout)
        out, lse = ops.decode_attention(
            q.to(device), pages, table.to(device), lengths.to(device), layout, scale=head_size**-0.5
        )
        results.append((pages.cpu(), out.cpu(), lse.cpu()))
    (pages, out, lse), (gpu_pages, gpu_out, gpu_lse) = results
    assert (pages != gpu_pages).sum() <= 1e-3 * pages.numel()  # coordinates within rounding of a threshold
    assert torch.linalg.vector_norm(out - gpu_out) < 3e-3 * torch.linalg.vector_norm(out)
    assert torch.allclose(lse, gpu_lse, atol=3e-3)


@pytest.mark.parametrize("max_length", [None, 64], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=["greedy", "beams", "chunks"]
)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_next", "jetmoe"])
def test_a_lossless_cache_generates_the_same_tokens(model_type: str, options: dict, max_length: int | None) -> None:  # type: ignore[type-arg]
    model = copy.deepcopy(tiny(model_type)).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt(padding=5).items()}
    common = {"max_new_tokens": 12, "do_sample": False, **options}
    wanted = model.generate(**inputs, **common, past_key_values=DynamicCache(config=model.config))
    cache = KVCache.for_model(model, "exact+sinks2+tail5", max_length=max_length)
    assert torch.equal(model.generate(**inputs, **common, past_key_values=cache), wanted)
    assert all(layer.pages.is_cuda for layer in cache.compressed_layers.values())


def test_a_compressed_cache_in_bfloat16() -> None:
    model = copy.deepcopy(tiny("llama")).to(DEVICE, torch.bfloat16)
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt(tokens=200).items()}
    cache = KVCache.for_model(model, "k4v4")
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert out.shape == (2, 220)
    assert cache.memory().total == 2 * 2 * 256 * 2 * 36  # rows, layers, tokens, KV heads, bytes of a token at d = 32


@pytest.mark.parametrize("fmt", ["k4v4", "k2tv2t"])
def test_a_model_larger_than_smollm2_generates_without_a_dequantised_copy(
    fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights, 200 million, heads of 128: a step of decoding takes less than half of K and V of one layer."""

    def refuse(self: LazyPackedKV) -> torch.Tensor:
        raise AssertionError("the whole cache was de-quantised")

    monkeypatch.setattr(LazyPackedKV, "tensor", refuse)
    rows, tokens, heads, head_size = 2, 8192, 4, 128
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=heads, head_dim=head_size, vocab_size=32000, max_position_embeddings=2 * tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.randint(3, config.vocab_size, (rows, tokens))
    assert sum(x.numel() for x in model.parameters()) > 135e6
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    cache = KVCache.for_model(model, fmt, max_length=tokens + 64)
    assert ops.choose(ids.device, PageLayout.of(fmt, head_size, head_size, 64)).__name__ == "kvfold.ops.cuda"
    out = model.generate(**inputs, past_key_values=cache)
    assert out.shape == (rows, tokens + 8)
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    with torch.inference_mode():
        got = model(out[:, -1:], past_key_values=cache).logits
        taken = torch.cuda.max_memory_allocated(DEVICE) - before
        cache.crop(-1)
        with ops.backend("reference"):
            wanted = model(out[:, -1:], past_key_values=cache).logits
    assert taken < rows * tokens * heads * 2 * head_size * 2 / 2
    assert torch.linalg.vector_norm(got - wanted) < 0.05 * torch.linalg.vector_norm(wanted)
