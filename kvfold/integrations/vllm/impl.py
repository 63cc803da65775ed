"""The attention of a layer: store the new tokens, attend for the rows that decode, attend for chunks of prompts."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
import vllm.envs as envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType, max_decode_query_len

from kvfold import ops
from kvfold.errors import ShapeError, UnsupportedModelError
from kvfold.integrations.vllm.backend import PAGE_SIZE, class_of, ways_out
from kvfold.integrations.vllm.metadata import Metadata
from kvfold.integrations.vllm.settings import EngineConfigError, Settings
from kvfold.layerformats import ModelFormat
from kvfold.layout import PageLayout
from kvfold.ops.cuda.windows import SCRATCH_BYTES

logger = init_logger("vllm.kvfold.impl")


class CompressedImpl(AttentionImpl[Metadata]):
    """Attention on packed pages; :func:`impl_of` makes the classes that are used. See the base class for the arguments.

    Attributes:
        made_for: The formats of the backend's class, and whether the backend was chosen by name.
        format: What this layer stores; the base until the layer's name is known.

    Raises:
        UnsupportedModelError: The layer needs something that kvfold's attention does not have.
        EngineConfigError: vLLM chose the backend for another engine.
    """

    made_for: ClassVar[tuple[ModelFormat, bool]]
    supports_quant_query_input = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        config = get_current_vllm_config()
        settings = Settings.of(config)
        asked = [name for name, value in extra.items() if value is not None and value is not False and value != -1]
        for unsupported, reason in (
            (alibi_slopes is not None, "ALiBi adds to the scores, which the kernels do not"),
            (sliding_window is not None, "a sliding window is not compressed"),
            (attn_type != AttentionType.DECODER, f"attention of type {attn_type} is not causal"),
            (bool(asked), f"kvfold's attention knows nothing of {', '.join(asked)}"),
        ):
            if unsupported:
                ways = ways_out(self.made_for[1])
                raise UnsupportedModelError(
                    f"{reason}: {ways['skip']} and their indices (or sliding_window), or {ways['leave']}"
                )
        if settings is None or (settings.format, settings.by_name) != self.made_for:
            raise EngineConfigError(
                f"vLLM remembers, for the life of a process, which backend serves a cache dtype, and an engine of this "
                f"one had its cache in {self.made_for[0]}: start each engine in a process of its own, or name formats "
                "by their dtypes (kvfold_k3v3)"
            )
        if kv_cache_dtype == "auto" and not settings.by_name:
            raise UnsupportedModelError(
                "vLLM gives a layer of this kind (attention in chunks) the backend of the run's cache dtype even if it "
                f"is skipped: {ways_out(False)['leave']}"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = "turboquant" if kv_cache_dtype == "auto" else kv_cache_dtype
        self.softcap = logits_soft_cap or None  # models say "none" as 0, too
        self.settings = settings
        self.format = settings.format.base
        self.batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)
        # its tokens are stored by the layer that it shares the cache with, so that it has none of its own to see
        self.shares = kv_sharing_target_layer_name is not None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        if self.shares and config.cache_config.kv_sharing_fast_prefill:
            raise EngineConfigError(
                "--kv-sharing-fast-prefill cuts batches on the device, and kvfold by lengths on the host: leave it out"
            )
        self._layers = config.compilation_config.static_forward_context  # by name; each engine has one of its own
        self._layout: PageLayout | None = None
        self._query_lens = {1, max_decode_query_len(config)}
        self._max_rows = config.scheduler_config.max_num_seqs
        self._max_tokens = config.model_config.max_model_len
        if self.batch_invariant and settings.chunk == "exact":
            logger.warning_once(
                "VLLM_BATCH_INVARIANT with chunk=exact: results still depend, a little, on where chunks of a prompt "
                'end; add --additional-config \'{"turboquant": {"chunk": "packed"}}\''
            )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find out which layer this is, and give it the backend of its own format.

        vLLM calls it before it asks what caches are made of.

        Raises:
            UnsupportedModelError: The layer's name does not say which it is, or it has no cache of its own.
        """
        fmt = self.settings.format
        if fmt.uniform:
            return
        mine = [pair for pair in self._layers.items() if getattr(pair[1], "impl", None) is self]
        if not mine:
            raise UnsupportedModelError(
                f"format {str(fmt)!r}: vLLM has no name for a layer that it loads: use one format for all layers"
            )
        name, layer = mine[0]
        if self.shares:
            raise UnsupportedModelError(
                f"format {str(fmt)!r}: layer {name} shares the cache of another one, which vLLM does not serve beside "
                "caches of several sizes: use one format for all layers"
            )
        try:
            index = extract_layer_index(name)
        except AssertionError as error:
            raise UnsupportedModelError(
                f"format {str(fmt)!r}: which layer is {name!r}? ({error}) Use one format for all layers"
            ) from None
        self.format = fmt.layer(index)
        layer.attn_backend = class_of(self.format, self.settings.by_name)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store and attend.

        Args:
            query: ``[T, Hq, dk]``, T at least the batch's tokens. key: ``[T, H, dk]``. value: ``[T, H, dv]``.
            kv_cache: uint8 ``[blocks, H, block_size, token bytes]``; the bytes inside a block are pages.
            attn_metadata: The batch; None in the run that measures memory.
            output: ``[T, Hq, dv]``, written in place.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "kvfold's attention does not quantise its output; set pass_config.fuse_attn_quant to false"
            )
        layout = self._layout
        if layout is None:
            layout = self._layout = PageLayout.of(self.format, self.head_size, output.shape[-1], PAGE_SIZE)
        if attn_metadata is None:
            if query.device.type != "cpu" and not torch.cuda.is_current_stream_capturing():
                self.warm_up(query, key, value, layout)
            return output.fill_(0)
        batch, tokens = attn_metadata, attn_metadata.num_actual_tokens
        pages = as_pages(kv_cache, self.num_kv_heads, layout)
        if not self.shares:
            ops.store_kv(key[:tokens], value[:tokens], pages, batch.slot_mapping[:tokens], layout)
        result = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
        # q, tables, lengths and schedules were complete before the store began, and results are written in place, so
        # that nothing is launched between the store and a decode but other decodes, and schedules of those without
        ready = not self.shares
        for rows in batch.decodes:
            per_row = (-1, rows.query_len)
            ops.decode_attention(
                query[rows.begin : rows.end].unflatten(0, per_row), pages, rows.block_table, rows.seq_lens, layout,
                scale=self.scale, softcap=self.softcap, batch_invariant=self.batch_invariant, inputs_ready=ready,
                schedule=rows.schedule, out=result[rows.begin : rows.end].unflatten(0, per_row),
            )  # fmt: skip
        exact = self.settings.chunk == "exact" and not self.shares
        for chunks in batch.chunks:
            own = slice(chunks.begin, chunks.end)
            ops.prefill_attention(
                query[own], pages, chunks.block_table, chunks.context_lens if exact else chunks.seq_lens,
                chunks.cu_seqlens, layout, scale=self.scale, softcap=self.softcap,
                k=key[own] if exact else None, v=value[own] if exact else None, out=result[own],
            )  # fmt: skip
        return output if result is output else output.copy_(result)

    def warm_up(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PageLayout) -> None:
        """Do what serving does once, on a page of its own, so that vLLM's measurement sees the memory it takes.

        Decoding keeps scratch from its first call on, and that and the compilation of kernels cannot happen inside the
        capture of a CUDA graph; a prefill has windows of the prefix. Layers of one kind share all that, so only the
        first of them does it.
        """
        engine = id(self._layers)
        kind = (engine, layout, self.num_heads, self.num_kv_heads, query.dtype, query.device,
                self.softcap is None, self.settings.chunk, self.batch_invariant)  # fmt: skip
        if kind in _warm:  # the run that is measured comes first, and is the largest
            return
        _warm.intersection_update({other for other in _warm if other[0] == engine})
        _warm.add(kind)
        device = query.device
        pages = torch.zeros(layout.page_shape(1, self.num_kv_heads), dtype=torch.uint8, device=device)
        k, v = (
            torch.randn(PAGE_SIZE, self.num_kv_heads, size, dtype=query.dtype, device=device)
            for size in (layout.head_size, layout.head_size_v)
        )
        slots = torch.arange(PAGE_SIZE, device=device)
        for some in (1, PAGE_SIZE):  # few tokens and many are different kernels
            ops.store_kv(k[:some], v[:some], pages, slots[:some], layout)
        if key is not None and value is not None:
            ops.store_kv(key, value, pages, torch.full((len(key),), -1, device=device), layout)
        table = torch.zeros(1, -(-self._max_tokens // PAGE_SIZE), dtype=torch.int32, device=device)
        decodes = [query.new_zeros(self._max_rows, many, self.num_heads, layout.head_size) for many in self._query_lens]
        if self.batch_invariant and self.settings.chunk == "packed":  # each token of a prompt is a row
            decodes.append(query[:, None])
        for q in decodes:
            rows, query_len, *_ = q.shape
            lengths = torch.full((rows,), query_len, dtype=torch.int32, device=device)
            ops.decode_attention(
                q, pages, table.expand(rows, -1), lengths, layout, scale=self.scale, softcap=self.softcap,
                batch_invariant=self.batch_invariant,
            )  # fmt: skip
        del decodes, q
        # a chunk as long as any, behind a long prefix and behind a short one, either of which may need windows, one
        # that is read at once, beginnings of prompts, and their ends, a token or some, which have kernels of their own
        context = max(self._max_tokens - len(query), self._max_tokens // 2)
        few = min(2 * PAGE_SIZE, context)  # more than the decode kernel serves
        cases = [(context, self._max_tokens - context), (few, self._max_tokens - few), (few, few), (0, len(query))]
        cases += [(1, count) for count in (1, 3, 16)]
        for before, count in cases:
            new, exact = min(len(query), count), self.settings.chunk == "exact" and not self.shares
            with torch.inference_mode(False):
                read = torch.tensor([before if exact else before + new], dtype=torch.int32, device=device)
                bounds = torch.tensor([0, new], dtype=torch.int32, device=device)
            table = torch.zeros(1, -(-(before + new) // PAGE_SIZE), dtype=torch.int32, device=device)
            ops.prefill_attention(
                query[:new], pages, table, read, bounds, layout, scale=self.scale, softcap=self.softcap,
                k=key[:new] if exact else None, v=value[:new] if exact else None,
            )  # fmt: skip
        torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)  # other lengths take more, up to this


_warm: set[tuple[Any, ...]] = set()


@cache
def impl_of(fmt: ModelFormat, by_name: bool) -> type[CompressedImpl]:
    """The implementation for a backend of :func:`~kvfold.integrations.vllm.backend.class_of`."""
    return type("CompressedImpl", (CompressedImpl,), {"made_for": (fmt, by_name), "__module__": __name__})


def as_pages(kv_cache: torch.Tensor, heads: int, layout: PageLayout) -> torch.Tensor:
    """A layer's cache ``[blocks, H, block_size, token bytes]`` as pages ``[num_pages, H, page_bytes]``.

    A block of several pages has them one after the other: vLLM copies blocks whole and never looks inside.
    """
    if not kv_cache.is_contiguous() or kv_cache.dim() != 4 or kv_cache.shape[3] != layout.token_bytes:
        raise ShapeError(
            f"kvfold's pages lie one after the other, and this cache is {list(kv_cache.shape)} with strides "
            f"{list(kv_cache.stride())}: vLLM padded its blocks, or put other layers' between them. Leave "
            "--kv-cache-dtype out for this model"
        )
    return kv_cache.view(-1, heads, layout.page_bytes)
