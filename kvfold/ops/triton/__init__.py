"""The operations as Triton kernels: the portable implementation for GPUs.

They serve NVIDIA chips from sm_80 on, and whatever else Triton compiles for; with ``TRITON_INTERPRET=1`` in the
environment when this module is imported they run on the CPU, slowly, which is how they are tested without a GPU.

Sides are Lloyd–Max codes of 1 to 8 bits and trellises, with key references or without. Nothing here reads a tensor's
values on the host, and grids depend on shapes alone, so that all but :func:`load_kv` can be captured into CUDA graphs
(after one call outside, which compiles and makes the tables).
"""

from __future__ import annotations

import torch

from kvfold.layout import PageLayout
from kvfold.ops.triton.decode import decode_attention
from kvfold.ops.triton.load import load_kv
from kvfold.ops.triton.prefill import prefill_attention
from kvfold.ops.triton.store import store_kv
from kvfold.ops.triton.unpack import INTERPRETED

__all__ = [
    "SCHEDULES", "WRITES_OUT", "available", "decode_attention", "load_kv", "prefill_attention", "store_kv", "supports",
]  # fmt: skip

WRITES_OUT = SCHEDULES = False
MAX_HEAD_SIZE = 256


def available(device: torch.device) -> str | None:
    """Why these kernels do not run on a device, or None if they do."""
    if INTERPRETED.value:
        return None
    if device.type != "cuda":
        return f"Triton kernels run on GPUs (or with TRITON_INTERPRET=1), and the tensors are on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80, the first with bfloat16 tensor cores"
    return None


def supports(layout: PageLayout) -> str | None:
    """Why these kernels do not serve a layout, or None if they do."""
    for name, side, head_size in (("K", layout.format.k, layout.head_size), ("V", layout.format.v, layout.head_size_v)):
        if side.family not in ("lloyd", "trellis"):
            return f"the Triton kernels serve Lloyd–Max and trellis sides, and {name} is {side.name}"
        if head_size > MAX_HEAD_SIZE:
            return f"the Triton kernels serve heads of up to {MAX_HEAD_SIZE} coordinates, and {name} has {head_size}"
    return None
