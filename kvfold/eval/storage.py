"""Live bytes of a cache: layers are filled as a model fills them, and what they then hold is read off their memory.

Layers of one kind hold the same, so that a few of them stand for all. Bytes are those of whole storages, each counted
once: a view of a larger tensor counts with all that it keeps alive, and whatever else a layer refers to is counted too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.llama import LlamaConfig

from kvfold.errors import KVFoldError
from kvfold.formats import KVFormat
from kvfold.integrations.transformers import NAME, KVCache
from kvfold.integrations.transformers.attention import attention_forward
from kvfold.modelshape import FULL, SLIDING, LayerGroup

PIECE = 4096
"""Tokens that are stored at once: a longer prompt comes in pieces."""
KINDS = {"pages": "pages", "sinks": "exact", "ring": "exact", "block_table": "tables"}
"""What the tensors of a compressed layer are for, by the attribute that holds them; others are ``other``."""


@dataclass(frozen=True)
class Live:
    """Bytes of one layer at some length.

    Attributes:
        tokens: Tokens stored.
        capacity: Tokens that fit into the buffers.
        pages: Packed pages.
        exact: Exact sinks and tail.
        tables: Block tables.
        plain: Keys and values that are not compressed.
        other: Whatever else the layer refers to.
    """

    tokens: int
    capacity: int
    pages: int = 0
    exact: int = 0
    tables: int = 0
    plain: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return self.pages + self.exact + self.tables + self.plain + self.other


def fill(
    group: LayerGroup,
    fmt: KVFormat | None,
    lengths: Sequence[int],
    *,
    layers: int = 1,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Iterator[Live]:
    """Fill some layers with random keys and values, and count what each holds.

    A length is reached as a model reaches it: a prompt in pieces of :data:`PIECE` tokens, and a last token that is
    decoded, its attention included.

    Args:
        group: Layers of full attention, or with a sliding window; their number does not matter.
        fmt: What layers of full attention store; None for transformers' own cache. A window is never compressed.
        lengths: Tokens, in rising order.
        layers: Layers to fill.
        page_size: Tokens in a page.
        dtype: The model's dtype.
        device: Where.

    Yields:
        For each length what one layer holds. The layers are alive until the next is asked for.

    Raises:
        KVFoldError: The layers do not hold the same.
    """
    cache = _cache(group, fmt, layers, page_size)
    source = torch.Generator(device=device).manual_seed(0)
    shapes = [(1, group.num_kv_heads, min(PIECE, lengths[-1]), size) for size in (group.head_size, group.head_size_v)]
    k, v = (torch.randn(shape, generator=source, device=device).to(dtype) for shape in shapes)
    stored = 0
    for length in lengths:
        for count in (*_pieces(length - 1 - stored), 1):
            for layer in cache:
                keys, values = layer.update(k[:, :, :count], v[:, :, :count])
                if count == 1 and group.kind == FULL:
                    attention_forward(torch.nn.Module(), k[:, :, :1], keys, values, None, scaling=1.0)
            del keys, values
        stored = length
        found = {live_bytes(layer, length) for layer in cache}
        if len(found) != 1:
            raise KVFoldError(f"layers that are alike hold different bytes, which is a bug: {sorted(map(str, found))}")
        yield found.pop()


def _cache(group: LayerGroup, fmt: KVFormat | None, layers: int, page_size: int) -> list[Any]:
    if group.kind == SLIDING:
        return [DynamicSlidingWindowLayer(group.window) for _ in range(layers)]
    if fmt is None:
        return [DynamicLayer() for _ in range(layers)]
    heads, size = group.num_kv_heads, group.head_size
    config = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=size,
        hidden_size=heads * size,
    )  # fmt: skip
    config._attn_implementation = NAME  # as KVCache.for_model sets it: attention reads page bytes
    return list(KVCache(config, fmt, page_size=page_size).layers)


def _pieces(tokens: int) -> list[int]:
    return [min(PIECE, tokens - start) for start in range(0, tokens, PIECE)]


def live_bytes(layer: Any, tokens: int) -> Live:
    """Count what a layer of a transformers cache holds, with ``tokens`` stored in it."""
    counts = dict.fromkeys((*KINDS.values(), "plain", "other"), 0)
    known = KINDS if hasattr(layer, "pages") else {"keys": "plain", "values": "plain"}
    seen: set[int] = set()
    for name, value in sorted(vars(layer).items()):
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                counts[known.get(name, "other")] += storage.nbytes()
    return Live(tokens, getattr(layer, "capacity", tokens), **counts)


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    """The tensors in a value: itself, or what lists, tuples and dictionaries hold."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def requested_bytes(device: torch.device) -> int | None:
    """Bytes that all live tensors of a CUDA device asked PyTorch's allocator for; None where nobody counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    count = torch.cuda.memory_stats(device).get("requested_bytes.all.current")
    return None if count is None else int(count)
