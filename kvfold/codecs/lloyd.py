"""TurboQuant_mse (arXiv 2504.19874, section 3.1): Lloyd–Max per coordinate of the rotated, normalised vector.

Each coordinate, in units that :mod:`kvfold.codecs.scaling` chooses, becomes the nearest of 2^b levels.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from kvfold.codebooks import lloyd_max
from kvfold.codecs import scaling
from kvfold.formats import Side


@lru_cache(maxsize=256)
def tables(bits: int, head_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels ``[2^bits]`` by code and thresholds ``[2^(bits-1) - 1]``, float32 on ``device``. Read only: shared."""
    book = lloyd_max(bits, head_size)
    levels = torch.from_numpy(book.levels).to(device=device, dtype=torch.float32)
    return levels, torch.from_numpy(book.thresholds).to(device=device, dtype=torch.float32)


def encode(y: torch.Tensor, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated vectors ``[..., d]`` to codes and scales; see :func:`kvfold.codecs.encode`."""
    return scaling.encode(y, side, partial(_nearest, bits=int(side.bits)))


def _nearest(z: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    levels, thresholds = tables(bits, z.shape[-1], z.device)
    index = torch.bucketize(z.abs(), thresholds).to(torch.uint8)
    code = index | ((z < 0).to(torch.uint8) << (bits - 1))
    return code, levels[code.int()]


def decode(codes: torch.Tensor, scale: torch.Tensor, side: Side) -> torch.Tensor:
    """Codes and scales to rotated vectors in float32."""
    levels, _ = tables(int(side.bits), codes.shape[-1], codes.device)
    return levels[codes.int()] * scale.float().unsqueeze(-1)
