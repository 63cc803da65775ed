"""What is said of a model with MLA and a cache dtype of kvfold's: the one function of vLLM's that is replaced.

vLLM asks for a layer's backend by its dtype, and of MLA only those that serve nothing else: the slot ``TURBOQUANT`` is
not among them, and no public hook comes before. What it says then lists MLA's backends, each with "kv_cache_dtype not
supported", and not which option to leave out; vllm-project/vllm#40094 is of such a message, #40069 has MLA among what
is missing. On CPUs its answer does not look at the dtype at all. So the function behind ``get_attn_backend`` is asked
through one that refuses such layers first, and hands on everything else. A vLLM that has no such function is left
alone, and keeps its own message.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from kvfold.integrations.vllm import DTYPES

_NAME = "_cached_get_attn_backend"  # of vllm.v1.attention.selector in vLLM 0.33


def refuse_in(selector: ModuleType) -> None:
    """Have ``vllm.v1.attention.selector`` refuse layers with MLA whose cache is to be kvfold's. Re-entrant.

    There an ``UnsupportedModelError`` is raised from then on.
    """
    answer = getattr(selector, _NAME, None)
    if answer is None or getattr(answer, "refuses_mla", False):
        return

    @functools.wraps(answer)
    def asked(backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_selector_config.use_mla and attn_selector_config.kv_cache_dtype in DTYPES:
            from kvfold.errors import UnsupportedModelError  # here, as registering is to stay cheap
            from kvfold.integrations.vllm.backend import why_not_mla

            raise UnsupportedModelError(f"kvfold: {attn_selector_config.kv_cache_dtype}: {why_not_mla()}")
        return answer(backend, attn_selector_config, *args, **kwargs)

    for name in ("cache_clear", "cache_info"):
        if hasattr(answer, name):
            setattr(asked, name, getattr(answer, name))
    asked.refuses_mla = True  # type: ignore[attr-defined]
    setattr(selector, _NAME, asked)
