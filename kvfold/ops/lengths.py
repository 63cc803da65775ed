"""Values of small tensors of lengths, on the host: read once, or told by somebody who has them.

A prefill on CUDA decides by the lengths what it launches. Reading them waits for the device, so it is done once for all
layers of a model, as long as nobody writes to the tensor, and not at all where the caller made the tensor from numbers
that he still has.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch


class _Known(NamedTuple):
    tensor: weakref.ref[torch.Tensor]
    version: int
    values: list[int]


_known: dict[int, _Known] = {}  # by the tensor's id


def remember_lengths(lengths: torch.Tensor, values: Sequence[int]) -> None:
    """Tell the operations what a tensor holds, so that none of them has to read it from the device.

    It holds for this tensor object, not for views of it, until it is written to.

    Args:
        lengths: ``[n]``, as ``context_lens`` or ``cu_seqlens`` of :func:`kvfold.ops.prefill_attention`.
        values: The n numbers in it.

    Raises:
        ValueError: Their number is another, or the tensor was made in inference mode, where writes leave no trace.
    """
    if lengths.shape != (len(values),):
        raise ValueError(f"{len(values)} values are told of a tensor {list(lengths.shape)}")
    if lengths.is_inference():
        raise ValueError("a tensor of inference mode does not tell when it is written to; make it outside of that mode")
    _remember(lengths, list(values))


def on_host(lengths: torch.Tensor) -> list[int]:
    """The values of a tensor."""
    if lengths.is_inference():  # writes to such a tensor leave no trace
        return lengths.tolist()
    known = _known.get(id(lengths))
    if known is None or known.tensor() is not lengths or known.version != lengths._version:
        return _remember(lengths, lengths.tolist())
    return known.values


def _remember(lengths: torch.Tensor, values: list[int]) -> list[int]:
    key = id(lengths)
    _known[key] = _Known(weakref.ref(lengths, lambda _: _known.pop(key, None)), lengths._version, values)
    return values
