"""The operations as torch custom ops, for tracing: the same functions, with a layout spelled out in the schema.

In eager mode a call goes straight to :mod:`kvfold.ops`; the dispatcher's overhead is paid only inside
``torch.compile``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops.options import AttentionOptions


@torch.library.custom_op("kvfold::store_kv", mutates_args=("pages",))
def _store_kv(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, previous: torch.Tensor | None,
    format: str, page_size: int,
) -> None:  # fmt: skip
    layout = PageLayout.of(format, k.shape[-1], v.shape[-1], page_size)
    ops.store_kv(k, v, pages, slots, layout, previous=previous)


@_store_kv.register_fake
def _(k, v, pages, slots, previous, format, page_size):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("kvfold::decode_attention", mutates_args=())
def _decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    format: str,
    head_size_v: int,
    page_size: int,
    scale: float,
    first: torch.Tensor | None,
    query_start: torch.Tensor | None,
    lag: int,
    window: int | None,
    softcap: float | None,
    mask: torch.Tensor | None,
    batch_invariant: bool,
    inputs_ready: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = PageLayout.of(format, q.shape[-1], head_size_v, page_size)
    out, lse = ops.decode_attention(
        q, pages, block_table, seq_lens, layout, scale=scale, first=first, query_start=query_start, lag=lag,
        window=window, softcap=softcap, mask=mask, batch_invariant=batch_invariant, inputs_ready=inputs_ready,
    )  # fmt: skip
    return out.contiguous(), lse.contiguous()


@_decode_attention.register_fake
def _(q, pages, block_table, seq_lens, format, head_size_v, *rest):  # type: ignore[no-untyped-def]
    batch, num_queries, heads, _ = q.shape
    return q.new_empty(batch, num_queries, heads, head_size_v), q.new_empty(
        batch, heads, num_queries, dtype=torch.float32
    )


@torch.library.custom_op("kvfold::prefill_attention", mutates_args=())
def _prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    format: str,
    head_size_v: int,
    page_size: int,
    scale: float,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = PageLayout.of(format, q.shape[-1], head_size_v, page_size)
    out, lse = ops.prefill_attention(
        q, pages, block_table, context_lens, cu_seqlens, layout, scale=scale, k=k, v=v, window=window, softcap=softcap,
        mask=mask,
    )  # fmt: skip
    return out.contiguous(), lse.contiguous()


@_prefill_attention.register_fake
def _(q, pages, block_table, context_lens, cu_seqlens, format, head_size_v, *rest):  # type: ignore[no-untyped-def]
    tokens, heads, _ = q.shape
    return q.new_empty(tokens, heads, head_size_v), q.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("kvfold::load_kv", mutates_args=())
def _load_kv(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    tokens: int,
    format: str,
    head_size: int,
    head_size_v: int,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = ops.load_kv(pages, block_table, PageLayout.of(format, head_size, head_size_v, page_size), tokens)
    return k.contiguous(), v.contiguous()


@_load_kv.register_fake
def _(pages, block_table, tokens, format, head_size, head_size_v, page_size):  # type: ignore[no-untyped-def]
    shape = (block_table.shape[0], tokens, pages.shape[1])
    return (
        pages.new_empty(*shape, head_size, dtype=torch.float32),
        pages.new_empty(*shape, head_size_v, dtype=torch.float32),
    )


class LayoutName(NamedTuple):
    """What a layout is made of, as constants that tracing can carry."""

    format: str
    head_size: int
    head_size_v: int
    page_size: int

    def layout(self) -> PageLayout:
        return PageLayout.of(*self)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, previous: torch.Tensor | None,
    name: LayoutName,
) -> None:  # fmt: skip
    """:func:`kvfold.ops.store_kv`, traceable; formats without a key reference take no ``previous``."""
    if torch.compiler.is_compiling():
        torch.ops.kvfold.store_kv(k, v, pages, slots, previous, name.format, name.page_size)
    else:
        ops.store_kv(k, v, pages, slots, name.layout(), previous=previous)


def load_kv(
    pages: torch.Tensor, block_table: torch.Tensor, name: LayoutName, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`kvfold.ops.load_kv`, traceable."""
    if torch.compiler.is_compiling():
        k, v = torch.ops.kvfold.load_kv(pages, block_table, tokens, *name)
        return k, v
    return ops.load_kv(pages, block_table, name.layout(), tokens)


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    name: LayoutName,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`kvfold.ops.decode_attention`, traceable."""
    if torch.compiler.is_compiling():
        out, lse = torch.ops.kvfold.decode_attention(
            q, pages, block_table, seq_lens, name.format, name.head_size_v, name.page_size, *options
        )
        return out, lse
    return ops.decode_attention(q, pages, block_table, seq_lens, name.layout(), **options._asdict())


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    name: LayoutName,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`kvfold.ops.prefill_attention`, traceable; of the options it takes scale, softcap, window and mask."""
    scale, window, softcap, mask = options.scale, options.window, options.softcap, options.mask
    if torch.compiler.is_compiling():
        out, lse = torch.ops.kvfold.prefill_attention(
            q, pages, block_table, context_lens, cu_seqlens, name.format, name.head_size_v, name.page_size,
            scale, k, v, window, softcap, mask,
        )  # fmt: skip
        return out, lse
    return ops.prefill_attention(
        q, pages, block_table, context_lens, cu_seqlens, name.layout(), scale=scale, k=k, v=v, window=window,
        softcap=softcap, mask=mask,
    )  # fmt: skip
