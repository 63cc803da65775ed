"""vLLM's whole engine on the CPU, with the few operations of its compiled part that a run needs written in PyTorch.

The wheel for CUDA has none of them for the CPU. Run as a program: it reads what to do as JSON from its first argument
and prints the answer as JSON on its last line. ``python tests/vllm_cpu_engine.py '{"rounds": [[[5, 6, 7]]]}'``

    model     directory of the weights
    engine    arguments of ``vllm.LLM``
    new       tokens to generate
    rounds    lists of prompts, each a list of token ids; the prompts of a round are served together
    logprobs  how many to return of each token

With arguments of vLLM's own command line it is that: ``python tests/vllm_cpu_engine.py serve MODEL ...``
"""

# ruff: noqa: E402 (the order of imports is the point)
from __future__ import annotations

import json
import os
import sys
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


torch.ops._C = Operations()

import vllm.model_executor.layers.utils
from vllm.platforms.cpu import CpuPlatform


def choose(cls: type, selected: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
    """As CUDA's platform asks the slot TURBOQUANT; the CPU's has one backend only."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    slot = AttentionBackendEnum.TURBOQUANT.get_class()
    reasons = slot.validate_configuration(device_capability=DeviceCapability(9, 0), **attn_selector_config._asdict())
    if reasons:
        raise ValueError("; ".join(reasons))
    return ".".join(slot.full_cls_name())


CpuPlatform.get_attn_backend_cls = classmethod(choose)
# where the processor has AMX, small products are the compiled part's
vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *shape: False


def main() -> None:
    if not sys.argv[1].startswith("{"):
        from vllm.entrypoints.cli.main import main as command_line

        command_line()
        return
    from vllm import LLM, SamplingParams

    job = json.loads(sys.argv[1])
    options = {
        "kv_cache_dtype": "turboquant", "max_model_len": 1024, "max_num_seqs": 8, "enable_prefix_caching": False,
        "block_size": 64, "kv_cache_memory_bytes": 2**22, "disable_log_stats": False,
    } | job.get("engine", {})  # fmt: skip
    llm = LLM(
        model=job["model"], dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True,
        compilation_config={"custom_ops": ["none"], "mode": 0}, **options,
    )  # fmt: skip
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
