"""What else there is, called as its owners call it. One function per rival; none is needed to import this module.

A rival that is not installed, or that cannot do a case, raises :class:`~kvfold.bench.kernel.Unavailable` with the
reason, which the report repeats.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch

from kvfold.bench.cases import Case, DecodeCase, PrefillCase, StoreCase
from kvfold.bench.kernel import (
    PREFILL_COPIES,
    Contender,
    Kernel,
    Setting,
    Unavailable,
    block_tables,
    lengths,
    queries,
)
from kvfold.bench.ours import store_inputs
from kvfold.formats import KVFormat

FA3_BF16 = "fa3-bf16"
FA3_FP8 = "fa3-fp8"
SCATTER = "torch-scatter-bf16"
BASELINES = {"decode": FA3_BF16, "prefill": FA3_BF16, "store": SCATTER}
"""The contender that each kind of case is compared with: what an uncompressed cache would take."""

_VLLM_SPLITS = 32  # vLLM's default of flash_attn_max_num_splits_for_cuda_graph, and of tq_max_kv_splits_for_cuda_graph
_FA3_TILE = 128  # pages of FlashAttention-3's own tile can be read by the bulk copy engine in a prefill
_BF16 = KVFormat.parse("bf16")
_FP8 = KVFormat.parse("kf8castvf8cast")  # e4m3 without scales of its own


def rivals() -> list[Contender]:
    """Everything that kvfold is compared with."""
    presets = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc")
    return [
        Contender(FA3_BF16, flash_attention_3_bf16),
        Contender(FA3_FP8, flash_attention_3_fp8),
        Contender("sdpa-cudnn-bf16", sdpa_cudnn),
        Contender("sdpa-flash-bf16", sdpa_flash),
        Contender(SCATTER, torch_scatter),
        *(Contender(f"vllm-{preset}", partial(vllm_turboquant, preset=preset)) for preset in presets),
    ]


def _import(name: str, needed_for: str, way_out: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension built for another torch fails with anything
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"{needed_for} needs {name}, which cannot be imported ({first[0]}); {way_out}") from None


# --- FlashAttention-3 -------------------------------------------------------------------------------------------------


def flash_attention_3_bf16(case: Case, setting: Setting) -> Sequence[Kernel]:
    """FlashAttention-3 on a paged bfloat16 cache."""
    return _flash_attention_3(case, setting, torch.bfloat16, _BF16)


def flash_attention_3_fp8(case: Case, setting: Setting) -> Sequence[Kernel]:
    """FlashAttention-3 on a paged e4m3 cache with e4m3 queries and one scale per KV head, decoding only."""
    if isinstance(case, PrefillCase):
        raise Unavailable("compared in decoding only")
    return _flash_attention_3(case, setting, torch.float8_e4m3fn, _FP8)


def _flash_attention_3(case: Case, setting: Setting, dtype: torch.dtype, fmt: KVFormat) -> Sequence[Kernel]:
    if isinstance(case, StoreCase):
        raise Unavailable("attention only")
    if torch.cuda.get_device_capability(setting.device)[0] != 9:
        raise Unavailable("FlashAttention-3 runs on compute capability 9.x alone")
    attend = _fa3_entry()
    if isinstance(case, DecodeCase):
        copies = setting.decodes(case)
        return _fa3_variants(attend, case, setting, dtype, copies, case.cache_bytes(fmt), (setting.page_size,))
    whole = DecodeCase(
        case.name, (case.prefix + case.chunk,), case.num_heads, case.num_kv_heads, case.head_size, case.chunk
    )
    sizes = tuple(dict.fromkeys((setting.page_size, _FA3_TILE)))
    return _fa3_variants(attend, whole, setting, dtype, PREFILL_COPIES, case.cache_bytes(fmt), sizes)


Attend = Callable[..., Callable[[torch.Tensor], object]]
"""``(q, k, v, seq_lens, case, splits)``, K and V paged, to a function of the page table that attends."""


def _fa3_entry() -> Attend:
    """vLLM's build of FlashAttention-3, else the package ``flash_attn_interface``."""
    reasons = []
    for entry in (_fa3_of_vllm, _fa3_package):
        try:
            return entry()
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable("; or: ".join(reasons))


