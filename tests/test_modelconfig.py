"""Configs as they stand on the Hub, cut to the keys that matter, against shapes worked out by hand and transformers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from kvfold.errors import KVFoldError
from kvfold.modelshape import LayerGroup, ModelShape

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip
MISTRAL_V01 = {**LLAMA, "model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768}
QWEN2_7B = {
    "model_type": "qwen2", "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "hidden_size": 3584, "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_size": 4096, "max_window_layers": 36, "sliding_window": None, "use_sliding_window": False,
    "torch_dtype": "bfloat16", "max_position_embeddings": 40960,
}  # fmt: skip
GEMMA2_2B = {
    "model_type": "gemma2", "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "hidden_size": 2304, "sliding_window": 4096, "torch_dtype": "float32",
}  # fmt: skip
GEMMA3_1B = {
    "model_type": "gemma3_text", "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 256, "hidden_size": 1152, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA3_4B = {  # the heads and the pattern are the class's defaults, the dtype is the outer config's
    "model_type": "gemma3", "torch_dtype": "bfloat16", "vision_config": {"num_hidden_layers": 27},
    "text_config": {
        "model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "sliding_window": 1024,
    },
}  # fmt: skip
GEMMA4 = {
    "model_type": "gemma4_text", "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 256, "global_head_dim": 512, "hidden_size": 1536, "sliding_window": 512, "num_kv_shared_layers": 6,
    "dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "hidden_size": 2880, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
QWEN3_NEXT = {
    "model_type": "qwen3_next", "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
    "head_dim": 256, "hidden_size": 2048, "full_attention_interval": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_NEXT_LISTED = {
    **QWEN3_NEXT, "full_attention_interval": None,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
LLAMA4 = {
    "model_type": "llama4", "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama4_text", "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "hidden_size": 5120, "attention_chunk_size": 8192, "no_rope_layers": [],
    },
}  # fmt: skip


def full(layers: int, heads: int, size: int, size_v: int | None = None) -> LayerGroup:
    return LayerGroup("full", layers, heads, size, size_v or size)


def sliding(layers: int, heads: int, size: int, window: int) -> LayerGroup:
    return LayerGroup("sliding", layers, heads, size, size, window)


FAMILIES: dict[str, tuple[dict[str, Any], list[LayerGroup], int]] = {
    "llama": (LLAMA, [full(32, 8, 128)], 2),
    "llama-mha": ({**LLAMA, "num_key_value_heads": None}, [full(32, 32, 128)], 2),
    "mistral-v0.1": (MISTRAL_V01, [sliding(32, 8, 128, 4096)], 2),
    "mistral-v0.3": ({**MISTRAL_V01, "sliding_window": None}, [full(32, 8, 128)], 2),
    "mistral-nemo": (
        {**MISTRAL_V01, "hidden_size": 5120, "sliding_window": None, "head_dim": 128},
        [full(32, 8, 128)],
        2,
    ),
    "qwen2": (QWEN2_7B, [full(28, 4, 128)], 2),
    "qwen2-sliding": (
        {**QWEN2_7B, "use_sliding_window": True, "max_window_layers": 20},
        [full(20, 4, 128), sliding(8, 4, 128, 131072)],
        2,
    ),
    "qwen3": (QWEN3_8B, [full(36, 8, 128)], 2),
    "gemma2": (GEMMA2_2B, [sliding(13, 4, 256, 4096), full(13, 4, 256)], 4),
    "gemma3-text": (GEMMA3_1B, [sliding(22, 1, 256, 512), full(4, 1, 256)], 2),
    "gemma3": (GEMMA3_4B, [sliding(29, 4, 256, 1024), full(5, 4, 256)], 2),
    "gemma4": (GEMMA4, [sliding(5, 2, 256, 512), full(1, 2, 512), LayerGroup("shared", 6)], 2),
    "gemma4-global-heads": (
        {**GEMMA4, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        [sliding(5, 2, 256, 512), full(1, 1, 512), LayerGroup("shared", 6)],
        2,
    ),
    "gemma4-unused-heads": (
        {**GEMMA4, "num_global_key_value_heads": 1},
        [sliding(5, 2, 256, 512), full(1, 2, 512), LayerGroup("shared", 6)],
        2,
    ),
    "gpt-oss": (GPT_OSS, [sliding(12, 8, 64, 128), full(12, 8, 64)], 2),
    "qwen3-next": (QWEN3_NEXT, [LayerGroup("linear", 36), full(12, 2, 256)], 2),
    "qwen3-next-listed": (QWEN3_NEXT_LISTED, [LayerGroup("linear", 36), full(12, 2, 256)], 2),
    "deepseek": (DEEPSEEK_V3, [full(61, 1, 512, 64)], 2),
    "gpt2": (GPT2, [full(12, 12, 64)], 2),
    "llama4": (LLAMA4, [sliding(36, 8, 128, 8192), full(12, 8, 128)], 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    config, groups, itemsize = FAMILIES[family]
    shape = ModelShape.from_config(config)
    assert list(shape.groups) == groups
    assert shape.itemsize == itemsize


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = FAMILIES[family][0]
    if family == "qwen3-next-listed":
        config = {key: value for key, value in config.items() if value is not None}
    options = {key: value for key, value in config.items() if key not in ("model_type", "vision_config")}
    theirs = transformers.AutoConfig.for_model(config["model_type"], **options).get_text_config(decoder=True)
    wanted: Counter[tuple[Any, ...]] = Counter()
    for index, layer in enumerate(transformers.DynamicCache(config=theirs).layers):
        own = theirs.per_layer_config[index]
        window = layer.sliding_window if getattr(layer, "is_sliding", False) else 0
        kind = {"DummyLayer": "shared", "LinearAttentionLayer": "linear"}.get(type(layer).__name__)
        if kind:
            wanted[(kind, 0, 0, 0)] += 1
        elif getattr(own, "kv_lora_rank", None):
            wanted[("full", 1, own.kv_lora_rank, window)] += 1
        else:
            heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
            size = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
            wanted[("sliding" if window else "full", heads, size, window)] += 1
    ours = ModelShape.from_config(config).groups
    assert {(g.kind, g.num_kv_heads, g.head_size, g.window): g.layers for g in ours} == wanted


def test_heads_that_differ_by_kind_of_layer() -> None:
    kinds = ["full_attention", *["sliding_attention"] * 5]
    own = {"swa_num_key_value_heads": 4, "swa_head_dim": 64, "swa_v_head_dim": 32, "v_head_dim": 96, "head_dim": 192}
    layers = {"num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 128}
    shape = ModelShape.from_config({**LLAMA, **own, **layers})
    assert list(shape.groups) == [full(1, 8, 192, 96), LayerGroup("sliding", 5, 4, 64, 32, 128)]


@pytest.mark.parametrize("key", ["1", "01", 1])
def test_per_layer_config(key: str | int) -> None:
    shape = ModelShape.from_config({**LLAMA, "per_layer_config": {key: {"head_dim": 256, "num_key_value_heads": 2}}})
    assert list(shape.groups) == [full(31, 8, 128), full(1, 2, 256)]


def test_multi_query() -> None:
    falcon: dict[str, Any] = {"model_type": "falcon", "num_hidden_layers": 32, "num_attention_heads": 71}
    falcon["hidden_size"] = 4544
    assert list(ModelShape.from_config({**falcon, "num_kv_heads": 71}).groups) == [full(32, 1, 64)]
    falcon |= {"num_attention_heads": 128, "hidden_size": 8192, "num_kv_heads": 8, "new_decoder_architecture": True}
    assert list(ModelShape.from_config(falcon).groups) == [full(32, 8, 64)]


def test_notes_say_what_is_assumed_and_what_is_not_counted() -> None:
    assert "no dtype" in ModelShape.from_config(GPT2).notes[0]
    assert "recurrent" in ModelShape.from_config(QWEN3_NEXT).notes[0]
    assert "indexer" in ModelShape.from_config({**DEEPSEEK_V3, "index_head_dim": 128}).notes[0]
    assert ModelShape.from_config(QWEN3_8B).notes == ()


def test_max_positions() -> None:
    assert ModelShape.from_config(QWEN3_8B).max_positions == 40960
    assert ModelShape.from_config(GPT2).max_positions == 1024
    assert ModelShape.from_config(GEMMA3_4B).max_positions is None


def test_junk_under_any_key_is_an_error_of_ours_or_harmless() -> None:
    """Whatever a key holds, reading gives a valid shape or a KVFoldError, never a traceback from inside."""
    junk: list[Any] = [None, "x", -1, 0, 1.5, True, [], {}, ["x"], 10**30]
    for config, _, _ in FAMILIES.values():
        text = config.get("text_config", config)
        for key in [*text, "text_config", "layer_types", "per_layer_config", "num_kv_shared_layers", "dtype"]:
            for value in junk:
                try:
                    shape = ModelShape.from_config({**text, key: value})
                except KVFoldError:
                    continue
                assert all(group.layers > 0 for group in shape.groups)
