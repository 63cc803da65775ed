"""vLLM's own Python on a machine without a GPU: a platform that says it is a Hopper, and a small engine.

Import this before anything of vLLM's: many of its modules look at the platform when they are imported, and see none;
the Hopper comes after that, for what chooses backends.
"""

# ruff: noqa: E402, I001 (the order of imports is the point)
from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm.config", reason="vLLM is not installed: make test-vllm makes an environment that has it")


class _Missing(types.ModuleType):
    """A compiled part that needs a GPU's driver: whatever is imported from it is there, and nothing is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


if not torch.cuda.is_available():
    for _name in (
        "vllm._C_stable_libtorch",
        "vllm.vllm_flash_attn",
        "vllm.vllm_flash_attn.flash_attn_interface",
    ):
        sys.modules.setdefault(_name, _Missing(_name))

from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config
from vllm.config.attention import AttentionConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.v1.attention import selector
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, get_kv_cache_spec, init_attn_backend
from vllm.v1.worker.utils import allocate_kv_cache

import vllm.platforms
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability


class Hopper(CudaPlatformBase):
    """Says what an H200 says; tensors stay on the CPU."""

    device_type = "cpu"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "a Hopper that is not there"


vllm.platforms._current_platform = Hopper()

from kvfold.integrations.vllm import register

register()


def config(
    dtype: str = "turboquant", backend: str | None = None, additional: dict[str, Any] | None = None, **cache: Any
) -> VllmConfig:
    """A run's configuration without a model. ``cache`` are fields of ``CacheConfig``."""
    # vLLM remembers for a process what it chose for a dtype
    selector._cached_get_attn_backend.cache_clear()
    return VllmConfig(
        cache_config=CacheConfig(cache_dtype=dtype, **cache),
        attention_config=AttentionConfig(backend=backend),
        additional_config=additional or {},
    )


