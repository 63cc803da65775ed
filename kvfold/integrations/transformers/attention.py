"""The attention function and the mask function that transformers finds under the name ``kvfold``.

What a cache's ``update`` returns is the only channel from cache to attention, so a compressed layer returns a
:class:`PackedKV` in place of K and V and the attention function here takes it apart again. Plain tensors (layers that
stay uncompressed, first chunks, models without a cache) go to PyTorch's own attention.

A mask of None means: causal, aligned at the bottom right, nobody padded. The mask function says so exactly when it is
true; everything else is an explicit bool mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvfold import ops
from kvfold.errors import UnsupportedModelError
from kvfold.ops import library
from kvfold.ops.options import AttentionOptions

NAME = "kvfold"
"""Name of the attention implementation. (No "sdpa" or "flash" in it: transformers reads meaning into those.)"""


class PackedKV(NamedTuple):
    """What a compressed layer hands to attention: its pages, and the new tokens as they came.

    A named tuple of tensors and constants, because dynamo traces those.
    """

    pages: torch.Tensor  # uint8 [B * pages of a row, H, page_bytes]
    block_table: torch.Tensor  # int32 [B, pages of a row]
    start: torch.Tensor  # int64 [B], tokens before the new ones
    k: torch.Tensor  # [B, H, n, dk] the new tokens' keys
    v: torch.Tensor  # [B, H, n, dv]
    sinks: tuple[torch.Tensor, torch.Tensor] | None  # K and V [B, S, H, d] of positions 0 to S, exact
    tail: tuple[torch.Tensor, torch.Tensor] | None  # K and V [B, T, H, d] of positions start - T to start, exact
    exact_from: torch.Tensor  # int64 [B], first position of which the tail has anything
    format: str
    page_size: int
    chunk: str  # "exact" or "packed"
    whole: bool  # the new tokens are all there is, and are to be seen as they came
    is_value: bool
    layer: Any  # the layer, for whoever needs plain tensors; None while tracing

    @property
    def layout(self) -> library.LayoutName:
        return library.LayoutName(self.format, self.k.shape[-1], self.v.shape[-1], self.page_size)


class LazyPackedKV(PackedKV):
    """A :class:`PackedKV` that turns into the tensor it stands for as soon as a model treats it as one.

    MLA, repeated heads and other models that compute with K and V between cache and attention get the de-quantised
    tensor and a right answer. The layer remembers, and hands out tensors at once from then on.
    """

    __slots__ = ()

    def tensor(self) -> torch.Tensor:
        """K or V ``[B, H, tokens, d]`` of all tokens, de-quantised, in the model's dtype."""
        self.layer.needs_tensors = True
        return self.own if self.whole else self.layer.dequantised(self)[int(self.is_value)]

    @property
    def own(self) -> torch.Tensor:
        """The new tokens' K or V."""
        return self.v if self.is_value else self.k

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def device(self) -> torch.device:
        return self.own.device

    @property
    def shape(self) -> torch.Size:
        if self.whole:
            return self.own.shape
        batch, heads, _, size = self.own.shape
        return torch.Size((batch, heads, self.layer.visible_tokens(), size))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself, if nothing changes (models with shared KV layers move K and V around), else the tensor."""
        probe = self.own[:0].to(*args, **kwargs)
        if probe.dtype == self.dtype and probe.device == self.device:
            return self
        return self.tensor().to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if isinstance(index, int) else self.tensor()[index]

    def __add__(self, other: Any) -> Any:
        return self.tensor() + other

    def __mul__(self, other: Any) -> Any:
        return self.tensor() * other

    def __matmul__(self, other: Any) -> Any:
        return self.tensor() @ other

    def __rmatmul__(self, other: Any) -> Any:
        return other @ self.tensor()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_plain(args), **_plain(kwargs or {}))


def _plain(value: Any) -> Any:
    if isinstance(value, LazyPackedKV):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


# --- attention --------------------------------------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PackedKV,
    value: torch.Tensor | PackedKV,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention on the packed bytes; see transformers' AttentionInterface for the arguments.

    Args:
        query: ``[B, Hq, n, dk]``.
        key: What :meth:`kvfold.integrations.transformers.KVCache.update` returned, or a tensor ``[B, H, L, dk]``.
        attention_mask: None (causal, see the module's docstring) or ``[B, 1 or Hq, n, L]``.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        s_aux: ``[Hq]`` logits of attention sinks that take part in the softmax and contribute nothing (gpt-oss).

    Returns:
        out ``[B, n, Hq, dv]`` and None.

    Raises:
        UnsupportedModelError: Dropout or attention weights were asked for.
    """
    if dropout:
        raise UnsupportedModelError(
            "kvfold attention has no dropout: call model.eval(), or train with another attention"
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "kvfold attention does not return attention weights: use model.set_attn_implementation('eager'), "
            "which reads the compressed cache de-quantised"
        )
    if isinstance(key, PackedKV) and key.whole:
        first = key
        key, value = first.k, first.v
    if isinstance(key, PackedKV) and isinstance(value, PackedKV):
        visible = _as_bool(attention_mask)
        if position_bias is None and (visible is None or visible.shape[1] == 1):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            out, lse = _packed_attention(query.transpose(1, 2), key, scale, softcap, visible)
            return (out if s_aux is None else ops.apply_sink_logits(out, lse, s_aux)), None
        if not isinstance(key, LazyPackedKV) or not isinstance(value, LazyPackedKV):
            raise UnsupportedModelError(
                "kvfold attention under torch.compile takes neither a position bias nor a mask per head: do not compile"
            )
        key, value = key.tensor(), value.tensor()
    assert isinstance(key, torch.Tensor)
    assert isinstance(value, torch.Tensor)
    queries, tokens = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and 1 < queries < tokens:
        position = torch.arange(tokens - queries, tokens, device=query.device)[:, None]
        attention_mask = (torch.arange(tokens, device=query.device) <= position)[None, None]
    if softcap is None and s_aux is None:
        bias: dict[str, Any] = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **bias, **kwargs)
    return _exact_attention(query, key, value, attention_mask, causal, scaling, softcap, s_aux), None


