"""Answer prompts in vLLM with a compressed cache: the dtype is all that differs.

Needs a GPU and ``pip install 'kvfold[vllm]'``; without them it says so and stops.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import torch

PROMPTS = ["Why is the sky blue?", "Name three moons of Jupiter.", "Write a haiku about memory."]


def missing() -> str | None:
    """What keeps the example from running, or None."""
    if find_spec("vllm") is None:
        return "vLLM is not installed: pip install 'kvfold[vllm]'"
    # is_available() would keep the processes that vLLM forks from using CUDA
    return None if torch.cuda.device_count() else "there is no CUDA device here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-8B", help="a directory or a hub name")
    parser.add_argument("--kv-cache-dtype", default="turboquant", help="auto, fp8, turboquant, kvfold_k3v3, ...")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    if reason := missing():
        print(f"This example does nothing here: {reason}.")
        return

    from vllm import LLM, SamplingParams

    llm = LLM(model=args.model, kv_cache_dtype=args.kv_cache_dtype)
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    for output in llm.chat([[{"role": "user", "content": prompt}] for prompt in PROMPTS], sampling):
        print(repr(output.outputs[0].text))
    tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    print(f"the cache in {args.kv_cache_dtype} has room for {tokens:,} tokens")


if __name__ == "__main__":
    main()
