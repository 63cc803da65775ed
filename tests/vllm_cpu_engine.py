"""vLLM's whole engine on the CPU, with the few operations of its compiled part that a run needs written in PyTorch.

The wheel for CUDA has none of them for the CPU. Run as a program: it reads what to do as JSON from its first argument
and prints the answer as JSON on its last line. ``python tests/vllm_cpu_engine.py '{"rounds": [[[5, 6, 7]]]}'``

    model     directory of the weights
    engine    arguments of ``vllm.LLM``
    new       tokens to generate
    rounds    lists of prompts, each a list of token ids; the prompts of a round are served together
    logprobs  how many to return of each token

With arguments of vLLM's own command line it is that: ``python tests/vllm_cpu_engine.py serve MODEL ...``
Of a program it runs the function ``main``: ``python tests/vllm_cpu_engine.py examples/vllm_offline.py --model MODEL``
"""

# ruff: noqa: E402 (the order of imports is the point)
from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from functools import partial
from typing import Any

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one is made of Triton kernels
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each rank asks for a NUMA node of its own
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch


class Operations:
    """Stands for ``torch.ops._C``."""

    silu_and_mul = None  # asked for, but the model runs on PyTorch's

    @staticmethod
    def init_cpu_memory_env(nodes: list[int]) -> None:
        """Nothing to bind."""

    @staticmethod
    def greedy_argmax(logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    @staticmethod
    def fused_gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """A token drawn from each row's distribution."""
        noise = [torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
        return (logits - (-torch.stack(noise).log()).log()).argmax(-1)

    @staticmethod
    def compute_slot_mapping_kernel_impl(
        starts: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, slots: torch.Tensor, block_size: int
    ) -> None:
        tokens = int(starts[-1])
        rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().long())
        at = positions[:tokens].long()
        slots[:tokens] = table[rows, at // block_size].long() * block_size + at % block_size
        slots[tokens:] = -1

    @staticmethod
    def rejection_greedy_sample_kernel_impl(
        out: torch.Tensor, ends: torch.Tensor, drafts: torch.Tensor, best: torch.Tensor, bonus: torch.Tensor,
        is_greedy: torch.Tensor | None, most: int,
    ) -> None:  # fmt: skip
        """The model's own tokens as far as the drafts are these, and one more."""
        begin = 0
        for row, end in enumerate(ends.tolist()):
            right = int((drafts[begin:end] == best[begin:end]).long().cumprod(0).sum())
            tokens = torch.cat([best[begin:end], bonus[row].view(1)])[: right + 1]
            out[row, : len(tokens)] = tokens
            begin = end

    # for layers that stay uncompressed: keys are the first half of a block, values the other

    @staticmethod
    def get_scheduler_metadata(*about: Any) -> torch.Tensor:
        return torch.empty(0)

    @staticmethod
    def cpu_attn_reshape_and_cache(
        key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *_: Any
    ) -> None:
        """Caches are ``[blocks, H, block_size, d]``."""
        used = slots[: len(key)] >= 0
        at = slots[: len(key)][used]
        for cache, new in ((keys, key), (values, value)):
            cache[at // cache.shape[2], :, at % cache.shape[2]] = new[used]

    @staticmethod
    def cpu_attention_with_kv_cache(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, starts: torch.Tensor,
        lengths: torch.Tensor, scale: float, causal: bool, slopes: None, window: int, table: torch.Tensor,
        softcap: float, metadata: torch.Tensor, sinks: None, *_: Any,
    ) -> None:  # fmt: skip
        """A query sees its own token, and ``window - 1`` before it if that is not -1. Blocks before may be others'."""
        assert causal
        assert not softcap
        assert slopes is sinks is None
        for row, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
            length = int(lengths[row])
            at = torch.arange(length - (end - begin), length)[:, None]  # of the queries
            first = max(0, int(at[0]) - window + 1) if window > 0 else 0
            k, v = (
                cache[table[row].long()].transpose(1, 2).flatten(0, 1)[first:length].float().repeat_interleave(
                    query.shape[1] // cache.shape[1], dim=1
                )
                for cache in (keys, values)
            )  # fmt: skip
            behind = at - torch.arange(first, length)
            hidden = behind < 0
            if window > 0:
                hidden |= behind >= window
            scores = torch.einsum("qhd,khd->hqk", query[begin:end].float(), k) * scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            output[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(output.dtype)

    # for layers with a short convolution

    @staticmethod
    def causal_conv1d_update_cpu_vec(
        x: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: None,
        indices: torch.Tensor, *_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """A token of each row: ``[B, channels]``, with what went before in ``[blocks, channels, width - 1]``."""
        window = torch.cat([states[indices.long()], x[:, :, None]], dim=2)
        states[indices.long()] = window[:, :, 1:]
        return (window * weight).sum(2) + (0 if bias is None else bias)


torch.ops._C = Operations()

import vllm.model_executor.layers.utils
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform


def choose(cls: type, selected: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
    """As CUDA's platform: the backend that was named, or the first that can; the slot TURBOQUANT is asked last."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    question = attn_selector_config._asdict() | {"device_capability": DeviceCapability(9, 0)}
    reasons = []
    for backend in [selected] if selected else [AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.TURBOQUANT]:
        one = backend.get_class()
        against = one.validate_configuration(**question)
        if not against:
            return ".".join(one.full_cls_name())
        reasons.append(f"{backend.name}: {against}")
    raise ValueError("; ".join(reasons))


CpuPlatform.get_attn_backend_cls = classmethod(choose)
# the CPU's own has one kind of cache only; this is CUDA's
CpuPlatform.update_block_size_for_backend = classmethod(Platform.update_block_size_for_backend.__func__)
# where the processor has AMX, small products are the compiled part's
vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *shape: False


# what this machine needs, in every run
SMALL = {
    "dtype": "bfloat16", "enforce_eager": True, "compilation_config": {"custom_ops": ["none"], "mode": 0},
    "max_model_len": 1024, "max_num_seqs": 8, "enable_prefix_caching": False, "block_size": 64,
    "kv_cache_memory_bytes": 2**22,
}  # fmt: skip


def run(path: str) -> None:
    """The function ``main`` of a program that makes an ``LLM`` with the options of its own and no others."""
    import vllm

    vllm.LLM = partial(vllm.LLM, **SMALL)
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.missing = lambda: None  # a GPU, it would say
    sys.argv = sys.argv[1:]
    program.main()


def main() -> None:
    if sys.argv[1].endswith(".py"):
        run(sys.argv[1])
        return
    if not sys.argv[1].startswith("{"):
        from vllm.entrypoints.cli.main import main as command_line

        command_line()
        return
    from vllm import LLM, SamplingParams

    job = json.loads(sys.argv[1])
    options = SMALL | {"kv_cache_dtype": "turboquant", "disable_log_stats": False} | job.get("engine", {})
    llm = LLM(model=job["model"], skip_tokenizer_init=True, **options)
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=job.get("logprobs")
    )
    rounds = []
    for prompts in job["rounds"]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        rounds.append([
            {
                "tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens,
                "logprobs": [
                    {token: one.logprob for token, one in step.items()} for step in output.outputs[0].logprobs or ()
                ],
            }
            for output in outputs
        ])  # fmt: skip
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    cache = llm.llm_engine.vllm_config.cache_config
    answer = {
        "rounds": rounds, "metrics": metrics, "blocks": cache.num_gpu_blocks, "block_size": cache.block_size,
        "tokens": cache.kv_cache_size_tokens,
    }  # fmt: skip
    llm.llm_engine.engine_core.shutdown()  # the workers of several ranks say that they end, and the answer comes last
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
