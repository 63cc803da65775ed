"""The rotation: orthogonal for every head size, its own inverse's transpose, and it spreads what is simple."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from kvfold.rotation import rotate, rotation, rotation_matrix, unrotate

EVERY_SIZE = [*range(32, 257), 320, 384, 512, 576, 640, 768, 1000, 1023, 1024]
SOME_SIZES = [8, 33, 64, 80, 96, 112, 127, 128, 192, 256, 576, 1024]


@pytest.mark.parametrize("first", range(32, 257, 32), ids=lambda first: f"d{first}..{first + 31}")
def test_orthogonal_for_every_head_size(first: int) -> None:
    sizes = [size for size in EVERY_SIZE if first <= size < first + 32 or (first == 256 and size > 256)]
    assert sizes
    for size in sizes:
        matrix = rotation_matrix(size)
        assert matrix.shape == (size, size)
        assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-11, f"head size {size}"


@pytest.mark.parametrize("size", SOME_SIZES)
def test_unrotate_undoes_rotate(size: int) -> None:
    x = torch.randn(7, 3, size, generator=torch.Generator().manual_seed(size))
    y = rotate(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    torch.testing.assert_close(unrotate(y), x, atol=2e-5, rtol=0)
    torch.testing.assert_close(rotate(unrotate(x)), x, atol=2e-5, rtol=0)
    assert (y - x).abs().max() > 0.5, "something was rotated"


@pytest.mark.parametrize("size", SOME_SIZES)
def test_scores_do_not_notice(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    q, k = torch.randn(5, size, generator=generator), torch.randn(9, size, generator=generator)
    torch.testing.assert_close(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-4, rtol=1e-4)


def test_a_constant_vector_is_spread_for_every_head_size() -> None:
    """Without the signs its whole length, sqrt(d), would stand in one coordinate."""
    for size in EVERY_SIZE:
        largest = np.abs(rotation_matrix(size) @ np.ones(size)).max()
        assert largest < 0.5 * np.sqrt(size), f"head size {size}: {largest:.2f} of {np.sqrt(size):.2f}"


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_constant_vector_of_a_usual_head_looks_gaussian(size: int) -> None:
    rotated = rotation_matrix(size) @ np.ones(size)
    assert np.abs(rotated).max() < 4
    assert (rotated**2).mean() == pytest.approx(1)


def test_a_single_outlier_channel_is_spread_for_every_head_size() -> None:
    """No entry is larger than sqrt(2 / d): one channel of length 1 leaves no larger coordinate than that."""
    for size in EVERY_SIZE:
        assert np.abs(rotation_matrix(size)).max() < np.sqrt(2 / size) * (1 + 1e-9), f"head size {size}"


@pytest.mark.parametrize("size", [32, 64, 128, 256, 1024])
def test_powers_of_two_are_signed_walsh_hadamard_transforms(size: int) -> None:
    matrix = rotation_matrix(size) * np.sqrt(size)
    np.testing.assert_allclose(np.abs(matrix), 1)
    unsigned = matrix * matrix[0]  # row 0 of a Hadamard matrix is all ones, so row 0 of R is the signs
    index = np.arange(size)
    parity = np.array([[bin(i & j).count("1") % 2 for j in index[:16]] for i in index])
    np.testing.assert_allclose(unsigned[:, :16], 1 - 2 * parity)


@pytest.mark.parametrize(
    ("size", "digest"),
    [(64, "dc9aeb260f5896f6"), (128, "b5b3bf98fcf51b8f"), (80, "c7776dd6498ea231")],
    ids=lambda value: str(value)[:8],
)
def test_signs_are_the_same_everywhere(size: int, digest: str) -> None:
    """Saved pages and pages of another process are read with this R: its signs are part of the format."""
    signs = "".join("+" if value > 0 else "-" for value in rotation_matrix(size)[0])
    assert hashlib.sha256(signs.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_is_rotated_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert rotate(x).dtype == torch.float32
    torch.testing.assert_close(rotate(x), rotate(x.float()))
    torch.testing.assert_close(unrotate(x), unrotate(x.float()))


def test_rotation_is_made_once_per_device() -> None:
    assert rotation(64) is rotation(64, "cpu")
    assert rotation(64).dtype == torch.float32
    np.testing.assert_allclose(rotation(64).numpy(), rotation_matrix(64), atol=1e-7)
