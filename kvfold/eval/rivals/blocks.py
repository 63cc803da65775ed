"""Formats in small blocks of coordinates: ggml's q8_0 and q4_0, NVFP4 and MXFP4.

ggml: 32 coordinates and a float16 scale. ``q8_0``: the largest magnitude becomes 127. ``q4_0``: codes 0 to 15 stand
for -8 to 7, and the coordinate of largest magnitude becomes -8. Since its pull request 21038 llama.cpp rotates what it
quantises, unless it is told not to: K by the Hadamard matrix of the largest power of two that divides the head, V by
that of 64. The names with ``+rot`` do so too.

NVFP4: 16 coordinates e2m1 and an e4m3 scale, largest magnitude over 6. Its second scale, one for a whole tensor, is 1,
as where nobody has calibrated it. MXFP4: 32 coordinates e2m1 and a power of two.
"""

from __future__ import annotations

from functools import partial

import torch

from kvfold.codecs.fp8 import E4M3_MAX
from kvfold.eval.rivals.codec import Codec, Rival, RoundTrip, half, largest_power_of_two, multiple_of, rotate_blocks

_GGML_SOURCE = "llama.cpp, ggml/src/ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q4_0_ref)"
_NVFP4_SOURCE = "vLLM 0.33.0, model_executor/layers/quantization/utils/nvfp4_emulation_utils.py"
_MXFP4_SOURCE = "OCP Microscaling Formats 1.0, section 6.3; ggml's quantize_row_mxfp4_ref does the same"
_GGML_BLOCK = 32
_GGML_ROTATION = 64
_E2M1_MAX = 6.0
_E2M1_EMAX = 2
_E8M0_MIN = -127


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """ggml's q8_0."""
    blocks = x.float().unflatten(-1, (-1, _GGML_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    code = (scaled + torch.where(scaled >= 0, 0.5, -0.5)).trunc()
    return (code * half(scale)).flatten(-2)


def q4_0(x: torch.Tensor) -> torch.Tensor:
    """ggml's q4_0."""
    blocks = x.float().unflatten(-1, (-1, _GGML_BLOCK))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    code = (blocks * _inverse(scale) + 8.5).trunc().clamp_max(15)
    return ((code - 8) * half(scale)).flatten(-2)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale != 0, 1 / scale, 0.0)


def rotated(x: torch.Tensor, codec: RoundTrip, whole_head: bool) -> torch.Tensor:
    """``codec`` between two Hadamard transforms."""
    order = largest_power_of_two(x.shape[-1]) if whole_head else _GGML_ROTATION
    return rotate_blocks(codec(rotate_blocks(x.float(), order)), order)


def nvfp4(x: torch.Tensor) -> torch.Tensor:
    """NVFP4 with a tensor scale of 1."""
    blocks = x.float().unflatten(-1, (-1, 16))
    wanted = blocks.abs().amax(-1, keepdim=True) / _E2M1_MAX
    scale = wanted.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (e2m1(blocks * _inverse(scale)) * scale).flatten(-2)


def mxfp4(x: torch.Tensor) -> torch.Tensor:
    """MXFP4."""
    blocks = x.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1 - _E2M1_EMAX  # floor(log2) without a logarithm's rounding
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp_min(_E8M0_MIN))
    return (e2m1(blocks / scale) * scale).flatten(-2)


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of 0, .5, 1, 1.5, 2, 3, 4 and 6 with a sign; halfway to an even mantissa, above 6 to 6."""
    magnitude = x.abs().clamp_max(_E2M1_MAX)
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(0, _E2M1_EMAX)
    step = torch.ldexp(torch.full_like(magnitude, 0.5), exponent)
    return torch.copysign((magnitude / step).round() * step, x)


def rivals() -> list[Rival]:
    """The formats of this family."""
    kinds: dict[str, tuple[RoundTrip, int]] = {"q8_0": (q8_0, 8), "q4_0": (q4_0, 4)}
    found = []
    for rotation in (False, True):
        for k_name, v_name in (("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0")):
            keys, values = _ggml(*kinds[k_name], rotation, True), _ggml(*kinds[v_name], rotation, False)
            name = k_name if k_name == v_name else f"{k_name}/{v_name}"
            what = f"blocks of 32{', rotated first, as llama.cpp does by default' * rotation}"
            found.append(Rival(f"ggml:{name}{'+rot' * rotation}", what, _GGML_SOURCE, keys, values))
    for name, codec, what, source in (
        ("nvfp4", Codec(nvfp4, 4, 8, 16, multiple_of(16), "that 16 divides"), "e2m1, e4m3 per 16", _NVFP4_SOURCE),
        ("mxfp4", Codec(mxfp4, 4, 8, 32, multiple_of(32), "that 32 divides"), "e2m1, e8m0 per 32", _MXFP4_SOURCE),
    ):
        found.append(Rival(name, what, source, codec, codec))
    return found


def _ggml(codec: RoundTrip, bits: int, rotation: bool, is_key: bool) -> Codec:
    if rotation:
        codec, divisor = partial(rotated, codec=codec, whole_head=is_key), _GGML_ROTATION
    else:
        divisor = _GGML_BLOCK
    return Codec(codec, bits, 16, _GGML_BLOCK, multiple_of(divisor), f"that {divisor} divides")
