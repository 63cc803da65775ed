"""The attention backend: which class serves a layer, and what its cache is made of.

vLLM's list of backends for a platform is fixed, and a backend is asked for by dtype alone only if it stands in it. The
slot ``TURBOQUANT`` does, and ``register_backend`` is the sanctioned way to put a class there. But the slot is also the
home of upstream's ``turboquant_4bit_nc`` and its like. So :class:`Slot` answers nothing itself: it looks whose cache
the run has, and names the class that vLLM then resolves, upstream's untouched or one of ours. Ours are made one for
each format (:func:`class_of`), because later hooks are called with no word about the cache's dtype.

Nor does vLLM say which layer it asks for. So where layers have formats of their own, all get one class that cannot say
what a cache is made of (:class:`ByLayer`), and each layer, when its weights are there and its name is known, takes the
class of its own format instead. Pages of such layers differ in bytes; vLLM gives all of them one block table.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVQuantMode,
)

from kvfold.errors import KVFoldError, UnsupportedModelError
from kvfold.formats import MIN_ROTATED_HEAD, KVFormat
from kvfold.integrations.vllm import DTYPES
from kvfold.integrations.vllm.settings import EngineConfigError, Settings, is_chosen
from kvfold.layerformats import ModelFormat
from kvfold.layout import PageLayout

PAGE_SIZE = 64
"""Tokens in a page. vLLM's block is one page, or some of them one after the other."""

NAME = "TURBOQUANT"

_WAYS_OUT = {
    "sliding window not supported": "layers with a sliding window are not compressed; {skip} sliding_window",
    "attention sinks not supported": "attention sinks are not supported; {skip} and their indices",
    "block_size not supported": f"blocks are pages of {PAGE_SIZE} tokens or multiples; leave --block-size out",
    "dtype not supported": "models run in bfloat16 or float16; add --dtype bfloat16",
    "MLA not supported": "the latent cache of MLA is not compressed; {leave}",
    "PCP not supported": "context parallelism is not supported; leave --prefill-context-parallel-size out",
    "KV connector not supported": "KV transfer is not supported; leave --kv-transfer-config out",
    "device-cpu query lens mismatch not supported": (
        "adaptive verification is not supported; leave enable_adaptive_verification out of --speculative-config"
    ),
    "DCP not supported": "context parallelism is not supported; leave --decode-context-parallel-size out",
}
"""By how vLLM's reasons begin; what stands for ``{skip}`` and ``{leave}`` is :func:`ways_out`."""


def ways_out(by_name: bool) -> dict[str, str]:
    """What a user can do: ``skip`` some layers, which names of layers or their indices may follow, or ``leave`` it."""
    skip = "leave such layers uncompressed with --kv-cache-dtype-skip-layers"
    if by_name:  # which serves every layer, and has no dtype that could be skipped
        skip = f"use --kv-cache-dtype turboquant instead and {skip}"
    option = "--attention-backend" if by_name else "--kv-cache-dtype"
    return {"skip": skip, "leave": f"leave {option} out for this model"}


def why_not_mla() -> str:
    """Why a layer with MLA is refused whose dtype is kvfold's, and the way out."""
    return _WAYS_OUT["MLA not supported"].format(**ways_out(False))


def original() -> type[AttentionBackend]:
    """Upstream's class in the slot."""
    backend: type[AttentionBackend] = resolve_obj_by_qualname(AttentionBackendEnum.TURBOQUANT.value)
    return backend


class Slot(AttentionBackend):
    """What stands in slot ``TURBOQUANT``: chooses a class by the run's cache dtype, and else is upstream's."""

    @classmethod
    def validate_configuration(cls, *args: Any, **question: Any) -> list[str]:
        """Why a layer cannot be served, empty if it can; vLLM asks with keywords (``AttentionSelectorConfig``)."""
        config = get_current_vllm_config_or_none()
        dtype = question.get("kv_cache_dtype")
        settings = Settings.of(config)
        if settings is None:
            if dtype in DTYPES:
                return [f"{dtype} is kvfold's, and the run's cache is not"]
            if config is not None and is_chosen(config.attention_config) and not str(dtype).startswith("turboquant_"):
                return [
                    f"kvfold: --attention-backend turboquant compresses, and the cache's dtype is {dtype} (a "
                    "checkpoint may say so): add --kv-cache-dtype turboquant, or leave the backend out"
                ]
            reasons: list[str] = original().validate_configuration(*args, **question)
            return reasons
        if not settings.by_name and dtype not in DTYPES:
            return [
                "kvfold does not serve layers that stay uncompressed: leave --attention-backend out, "
                "and the dtype chooses kvfold for the others"
            ]
        return class_of_model(settings.format, settings.by_name).validate_configuration(*args, **question)

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """The class that vLLM is to resolve for the run's cache."""
        settings = Settings.of(get_current_vllm_config_or_none())
        chosen = original() if settings is None else class_of_model(settings.format, settings.by_name)
        module, name = chosen.full_cls_name()
        return module, name

    # What remains is for those that ask the slot's class itself, which stands for upstream's then.

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> Any:
        return original().get_impl_cls()

    @staticmethod
    def get_builder_cls() -> Any:
        return original().get_builder_cls()

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        sizes: list[int | MultipleOf] = original().get_supported_kernel_block_sizes(kv_cache_spec)
        return sizes

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return original().customize_spec(spec)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        layouts: tuple[KVCacheLayout, ...] | None = original().supported_kv_cache_layouts()
        return layouts

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return bool(original().supports_kv_cache_dtype(kv_cache_dtype))


