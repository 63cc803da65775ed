"""Codebooks against theory: every integral here is Gauss-Legendre per cell, on none of the module's own code."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from kvfold.codebooks import INT8_BITS, Codebook, fp8_distortion, lloyd_max
from kvfold.errors import FormatError

Array = NDArray[np.float64]

HEAD_SIZES = (8, 33, 64, 80, 128, 256)
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)


def _end(head_size: int) -> float:
    """Where the law ends; beyond 12 standard deviations there is nothing that float64 could see."""
    return min(math.sqrt(head_size), 12.0)


def _moments(head_size: int, edges: Array) -> tuple[Array, Array, Array]:
    """Mass, first and second moment of |t| between consecutive edges, for the law (1 - t^2/d)^((d-3)/2)."""

    def integrate(edges: Array) -> Array:
        half, centre = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
        t = centre[:, None] + half[:, None] * _NODES
        f = np.maximum(1 - t**2 / head_size, 0.0) ** ((head_size - 3) / 2)
        return np.stack([(f * t**power * _WEIGHTS).sum(1) * half for power in range(3)])

    # Long cells are cut, so that 40 nodes are exact on each piece.
    fine = np.concatenate([*(np.linspace(a, b, 9)[:-1] for a, b in pairwise(edges)), edges[-1:]])
    mass, first, second = integrate(fine).reshape(3, len(edges) - 1, 8).sum(-1)
    total = integrate(np.linspace(0.0, _end(head_size), 65))[0].sum()
    return mass / total, first / total, second / total


def _cells(head_size: int, magnitudes: Array) -> tuple[Array, Array, Array]:
    edges = np.concatenate([[0.0], (magnitudes[1:] + magnitudes[:-1]) / 2, [_end(head_size)]])
    return _moments(head_size, edges)


def distortion(head_size: int, magnitudes: Array) -> float:
    mass, first, second = _cells(head_size, magnitudes)
    return float((second - 2 * magnitudes * first + magnitudes**2 * mass).sum())


def optimum(bits: int, head_size: int) -> Array:
    """Lloyd's iteration from evenly spaced levels, until nothing moves."""
    magnitudes: Array = (np.arange(2 ** (bits - 1)) + 0.5) / 2 ** (bits - 1) * 2.5
    for _ in range(3000):
        mass, first, _ = _cells(head_size, magnitudes)
        before, magnitudes = magnitudes, first / mass
        if np.abs(magnitudes - before).max() < 1e-9:
            break
    return magnitudes


# --- the figures of the theory ----------------------------------------------------------------------------------------

