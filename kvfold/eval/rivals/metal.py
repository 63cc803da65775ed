"""vllm-metal's TurboQuant types, a name for K and one for V: ``metal:q8_0/q3_0``.

Keys are not rotated: asymmetric uniform, with a float16 step and a float16 zero point per 32 coordinates. The zero
point is rounded to a whole number of steps; ``q8_0`` has signed codes from -127 to 127, the others unsigned ones.

Values are multiplied by signs and a Hadamard matrix over the whole head; then Lloyd–Max levels of the normal law and a
float16 root mean square per 32 coordinates. vllm-metal draws its signs with MLX, and finds the levels of widths other
than 3 bits from 200 000 samples; here the signs are numpy's and the levels those of the law.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import torch

from kvfold.eval.rivals.codec import Codec, Rival, half, multiple_of, rotate_blocks
from kvfold.eval.rivals.levels import tables

GROUP = 32
KEYS = {"q8_0": 8, "q5_0": 5, "q4_0": 4, "uint2": 2}
VALUES = {"q2_0": 2, "q3_0": 3, "q4_0": 4, "q5_0": 5, "q8_0": 8}
_SOURCE = "vllm-metal, vllm_metal/attention/caches/turboquant.py at 6067d12"
_HEAD_SIZES = (64, 128, 256, 512)
_EPSILON = 1e-8


def affine_keys(x: torch.Tensor, bits: int) -> torch.Tensor:
    """K of any type."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if bits == 8:
        bottom, top = -127, 127
        step = (high - low) / 254
        zero = ((high + low) / (2 * (step + _EPSILON))).round()
    else:
        bottom, top = 0, 2**bits - 1
        step = (high - low) / top
        zero = (low / (step + _EPSILON)).round()
    code = (groups / (step + _EPSILON) - zero).round().clamp(bottom, top)
    return ((code + half(zero)) * half(step)).flatten(-2)


def lloyd_values(x: torch.Tensor, bits: int) -> torch.Tensor:
    """V of any type."""
    size = x.shape[-1]
    signs = _signs(size).to(x.device)
    groups = rotate_blocks(x.float() * signs, size).unflatten(-1, (-1, GROUP))
    levels, midpoints = tables(bits, None, x.device)
    rms = groups.square().mean(-1, keepdim=True).sqrt()
    code = torch.bucketize(groups / (rms + _EPSILON), midpoints)
    return rotate_blocks((levels[code] * half(rms)).flatten(-2), size) * signs


@lru_cache(maxsize=32)
def _signs(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(size).choice([-1.0, 1.0], size)).float()


def rivals() -> list[Rival]:
    """The formats of this family."""
    found = []
    for k_name, k_bits in KEYS.items():
        keys = Codec(partial(affine_keys, bits=k_bits), k_bits, 32, GROUP, multiple_of(GROUP), "that 32 divides")
        for v_name, v_bits in VALUES.items():
            values = Codec(
                partial(lloyd_values, bits=v_bits), v_bits, 16, GROUP, _HEAD_SIZES.__contains__, "64, 128, 256 and 512"
            )
            what = f"K {k_bits} bits, affine per 32; V {v_bits} bits, rotated, Lloyd–Max per 32"
            found.append(Rival(f"metal:{k_name}/{v_name}", what, _SOURCE, keys, values))
    return found
