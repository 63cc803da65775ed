"""What an attention operation is told besides its tensors: one value that every implementation takes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DecodeSchedule(NamedTuple):
    """Which warp of a GPU does what in :func:`kvfold.ops.decode_attention`; see :func:`kvfold.ops.schedule_decode`.

    Attributes:
        data: int32, the implementation's own.
        batch, query_tokens, num_kv_heads, group, lag, window: What it was made for; group is query heads per KV head.
        first, query_start: Whether they were given.
    """

    data: torch.Tensor
    batch: int
    query_tokens: int
    num_kv_heads: int
    group: int
    lag: int
    window: int | None
    first: bool
    query_start: bool

    def differences(self, other: DecodeSchedule) -> str:
        """What this one was made for that the other was not, and its device; empty if nothing."""
        pairs = zip(self._fields[1:], self[1:], other[1:], strict=True)
        found = [f"{name} {mine} and not {its}" for name, mine, its in pairs if mine != its]
        found += [f"{self.data.device} and not {other.data.device}"] * (self.data.device != other.data.device)
        return ", ".join(found)


class AttentionOptions(NamedTuple):
    """See :func:`kvfold.ops.decode_attention` for each. (A named tuple, because dynamo traces those.)"""

    scale: float
    first: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    lag: int = 0
    window: int | None = None
    softcap: float | None = None
    mask: torch.Tensor | None = None
    batch_invariant: bool = False
    inputs_ready: bool = False
