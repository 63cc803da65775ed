"""Pages to attend to, and a dense attention over them in float64 that shares no code with ``kvfold.ops``."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvfold.formats import TILE
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.rotation import rotation_matrix

POISON = 0xFF
"""What unwritten bytes hold: NaN as a bfloat16 scale, as an e4m3 code and as an exact element."""

FORMATS = (
    *(f"k{bits}v{bits}" for bits in range(1, 9)),
    *("k4v4+plain", "k4v3+nc", "k8v2+mse+pre5", "kf8vf8", "kf8castv4", "kf8v4", "bf16", "exact"),
    *("k2tv3t", "k4tv2+nc", "k3v4t", "k4v4+mean", "k3tv2t+mean", "k8vf8+mean"),
)
ALONE = tuple(spec for spec in FORMATS if "+mean" not in spec)
"""Formats that code each vector alone: what a token becomes depends on no other."""

EPS = 2.0**-24
"""Largest relative error of rounding to float32."""


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- pages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Sequences in poisoned pages of no pattern; unused table entries are a poisoned page."""

    layout: PageLayout
    pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor

    def row(self, b: int) -> Cache:
        return replace(self, table=self.table[b : b + 1], lengths=self.lengths[b : b + 1])

    def slots(self, b: int) -> torch.Tensor:
        position, size = torch.arange(int(self.lengths[b])), self.layout.page_size
        return self.table[b].long()[position // size] * size + position % size

    def previous(self, b: int) -> torch.Tensor | None:
        """What :func:`kvfold.ops.store_kv` wants to know of the tokens of a sequence, if the format has references."""
        if not self.layout.format.mean:
            return None
        index = torch.arange(int(self.lengths[b])) // self.layout.page_size
        return torch.where(index > 0, self.table[b].long()[index - 1], -1)

    def vectors(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[n, H, dk]`` and V of a sequence as they are stored, un-rotated, in float64."""
        slots = self.slots(b)
        return decode_records(self.records(slots), self.layout, self.references(slots))

    def references(self, slots: torch.Tensor) -> torch.Tensor | None:
        """The key references ``[n, H, dk]`` of the pages of these slots, in the stored basis and in float64."""
        if not self.layout.format.mean:
            return None
        begin, d = self.layout.page_size * self.layout.token_bytes, self.layout.head_size
        record = self.pages[:, :, begin:][slots // self.layout.page_size]
        scale = record[..., -2:].contiguous().view(torch.bfloat16)
        return record[..., :d].contiguous().view(torch.int8).double() * scale.double()

    def records(self, slots: torch.Tensor) -> torch.Tensor:
        """The bytes ``[n, H, token_bytes]`` of the tokens in these slots, one token at a time."""
        size, heads, wanted = self.layout.page_size, self.pages.shape[1], self.layout.addresses()
        rows = []
        for slot in slots.tolist():
            tiles = self.pages[slot // size, :, : size * self.layout.token_bytes]
            tile = tiles.unflatten(1, (-1, self.layout.tile_bytes))[:, slot % size // TILE]
            rows.append(tile[:, wanted[slot % TILE]])
        return torch.stack(rows) if rows else self.pages.new_empty(0, heads, self.layout.token_bytes)


def decode_records(
    records: torch.Tensor, layout: PageLayout, references: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Records, and the key references of their pages, to K and V in the model's basis, un-rotated in float64."""
    restored = []
    both = zip(layout.decode(records), (layout.format.k, layout.format.v), (references, None), strict=True)
    for x, side, subtracted in both:
        x = x.double() if subtracted is None else x.double() + subtracted
        restored.append(x @ torch.from_numpy(rotation_matrix(x.shape[-1])) if side.rotated else x)
    return restored[0], restored[1]


def empty_cache(layout: PageLayout, lengths: Sequence[int], heads: int = 2, spare: int = 3, seed: int = 0) -> Cache:
    """Pages for sequences of these lengths, nothing stored yet."""
    counts = [-(-length // layout.page_size) for length in lengths]
    total = sum(counts) + spare
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(lengths), max(counts, default=0) + 1), int(order[-1]), dtype=torch.int32)
    taken = 0
    for b, count in enumerate(counts):
        table[b, :count] = order[taken : taken + count]
        taken += count
    pages = torch.full(layout.page_shape(total, heads), POISON, dtype=torch.uint8)
    return Cache(layout, pages, table, torch.tensor(lengths))


def fill(cache: Cache, b: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store a sequence's K ``[n, H, dk]`` and V, with the reference: who stores is not what these tests are about."""
    reference.store_kv(k, v, cache.pages, cache.slots(b), cache.layout, cache.previous(b))


def make_cache(layout: PageLayout, lengths: Sequence[int], heads: int = 2, spare: int = 3, seed: int = 0) -> Cache:
    """Sequences of normal vectors."""
    cache = empty_cache(layout, lengths, heads, spare, seed)
    for b, length in enumerate(lengths):
        k = noise(length, heads, layout.head_size, seed=seed + 2 * b + 1)
        fill(cache, b, k, noise(length, heads, layout.head_size_v, seed=seed + 2 * b + 2))
    return cache


# --- dense attention --------------------------------------------------------------------------------------------------


def sees(
    num_queries: int,
    tokens: int,
    query_start: int | None = None,
    first: int = 0,
    lag: int = 0,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Who sees what, bool ``[Tq, tokens]``: the sentence of ``ops.decode_attention``'s docstring, query by query."""
    start = tokens - num_queries if query_start is None else query_start
    table = torch.zeros(num_queries, tokens, dtype=torch.bool)
    for t in range(num_queries):
        p = start + t
        for j in range(tokens):
            table[t, j] = first <= j <= p - lag and (window is None or j > p - window)
    return table if mask is None else table & mask[:, :tokens]


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[Tq, Hq, dk]`` to K ``[n, H, dk]``, V ``[n, H, dv]``, in the dtype of K.

    A token that a query does not see is not there at all, so that whatever it holds cannot leak.

    Returns:
        out ``[Tq, Hq, dv]`` and the log-sum-exp ``[Hq, Tq]``.
    """
    num_queries, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    out = k.new_zeros(num_queries, num_heads, v.shape[2])
    lse = k.new_full((num_heads, num_queries), -torch.inf)
    for t in range(num_queries):
        seen = visible[t].nonzero().flatten()
        if not len(seen):
            continue
        keys = k[seen].repeat_interleave(group, dim=1)
        values = v[seen].repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,nhd->hn", q[t].to(k.dtype) * scale, keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[t] = torch.einsum("hn,nhd->hd", torch.softmax(scores, dim=-1), values)
        lse[:, t] = torch.logsumexp(scores, dim=-1)
    return out, lse


State = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Expected:
    """The truth in float64, the same in plain float32, and how large a score may get, ``[Hq, Tq]``: |q| |k| scale."""

    truth: State
    plain: State
    condition: torch.Tensor

    @staticmethod
    def stack(parts: Sequence[Expected], varlen: bool = False) -> Expected:
        """Of a batch, or with ``varlen`` of chunks one after the other."""
        if varlen:
            truth, plain = (
                (torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states], dim=1))
                for states in ([part.truth for part in parts], [part.plain for part in parts])
            )
            return Expected(truth, plain, torch.cat([part.condition for part in parts], dim=1))
        truth, plain = (
            (torch.stack([out for out, _ in states]), torch.stack([lse for _, lse in states]))
            for states in ([part.truth for part in parts], [part.plain for part in parts])
        )
        return Expected(truth, plain, torch.stack([part.condition for part in parts]))


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float | None = None
) -> Expected:
    """What attention of float32 q ``[Tq, Hq, dk]`` to K and V in float64 gives."""
    group = q.shape[1] // k.shape[1]
    sizes = k.norm(dim=2).repeat_interleave(group, dim=1)  # [n, Hq]
    largest = torch.where(visible[..., None], sizes, 0.0).amax(dim=1) if len(k) else q.new_zeros(q.shape[:2]).double()
    return Expected(
        dense(q, k, v, visible, scale, softcap),
        dense(q, k.float(), v.float(), visible, scale, softcap),
        (q.double().norm(dim=2) * largest * scale).T,
    )


def assert_close(got: State, want: Expected) -> None:
    """``got`` is at most four times as far from the float64 truth as the same attention in plain float32 is.

    As root mean square over all outputs, which is stable where a maximum is a lottery. Plain float32 may be lucky, and
    does not rotate: a few roundings of the output are allowed too, and two of the largest score that a query may have.
    """
    (out, lse), (true_out, true_lse), (plain_out, plain_lse) = got, want.truth, want.plain
    assert out.shape == true_out.shape
    assert lse.shape == true_lse.shape
    nothing = true_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing), "who sees nothing"
    rounding = EPS * (6 + 2 * want.condition)
    size = true_out * rounding.transpose(-1, -2).unsqueeze(-1)
    _compare(out.double() - true_out, plain_out.double() - true_out, size, "out")
    seen = ~nothing
    size = rounding + 6 * EPS * true_lse.abs()
    _compare((lse.double() - true_lse)[seen], (plain_lse.double() - true_lse)[seen], size[seen], "log-sum-exp")


def _compare(error: torch.Tensor, plain: torch.Tensor, rounding: torch.Tensor, name: str) -> None:
    allowed = 4 * plain.norm() + rounding.norm()
    assert error.norm() <= allowed, f"error of {name} {error.norm():.3g}, allowed {allowed:.3g}"


# --- memory -----------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that tensors have at a time which are made inside, as far as they are not freed again.

    Attributes:
        most: So many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._live = 0
        self._seen: set[int] = set()
        self._counts = True

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """For what stands for a kernel, and takes what that would not, also in cycles that keep its arguments."""
        self._counts = False
        try:
            yield
        finally:
            gc.collect()
            self._counts = True

    def _freed(self, key: int, size: int) -> None:
        self._live -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def storages(tree: Any) -> list[Any]:
            return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result) if self._counts else ():
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._seen:
                self._seen.add(key)
                self._live += size
                self.most = max(self.most, self._live)
                weakref.finalize(storage, self._freed, key, size)
        return result
