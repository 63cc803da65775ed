"""Attention to exact tokens that are picked one by one out of a tensor of tokens: sinks, a ring's tail, a chunk.

On a GPU it is one launch of :mod:`kvfold.ops.triton.exact`; the plain PyTorch here specifies it, and runs elsewhere.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch

from kvfold import ops
from kvfold.errors import ShapeError
from kvfold.layout import PageLayout
from kvfold.ops.options import AttentionOptions


class Picked(NamedTuple):
    """Tokens of each sequence, int32 ``[B, W]``, and who sees them: queries at positions from ``seen_from`` up to, and
    without, ``seen_until``. Where the two are equal nobody does, and the token may hold anything."""

    token: torch.Tensor  # which of the N
    seen_from: torch.Tensor
    seen_until: torch.Tensor


def picked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, picked: Picked, query_start: torch.Tensor, layout: PageLayout, *,
    scale: float, softcap: float | None = None, before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of a few query tokens per sequence to exact tokens, on top of attention to other tokens.

    Args:
        q: ``[B, Tq, Hq, dk]``, query head i using KV head ``i // (Hq // H)``.
        k: ``[N, H, dk]``, tokens in no order. v: ``[N, H, dv]``, of k's dtype.
        picked: Which of them are whose.
        query_start: int32 or int64 ``[B]``, position of the first query.
        layout: Of the pages that hold the other tokens: the kernels that serve those serve here.
        scale, softcap: As in :func:`kvfold.ops.decode_attention`.
        before: The result over other tokens, as :func:`kvfold.ops.decode_attention` returns it.

    Returns:
        As :func:`kvfold.ops.decode_attention`, over both.

    Raises:
        ShapeError: A tensor has the wrong shape, dtype or device.
    """
    ops._check("q", q, (None, None, None, None), k.device)
    ops._check("k", k, (None, None, q.shape[3]), k.device)
    ops._check("v", v, (*k.shape[:2], None), k.device)
    if k.dtype != v.dtype:
        raise ShapeError(f"k and v are of one dtype, not {k.dtype} and {v.dtype}")
    ops._check_groups(q.shape[2], k.shape[1])
    for name, tensor in picked._asdict().items():
        ops._check_integer(name, tensor, (q.shape[0], picked.token.shape[1]), k.device, torch.int32)
    ops._check_integer("query_start", query_start, (q.shape[0],), k.device)
    ops._check_options(None, softcap)
    if not (q.shape[0] and q.shape[1]):
        empty = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        return q.new_empty(*q.shape[:3], v.shape[2]), empty
    options = AttentionOptions(scale, query_start=query_start, softcap=softcap)
    implementation = ops.choose(k.device, layout).__name__.rpartition(".")[2]
    if implementation in ("triton", "cuda") and ops._why_not("triton", k.device, layout) is None:
        return import_module("kvfold.ops.triton.exact").picked_attention(q, k, v, picked, options, before)
    return reference(q, k, v, picked, options, before)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, picked: Picked, options: AttentionOptions,
    before: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See :func:`picked_attention`."""
    assert options.query_start is not None
    batch, num_queries = q.shape[:2]
    position = (options.query_start[:, None] + torch.arange(num_queries, device=q.device))[..., None]
    visible = (position >= picked.seen_from[:, None]) & (position < picked.seen_until[:, None])
    token = picked.token.long()
    # every token is "before" the queries, and the mask alone decides
    zeros = torch.zeros(batch, dtype=torch.int64, device=q.device)
    state = ops.exact_attention(
        q, k[token], v[token], scale=options.scale, key_start=zeros, query_start=zeros + token.shape[1],
        softcap=options.softcap, mask=visible,
    )  # fmt: skip
    return state if before is None else ops.merge_states([before, state])