def load_libraries() -> None:
    """Import what rivals import, as far as it is there.

    kvfold's prefill takes FlashAttention-3 once it is loaded, and has to be checked with what it is timed with.
    """
    with suppress(Unavailable):
        _fa3_entry()


def _fa3_of_vllm() -> Attend:
    fa = _import(
        "vllm.vllm_flash_attn.flash_attn_interface", "FlashAttention-3", "install vllm of this torch's CUDA version"
    )
    if not fa.FA3_AVAILABLE:
        raise Unavailable(f"this vllm has no FlashAttention-3: {fa.FA3_UNAVAILABLE_REASON}")

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: torch.Tensor, case: DecodeCase, splits: int
    ) -> Callable[[torch.Tensor], object]:
        starts = torch.arange(case.batch + 1, device=q.device, dtype=torch.int32) * case.query_tokens
        # vLLM makes it once per step, ahead of all layers: it is not part of a layer's attention
        schedule = fa.get_scheduler_metadata(
            batch_size=case.batch,
            max_seqlen_q=case.query_tokens,
            max_seqlen_k=case.longest,
            num_heads_q=case.num_heads,
            num_heads_kv=case.num_kv_heads,
            headdim=case.head_size,
            cache_seqlens=seq_lens,
            qkv_dtype=k.dtype,
            cu_seqlens_q=starts,
            page_size=k.shape[1],
            causal=True,
            num_splits=splits,
        )
        descale = _descale(case, k)
        flat = q.flatten(0, 1)
        out = torch.empty(flat.shape, device=q.device, dtype=torch.bfloat16)

        def call(table: torch.Tensor) -> object:
            return fa.flash_attn_varlen_func(
                q=flat, k=k, v=v, out=out, cu_seqlens_q=starts, max_seqlen_q=case.query_tokens, seqused_k=seq_lens,
                max_seqlen_k=case.longest, softmax_scale=case.head_size**-0.5, causal=True, block_table=table,
                scheduler_metadata=schedule, q_descale=descale, k_descale=descale, v_descale=descale,
                num_splits=splits, fa_version=3,
            )  # fmt: skip

        return call

    return attend


def _fa3_package() -> Attend:
    fa = _import("flash_attn_interface", "FlashAttention-3", "build it from the folder hopper of flash-attention")

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: torch.Tensor, case: DecodeCase, splits: int
    ) -> Callable[[torch.Tensor], object]:
        descale = _descale(case, k)

        def call(table: torch.Tensor) -> object:
            return fa.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=seq_lens, page_table=table, softmax_scale=case.head_size**-0.5, causal=True,
                q_descale=descale, k_descale=descale, v_descale=descale, num_splits=splits,
            )  # fmt: skip

        return call

    return attend


def _descale(case: DecodeCase, k: torch.Tensor) -> torch.Tensor | None:
    if k.dtype == torch.bfloat16:
        return None
    return torch.ones(1, device=k.device).expand(case.batch, case.num_kv_heads)


