"""What a step's batch looks like to all layers: rows that decode, and chunks of prompts.

A row of up to ``1 + num_speculative_tokens`` query tokens is a decode, which the decode kernel serves without a word
from the host, so that it can stand in a CUDA graph. Rows of one length that follow each other are one call. Longer
rows are chunks, whether a request begins with them or goes on, and each is told how many tokens lie before it
(upstream #46460: no shortcut for batches of first chunks).

Where nothing may depend on how a request is served (``VLLM_BATCH_INVARIANT`` and ``chunk=packed``), every token is a
row of its own. Its result is a function of its position and of the bytes before it: the same in a chunk of any length,
in a decode, in a draft. A token then reads its whole context alone, which is slow for long prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import vllm.envs as envs
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from kvfold import ops
from kvfold.errors import UnsupportedModelError
from kvfold.integrations.vllm.backend import PAGE_SIZE, CompressedBackend
from kvfold.integrations.vllm.settings import Settings
from kvfold.layout import PageLayout
from kvfold.ops.options import DecodeSchedule

logger = init_logger("vllm.kvfold.metadata")

_SCHEDULES = 4
"""Rows of one length each in a batch that have a schedule of their own: 101 KB on an H200."""


class Decodes(NamedTuple):
    """Rows of one query length, on the device.

    Attributes:
        begin: The first of their tokens in the batch. end: Behind the last.
        query_len: Tokens of a row (Tq).
        block_table: int32 ``[B, P]``.
        seq_lens: int32 ``[B]``, the queries included; 0 for a row that only fills up a CUDA graph.
        schedule: Of all layers, made for these lengths; None where each layer's call makes its own, or needs none.
    """

    begin: int
    end: int
    query_len: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    schedule: DecodeSchedule | None = None


class Chunks(NamedTuple):
    """Rows that are chunks of prompts, one after the other. Lengths were known on the host.

    Attributes:
        begin: The first of their tokens in the batch. end: Behind the last.
        block_table: int32 ``[B, P]``.
        context_lens: int32 ``[B]``, tokens before the chunk.
        seq_lens: int32 ``[B]``, the chunk included.
        cu_seqlens: int32 ``[B + 1]``, from 0 to ``end - begin``.
    """

    begin: int
    end: int
    block_table: torch.Tensor
    context_lens: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens: torch.Tensor


@dataclass
class Metadata(AttentionMetadata):
    """A batch.

    Attributes:
        num_actual_tokens: Tokens with queries; what the model pads them with is not counted.
        slot_mapping: int64 ``[>= num_actual_tokens]``, see :func:`kvfold.ops.store_kv`: a block of vLLM is consecutive
            pages, so its slots are kvfold's.
        decodes: Rows that decode.
        chunks: Chunks of prompts; mostly one item, as vLLM puts decodes first.
    """

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    decodes: list[Decodes] = field(default_factory=list)
    chunks: list[Chunks] = field(default_factory=list)


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Makes the :class:`Metadata` of each step, once for all layers of a group."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    requires_block_table_width: ClassVar[bool] = True

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Drafts are cut into tokens by numbers of the host, which a graph would keep."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if _by_token(vllm_config) else cls._cudagraph_support

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        block_table_width: int | None = None,
    ) -> None:
        padded, size = getattr(kv_cache_spec, "page_size_padded", None), kv_cache_spec.real_page_size_bytes
        if padded not in (None, size):
            raise UnsupportedModelError(
                f"vLLM pads the blocks of {layer_names[0]} from {size} to {padded} bytes, as large as other layers', "
                "and kvfold's pages lie one after the other: use one format for all layers and skip none, or leave "
                "--kv-cache-dtype out for this model"
            )
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.by_token = _by_token(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=not self.by_token)
        self.pages_per_block = kv_cache_spec.block_size // PAGE_SIZE
        self._page_table: torch.Tensor | None = None
        if self.pages_per_block > 1:  # at an address of its own, which graphs keep
            if block_table_width is None:  # a proposer of hidden states does not say it
                longest = vllm_config.model_config.max_model_len
                block_table_width = kv_cache_spec.max_num_blocks_per_req(vllm_config, longest)
            sizes = (
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            )
            shape = (max(sizes), block_table_width, self.pages_per_block)
            self._page_table = torch.zeros(shape, dtype=torch.int32, device=device)
            self._within = torch.arange(self.pages_per_block, dtype=torch.int32, device=device)
        self._layout = layout_of(kv_cache_spec, vllm_config, layer_names)
        self._schedules: dict[tuple[int, int], DecodeSchedule] = {}  # at addresses that graphs keep
        describe(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """The batch; see the base class for the arguments."""
        batch = common_attn_metadata
        self._check(batch)
        starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].numpy()
        table = self._pages(batch.block_table_tensor[: batch.num_reqs])
        metadata = Metadata(batch.num_actual_tokens, batch.slot_mapping)
        lengths = np.diff(starts)
        if not lengths.any():
            self._empty_schedules(batch.seq_lens[:0])
        if self.by_token and lengths.max(initial=0) > 1:
            metadata.decodes = self._tokens(batch, starts, table)
            return metadata
        assert self.reorder_batch_threshold is not None
        # rows that only fill up a graph have no tokens; chunks of any lengths are one kind
        kinds = np.minimum(lengths, self.reorder_batch_threshold + 1)
        for first, last in _runs(kinds):
            kind, begin, end = int(kinds[first]), int(starts[first]), int(starts[last])
            rows = slice(first, last)
            if not kind:
                continue
            if kind <= self.reorder_batch_threshold:
                place = len(metadata.decodes)
                metadata.decodes.append(
                    self._scheduled(Decodes(begin, end, kind, table[rows], batch.seq_lens[rows]), place)
                )
            else:
                metadata.chunks.append(self._chunks(batch, first, last, starts, table))
        return metadata

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> Metadata:
        """The batch of a draft model, whose rows are longer than the host's bound of their lengths says."""
        return self.build(0, common_attn_metadata.replace(seq_lens_cpu_upper_bound=None), fast_build=True)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Metadata:
        """The batch of a graph that serves every batch of its size: one call, with as many rows as the graph has."""
        batch = common_attn_metadata
        self._check(batch)
        tokens, query_len = batch.num_actual_tokens, batch.max_query_len
        rows, rest = divmod(tokens, query_len)
        if rest or rows > batch.num_reqs:
            raise UnsupportedModelError(
                f"a CUDA graph of {tokens} tokens for {batch.num_reqs} rows of {query_len} is not uniform: give "
                "--cudagraph-capture-sizes in multiples of the tokens that a step verifies, or use --enforce-eager"
            )
        table = self._pages(batch.block_table_tensor[: batch.num_reqs])
        decodes = Decodes(0, tokens, query_len, table[:rows], batch.seq_lens[:rows])
        return Metadata(tokens, batch.slot_mapping, [self._scheduled(decodes, 0)])

    @cached_property
    def _heads(self) -> tuple[int, int] | None:
        """See :func:`heads_of`. Not known at once: a draft model's layers are named one by one."""
        return heads_of(self.vllm_config, self.layer_names)

    def _scheduled(self, decodes: Decodes, place: int) -> Decodes:
        """The rows with their schedule, if they are among the first of a batch.

        A graph has the schedule's address. It is replayed behind a ``build`` of rows of as many tokens, which come
        first in their batch, as the graph's did, and so renews it; rows that only fill up have no part in it.
        """
        if self._heads is None or place >= _SCHEDULES:
            return decodes
        key = place, decodes.query_len
        old = self._schedules.get(key)
        made = ops.schedule_decode(
            decodes.seq_lens, self._layout, *self._heads, query_tokens=decodes.query_len, out=old
        )
        if made is not None:
            if old is None and made.data.is_cuda and not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().synchronize()  # a graph's first run may be on another, which does not wait
            self._schedules[key] = made
        return decodes._replace(schedule=made)

    def _empty_schedules(self, nothing: torch.Tensor) -> None:
        """A graph may be replayed for rows that all only fill it up: half of a batch, behind the last request."""
        for (place, query_len), made in self._schedules.items():
            if place == 0 and self._heads is not None:
                ops.schedule_decode(nothing, self._layout, *self._heads, query_tokens=query_len, out=made)

    def _check(self, batch: CommonAttentionMetadata) -> None:
        if batch.causal is not True:
            raise UnsupportedModelError(
                "this model attends to tokens behind the query, which kvfold's attention does not: leave "
                "--kv-cache-dtype out for it"
            )

    def _pages(self, block_table: torch.Tensor) -> torch.Tensor:
        """Blocks ``[B, P]`` as pages ``[B, P * pages_per_block]``: block b is pages b n to b n + n - 1."""
        if self._page_table is None:
            return block_table
        rows, columns = block_table.shape
        if rows > len(self._page_table):  # larger than any graph
            return (block_table[:, :, None] * self.pages_per_block + self._within).flatten(1)
        assert columns <= self._page_table.shape[1], f"a row of {columns} blocks is wider than {self._page_table.shape}"
        out = self._page_table[:rows, :columns]
        torch.add(self._within, block_table[:, :, None], alpha=self.pages_per_block, out=out)
        return out.flatten(1)

    def _tokens(self, batch: CommonAttentionMetadata, starts: np.ndarray, table: torch.Tensor) -> list[Decodes]:
        """Every token of the batch as a row of its own. A request's tokens share its row of the table."""
        lengths = np.diff(starts)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        behind = np.cumsum(lengths)[rows] - 1 - np.arange(len(rows))  # tokens of the same row
        row, later = self._on_device(np.concatenate([rows, behind])).split(len(rows))
        seq_lens = batch.seq_lens[row] - later.int()
        decodes = []
        for first, last in _runs(lengths == 1):
            for a, b in pairwise((first, last) if lengths[first] == 1 else range(first, last + 1)):
                begin, end = int(starts[a]), int(starts[b])
                if begin < end:
                    decodes.append(Decodes(begin, end, 1, table[a:b].expand(end - begin, -1), seq_lens[begin:end]))
        return decodes

    def _on_device(self, numbers: np.ndarray) -> torch.Tensor:
        pinned = torch.from_numpy(numbers)
        if self.device.type == "cuda":
            pinned = pinned.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def _chunks(
        self, batch: CommonAttentionMetadata, first: int, last: int, starts: np.ndarray, table: torch.Tensor
    ) -> Chunks:
        lengths = batch.seq_lens_cpu_upper_bound  # exact for chunks of prompts, not for the long rows of a draft model
        prompts = batch.is_prefilling is None or bool(batch.is_prefilling[first:last].all())
        if lengths is None or not prompts:
            lengths = batch.seq_lens.cpu()
        seq_lens = lengths[first:last].numpy()
        bounds = starts[first : last + 1] - starts[first]
        host = np.concatenate([seq_lens - np.diff(bounds), seq_lens, bounds]).astype(np.int32)
        sizes = [last - first, last - first, last - first + 1]
        with torch.inference_mode(False):  # those tensors do not tell when they are written to
            context, total, cu_seqlens = self._on_device(host).split(sizes)
        for tensor, values in zip((context, total, cu_seqlens), np.split(host, np.cumsum(sizes[:-1])), strict=True):
            ops.remember_lengths(tensor, values.tolist())
        rows = slice(first, last)
        return Chunks(int(starts[first]), int(starts[last]), table[rows], context, total, cu_seqlens)


