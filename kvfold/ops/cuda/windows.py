"""How the keys of a long sequence are cut into windows that a prefill de-quantises, and who reads them: arithmetic.

A window is some KV heads by some tokens. The queries of these heads read one window after the other; such groups of
heads are served in turns on up to two streams, each with memory of its own for a window, for rotated queries and for
partial results. All of that is :data:`SCRATCH_BYTES` at most.

What it costs is counted in keys that a block of 128 query rows reads, fitted to an H200 (docs/kernels.md, Prefill).
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from kvfold.errors import CapacityError

SCRATCH_BYTES = 64 * 2**20
"""What a prefill takes at most beside its result: windows, rotated queries, partial results, and those in float32 that
FlashAttention-3 makes where processors share the keys of a block."""

TOKEN_BYTES = 2 * 2 * 128
"""Of a KV head in a window: K and V, float16."""
VECTOR_BYTES = 2 * 128
"""Of a rotated query or a partial result."""
_SHARED_BYTES = 4 * 128  # of a partial result inside FlashAttention-3

SLOTS = 3
"""Partial results of a group at a time, at most: two wait for the last, and are joined where there is one more before
it. The last takes the place of the queries where the library can do that."""

_LONG = 800.0  # microseconds of attention behind which the host's launches for two streams are hidden
_KEYS_PER_MICROSECOND = 81.0  # that a processor reads for 128 query rows
_CALL_COST = 1000  # of a launch, with the blocks that begin and end, and of the window's expansion
_SHARE_COST = 1500  # of joining what processors that share a block have found
_WAIT_COST = 600  # where nobody attends on half of the processors while a window is expanded
_LEND_COST = 400.0  # of the chunk's attention to itself at the end, where nothing hides its ends
_MERGE_COST = 1 / 400  # of joining another vector of 128


class Library(NamedTuple):
    """What a library does.

    Attributes:
        shares: Processors share the keys of a block where there are few blocks.
        in_place: A result may go where its queries are.
    """

    shares: bool
    in_place: bool


class Share(NamedTuple):
    """What one of the streams that work beside each other may take.

    Attributes:
        processors: That it should keep busy.
        streams: Their number.
        library: What attends.
        lent: How many of two streams have a place for queries in the result.
    """

    processors: int
    streams: int
    library: Library
    lent: int = 0

    def among(self, blocks: int) -> int:
        """Processors that share the keys of each of so many blocks of 128 query rows."""
        return max(1, self.processors // blocks) if self.library.shares else 1

    def tokens_of(self, width: int, rows: int, slots: int) -> int:
        """Of windows of ``width`` KV heads, beside ``rows`` queries of each with so many results; below 0: no room."""
        among = self.among(blocks_of(rows, width))
        inside = among * _SHARED_BYTES if among > 1 else 0
        results = slots + (not self.library.in_place)
        beside = self.streams * (results * VECTOR_BYTES + inside) - self.lent * VECTOR_BYTES
        return (SCRATCH_BYTES // width - rows * beside) // (self.streams * TOKEN_BYTES) // 16 * 16


class Split(NamedTuple):
    """How a sequence's keys are cut: windows of some KV heads by some tokens, the last of each smaller."""

    heads: int
    tokens: int


class Group(NamedTuple):
    """Some queries, some KV heads, and the windows that they read one after the other.

    Attributes:
        begin: First of the chunk's queries.
        rows: Their number.
        first: KV head.
        heads: KV heads.
        group: Query heads of each.
        windows: Tokens: from one on, and before another.
    """

    begin: int
    rows: int
    first: int
    heads: int
    group: int
    windows: tuple[tuple[int, int], ...]

    @property
    def vectors(self) -> int:
        """Queries of all heads."""
        return self.heads * self.group * self.rows

    @property
    def window_vectors(self) -> int:
        """Of K, and as many of V, of the largest window."""
        return self.heads * max(end - start for start, end in self.windows)