def _fa3_variants(
    attend: Attend,
    case: DecodeCase,
    setting: Setting,
    dtype: torch.dtype,
    copies: int,
    call_bytes: int,
    page_sizes: Sequence[int],
) -> list[Kernel]:
    """The split count as vLLM fixes it for CUDA graphs and as FlashAttention-3 would choose it, per page size."""
    kernels = []
    for page_size in page_sizes:
        tables, num_pages = block_tables(case, copies, page_size, setting.device)
        # as vLLM lays it out: a token's K and V of a head side by side
        cache = _random((num_pages, page_size, case.num_kv_heads, 2 * case.head_size), dtype, setting.device)
        k, v = cache.split(case.head_size, dim=-1)
        q, seq_lens = queries(case, setting.device).to(dtype), lengths(case, setting.device)
        for splits, how in ((_VLLM_SPLITS, f"at most {_VLLM_SPLITS} splits, as vLLM"), (0, "splits of its own choice")):
            call = attend(q, k, v, seq_lens, case, splits)
            note = f"pages of {page_size}, {how}"
            kernels.append(Kernel([partial(call, table) for table in tables], call_bytes, note))
    return kernels


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal bfloat16, or e4m3 of any bits that make a number below 2."""
    if dtype == torch.bfloat16:
        return torch.randn(shape, device=device, dtype=dtype)
    bits = torch.empty(shape, device=device, dtype=torch.uint8).random_(0, 256)
    return bits.bitwise_and_(0xBF).view(dtype)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def sdpa_cudnn(case: Case, setting: Setting) -> Sequence[Kernel]:
    """PyTorch's attention on dense K and V, with cuDNN's kernel."""
    return _sdpa(case, setting, "CUDNN_ATTENTION")


def sdpa_flash(case: Case, setting: Setting) -> Sequence[Kernel]:
    """PyTorch's attention on dense K and V, with its FlashAttention-2."""
    return _sdpa(case, setting, "FLASH_ATTENTION")


def _sdpa(case: Case, setting: Setting, backend: str) -> Sequence[Kernel]:
    if not isinstance(case, DecodeCase):
        raise Unavailable("compared in decoding only")
    if not case.uniform:
        raise Unavailable("dense tensors cannot hold sequences of different lengths")
    if case.query_tokens > 1:
        raise Unavailable("its causal mask lets the first of several queries see the first key alone")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    copies = setting.decodes(case)
    shape = (copies, case.batch, case.num_kv_heads, case.longest, case.head_size)
    k, v = (_random(shape, torch.bfloat16, setting.device) for _ in range(2))
    q = queries(case, setting.device).transpose(1, 2)

    def call(copy: int) -> object:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k[copy], v[copy], enable_gqa=case.num_heads != case.num_kv_heads
            )

    return [Kernel([partial(call, copy) for copy in range(copies)], case.cache_bytes(_BF16), "dense, not paged")]


def torch_scatter(case: Case, setting: Setting) -> Sequence[Kernel]:
    """What storing costs without compression: K and V copied to their slots, one ``index_copy_`` each."""
    if not isinstance(case, StoreCase):
        raise Unavailable("storing only")
    call_bytes = case.input_bytes + case.cache_bytes(_BF16)
    copies = setting.copies(call_bytes)
    k, v, slots, num_pages = store_inputs(case, copies, setting)
    shape = (num_pages * setting.page_size, case.num_kv_heads, case.head_size)
    k_cache, v_cache = (torch.zeros(shape, dtype=torch.bfloat16, device=setting.device) for _ in range(2))

    def call(copy: int) -> object:
        k_cache.index_copy_(0, slots[copy], k[copy])
        return v_cache.index_copy_(0, slots[copy], v[copy])

    return [Kernel([partial(call, copy) for copy in range(copies)], call_bytes, "two launches")]


# --- upstream's TurboQuant --------------------------------------------------------------------------------------------


def vllm_turboquant(case: Case, setting: Setting, preset: str) -> Sequence[Kernel]:
    """vLLM's own TurboQuant kernels, decode and store, with the buffers that vLLM allocates ahead."""
    if isinstance(case, PrefillCase):
        raise Unavailable("compared in decoding and storing only")
    if isinstance(case, DecodeCase) and case.query_tokens > 1:
        raise Unavailable("its decode kernel takes one query token per sequence")
    quantization = "vllm.model_executor.layers.quantization.turboquant"
    way_out = "install vllm 0.28 or newer"
    config = _import(f"{quantization}.config", "upstream's TurboQuant", way_out).TurboQuantConfig
    centroids = _import(f"{quantization}.centroids", "upstream's TurboQuant", way_out).get_centroids
    parameters = config.from_cache_dtype(preset, case.head_size)
    levels = centroids(case.head_size, parameters.centroid_bits).to(setting.device, torch.float32)
    if isinstance(case, DecodeCase):
        return [_turboquant_decode(case, setting, parameters, levels)]
    return [_turboquant_store(case, setting, parameters, levels)]


