"""Lloyd–Max levels as other systems have them: of the normal law, and of the law of a unit vector's coordinates.

`kvfold.codebooks` has the levels that kvfold stores, rounded so that int8 arithmetic is exact; these are not rounded.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

_GRID = 200_001
_REACH = 9.0
"""In units of the law's standard deviation."""


@lru_cache(maxsize=64)
def lloyd_max_levels(bits: int, head_size: int | None = None) -> torch.Tensor:
    """The levels of least squared error, in units of the standard deviation: float64 ``[2^bits]``, ascending.

    Args:
        bits: From 0; the only level of 0 bits is 0.
        head_size: Dimension d of the unit vectors, from 4, whose coordinates (times the root of d) follow
            ``(1 - t^2 / d)^((d - 3) / 2)``; None for the standard normal law.
    """
    reach = _REACH if head_size is None else min(_REACH, head_size**0.5)
    t = np.linspace(-reach, reach, _GRID)
    if head_size is None:
        density = np.exp(-(t**2) / 2)
    else:
        density = np.clip(1 - t**2 / head_size, 0, None) ** ((head_size - 3) / 2)
    mass, first = (
        np.concatenate([[0.0], np.cumsum(values[1:] + values[:-1])]) for values in (density, density * t)
    )  # running integrals, by trapezoids
    count = 2**bits
    spread = np.cumsum(density ** (1 / 3))  # where levels lie when there are many
    levels = np.interp((np.arange(count) + 0.5) / count * spread[-1], spread, t)
    for _ in range(20_000):
        edges = np.concatenate([[-reach], (levels[1:] + levels[:-1]) / 2, [reach]])
        moved = np.diff(np.interp(edges, t, first)) / np.diff(np.interp(edges, t, mass))
        done = np.abs(moved - levels).max() < 1e-8
        levels = moved
        if done:
            break
    return torch.from_numpy((levels - levels[::-1]) / 2)  # symmetric, as the law is


@lru_cache(maxsize=256)
def tables(bits: int, head_size: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`lloyd_max_levels` and the midpoints between them, float32 on a device. Read only: shared."""
    levels = lloyd_max_levels(bits, head_size)
    midpoints = (levels[1:] + levels[:-1]) / 2
    return levels.to(device=device, dtype=torch.float32), midpoints.to(device=device, dtype=torch.float32)
