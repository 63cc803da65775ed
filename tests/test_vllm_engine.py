"""vLLM's whole engine, scheduler and model included, serves from the packed cache on the CPU.

A small Qwen3 with random weights. Of ``chunk=packed`` the greedy tokens are the same however a request is served. (The
CPU's attention does not depend on the batch; products of matrices do, a little, so the weights are such that the best
token leads by more than that.)

Layers that are not compressed run on vLLM's attention for the CPU, whose operations :mod:`vllm_cpu_engine` has, and
vLLM chooses sizes of blocks as for CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("vllm") is None or find_spec("vllm.config") is None:
    pytest.skip("vLLM is not installed: make test-vllm makes an environment that has it", allow_module_level=True)

SCRIPT = Path(__file__).with_name("vllm_cpu_engine.py")
NEW = 24
PACKED = {"additional_config": {"turboquant": {"chunk": "packed"}}}
SHAPE = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
    "vocab_size": 512, "tie_word_embeddings": False, "max_position_embeddings": 2048, "bos_token_id": 0,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
# the third goes round in circles, so that n-grams find something to propose
PROMPTS = [list(range(3, 13)), [(7 * i * i + 3 * i) % 500 + 2 for i in range(230)], [*range(40, 60)] * 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(num_hidden_layers=3, head_dim=64, **SHAPE)
    folder = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def serve(
    model: Path, rounds: list[list[list[int]]], new: int = NEW, logprobs: int | None = None, **engine: Any
) -> Any:
    job = {"model": str(model), "rounds": rounds, "new": new, "logprobs": logprobs, "engine": engine}
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(job)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stdout + done.stderr}


def tokens(answer: Any, round: int = 0) -> list[list[int]]:
    return [one["tokens"] for one in answer["rounds"][round]]


def errors(model: Path, answer: Any) -> tuple[list[float], list[float]]:
    """Against transformers without compression, in the answers to all prompts.

    Returns:
        How far each logarithm is off, and how much likelier than each chosen token another one is.
    """
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    off, regrets = [], []
    for prompt, one in zip(PROMPTS, answer["rounds"][0], strict=True):
        with torch.inference_mode():
            logits = plain(torch.tensor([prompt + one["tokens"][:-1]])).logits[0, len(prompt) - 1 :]
        for chosen, said, wanted in zip(one["tokens"], one["logprobs"], logits.float().log_softmax(-1), strict=True):
            assert len(said) >= 5
            regrets.append(float(wanted.max() - wanted[chosen]))
            off += [abs(float(wanted[int(token)]) - logprob) for token, logprob in said.items()]
    return off, regrets


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """The tokens of each prompt, served by itself, in one chunk."""
    answer = serve(model, [[prompt] for prompt in PROMPTS], **PACKED)
    return [tokens(answer, round)[0] for round in range(len(PROMPTS))]


def test_batched(model: Path, alone: list[list[int]]) -> None:
    assert tokens(serve(model, [PROMPTS], **PACKED)) == alone


def test_in_chunks_beside_others(model: Path, alone: list[list[int]]) -> None:
    answer = serve(model, [PROMPTS], max_num_batched_tokens=48, max_num_seqs=4, **PACKED)
    assert tokens(answer) == alone


def test_with_prefix_hits(model: Path, alone: list[list[int]]) -> None:
    answer = serve(model, [PROMPTS, PROMPTS], enable_prefix_caching=True, **PACKED)
    assert tokens(answer) == tokens(answer, 1) == alone
    assert [one["cached"] for one in answer["rounds"][1]] == [0, 192, 128]  # whole pages


def test_after_preemption(model: Path) -> None:
    """Three requests grow from two blocks to three each, and there are seven: one is thrown out and computed anew."""
    prompts = [PROMPTS[1][:120], PROMPTS[2][:120], PROMPTS[1][50:170]]
    answer = serve(model, [prompts], num_gpu_blocks_override=8, max_model_len=256, **PACKED)
    assert answer["metrics"]["vllm:num_preemptions"] > 0
    assert tokens(answer) == tokens(serve(model, [prompts], **PACKED))


def test_in_large_blocks(model: Path, alone: list[list[int]]) -> None:
    answer = serve(model, [PROMPTS], block_size=256, **PACKED)
    assert answer["block_size"] == 256
    assert tokens(answer) == alone


def test_with_speculation_by_ngrams(model: Path, alone: list[list[int]]) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    answer = serve(model, [PROMPTS], speculative_config=speculation, **PACKED)
    assert tokens(answer) == alone
    assert answer["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_by_the_backends_name(model: Path, alone: list[list[int]]) -> None:
    answer = serve(model, [PROMPTS[:1]], kv_cache_dtype="auto", attention_backend="TURBOQUANT", **PACKED)
    assert tokens(answer) == alone[:1]


def test_capacity_is_the_planners(model: Path) -> None:
    from kvfold.planner import ModelShape, cache_bytes

    answer = serve(model, [PROMPTS[:1]], new=1)
    shape = ModelShape.uniform(3, 2, 64)
    assert answer["block_size"] == 64
    assert (
        cache_bytes(shape, "k4v4", 64 * answer["blocks"])
        <= 2**22
        < cache_bytes(shape, "k4v4", 64 * (answer["blocks"] + 1))
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_eight_bits_are_the_model_itself(model: Path, ranks: int) -> None:
    """Against transformers without compression: likely tokens and their logarithms. Two ranks have a KV head each."""
    from kvfold.planner import ModelShape, cache_bytes

    options = {"kv_cache_dtype": "kvfold_k8v8", "tensor_parallel_size": ranks}
    answer = serve(model, [PROMPTS], new=4, logprobs=5, **options)
    off, regrets = errors(model, answer)
    assert max(off) < 0.25
    assert max(regrets) < 0.25
    shape, blocks = ModelShape.uniform(3, 2 // ranks, 64), answer["blocks"]
    assert cache_bytes(shape, "k8v8", 64 * blocks) <= 2**22 < cache_bytes(shape, "k8v8", 64 * (blocks + 1))


def test_layers_have_formats_of_their_own(model: Path) -> None:
    """Every way to serve gives the same tokens, others than with one format; and the capacity is the planner's."""
    from kvfold.planner import ModelShape, cache_bytes

    spec = "k2v3@1=k8v8@2=k4v3"
    options = {"additional_config": {"turboquant": {"format": spec, "chunk": "packed"}}}
    answer = serve(model, [PROMPTS], **options)
    in_pieces = serve(
        model, [PROMPTS, PROMPTS], max_num_batched_tokens=48, max_num_seqs=4, enable_prefix_caching=True, **options
    )
    assert tokens(in_pieces) == tokens(in_pieces, 1) == tokens(answer)
    assert [one["cached"] for one in in_pieces["rounds"][1]] == [0, 192, 128]
    uniform = serve(model, [PROMPTS], additional_config={"turboquant": {"format": "k2v3", "chunk": "packed"}})
    assert tokens(answer) != tokens(uniform)
    shape, blocks = ModelShape.uniform(3, 2, 64), answer["blocks"]
    assert cache_bytes(shape, spec, 64 * blocks) <= 2**22 < cache_bytes(shape, spec, 64 * (blocks + 1))


