"""Which of a model's layers keep keys and values, and how many of them. Pure Python, no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kvfold.errors import PlanError
from kvfold.formats import check_head_size

FULL, SLIDING, LINEAR, SHARED = "full", "sliding", "linear", "shared"
KINDS = (FULL, SLIDING, LINEAR, SHARED)
"""Attention to every token; to the last ``window``; no keys and values per token; another layer's cache."""
MAX_LAYERS = 10_000
"""Layers of a model at most. A sanity check: a mistyped count shall not fill the memory."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a model that are alike.

    Attributes:
        kind: One of :data:`KINDS`.
        layers: How many layers.
        num_kv_heads: KV heads of each; 0 where the layer keeps nothing of its own.
        head_size: Coordinates of a key.
        head_size_v: Coordinates of a value.
        window: Tokens that a sliding layer sees.

    Raises:
        PlanError: A count that is not a positive whole number, or an unknown kind.
        FormatError: A head size that does not exist.
    """

    kind: str
    layers: int
    num_kv_heads: int = 0
    head_size: int = 0
    head_size_v: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"layer kind {self.kind!r} is not one of {', '.join(KINDS)}")
        positive(self.layers, "number of layers")
        if self.kind in (FULL, SLIDING):
            positive(self.num_kv_heads, "number of KV heads")
            check_head_size(self.head_size)
            check_head_size(self.head_size_v)
        if self.kind == SLIDING:
            positive(self.window, "window")

    def __str__(self) -> str:
        if self.kind in (LINEAR, SHARED):
            return f"{self.layers} {self.kind}"
        sizes = f"{self.head_size}" if self.head_size == self.head_size_v else f"{self.head_size} + {self.head_size_v}"
        heads = f"{self.num_kv_heads} KV head{'s' * (self.num_kv_heads > 1)} of {sizes}"
        window = f", window {self.window}" if self.kind == SLIDING else ""
        return f"{self.layers} {self.kind} ({heads}{window})"


@dataclass(frozen=True)
class ModelShape:
    """What a model's KV cache is made of.

    Attributes:
        groups: The layers, alike ones together, in the order in which they first appear.
        itemsize: Bytes of an element in the model's dtype.
        name: What the model is called in messages.
        max_positions: Longest sequence the model was made for, in tokens, if known.
        notes: What had to be assumed or is not counted.
        order: For each layer of the model the place of its group in ``groups``; empty where the layers of a group
            follow each other, group after group.

    Raises:
        PlanError: ``order`` has another number of layers than the groups.
    """

    groups: tuple[LayerGroup, ...]
    itemsize: int = 2
    name: str = ""
    max_positions: int | None = None
    notes: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = {place: group.layers for place, group in enumerate(self.groups)}
        if self.order and Counter(self.order) != counts:
            raise PlanError(f"order has {dict(Counter(self.order))} layers of the groups, which have {counts}")
        if list(self.order) == self._one_after_the_other:  # shapes that say the same are equal
            object.__setattr__(self, "order", ())

    @property
    def _one_after_the_other(self) -> list[int]:
        return [place for place, group in enumerate(self.groups) for _ in range(group.layers)]

    @cached_property
    def layers(self) -> tuple[LayerGroup, ...]:
        """For each layer of the model, from the first to the last, the group that it belongs to."""
        return tuple(self.groups[place] for place in self.order or self._one_after_the_other)

    @cached_property
    def compressed_layers(self) -> dict[int, LayerGroup]:
        """The layers that a format applies to, by their place in the model, each with its group."""
        return {index: group for index, group in enumerate(self.layers) if group.kind == FULL}

    @property
    def compressed(self) -> tuple[LayerGroup, ...]:
        """The layers that a format applies to: those with full attention."""
        return tuple(group for group in self.groups if group.kind == FULL)

    @property
    def uncompressed(self) -> tuple[LayerGroup, ...]:
        """The layers that stay as they are."""
        return tuple(group for group in self.groups if group.kind != FULL)

    @staticmethod
    def uniform(
        layers: int, kv_heads: int, head_size: int, head_size_v: int | None = None, itemsize: int = 2, name: str = ""
    ) -> ModelShape:
        """A model whose layers all have full attention and the same heads."""
        return ModelShape((LayerGroup(FULL, layers, kv_heads, head_size, head_size_v or head_size),), itemsize, name)

    @staticmethod
    def from_config(source: Mapping[str, object] | str | os.PathLike[str]) -> ModelShape:
        """Read the shape from a Hugging Face config.

        Args:
            source: The config as a dictionary, the path of a ``config.json``, or that of a directory with one in it.

        Raises:
            PlanError: There is no such file, it is not a config, or a key is missing or makes no sense.
            UnsupportedModelError: The config describes layers that are not understood.
            OSError: The file is there but cannot be read.
        """
        from kvfold.modelconfig import read_shape  # there, because it needs the classes above

        return read_shape(source)


def positive(value: object, what: str) -> int:
    """Return ``value`` if it is a whole number from 1, else raise :class:`PlanError` naming ``what``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{what}: {value!r} is not a whole number from 1")
    return value
