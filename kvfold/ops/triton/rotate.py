# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Rotating on tensor cores with the exactness of float32: products of sums of bfloat16."""

from __future__ import annotations

import triton
import triton.language as tl

from kvfold.ops.triton.unpack import multiply, split, to_bfloat16


@triton.jit
def rotate_more(x, terms, first, acc, TERMS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr):
    """``acc + x @ matrix[first : first + n]`` for coordinates ``x`` ``[rows, n]`` of any floating dtype.

    bfloat16 is one term, float16 two and float32 three; of the products those count that float32 would see.
    """
    row = first + tl.arange(0, x.shape[1])
    address = terms + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    r0 = tl.load(address)
    r1, r2 = r0, r0
    if TERMS == 3:
        r1 = tl.load(address + PADDED * COLUMNS)
        r2 = tl.load(address + 2 * PADDED * COLUMNS)
    if x.dtype == tl.bfloat16:
        return _times(x, r0, r1, r2, acc, TERMS, 3)
    else:
        x0, rest = split(x.to(tl.float32))
        if x.dtype == tl.float32:
            x2 = to_bfloat16(x - x0.to(tl.float32) - rest.to(tl.float32))
            acc = _times(x2, r0, r1, r2, acc, TERMS, 1)
        acc = _times(rest, r0, r1, r2, acc, TERMS, 2)
        return _times(x0, r0, r1, r2, acc, TERMS, 3)


@triton.jit
def _times(x, r0, r1, r2, acc, TERMS: tl.constexpr, COUNT: tl.constexpr):
    """``acc + x @ (r0 + r1 + r2)``, of which the first COUNT, smallest first."""
    if TERMS > 2 and COUNT > 2:
        acc = multiply(x, r2, acc)
    if TERMS > 1 and COUNT > 1:
        acc = multiply(x, r1, acc)
    return multiply(x, r0, acc)
