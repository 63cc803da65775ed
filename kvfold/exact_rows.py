"""The exact first and last tokens of the sequences of a paged cache: a row of them for each sequence.

A row has the first ``sinks`` tokens, and behind them a ring of ``tail``, in which the token at position j lies at ``j %
tail``. The pages hold every token too, so that a truncated sequence only has fewer exact tokens than it could, until
new ones fill the ring again.

Where a step's tokens go is known when the sequences are extended; storing them reads nothing on the host. The tokens of
a chunk replace those that its first queries still see in the tail. So storing a chunk first copies the rows and the
chunk, of one layer: right after that layer's store its queries find everything that was exact when their tokens came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from kvfold.errors import ShapeError
from kvfold.formats import KVFormat
from kvfold.sequences import Held

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FAR = 1 << 30
"""A position that no token has."""


class Part(NamedTuple):
    """What a step adds to one sequence: the tokens from position ``begin`` up to ``end``."""

    row: int
    begin: int
    end: int
    exact_from: int  # the sequence's before the step
    offset: int  # which of the step's tokens is the first


class View(NamedTuple):
    """Where a sequence's exact tokens lie in a tensor of tokens."""

    row: int  # where its row begins
    exact_from: int  # the first position that the ring has, apart from sinks
    begin: int = FAR  # tokens from this position on are not in the row
    chunk: int = 0  # but from here on, in order


class Chunk(NamedTuple):
    """Copies that the last store of a chunk made, of one layer: the rows before it, and behind them its tokens."""

    layer: int
    moment: int  # when it was made; later changes of sequences make it worthless
    k: torch.Tensor  # [N, H, dk]
    v: torch.Tensor  # [N, H, dv]


