"""Read a :class:`~kvfold.modelshape.ModelShape` from a Hugging Face config.

Only what the KV cache needs is read. Where configs leave a key out because its class has a default (Gemma 3 leaves
out even the number of heads), that default stands in :data:`_CLASS_DEFAULTS`; any other missing key is an error and
never a guess. transformers is the yardstick (tests/test_modelconfig.py) but is not imported: this has to start fast,
and to work where it is not installed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kvfold.errors import FormatError, UnsupportedModelError
from kvfold.modelshape import FULL, LINEAR, MAX_LAYERS, SHARED, SLIDING, LayerGroup, ModelShape, PlanError

_BY_HAND = "give the shape by hand instead: --layers, --kv-heads and --head-size, or ModelShape.uniform"
_NESTED = ("text_config", "thinker_config", "llm_config", "language_config")
_INHERITED = ("model_type", "dtype", "torch_dtype", "is_encoder_decoder")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_LAYER_TYPES = {
    **dict.fromkeys(("full_attention", "attention", "hybrid", "indexed_attention", "deepseek_sparse_attention"), FULL),
    **dict.fromkeys(("sliding_attention", "chunked_attention", "hybrid_sliding"), SLIDING),
    **dict.fromkeys(("linear_attention", "mamba", "conv", "moe", "mlp"), LINEAR),
}

# Keys by which some hybrids say which layers attend. They are not understood, and to overlook one would plan for a
# cache several times too large.
_OTHER_SPELLINGS = (
    *("attn_layer_indices", "attn_layer_period", "attn_type_list", "block_configs", "block_types", "full_attn_idxs"),
    *("hybrid_layer_pattern", "hybrid_override_pattern", "layers_block_type", "linear_attn_config"),
)

# Where the layers of one kind have heads of their own: the kind, the usual key, the key for that kind.
_OWN_HEADS = (
    (FULL, "head_dim", "global_head_dim"),
    (FULL, "num_key_value_heads", "num_global_key_value_heads"),
    (SLIDING, "head_dim", "swa_head_dim"),
    (SLIDING, "v_head_dim", "swa_v_head_dim"),
    (SLIDING, "num_key_value_heads", "swa_num_key_value_heads"),
)

_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_GEMMA3N = {"num_key_value_heads": 2, "sliding_window": 512, "sliding_window_pattern": 5, "num_kv_shared_layers": 15}
_GEMMA4 = {"sliding_window": 512, "sliding_window_pattern": 6, "global_head_dim": 512, "attention_k_eq_v": False}
_LLAMA4 = {"attention_chunk_size": 8192, "no_rope_layer_interval": 4}
_QWEN2 = {"use_sliding_window": False, "max_window_layers": 28}
_QWEN_HYBRID = {"full_attention_interval": 4, "head_dim": 256}

# By model_type, or model_type + "_text" of a model with several parts.
_CLASS_DEFAULTS: dict[str, Mapping[str, object]] = {
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "falcon": {"multi_query": True},
    "gemma": {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {**_GEMMA, "sliding_window_pattern": 2},
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 6},
    "gemma3n_text": {**_GEMMA, **_GEMMA3N},
    "gemma4_text": {**_GEMMA, **_GEMMA4},
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "sliding_window_pattern": 2},
    "llama4_text": {**_LLAMA4, "num_key_value_heads": 8, "head_dim": 128},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    **dict.fromkeys(("qwen2", "qwen2_moe"), _QWEN2),
    "qwen3": {**_QWEN2, "head_dim": 128},
    "qwen3_moe": {**_QWEN2, "num_key_value_heads": 4},
    "qwen3_next": {**_QWEN_HYBRID, "num_key_value_heads": 2},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), _QWEN_HYBRID),
}


@dataclass(frozen=True)
class _Config:
    """The keys of a config, and how messages call it."""

    values: Mapping[str, object]
    where: str

    def get(self, *keys: str) -> object:
        """The first of ``keys`` that is there and not null, or None."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def integer(self, *keys: str) -> int:
        """The positive whole number under the first of ``keys`` that is there."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{self.where}: {key!r} is {value!r}, not a whole number from 1; {_BY_HAND}")
            return value
        raise PlanError(f"{self.where}: no key {' or '.join(map(repr, keys))}; {_BY_HAND}")

    def text_part(self) -> _Config:
        """The language model's own config, where a model has several parts, completed by its class's defaults."""
        for key in _NESTED:
            inner = self.values.get(key)
            if isinstance(inner, Mapping):
                inherited = {name: self.values[name] for name in _INHERITED if self.values.get(name) is not None}
                return _Config({**inherited, **inner}, f"{self.where} ({key})").text_part()
        model_type = str(self.get("model_type") or "")
        defaults = _CLASS_DEFAULTS.get(model_type) or _CLASS_DEFAULTS.get(f"{model_type}_text", {})
        return _Config({**defaults, **self.values}, self.where)

    def layer(self, index: int, kind: str) -> _Config:
        """The config as the layer sees it."""
        per_layer = self.get("per_layer_config")
        if isinstance(per_layer, Mapping):
            for key, own in per_layer.items():  # a key is 5, "5" or "05"
                if str(key).isdecimal() and int(key) == index and isinstance(own, Mapping):
                    return replace(self, values={**self.values, **own})
            return self
        own = {key: self.values.get(special) for of_kind, key, special in _OWN_HEADS if of_kind == kind}
        if self.get("attention_k_eq_v") is False:
            own.pop("num_key_value_heads", None)
        return replace(self, values={**self.values, **{key: value for key, value in own.items() if value is not None}})


def read_shape(source: Mapping[str, object] | str | os.PathLike[str]) -> ModelShape:
    """See :meth:`ModelShape.from_config <kvfold.modelshape.ModelShape.from_config>`."""
    whole, name = _load(source)
    config = whole.text_part()
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{config.where}: the cross-attention of encoder-decoder models is not planned")
    try:
        layers = [_layer(config.layer(index, kind), kind) for index, kind in enumerate(_kinds(config))]
    except FormatError as error:  # a head size that does not exist
        raise PlanError(f"{config.where}: {error}") from None
    groups = Counter(layers)  # which keeps the order in which its keys came
    place = {group: number for number, group in enumerate(groups)}
    itemsize, notes = _itemsize(config)
    if config.get("index_head_dim"):
        notes += ("the keys of the sparse-attention indexer (index_head_dim) are not counted",)
    if LINEAR in {group.kind for group in groups} or "hybrid" in str(config.get("layer_types")):
        notes += ("the recurrent states, constant in size, are not counted",)
    positions = config.get("max_position_embeddings", "n_positions")
    return ModelShape(
        groups=tuple(replace(group, layers=count) for group, count in groups.items()),
        itemsize=itemsize,
        name=name or str(config.get("_name_or_path", "model_type") or "model"),
        max_positions=positions if isinstance(positions, int) else None,
        notes=notes,
        order=tuple(place[layer] for layer in layers),
    )


def _load(source: Mapping[str, object] | str | os.PathLike[str]) -> tuple[_Config, str]:
    """The config, and the model's name if the path tells it."""
    if isinstance(source, Mapping):
        return _Config(source, "config"), ""
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        what = f"no config.json in {path}" if path.is_dir() else f"no such file or directory: {path}"
        raise PlanError(f"{what}; a model is a config.json or a directory with one, nothing is downloaded")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise PlanError(f"{file} is not a JSON config: {error}") from None
    if not isinstance(values, dict):
        raise PlanError(f"{file} is not a model's config: it holds a {type(values).__name__}, not an object")
    return _Config(values, str(file)), file.resolve().parent.name if file.name == "config.json" else file.stem


