"""Compressed caches for Hugging Face transformers.

from kvfold import KVCache
cache = KVCache.for_model(model, "k4v4")
model.generate(**inputs, past_key_values=cache)
"""

from kvfold.integrations.transformers.attention import NAME, register
from kvfold.integrations.transformers.cache import CacheMemory, KVCache, attach, detach

__all__ = ["NAME", "CacheMemory", "KVCache", "attach", "detach"]

register()
