"""A transformers cache whose K and V are what another system would read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from kvfold.errors import UnsupportedModelError
from kvfold.eval.rivals.codec import Rival

SKIPPED_BITS = 16
"""Of a coordinate in a layer that is left alone: the systems that leave some alone run models in 16 bits."""


class RivalLayer(DynamicLayer):
    """A layer that stores the round trip of what it is given, in the model's dtype.

    Args:
        chunk: What the queries of several new tokens see of those: their stored values (``packed``) or what was given
            (``exact``).
    """

    def __init__(self, rival: Rival, chunk: str) -> None:
        super().__init__()
        self.rival, self.chunk = rival, chunk

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new K and V ``[B, H, n, d]``; return those of all tokens.

        Raises:
            FormatError: The system cannot store heads of this size.
        """
        self.rival.bits(key_states.shape[-1], value_states.shape[-1])
        pairs = ((self.rival.k, key_states), (self.rival.v, value_states))
        stored = super().update(*(codec.round_trip(x).to(x.dtype) for codec, x in pairs), *args, **kwargs)
        n = key_states.shape[2]
        if self.chunk == "packed" or n == 1:
            return stored
        keys, values = (
            torch.cat([old[:, :, :-n], new], dim=2) for old, new in zip(stored, (key_states, value_states), strict=True)
        )
        return keys, values


class RivalCache(Cache):
    """``DynamicCache`` with every layer that sees all tokens replaced, but for those that the system leaves alone.

    The model runs its own attention. Layers with a window or with linear attention stay what they are, as in
    :class:`kvfold.KVCache`.

    Args:
        config: The model's config.
        rival: What to simulate.
        chunk: See :class:`RivalLayer`.

    Raises:
        UnsupportedModelError: No layer would be compressed.
    """

    def __init__(self, config: Any, rival: Rival, chunk: str = "packed") -> None:
        layers: list[Any] = list(DynamicCache(config=config).layers)
        self.rival, self.chunk = rival, chunk
        plain = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        hybrid = any(hasattr(layer, "conv_states") for layer in layers)
        self.skipped = set() if hybrid else rival.skipped(len(layers)).intersection(plain)
        for index in set(plain) - self.skipped:
            layers[index] = RivalLayer(rival, chunk)
        super().__init__(layers=layers)
        if not self.rival_layers:
            raise UnsupportedModelError(
                f"{rival.name} compresses no layer of {type(config).__name__}"
                + (f": it leaves layers {sorted(self.skipped)} alone" if self.skipped else "")
            )

    @property
    def rival_layers(self) -> dict[int, Any]:
        """The compressed layers by their index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, RivalLayer)}

    def bits_per_element(self) -> float:
        """All-in bits of the compressed and the skipped layers; at least one token must be stored."""
        sizes = list(self._sizes())
        return sum(bits for bits, _ in sizes) / sum(elements for _, elements in sizes)

    def bytes_per_token(self) -> float:
        """Bytes that a token of a row would take over all layers: the system's own, 16 bits where it skips a layer, and
        the live bytes of the others. At least one token must be stored."""
        counted = {*self.rival_layers, *self.skipped}
        live = sum(_live_bytes(vars(layer)) for index, layer in enumerate(self.layers) if index not in counted)
        first = next(iter(self.rival_layers.values()))
        rows, tokens = first.keys.shape[0], first.get_seq_length()
        return sum(bits for bits, _ in self._sizes()) / 8 + live / rows / tokens

    def _sizes(self) -> Iterator[tuple[float, int]]:
        """Bits and elements of a token in every layer that is compressed or skipped."""
        for index in sorted({*self.rival_layers, *self.skipped}):
            layer: Any = self.layers[index]
            heads, size, size_v = layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]
            bits = SKIPPED_BITS * (size + size_v) if index in self.skipped else self.rival.bits(size, size_v)
            yield heads * bits, heads * (size + size_v)

    def __repr__(self) -> str:
        kept = [
            f"{index}: {type(layer).__name__}"
            for index, layer in enumerate(self.layers)
            if not isinstance(layer, RivalLayer)
        ]
        what = f"simulated in {len(self.rival_layers)} of {len(self.layers)} layers"
        if kept:
            what += f"; uncompressed: {', '.join(kept)}"
        return f"{type(self).__name__}({self.rival}, chunk={self.chunk}, {what})"


def _live_bytes(value: Any) -> int:
    """Bytes of the floating tensors in a value, in its lists and dicts too."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.is_floating_point() else 0
    if isinstance(value, dict):
        return sum(map(_live_bytes, value.values()))
    return sum(map(_live_bytes, value)) if isinstance(value, (list, tuple)) else 0
