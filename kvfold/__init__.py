"""kvfold: a key-value cache in 2 to 4 bits, and attention on the packed bytes.

The public names are imported when they are first used, so that ``import kvfold`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "KVFormat": "kvfold.formats",
    "ModelFormat": "kvfold.layerformats",
    "PageLayout": "kvfold.layout",
    "PagedKVCache": "kvfold.cache",
    "KVCache": "kvfold.integrations.transformers",
    "attach": "kvfold.integrations.transformers",
    "detach": "kvfold.integrations.transformers",
    "ops": "kvfold.ops",
}

__all__ = [
    "KVCache",
    "KVFormat",
    "ModelFormat",
    "PageLayout",
    "PagedKVCache",
    "__version__",
    "attach",
    "detach",
    "ops",
]

if TYPE_CHECKING:
    from kvfold import ops
    from kvfold.cache import PagedKVCache
    from kvfold.formats import KVFormat
    from kvfold.integrations.transformers import KVCache, attach, detach
    from kvfold.layerformats import ModelFormat
    from kvfold.layout import PageLayout


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    module = import_module(home)
    return module if home == f"kvfold.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
