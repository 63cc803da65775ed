"""Bootstrap intervals: how far a mean over pieces that were drawn at random would differ on other pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its bootstrap interval; ``low`` and ``high`` are None where one piece tells nothing of spread."""

    value: float
    low: float | None
    high: float | None


def draw(pieces: int, resamples: int = RESAMPLES, seed: int = SEED) -> NDArray[np.int64]:
    """How often each piece is drawn in each bootstrap resample: int64 ``[resamples, pieces]``, rows sum to pieces.

    Every format is given the same draws, so that intervals of one run belong together.
    """
    drawn = np.random.default_rng(seed).integers(0, pieces, size=(resamples, pieces))
    return np.stack([np.bincount(row, minlength=pieces) for row in drawn])


def of_mean(draws: NDArray[np.int64], values: Floats, then: Callable[[Floats], Floats] = lambda x: x) -> Interval:
    """A function of the mean of ``values [pieces]``."""
    value = float(then(values.mean()))
    return interval(value, then(draws @ values / draws.shape[1]), draws.shape[1])


def interval(value: float, resampled: Floats, pieces: int) -> Interval:
    """The 95 % percentile interval of a figure, from what it was in each resample ``[resamples]``."""
    if pieces == 1:
        return Interval(value, None, None)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
