"""One compressed layer of a transformers cache, growing or of fixed size.

A layer owns pages for a batch of rows of equal length: row b has the pages ``b * P`` to ``(b + 1) * P``, so its block
table is the identity and beams, repeats and selections are copies of packed bytes, bit for bit.

Exact sinks and tail are copies beside the pages. The pages hold every token, so cropping only shortens; after it
the tail has fewer exact tokens than it could, until new ones fill it again.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvfold.errors import CapacityError, ShapeError, UnsupportedModelError
from kvfold.formats import KVFormat
from kvfold.integrations.transformers.attention import NAME, LazyPackedKV, PackedKV
from kvfold.layout import PageLayout
from kvfold.ops import library

GROWTH = 128
"""Tokens by which a growing layer is enlarged. A step's copy moves packed bytes, once in that many tokens."""

_log = logging.getLogger("kvfold")
_said: set[str] = set()
_SHARED_ON_COPY = ("config", "format", "layout")


class PackedLayer(CacheLayerMixin):
    """A layer that grows with the sequence.

    Args:
        config: The decoder's config, asked at every update which attention the model runs.
        fmt: What to store.
        page_size: Tokens of a page.
        chunk: ``exact``: queries of a chunk see their own chunk's K and V unquantised; ``packed``: they read page
        bytes.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, config: Any, fmt: KVFormat, page_size: int, chunk: str) -> None:
        super().__init__()
        self.config, self.format, self.page_size, self.chunk = config, fmt, page_size, chunk
        # Models that compute with K and V between cache and attention: MLA for certain, others show it by doing so.
        self.needs_tensors = getattr(config, "kv_lora_rank", None) is not None
        self._forget()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.format})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            clone.__dict__[name] = value if name in _SHARED_ON_COPY else copy.deepcopy(value, memo)
        return clone

    # --- buffers ------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Be empty, and own no buffer."""
        self.is_initialized = False
        self.is_empty = True
        self.pages: torch.Tensor | None = None
        self.block_table: torch.Tensor | None = None
        self.sinks: tuple[torch.Tensor, torch.Tensor] | None = None
        self.ring: tuple[torch.Tensor, torch.Tensor] | None = None
        self.length: Any = 0
        self.exact_from: Any = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Learn batch, heads, head sizes, dtype and device from the first K and V ``[B, H, n, d]``."""
        _check_states(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.layout = PageLayout.of(self.format, key_states.shape[-1], value_states.shape[-1], self.page_size)
        self.name = library.LayoutName(str(self.format), self.layout.head_size, self.layout.head_size_v, self.page_size)

        def exact(tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
            if not tokens:
                return None
            shape = (self.batch_size, tokens, self.num_heads)
            return key_states.new_zeros(*shape, key_states.shape[-1]), value_states.new_zeros(
                *shape, value_states.shape[-1]
            )

        self.sinks, self.ring = exact(self.format.sinks), exact(self.format.tail)
        self._allocate(self._initial_capacity(key_states.shape[2]))
        self.is_initialized = True

    def _initial_capacity(self, tokens: int) -> int:
        return tokens

    def _allocate(self, tokens: int) -> None:
        """Have room for ``tokens`` tokens of every row, and keep what is stored."""
        pages_of_row = -(-max(tokens, 1) // self.page_size)
        fresh = torch.zeros(
            (self.batch_size, *self.layout.page_shape(pages_of_row, self.num_heads)),
            dtype=torch.uint8,
            device=self.device,
        )
        if self.pages is not None:
            fresh[:, : self.pages.shape[1]] = self.pages
        self.pages = fresh
        self._number_pages()

    def _number_pages(self) -> None:
        assert self.pages is not None
        self.batch_size, pages_of_row = self.pages.shape[:2]
        numbers = torch.arange(self.batch_size * pages_of_row, dtype=torch.int32, device=self.device)
        self.block_table = numbers.view(self.batch_size, pages_of_row)

    @property
    def capacity(self) -> int:
        """Tokens of a row that fit into the buffers."""
        return 0 if self.pages is None else self.pages.shape[1] * self.page_size

    def buffers(self) -> list[torch.Tensor]:
        """The live tensors that hold K and V."""
        exact = [tensor for pair in (self.sinks, self.ring) if pair is not None for tensor in pair]
        return exact if self.pages is None else [self.pages, *exact]

    # --- update -------------------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store new K and V ``[B, H, n, d]``; return what attention needs: tensors or :class:`PackedKV`.

        Raises:
            ShapeError: K or V do not fit the ones before.
            CapacityError: The layer has a fixed size and is full.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        first_chunk, self.is_empty = self.is_empty, False
        n = key_states.shape[2]
        self._make_room(n)
        start = self._positions(self.length)
        tail = self._tail_before(self.length)
        exact_from = self._positions(self.exact_from)
        self._store(key_states, value_states)
        self._advance(n)

        compiling = torch.compiler.is_compiling()
        whole = first_chunk and self.chunk == "exact"
        as_tensors = self.needs_tensors or self.config._attn_implementation != NAME
        if whole and (compiling or as_tensors):
            return key_states, value_states
        # A first chunk is handed on as a handle too: so a model that computes with K and V shows it in its prefill,
        # before its decoding is compiled.
        assert self.pages is not None
        assert self.block_table is not None
        keys = (PackedKV if compiling else LazyPackedKV)(
            self.pages.flatten(0, 1), self.block_table, start, key_states, value_states, self.sinks, tail, exact_from,
            self.name.format, self.page_size, self.chunk, whole, False, None if compiling else self,
        )  # fmt: skip
        if not as_tensors:
            return keys, keys._replace(is_value=True)
        if not compiling:
            self._say_that_it_is_slow()
        return self.dequantised(keys)

    def _say_that_it_is_slow(self) -> None:
        """Once for each reason: de-quantising everything at every step must not go unnoticed."""
        attention = self.config._attn_implementation
        reason = (
            "this model computes with K and V between cache and attention"
            if attention == NAME
            else f"the model runs the attention {attention!r}: kvfold.attach(model) makes it read packed bytes"
        )
        if reason not in _said:
            _said.add(reason)
            _log.warning("the compressed cache is read de-quantised at every step, which is slow: %s", reason)

    def _check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        expected = (self.batch_size, self.num_heads, self.layout.head_size, self.layout.head_size_v, self.device)
        got = (k.shape[0], k.shape[1], k.shape[-1], v.shape[-1], k.device)
        if k.dim() != 4 or k.shape[:3] != v.shape[:3] or got != expected:
            raise ShapeError(
                f"this layer holds K [{self.batch_size}, {self.num_heads}, n, {self.layout.head_size}] and V [..., "
                f"{self.layout.head_size_v}] on {self.device}, and was given {list(k.shape)} and "
                f"{list(v.shape)} on {k.device}: "
                "use a fresh cache, or reset() this one"
            )

    def _make_room(self, n: int) -> None:
        if self.length + n > self.capacity:
            self._allocate(-(-(self.length + n) // GROWTH) * GROWTH)

    def _advance(self, n: int) -> None:
        self.length = self.length + n
        self.exact_from = max(self.exact_from, self.length - self.format.tail)

    def _positions(self, value: Any) -> torch.Tensor:
        """A length, which all rows share, as int64 ``[B]``."""
        return torch.full((self.batch_size,), value, dtype=torch.int64, device=self.device)

    def _store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        n = k.shape[2]
        assert self.pages is not None
        position = torch.arange(n, device=self.device) + self.length
        row = torch.arange(self.batch_size, device=self.device)[:, None] * self.capacity
        k_tokens, v_tokens = k.transpose(1, 2), v.transpose(1, 2)  # [B, n, H, d]
        slots = (row + position).flatten()
        previous = None
        if self.format.mean:  # a row's pages follow each other
            first = (position < self.page_size).expand(self.batch_size, n).flatten()
            previous = torch.where(first, -1, slots // self.page_size - 1)
        library.store_kv(
            k_tokens.flatten(0, 1), v_tokens.flatten(0, 1), self.pages.flatten(0, 1), slots, previous, self.name
        )
        if self.sinks is not None:
            source = torch.arange(self.format.sinks, device=self.device) - self.length
            fresh = ((source >= 0) & (source < n))[:, None, None]
            for buffer, tokens in zip(self.sinks, (k_tokens, v_tokens), strict=True):
                buffer.copy_(torch.where(fresh, tokens.index_select(1, source.clamp(0, n - 1)), buffer))
        if self.ring is not None:
            kept = min(n, self.format.tail)
            for buffer, tokens in zip(self.ring, (k_tokens, v_tokens), strict=True):
                buffer.index_copy_(1, position[n - kept :] % self.format.tail, tokens[:, n - kept :])

    def _tail_before(self, length: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Copies of the last tokens before ``length``, in order; positions before ``exact_from`` hold anything."""
        if self.ring is None:
            return None
        tail = self.format.tail
        order = (torch.arange(tail, device=self.device) + length) % tail
        return self.ring[0].index_select(1, order), self.ring[1].index_select(1, order)

    def dequantised(self, kv: PackedKV) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[B, H, tokens, d]`` of all tokens, for models that compute with them between cache and attention.

        The new chunk (``chunk=exact``), sinks and tail are exact. Slow: it takes all tokens at every step.
        """
        n, tokens = kv.k.shape[2], self.visible_tokens()
        position = torch.arange(tokens, device=self.device)
        stored = library.load_kv(kv.pages, kv.block_table, self.name, tokens)
        start, exact_from = kv.start[0], kv.exact_from[0]
        results = []
        for index, (packed, fresh) in enumerate(zip(stored, (kv.k, kv.v), strict=True)):
            x = packed.to(self.dtype)  # [B, L, H, d]
            if kv.sinks is not None:
                count = min(self.format.sinks, tokens)
                known = (position[:count] < start + n)[:, None, None]
                x[:, :count] = torch.where(known, kv.sinks[index][:, :count], x[:, :count])
            if kv.tail is not None:
                x = _overlay(x, kv.tail[index], position, start - self.format.tail, torch.clamp(exact_from, min=0))
            if (kv.chunk == "exact" and n > 1) or kv.tail is not None:
                x = _overlay(x, fresh.transpose(1, 2), position, start, start)
            results.append(x.transpose(1, 2))
        return results[0], results[1]

    def visible_tokens(self) -> int:
        """Tokens of a row that attention is told of: the mask's width."""
        return int(self.length)

    # --- transformers' cache interface --------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if -tokens_to_remove > self.length:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {self.length} tokens")
        self.length = self.length + tokens_to_remove
        self.exact_from = min(self.exact_from, self.length)
        self.is_empty = self.length == 0

    def reset(self) -> None:
        self._forget()

    def _map_rows(self, change: Any) -> None:
        """Replace every buffer by what ``change`` makes of its rows."""
        if not self.is_initialized or self.pages is None:
            return
        self.pages = change(self.pages)
        self.sinks = self.sinks and (change(self.sinks[0]), change(self.sinks[1]))
        self.ring = self.ring and (change(self.ring[0]), change(self.ring[1]))
        self._number_pages()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        if self.is_initialized:
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized and self.pages is not None and self.pages.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        assert self.pages is not None
        self.pages = move(self.pages)
        self.sinks = self.sinks and (move(self.sinks[0]), move(self.sinks[1]))
        self.ring = self.ring and (move(self.ring[0]), move(self.ring[1]))