def _kinds(config: _Config) -> list[str]:
    """The kind of every layer."""
    layers = config.integer("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    if layers > MAX_LAYERS:
        raise PlanError(f"{config.where}: {layers} layers are more than the {MAX_LAYERS} that a model may have")
    kinds = _listed_kinds(config, layers) if config.get("layer_types") is not None else _derived_kinds(config, layers)
    if config.get("num_kv_shared_layers"):
        shared = config.integer("num_kv_shared_layers")
        if shared >= layers:
            raise PlanError(f"{config.where}: 'num_kv_shared_layers' is {shared}, but there are only {layers} layers")
        kinds[layers - shared :] = [SHARED] * shared
    return kinds


def _listed_kinds(config: _Config, layers: int) -> list[str]:
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        count = f"{len(types)} entries" if isinstance(types, list) else repr(types)
        raise PlanError(f"{config.where}: 'layer_types' has {count}, but there are {layers} layers")
    for name in types:
        if name not in _LAYER_TYPES:
            raise UnsupportedModelError(f"{config.where}: the layer type {name!r} is not understood; {_BY_HAND}")
    return [_LAYER_TYPES[name] for name in types]


def _derived_kinds(config: _Config, layers: int) -> list[str]:
    """What the model classes of transformers do when a config has no layer_types."""
    for key in _OTHER_SPELLINGS:
        if config.get(key) is not None:
            raise UnsupportedModelError(f"{config.where}: layers given by {key!r} are not understood; {_BY_HAND}")

    def every(interval: int, other: str) -> list[str]:
        return [other if (index + 1) % interval else FULL for index in range(layers)]

    if config.get("full_attention_interval"):
        return every(config.integer("full_attention_interval"), LINEAR)
    if config.get("attention_chunk_size"):
        chunked = config.get("no_rope_layers")  # 1 where there is RoPE, and those layers are the chunked ones
        if isinstance(chunked, list) and len(chunked) == layers:
            return [SLIDING if rope else FULL for rope in chunked]
        return every(config.integer("no_rope_layer_interval"), SLIDING)
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return [FULL] * layers
    if config.get("_sliding_window_pattern", "sliding_window_pattern"):
        return every(config.integer("_sliding_window_pattern", "sliding_window_pattern"), SLIDING)
    first = config.integer("max_window_layers") if config.get("use_sliding_window") else 0
    return [SLIDING if index >= first else FULL for index in range(layers)]


def _layer(config: _Config, kind: str) -> LayerGroup:
    """One layer, from its own config."""
    if kind in (LINEAR, SHARED):
        return LayerGroup(kind, 1)
    window = config.integer("sliding_window", "attention_chunk_size") if kind == SLIDING else 0
    if config.get("kv_lora_rank"):  # MLA: the latent and the rotary part of the key, one head of each
        return LayerGroup(kind, 1, 1, config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim"), window)
    if config.get("head_dim", "kv_channels"):
        head_size = config.integer("head_dim", "kv_channels")
    else:
        heads, hidden = config.integer(*_HEADS), config.integer("hidden_size", "n_embd", "d_model")
        if hidden % heads:
            raise PlanError(f"{config.where}: no key 'head_dim', and {heads} heads do not divide {hidden}; {_BY_HAND}")
        head_size = hidden // heads
    head_size_v = config.integer("v_head_dim") if config.get("v_head_dim") else head_size
    return LayerGroup(kind, 1, _kv_heads(config), head_size, head_size_v, window)


def _kv_heads(config: _Config) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return config.integer("num_key_value_heads", "num_kv_heads", "multi_query_group_num", *_HEADS)


def _itemsize(config: _Config) -> tuple[int, tuple[str, ...]]:
    dtype = config.get("dtype", "torch_dtype")
    if dtype is None or dtype == "auto":
        return 2, ("the config states no dtype: 2 bytes per element are assumed where nothing is compressed",)
    name = str(dtype).removeprefix("torch.")
    if name not in _ITEMSIZE:
        raise PlanError(f"{config.where}: 'dtype' is {dtype!r}, not one of {', '.join(_ITEMSIZE)}")
    return _ITEMSIZE[name], ()
