"""vLLM 0.33: its four TurboQuant presets, with and without the layers that it leaves alone, and its rotated int4.

Keys of ``*_nc``: divided by their norm, rotated by a Hadamard matrix without signs, each coordinate to the nearest of
the Lloyd–Max levels of N(0, 1/d); reading scales the levels of a vector to norm 1 ("norm correction") and multiplies by
the norm, stored in float16. Keys of ``k8v4`` are cast to e4m3. Values are not rotated: uniform from a vector's minimum
to its maximum, with the step and the minimum in float16.

``turboquant_*`` leaves the first and the last two layers in the model's dtype, except in hybrid models; the names with
``+skip`` do so too.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import torch

from kvfold.codecs.fp8 import E4M3_MAX
from kvfold.eval.rivals.codec import (
    Codec,
    Rival,
    hadamard,
    half,
    largest_power_of_two,
    multiple_of,
    power_of_two,
    rotate_blocks,
)

BOUNDARY = 2
_SOURCE = "vLLM 0.33.0, vllm/v1/attention/ops/triton_turboquant_{store,decode}.py"
_INT4_SOURCE = "vLLM 0.33.0, vllm/v1/attention/ops/int4_per_token_head.py"
_PANELS = 200
_ITERATIONS = 200


@lru_cache(maxsize=32)
def _centroids(bits: int, head_size: int) -> torch.Tensor:
    """vLLM's own approximation of the Lloyd–Max levels of N(0, 1/d), float32 ``[2^bits]``, ascending.

    200 iterations from uniform levels within 3.5 standard deviations, each cell integrated with 200 trapezoids. The
    outer cells end at 10.5 standard deviations.
    """
    sigma, count = head_size**-0.5, 2**bits
    reach = 3.5 * sigma
    levels = -reach + 2 * reach * (np.arange(count) + 0.5) / count
    weights = np.ones(_PANELS + 1)
    weights[[0, -1]] = 0.5
    for _ in range(_ITERATIONS):
        edges = np.concatenate([[-3 * reach], (levels[1:] + levels[:-1]) / 2, [3 * reach]])
        x = edges[:-1, None] + np.diff(edges)[:, None] / _PANELS * np.arange(_PANELS + 1)
        density = weights * np.exp(-(x**2) / (2 * sigma**2))
        moved = (x * density).sum(1) / density.sum(1)
        if np.abs(moved - levels).max() < 1e-10:
            break
        levels = moved
    return torch.from_numpy(levels).float()


def mse_keys(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys of the ``*_nc`` presets."""
    x = x.float()
    matrix = hadamard(x.shape[-1], x.device)
    levels = _centroids(bits, x.shape[-1]).to(x.device)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = x / (norm + 1e-8) @ matrix
    code = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2, right=True)
    z = levels[code]
    z = z / (z.square().sum(-1, keepdim=True) + 1e-16).sqrt()
    return half(norm) * z @ matrix


def fp8_keys(x: torch.Tensor) -> torch.Tensor:
    """Keys of ``k8v4``: a saturating cast to e4m3."""
    x = x.float()
    return torch.where(x.isnan(), x, x.clamp(-E4M3_MAX, E4M3_MAX)).to(torch.float8_e4m3fn).float()


def uniform_values(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of every preset."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    top = 2**bits - 1
    step = ((high - low) / top).clamp_min(1e-8)
    code = ((x - low) / step + 0.5).trunc().clamp(0, top)
    return code * half(step) + half(low)


def int4_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """Signs, a Hadamard transform that is not normalised, then asymmetric int4 with one scale per vector.

    The zero point has 4 bits and sits in the lowest bits of the float32 scale.
    """
    model_dtype, x = x.dtype, x.float()
    order = largest_power_of_two(x.shape[-1])
    signs = _signs(order).to(x.device).repeat(x.shape[-1] // order)
    y = (rotate_blocks(x * signs, order) * order**0.5).to(model_dtype).float()
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-6)
    zero = _round_half_away(-low / step).clamp(0, 15)
    code = _round_half_away(y * (1 / step) + zero).clamp(0, 15)
    stored = ((step.view(torch.int32) & -16) | zero.int()).view(torch.float32)
    return rotate_blocks((code - zero) * stored, order) / order**0.5 * signs


def _round_half_away(x: torch.Tensor) -> torch.Tensor:
    return (x + torch.where(x >= 0, 0.5, -0.5)).trunc()


@lru_cache(maxsize=32)
def _signs(order: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return 2 * torch.bernoulli(torch.full((order,), 0.5), generator=generator) - 1


def rivals() -> list[Rival]:
    """The formats of this family."""
    presets = []
    for name, k_bits, v_bits in (("k8v4", 8, 4), ("4bit_nc", 4, 4), ("k3v4_nc", 3, 4), ("3bit_nc", 3, 3)):
        if k_bits == 8:
            keys, what = Codec(fp8_keys, 8, 0), "K e4m3"
        else:
            keys = Codec(partial(mse_keys, bits=k_bits), k_bits, 16, 0, power_of_two, "that are powers of two")
            what = f"K {k_bits} bits, Lloyd–Max with norm correction"
        values = Codec(partial(uniform_values, bits=v_bits), v_bits, 32)
        presets.append(Rival(f"vllm:{name}", f"{what}; V {v_bits} bits, uniform", _SOURCE, keys, values))
    int4 = Codec(int4_per_token_head, 4, 32, 0, multiple_of(2), "that are even")
    return [
        *presets,
        *(preset.with_skipped_layers(BOUNDARY) for preset in presets),
        Rival("vllm:int4_per_token_head", "rotated, asymmetric int4, one scale per vector", _INT4_SOURCE, int4, int4),
    ]
