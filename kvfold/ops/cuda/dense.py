"""Dense attention by a library's kernel, for prefill: which library, and how it is called.

FlashAttention-3 is taken where the process has it already, or can have it cheaply: its causal mask is aligned to the
last key, so that a chunk behind its prefix is one call. vLLM brings it, but is never imported for it. Elsewhere it is
cuDNN's kernel, or PyTorch's FlashAttention-2 where cuDNN is switched off; PyTorch does not hand on cuDNN's mask of that
kind, so they serve a chunk and its prefix in two calls.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from kvfold.errors import FormatError

ENGINES = ("auto", "fa3", "cudnn")
_wanted: ContextVar[str] = ContextVar("kvfold_prefill_engine", default="auto")

_VLLM = "vllm.vllm_flash_attn.flash_attn_interface"
_PACKAGES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")


# --- which library ----------------------------------------------------------------------------------------------------


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Use one library inside a ``with`` block: ``fa3``, ``cudnn``, or ``auto`` for the choice of :func:`choose`.

    Raises:
        FormatError: The name is unknown.
    """
    if name not in ENGINES:
        raise FormatError(f"unknown prefill engine {name!r}; there are {', '.join(ENGINES)}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def choose(device: torch.device) -> str:
    """``fa3`` or ``cudnn``: FlashAttention-3 where it is at hand, unless :func:`engine` says otherwise.

    Raises:
        FormatError: FlashAttention-3 was asked for and is not at hand; the message says why.
    """
    wanted = _wanted.get()
    if wanted == "cudnn":
        return "cudnn"
    reason = _no_hopper(device) or _flash_attention_3().missing
    if reason is None:
        return "fa3"
    if wanted == "fa3":
        raise FormatError(f"prefill engine 'fa3': {reason}; dense.engine('auto') takes cuDNN instead")
    return "cudnn"


@lru_cache(maxsize=64)
def _no_hopper(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return None
    return f"FlashAttention-3 needs a GPU of compute capability 9.0, and this is {device}"


# --- FlashAttention-3 -------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """The function ``flash_attn_varlen_func`` that returns the log-sum-exp too, or why there is none.

    ``takes_out``: whether it writes where its caller wants. ``takes_splits``: whether its caller says how many
    processors share keys; older ones never share them.
    """

    function: Callable[..., Any] | None
    missing: str | None = None
    takes_out: bool = False
    takes_splits: bool = True


def _flash_attention_3() -> _Found:
    """That of a vLLM which the process has imported, at any time, else of the package."""
    module = sys.modules.get(_VLLM)
    if module is not None and getattr(module, "FA3_AVAILABLE", False):
        return _Found(partial(module.flash_attn_varlen_func, return_softmax_lse=True, fa_version=3), takes_out=True)
    return _of_package()


@lru_cache(maxsize=1)
def _of_package() -> _Found:
    way_out = f"import {_VLLM} before, or install the package flash_attn_interface"
    missing = f"FlashAttention-3 is not in this process; {way_out}"
    for name in _PACKAGES:
        try:
            if importlib.util.find_spec(name) is None:
                continue
            function = importlib.import_module(name).flash_attn_varlen_func
        except ModuleNotFoundError:  # not even the package that it would be in
            continue
        except Exception as error:  # an extension built for another torch fails with anything
            missing = f"{name} cannot be imported ({error}); build it for this torch"
            continue
        parameters = inspect.signature(function).parameters
        # newer ones return the log-sum-exp by request, older ones always
        asked = {"return_attn_probs": True} if "return_attn_probs" in parameters else {}
        return _Found(partial(function, **asked), takes_splits="num_splits" in parameters)
    return _Found(None, missing)


def writes_into() -> bool:
    """Whether FlashAttention-3's result goes where the caller wants it."""
    return _flash_attention_3().takes_out


def flash_attention_3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    bounds: torch.Tensor | None = None,
    longest: int = 0,
    out: torch.Tensor | None = None,
    splits: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[n, Hq, 128]`` to k and v ``[m, H, 128]``; the causal mask lets the last query see all keys.

    Vectors are contiguous and at multiples of 16 bytes; other strides are free. Of fixed lengths the library has
    kernels too, but vLLM's build leaves them out.

    Args:
        bounds: int32 ``[B + 1]``, where sequences begin in q, and in k and v alike; default: it is one sequence.
        longest: Tokens of the longest of these.
        out: Where the result goes if the library can do that, ``[n, Hq, 128]`` of q's dtype, its vectors as q's.
        splits: Among how many processors the keys of a block of queries are shared.

    Returns:
        out ``[n, Hq, 128]`` and log-sum-exp ``[n, Hq]``, of any strides.
    """
    function, _, takes_out, takes_splits = _flash_attention_3()
    assert function is not None  # or choose() would not have taken it
    into: dict[str, Any] = {"out": out} if out is not None and takes_out else {}
    if takes_splits:
        into["num_splits"] = splits
    if bounds is None:
        stream = torch.cuda.current_stream(q.device).cuda_stream
        of_q, of_k = (_bounds(len(x), x.device, stream) for x in (q, k))
    else:
        of_q = of_k = bounds
    result, lse, *_ = function(
        q=q, k=k, v=v, cu_seqlens_q=of_q, cu_seqlens_k=of_k, max_seqlen_q=longest or len(q),
        max_seqlen_k=longest or len(k), softmax_scale=scale, causal=causal, **into,
    )  # fmt: skip
    return result, lse.T


@lru_cache(maxsize=1024)
def _bounds(length: int, device: torch.device, stream: int) -> torch.Tensor:
    """``[0, length]``, made on the device: a copy from the host would wait for it.

    Each stream has its own, as it is made there, and no other one waits for that.
    """
    return torch.arange(0, length + 1, length, dtype=torch.int32, device=device)


# --- cuDNN ------------------------------------------------------------------------------------------------------------


def cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[1, Hq, n, d]`` to ``[1, H, m, d]`` by cuDNN, or FlashAttention-2 where that is switched off.

    The causal mask lets the first query see the first key. Both take Hq of several times H as grouped queries.
    (Neither needs torch's ``enable_gqa``, which only tells its choice of a kernel that this is meant: the operators
    called here give K's own shape to the library.)

    Returns:
        out ``[1, Hq, n, d]`` and log-sum-exp ``[1, Hq, n]``.
    """
    if _cudnn_serves(q.device):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.view(out.shape[:3])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


@lru_cache(maxsize=64)
def _cudnn_serves(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()
