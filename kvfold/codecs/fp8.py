"""e4m3 codes, either cast as they are (``fp8cast``) or after division by a scale per vector (``fp8``).

The cast is what engines call an fp8 cache: it saturates at 448 and loses small vectors. The scale is the smallest
bfloat16 at which the largest coordinate does not exceed 448, so nothing saturates. Nothing is rotated.
"""

from __future__ import annotations

import torch

from kvfold.formats import Side

E4M3_MAX = 448.0


def encode(x: torch.Tensor, side: Side) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Vectors ``[..., d]`` to e4m3 bit patterns and, for ``fp8``, scales."""
    x = x.float()
    if side.family == "fp8cast":
        saturated = torch.where(x.isnan(), x, x.clamp(-E4M3_MAX, E4M3_MAX))
        return saturated.to(torch.float8_e4m3fn).view(torch.uint8), None
    largest = x.abs().amax(dim=-1, keepdim=True)
    finite = torch.isfinite(largest)
    wanted = torch.where(finite, largest, 0.0) / E4M3_MAX
    scale = wanted.bfloat16()
    above = (scale.view(torch.int16) + 1).view(torch.bfloat16)
    scale = torch.where(scale.float() < wanted, above, scale)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)  # a subnormal vector is stored as zero
    codes = torch.where(finite, x * inverse, 0.0).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), torch.where(finite, scale, float("nan")).squeeze(-1)


def decode(codes: torch.Tensor, scale: torch.Tensor | None, side: Side) -> torch.Tensor:
    """e4m3 bit patterns to vectors in float32."""
    values = codes.view(torch.float8_e4m3fn).float()
    return values if scale is None else values * scale.float().unsqueeze(-1)