def _turboquant_decode(case: DecodeCase, setting: Setting, parameters: Any, levels: torch.Tensor) -> Kernel:
    module = _import("vllm.v1.attention.ops.triton_turboquant_decode", "upstream's TurboQuant", "install vllm")
    device, slot_bytes = setting.device, parameters.slot_size_aligned
    call_bytes = case.tokens * case.num_kv_heads * slot_bytes
    tables, num_pages = block_tables(case, setting.decodes(case), setting.page_size, device)
    cache = _turboquant_slots((num_pages, setting.page_size, case.num_kv_heads, slot_bytes), parameters, device)
    q, seq_lens = queries(case, device)[:, 0], lengths(case, device)
    rotation = _hadamard(case.head_size, device)
    partials = torch.empty(case.batch, case.num_heads, _VLLM_SPLITS, case.head_size + 1, device=device)
    out, lse = torch.empty_like(q), torch.empty(case.batch, case.num_heads, device=device)

    def call(table: torch.Tensor) -> object:
        return module.triton_turboquant_decode_attention(
            query=q, kv_cache=cache, block_table=table, seq_lens=seq_lens, Pi=rotation, centroids=levels,
            scale=case.head_size**-0.5, mse_bits=parameters.key_mse_bits, key_packed_size=parameters.key_packed_size,
            value_quant_bits=parameters.effective_value_quant_bits, key_fp8=parameters.key_fp8,
            norm_correction=parameters.norm_correction, PiT=rotation, mid_o_buf=partials, output_buf=out, lse_buf=lse,
            max_num_kv_splits=_VLLM_SPLITS,
        )  # fmt: skip

    return Kernel([partial(call, table) for table in tables], call_bytes, f"{slot_bytes} bytes a token and KV head")


def _turboquant_store(case: StoreCase, setting: Setting, parameters: Any, levels: torch.Tensor) -> Kernel:
    module = _import("vllm.v1.attention.ops.triton_turboquant_store", "upstream's TurboQuant", "install vllm")
    slot_bytes = parameters.slot_size_aligned
    call_bytes = case.input_bytes + case.tokens * case.num_kv_heads * slot_bytes
    copies = setting.copies(call_bytes)
    k, v, slots, num_pages = store_inputs(case, copies, setting)
    cache = torch.zeros(
        num_pages, setting.page_size, case.num_kv_heads, slot_bytes, dtype=torch.uint8, device=setting.device
    )
    rotation, midpoints = _hadamard(case.head_size, setting.device), (levels[1:] + levels[:-1]) / 2

    def call(copy: int) -> object:
        return module.triton_turboquant_store(
            k[copy], v[copy], cache, slots[copy], rotation, midpoints, mse_bits=parameters.key_mse_bits,
            key_packed_size=parameters.key_packed_size, value_quant_bits=parameters.effective_value_quant_bits,
            key_fp8=parameters.key_fp8,
        )  # fmt: skip

    return Kernel([partial(call, copy) for copy in range(copies)], call_bytes)


def _turboquant_slots(shape: tuple[int, ...], parameters: Any, device: torch.device) -> torch.Tensor:
    """Slots of random codes; the half-precision numbers beside them are of size one, and no e4m3 code is NaN."""
    slots = torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256)
    key_bytes = parameters.key_packed_size
    if parameters.key_fp8:
        slots[..., :key_bytes].bitwise_and_(0xBF)
    norm = [] if parameters.key_fp8 else [key_bytes - 2]
    for offset in (*norm, parameters.slot_size - 4, parameters.slot_size - 2):  # and V's scale and minimum
        slots[..., offset : offset + 2].view(torch.float16).uniform_(0.75, 1.25)
    return slots


def _hadamard(order: int, device: torch.device) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / order**0.5).to(device)
