"""Runs the package's CUDA C++ kernels on the CPU, for correctness where there is no GPU. Slow; inputs have to be tiny.

block.h     the threads of a block as fibers; shared memory, barriers, asynchronous copies
shim.h      CUDA's keywords, types and functions
ptx.h       PTX instructions
ptx.py      asm statements to calls of those
build       compiling for the host
device      a stand-in for the GPU that the package's own Python code launches on
"""

from __future__ import annotations

from emulator.build import unavailable
from emulator.device import BLOCKS_BACKWARDS, LATE_COPIES, SEED, THREADS_BACKWARDS, EmulatedDevice, emulated_device

__all__ = [
    "BLOCKS_BACKWARDS", "LATE_COPIES", "SEED", "THREADS_BACKWARDS", "EmulatedDevice", "emulated_device", "unavailable",
]  # fmt: skip
