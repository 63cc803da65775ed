# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Attention to exact tokens that are picked one by one, on top of attention to others: one launch.

A program takes a block of rows (query tokens times the heads of a group) of one KV head of one sequence, and goes over
the sequence's tokens; those that none of its rows sees are not read. The result over other tokens counts as one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvfold.ops.options import AttentionOptions
from kvfold.ops.picked import Picked
from kvfold.ops.triton.decode import LN_2, LOG2_E, capped
from kvfold.ops.triton.prefill import _product, _raised
from kvfold.ops.triton.sides import power_of_two
from kvfold.ops.triton.unpack import convert

TOKENS = 32
"""Tokens of a step."""


def picked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, picked: Picked, options: AttentionOptions,
    before: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See :func:`kvfold.ops.picked.picked_attention`."""
    assert options.query_start is not None
    batch, num_queries, num_heads, head_size = q.shape
    heads, head_size_v = k.shape[1], v.shape[2]
    group, softcap = num_heads // heads, options.softcap or 0.0
    out = torch.empty(batch, num_queries, num_heads, head_size_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=q.device)
    if before is not None:
        before = before[0].contiguous(), before[1].contiguous()
    padded, padded_v = (max(16, power_of_two(size)) for size in (head_size, head_size_v))
    rows = num_queries * group
    row_tile = 16 if rows <= 16 else 32
    row_blocks = triton.cdiv(rows, row_tile)
    _attend[(batch * heads * row_blocks,)](
        q, *q.stride(), k, *k.stride(), v, *v.stride(), *(tensor.contiguous() for tensor in picked),
        options.query_start, options.query_start.stride(0), *(before or (out, lse)), out, lse,
        heads, group, num_queries, row_blocks, picked.token.shape[1],
        options.scale * (1.0 if softcap else LOG2_E), softcap,
        HEAD_SIZE=head_size, HEAD_SIZE_V=head_size_v, PADDED=padded, PADDED_V=padded_v, ROWS=row_tile, TOKENS=TOKENS,
        SAME_DTYPE=q.dtype == k.dtype, HAS_BEFORE=before is not None, SOFTCAP=bool(softcap),
        PRECISION="tf32x3" if q.is_cuda and torch.version.hip is None else "ieee",
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["heads", "group", "num_queries", "row_blocks", "width"])
def _attend(
    q, q_batch, q_token, q_head, q_coordinate, k, k_token, k_head, k_coordinate, v, v_token, v_head, v_coordinate,
    tokens, seen_from, seen_until, query_start, query_start_stride, before_out, before_lse, out, lse,
    heads, group, num_queries, row_blocks, width, factor, softcap,
    HEAD_SIZE: tl.constexpr, HEAD_SIZE_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SAME_DTYPE: tl.constexpr, HAS_BEFORE: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows of one KV head of one sequence."""
    program = tl.program_id(0)
    head = program // row_blocks % heads
    batch = (program // row_blocks // heads).to(tl.int64)
    row = program % row_blocks * ROWS + tl.arange(0, ROWS)
    present = row < num_queries * group
    query, my_head = row // group, head * group + row % group
    position = tl.load(query_start + batch * query_start_stride).to(tl.int32) + query

    column, column_v = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    address = q + batch * q_batch + query.to(tl.int64) * q_token + my_head * q_head
    inside = present[:, None] & (column < HEAD_SIZE)[None, :]
    queries = tl.load(address[:, None] + (column * q_coordinate)[None, :], mask=inside, other=0.0)
    if not SAME_DTYPE:
        queries = queries.to(tl.float32)

    state = (batch * (heads * group) + my_head) * num_queries + query
    inside_v = present[:, None] & (column_v < HEAD_SIZE_V)[None, :]
    place = ((batch * num_queries + query) * (heads * group) + my_head)[:, None] * HEAD_SIZE_V + column_v[None, :]
    if HAS_BEFORE:
        acc = tl.load(before_out + place, mask=inside_v, other=0.0).to(tl.float32)
        top = tl.load(before_lse + state, mask=present, other=float("-inf")) / LN_2
        sums = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros((ROWS, PADDED_V), tl.float32)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((ROWS,), tl.float32)

    for left in tl.range(0, width, TOKENS):
        picked = batch * width + left + tl.arange(0, TOKENS)
        there = left + tl.arange(0, TOKENS) < width
        begin = tl.load(seen_from + picked, mask=there, other=0)
        end = tl.load(seen_until + picked, mask=there, other=0)
        visible = (position[:, None] >= begin[None, :]) & (position[:, None] < end[None, :]) & present[:, None]
        read = tl.max(visible.to(tl.int32), axis=0) > 0
        if tl.max(read.to(tl.int32), axis=0) > 0:
            token = tl.load(tokens + picked, mask=there, other=0).to(tl.int64)
            keys = tl.load(
                k + (token * k_token + head * k_head)[None, :] + (column * k_coordinate)[:, None],
                mask=read[None, :] & (column < HEAD_SIZE)[:, None], other=0.0,
            )  # fmt: skip
            values = tl.load(
                v + (token * v_token + head * v_head)[:, None] + (column_v * v_coordinate)[None, :],
                mask=read[:, None] & (column_v < HEAD_SIZE_V)[None, :], other=0.0,
            )  # fmt: skip
            if not SAME_DTYPE:
                keys, values = keys.to(tl.float32), values.to(tl.float32)
            s = _product(queries, keys, tl.zeros((ROWS, TOKENS), tl.float32), PRECISION) * factor
            if SOFTCAP:
                s = capped(s, softcap)
            s = tl.where(visible, s, float("-inf"))
            top, safe, fade = _raised(top, s)
            p = tl.exp2(s - safe[:, None])
            sums = sums * fade + tl.sum(p, axis=1)
            # 0 times NaN is NaN: a bad value reaches only the rows that see its token
            bad = tl.sum(values.to(tl.float32) * 0.0, axis=1) != 0.0
            values = tl.where(bad[:, None], 0.0, values).to(values.dtype)
            spoilt = tl.max((visible & bad[None, :]).to(tl.int32), axis=1) > 0
            acc = _product(convert(p, values.dtype), values, acc * fade[:, None], PRECISION)
            acc = tl.where(spoilt[:, None], float("nan"), acc)

    seen = sums != 0.0
    divisor = tl.where(seen, sums, 1.0)
    acc = tl.where(seen[:, None], acc / divisor[:, None], 0.0)
    tl.store(out + place, convert(acc, out.dtype.element_ty), mask=inside_v)
    tl.store(lse + state, tl.where(seen, (top + tl.log2(divisor)) * LN_2, float("-inf")), mask=present)
