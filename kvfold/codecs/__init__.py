"""The mathematics of each family, in plain PyTorch: vectors to codes and scales, and back.

A codec works on the last dimension and never looks at a page. ``encode`` turns ``[..., d]`` vectors into integer codes
``[..., d]`` and, where the family stores one, a scale ``[...]``; ``decode`` returns the vectors *in the stored basis*:
rotated where :attr:`Side.rotated <kvfold.formats.Side.rotated>` says so, because nobody un-rotates K or V per token.

These functions are the specification. A kernel stores the same codes, except where a coordinate lies within float32
rounding of a threshold, and the same scales to one unit in the last place of bfloat16.
"""

from __future__ import annotations

import torch

from kvfold.codecs import exact, fp8, lloyd, trellis
from kvfold.formats import Side
from kvfold.rotation import rotate

_FAMILIES = {"lloyd": lloyd, "trellis": trellis, "fp8": fp8, "fp8cast": fp8, "exact": exact}

__all__ = ["decode", "encode"]


def encode(
    x: torch.Tensor, side: Side, reference: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantise vectors.

    Args:
        x: ``[..., d]`` vectors in the model's basis, any floating dtype.
        side: What to store them as.
        reference: ``[..., d]`` in the stored basis, float32: what is quantised is the difference from it.

    Returns:
        Codes ``[..., d]`` (uint8; int16 or int32 bit patterns for ``exact``) and, if ``side.scaled``, the scales
        ``[...]`` in bfloat16.

    Raises:
        NotBuiltError: The side's family is not built yet.
    """
    side.planes()
    stored = rotate(x) if side.rotated else x
    return _FAMILIES[side.family].encode(stored if reference is None else stored - reference, side)


def decode(codes: torch.Tensor, scale: torch.Tensor | None, side: Side) -> torch.Tensor:
    """Undo :func:`encode` up to the rotation: ``[..., d]`` codes to float32 vectors in the stored basis."""
    side.planes()
    return _FAMILIES[side.family].decode(codes, scale, side)
