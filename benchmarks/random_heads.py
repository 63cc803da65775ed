"""A model with heads of 128 and random weights, for `vllm_answers.py --model`: SmolLM2's heads of 64 run on Triton.

    python benchmarks/random_heads.py heads128
    python benchmarks/random_heads.py --kv-heads 1 heads128_mqa

It has SmolLM2's tokenizer, six layers, eight query heads on two KV heads or as many as asked for, and weights large
enough (a standard deviation of .06) that its distributions depend on what attention returns.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

COPIED = ("tokenizer", "special_tokens", "vocab", "merges", "generation_config", "chat_template")
"""What files of SmolLM2 begin with that are copied."""
HEADS = 8


def write(folder: Path, smollm2: Path, layers: int = 6, vocabulary: int = 49152, kv_heads: int = 2) -> None:
    """Weights in bfloat16, the same in every call, a configuration, and what SmolLM2's folder has besides its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, head_dim=128, max_position_embeddings=8192,
        rope_theta=100000.0, initializer_range=0.06, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in smollm2.iterdir():
        if file.name.startswith(COPIED):
            shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--kv-heads", type=int, default=2, metavar="N", help="1 is MQA, 8 is MHA (%(default)s)")
    args = parser.parse_args()
    folder, kv_heads = args.folder, args.kv_heads
    if kv_heads < 1 or HEADS % kv_heads:
        sys.exit(f"--kv-heads {kv_heads}: {HEADS} query heads do not divide by it; it is 1, 2, 4 or 8")
    if folder.exists():
        parser.error(f"{folder} is there already; name another one, or remove it")
    from kvfold.models import smollm2_folder

    write(folder, smollm2_folder(print), kv_heads=kv_heads)
    print(folder)


if __name__ == "__main__":
    main()
