"""Lloyd–Max codebooks for the law that a rotated unit vector's coordinates follow.

TurboQuant (arXiv 2504.19874, section 3) normalises a vector, rotates it and quantises every coordinate on its own.
A coordinate of a random unit vector in R^d, times sqrt(d), has the density

    f(t) ~ (1 - t^2 / d)^((d - 3) / 2),   |t| < sqrt(d),

which tends to the standard normal. For that density, and not for its limit, the optimal levels are computed here by
Lloyd's iteration on cell masses that are exact to the grid.

Up to 4 bits the magnitudes are then rounded to ``(m + 1/2) * step`` with integers ``m`` of 7 bits, because tensor cores
multiply int8: the level of a negative coordinate is the bitwise complement of ``m``, and the half goes into the
accumulator. The step is searched, so that this costs less than 0.1 % of distortion. The rounded levels are the
codebook: there is no second, "nicer" one that a reference uses.

A code is ``sign << (b - 1) | index of the magnitude``. A coordinate exactly between two levels takes the smaller one;
zero is positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import FormatError

Array = NDArray[np.float64]

INT8_BITS = 4
"""Widths up to this one use levels that are exact in int8 arithmetic."""

_GRID = 200_001


@dataclass(frozen=True, eq=False)
class Codebook:
    """Levels of one width for one head size, in units of the coordinates' root mean square.

    Attributes:
        bits: Width of a code.
        head_size: The dimension whose coordinate law the levels are optimal for.
        magnitudes: [2^(bits-1)] positive levels, ascending.
        integers: [2^(bits-1)] integers ``m`` with ``magnitudes = (m + 1/2) * step``, or None above 4 bits.
        step: See ``integers``; 0 above 4 bits.
        distortion: E (t - Q(t))^2 under the law, that is E |x - x̂|^2 / |x|^2 with the exact norm stored.
    """

    bits: int
    head_size: int
    magnitudes: Array
    integers: NDArray[np.int64] | None
    step: float
    distortion: float

    @property
    def thresholds(self) -> Array:
        """[2^(bits-1) - 1] magnitudes at which the index rises by one."""
        return (self.magnitudes[1:] + self.magnitudes[:-1]) / 2

    @property
    def levels(self) -> Array:
        """[2^bits] the level of every code."""
        return np.concatenate([self.magnitudes, -self.magnitudes])


@lru_cache(maxsize=64)
def _half_law(head_size: int) -> tuple[Array, Array, Array, Array]:
    """Grid on [0, top] and the running integrals of f, t f and t^2 f, normalised so that f has mass 1 there."""
    top = min(np.sqrt(head_size), 9.0) if head_size > 3 else np.sqrt(head_size)
    grid = np.linspace(0.0, top, _GRID)
    inside = np.clip(1.0 - grid**2 / head_size, 1e-300, None)
    density = np.exp((head_size - 3) / 2 * np.log(inside))
    if head_size > 3 and top == np.sqrt(head_size):
        density[-1] = 0.0
    steps = np.diff(grid)

    def running(values: Array) -> Array:
        return np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2 * steps)])

    mass = running(density)
    return grid, mass / mass[-1], running(density * grid) / mass[-1], running(density * grid**2) / mass[-1]


def _cells(head_size: int, magnitudes: Array) -> tuple[Array, Array, Array]:
    """Mass, first and second moment of the cell of each magnitude."""
    grid, mass, first, second = _half_law(head_size)
    edges = np.concatenate([[0.0], (magnitudes[1:] + magnitudes[:-1]) / 2, [grid[-1]]])
    return tuple(np.diff(np.interp(edges, grid, integral)) for integral in (mass, first, second))


def _distortion(head_size: int, magnitudes: Array) -> float:
    mass, first, second = _cells(head_size, magnitudes)
    return float(np.sum(second - 2 * magnitudes * first + magnitudes**2 * mass))


def _lloyd_max(head_size: int, count: int) -> Array:
    """Optimal magnitudes: start from the high-resolution optimum (density^(1/3)), then Lloyd's iteration."""
    grid, mass, _, _ = _half_law(head_size)
    density = np.diff(mass) ** (1 / 3)
    quantile = np.concatenate([[0.0], np.cumsum(density)])
    magnitudes = np.interp((np.arange(count) + 0.5) / count * quantile[-1], quantile, grid)
    for _ in range(20_000):
        cell_mass, first, _ = _cells(head_size, magnitudes)
        moved = np.where(cell_mass > 1e-14, first / np.maximum(cell_mass, 1e-14), magnitudes)
        shift = np.max(np.abs(moved - magnitudes))
        magnitudes = moved
        if shift < 1e-7:
            break
    return magnitudes