def _exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Softcap and sink logits on plain tensors, which PyTorch's own attention does not have."""
    batch, _heads, queries, size = query.shape
    tokens = key.shape[2]
    zeros = torch.zeros(batch, dtype=torch.int64, device=query.device)
    visible = _as_bool(attention_mask)
    if visible is not None and visible.shape[1] != 1:
        raise UnsupportedModelError("kvfold attention with softcap or attention sinks takes one mask for all heads")
    # with a mask every token is "before" the queries and the mask alone decides
    position = zeros + (tokens - queries if visible is None and causal else tokens)
    out, lse = ops.exact_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=size**-0.5 if scaling is None else scaling,
        key_start=zeros,
        query_start=position,
        softcap=softcap,
        mask=None if visible is None else visible[:, 0].expand(batch, -1, -1),
    )
    return out if s_aux is None else ops.apply_sink_logits(out, lse, s_aux)


def _as_bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    """An additive mask of zeros and huge negative numbers as bool."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    visible = mask > torch.finfo(mask.dtype).min / 2
    if not torch.compiler.is_compiling() and bool((mask.masked_fill(~visible, 0) != 0).any()):
        raise UnsupportedModelError(
            "kvfold attention takes masks that hide tokens, not additive biases on the scores: "
            "use model.set_attn_implementation('sdpa'), which reads the compressed cache de-quantised"
        )
    return visible


def _packed_attention(
    q: torch.Tensor, kv: PackedKV, scale: float, softcap: float | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[B, n, Hq, dk]`` to a layer: packed pages, exact sinks and tail, current chunk."""
    batch, n = q.shape[:2]
    options = AttentionOptions(scale, softcap=softcap, mask=None if mask is None else mask[:, 0].expand(batch, -1, -1))
    exact_chunk = kv.chunk == "exact" and n > 1
    if kv.sinks is None and kv.tail is None:
        return _without_exact_tokens(q, kv, options, exact_chunk)

    def exact(
        k: torch.Tensor, v: torch.Tensor, key_start: torch.Tensor, first: torch.Tensor, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.exact_attention(
            q, k, v, scale=scale, key_start=key_start, query_start=kv.start, first=first, window=window,
            softcap=softcap, mask=options.mask,
        )  # fmt: skip

    def packed(tokens: torch.Tensor, first: torch.Tensor, lag: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        own = options._replace(first=first, query_start=kv.start, lag=lag)
        return library.decode_attention(q, kv.pages, kv.block_table, tokens, kv.layout, own)

    end, zero = kv.start + n, torch.zeros_like(kv.start)
    after_sinks = zero + (0 if kv.sinks is None else kv.sinks[0].shape[1])
    k_new, v_new = kv.k.transpose(1, 2), kv.v.transpose(1, 2)
    parts = []
    if kv.sinks is not None:
        # a sink that is itself among the new tokens is seen here too, causally, and nowhere else
        parts.append(exact(*kv.sinks, key_start=zero, first=zero))
    if kv.tail is None:
        if exact_chunk:
            parts.append(exact(k_new, v_new, kv.start, after_sinks))
        parts.append(packed(kv.start if exact_chunk else end, after_sinks))
        return ops.merge_states(parts)
    length = kv.tail[0].shape[1]
    # One query slides the tail to its own end; a chunk keeps the tail before it.
    exact_from = torch.maximum(kv.exact_from, end - length) if n == 1 else kv.exact_from
    after_exact_from = torch.maximum(exact_from, after_sinks)
    band = None if n == 1 or exact_chunk else length
    k_tail, v_tail = torch.cat([kv.tail[0], k_new], dim=1), torch.cat([kv.tail[1], v_new], dim=1)
    parts.append(exact(k_tail, v_tail, kv.start - length, after_exact_from, band))
    if band is not None:  # chunk=packed: what has slid out of a query's own tail is read packed
        parts.append(packed(end, after_exact_from, band))
    parts.append(packed(exact_from, after_sinks))
    return ops.merge_states(parts)


def _without_exact_tokens(
    q: torch.Tensor, kv: PackedKV, options: AttentionOptions, exact_chunk: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, n, heads = q.shape[:3]
    end = kv.start + n
    if n == 1:
        return library.decode_attention(q, kv.pages, kv.block_table, end, kv.layout, options)
    out, lse = library.prefill_attention(
        q.flatten(0, 1),
        kv.pages,
        kv.block_table,
        kv.start if exact_chunk else end,
        torch.arange(0, batch * n + 1, n, device=q.device),
        kv.layout,
        kv.k.transpose(1, 2).flatten(0, 1) if exact_chunk else None,
        kv.v.transpose(1, 2).flatten(0, 1) if exact_chunk else None,
        options,
    )
    return out.unflatten(0, (batch, n)), lse.view(heads, batch, n).transpose(0, 1)


# --- masks ------------------------------------------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """None where plain causal attention is meant, else a bool mask ``[B, 1, q_length, kv_length]``.

    See transformers' AttentionMaskInterface for the arguments. Layers with a window stay uncompressed, so they get
    what PyTorch's own attention would get.
    """
    if local_size is None and mask_function is causal_mask_function and allow_is_causal_skip:
        aligned = isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
        if aligned and not _pads(attention_mask, kv_length):
            return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,  # type: ignore[arg-type]  # a tensor for caches of fixed size, as upstream passes it
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip and local_size is not None,
        **kwargs,
    )
    return mask


def _pads(attention_mask: torch.Tensor | None, kv_length: int) -> bool:
    if attention_mask is None:
        return False
    if torch.compiler.is_compiling():  # its values cannot be read while tracing
        return True
    return attention_mask.shape[-1] < kv_length or not bool(attention_mask[:, :kv_length].all())


def register() -> None:
    """Make the attention and its mask known to transformers under :data:`NAME`. Changes nothing for other names."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
