"""Tiny random decoder models, one per kind of attention that a compressed cache has to get right."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from transformers import PreTrainedModel

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_SLIDING = {"sliding_window": 16}

CONFIGS: dict[str, dict[str, object]] = {
    "llama": _COMMON | {"num_hidden_layers": 2},
    "qwen3": _COMMON | {"num_hidden_layers": 2},
    "gemma2": _COMMON | _SLIDING | {"num_hidden_layers": 2, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
    "gemma3_text": _COMMON
    | _SLIDING
    | {
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "gpt_oss": _COMMON
    | _SLIDING
    | {
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": _COMMON
    | {
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "qwen3_next": _COMMON
    | {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "jetmoe": {key: value for key, value in _COMMON.items() if key not in ("head_dim", "num_attention_heads")}
    | {"num_hidden_layers": 2, "kv_channels": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 97, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "pad_token_id": 0}
    | {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
}
"""Keyword arguments of each model type's config. Vocabulary 97; 0 pads, 1 begins, 2 ends."""


@cache
def tiny(model_type: str) -> PreTrainedModel:
    """The model of a type with fixed random weights, in float32 and evaluation mode. Shared: give it its attention
    back."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None  # run to the full length
    model.generation_config.pad_token_id = 0
    return model


def prompt(rows: int = 2, tokens: int = 21, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids; row 0 begins with ``padding`` pads."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (rows, tokens))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
