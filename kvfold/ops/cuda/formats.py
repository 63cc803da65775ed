"""Which pages the CUDA C++ kernels are built for, and what several of them take from a format."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from kvfold.formats import Side
from kvfold.layout import PageLayout
from kvfold.rotation import rotation_matrix

HEAD_SIZE = 128
WIDTHS = (2, 3, 4)

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""How the kernels' macros name the dtypes of vectors."""


def supports(layout: PageLayout) -> str | None:
    """Why the CUDA kernels cannot serve these pages, or None if they can."""
    for name, side, size in (("K", layout.format.k, layout.head_size), ("V", layout.format.v, layout.head_size_v)):
        if size != HEAD_SIZE:
            return f"the CUDA kernels are built for head size {HEAD_SIZE}, and {name} has {size}"
        if side.family not in ("lloyd", "trellis") or side.bits not in WIDTHS:
            built = "Lloyd–Max and trellis codes of 2, 3 and 4 bits"
            return f"the CUDA kernels are built for {built}, and {name} is stored as {side.name}"
    return None


def side_defines(name: str, side: Side, planes: tuple[int, ...], scales: int) -> dict[str, int | str]:
    """Macros of a side, K or V: its width and where its bytes lie in a tile."""
    trellis = side.family == "trellis"
    return {
        f"{name}_BITS": int(side.bits),
        f"{name}_TRELLIS": int(trellis),
        f"{name}_PLANE0": planes[0],
        f"{name}_PLANE1": planes[1 if trellis else -1],
        f"{name}_PATH": planes[-1],
        f"{name}_SCALES": scales,
    }


@lru_cache(maxsize=1)
def sign_words() -> dict[str, str]:
    """The rotation's signs as macros, 32 coordinates each."""
    negative = rotation_matrix(HEAD_SIZE)[0] < 0  # the first row of H is all ones, so this row is the signs
    words = np.packbits(negative, bitorder="little").view("<u4")
    return {f"SIGN{i}": f"0x{int(word):08x}u" for i, word in enumerate(words)}