def layout_of(spec: AttentionSpec, vllm_config: VllmConfig, layer_names: list[str]) -> PageLayout:
    """Of the pages of a group's layers, which have one format."""
    backend = vllm_config.compilation_config.static_forward_context[layer_names[0]].get_attn_backend()
    return PageLayout.of(backend.format, spec.head_size, spec.head_size_v, PAGE_SIZE)


def heads_of(vllm_config: VllmConfig, layer_names: list[str]) -> tuple[int, int] | None:
    """Query heads and KV heads of a group's layers, if one schedule serves them all."""
    layers = vllm_config.compilation_config.static_forward_context
    impls = [layers[name].impl for name in layer_names]
    heads = {(impl.num_heads, impl.num_kv_heads) for impl in impls}
    return heads.pop() if len(heads) == 1 and not any(impl.batch_invariant for impl in impls) else None


def _by_token(vllm_config: VllmConfig) -> bool:
    settings = Settings.of(vllm_config)
    return bool(envs.VLLM_BATCH_INVARIANT) and settings is not None and settings.chunk == "packed"


def _runs(kinds: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    if len(kinds):
        cuts = (np.flatnonzero(np.diff(kinds)) + 1).tolist()
        yield from zip([0, *cuts], [*cuts, len(kinds)], strict=True)


def describe(vllm_config: VllmConfig) -> str:
    """Log, once, how many layers are compressed and how many are not."""
    layer_type: Any = AttentionLayerBase
    layers = get_layers_from_vllm_config(vllm_config, layer_type)
    backends = [layer.get_attn_backend() for layer in layers.values()]
    ours = [backend for backend in backends if issubclass(backend, CompressedBackend)]
    formats = ", ".join(sorted({str(backend.format) for backend in ours})) or "nothing"
    others = len(backends) - len(ours)
    text = f"kvfold compresses {len(ours)} of {len(backends)} layers to {formats}; {others} stay as they are"
    logger.info_once(text)
    return text