def _round_to_int8(head_size: int, ideal: Array) -> tuple[NDArray[np.int64], float]:
    """The integers m and the step whose levels (m + 1/2) * step distort least."""
    best: tuple[float, NDArray[np.int64], float] | None = None
    for largest in range(48, 128):
        step = ideal[-1] / (largest + 0.5)
        integers = np.round(ideal / step - 0.5).astype(np.int64)
        if integers.min() < 0 or np.any(np.diff(integers) <= 0):
            continue
        distortion = _distortion(head_size, (integers + 0.5) * step)
        if best is None or distortion < best[0]:
            best = (distortion, integers, float(step))
    assert best is not None  # up to 8 magnitudes always fit into 7 bits
    return best[1], best[2]


@lru_cache(maxsize=256)
def lloyd_max(bits: int, head_size: int) -> Codebook:
    """The codebook of ``bits`` bits for vectors of ``head_size`` coordinates.

    Raises:
        FormatError: ``bits`` is not 1 to 8, or the head is too small to have a coordinate law worth quantising.
    """
    if not 1 <= bits <= 8:
        raise FormatError(f"Lloyd–Max codebooks have 1 to 8 bits, not {bits}")
    if head_size < 4:
        raise FormatError(f"head size {head_size} is too small to rotate and quantise; use bf16, f16, f32 or f8")
    magnitudes = _lloyd_max(head_size, 2 ** (bits - 1))
    integers, step = None, 0.0
    if bits <= INT8_BITS:
        integers, step = _round_to_int8(head_size, magnitudes)
        magnitudes = np.asarray((integers + 0.5) * step, dtype=np.float64)
    return Codebook(bits, head_size, magnitudes, integers, step, _distortion(head_size, magnitudes))


# --- trellis ----------------------------------------------------------------------------------------------------------

# Positive halves of the alphabets for 4 states, for the normal law: found by training on Gaussian vectors with d = 128.
_TRELLIS = {
    2: (0.179, 0.633, 1.067, 1.881),
    3: (0.106, 0.342, 0.563, 0.82, 1.077, 1.4, 1.834, 2.532),
    4: (
        0.057, 0.185, 0.302, 0.436, 0.556, 0.691, 0.824, 0.968, 1.115, 1.277, 1.447, 1.643, 1.869, 2.163, 2.537, 3.115,
    ),
}  # fmt: skip


_TRELLIS_DISTORTION = {2: 0.0881, 3: 0.0242, 4: 0.0065}


@dataclass(frozen=True, eq=False)
class TrellisBook:
    """Levels of a trellis of 4 states, in units of the coordinates' root mean square; see :mod:`kvfold.codecs.trellis`.

    Attributes:
        bits: Width of a code.
        integers: [2^bits] 7-bit integers ``m`` whose levels are ``(m + 1/2) * step``, ascending.
        step: See ``integers``.
        distortion: E |x - x̂|^2 / |x|^2 for Gaussian vectors with d = 128 with the exact norm stored, as measured: no
            formula is known.
    """

    bits: int
    integers: NDArray[np.int64]
    step: float
    distortion: float

    @property
    def levels(self) -> Array:
        """[2^(bits+1)] all levels, ascending."""
        positive = (self.integers + 0.5) * self.step
        return np.concatenate([-positive[::-1], positive])


@lru_cache(maxsize=8)
def trellis_levels(bits: int) -> TrellisBook:
    """The alphabet of a width, its levels rounded to what is exact in int8 arithmetic: the step errs least.

    Raises:
        FormatError: ``bits`` is not 2, 3 or 4.
    """
    if bits not in _TRELLIS:
        raise FormatError(f"trellis codes have 2, 3 or 4 bits, not {bits}")
    ideal = np.asarray(_TRELLIS[bits])
    best: tuple[float, NDArray[np.int64], float] | None = None
    for largest in range(64, 128):
        step = ideal[-1] / (largest + 0.5)
        integers = np.round(ideal / step - 0.5).astype(np.int64)
        error = float(np.sum(((integers + 0.5) * step - ideal) ** 2))
        if best is None or error < best[0]:
            best = (error, integers, float(step))
    assert best is not None
    return TrellisBook(bits, best[1], best[2], _TRELLIS_DISTORTION[bits])


def fp8_distortion() -> float:
    """Expected distortion of e4m3 with 3 mantissa bits on a Gaussian, far from under- and overflow.

    A float of 3 mantissa bits has relative steps of 1/8 to 1/16; averaged over a log-uniform mantissa weighted by
    energy the error is ``(2^-3)^2 / 12 * E[2^(2 floor(log2 |t|))] / E[t^2]``.
    """
    grid, mass, _, second = _half_law(128)
    centre = (grid[1:] + grid[:-1]) / 2
    cell = np.diff(mass)
    exponent = np.exp2(2 * np.floor(np.log2(np.maximum(centre * 448 / 4, 2.0**-6))))
    return float(np.sum(cell * exponent) / (448 / 4) ** 2 * (2.0**-6) / 12 / second[-1])