class StaticPackedLayer(PackedLayer):
    """A layer of fixed size: buffers stay where they are and the length lives on the device, for torch.compile."""

    is_compileable = True

    def __init__(self, config: Any, fmt: KVFormat, page_size: int, chunk: str, max_length: int) -> None:
        self.max_length = max_length
        super().__init__(config, fmt, page_size, chunk)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.exact_from = torch.zeros((), dtype=torch.int64, device=self.device)
        if not torch.compiler.is_compiling():
            for buffer in (*self.buffers(), self.block_table, self.length, self.exact_from):
                torch._dynamo.mark_static_address(buffer)

    def _initial_capacity(self, tokens: int) -> int:
        return self.max_length

    def _make_room(self, n: int) -> None:
        if not torch.compiler.is_compiling() and self.device.type == "cpu" and int(self.length) + n > self.max_length:
            raise CapacityError(
                f"this cache holds {self.max_length} tokens and would need {int(self.length) + n}: make it with "
                f"a larger max_length"
            )

    def _advance(self, n: int) -> None:
        self.length.add_(n)
        self.exact_from.copy_(torch.maximum(self.exact_from, self.length - self.format.tail))

    def _positions(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone().expand(self.batch_size)

    def visible_tokens(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # While empty the first chunk is handed on as it is: no [q, max_length] mask for a prefill.
        if self.is_empty and self.chunk == "exact":
            return query_length, 0
        return self.max_length, 0

    def get_seq_length(self) -> Any:
        return self.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if self.device.type == "cpu" and -tokens_to_remove > int(self.length):
            raise ValueError(f"cannot remove {-tokens_to_remove} of {int(self.length)} tokens")
        self.length.add_(tokens_to_remove)
        self.exact_from.copy_(torch.minimum(self.exact_from, self.length))

    def reset(self) -> None:
        """Be empty; the buffers stay where they are."""
        self.is_empty = True
        if self.is_initialized:
            self.length.zero_()
            self.exact_from.zero_()

    def _map_rows(self, change: Any) -> None:
        raise UnsupportedModelError(
            "a cache of fixed size has a fixed number of rows, which cannot be repeated or selected: "
            "leave max_length out"
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for buffer in self.buffers():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))


def _overlay(
    x: torch.Tensor, exact: torch.Tensor, position: torch.Tensor, start: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """Put exact ``[B, E, H, d]`` of positions start to start + E over x ``[B, L, H, d]``, from position ``first``
    on."""
    source = position - start
    covered = (source >= 0) & (source < exact.shape[1]) & (position >= first)
    return torch.where(covered[:, None, None], exact.index_select(1, source.clamp(0, exact.shape[1] - 1)), x)


def _check_states(k: torch.Tensor, v: torch.Tensor) -> None:
    if (
        k.dim() != 4
        or v.dim() != 4
        or k.shape[:3] != v.shape[:3]
        or not k.dtype.is_floating_point
        or k.dtype != v.dtype
    ):
        raise ShapeError(
            f"K and V are floating tensors [batch, KV heads, tokens, head size], not {k.dtype} {list(k.shape)} and "
            f"{v.dtype} {list(v.shape)}"
        )
