"""Requests that a small engine of vLLM's parts serves step by step, each result compared with plain attention."""

# ruff: noqa: I001 (the stand-in comes before vLLM)
from __future__ import annotations

from typing import Any

import torch

import vllm_stand_in as stand_in  # skips where vLLM is not installed

from kvfold import ops
from kvfold.integrations.vllm.impl import as_pages
from kvfold.layout import PageLayout
from vllm_stand_in import Engine, config

PACKED = {"turboquant": {"chunk": "packed"}}
SLACK = {torch.bfloat16: 6e-3, torch.float16: 1e-3}  # a rounding of the result, relative to its norm


class Served:
    """Sequences with random K and V, served step by step and compared with plain attention."""

    def __init__(self, engine: Engine, layer: int = 0) -> None:
        self.engine, self.layer = engine, layer
        self.keys: list[torch.Tensor] = []  # [tokens, H, d] as the model made them
        self.values: list[torch.Tensor] = []
        self.q: list[torch.Tensor] = []  # [tokens, Hq, d]
        self.layout = PageLayout.of(engine.layers[layer].get_attn_backend().format, engine.head_size, page_size=64)
        settings = engine.layers[layer].impl.settings
        self.exact = settings.chunk == "exact" and not engine.layers[layer].impl.shares
        self.done: list[int] = []

    def add(self, tokens: int, of: int | None = None, shared: int = 0) -> int:
        """A request of so many tokens in the end; its first ``shared`` tokens are those of another (a prefix hit)."""
        e, generator = self.engine, torch.Generator().manual_seed(len(self.keys))
        for store, heads in ((self.keys, e.kv_heads), (self.values, e.kv_heads), (self.q, e.heads)):
            x = torch.randn(tokens, heads, e.head_size, generator=generator).to(e.dtype)
            if of is not None:
                x[:shared] = store[of][:shared]
            store.append(x)
        seq = e.add()
        if of is not None:
            assert shared % e.block_size == 0
            e.blocks[seq] = e.blocks[of][: shared // e.block_size]
        self.done.append(shared)
        return seq

    def step(self, new: dict[int, int], **options: Any) -> dict[int, torch.Tensor]:
        """Serve the next tokens of some sequences, in this order, and check each result. Returns them."""
        e = self.engine
        rows = [(seq, self.done[seq], count) for seq, count in new.items()]
        metadata, slots = e.step(rows, **options)
        pad = options.get("pad_tokens", 0)
        q, k, v = (
            torch.cat([*(store[seq][at : at + count] for seq, at, count in rows), store[0][:1].repeat(pad, 1, 1)])
            for store in (self.q, self.keys, self.values)
        )  # fmt: skip
        out = e.run(metadata, slots, q.flatten(1), k.flatten(1), v.flatten(1), self.layer).unflatten(1, (e.heads, -1))
        results, begin = {}, 0
        one = next(iter(metadata.values()))
        decodes = {(d.begin + i * d.query_len) for d in one.decodes for i in range(len(d.seq_lens))}
        for seq, start, count in rows:
            self.done[seq] = start + count
            results[seq] = out[begin : begin + count]
            wanted = self.expected(seq, start, count, self.exact and begin not in decodes)
            error = (results[seq].double() - wanted).norm() / wanted.norm()
            assert error < SLACK[e.dtype], f"sequence {seq}, tokens {start} to {start + count}: {error:.2e}"
            begin += count
        return results

    def expected(self, seq: int, start: int, count: int, exact: bool) -> torch.Tensor:
        """Attention in float64 to what is stored, and to the chunk itself as it came if ``exact``: ``[n, Hq, d]``."""
        e = self.engine
        table = torch.tensor([self._pages(seq)], dtype=torch.int32)
        cache = e.layers[self.layer].kv_cache
        pages = as_pages(cache, e.kv_heads, self.layout)
        k, v = (x[0].double() for x in ops.load_kv(pages, table, self.layout, start + count))
        if exact:
            k[start:], v[start:] = (x[seq][start : start + count].double() for x in (self.keys, self.values))
        group = e.heads // e.kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", self.q[seq][start : start + count].double(), k) * e.scale
        softcap = e.layers[self.layer].impl.softcap
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = torch.arange(start + count) > torch.arange(start, start + count)[:, None]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    def _pages(self, seq: int) -> list[int]:
        n = self.engine.block_size // 64
        return [block * n + i for block in self.engine.blocks[seq] for i in range(n)]


def speculating(tokens: int, **options: Any) -> Any:
    """A configuration whose steps verify ``tokens`` drafts."""
    cfg = config(**options)
    cfg.speculative_config = stand_in.types.SimpleNamespace(
        num_speculative_tokens=tokens, parallel_drafting=False, enable_adaptive_verification=False, method="ngram",
        use_eagle=lambda: False, use_dspark=lambda: False,
    )  # fmt: skip
    return cfg