@contextmanager
def current(cfg: VllmConfig, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """As while a model is built."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(cfg):
            yield
    finally:
        torch.set_default_dtype(before)


def choose(cfg: VllmConfig, layer_dtype: str | None = None, head_size: int = 128, **question: Any) -> Any:
    """The backend's class for a layer."""
    with current(cfg):
        return selector.get_attn_backend(
            head_size, torch.bfloat16, layer_dtype or cfg.cache_config.cache_dtype, **question
        )


class Engine:
    """Attention layers of vLLM with their caches, specs, groups and metadata builders made by vLLM's own functions.

    Args:
        layers: For each layer what :class:`Attention` is given besides the heads; ``attention_chunk_size`` makes it a
            :class:`ChunkedLocalAttention`.
        block_size: Tokens of the manager's blocks; None for what vLLM chooses.
        num_blocks: Blocks of each layer.
    """

    def __init__(
        self, cfg: VllmConfig, *, heads: int = 4, kv_heads: int = 2, head_size: int = 64, block_size: int | None = 64,
        num_blocks: int = 16, layers: tuple[dict[str, Any], ...] = ({},), dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        cfg.cache_config.kv_cache_layout = "LBHNC"  # settled below, as the engine core does
        self.config, self.heads, self.kv_heads, self.head_size, self.dtype = cfg, heads, kv_heads, head_size, dtype
        self.scale = head_size**-0.5
        cfg.cache_config.block_size = block_size or CacheConfig.DEFAULT_BLOCK_SIZE
        cfg.model_config = _Model(dtype, kv_heads, head_size)
        with current(cfg, dtype):
            self.layers = [
                (ChunkedLocalAttention if "attention_chunk_size" in options else Attention)(
                    heads, head_size, self.scale, num_kv_heads=kv_heads, cache_config=cfg.cache_config,
                    prefix=f"model.layers.{i}.attn", **options,
                )
                for i, options in enumerate(layers)
            ]  # fmt: skip
        for layer in self.layers:  # as a model loader does when the weights are there, and not while the model is built
            layer.process_weights_after_loading(dtype)
        with current(cfg, dtype):
            if block_size is None:
                Hopper.update_block_size_for_backend(cfg)
            self.block_size = cfg.cache_config.block_size
            self.specs = get_kv_cache_spec(cfg)
            self.kv_groups = get_kv_cache_groups(cfg, self.specs)
            memory = num_blocks * sum(spec.page_size_bytes for spec in self.specs.values())
            self.cache_config = get_kv_cache_config_from_groups(cfg, self.kv_groups, memory)
            backends = dict.fromkeys(layer.get_attn_backend() for layer in self.layers)
            layout = get_supported_kv_cache_layouts(backends)[0]
            cfg.cache_config.kv_cache_layout = layout.name
            self.groups, self.graphs, self.kernel_blocks = init_attn_backend(
                self.cache_config, cfg, torch.device("cpu")
            )
            caches = allocate_kv_cache(self.cache_config, torch.device("cpu"), layout, self.kernel_blocks)
        for layer in self.layers:
            shared = layer.kv_sharing_target_layer_name
            layer.kv_cache = caches[shared or layer.layer_name]
        # blocks of a sequence in no order, as after some time of serving
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.blocks: list[list[int]] = []

    @property
    def builder(self) -> Any:
        return self.groups[0][0].get_metadata_builder()

    def add(self) -> int:
        """A new sequence's number."""
        self.blocks.append([])
        return len(self.blocks) - 1

    def step(
        self, rows: list[tuple[int, int, int]], *, pad_rows: int = 0, pad_tokens: int = 0, capture: bool = False,
        known: bool = True,
    ) -> tuple[dict[str, Any], torch.Tensor]:  # fmt: skip
        """The metadata and slots of a batch.

        Args:
            rows: For each row its sequence, the tokens before, and the new ones.
            pad_rows: Rows added to fill up a CUDA graph. pad_tokens: Tokens.
            known: Whether the host knows the lengths.
        """
        lengths = [new for _, _, new in rows]
        starts = np.concatenate([[0], np.cumsum(lengths), np.full(pad_rows, sum(lengths))]).astype(np.int32)
        seq_lens = [before + new for _, before, new in rows] + [0] * pad_rows
        table = torch.zeros(len(rows) + pad_rows, 4096 // self.block_size, dtype=torch.int32)
        slots = []
        for row, (seq, before, new) in enumerate(rows):
            held = self.blocks[seq]
            while len(held) * self.block_size < before + new:
                held.append(self._free.pop())
            table[row, : len(held)] = torch.tensor(held, dtype=torch.int32)
            slots += [held[t // self.block_size] * self.block_size + t % self.block_size
                      for t in range(before, before + new)]  # fmt: skip
        slot_mapping = torch.tensor(slots + [-1] * pad_tokens, dtype=torch.int64)
        metadata = build_attn_metadata(
            attn_groups=self.groups, num_reqs=len(rows) + pad_rows, num_tokens=sum(lengths) + pad_tokens,
            query_start_loc_gpu=torch.from_numpy(starts), query_start_loc_cpu=torch.from_numpy(starts),
            max_query_len=max(lengths), seq_lens=torch.tensor(seq_lens, dtype=torch.int32), max_seq_len=max(seq_lens),
            block_tables=[table], slot_mappings=slot_mapping[None], kv_cache_config=self.cache_config,
            seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32) if known else None,
            for_cudagraph_capture=capture,
        )  # fmt: skip
        return metadata, slot_mapping

    def run(
        self, metadata: dict[str, Any] | None, slots: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        layer: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """A layer's forward pass, as a model calls it: q ``[T, Hq * d]`` and so on to ``[T, Hq * d]``."""
        module = self.layers[layer]
        names = {one.layer_name: slots for one in self.layers}
        with set_forward_context(metadata, self.config, slot_mapping=names):
            return module(q, k, v)


class _Model:
    """As much of a ``ModelConfig`` as attention asks for."""

    def __init__(self, dtype: torch.dtype, kv_heads: int, head_size: int) -> None:
        self.dtype = dtype
        self.get_num_kv_heads = lambda parallel_config: kv_heads
        self.get_head_size = lambda: head_size
        self.max_model_len = 4096
        self.is_mm_prefix_lm = False
        self.rswa_window = None
        self.is_hybrid = False
        self.hf_config = types.SimpleNamespace(model_type="llama")
        self.hf_text_config = self.hf_config
