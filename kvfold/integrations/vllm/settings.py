"""What a user of vLLM asked for: the format and the chunk rule, from the three places where they can be said."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvfold.errors import FormatError, KVFoldError, NotBuiltError
from kvfold.formats import KVFormat
from kvfold.integrations.vllm import DTYPES
from kvfold.layerformats import ModelFormat

CHUNK_RULES = ("exact", "packed")
_KEYS = ("format", "chunk", "k_quant", "v_quant", "bit_width", "use_qjl", "seed", "lite_mode", "outlier_channels",
         "outlier_fraction")  # fmt: skip


class EngineConfigError(KVFoldError, ValueError):
    """Options of vLLM that contradict each other or cannot be served, with the reason and the way out."""


@dataclass(frozen=True)
class Settings:
    """How a run stores its cache.

    Attributes:
        format: What K and V of each layer are stored as, at widths that the kernels serve.
        chunk: ``exact``: a prompt's chunk sees its own K and V as they came, and the packed tokens before it;
            ``packed``: it reads its own from the pages too.
        by_name: Whether the user chose the backend and not the dtype, so that layers arrive with dtype ``auto``.
    """

    format: ModelFormat
    chunk: str
    by_name: bool

    @staticmethod
    def of(config: Any) -> Settings | None:
        """What a ``VllmConfig`` asks for; None if its cache is not kvfold's.

        Raises:
            EngineConfigError: Options contradict each other.
            FormatError: The format is unknown, the kernels do not serve it, or it names layers that the model does not
                have. NotBuiltError: It is not built yet.
        """
        if config is None or config.cache_config is None:
            return None
        name = config.cache_config.cache_dtype
        drafts = getattr(config, "speculative_config", None)
        if drafts is not None and name not in DTYPES and name == getattr(drafts, "kv_cache_dtype", None):
            return None  # a draft model's own cache, with the options of the model that it drafts for
        asked = _asked(config.additional_config)
        by_name = name == "auto" and is_chosen(config.attention_config)
        if name not in DTYPES and not by_name:
            if asked:
                raise EngineConfigError(
                    f"--additional-config asks for kvfold's cache, but --kv-cache-dtype is {name!r} and no backend is "
                    "named: add --kv-cache-dtype turboquant, which takes the format from --additional-config"
                )
            return None
        if asked is not None and not asked:
            raise EngineConfigError(
                f'--additional-config says "turboquant": false and --kv-cache-dtype is {name!r}: drop one of them'
            )
        if by_name and config.cache_config.kv_cache_dtype_skip_layers:
            raise EngineConfigError(
                "--kv-cache-dtype-skip-layers needs a cache dtype to skip, and --attention-backend turboquant serves "
                "every layer: use --kv-cache-dtype turboquant instead of --attention-backend"
            )
        options = asked or {}
        fmt = ModelFormat.parse(DTYPES.get(name, "turboquant"))
        if (wanted := _format(options)) is not None:
            if name not in ("auto", "turboquant") and wanted != fmt:
                raise EngineConfigError(
                    f"--kv-cache-dtype is {name!r} and --additional-config says {str(wanted)!r}: use "
                    "--kv-cache-dtype turboquant, which takes the format from --additional-config, or drop that"
                )
            fmt = wanted
        chunk = options.get("chunk", "exact")
        if chunk not in CHUNK_RULES:
            raise EngineConfigError(f"chunk is {chunk!r} in --additional-config; it is one of {', '.join(CHUNK_RULES)}")
        for own in fmt.formats:
            _check_servable(own)
        _check_layers(fmt, config)
        return Settings(fmt, chunk, by_name)


def is_chosen(attention_config: Any) -> bool:
    """Whether the user named the backend in slot ``TURBOQUANT``."""
    chosen = [attention_config.backend, attention_config.backend_per_kind.get("full_attention")]
    return any(backend is not None and backend.name == "TURBOQUANT" for backend in chosen)


def _asked(additional: Any) -> dict[str, Any] | None:
    """The options under ``turboquant``: None if there are none, empty if they say no."""
    if not isinstance(additional, Mapping) or "turboquant" not in additional:
        return None
    value = additional["turboquant"]
    if value is False or value is None:
        return {}
    if value is True:  # vllm-metal's spelling: the widths stand beside it
        beside = {key: additional[key] for key in ("k_quant", "v_quant") if key in additional}
        return {"chunk": "exact", **beside}
    if isinstance(value, str):
        return {"format": value}
    if not isinstance(value, Mapping):
        raise EngineConfigError(
            f'"turboquant" is {value!r} in --additional-config; it is true, a format like "k3v3", or an object like '
            '{"format": "k4v4", "chunk": "packed"}'
        )
    for key in value:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(_KEYS)}"
            raise EngineConfigError(f'unknown key {key!r} under "turboquant" in --additional-config{hint}')
    return {"chunk": "exact", **value}


def _format(options: Mapping[str, Any]) -> ModelFormat | None:
    """The format that options name, in kvfold's words or in those of vllm-metal or vllm-omni; None if they do not."""
    if "format" in options:
        return ModelFormat.parse(options["format"])
    spec = {key: value for key, value in options.items() if key != "chunk"}
    if not spec:
        return None
    widths = [str(spec.get(key, "")).strip() for key in ("k_quant", "v_quant")]
    if any(width.isdigit() for width in widths):
        if not all(width.isdigit() for width in widths) or len(spec) > 2:
            raise EngineConfigError(
                f"k_quant and v_quant are both numbers of bits or both names of vllm-metal, not {spec!r}"
            )
        return ModelFormat.parse("k{}v{}".format(*widths))
    return ModelFormat.parse(spec)


def _check_layers(fmt: ModelFormat, config: Any) -> None:
    """Refuse formats of layers that do not exist or are not compressed, as far as the configuration tells."""
    text = getattr(config.model_config, "hf_text_config", None)
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int):
        fmt.require_layers(layers)
    skipped = {str(layer) for layer in config.cache_config.kv_cache_dtype_skip_layers or ()}
    if fmt.uniform or not skipped:
        return
    if both := [str(layer) for layer, _ in fmt.overrides if str(layer) in skipped]:
        raise EngineConfigError(
            f"format {str(fmt)!r} has formats for layers {', '.join(both)}, and --kv-cache-dtype-skip-layers leaves "
            "them uncompressed: drop one of them"
        )
    if "sliding_window" in skipped:
        raise EngineConfigError(
            f"format {str(fmt)!r}: beside layers with a window vLLM makes the blocks of all layers equal in bytes, and "
            "those of different formats are not: use one format for all layers"
        )


def _check_servable(fmt: KVFormat) -> None:
    """Refuse a format that the kernels cannot store or attend to."""
    try:
        fmt.require_built()
    except NotBuiltError as error:
        raise NotBuiltError(f'{error}. In vLLM write "k_quant" and "v_quant" as numbers of bits, 4 and 3') from None
    if fmt.sinks or fmt.tail:
        raise NotBuiltError(f"format {str(fmt)!r}: exact sinks and tail are not built for vLLM; leave them out")
    if fmt.mean:
        raise NotBuiltError(f"format {str(fmt)!r}: key references are not built for vLLM; leave +mean out")
    for name, side in (("K", fmt.k), ("V", fmt.v)):
        if side.family != "lloyd":
            raise FormatError(
                f"format {str(fmt)!r}: vLLM runs on the kernels for 1 to 8 bits, and {name} is {side.name}. Use k8v8 "
                "or fewer bits; vLLM has bf16 and fp8 caches of its own"
            )
