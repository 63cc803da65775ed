"""Which sequence holds which pages, in plain lists, and the tensors that tell the operations.

:class:`kvfold.cache.PagedKVCache` adds the bytes.

Pages are counted. A fork shares them, and a shared page that is only partly filled is replaced by a copy when one of
its holders is about to write into it. One object is used from one thread.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvfold.errors import CapacityError, ShapeError, UnknownSequenceError


class PageAllocator:
    """Which pages are free, and how many sequences hold each of the others."""

    def __init__(self, num_pages: int) -> None:
        self.references = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))  # taken from the end: lowest numbers first

    def take(self, count: int) -> list[int]:
        """Pages that were free, held once. Raises CapacityError, and takes none, if there are too few."""
        if count > len(self.free):
            raise CapacityError(
                f"{count} pages are needed and {len(self.free)} of {len(self.references)} are free: free or truncate "
                "sequences, extend by fewer tokens, or make the cache with more num_pages"
            )
        taken = [self.free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one holder less of each page; a page without any is free."""
        for page in pages:
            self.references[page] -= 1
            if not self.references[page]:
                self.free.append(page)


@dataclass
class Held:
    """One sequence: ``ceil(length / page_size)`` pages, in order, its tokens and what it has of its exact ones.

    Attributes:
        row: Where its exact tokens are: a number that no other sequence has.
        exact_from: First position of which the exact tail has anything; ``length`` if it has nothing.
    """

    table: list[int]
    length: int
    row: int
    exact_from: int


class Sequences:
    """The sequences of a cache, and the pages that they hold.

    Args:
        num_pages: Pages to give out, numbered from 0.
        page_size: Tokens in a page.
        device: Where block tables, lengths and slots are wanted.
        tail: Last tokens of a sequence that are also kept exactly.
    """

    def __init__(self, num_pages: int, page_size: int, device: torch.device | str, tail: int = 0) -> None:
        self.num_pages, self.page_size, self.tail = whole("num_pages", num_pages, 1), page_size, tail
        self.device = torch.device(device)
        self._allocator = PageAllocator(self.num_pages)
        self._held: dict[int, Held] = {}
        self._next_id = 0
        self._changes = 0  # counts what makes a block table or a length out of date
        self._batch: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None

    @property
    def sequences(self) -> list[int]:
        """The sequences that exist, oldest first."""
        return list(self._held)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._allocator.free)

    def length(self, seq: int) -> int:
        """Tokens of a sequence, reserved ones included."""
        return self._sequence(seq).length

    def new_sequence(self) -> int:
        """An empty sequence. Numbers are never given out twice."""
        return self._add([], 0, 0)

    def fork(self, seq: int) -> int:
        """A new sequence of the same tokens, sharing all pages. Store what was reserved before you fork."""
        source = self._sequence(seq)
        return self._add(source.table, source.length, source.exact_from)

    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens from position ``length`` on, and give back the pages that held nothing else.

        Raises:
            UnknownSequenceError: There is no such sequence.
            ShapeError: ``length`` is negative or beyond the sequence's length.
        """
        held = self._sequence(seq)
        length = whole("length", length)
        if length > held.length:
            raise ShapeError(f"sequence {seq} has {held.length} tokens, not {length} or more: extend() grows it")
        keep = -(-length // self.page_size)
        self._allocator.release(reversed(held.table[keep:]))
        del held.table[keep:]
        held.length = length
        held.exact_from = min(held.exact_from, length)
        self._changes += 1

    def free(self, seq: int) -> None:
        """Forget a sequence. Pages that no other sequence holds become free."""
        self._allocator.release(reversed(self._sequence(seq).table))
        del self._held[seq]
        self._changes += 1

    def seq_lens(self, seqs: Sequence[int]) -> torch.Tensor:
        """Tokens of each sequence, int32 ``[B]``."""
        return torch.tensor([self.length(seq) for seq in seqs], dtype=torch.int32, device=self.device)

    def block_table(self, seqs: Sequence[int]) -> torch.Tensor:
        """The pages of each sequence, int32 ``[B, P]``, P at least 1. Unused entries are page 0."""
        tables = [self._sequence(seq).table for seq in seqs]
        width = max([1, *map(len, tables)])
        rows = [table + [0] * (width - len(table)) for table in tables]
        return torch.tensor(rows, dtype=torch.int32, device=self.device).view(len(rows), width)

    def _reserve(self, wanted: Mapping[int, int]) -> list[tuple[int, int]]:
        """Lengthen sequences, all or none, and return the pages to copy: (page that others keep, its replacement)."""
        growing = [(self._sequence(seq), whole("n", count)) for seq, count in wanted.items()]
        growing = [(held, count) for held, count in growing if count]
        writers = Counter(held.table[-1] for held, _ in growing if held.length % self.page_size)
        copies = sum(min(count, self._allocator.references[page] - 1) for page, count in writers.items())
        growth = [-(-(held.length + count) // self.page_size) - len(held.table) for held, count in growing]
        fresh = iter(self._allocator.take(sum(growth) + copies))
        moves = []
        for (held, count), pages in zip(growing, growth, strict=True):
            if held.length % self.page_size and self._allocator.references[held.table[-1]] > 1:
                shared, held.table[-1] = held.table[-1], next(fresh)
                self._allocator.release([shared])
                moves.append((shared, held.table[-1]))
            held.table += [next(fresh) for _ in range(pages)]
            held.length += count
            held.exact_from = max(held.exact_from, held.length - self.tail)
        self._changes += 1
        return moves

    def _slots(self, seq: int, begin: int) -> torch.Tensor:
        """Slots of the tokens of a sequence from position ``begin`` on, int64 on the CPU."""
        held, first = self._sequence(seq), begin // self.page_size
        pages = torch.tensor(held.table[first:], dtype=torch.int64)[:, None] * self.page_size
        slots = (pages + torch.arange(self.page_size)).flatten()
        return slots[begin - first * self.page_size : held.length - first * self.page_size]

    def _batch_of(self, seqs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Block table and lengths of a batch, made once for all layers of a step."""
        if not len(seqs):
            raise ShapeError("attention needs one sequence at least, and the batch is empty")
        key = (self._changes, *seqs)
        if self._batch is None or self._batch[0] != key:
            self._batch = (key, self.block_table(seqs), self.seq_lens(seqs))
        return self._batch[1:]

    def _add(self, table: Sequence[int], length: int, exact_from: int) -> int:
        """A new sequence that shares these pages, with the lowest row that is free."""
        self._allocator.share(table)
        seq, self._next_id = self._next_id, self._next_id + 1
        taken = {held.row for held in self._held.values()}
        row = next(row for row in range(len(taken) + 1) if row not in taken)
        self._held[seq] = Held(list(table), length, row, exact_from)
        return seq

    def _sequence(self, seq: int) -> Held:
        try:
            return self._held[seq]
        except (KeyError, TypeError):
            freed = isinstance(seq, int) and 0 <= seq < self._next_id
            reason = "was freed" if freed else "is none of this cache"
            raise UnknownSequenceError(
                f"sequence {seq!r} {reason}; new_sequence() and fork() make one, .sequences lists them"
            ) from None


def whole(name: str, value: int, least: int = 0) -> int:
    """``value`` as an int, or :class:`ShapeError` if it is no whole number from ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ShapeError(f"{name} is a whole number from {least}, not {value!r}")
    return number