def kept(fmt: KVFormat, length: int, exact_from: int) -> tuple[range, range]:
    """The positions of which a row has a token: sinks, and those in the ring beside them."""
    return range(min(fmt.sinks, length)), range(max(exact_from, fmt.sinks), length)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``, or raise :class:`~kvfold.errors.ShapeError` if exact tokens are not kept in it."""
    if dtype not in DTYPES:
        raise ShapeError(f"exact tokens are kept in bfloat16, float16 or float32, not in {dtype}")
    return dtype


class ExactRows:
    """Rows for all layers, and the step whose tokens are being stored.

    Args:
        fmt: How many sinks, and how long a tail.
        rows: How many to begin with.
        dtype: The model's.

    Attributes:
        k: ``[num_layers, rows, sinks + tail, H, dk]``. v: ``[num_layers, rows, sinks + tail, H, dv]``.

    Raises:
        ShapeError: ``dtype`` is not bfloat16, float16 or float32.
    """

    def __init__(
        self, fmt: KVFormat, num_layers: int, num_kv_heads: int, head_size: int, head_size_v: int, rows: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.format, self.dtype = fmt, check_dtype(dtype)
        self.width = fmt.sinks + fmt.tail
        shape = (num_layers, rows, self.width, num_kv_heads)
        self.k = torch.zeros(*shape, head_size, dtype=dtype, device=device)
        self.v = torch.zeros(*shape, head_size_v, dtype=dtype, device=device)
        self.begin(torch.empty(0, dtype=torch.int64), {})

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def require(self, rows: int) -> None:
        """Have at least so many rows. They double, so that a copy is rare."""
        held = self.k.shape[1]
        if rows > held:
            more = max(rows - held, held)
            self.k, self.v = (
                torch.cat([x, x.new_zeros(x.shape[0], more, *x.shape[2:])], dim=1) for x in (self.k, self.v)
            )

    def copy(self, source: int, target: int) -> None:
        """A row to another, in all layers."""
        for x in (self.k, self.v):
            x[:, target] = x[:, source]

    def tokens(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows of a layer as tokens: K ``[rows * (sinks + tail), H, dk]`` and V."""
        return self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)

    def place(self, row: int, position: int) -> int:
        """Which of :meth:`tokens` a row's token at a position is."""
        sinks, tail = self.format.sinks, self.format.tail
        return row * self.width + (position if position < sinks else sinks + position % tail)

    def places(self, held: Iterable[Held]) -> list[int]:
        """The same of all exact tokens that these sequences have, each one's in order of position."""
        return [
            self.place(one.row, position)
            for one in held
            for part in kept(self.format, one.length, one.exact_from)
            for position in part
        ]

    # --- a step -------------------------------------------------------------------------------------------------------

    def begin(self, slots: torch.Tensor, parts: Mapping[int, Part]) -> None:
        """The tokens of ``slots`` are to be stored next: by sequence, what each of them gets."""
        self._slots, self._parts = slots, dict(parts)
        self._stored: set[int] = set()
        self._writes = self._prepare_writes()
        # one token needs no copies: its only query sees the tail as it is afterwards
        chunks = {seq: part for seq, part in parts.items() if self.format.tail and part.end - part.begin > 1}
        rows = [part.row for part in chunks.values()]
        self._chunk_rows = torch.tensor(rows, device=self.k.device) if rows else None
        self._chunk_views = {
            seq: View(number * self.width, part.exact_from, part.begin, len(chunks) * self.width + part.offset)
            for number, (seq, part) in enumerate(chunks.items())
        }
        self._chunk: Chunk | None = None

    def forget(self, seq: int) -> None:
        """A sequence is gone: what the step has for it must not reach its row's next owner."""
        if self._parts.pop(seq, None) is not None:
            self._writes = self._prepare_writes()

    def check(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor | None = None) -> None:
        """Refuse K and V that would lose bits, and slots other than the step's.

        Raises:
            ShapeError: See above.
        """
        for name, x in (("k", k), ("v", v)):
            if x.dtype in (self.dtype, *(DTYPES if self.dtype == torch.float32 else ())):
                continue
            way_out = f"make it with dtype={x.dtype}" if x.dtype in DTYPES else f"cast {name} first"
            raise ShapeError(
                f"{name} is {x.dtype}, and this cache keeps exact tokens of {self.format} in {self.dtype}: {way_out}"
            )
        if slots is None or not len(slots):
            return
        if slots.data_ptr() != self._slots.data_ptr() or slots.shape != self._slots.shape:
            raise ShapeError(
                f"slots are not those of the last extend(), whole and in order, which a cache of {self.format} needs "
                "to keep its exact tokens: extend all sequences of a step together, extend({seq: n, ...}), and pass "
                "what it returns"
            )

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, moment: int) -> None:
        """Keep those of the step's tokens, k ``[T, H, dk]`` and v ``[T, H, dv]``, that are sinks or in a tail."""
        if self._chunk_rows is not None:
            self._copy_chunk(layer, k, v, moment)
        self._stored.add(layer)
        source, target = self._writes
        for tokens, x in zip(self.tokens(layer), (k, v), strict=True):
            tokens.index_copy_(0, target, x.detach().index_select(0, source).to(self.dtype))

    def _prepare_writes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the step's tokens are kept, and where in :meth:`tokens`: int64, on the device."""
        pairs = []
        for part in self._parts.values():
            # of a ring's place the last token only: an order of writes is not promised
            sinks, ring = kept(self.format, part.end, max(part.begin, part.end - self.format.tail))
            places = [*(position for position in sinks if position >= part.begin), *ring]
            pairs += [(part.offset + position - part.begin, self.place(part.row, position)) for position in places]
        both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T.contiguous().to(self.k.device)
        return both[0], both[1]

    def _copy_chunk(self, layer: int, k: torch.Tensor, v: torch.Tensor, moment: int) -> None:
        assert self._chunk_rows is not None
        if layer not in self._stored:
            rows = [pool[layer].index_select(0, self._chunk_rows).flatten(0, 1) for pool in (self.k, self.v)]
        elif self._chunk is not None and self._chunk.layer == layer:  # stored once more
            rows = [x[: len(self._chunk_rows) * self.width] for x in (self._chunk.k, self._chunk.v)]
        else:  # what the rows had before is gone
            return
        whole = [torch.cat([old, x.detach().to(self.dtype)]) for old, x in zip(rows, (k, v), strict=True)]
        self._chunk = Chunk(layer, moment, *whole)

    # --- reading ------------------------------------------------------------------------------------------------------

    def views(
        self, layer: int, seqs: Sequence[tuple[int, Held]], starts: Sequence[int], moment: int, *,
        own: bool, copies: bool,
    ) -> tuple[tuple[View, ...], torch.Tensor, torch.Tensor] | None:  # fmt: skip
        """Where queries find exact tokens, and the tensors, or None if those are not the same for all sequences.

        Args:
            starts: For each sequence the position of its first query.
            own: The queries have the tokens from there on from elsewhere: this layer's store may be still to come.
            copies: Whether what was copied at the last store is looked at.

        Raises:
            ShapeError: There are tokens between those of the row and the queries, which are not stored yet.
        """
        views, copied = [], []
        current = copies and self._chunk is not None and (self._chunk.layer, self._chunk.moment) == (layer, moment)
        for (seq, held), start in zip(seqs, starts, strict=True):
            part, chunk = self._parts.get(seq), self._chunk_views.get(seq)
            view = View(held.row * self.width, held.exact_from)
            if own and part is not None and layer not in self._stored:
                if start != part.begin:
                    raise ShapeError(
                        f"sequence {seq} was extended at position {part.begin}, and its chunk begins at {start}: store "
                        f"what lies between in layer {layer} first"
                    )
                view = view._replace(exact_from=part.exact_from)
            elif current and chunk is not None:
                view = chunk
            views.append(view)
            copied.append(view is chunk)
        if any(copied) and not all(copied):
            return None
        if any(copied):
            assert self._chunk is not None
            return tuple(views), self._chunk.k, self._chunk.v
        return tuple(views), *self.tokens(layer)
