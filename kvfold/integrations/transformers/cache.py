"""The cache object that a user hands to ``model.generate(past_key_values=...)``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from kvfold.errors import FormatError, UnsupportedModelError
from kvfold.formats import check_page_size
from kvfold.integrations.transformers.attention import NAME
from kvfold.integrations.transformers.layers import PackedLayer, StaticPackedLayer
from kvfold.layerformats import ModelFormat, ModelFormatSpec
from kvfold.layout import PageLayout

CHUNK_RULES = ("exact", "packed")
_log = logging.getLogger("kvfold")


@dataclass(frozen=True)
class CacheMemory:
    """Live bytes of a cache, read off its tensors.

    Attributes:
        compressed: Bytes of the compressed layers: pages, exact sinks and tail.
        uncompressed: Bytes of the layers that stay as they are.
        tokens: Tokens stored per row.
        capacity: Tokens per row that fit into the compressed layers' buffers.
        rows: Batch rows.
    """

    compressed: int
    uncompressed: int
    tokens: int
    capacity: int
    rows: int

    @property
    def total(self) -> int:
        return self.compressed + self.uncompressed


class KVCache(Cache):
    """A key-value cache whose full-attention layers are stored in a compressed format.

    Layers that see every token are compressed; sliding-window, linear-attention and shared layers stay what they are in
    ``DynamicCache`` and are named in ``repr``. Beams, left padding, cropping, repeats, selection, chunked prefill and
    assisted decoding work as with ``DynamicCache``; with ``max_length`` the buffers are fixed and decoding compiles
    with ``fullgraph=True``.

    Attention runs on the packed bytes when the model runs the attention that :func:`attach` sets (:meth:`for_model`
    does it). With any other attention, and in models that compute with K and V on the way, the layer hands out
    de-quantised
    tensors: right, but slow.

    Args:
        config: The model's config.
        format: What to store: any spelling that :meth:`KVFormat.parse` knows, for all layers, or one of
            :mod:`kvfold.layerformats` with formats for single layers, by their place in the model
            (``k3v3@0-1=k4v4``). Exact sinks and tails are each layer's own too.
        max_length: Fixed number of tokens, or None to grow.
        page_size: Tokens of a page: 16, 32 or 64.
        chunk: What the queries of a chunk of several tokens see of their own chunk: ``exact`` K and V, or ``packed``
            bytes. A single decoded token always reads packed bytes. ``packed`` makes the output independent of how a
            prompt is cut into chunks.
        skip_layers: Indices of layers to leave uncompressed.

    Raises:
        FormatError: The format, page size or chunk rule does not exist, or does not fit the head size; or the format
            names a layer that the model does not have or that is not compressed.
        NotBuiltError: The format is well spelled but not built yet.
        UnsupportedModelError: The model cannot be served.
    """

    def __init__(
        self,
        config: Any,
        format: ModelFormatSpec = "k4v4",
        *,
        max_length: int | None = None,
        page_size: int = 64,
        chunk: str = "exact",
        skip_layers: Collection[int] = (),
    ) -> None:
        self.format = ModelFormat.parse(format).require_built()
        check_page_size(page_size)
        if chunk not in CHUNK_RULES:
            raise FormatError(f"chunk={chunk!r} is not one of {', '.join(map(repr, CHUNK_RULES))}")
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(config).__name__} is an encoder-decoder: its cross-attention cache is not compressed; "
                "use EncoderDecoderCache"
            )
        text = config.get_text_config(decoder=True)
        _check_head_size(text, self.format, page_size)
        usual: Cache
        plain: type
        if max_length is None:
            usual, plain = DynamicCache(config=config), DynamicLayer
        elif max_length >= 1:
            usual, plain = StaticCache(config=config, max_cache_len=max_length), StaticLayer
        else:
            raise FormatError(f"max_length={max_length!r} is not a positive number of tokens")
        if not usual.layers:
            raise UnsupportedModelError(f"{type(config).__name__} does not say how many layers it has")
        for index in skip_layers:
            if not 0 <= index < len(usual.layers):
                raise FormatError(f"skip_layers has {index}, and the model has layers 0 to {len(usual.layers) - 1}")
        layers: list[Any] = list(usual.layers)
        for index, layer in enumerate(layers):
            if type(layer) is not plain or index in skip_layers:
                continue
            fmt = self.format.layer(index)
            if max_length is None:
                layers[index] = PackedLayer(text, fmt, page_size, chunk)
            else:
                layers[index] = StaticPackedLayer(text, fmt, page_size, chunk, max_length)
        super().__init__(layers=layers)
        self.page_size, self.chunk = page_size, chunk
        self.format.require_layers(len(layers), self.compressed_layers)
        if not self.compressed_layers:
            raise UnsupportedModelError(
                f"{type(config).__name__} has no layer that can be compressed: {self._uncompressed_kinds()}; "
                f"use DynamicCache"
            )

    @classmethod
    def for_model(cls, model: PreTrainedModel, format: ModelFormatSpec = "k4v4", **options: Any) -> KVCache:
        """A cache for a model, which from now on runs attention on packed bytes (:func:`attach`).

        Args:
            model: Any decoder model of transformers.
            format: See :class:`KVCache`, as for the other options.
        """
        cache = cls(model.config, format, **options)
        attach(model)
        if model.device.type != "cpu":
            for layer in cache.compressed_layers.values():
                layer.is_compileable = False  # the reference reads lengths on the host, which a CUDA graph cannot
        return cache

    @property
    def compressed_layers(self) -> dict[int, PackedLayer]:
        """The compressed layers by their index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)}

    def memory(self) -> CacheMemory:
        """Count the bytes of the live buffers."""
        packed = list(self.compressed_layers.values())
        others = [layer for layer in self.layers if not isinstance(layer, PackedLayer)]
        compressed = sum(buffer.nbytes for layer in packed for buffer in layer.buffers())
        return CacheMemory(
            compressed=compressed,
            uncompressed=sum(_live_bytes(layer) for layer in others),
            tokens=int(packed[0].length),
            capacity=packed[0].capacity,
            rows=packed[0].batch_size if packed[0].is_initialized else 0,
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every layer.

        Raises:
            UnsupportedModelError: A layer of transformers' own cannot (sliding windows of fixed size).
        """
        stuck = [
            f"{index}: {type(layer).__name__}" for index, layer in enumerate(self.layers) if not hasattr(layer, "crop")
        ]
        if stuck:
            raise UnsupportedModelError(
                f"layers {', '.join(stuck)} cannot be cropped in transformers, so assisted decoding needs a "
                f"growing cache: "
                "leave max_length out"
            )
        super().crop(tokens_to_remove)

    def _uncompressed_kinds(self) -> str:
        kinds = Counter(type(layer).__name__ for layer in self.layers if not isinstance(layer, PackedLayer))
        return ", ".join(f"{count} {name}" for name, count in kinds.items()) or "none"

    def __repr__(self) -> str:
        packed = self.compressed_layers
        what = f"compressed {len(packed)} of {len(self.layers)} layers"
        kept = [f"{index}: {type(layer).__name__}" for index, layer in enumerate(self.layers) if index not in packed]
        if kept:
            what += f"; uncompressed: {', '.join(kept)}"
        return f"{type(self).__name__}({self.format}, chunk={self.chunk}, {what})"


def _live_bytes(layer: Any) -> int:
    """Bytes of a layer that is not ours: K, V and recurrent states."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.nbytes
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    for name in ("keys", "values", "conv_states", "recurrent_states", "indexer_keys"):
        visit(getattr(layer, name, None))
    return sum(found.values())


def _check_head_size(text: Any, format: ModelFormat, page_size: int) -> None:
    """Refuse a head size now, where the config tells it; models that do not tell are checked at their first update."""
    size = getattr(text, "head_dim", None)
    if size is None and getattr(text, "kv_lora_rank", None) is None:
        heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
        size = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None
    if isinstance(size, int):
        for fmt in format.formats:
            PageLayout.of(fmt, size, None, page_size)


_previous: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def attach(model: PreTrainedModel) -> None:
    """Make a model run kvfold's attention. Without a compressed cache that is PyTorch's own attention."""
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation == NAME:
        return
    _previous[model] = text._attn_implementation
    _set_attention(model, NAME)
    if text._attn_implementation != NAME:
        _log.warning(
            "%s does not take a registered attention: its compressed cache is read de-quantised, which is slow",
            type(model).__name__,
        )


def detach(model: PreTrainedModel) -> None:
    """Give a model the attention back that it had before :func:`attach`."""
    if model in _previous:
        _set_attention(model, _previous.pop(model))


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention of the decoder; a vision or audio tower keeps its own."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        model.set_attn_implementation(implementation)
    else:
        keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
        model.set_attn_implementation(dict.fromkeys(keys, implementation))
