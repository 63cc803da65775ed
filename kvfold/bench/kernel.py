"""A kernel that is ready to be timed, and what it is prepared from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvfold.bench.cases import Case, DecodeCase
from kvfold.errors import KVFoldError
from kvfold.formats import KVFormat

_SMALLEST, _LARGEST = KVFormat.parse("k2v2"), KVFormat.parse("bf16")
L2_MULTIPLE = 4
"""The calls of one replay touch this many times the L2, unless :data:`MAX_COPIES` is reached first."""
MAX_COPIES = 64
"""More calls in a replay tell nothing more: what a replay itself costs is spread over 64 then."""
DECODE_CALLS = 8
"""A replay has at least so many decodes where memory allows: what a replay itself costs is no part of a decode, and an
engine's graph has one for each layer."""
MEMORY_SHARE = 8
"""More than one part in so many of the device's memory is not taken for that by one kernel."""
PREFILL_COPIES = 1
"""Of a prefill's data: milliseconds of matrix products heat the chip and lower its clock, so each replay is one call of
every kernel, behind a pause of the same length. The buffer that is read before has emptied the L2."""


class Unavailable(KVFoldError):
    """A kernel cannot take part in a case; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """What every kernel of a run is prepared with.

    Attributes:
        device: The CUDA device.
        l2_bytes: Size of its L2 cache.
        page_size: Tokens in a page, of every paged cache.
        memory_bytes: Size of the device's memory.
    """

    device: torch.device
    l2_bytes: int
    page_size: int
    memory_bytes: int

    @classmethod
    def of(cls, device: torch.device, page_size: int) -> Setting:
        """For a CUDA device as it is."""
        properties = torch.cuda.get_device_properties(device)
        return cls(device, properties.L2_cache_size, page_size, properties.total_memory)

    def copies(self, call_bytes: int) -> int:
        """How many copies of its data a kernel gets: enough that they exceed the L2 by :data:`L2_MULTIPLE`."""
        return max(1, min(MAX_COPIES, -(-L2_MULTIPLE * self.l2_bytes // max(call_bytes, 1))))

    def decodes(self, case: DecodeCase) -> int:
        """How many calls a replay has, each on a copy of the cache of its own.

        All kernels of a case have as many, so that each bears the same share of what a replay itself costs: enough for
        the smallest cache to exceed the L2, and :data:`DECODE_CALLS`, or as many as the memory has room for of the
        largest.
        """
        room = self.memory_bytes // (MEMORY_SHARE * case.cache_bytes(_LARGEST))
        return max(self.copies(case.cache_bytes(_SMALLEST)), min(DECODE_CALLS, room))


@dataclass(frozen=True)
class Kernel:
    """One way of doing a case.

    Attributes:
        calls: What is timed: each does the whole case, and each on a copy of the data of its own.
        bytes: What the rate counts, per call: for attention the cache's bytes, for a store what is read and written.
        note: What is worth knowing about how it was called.
    """

    calls: Sequence[Callable[[], object]]
    bytes: int
    note: str = ""


Prepare = Callable[[Case, Setting], Sequence[Kernel]]
"""Allocates and returns the variants of a contender, of which the fastest counts; raises :class:`Unavailable`."""


@dataclass(frozen=True)
class Contender:
    """Something that can do cases.

    Attributes:
        name: What the table calls it.
        prepare: See :data:`Prepare`.
        ours: Whether it is kvfold's: then a failure of it fails the run.
    """

    name: str
    prepare: Prepare
    ours: bool = False


def block_tables(case: DecodeCase, copies: int, page_size: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Page tables of no pattern, int32 ``[copies, B, P]``, over disjoint pages; and how many pages there are.

    Entries beyond a sequence's end are page 0.
    """
    counts = torch.tensor(case.pages(page_size), device=device)
    total = copies * int(counts.sum())
    order = torch.randperm(total, device=device, dtype=torch.int32)
    used = torch.arange(int(counts.max()), device=device) < counts[:, None]
    tables = torch.zeros(copies, *used.shape, dtype=torch.int32, device=device)
    tables[used.expand_as(tables)] = order
    return tables, total


def queries(case: DecodeCase, device: torch.device) -> torch.Tensor:
    """Normal bfloat16 queries ``[B, Tq, Hq, d]``."""
    shape = (case.batch, case.query_tokens, case.num_heads, case.head_size)
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def lengths(case: DecodeCase, device: torch.device) -> torch.Tensor:
    """Sequence lengths, int32 ``[B]``."""
    return torch.tensor(case.lengths, device=device, dtype=torch.int32)
