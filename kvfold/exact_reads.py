"""Which tokens a query of a paged cache reads exactly, and which it reads packed.

The pages hold every token; a query leaves out those that it has exactly. With S sinks and a tail of T tokens, of which
a sequence has those from ``exact_from`` on, the query at position p reads exactly

* the sinks, ``j < S``;
* the tail, ``exact_from <= j`` and ``p - T < j``, as long as that is at hand (:mod:`kvfold.exact_rows`);
* of a chunk whose K and V come with the queries (``chunk=exact``) the chunk, and the tail as it was before it. A chunk
  of one token slides the tail to its own end.

Everything else up to p it reads packed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from kvfold import ops
from kvfold.exact_rows import FAR, View
from kvfold.layout import PageLayout
from kvfold.ops.options import AttentionOptions
from kvfold.ops.picked import Picked, picked_attention

State = tuple[torch.Tensor, torch.Tensor]


class Packed(NamedTuple):
    """Packed tokens to attend to: those before ``seq_lens`` ``[B]``, but for sinks and for ``lag`` before the query."""

    seq_lens: torch.Tensor
    first: torch.Tensor
    lag: int = 0


class Reading(NamedTuple):
    """What the queries of a batch read, as tensors for all layers of a step."""

    query_start: torch.Tensor  # int32 [B]
    packed: tuple[Packed, ...]
    picked: Picked | None  # None: nothing exact


@lru_cache(maxsize=512)  # all blocks of a long chunk, so that other layers find them
def reading(
    views: tuple[View, ...], starts: tuple[int, ...], num_queries: int, sinks: int, tail: int, window: int | None,
    device: torch.device, chunk: tuple[int, int] | None = None,
) -> Reading:  # fmt: skip
    """What queries at positions ``starts[b]`` to ``starts[b] + num_queries`` read beside their chunk.

    Args:
        views: Where each sequence's exact tokens are.
        window: Visible tokens per query, its own included.
        chunk: Where the chunk begins and ends that these queries are of, if it comes with them; of a batch of one.
    """
    row, exact_from, begin, behind = torch.tensor(views).unsqueeze(-1).unbind(1)  # [B, 1] each
    start = torch.tensor(starts)[:, None]
    end = start + num_queries if chunk is None else torch.full_like(start, chunk[0])
    if chunk is None:
        oldest, reach = start - tail + 1, tail
    else:
        oldest, reach = end - tail + (chunk[1] - chunk[0] == 1), FAR

    sink = torch.arange(sinks).expand(len(views), -1)
    ring = oldest + torch.arange(int((end - oldest).max()) if tail else 0)
    position = torch.cat([sink, ring], dim=1)
    known = torch.cat([sink < end, (ring >= exact_from.clamp(min=sinks)) & (ring < end)], dim=1)
    reaches = torch.cat([torch.full_like(sink, FAR), torch.full_like(ring, reach)], dim=1)
    until = position + (reaches if window is None else reaches.clamp(max=window))
    place = torch.where(position < sinks, position, sinks + position % max(tail, 1)) + row
    place = torch.where(position < begin, place, position - begin + behind)
    known &= (until > start) & (position < start + num_queries)
    columns = torch.stack([place, position, until.clamp(max=2 * FAR - 1)]) * known

    def on_device(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.int32).to(device)

    packed = [
        Packed(on_device(lens[:, 0]), on_device(first[:, 0]), lag)
        for lens, first, lag in _packed(start, end, exact_from, num_queries, sinks, tail, chunk is not None, oldest)
        if bool((lens > first).any())
    ]
    # what sees nothing at all must still have a result
    picked = Picked(*on_device(columns)) if bool(known.any()) or (chunk is None and not packed) else None
    return Reading(on_device(start[:, 0]), tuple(packed), picked)


def _packed(
    start: torch.Tensor, end: torch.Tensor, exact_from: torch.Tensor, num_queries: int, sinks: int, tail: int,
    own: bool, oldest: torch.Tensor,
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:  # fmt: skip
    """Up to where, from where and with which lag tokens are read packed, each ``[B, 1]``: one call, or two."""
    first = torch.full_like(start, sinks)
    if not tail:
        return [(end, first, 0)]
    if own or num_queries == 1:
        return [(torch.minimum(torch.maximum(exact_from, oldest), end), first, 0)]
    if bool((exact_from <= oldest).all()):  # what slides out of each query's tail follows on what is packed
        return [(end, first, tail)]
    if bool((exact_from >= end - tail).all()):  # nothing slides out
        return [(torch.minimum(exact_from, end), first, 0)]
    return [(torch.minimum(exact_from, end), first, 0), (end, torch.maximum(exact_from, first), tail)]


def attend(
    q: torch.Tensor, pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout, what: Reading,
    k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, state: State | None = None,
) -> State:  # fmt: skip
    """Attention of q ``[B, Tq, Hq, dk]`` to what they read.

    Args:
        k: The tensor ``[N, H, dk]`` that the views are of. v: likewise.
        options: Scale, softcap and window.
        state: The result over the queries' own chunk.

    Returns:
        As :func:`kvfold.ops.decode_attention`.
    """
    for lens, first, lag in what.packed:
        more = ops.decode_attention(
            q, pages, block_table, lens, layout, scale=options.scale, first=first, query_start=what.query_start,
            lag=lag, window=options.window, softcap=options.softcap,
        )  # fmt: skip
        state = more if state is None else ops.merge_states([state, more])
    if what.picked is None:
        assert state is not None
        return state
    return picked_attention(
        q, k, v, what.picked, what.query_start, layout, scale=options.scale, softcap=options.softcap, before=state
    )
