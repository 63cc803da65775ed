"""Other systems' KV cache formats, simulated: K and V as they come back after those systems have stored them.

A :class:`Rival` is a round trip for K, one for V, the bits that the system spends on them, and its source.
:func:`find` finds one by name; :class:`kvfold.eval.rivals.cache.RivalCache` applies it under transformers. These are
instruments for comparing quality. Nothing is packed, and nothing is said about speed.

A family a module: :mod:`vllm`, :mod:`paper`, :mod:`metal`, :mod:`lmdeploy`, :mod:`blocks`.
"""

from __future__ import annotations

import difflib
from functools import lru_cache

from kvfold.errors import FormatError
from kvfold.eval.rivals import blocks, lmdeploy, metal, paper, vllm
from kvfold.eval.rivals.codec import SKIP, Codec, Rival

__all__ = ["Codec", "Rival", "find", "known", "near"]

_ALIASES = {f"turboquant_{name}": f"vllm:{name}" for name in ("k8v4", "4bit_nc", "k3v4_nc", "3bit_nc")}
_ALIASES |= {f"{alias}{SKIP}": f"{name}{SKIP}" for alias, name in _ALIASES.items()}
_ALIASES["metal:q8_0"] = "metal:q8_0/q3_0"


@lru_cache(maxsize=1)
def known() -> dict[str, Rival]:
    """Every rival by its name."""
    families = (vllm, paper, metal, lmdeploy, blocks)
    return {rival.name: rival for family in families for rival in family.rivals()}


def find(text: str) -> Rival | None:
    """The rival of this name in any case, or None if the text names no other system.

    Raises:
        FormatError: The text names one of these systems, but no format of it; the message proposes the nearest.
    """
    name = text.strip().lower()
    rival = known().get(_ALIASES.get(name, name))
    families = {other.partition(":")[0] for other in known() if ":" in other}
    if rival is None and name.partition(":")[0] in families and ":" in name:
        raise FormatError(f"unknown format {text!r}; {near(name) or 'docs/fidelity.md lists the names'}")
    return rival


def near(text: str) -> str:
    """The question whether one of the names nearest to ``text`` was meant, or an empty text if none is near."""
    names = difflib.get_close_matches(text.strip().lower(), [*known(), *_ALIASES], n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in names)}?" if names else ""