class Plan(NamedTuple):
    """Who reads what on how many streams, and what each of these needs.

    Attributes:
        share: Of a stream.
        groups: In the order in which the streams serve them in turns.
        vectors: Of each stream: of K and V of a window, of queries and of results beside them.
    """

    share: Share
    groups: tuple[Group, ...]
    vectors: tuple[int, ...]

    def among(self, x: Group) -> int:
        """Processors that share the keys of a block of a group: no more than have room, which is that of the first."""
        first = self.groups[0]  # the largest
        most, own = (self.share.among(blocks_of(y.rows * y.group, y.heads)) for y in (first, x))
        return min(own, most * first.vectors // x.vectors) if most > 1 else 1

    @property
    def lenders(self) -> tuple[Group, ...]:
        """The last groups, one for each stream that they lend their place in the result to, for its queries.

        The chunk's attention to itself of these heads comes last: that place is not free before.
        """
        return self.groups[len(self.groups) - self.share.lent :]


def blocks_of(rows: int, heads: int) -> int:
    """Blocks of the library's kernel: each reads the keys of a KV head for 128 of its query rows."""
    return -(-rows // 128) * heads


@lru_cache(maxsize=4096)
def split(rows: int, heads: int, keys: int, own: int, share: Share) -> tuple[float, Split] | None:
    """The windows that ``rows`` queries of a KV head read fastest, and their cost; None if they have no room.

    ``own`` more keys are read from a window of their own. Few heads with all tokens need no joining; many heads make
    enough blocks for all processors where queries are few.
    """

    def reading(width: int) -> float:
        """For each key and group of so many heads, by all processors."""
        blocks = blocks_of(rows, width)
        if blocks > share.processors:
            return -(-blocks // (share.processors * share.streams))
        return 1 / (share.among(blocks) * share.streams)

    def calling(width: int) -> float:
        blocks = blocks_of(rows, width)
        alone = share.streams > 1 and blocks <= share.processors
        return _CALL_COST + (_SHARE_COST if share.among(blocks) > 1 else 0) + (_WAIT_COST if alone else 0)

    def cost(x: Split) -> float:
        times = -(-keys // x.tokens) + (own > 0)
        groups, rest = divmod(heads, x.heads)
        widths = [(groups, x.heads), *([(1, rest)] if rest else [])]
        reads = sum(number * (reading(width) * keys + calling(width) * times) for number, width in widths)
        return reads + _MERGE_COST * times * rows * heads

    def fewest(width: int) -> Split | None:
        """As few windows as have room for so many heads, and as large as each other."""
        for slots in range(1, SLOTS + 1):
            tokens = share.tokens_of(width, rows, slots)
            if tokens < least:
                return None
            number = -(-keys // tokens)
            if number + (own > 0) <= slots:
                break
        tokens = max(-(-keys // max(number, 1) // 16) * 16, least)
        if 2 * min(tokens, keys) < share.lent * rows:  # where they were, the chunk's attention to itself has a place
            return None
        return Split(width, tokens)

    least = -(-own // 16) * 16 + 16 * (own > 0) or 16  # own keys begin in a tile
    widths = [width for width in range(1, heads + 1) if not share.lent or heads % (2 * width) == 0]
    fitting = [x for width in widths if (x := fewest(width)) is not None]
    return min(((cost(x), x) for x in fitting), default=None)


@lru_cache(maxsize=1024)
def plan(count: int, heads: int, group: int, prefix: int, packed: bool, processors: int, library: Library) -> Plan:
    """Who reads a prefix of ``prefix`` tokens; with ``packed`` the first window ends with the queries' own tokens.

    Queries are cut into parts where that costs less, or where one head's have no room: each part reads all keys before
    it.

    Args:
        count: Queries of the chunk.
        heads: KV heads.
        group: Query heads of a KV head.
        processors: Those of the GPU.

    Raises:
        CapacityError: Not even one query's have room.
    """
    takes = blocks_of(count * group, heads) * prefix / (processors * _KEYS_PER_MICROSECOND)
    streams = 2 if heads > 1 and takes >= _LONG else 1
    share = Share(processors // streams, streams, library)
    best: tuple[float, Plan] | None = None
    for parts in itertools.count(1):
        rows = -(-count // parts)
        unit = 128 if rows >= 128 else 16 if rows >= 16 else 1
        rows = -(-rows // unit) * unit  # about as many as each other
        may_lend = parts == 1 and streams == 2 and not packed and library.in_place
        shares = [share._replace(lent=lent) for lent in range(3 if may_lend else 1)]
        found = [_in_parts(rows, count, heads, group, prefix, packed, each) for each in shares]
        cheapest = min(filter(None, found), key=itemgetter(0), default=None)
        if best is not None and (cheapest is None or cheapest[0] >= best[0]):
            break
        best = cheapest
        if rows == 1:
            break
    if best is None:
        raise CapacityError(
            f"a prefill with {group} query heads for a KV head cannot read {prefix} tokens: the results of so many "
            f"windows exceed its {SCRATCH_BYTES >> 20} MiB of scratch; use a shorter context, or "
            "kvfold.ops.backend('triton')"
        )
    return best[1]


def _in_parts(
    most: int, count: int, heads: int, group: int, prefix: int, packed: bool, share: Share
) -> tuple[float, Plan] | None:
    """The plan and its cost, with ``most`` queries in a part; None if there is no room."""
    starts = range(0, count, most)
    rows, keys = min(most, count), prefix + starts[-1] if packed else prefix
    found = split(group * rows, heads, keys, rows if packed else 0, share)  # of the longest serves all
    if found is None:
        return None
    cost, (width, tokens) = found
    groups = []
    for begin in starts:
        rows, before = min(most, count - begin), prefix + begin if packed else prefix
        windows = [(at, min(at + tokens, before)) for at in range(0, before, tokens)]
        if packed:
            windows.insert(0, (before // 16 * 16, before + rows))
        for first in range(0, heads, width):
            groups.append(Group(begin, rows, first, min(width, heads - first), group, tuple(windows)))

    def vectors(x: Group, lent: bool) -> int:
        beside = min(len(x.windows), SLOTS) if share.library.in_place else 1
        return 2 * x.window_vectors + (beside - lent) * x.vectors

    lent = [stream >= share.streams - share.lent for stream in range(share.streams)]
    return len(starts) * cost + share.lent * _LEND_COST, Plan(
        share, tuple(groups), tuple(max(vectors(x, its) for x in groups) for its in lent)
    )
