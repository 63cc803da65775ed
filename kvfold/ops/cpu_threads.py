"""Run a compiled kernel on torch's own pool of OpenMP threads.

A second pool beside torch's would fight it: after a parallel region libgomp's workers spin for milliseconds, waiting
for the next one, so that on a machine with as many threads as cores another pool's workers wait for a time slice.
(Measured with numba's own pool on two cores: 8 to 48 ms for a call of 0.5 ms.) So the kernel is handed to the
``GOMP_parallel`` of the very library that torch has loaded; LLVM's and Intel's OpenMP export the same entry. Where
none is found the calling thread does all the work.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SLOTS = 128


@lru_cache(maxsize=1)
def _gomp_parallel() -> Any | None:
    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.parent / "torch.libs", home.parent / "torch.dylibs"):
        for path in sorted(folder.glob("lib*omp*")):
            try:
                function = ctypes.CDLL(str(path)).GOMP_parallel
            except (OSError, AttributeError):
                continue  # not an OpenMP runtime that can start a region: try the next
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            function.restype = None
            return function
    return None


def describe(values: list[int | torch.Tensor]) -> list[int]:
    """Integers as they are, contiguous tensors as address and number of elements. The caller keeps the tensors
    alive."""
    flat: list[int] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            flat += (value.data_ptr(), value.numel())
        else:
            flat.append(value)
    return flat


def run(kernel: Any, arguments: list[int], tasks: int) -> None:
    """Run a numba ``cfunc(void(int64_t *))`` on up to ``torch.get_num_threads()`` threads.

    Args:
        kernel: The compiled function. It takes tasks off the counter whose address is its first argument.
        arguments: What follows that address, see :func:`describe`.
        tasks: Number of tasks; no more threads than that are used.
    """
    packed = np.zeros(_SLOTS, dtype=np.int64)  # its last element is the counter
    base = packed.ctypes.data
    packed[0] = base + 8 * (_SLOTS - 1)
    packed[1 : 1 + len(arguments)] = arguments
    threads = min(torch.get_num_threads(), tasks)
    parallel = _gomp_parallel() if threads > 1 else None
    if parallel is None:
        kernel.ctypes(base)
    else:
        parallel(kernel.address, base, threads, 0)
