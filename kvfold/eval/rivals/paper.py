"""TurboQuant as the paper has it (arXiv 2504.19874), with one float16 for every norm.

``mse<b>``: a vector is divided by its norm and multiplied by a dense random orthogonal matrix; every coordinate goes to
the nearest Lloyd–Max level of b bits for the law of such coordinates.

``prod<b>`` stores keys so that inner products with them are unbiased: ``mse<b-1>``, then of the residual r the signs of
S r with a Gaussian d x d matrix S, and the norm of r. The estimate adds sqrt(pi / 2) / d |r| S^T sign(S r). With ``o``
at the end S is orthogonal, and the factor sqrt(pi / (2 d)). Values are ``mse<b>``: attention only sums them.

Π and S are drawn once for a head size, from a fixed seed.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch

from kvfold.eval.rivals.codec import Codec, Rival, half
from kvfold.eval.rivals.levels import tables

MAX_BITS = 8
_SOURCE = "arXiv 2504.19874, algorithms 1 and 2"
_SEED = 2504
_SIZES = (lambda size: size >= 4, "of 4 coordinates or more")


@lru_cache(maxsize=32)
def _matrices(head_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Π, the Gaussian S and an orthogonal S, float32 ``[d, d]``. Read only: shared."""
    generator = torch.Generator().manual_seed(_SEED + head_size)

    def gaussian() -> torch.Tensor:
        return torch.randn(head_size, head_size, generator=generator, dtype=torch.float64)

    def orthogonal() -> torch.Tensor:
        q, r = torch.linalg.qr(gaussian())
        return q * r.diagonal().sign()

    rotation, normal, signs = orthogonal(), gaussian(), orthogonal()
    return rotation.float().to(device), normal.float().to(device), signs.float().to(device)


def _normalised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(torch.finfo(torch.float32).tiny), half(norm)


def _mse_of_unit(x: torch.Tensor, bits: int) -> torch.Tensor:
    rotation, _, _ = _matrices(x.shape[-1], x.device)
    levels, midpoints = tables(bits, x.shape[-1], x.device)
    root = math.sqrt(x.shape[-1])
    code = torch.bucketize((x @ rotation.T) * root, midpoints)
    return levels[code] / root @ rotation


def mse(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Algorithm 1, TurboQuant_mse."""
    unit, norm = _normalised(x.float())
    return norm * _mse_of_unit(unit, bits)


def prod(x: torch.Tensor, bits: int, orthogonal: bool) -> torch.Tensor:
    """Algorithm 2, TurboQuant_prod."""
    unit, norm = _normalised(x.float())
    estimate = _mse_of_unit(unit, bits - 1)
    residual = unit - estimate
    head_size = x.shape[-1]
    _, gaussian, rotation = _matrices(head_size, x.device)
    s = rotation if orthogonal else gaussian
    factor = math.sqrt(math.pi / 2) / (math.sqrt(head_size) if orthogonal else head_size)
    length = half(torch.linalg.vector_norm(residual, dim=-1, keepdim=True))
    signs = torch.where(residual @ s.T >= 0, 1.0, -1.0)
    return norm * (estimate + factor * length * (signs @ s))


def rivals() -> list[Rival]:
    """The formats of this family."""
    found = []
    for bits in range(1, MAX_BITS + 1):
        values = Codec(partial(mse, bits=bits), bits, 16, 0, *_SIZES)
        found.append(Rival(f"paper:mse{bits}", f"TurboQuant_mse, {bits} bits", _SOURCE, values, values))
        for suffix, kind in (("", "Gaussian"), ("o", "orthogonal")):
            keys = Codec(partial(prod, bits=bits, orthogonal=bool(suffix)), bits, 32, 0, *_SIZES)
            what = f"K TurboQuant_prod, {bits} bits, {kind} S; V TurboQuant_mse, {bits} bits"
            found.append(Rival(f"paper:prod{bits}{suffix}", what, _SOURCE, keys, values))
    return found
