"""What a rival's format is made of: a round trip for K, one for V, what they cost, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from kvfold.errors import FormatError

RoundTrip = Callable[[torch.Tensor], torch.Tensor]
SKIP = "+skip"


@dataclass(frozen=True)
class Codec:
    """How a system stores one vector.

    Attributes:
        round_trip: ``[..., d]`` of any floating dtype to float32 ``[..., d]`` in the same basis: what attention
            computes with after the vector was stored and read back. Scales, zero points and norms go through the dtype
            in which the system stores them; all other arithmetic is float32.
        code_bits: Bits of a coordinate's code.
        meta_bits: Bits of the scales, zero points and norms of a group.
        group: Coordinates of a group, or 0 for the whole vector.
        sizes: Tells whether a head size can be stored.
        sizes_text: The same in words, after "head sizes ".
    """

    round_trip: RoundTrip
    code_bits: int
    meta_bits: int
    group: int = 0
    sizes: Callable[[int], bool] = lambda size: True
    sizes_text: str = "of any number of coordinates"

    def bits(self, head_size: int) -> float:
        """All-in bits of a vector of ``head_size`` coordinates, codes and everything stored beside them."""
        return self.code_bits * head_size + self.meta_bits * (head_size / self.group if self.group else 1)


@dataclass(frozen=True)
class Rival:
    """Another system's KV cache format.

    Attributes:
        name: What `kvfold fidelity --format` calls it.
        what: One line for a reader.
        source: Where its arithmetic was read.
        boundary: Layers at either end of the model that the system leaves in the model's dtype.
    """

    name: str
    what: str
    source: str
    k: Codec
    v: Codec
    boundary: int = 0

    def __str__(self) -> str:
        return self.name

    def with_skipped_layers(self, boundary: int) -> Rival:
        """The same with ``boundary`` layers at either end left alone; its name ends in ``+skip``."""
        return replace(self, name=self.name + SKIP, boundary=boundary)

    def bits(self, head_size: int, head_size_v: int) -> float:
        """Bits of one token of one KV head in a layer that is compressed.

        Raises:
            FormatError: The system cannot store vectors of these sizes.
        """
        for codec, size in ((self.k, head_size), (self.v, head_size_v)):
            if not codec.sizes(size):
                raise FormatError(f"{self.name} stores head sizes {codec.sizes_text}, not {size}")
        return self.k.bits(head_size) + self.v.bits(head_size_v)

    def skipped(self, layers: int) -> set[int]:
        """Indices of the layers that are left alone in a model of ``layers`` layers: never more than half at an end."""
        count = min(self.boundary, layers // 2)
        return {*range(count), *range(layers - count, layers)}


def multiple_of(divisor: int) -> Callable[[int], bool]:
    return lambda size: size % divisor == 0


def power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


@lru_cache(maxsize=64)
def hadamard(order: int, device: torch.device) -> torch.Tensor:
    """Sylvester's Hadamard matrix over the root of its order: float32, symmetric and orthogonal. Read only: shared."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(order)).to(device)


def rotate_blocks(x: torch.Tensor, order: int) -> torch.Tensor:
    """Multiply consecutive ``order`` coordinates of float32 ``[..., d]`` by the Hadamard matrix; its own inverse."""
    return (x.unflatten(-1, (-1, order)) @ hadamard(order, x.device)).flatten(-2)


def largest_power_of_two(size: int) -> int:
    """The largest power of two that divides ``size``."""
    return size & -size


def half(x: torch.Tensor) -> torch.Tensor:
    """To float16 and back."""
    return x.half().float()


def half_like(x: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """To the 16 bits of a model that computes like ``model`` and back: bfloat16 where it does, else float16."""
    return x.to(torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16).float()
