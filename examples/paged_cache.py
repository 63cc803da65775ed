"""Compressed pages without any model library: sequences, a shared prefix, attention, and a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kvfold import PagedKVCache

LAYERS, QUERY_HEADS, KV_HEADS, HEAD = 2, 8, 2, 64


def main() -> None:
    torch.manual_seed(0)
    cache = PagedKVCache("k4v4", num_layers=LAYERS, num_kv_heads=KV_HEADS, head_size=HEAD, num_pages=16)

    prompt = cache.new_sequence()
    k, v = torch.randn(2, LAYERS, 200, KV_HEADS, HEAD)
    cache.append(prompt, k, v)
    print(cache)

    # A second sequence shares the prompt's pages; only the page it writes to is copied.
    branch = cache.fork(prompt)
    slots = cache.extend(branch, 1)
    for layer in range(LAYERS):
        q = torch.randn(1, 1, QUERY_HEADS, HEAD)
        cache.store(layer, torch.randn(1, KV_HEADS, HEAD), torch.randn(1, KV_HEADS, HEAD), slots)
        out, _ = cache.decode(layer, q, [branch], scale=HEAD**-0.5)
    print(f"attention of {list(q.shape)} gives {list(out.shape)}")
    print(f"{cache.bytes_in_use:,} of {cache.bytes_allocated:,} bytes in use, {cache.bytes_per_token} bytes per token")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache.safetensors"
        cache.save(file)
        copy = PagedKVCache.load_file(file)
        same = all(torch.equal(a, b) for a, b in zip(cache.load(0, branch), copy.load(0, 1), strict=True))
        print(f"saved, loaded: {copy}, the same: {same}")


if __name__ == "__main__":
    main()
