"""The rotation that makes a vector's coordinates exchangeable before they are quantised.

For a head of ``d = 2^a * m`` coordinates (m odd) the rotation is ``R = (H ⊗ T) S``: H the Hadamard matrix of order 2^a,
T the discrete Hartley transform of order m (``T[i, j] = (cos + sin)(2 pi i j / m) / sqrt(m)``), and S a fixed diagonal
of random signs. H and T are symmetric and orthogonal, so ``R^-1 = S (H ⊗ T)``, for any head size and without a search
for Hadamard matrices of odd orders. For the usual sizes (64, 128, 256) it is the signed Walsh–Hadamard transform.

The signs cost nothing, because they are merged into the matrix. They are there for vectors of simple structure: without
them a key whose coordinates are all equal would come out as a single spike, far outside any codebook.

Rotations cancel: q is rotated once, the output un-rotated once, and K and V never (design, invariant 5).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

_SEED = 42


def _hadamard(order: int) -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(order)


def _hartley(order: int) -> NDArray[np.float64]:
    angle = 2 * np.pi * np.outer(np.arange(order), np.arange(order)) / order
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(order)


@lru_cache(maxsize=64)
def rotation_matrix(head_size: int) -> NDArray[np.float64]:
    """The orthogonal matrix R, [head_size, head_size]: a row vector x is rotated to ``x @ R.T``."""
    power = head_size & -head_size
    signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], size=head_size)
    return np.kron(_hadamard(power), _hartley(head_size // power)) * signs


@lru_cache(maxsize=256)
def _rotation_tensor(head_size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rotation_matrix(head_size)).to(device=device, dtype=dtype)


def rotation(head_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """R as float32 on ``device``, made once per device. Read only: it is shared."""
    return _rotation_tensor(head_size, torch.device(device), torch.float32)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension: ``[..., d]`` of any dtype to float32."""
    return _apply(x, inverse=False)


def unrotate(y: torch.Tensor) -> torch.Tensor:
    """Undo :func:`rotate`: ``[..., d]`` of any dtype to float32."""
    return _apply(y, inverse=True)


def _apply(x: torch.Tensor, inverse: bool) -> torch.Tensor:
    """``x @ R.T``, or ``x @ R``.

    On a CPU in float64, rounded afterwards: a BLAS sums in an order that depends on the number of rows and on the
    processor, and a token's bytes may depend on neither.
    """
    dtype = torch.float64 if x.device.type == "cpu" else torch.float32
    matrix = _rotation_tensor(x.shape[-1], x.device, dtype)
    return (x.to(dtype) @ (matrix if inverse else matrix.T)).float()