class CompressedBackend(AttentionBackend):
    """Attention on pages of one format; :func:`class_of` makes the classes that are used.

    Attributes:
        format: What K and V are stored as.
        formats: The same of each layer of the model.
        by_name: See :class:`~kvfold.integrations.vllm.settings.Settings`.
    """

    format: ClassVar[KVFormat]
    formats: ClassVar[ModelFormat]
    by_name: ClassVar[bool]

    # The store belongs to the forward pass, so that it is the kernel right before the decode's: that is what
    # ``inputs_ready`` promises. As an op of its own, inductor could put others between the two.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", *DTYPES]

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def get_impl_cls(cls) -> Any:
        from kvfold.integrations.vllm.impl import impl_of

        return impl_of(cls.formats, cls.by_name)

    @staticmethod
    def get_builder_cls() -> Any:
        from kvfold.integrations.vllm.metadata import MetadataBuilder

        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_SIZE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Heads outside tokens, so that a block of 64 tokens is a page of all heads, and layers apart."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # one that cuts blocks by heads would cut pages where a block has several

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # batches are cut into decodes and chunks by the lengths that the host knows

    @classmethod
    def validate_configuration(cls, *args: Any, **question: Any) -> list[str]:
        reasons = super().validate_configuration(*args, **question)
        ways = ways_out(cls.by_name)
        texts = []
        for reason in reasons:
            known = next((text for begin, text in _WAYS_OUT.items() if reason.startswith(begin)), None)
            texts.append(f"{reason}; {ways['leave']}" if known is None else known.format(**ways))
        head_size = question.get("head_size")
        if head_size is not None and not question.get("use_mla"):
            answers = (why_not_served(fmt, head_size) for fmt in cls.formats.formats)
            texts += [f"{reason}; {ways['leave']}" for reason in dict.fromkeys(answers) if reason is not None]
        return [f"kvfold: {text}" for text in texts]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec of a layer's cache: bytes per token and KV head, all that is in a page included.

        A page has nothing but its tokens' records, so this number does not depend on the block size, with which vLLM
        plays (it also asks with a block size of 1).
        """
        if spec.state_content_bytes is not None:
            return spec
        if not cls.by_name and spec.kv_quant_mode == KVQuantMode.NONE:
            return spec  # vLLM asks what a skipped layer would take
        if type(spec) is not FullAttentionSpec:
            ways = ways_out(cls.by_name)
            skip = "" if isinstance(spec, ChunkedLocalAttentionSpec) else f"{ways['skip']}, or "  # vLLM skips none
            raise UnsupportedModelError(
                f"kvfold compresses layers that see every token, and this one's cache is {type(spec).__name__}; "
                f"{skip}{ways['leave']}"
            )
        layout = PageLayout.of(cls.format, spec.head_size, spec.head_size_v, PAGE_SIZE)
        return replace(
            spec, dtype=torch.uint8, kv_quant_mode=KVQuantMode.CUSTOM, state_content_bytes=layout.token_bytes
        )


def class_of(fmt: KVFormat, by_name: bool = False) -> type[CompressedBackend]:
    """The backend for a format: a class of this module, as vLLM resolves classes by their names."""
    name = "Compressed_" + re.sub(r"\W", "_", str(fmt)) + ("_by_name" if by_name else "")
    made: type[CompressedBackend] | None = globals().get(name)
    if made is None:
        about = {"format": fmt, "formats": ModelFormat(fmt), "by_name": by_name, "__module__": __name__}
        made = globals()[name] = type(name, (CompressedBackend,), about)
    return made


class ByLayer(CompressedBackend):
    """Stands for layers with formats of their own until each has its class; :func:`class_of_model` makes subclasses."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Refuses: what a layer's cache is made of depends on the layer."""
        if not cls.by_name and spec.kv_quant_mode == KVQuantMode.NONE:
            return spec  # vLLM asks what a skipped layer would take
        raise EngineConfigError(
            f"format {str(cls.formats)!r}: vLLM told no layer that its weights are there, as it does not where a "
            "daemon has prepared them: use one format for all layers"
        )


def class_of_model(fmt: ModelFormat, by_name: bool = False) -> type[CompressedBackend]:
    """The backend that vLLM is told of: that of the format, if all layers have the same."""
    if fmt.uniform:
        return class_of(fmt.base, by_name)
    name = f"ByLayer_{blake2b(str(fmt).encode(), digest_size=8).hexdigest()}" + ("_by_name" if by_name else "")
    made: type[CompressedBackend] | None = globals().get(name)
    if made is None:
        about = {"format": fmt.base, "formats": fmt, "by_name": by_name, "__module__": __name__}
        made = globals()[name] = type(name, (ByLayer,), about)
    return made


@lru_cache(maxsize=256)
def why_not_served(fmt: KVFormat, head_size: int) -> str | None:
    """Why no kernel for GPUs serves a format at a head size, None if one does."""
    if head_size < MIN_ROTATED_HEAD:
        return f"head size {head_size} is too small to be rotated, which takes {MIN_ROTATED_HEAD} coordinates"
    try:
        layout = PageLayout.of(fmt, head_size, page_size=PAGE_SIZE)
    except KVFoldError as error:
        return str(error)
    reasons = []
    for name in ("cuda", "triton"):
        try:
            reason = import_module(f"kvfold.ops.{name}").supports(layout)
        except ImportError as error:
            reason = f"{error.name or error} is not installed (pip install 'kvfold[{name}]')"
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(reasons)
