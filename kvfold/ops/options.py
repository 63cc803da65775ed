"""What an attention operation is told besides its tensors: one value that every implementation takes."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
