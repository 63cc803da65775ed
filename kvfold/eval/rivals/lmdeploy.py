"""lmdeploy's PyTorch engine: ``quant_policy`` 42 (its TurboQuant), 4 and 8.

42: a Hadamard matrix without signs, then the vector is divided by its norm. K: 3 bits of Lloyd–Max levels of N(0, 1/d)
and one bit for the sign of every coordinate's residual, whose root mean square is stored beside the norm. V: 2 bits and
the norm. This is how its prefill reads what it stored. Its decode kernel divides the levels of K, but not the residual,
by the root of 2 once more (read in its source, not run); that is not simulated.

4 and 8: nothing is rotated; uniform from a vector's minimum to its maximum, with a step and a zero point.

Norms, steps and zero points are in the model's dtype: bfloat16 if it computes in that, else float16 here.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from kvfold.eval.rivals.codec import Codec, Rival, hadamard, half_like, power_of_two
from kvfold.eval.rivals.levels import tables

_SOURCE = "lmdeploy, lmdeploy/pytorch/kernels/cuda/{fill,flatten}_kv_cache.py at 01e82af"
_EPSILON = 1e-8


def turbo(x: torch.Tensor, bits: int, residual_signs: bool) -> torch.Tensor:
    """K (3 bits and a sign) or V (2 bits) of policy 42."""
    model, x = x, x.float()
    matrix = hadamard(x.shape[-1], x.device)
    levels, midpoints = tables(bits, None, x.device)
    root = math.sqrt(x.shape[-1])
    y = x @ matrix
    norm = (y.square().sum(-1, keepdim=True) + _EPSILON).sqrt()
    unit = y / norm
    z = (levels / root)[torch.bucketize(unit, midpoints / root)]
    if residual_signs:
        residual = unit - z
        rms = (residual.square().sum(-1, keepdim=True) + _EPSILON).sqrt() / root
        z = z + half_like(rms, model) * torch.where(residual >= 0, 1.0, -1.0)
    return half_like(norm, model) * z @ matrix


def affine(x: torch.Tensor, bits: int) -> torch.Tensor:
    """K and V of policies 4 and 8. Vectors whose coordinates are all equal become NaN, as they do there."""
    model, x = x, x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    zero = -low / step
    code = (x / step + zero + 0.5).trunc()
    return (code - half_like(zero, model)) * half_like(step, model)


def rivals() -> list[Rival]:
    """The formats of this family."""
    keys = Codec(partial(turbo, bits=3, residual_signs=True), 4, 32, 0, power_of_two, "that are powers of two")
    values = Codec(partial(turbo, bits=2, residual_signs=False), 2, 16, 0, power_of_two, "that are powers of two")
    what = "K 3 bits, Lloyd–Max, and a sign of the residual; V 2 bits, Lloyd–Max"
    found = [Rival("lmdeploy:42", what, _SOURCE, keys, values)]
    for bits in (8, 4):
        codec = Codec(partial(affine, bits=bits), bits, 32)
        found.append(Rival(f"lmdeploy:{bits}", f"{bits} bits, affine, one step per vector", _SOURCE, codec, codec))
    return found