def test_skipped_layers_are_the_models_own(model: Path) -> None:
    """In the coarsest format: with the first layer in bf16 the answers are nearer to the model's."""
    coarse = {"turboquant": {"format": "k2v2", "chunk": "packed"}}
    whole, rest = (
        serve(model, [PROMPTS], logprobs=5, additional_config=coarse, **skipped)
        for skipped in ({}, {"kv_cache_dtype_skip_layers": ["0"]})
    )
    assert "kvfold compresses 3 of 3 layers to k2v2; 0 stay as they are" in whole["log"]
    assert "kvfold compresses 2 of 3 layers to k2v2; 1 stay as they are" in rest["log"]
    assert [len(one) for one in tokens(rest)] == [NEW] * len(PROMPTS)
    for of_rest, of_whole in zip(errors(model, rest), errors(model, whole), strict=True):
        assert 0 < sum(of_rest) < sum(of_whole) / 2


def test_layers_with_a_window_stay_as_they_are(tmp_path: Path) -> None:
    """Every other layer sees 96 tokens. Blocks of the two kinds have equal bytes, and so not as many tokens."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        num_hidden_layers=4, head_dim=64, sliding_window=96, layer_types=["full_attention", "sliding_attention"] * 2,
        query_pre_attn_scalar=64, attn_logit_softcapping=None, final_logit_softcapping=None,
        **SHAPE | {"tie_word_embeddings": True},
    )  # fmt: skip
    Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    options = {"kv_cache_dtype": "kvfold_k8v8", "kv_cache_dtype_skip_layers": ["sliding_window"]}
    answer = serve(tmp_path, [PROMPTS], new=8, logprobs=5, max_num_batched_tokens=48, max_num_seqs=4, **options)
    assert "kvfold compresses 2 of 4 layers to k8v8; 2 stay as they are" in answer["log"]
    off, regrets = errors(tmp_path, answer)
    assert sum(off) / len(off) < 0.1
    assert max(regrets) < 0.25


def test_beside_layers_that_keep_a_state(tmp_path: Path) -> None:
    """LFM2: every other layer is a convolution over the last 40 tokens, and what it keeps of a sequence is a block.

    vLLM gives a block of attention as many bytes or more: two pages.
    """
    from transformers import Lfm2Config, Lfm2ForCausalLM

    shape = SHAPE | {"hidden_size": 256, "conv_dim": 256, "block_dim": 256, "tie_word_embeddings": True}
    config = Lfm2Config(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, conv_L_cache=40, **shape)
    model = Lfm2ForCausalLM(config)
    for name, weights in model.named_parameters():
        if name.endswith("self_attn.out_proj.weight"):
            weights.data *= 4  # the rest would hardly notice what attention says
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    options = {"kv_cache_dtype": "kvfold_k8v8", "max_num_batched_tokens": 48, "max_num_seqs": 4}
    answer = serve(tmp_path, [PROMPTS], new=8, logprobs=5, **options)
    assert "kvfold compresses 2 of 4 layers to k8v8; 2 stay as they are" in answer["log"]
    off, regrets = errors(tmp_path, answer)
    assert answer["block_size"] == 128
    assert max(off) < 0.25
    assert max(regrets) < 0.25
