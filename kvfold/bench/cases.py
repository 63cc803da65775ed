"""The shapes that are timed and the bytes that a format stores for them. Pure Python, no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from kvfold.formats import KVFormat

HEAD_SIZE = 128
_RAGGED_SEED = 0


@dataclass(frozen=True)
class DecodeCase:
    """A batch of sequences, each with a few new query tokens.

    Attributes:
        name: What the table and ``--shapes`` call it.
        lengths: Tokens of each sequence in the cache, the queries' own included.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Coordinates of a key and of a value.
        query_tokens: New tokens per sequence.
    """

    kind: ClassVar[str] = "decode"
    name: str
    lengths: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = HEAD_SIZE
    query_tokens: int = 1

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Live tokens of all sequences."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all sequences are equally long, so that a dense tensor can hold them."""
        return len(set(self.lengths)) == 1

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products; the causal corner of a few queries is not subtracted."""
        return 4 * self.query_tokens * self.num_heads * self.head_size * self.tokens

    def cache_bytes(self, fmt: KVFormat) -> int:
        """Bytes that the format stores for the live tokens."""
        return self.tokens * self.num_kv_heads * fmt.bytes_per_token(self.head_size, self.head_size)

    def pages(self, page_size: int) -> list[int]:
        """Pages of each sequence."""
        return [-(-length // page_size) for length in self.lengths]

    def reduced(self) -> DecodeCase:
        """The shortest and the longest sequence alone, for a check that costs little."""
        chosen = self.lengths[:1] if self.batch == 1 else (min(self.lengths), max(self.lengths))
        return replace(self, lengths=chosen)


@dataclass(frozen=True)
class PrefillCase:
    """A chunk of one sequence, on a prefix that is in the cache already.

    Attributes:
        chunk: Tokens of the chunk.
        prefix: Tokens before it.
    """

    kind: ClassVar[str] = "prefill"
    name: str
    chunk: int
    prefix: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = HEAD_SIZE

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, of the visible tokens."""
        seen = self.chunk * self.prefix + self.chunk * (self.chunk + 1) // 2
        return 4 * self.num_heads * self.head_size * seen

    def cache_bytes(self, fmt: KVFormat) -> int:
        """Bytes that the format stores for the prefix."""
        return self.prefix * self.num_kv_heads * fmt.bytes_per_token(self.head_size, self.head_size)


@dataclass(frozen=True)
class StoreCase:
    """Tokens whose K and V (bfloat16) are written into the cache, each to a page of its own choosing."""

    kind: ClassVar[str] = "store"
    name: str
    tokens: int
    num_kv_heads: int = 8
    head_size: int = HEAD_SIZE

    @property
    def input_bytes(self) -> int:
        """Bytes of K and V as they come, bfloat16."""
        return self.tokens * self.num_kv_heads * 2 * self.head_size * 2

    def cache_bytes(self, fmt: KVFormat) -> int:
        """Bytes that are written."""
        return self.tokens * self.num_kv_heads * fmt.bytes_per_token(self.head_size, self.head_size)


Case = DecodeCase | PrefillCase | StoreCase


def ragged_lengths(count: int, shortest: int, longest: int, seed: int = _RAGGED_SEED) -> tuple[int, ...]:
    """Lengths from a log-uniform law: many short sequences and a few long ones, the same in every run."""
    draw = random.Random(seed)
    low, high = math.log(shortest), math.log(longest)
    return tuple(round(math.exp(low + (high - low) * draw.random())) for _ in range(count))


def _uniform(batch: int, context: int) -> DecodeCase:
    return DecodeCase(f"{batch}x{context}", (context,) * batch)


_LARGE = (32768,) * 8
CASES: tuple[Case, ...] = (
    *(
        _uniform(batch, context)
        for batch, context in (
            (8, 32768), (32, 8192), (64, 16384), (1, 131072), (1, 32768), (8, 4096), (64, 512), (1, 1024), (8, 128),
            (64, 2048),
        )
    ),
    DecodeCase("ragged-64", ragged_lengths(64, 1024, 65536)),
    DecodeCase("gqa8-8x32768", _LARGE, num_heads=64, num_kv_heads=8),
    DecodeCase("mha-8x32768", _LARGE, num_heads=32, num_kv_heads=32),
    DecodeCase("q4-8x32768", _LARGE, query_tokens=4),
    StoreCase("store-8192", 8192),
    StoreCase("store-8", 8),
    PrefillCase("prefill-2048+30720", chunk=2048, prefix=30720),
)  # fmt: skip
"""Everything that is timed, in the order of the tables."""

QUICK = ("8x32768", "8x4096", "64x2048", "store-8192")


def select(patterns: Sequence[str] | None = None, quick: bool = False) -> list[Case]:
    """The cases whose names match one of the patterns (``8x*``, ``store-*``), in their usual order.

    Args:
        patterns: Shell patterns; None for all.
        quick: Take only :data:`QUICK`, unless patterns are given.

    Raises:
        ValueError: A pattern matches nothing; the message names what there is.
    """
    if not patterns:
        return [case for case in CASES if not quick or case.name in QUICK]
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in CASES):
            raise ValueError(f"no shape is called {pattern!r}; there are {', '.join(case.name for case in CASES)}")
    return [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
