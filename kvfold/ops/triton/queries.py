# mypy: disable-error-code="no-untyped-def, import-untyped"
"""Queries, rotated once: the launch before attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvfold.ops.triton import sides
from kvfold.ops.triton.rotate import rotate_more
from kvfold.ops.triton.unpack import split

_ROWS = 16


class Order(NamedTuple):
    """The order of a rotated query's coordinates: column ``f * units + u`` is field f of unit u (``sides.Packed``)."""

    fields: int
    units: int
    deep: int = 1
    trellis: bool = False


def rotate_queries(q: torch.Tensor, factor: float, order: Order) -> torch.Tensor:
    """Rotate queries and multiply them, as the sum of two bfloat16.

    Args:
        q: ``[B, Tq, Hq, dk]``, any floating dtype and strides.

    Returns:
        bfloat16 ``[B * Tq * Hq, 2, fields * units]``: the roundings, then what they lack.
    """
    return _rotated(q, factor, order, torch.bfloat16)[0]


def rotate_queries_to_half(q: torch.Tensor, factor: float, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the sum of two float16, in units of each row's own, float32 ``[B * Tq * Hq]``."""
    return _rotated(q, factor, order, torch.float16)


def _rotated(q: torch.Tensor, factor: float, order: Order, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_queries, heads, head_size = q.shape
    rows, columns = batch * num_queries * heads, order.fields * order.units
    out = torch.empty(rows, 2, columns, dtype=dtype, device=q.device)
    units = torch.empty(rows, dtype=torch.float32, device=q.device)
    terms, norm = sides.rotation_terms(head_size, q.device, False, *order)
    _rotate_queries[(triton.cdiv(rows, _ROWS),)](
        q, *q.stride(), num_queries, heads, terms, norm * factor, out, units, rows,
        HEAD_SIZE=head_size, TERMS=terms.shape[0], PADDED=terms.shape[1], COLUMNS=columns, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out, units


@triton.jit(do_not_specialize=["num_queries", "heads", "rows"])
def _rotate_queries(
    q, q_batch, q_token, q_head, q_coordinate, num_queries, heads, terms, factor, out, units, rows,
    HEAD_SIZE: tl.constexpr, TERMS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of rows. A row is (batch, token, head)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, token, batch = row % heads, row // heads % num_queries, row // heads // num_queries
    base = q + batch * q_batch + token * q_token + head * q_head
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, PADDED, 32):
        coordinate = first + tl.arange(0, 32)
        inside = (row < rows)[:, None] & (coordinate < HEAD_SIZE)[None, :]
        x = tl.load(base[:, None] + (coordinate * q_coordinate)[None, :], mask=inside, other=0.0)
        acc = rotate_more(x, terms, first, acc, TERMS, PADDED, COLUMNS)
    acc = acc * factor
    if out.dtype.element_ty == tl.float16:  # the largest coordinate becomes 2^14
        unit = tl.maximum(tl.max(tl.abs(acc), axis=1), 1e-30) * (1.0 / 16384)
        tl.store(units + row, unit, mask=row < rows)
        acc = acc / unit[:, None]
        main = acc.to(tl.float16)
        rest = (acc - main.to(tl.float32)).to(tl.float16)
    else:
        main, rest = split(acc)
    column = tl.arange(0, COLUMNS)
    address = out + row[:, None] * (2 * COLUMNS) + column[None, :]
    tl.store(address, main, mask=(row < rows)[:, None])
    tl.store(address + COLUMNS, rest, mask=(row < rows)[:, None])
