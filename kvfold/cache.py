"""The paged cache: compressed pages of all layers, shared between sequences, and attention to them.

    cache = PagedKVCache("k4v4", num_layers=32, num_kv_heads=8, head_size=128, num_pages=1000)
    seq = cache.new_sequence()
    slots = cache.extend(seq, n)                         # once per step: room in every layer
    cache.store(layer, k, v, slots)                      # then in each layer
    out, lse = cache.decode(layer, q, [seq], scale=128**-0.5)

A sequence's block table and length hold for all layers. Who holds which page is in :mod:`kvfold.sequences`, what lies
where inside a page in :mod:`kvfold.layout`, and files are in :mod:`kvfold.storage`. Exact sinks and tails lie beside
the pages (:mod:`kvfold.exact_rows`); :mod:`kvfold.exact_reads` says which query reads which of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from kvfold import exact_reads, ops, storage
from kvfold.errors import CapacityError, ShapeError
from kvfold.exact_rows import ExactRows, Part, check_dtype
from kvfold.formats import KVFormat
from kvfold.layout import PageLayout
from kvfold.ops.options import AttentionOptions
from kvfold.planner import FormatSpec
from kvfold.sequences import Sequences, whole

QUERY_BLOCK = 512
"""Queries of a prefill that go over the prefix together, in formats with exact tokens."""


class PagedKVCache(Sequences):
    """Compressed K and V of many sequences in all layers of a model.

    Args:
        format: What to store, in any spelling that :meth:`KVFormat.parse` understands.
        num_layers: Layers that store K and V.
        num_kv_heads: KV heads of each layer (H).
        head_size: Coordinates of a key (dk).
        head_size_v: Coordinates of a value (dv); default ``head_size``.
        num_pages: Pages of each layer, shared by all sequences.
        page_size: Tokens in a page: 16, 32 or 64.
        device: Where the pages are.
        dtype: Of exact sinks and tails: the model's. Formats without them make no use of it.
        num_sequences: Sequences for which there is room for exact sinks and tails at once. More of them get theirs when
            they come, by doubling, which copies.

    Attributes:
        pages: uint8 ``[num_layers, num_pages, H, page_bytes]``, zeroed once and never moved.
        exact: The exact sinks and tails, or None if the format has neither.

    Raises:
        FormatError: The format is unknown, or does not go with the head or page size.
        NotBuiltError: The format needs something that is not built yet.
        ShapeError: A count is not a whole number from 1; exact tokens cannot be kept in ``dtype``.
    """

    def __init__(
        self, format: FormatSpec, *, num_layers: int, num_kv_heads: int, head_size: int, head_size_v: int | None = None,
        num_pages: int, page_size: int = 64, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
        num_sequences: int = 0,
    ) -> None:  # fmt: skip
        self.layout = PageLayout.of(KVFormat.parse(format), head_size, head_size_v, page_size)
        self.format = self.layout.format
        super().__init__(num_pages, page_size, device, self.format.tail)
        self.num_layers = whole("num_layers", num_layers, 1)
        self.num_kv_heads = whole("num_kv_heads", num_kv_heads, 1)
        shape = (self.num_layers, *self.layout.page_shape(self.num_pages, self.num_kv_heads))
        self.pages = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.device = self.pages.device
        # of a page that a sequence has opened: the page before it there, or -1
        self._before = torch.full((self.num_pages,), -1, dtype=torch.int64, device=self.device)
        rows = whole("num_sequences", num_sequences)
        self.exact: ExactRows | None = None
        if self.format.sinks or self.format.tail:
            sizes = (self.num_kv_heads, self.layout.head_size, self.layout.head_size_v)
            self.exact = ExactRows(self.format, self.num_layers, *sizes, rows, dtype, self.device)

    @classmethod
    def for_memory(
        cls, format: FormatSpec, memory_bytes: int, *, num_layers: int, num_kv_heads: int, head_size: int,
        head_size_v: int | None = None, page_size: int = 64, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16, num_sequences: int = 1,
    ) -> PagedKVCache:  # fmt: skip
        """The cache with the most pages that fit into ``memory_bytes`` beside the exact tokens of ``num_sequences``.

        Raises:
            FormatError, NotBuiltError, ShapeError: As the class.
            CapacityError: Not one page of every layer fits.
        """
        layout = PageLayout.of(KVFormat.parse(format), head_size, head_size_v, page_size)
        vectors = whole("num_layers", num_layers, 1) * whole("num_kv_heads", num_kv_heads, 1)
        page = vectors * layout.page_bytes
        rows = whole("num_sequences", num_sequences)
        if layout.format.sinks or layout.format.tail:
            itemsize = check_dtype(dtype).itemsize
            rows *= vectors * layout.format.exact_bytes(layout.head_size, layout.head_size_v, itemsize)
        else:
            rows = 0
        num_pages = (whole("memory_bytes", memory_bytes) - rows) // page
        if num_pages < 1:
            beside = f", the exact tokens of {num_sequences} sequences {rows}" if rows else ""
            raise CapacityError(
                f"a page of all layers takes {page} bytes{beside}, and there are {memory_bytes}: allow more"
            )
        return cls(
            format, num_layers=num_layers, num_kv_heads=num_kv_heads, head_size=head_size, head_size_v=head_size_v,
            num_pages=num_pages, page_size=page_size, device=device, dtype=dtype, num_sequences=num_sequences,
        )  # fmt: skip

    def __repr__(self) -> str:
        used = self.num_pages - self.free_pages
        count = len(self.sequences)
        many = "sequence" if count == 1 else "sequences"
        return f"PagedKVCache({self.format}, {count} {many}, {used} of {self.num_pages} pages in use)"

    # --- accounting ---------------------------------------------------------------------------------------------------

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers; what pages hold beside their tokens is left out."""
        return self.num_layers * self.num_kv_heads * self.layout.token_bytes

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all pages of all layers and of all exact tokens, free ones included."""
        return self.pages.nbytes + (0 if self.exact is None else self.exact.nbytes)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that sequences hold, shared ones once, a partly filled one whole, and of exact tokens."""
        per_head = (self.num_pages - self.free_pages) * self.layout.page_bytes
        if self.exact is not None:
            sizes = (self.layout.head_size, self.layout.head_size_v, self.exact.dtype.itemsize)
            per_head += len(self._held) * self.format.exact_bytes(*sizes)
        return self.num_layers * self.num_kv_heads * per_head

    # --- sequences ----------------------------------------------------------------------------------------------------

    def fork(self, seq: int) -> int:
        """A new sequence of the same tokens, sharing all pages; exact tokens are copied. Store what was reserved before
        you fork."""
        child = super().fork(seq)
        if self.exact is not None:
            self.exact.copy(self._sequence(seq).row, self._sequence(child).row)
        return child

    def free(self, seq: int) -> None:
        """Forget a sequence. Pages that no other sequence holds become free."""
        super().free(seq)
        if self.exact is not None:
            self.exact.forget(seq)

    def _add(self, table: Sequence[int], length: int, exact_from: int) -> int:
        if self.exact is not None:
            self.exact.require(len(self._held) + 1)  # the lowest free row is not beyond
        return super()._add(table, length, exact_from)

    # --- write --------------------------------------------------------------------------------------------------------

    def extend(self, seq: int | Mapping[int, int], n: int | None = None) -> torch.Tensor:
        """Reserve room for new tokens in every layer: ``extend(seq, n)`` or, all or nothing, ``extend({seq: n, ...})``.

        The tokens count at once: :meth:`store` them in a layer before its attention reads them. A partly filled last
        page that another sequence holds too is copied first.

        Returns:
            int64 ``[T]``: the slots of the new tokens, sequence after sequence.

        Raises:
            CapacityError: Too few free pages; the message says how many. Nothing has changed.
            UnknownSequenceError, ShapeError: No such sequence; a negative number. Nothing has changed.
        """
        if isinstance(seq, Mapping) != (n is None):
            raise ShapeError("extend takes a sequence and a number of tokens, or one mapping of sequences to numbers")
        wanted = dict(seq) if isinstance(seq, Mapping) else {seq: -1 if n is None else n}
        begins = {key: self.length(key) for key in wanted}
        exact_before = {key: self._sequence(key).exact_from for key in wanted}
        moves = self._reserve(wanted)
        if moves:
            source, target = torch.tensor(moves, device=self.device).unbind(1)
            self.pages[:, target] = self.pages[:, source]
        slots = [torch.empty(0, dtype=torch.int64), *(self._slots(key, begin) for key, begin in begins.items())]
        if self.format.mean:
            self._remember_pages_before(begins)
        result = torch.cat(slots).to(self.device)
        if self.exact is not None:
            self._begin_step(result, begins, exact_before)
        return result

    def _begin_step(self, slots: torch.Tensor, begins: Mapping[int, int], exact_before: Mapping[int, int]) -> None:
        """Tell the exact tokens whose the tokens of these slots are."""
        assert self.exact is not None
        parts, offset = {}, 0
        for seq, begin in begins.items():
            held = self._sequence(seq)
            if held.length > begin:
                parts[seq] = Part(held.row, begin, held.length, exact_before[seq], offset)
            offset += held.length - begin
        self.exact.begin(slots, parts)

    def _remember_pages_before(self, begins: Mapping[int, int]) -> None:
        """Of the pages that sequences have got behind their former lengths."""
        pairs = []
        for seq, begin in begins.items():
            table = self._sequence(seq).table
            first = -(-begin // self.page_size)
            pairs += list(zip(table[first:], [*([] if first else [-1]), *table[max(first - 1, 0) :]], strict=False))
        if pairs:
            page, before = torch.tensor(pairs, device=self.device).unbind(1)
            self._before[page] = before

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Compress k ``[T, H, dk]`` and v ``[T, H, dv]`` into the slots that :meth:`extend` gave.

        In a format with exact sinks or a tail the slots are those of the last :meth:`extend`, all of them: its tokens
        are kept exactly as far as they are among a sequence's first and last.

        Raises:
            ShapeError: A wrong layer, shape or device; slots of an earlier step, or a dtype that the cache's would not
                hold exactly, where the format has exact tokens.
        """
        pages = self._layer(layer)
        if self.exact is not None:
            self.exact.check(k, v, slots)
        previous = self._before[slots.clamp(min=0) // self.page_size] if self.format.mean else None
        ops.store_kv(k, v, pages, slots, self.layout, previous=previous)
        if self.exact is not None and len(slots):
            self.exact.store(layer, k, v, self._changes)

    def append(self, seq: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Extend a sequence and store in all layers: k ``[num_layers, n, H, dk]`` and v ``[num_layers, n, H, dv]``.

        Raises:
            CapacityError, UnknownSequenceError, ShapeError: As :meth:`extend` and :meth:`store`; nothing has changed.
        """
        for name, x, size in (("k", k, self.layout.head_size), ("v", v, self.layout.head_size_v)):
            shape = (self.num_layers, k.shape[1] if k.dim() == 4 else -1, self.num_kv_heads, size)
            if tuple(x.shape) != shape or not x.dtype.is_floating_point or x.device != self.device:
                wanted = f"[{self.num_layers}, n, {self.num_kv_heads}, {size}] on {self.device}"
                raise ShapeError(f"{name} is a floating tensor {wanted}, not {x.dtype} {list(x.shape)} on {x.device}")
        if self.exact is not None:
            self.exact.check(k, v)
        slots = self.extend(seq, k.shape[1])
        for layer in range(self.num_layers):
            self.store(layer, k[layer], v[layer], slots)

    # --- read ---------------------------------------------------------------------------------------------------------

    def decode(
        self, layer: int, q: torch.Tensor, seqs: Sequence[int], *, scale: float, softcap: float | None = None,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attention of each sequence's last Tq tokens, which are stored, to the sequence.

        Exact sinks and tail are read exactly, by each query its own tail. Of several queries the first ones' tails are
        whole in the layer that was stored last; later they are what is left of them.

        Args:
            q: ``[B, Tq, Hq, dk]``, query head i using KV head ``i // (Hq // H)``.
            scale, softcap, window: As in :func:`kvfold.ops.decode_attention`.

        Returns:
            out ``[B, Tq, Hq, dv]`` in q's dtype, and the scores' log-sum-exp ``[B, Hq, Tq]`` in float32.

        Raises:
            UnknownSequenceError, ShapeError: No such sequence; a wrong layer, shape, dtype or device.
        """
        table, lengths = self._batch_of(seqs)
        if q.dim() != 4 or q.shape[0] != len(seqs):
            raise ShapeError(f"q is [B, Tq, Hq, dk] with B = {len(seqs)} sequences, not {list(q.shape)}")
        pages = self._layer(layer)
        self._check_queries(q)
        _check_options(window, softcap)
        if self.exact is not None and q.shape[1]:
            options = AttentionOptions(scale, softcap=softcap, window=window)
            starts = [self.length(seq) - q.shape[1] for seq in seqs]
            return self._attend(layer, q, seqs, starts, table, options)
        return ops.decode_attention(q, pages, table, lengths, self.layout, scale=scale, softcap=softcap, window=window)

    def prefill(
        self, layer: int, q: torch.Tensor, seqs: Sequence[int], cu_seqlens: torch.Tensor | Sequence[int], *,
        scale: float, k: torch.Tensor | None = None, v: torch.Tensor | None = None, softcap: float | None = None,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Causal attention of a chunk of new tokens per sequence to the sequence.

        The chunk is the sequence's last tokens: *extend by it first*, so that lengths include it, in both modes. With k
        and v (``chunk=exact``) queries see their chunk unquantised and what was there before it packed; store the chunk
        before or after. Without (``chunk=packed``) store it before: queries see nothing but pages.

        With exact sinks or a tail: with k and v all queries see the tail exactly that was there before their chunk.
        Without each sees its own tail exactly, as in :meth:`decode`; attend in a layer before you store in the next.

        Args:
            q: ``[T, Hq, dk]``, chunk after chunk.
            cu_seqlens: ``[B + 1]``, where each chunk begins in q: from 0 to T. A list saves a GPU a synchronisation.
            k: ``[T, H, dk]`` or None. v: ``[T, H, dv]`` or None.
            scale, softcap, window: As in :func:`kvfold.ops.decode_attention`.

        Returns:
            out ``[T, Hq, dv]`` in q's dtype, and the scores' log-sum-exp ``[Hq, T]`` in float32.

        Raises:
            UnknownSequenceError, ShapeError: As :meth:`decode`; or a sequence is shorter than its chunk.
        """
        table, lengths = self._batch_of(seqs)
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
        tokens = q.shape[0] if q.dim() == 3 else -1
        if len(bounds) != len(seqs) + 1 or bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, tokens):
            raise ShapeError(f"cu_seqlens {bounds} must rise from 0 to T in {len(seqs)} steps; q is {list(q.shape)}")
        for seq, begin, end in zip(seqs, bounds[:-1], bounds[1:], strict=True):
            if end - begin > self.length(seq):
                raise ShapeError(f"sequence {seq} is shorter than its chunk of {end - begin}: extend() it first")
        pages = self._layer(layer)
        self._check_queries(q)
        _check_options(window, softcap)
        if self.exact is not None:
            options = AttentionOptions(scale, softcap=softcap, window=window)
            return self._prefill_with_exact(layer, q, seqs, bounds, k, v, options)
        starts = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        context = lengths if k is None else lengths - starts.diff()
        return ops.prefill_attention(
            q, pages, table, context, starts, self.layout, scale=scale, k=k, v=v, softcap=softcap, window=window
        )

    def load(self, layer: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """De-quantised K ``[length, H, dk]`` and V ``[length, H, dv]``, float32, in the model's basis: what the pages
        hold, of exact sinks and tail too."""
        k, v = ops.load_kv(self._layer(layer), self.block_table([seq]), self.layout, self.length(seq))
        return k[0], v[0]

    def _prefill_with_exact(
        self, layer: int, q: torch.Tensor, seqs: Sequence[int], bounds: Sequence[int], k: torch.Tensor | None,
        v: torch.Tensor | None, options: AttentionOptions,
    ) -> exact_reads.State:  # fmt: skip
        """:meth:`prefill` of a format with exact tokens: the chunks to themselves, and each to what was before it."""
        table, lengths = self._batch_of(seqs)
        own = None
        if k is not None or v is not None:
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=self.device)
            own = ops.prefill_attention(
                q, self.pages[layer], table, torch.zeros_like(lengths), cu_seqlens, self.layout, scale=options.scale,
                k=k, v=v, softcap=options.softcap, window=options.window,
            )  # fmt: skip
        outs = [q.new_empty(0, q.shape[1], self.layout.head_size_v)]
        lses = [torch.empty(q.shape[1], 0, device=self.device)]
        for b, (seq, begin, end) in enumerate(zip(seqs, bounds[:-1], bounds[1:], strict=True)):
            length = self.length(seq)
            for at in range(begin, end, QUERY_BLOCK):
                stop = min(at + QUERY_BLOCK, end)
                chunk, state = None, None
                if own is not None:
                    chunk = (length - (end - begin), length)
                    state = (own[0][None, at:stop], own[1][None, :, at:stop])
                starts = [length - (end - at)]
                out, lse = self._attend(layer, q[None, at:stop], [seq], starts, table[b : b + 1], options, chunk, state)
                outs.append(out[0])
                lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1)

    def _attend(
        self, layer: int, q: torch.Tensor, seqs: Sequence[int], starts: Sequence[int], table: torch.Tensor,
        options: AttentionOptions, chunk: tuple[int, int] | None = None, state: exact_reads.State | None = None,
    ) -> exact_reads.State:  # fmt: skip
        """Attention of q ``[B, Tq, Hq, dk]``, at positions from ``starts`` on, to exact and packed tokens.

        Args:
            chunk: Where the chunk of these queries begins and ends, if it comes with them; of one sequence.
            state: The result over it.
        """
        assert self.exact is not None
        found = self.exact.views(
            layer,
            [(seq, self._sequence(seq)) for seq in seqs],
            starts if chunk is None else [chunk[0]],
            self._changes,
            own=chunk is not None,
            copies=chunk is not None or q.shape[1] > 1,
        )
        if found is None:
            each = [
                self._attend(layer, q[b : b + 1], [seq], [starts[b]], table[b : b + 1], options)
                for b, seq in enumerate(seqs)
            ]
            return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])
        views, k, v = found
        sizes = (self.format.sinks, self.format.tail)
        what = exact_reads.reading(views, tuple(starts), q.shape[1], *sizes, options.window, self.device, chunk)
        return exact_reads.attend(q, self.pages[layer], table, self.layout, what, k, v, options, state)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], seqs: Sequence[int] | None = None) -> None:
        """Write sequences (default: all) to a file, shared pages once; see :mod:`kvfold.storage`.

        The file appears whole or not at all. Bytes of tokens that these sequences do not hold are written as zeros.

        Raises:
            UnknownSequenceError: There is no such sequence.
            OSError: The file cannot be written.
        """
        held = [self._sequence(seq) for seq in (self.sequences if seqs is None else seqs)]
        exact = None
        if self.exact is not None:
            exact_from = [one.exact_from for one in held]
            exact = storage.Exact(self.exact.k, self.exact.v, exact_from, self.exact.places(held))
        tables, lengths = [one.table for one in held], [one.length for one in held]
        storage.write(path, self._geometry, self.pages, tables, lengths, exact)

    def restore(self, path: str | os.PathLike[str]) -> list[int]:
        """Add the sequences of a file, pages shared as they were, and return their new numbers in the order of saving.

        Raises:
            FileFormatError: The file is corrupted, truncated, foreign, or of another version, format, shape or dtype.
            CapacityError: Too few free pages.
            OSError: The file cannot be read. After each of these the cache holds what it held.
        """
        with storage.PageFile(path) as file:
            file.require(self._geometry)
            return self._read(file)

    @classmethod
    def load_file(
        cls, path: str | os.PathLike[str], *, num_pages: int | None = None, device: torch.device | str = "cpu"
    ) -> PagedKVCache:
        """A new cache with the sequences of a file, numbered from 0 in the order of saving.

        Args:
            num_pages: Pages of the cache; default: as many as the file has, so that nothing can be added.

        Raises:
            FileFormatError, CapacityError, OSError: As :meth:`restore`.
        """
        with storage.PageFile(path) as file:
            pages = max(1, file.contents.num_pages) if num_pages is None else num_pages
            sizes = asdict(file.contents.geometry)
            dtype = sizes.pop("dtype")
            if dtype is not None:
                sizes |= {"dtype": storage.DTYPES[dtype], "num_sequences": len(file.contents.lengths)}
            cache = cls(**sizes, num_pages=pages, device=device)
            cache._read(file)
        return cache

    # --- helpers ------------------------------------------------------------------------------------------------------

    @property
    def _geometry(self) -> storage.Geometry:
        sizes = (self.layout.head_size, self.layout.head_size_v, self.page_size)
        dtype = None if self.exact is None else str(self.exact.dtype).removeprefix("torch.")
        return storage.Geometry(str(self.format), self.num_layers, self.num_kv_heads, *sizes, dtype)

    def _read(self, file: storage.PageFile) -> list[int]:
        contents = file.contents
        fresh = self._allocator.take(contents.num_pages)
        added: list[int] = []
        try:
            file.read_into(self.pages, fresh)
            for table, length, exact_from in zip(file.tables, contents.lengths, contents.exact_from, strict=True):
                added.append(self._add([fresh[page] for page in table], length, exact_from))
            if self.exact is not None:
                places = self.exact.places([self._sequence(seq) for seq in added])
                file.read_exact_into(self.exact.k, self.exact.v, places)
        except BaseException:
            for seq in added:
                self.free(seq)
            raise
        finally:
            self._allocator.release(reversed(fresh))
        return added

    def _layer(self, layer: int) -> torch.Tensor:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.num_layers:
            raise ShapeError(f"layer {layer!r} is not one of the {self.num_layers} layers, 0 to {self.num_layers - 1}")
        return self.pages[layer]

    def _check_queries(self, q: torch.Tensor) -> None:
        """Refuse q ``[..., Hq, dk]`` here: with exact tokens it meets tensors that the caller has never seen."""
        size = self.layout.head_size
        if not q.dtype.is_floating_point or q.device != self.device or q.shape[-1] != size:
            wanted = f"[..., query heads, {size}] on {self.device}"
            raise ShapeError(f"q is a floating tensor {wanted}, not {q.dtype} {list(q.shape)} on {q.device}")


def _check_options(window: int | None, softcap: float | None) -> None:
    if window is not None:
        whole("window", window, 1)
    if softcap is not None and not softcap > 0:
        raise ShapeError(f"softcap is a positive number or None, not {softcap!r}")
