"""kvfold's cache in vLLM: ``vllm serve MODEL --kv-cache-dtype turboquant``.

vLLM finds :func:`register` by the entry point ``kvfold`` of the group ``vllm.general_plugins`` and calls it in each of
its processes. It adds names of cache dtypes and takes over the slot ``TURBOQUANT`` among the attention backends; see
:mod:`kvfold.integrations.vllm.backend` for what happens with upstream's own ``turboquant_...``, and
:mod:`kvfold.integrations.vllm.mla` for the one function that is replaced. docs/vllm.md says how it is used. Importing
this package imports neither vLLM nor torch.
"""

from __future__ import annotations

import logging

__all__ = ["DTYPES", "register"]

# of those that the kernels serve, widths at which keys have as many bits as values or more
_FORMATS = (
    "k8v8", "k8v4", "k6v6", "k6v4", "k5v5", "k5v4", "k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2",
)  # fmt: skip

DTYPES: dict[str, str] = {"turboquant": "turboquant", **{f"kvfold_{name}": name for name in _FORMATS}}
"""Values of ``--kv-cache-dtype`` that are kvfold's, and the formats that they mean. None begins with ``turboquant_``:
what does is upstream's, gets its first and last two layers skipped and FlashAttention forced to version 2."""

BACKEND = "kvfold.integrations.vllm.backend.Slot"


def register() -> None:
    """Make the cache dtypes and the attention backend known to vLLM. Cheap, re-entrant, initialises no device."""
    try:
        from vllm.config.cache import get_kv_cache_dtype_handler, register_kv_cache_dtype
        from vllm.v1.attention import selector
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
        from vllm.v1.kv_cache_interface import KVQuantMode

        slot = AttentionBackendEnum.TURBOQUANT
    except (ImportError, AttributeError) as error:
        # an exception here would keep vLLM from starting for somebody who has no use for kvfold in it
        logging.getLogger("vllm.kvfold").warning(
            "kvfold is not available in this vLLM: %s. It needs the hooks of vLLM 0.33; pip install 'vllm>=0.33'", error
        )
        return
    import torch

    from kvfold.integrations.vllm import mla

    class Handler:
        """What vLLM asks about a cache dtype: bytes, whose layout is the backend's business."""

        name: str

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    for name in DTYPES:
        handler = get_kv_cache_dtype_handler(name)
        if handler is None or not type(handler).__module__.startswith("kvfold."):
            register_kv_cache_dtype(name)(type(Handler.__name__, (Handler,), {"name": name}))
    if slot.get_path() != BACKEND:
        if slot.is_overridden():
            logging.getLogger("vllm.kvfold").warning("kvfold replaces %s in slot TURBOQUANT", slot.get_path())
        register_backend(slot, BACKEND)
    mla.refuse_in(selector)
