"""Key references of pages: which vector is subtracted from a page's keys, and how it comes back. In plain PyTorch.

Real keys share a large mean that rotary embeddings turn slowly with the position; what is subtracted need not be
quantised, and a score gets ``q · reference`` back once per page. Any vector is right and a near one is good. A page's
is chosen when its first slot is written, from the rotated keys that are nearest to what the page will hold:

1. without a page before it, the sequence's first key, if it stands apart from those that this call writes behind it in
   the page: if its distance from their mean, squared, is more than 1.5 times what theirs are on average. Not if they
   would be more than twice as long without it as they are, in mean square. Else it and these, as in 2, however few. In
   formats with exact sinks, whose keys are not read here, the keys behind these, as in 2, or if there are none they;
2. the keys that this call writes to the page, if they are a quarter of it or more (a prefill);
3. else, of the page before it in the sequence, the keys that this call writes, if they are half of it or more,
4. or those it holds already, as they were stored (decoding).

Of several keys the mean is taken if at least half of them are nearer to it than to zero; else zero is (one huge key
would make the mean a bad reference for all others). Keys that are not finite do not count.

Rule 1 is for what trained models do: nearly every head attends to the first token, whatever comes, and its key is short
and unlike all others, so that its error weighs more than that of the whole page. As the reference it is nearly exact.
The others lose the mean that they could have had; what they may lose beside it is bounded by the factor of two.

A sequence's tokens are consecutive in a call and their slots ascend within a page, as all callers write them.
"""

from __future__ import annotations

import torch

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.rotation import rotate


def of_tokens(pages: torch.Tensor, table: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The references ``[H, n * page_size, d]`` of the tokens of the pages ``table`` ``[n]``, one per token."""
    picked = pages[..., layout.reference :][table.long()]
    return layout.decode_reference(picked).transpose(0, 1).repeat_interleave(layout.page_size, dim=1)


def of_slots(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The references ``[T, H, d]`` of the pages that ``slots`` ``[T]`` lie in; of negative slots anything."""
    return layout.decode_reference(pages[..., layout.reference :][slots.clamp(min=0) // layout.page_size])


def open_pages(
    k: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, previous: torch.Tensor, layout: PageLayout
) -> None:
    """Write the references of the pages whose first slot is among ``slots``; before these tokens are stored.

    Args:
        k: ``[T, H, d]`` in the model's basis.
        slots: int64 ``[T]``, negative ones dropped.
        previous: int64 ``[T]``: for tokens in a first slot the page before theirs, or -1.
    """
    size = layout.page_size
    opening = ((slots >= 0) & (slots % size == 0)).nonzero().flatten().tolist()
    if not opening:
        return
    where, before = slots.tolist(), previous.tolist()
    opened, means = [], []
    for token in opening:
        own = _run(where, token, size)
        page, other = where[token] // size, before[token]
        # of the page before: how many of its last tokens this call writes
        fresh = _run_back(where, token, other, size) if other >= 0 else 0
        opened.append(page)
        if other < 0:
            sinks = layout.format.sinks
            keys = rotate(k[token : token + own])
            means.append(_mean(keys[sinks if own > sinks else 0 :]) if sinks else _first(keys))
        elif own >= size // 4:
            means.append(_mean(rotate(k[token : token + own])))
        elif fresh >= size // 2:
            means.append(_mean(rotate(k[token - fresh : token])))
        else:
            means.append(_mean(_stored(pages[other], size - fresh, layout)))
    pages[opened, :, layout.reference :] = layout.encode_reference(torch.stack(means))


def _run(slots: list[int], token: int, size: int) -> int:
    """Tokens from ``token`` on whose slots follow each other in its page."""
    count = 1
    while count < size and token + count < len(slots) and slots[token + count] == slots[token] + count:
        count += 1
    return count


def _run_back(slots: list[int], token: int, page: int, size: int) -> int:
    """Tokens before ``token`` whose slots are the last of ``page``."""
    count = 0
    while count < size and token > count and slots[token - 1 - count] == page * size + size - 1 - count:
        count += 1
    return count


def _stored(page: torch.Tensor, tokens: int, layout: PageLayout) -> torch.Tensor:
    """The first keys ``[tokens, H, d]`` of a page ``[H, page_bytes]``, in the stored basis."""
    tiles = page[:, : layout.reference].unflatten(1, (-1, layout.tile_bytes))
    records = tiles[..., layout.addresses(page.device).flatten()].unflatten(2, (TILE, layout.token_bytes))
    keys, _ = layout.decode(records.flatten(1, 2)[:, :tokens])
    return (keys + layout.decode_reference(page)[:, None]).transpose(0, 1)


def _first(keys: torch.Tensor) -> torch.Tensor:
    """Of a sequence's first keys ``[n, H, d]``: ``[H, d]``, the first where it stands apart and is near (rule 1)."""
    finite = torch.isfinite(keys).all(dim=-1, keepdim=True)
    largest = torch.where(finite, keys, 0.0).abs().amax(dim=(0, -1), keepdim=True).clamp(min=1e-30)  # as in _mean
    scaled = torch.where(finite, keys / largest, 0.0)
    first, others, counted = scaled[0], scaled[1:], finite[1:]
    count = counted.sum(dim=0)
    centre = others.sum(dim=0) / count.clamp(min=1)
    spread = torch.where(counted, others - centre, 0.0).square().sum(dim=(0, -1))
    distance = (first - centre).square().sum(dim=-1) * count[:, 0]
    apart = distance >= 1.5 * spread
    near = distance + spread <= 2 * others.square().sum(dim=(0, -1))
    return torch.where((finite[0, :, 0] & apart & near)[:, None], keys[0], _mean(keys))


def _mean(keys: torch.Tensor) -> torch.Tensor:
    """Of keys ``[n, H, d]``: ``[H, d]``, zero where that is nearer to most of them."""
    finite = torch.isfinite(keys).all(dim=-1, keepdim=True)
    counted = torch.where(finite, keys, 0.0)
    count = finite.sum(dim=0).clamp(min=1)
    mean = (counted / count).sum(dim=0)
    largest = counted.abs().amax(dim=(0, -1), keepdim=True).clamp(min=1e-30)  # squares of 1e30 overflow
    scaled, centre = counted / largest, mean / largest
    nearer = (scaled - centre).square().sum(-1, keepdim=True) < scaled.square().sum(-1, keepdim=True)
    good = 2 * (nearer & finite).sum(dim=0) >= count
    return torch.where(good & torch.isfinite(mean).all(dim=-1, keepdim=True), mean, 0.0)
