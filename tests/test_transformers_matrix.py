"""With a lossless format a compressed cache must generate the tokens that DynamicCache does: models x modes x both
kinds."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny_models import CONFIGS, prompt, tiny
from transformers import DynamicCache

from kvfold import KVCache, attach, detach
from kvfold.errors import UnsupportedModelError

STATIC_LENGTH = 64
MODES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "greedy": ({}, {}),
    "left-padding": ({"padding": 5}, {}),
    "beams": ({"padding": 5}, {"num_beams": 3}),
    "chunked-prefill": ({}, {"prefill_chunk_size": 7}),
    "chunked-prefill-padded": ({"padding": 5}, {"prefill_chunk_size": 7}),
    "assisted": ({"rows": 1}, {"prompt_lookup_num_tokens": 3}),
}
STATEFUL = ("qwen3_next",)  # transformers has no assisted decoding for models with recurrent states
NO_STATIC_CROP = ("gemma2", "gemma3_text", "gpt_oss")  # nor crops sliding layers of fixed size
CASES = [
    pytest.param(model, mode, static, id=f"{model}-{mode}-{'static' if static else 'dynamic'}")
    for model in CONFIGS
    for mode in MODES
    for static in (False, True)
    if not (mode == "assisted" and (model in STATEFUL or (static and model in NO_STATIC_CROP)))
]


def generate(model_type: str, mode: str, cache: object) -> torch.Tensor:
    shape, options = MODES[mode]
    tokens = tiny(model_type).generate(
        **prompt(**shape), max_new_tokens=12, do_sample=False, past_key_values=cache, **options
    )
    assert isinstance(tokens, torch.Tensor)
    return tokens


@cache
def expected(model_type: str, mode: str) -> torch.Tensor:
    """The tokens of the model's own attention and cache."""
    model = tiny(model_type)
    detach(model)
    return generate(model_type, mode, DynamicCache(config=model.config))


def make_cache(model_type: str, static: bool, **options: object) -> KVCache:
    return KVCache(
        tiny(model_type).config, "exact", max_length=STATIC_LENGTH if static else None, page_size=16, **options
    )


@pytest.mark.parametrize(("model_type", "mode", "static"), CASES)
@pytest.mark.parametrize("chunk", ["exact", "packed"])
def test_packed_attention(model_type: str, mode: str, static: bool, chunk: str) -> None:
    wanted = expected(model_type, mode)
    attach(tiny(model_type))
    assert torch.equal(generate(model_type, mode, make_cache(model_type, static, chunk=chunk)), wanted)


@pytest.mark.parametrize(("model_type", "mode", "static"), CASES)
def test_the_models_own_attention_reads_dequantised(model_type: str, mode: str, static: bool) -> None:
    wanted = expected(model_type, mode)
    detach(tiny(model_type))
    assert torch.equal(generate(model_type, mode, make_cache(model_type, static)), wanted)


@pytest.mark.parametrize(("model_type", "mode", "static"), CASES)
def test_sinks_and_tail(model_type: str, mode: str, static: bool) -> None:
    """Exact sinks and tail come from other buffers than the pages; losslessly the tokens are the same."""
    wanted = expected(model_type, mode)
    attach(tiny(model_type))
    for chunk in ("exact", "packed"):
        cache = KVCache(
            tiny(model_type).config,
            "exact+sinks3+tail6",
            max_length=STATIC_LENGTH if static else None,
            page_size=16,
            chunk=chunk,
        )
        assert torch.equal(generate(model_type, mode, cache), wanted)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_attached_model_with_an_ordinary_cache(model_type: str) -> None:
    for mode in ("greedy", "left-padding", "chunked-prefill"):
        wanted = expected(model_type, mode)
        attach(tiny(model_type))
        assert torch.equal(generate(model_type, mode, DynamicCache(config=tiny(model_type).config)), wanted)


@pytest.mark.parametrize("model_type", NO_STATIC_CROP)
def test_assisted_decoding_with_fixed_sliding_layers_is_refused(model_type: str) -> None:
    attach(tiny(model_type))
    # from 5.24 on transformers asks before it crops, and refuses itself
    with pytest.raises((UnsupportedModelError, ValueError), match=r"leave max_length out|cache that can be cropped"):
        generate(model_type, "assisted", make_cache(model_type, static=True))


@pytest.mark.parametrize(
    ("model_type", "compressed", "kept"),
    [
        ("llama", "2 of 2", ""),
        ("gemma3_text", "1 of 3", "0: DynamicSlidingWindowLayer, 1: DynamicSlidingWindowLayer"),
        ("gpt_oss", "1 of 2", "0: DynamicSlidingWindowLayer"),
        ("qwen3_next", "1 of 2", "0: LinearAttentionLayer"),
        ("deepseek_v3", "2 of 2", ""),
    ],
)
def test_repr_names_what_stays_uncompressed(model_type: str, compressed: str, kept: str) -> None:
    text = repr(make_cache(model_type, static=False))
    assert f"compressed {compressed} layers" in text
    assert kept in text
    assert ("uncompressed" in text) == bool(kept)
