"""The operations in plain PyTorch: the specification that every kernel is tested against.

They run on any device and for every built format, in float32, and read lengths on the host. Attention goes window by
window with an online softmax, so that a long prefix is never de-quantised whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.ops import references
from kvfold.ops.options import AttentionOptions
from kvfold.rotation import rotate, unrotate

WRITES_OUT = SCHEDULES = False

WINDOW_BYTES = 64 * 2**20
"""Largest de-quantised window of a prefix, in bytes of float32."""

_QUERY_BLOCK = 256
_SCORE_ELEMENTS = 2**24

Loader = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""``load(lo, hi)`` returns K ``[H, hi - lo, dk]`` and V ``[H, hi - lo, dv]``, float32, of tokens lo to hi."""

RangeLoader = Callable[[torch.Tensor, torch.Tensor, PageLayout, int, int], tuple[torch.Tensor, torch.Tensor]]
"""The same from ``(pages, block_table_row, layout, lo, hi)``, in the stored basis."""


# --- store and load ---------------------------------------------------------------------------------------------------


def _record_addresses(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Flat byte addresses ``[T, H, token_bytes]`` of the records in these slots."""
    page, offset = slots // layout.page_size, slots % layout.page_size
    heads = torch.arange(pages.shape[1], device=pages.device)
    tile = (page[:, None] * pages.shape[1] + heads) * layout.page_bytes + (offset // TILE * layout.tile_bytes)[:, None]
    return tile[..., None] + layout.addresses(pages.device)[offset % TILE][:, None, :]


def store_kv(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout,
    previous: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`kvfold.ops.store_kv`."""
    if layout.format.mean and previous is not None:
        references.open_pages(k, pages, slots, previous, layout)
    kept = slots >= 0
    if not kept.all():
        k, v, slots = k[kept], v[kept], slots[kept]
    subtracted = references.of_slots(pages, slots, layout) if layout.format.mean else None
    pages.view(-1)[_record_addresses(pages, slots, layout)] = layout.encode(k, v, subtracted)


def load_range(
    pages: torch.Tensor, block_table_row: torch.Tensor, layout: PageLayout, lo: int, hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens lo to hi of one sequence: K ``[H, hi - lo, dk]`` and V, float32, in the stored basis."""
    first, last = lo // layout.page_size, -(-hi // layout.page_size)
    held = block_table_row[first:last].long()
    tiles = pages[held][..., : layout.reference].unflatten(2, (-1, layout.tile_bytes))  # [pages, H, tiles, bytes]
    records = tiles[..., layout.addresses(pages.device).flatten()].unflatten(3, (TILE, layout.token_bytes))
    wanted = slice(lo - first * layout.page_size, hi - first * layout.page_size)
    k, v = layout.decode(records.permute(1, 0, 2, 3, 4).flatten(1, 3)[:, wanted])
    return (k + references.of_tokens(pages, held, layout)[:, wanted] if layout.format.mean else k), v


def load_kv(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout, tokens: int, load: RangeLoader = load_range
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.load_kv`."""
    rows = [load(pages, row, layout, 0, tokens) for row in block_table]
    k = torch.stack([k for k, _ in rows]).transpose(1, 2)
    v = torch.stack([v for _, v in rows]).transpose(1, 2)
    return unrotate(k) if layout.format.k.rotated else k, unrotate(v) if layout.format.v.rotated else v


# --- attention --------------------------------------------------------------------------------------------------------


def attend(
    q: torch.Tensor,
    load: Loader,
    lo: int,
    hi: int,
    *,
    query_start: int,
    window_tokens: int,
    lag: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence's queries to tokens lo to hi, window by window.

    The query t has position ``p = query_start + t`` and sees token j if ``lo <= j < hi``, ``j <= p - lag``, ``j > p -
    window`` and ``mask[t, j]``.

    Args:
        q: ``[H, G, Tq, d]`` float32, already scaled and in the basis that ``load`` returns K in.
        mask: ``[Tq, >= hi]`` bool.

    Returns:
        out ``[H, G, Tq, dv]`` and log-sum-exp of the scores ``[H, G, Tq]``, natural logarithm; 0 and -inf where a query
        sees nothing.
    """
    heads, group, num_queries, _ = q.shape
    lo = max(lo, 0)
    parts = []
    for begin in range(0, num_queries, _QUERY_BLOCK):
        block = q[:, :, begin : begin + _QUERY_BLOCK]
        rows = block.shape[2]
        position = torch.arange(rows, device=q.device)[:, None] + (query_start + begin)
        last = min(hi, query_start + begin + rows - lag)
        start = lo if window is None else max(lo, query_start + begin - window + 1)
        top = q.new_full((heads, group, rows, 1), -torch.inf)
        total = q.new_zeros((heads, group, rows, 1))
        acc: torch.Tensor | None = None
        for left in range(start, last, window_tokens):
            right = min(left + window_tokens, last)
            k, v = load(left, right)
            token = torch.arange(left, right, device=q.device)
            visible = token <= position - lag
            if window is not None:
                visible &= token > position - window
            if mask is not None:
                visible &= mask[begin : begin + rows, left:right]
            scores = block @ k[:, None].transpose(-1, -2)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = torch.where(visible, scores, -torch.inf)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            safe = torch.where(new_top == -torch.inf, 0.0, new_top)
            p = torch.exp(scores - safe)
            fade = torch.exp(top - safe)
            total = total * fade + p.sum(-1, keepdim=True)
            product = _weighted_sum(p, v[:, None], visible)
            acc = product if acc is None else acc * fade + product
            top = new_top
        if acc is None:
            acc = q.new_zeros((heads, group, rows, load(lo, lo)[1].shape[-1]))
        out = torch.where(total == 0, 0.0, acc / total)
        parts.append((out, (top + total.log()).squeeze(-1)))
    if not parts:
        return q.new_empty(heads, group, 0, load(lo, lo)[1].shape[-1]), q.new_empty(heads, group, 0)
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _weighted_sum(p: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """``p @ v``, but a NaN or infinity in V reaches only those queries that see its token (0 * NaN is NaN)."""
    bad = ~torch.isfinite(v).all(-1)[..., None, :]
    spoilt = (visible & bad).any(-1, keepdim=True)
    return torch.where(spoilt, torch.nan, p @ torch.where(bad.transpose(-1, -2), 0.0, v))


def _window_tokens(heads: int, head_size: int, head_size_v: int) -> int:
    return max(TILE, WINDOW_BYTES // (4 * heads * (head_size + head_size_v)) // TILE * TILE)


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    options: AttentionOptions,
    load: RangeLoader = load_range,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.decode_attention`."""
    batch, num_queries, num_heads, _ = q.shape
    heads = pages.shape[1]
    rotated = rotate(q) if layout.format.k.rotated else q.float()
    rotated = (
        (rotated * options.scale)
        .view(batch, num_queries, heads, num_heads // heads, layout.head_size)
        .permute(0, 2, 3, 1, 4)
    )
    window_tokens = _window_tokens(heads, layout.head_size, layout.head_size_v)
    outs, lses = [], []
    for b in range(batch):
        length = int(seq_lens[b])
        out, lse = attend(
            rotated[b],
            partial(load, pages, block_table[b], layout),
            0 if options.first is None else int(options.first[b]),
            length,
            query_start=length - num_queries if options.query_start is None else int(options.query_start[b]),
            window_tokens=window_tokens,
            lag=options.lag,
            window=options.window,
            softcap=options.softcap,
            mask=None if options.mask is None else options.mask[b],
        )
        outs.append(out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, layout.head_size_v))
        lses.append(lse.reshape(num_heads, num_queries))
    result = torch.stack(outs)
    return (unrotate(result) if layout.format.v.rotated else result).to(q.dtype), torch.stack(lses)


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.exact_attention`. Reads nothing on the host, so that it traces and captures."""
    scale, first, query_start, _, window, softcap, mask, *_ = options
    assert query_start is not None
    batch, num_queries, num_heads, _ = q.shape
    length, heads = k.shape[1:3]
    queries = (q.float() * scale).unflatten(2, (heads, num_heads // heads)).permute(0, 2, 3, 1, 4)
    keys, values = k.float().permute(0, 2, 3, 1).unsqueeze(2), v.float().transpose(1, 2).unsqueeze(2)
    token = torch.arange(length, device=q.device) + key_start[:, None]
    outs, lses = [], []
    block = max(16, _SCORE_ELEMENTS // max(1, batch * num_heads * length))
    for begin in range(0, num_queries, block):
        end = min(begin + block, num_queries)
        position = torch.arange(begin, end, device=q.device) + query_start[:, None]
        visible = token[:, None] <= position[..., None]
        if window is not None:
            visible &= token[:, None] > position[..., None] - window
        if first is not None:
            visible &= (token >= first[:, None])[:, None]
        if mask is not None:
            columns = token.clamp(0, mask.shape[-1] - 1)[:, None].expand(-1, end - begin, -1)
            visible &= mask[:, begin:end].gather(2, columns)
        scores = queries[:, :, :, begin:end] @ keys
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = torch.where(visible[:, None, None], scores, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        p = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
        mixed = _weighted_sum(p, values, visible[:, None, None])
        outs.append(mixed.permute(0, 3, 1, 2, 4).flatten(2, 3))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=1).to(q.dtype), torch.cat(lses, dim=2)


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    layout: PageLayout,
    options: AttentionOptions,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    load: RangeLoader = load_range,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.prefill_attention`."""
    outs, lses = [], []
    bounds = cu_seqlens.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        queries, length = q[None, begin:end], context_lens[b : b + 1]
        query_start = length if k is not None else length - (end - begin)
        own = options._replace(
            query_start=query_start,
            mask=None if options.mask is None else options.mask[b : b + 1, : end - begin],
        )
        out, lse = decode_attention(queries, pages, block_table[b : b + 1], length, layout, own, load)
        if k is not None and v is not None:
            chunk = exact_attention(queries, k[None, begin:end], v[None, begin:end], length, own)
            out, lse = merge_states([(out, lse), chunk])
        outs.append(out[0])
        lses.append(lse[0])
    if not outs:
        return q.new_zeros((0, q.shape[1], layout.head_size_v)), q.new_zeros((q.shape[1], 0), dtype=torch.float32)
    return torch.cat(outs), torch.cat(lses, dim=1)


def merge_states(states: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvfold.ops.merge_states`."""
    lses = torch.stack([lse for _, lse in states])
    total = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - torch.where(total == -torch.inf, 0.0, total)).transpose(-1, -2).unsqueeze(-1)
    mixed = sum(weight * out.float() for weight, (out, _) in zip(weights, states, strict=True))
    assert isinstance(mixed, torch.Tensor)
    return mixed.to(states[0][0].dtype), total


def apply_sink_logits(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> torch.Tensor:
    """See :func:`kvfold.ops.apply_sink_logits`."""
    share = torch.sigmoid(lse - sink_logits.float()[:, None])
    return (out.float() * share.transpose(-1, -2).unsqueeze(-1)).to(out.dtype)
