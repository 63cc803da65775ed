"""Vectors kept as they are, in bfloat16, float16 or float32: the yardstick, and what a layer that must not lose uses.

``f32`` is lossless for every dtype that a model computes in; ``bf16`` and ``f16`` for models of that dtype.
"""

from __future__ import annotations

import torch

from kvfold.formats import Side

_DTYPES = {
    "bf16": (torch.bfloat16, torch.int16),
    "f16": (torch.float16, torch.int16),
    "f32": (torch.float32, torch.int32),
}


def encode(x: torch.Tensor, side: Side) -> tuple[torch.Tensor, None]:
    """Vectors ``[..., d]`` to the bit patterns of the side's dtype, as integers of that width."""
    dtype, bits = _DTYPES[side.dtype]
    return x.to(dtype).view(bits), None


def decode(codes: torch.Tensor, scale: None, side: Side) -> torch.Tensor:
    """Bit patterns to vectors in float32."""
    dtype, _ = _DTYPES[side.dtype]
    return codes.view(dtype).float()
