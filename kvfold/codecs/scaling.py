"""What the families with levels share: the prescale search and the rule for the stored scale.

Two things improve on TurboQuant's paper (arXiv 2504.19874) at the same bytes, both at encode time; decoding does not
know:

* Prescale search: quantise at several prescales around 1 and keep the one whose reconstruction has the best cosine with
  the vector. About -15 % distortion at 4 bits.
* Scale rules. With z the vector in units of its prescaled root mean square s, and z0 = Q(z) the levels of its codes,
  the stored scale is

      plain     s                        the paper's: the norm, divided by sqrt(d)
      unbiased  s <z, z> / <z, z0>       makes <x, x̂> = |x|^2, so that scores are not shrunk (after EDEN, RaBitQ)
      nc        s |z| / |z0|             makes |x̂| = |x| ("norm correction", unit-norm reconstruction)
      mse       s <z, z0> / <z0, z0>     least squared error of this vector

The scale is bfloat16, and s is rounded to bfloat16 *before* the codes are chosen, so that under ``plain`` rounding
costs nothing. A zero vector has scale 0; a vector with a non-finite coordinate has scale NaN, so that whoever attends
to it gets NaN, as from an uncompressed cache, and never a plausible number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kvfold.formats import Side

Quantiser = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Vectors ``[..., d]`` in units of their root mean square to codes (uint8) and the levels of these (float32)."""


def prescale_candidates(count: int) -> tuple[float, ...]:
    """Prescales tried at encode time, 1 first so that ties keep it: within 10 % for three, 20 % for more."""
    reach = 0.1 if count <= 3 else 0.2
    return (
        tuple(sorted(np.linspace(1 - reach, 1 + reach, count).round(6).tolist(), key=lambda p: abs(p - 1)))
        if count > 1
        else (1.0,)
    )


def encode(y: torch.Tensor, side: Side, quantise: Quantiser) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated vectors ``[..., d]`` to codes and scales; see :func:`kvfold.codecs.encode`."""
    y = y.float()
    largest = y.abs().amax(dim=-1, keepdim=True)  # taken out first: |y|^2 of 1e30 overflows float32
    finite = torch.isfinite(largest)
    divisor = torch.where(finite & (largest > 0), largest, 1.0)
    y = torch.where(finite, y / divisor, 0.0)
    rms = torch.linalg.vector_norm(y, dim=-1, keepdim=True) / y.shape[-1] ** 0.5

    best: tuple[torch.Tensor, ...] | None = None
    for prescale in prescale_candidates(side.prescales):
        scale = (rms * prescale * divisor).bfloat16().float()
        z = y * torch.where(scale > 0, divisor / scale, 0.0)
        code, z0 = quantise(z)
        e = z - z0
        zz, ze, ee = ((a * b).sum(-1, keepdim=True) for a, b in ((z, z), (z, e), (e, e)))
        zz0, z0z0 = zz - ze, zz - 2 * ze + ee
        sine = (zz * ee - ze * ze) / (zz * z0z0)  # 1 - cos^2, without the cancellation that hides it at 8 bits
        if best is None:
            best = (sine, code, torch.where(scale > 0, _stored(side.scale, scale, zz, zz0, z0z0), 0.0))
        else:
            better = sine < best[0]
            candidate = (sine, code, torch.where(scale > 0, _stored(side.scale, scale, zz, zz0, z0z0), 0.0))
            best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))
    assert best is not None
    stored = torch.where(finite, torch.where(rms > 0, best[2], 0.0), float("nan"))
    return best[1], stored.squeeze(-1).bfloat16()


def _stored(rule: str, s: torch.Tensor, zz: torch.Tensor, zz0: torch.Tensor, z0z0: torch.Tensor) -> torch.Tensor:
    if rule == "unbiased":
        return s * zz / zz0
    if rule == "nc":
        return s * (zz / z0z0).sqrt()
    if rule == "mse":
        return s * zz0 / z0z0
    return s