LAW = {  # optimal distortion of f(t), to the digits that are known
    64: (0.3584, 0.1145, 0.0334, 0.00913),
    128: (0.3609, 0.1160, 0.0340, 0.00932),
    256: (0.3621, 0.1167, 0.0343, 0.00941),
}
GAUSSIAN = (0.3634, 0.1175, 0.03455, 0.00950, 0.0025, 0.00064)
GAUSSIAN_MAGNITUDES = (
    (0.7979,),
    (0.4528, 1.5104),
    (0.2451, 0.7560, 1.3439, 2.1519),
    (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("head_size", LAW)
def test_distortion_is_that_of_the_coordinate_law(bits: int, head_size: int) -> None:
    assert lloyd_max(bits, head_size).distortion == pytest.approx(LAW[head_size][bits - 1], rel=0.01)


@pytest.mark.parametrize("bits", range(1, 7))
def test_distortion_tends_to_the_gaussian_one(bits: int) -> None:
    assert lloyd_max(bits, 1024).distortion == pytest.approx(GAUSSIAN[bits - 1], rel=0.01 if bits < 5 else 0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_magnitudes_tend_to_the_gaussian_ones(bits: int) -> None:
    book = lloyd_max(bits, 1024)
    # half a step of the int8 rounding, and the law's own distance from its limit
    np.testing.assert_allclose(book.magnitudes, GAUSSIAN_MAGNITUDES[bits - 1], atol=book.step / 2, rtol=0.005)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_one_bit_level_is_the_mean_magnitude(head_size: int) -> None:
    """The one case with a closed form: E|t| = sqrt(d / pi) gamma(d/2) / gamma((d+1)/2), and D = 1 - E|t|^2."""
    mean = math.sqrt(head_size / math.pi) * math.exp(math.lgamma(head_size / 2) - math.lgamma((head_size + 1) / 2))
    book = lloyd_max(1, head_size)
    assert book.magnitudes[0] == pytest.approx(mean, rel=1e-5)
    assert book.distortion == pytest.approx(1 - mean**2, rel=1e-4)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_distortion_lies_between_the_bounds_of_the_paper(head_size: int) -> None:
    for bits in range(1, 9):
        ratio = lloyd_max(bits, head_size).distortion * 4**bits
        assert 1 <= ratio <= math.sqrt(3) * math.pi / 2, f"{bits} bits"


# --- the tables themselves --------------------------------------------------------------------------------------------

BOOKS = [pytest.param(bits, size, id=f"{bits}bit-d{size}") for size in HEAD_SIZES for bits in range(1, 9)]


@pytest.mark.parametrize(("bits", "head_size"), BOOKS)
def test_table_is_well_formed(bits: int, head_size: int) -> None:
    book = lloyd_max(bits, head_size)
    half = 2 ** (bits - 1)
    assert (book.bits, book.head_size) == (bits, head_size)
    assert book.magnitudes.shape == (half,)
    assert book.magnitudes[0] > 0
    assert np.all(np.diff(book.magnitudes) > 0)
    assert book.magnitudes[-1] < math.sqrt(head_size), "no coordinate of a unit vector is larger"
    np.testing.assert_array_equal(book.levels[:half], book.magnitudes)
    np.testing.assert_array_equal(book.levels[half:], -book.magnitudes)
    assert len(book.thresholds) == half - 1
    assert np.all(book.thresholds > book.magnitudes[:-1])
    np.testing.assert_allclose(book.thresholds - book.magnitudes[:-1], book.magnitudes[1:] - book.thresholds)


@pytest.mark.parametrize(("bits", "head_size"), BOOKS)
def test_stated_distortion_is_the_tables_own(bits: int, head_size: int) -> None:
    book = lloyd_max(bits, head_size)
    assert book.distortion == pytest.approx(distortion(head_size, book.magnitudes), rel=2e-4)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_each_level_is_the_centroid_of_its_cell(bits: int, head_size: int) -> None:
    """The necessary condition of an optimal quantiser; narrower widths are rounded and only come close."""
    book = lloyd_max(bits, head_size)
    mass, first, _ = _cells(head_size, book.magnitudes)
    spacing = np.diff(book.magnitudes, prepend=0.0)
    assert np.abs((first / mass - book.magnitudes) / spacing).max() < 1e-3
    assert book.integers is None
    assert book.step == 0


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_int8_levels_fit_and_cost_next_to_nothing(bits: int, head_size: int) -> None:
    book = lloyd_max(bits, head_size)
    assert bits <= INT8_BITS
    assert book.integers is not None
    assert book.integers.min() >= 0
    assert book.integers.max() <= 127, "7 bits: the complement of m is then an int8 too"
    assert np.all(np.diff(book.integers) > 0)
    np.testing.assert_allclose(book.magnitudes, (book.integers + 0.5) * book.step, rtol=1e-12)
    # the level of a negative coordinate is the complement of m: ~m + 1/2 == -(m + 1/2)
    np.testing.assert_allclose((~book.integers + 0.5) * book.step, -book.magnitudes, rtol=1e-12)

    best = distortion(head_size, optimum(bits, head_size))
    assert distortion(head_size, book.magnitudes) < best * 1.001
    assert book.distortion > best * (1 - 2e-4), "nothing beats the optimum"


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("bits", [5, 6])
def test_wide_levels_are_the_optimum(bits: int, head_size: int) -> None:
    best = distortion(head_size, optimum(bits, head_size))
    assert lloyd_max(bits, head_size).distortion == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("head_size", [8, 33, 64, 80, 128, 256])
def test_a_bit_more_distorts_less(head_size: int) -> None:
    distortions = [lloyd_max(bits, head_size).distortion for bits in range(1, 9)]
    for narrow, wide in pairwise(distortions):
        assert 2.5 < narrow / wide < 4.5  # towards 6 dB a bit


def test_every_head_size_has_its_own_table() -> None:
    assert lloyd_max(4, 64).magnitudes[-1] < lloyd_max(4, 128).magnitudes[-1] < lloyd_max(4, 1024).magnitudes[-1]
    assert lloyd_max(4, 64) is lloyd_max(4, 64)
    assert isinstance(lloyd_max(4, 64), Codebook)


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_widths_that_do_not_exist(bits: int) -> None:
    with pytest.raises(FormatError, match=f"1 to 8 bits, not {bits}"):
        lloyd_max(bits, 128)


@pytest.mark.parametrize("head_size", [-8, 0, 1, 3])
def test_heads_too_small_for_a_law(head_size: int) -> None:
    with pytest.raises(FormatError, match=f"head size {head_size} is too small.*use bf16"):
        lloyd_max(4, head_size)


def test_fp8_distortion_is_that_of_a_log_uniform_mantissa() -> None:
    """Steps of 2^(e-3) in the binade 2^e; the mean of 4^-u for u uniform in [0, 1) is 3 / (8 ln 2)."""
    assert fp8_distortion() == pytest.approx(2.0**-6 / 12 * 3 / (8 * math.log(2)), rel=0.02)
