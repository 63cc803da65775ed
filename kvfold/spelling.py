"""How formats are written: the grammar of :mod:`kvfold.formats`, other people's names, and JSON objects.

:func:`parse` and :func:`spell` are inverse: ``parse(spell(f)) == f`` for every format that can be written.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from kvfold.errors import FormatError, NotBuiltError
from kvfold.formats import EXACT_BITS, KVFormat, Side, built_help

_SUFFIX_FAMILY = {"": "lloyd", "t": "trellis", "q": "qjl", "a": "affine"}

_SIDE = r"[1-8](?:\.5)?[tqa]?|f8cast|f8|bf16|f16|f32"
_FORMAT = re.compile(rf"k({_SIDE})v({_SIDE})")
_RULE_OPTION = re.compile(r"(k|v)?(unbiased|plain|nc|mse)")
_PRE_OPTION = re.compile(r"(k|v)?pre(\d+)")
_COUNT_OPTION = re.compile(r"(sinks|tail)(\d+)")


def _side(text: str) -> Side:
    if text in EXACT_BITS:
        return Side("exact", EXACT_BITS[text], dtype=text)
    if text in ("f8", "f8cast"):
        return Side("fp8" + text[2:], 8)
    suffix = text[-1] if text[-1] in "tqa" else ""
    bits = float(text.removesuffix(suffix))
    family = _SUFFIX_FAMILY[suffix]
    if bits != int(bits):
        if bits not in (2.5, 3.5) or suffix:
            raise FormatError(f"width {text!r} does not exist: the fractional widths are 2.5 and 3.5, without a suffix")
        family = "outlier"
    if family == "trellis" and bits not in (2, 3, 4):
        raise FormatError(f"width {text!r} does not exist: trellis widths are 2t, 3t and 4t")
    if family in ("trellis", "lloyd", "outlier", "qjl"):
        return Side(family, bits, scale="unbiased", prescales=3)
    return Side(family, bits, group=32)


def _exotic(family: str, bits: float, group: int = 0, scale: str = "none") -> Side:
    return Side(family, bits, group=group, scale=scale)


def _presets() -> dict[str, KVFormat]:
    """Formats of other systems whose sides our own grammar cannot spell (facts: docs/formats.md)."""
    presets = {}
    for name, k_bits, v_bits in (("4bit_nc", 4, 4), ("k3v4_nc", 3, 4), ("3bit_nc", 3, 3)):
        presets[f"vllm:{name}"] = KVFormat(Side("lloyd", k_bits, scale="nc"), _exotic("affine", v_bits))
    presets["vllm:k8v4"] = KVFormat(_side("f8cast"), _exotic("affine", 4))
    keys = {"q8_0": 8, "q5_0": 5, "q4_0": 4, "uint2": 2}
    values = {"q2_0": 2, "q3_0": 3, "q4_0": 4, "q5_0": 5, "q8_0": 8}
    for k_name, k_bits in keys.items():
        for v_name, v_bits in values.items():
            side = Side("lloyd", v_bits, scale="plain", group=32)
            presets[f"metal:{k_name}/{v_name}"] = KVFormat(_exotic("affine", k_bits, group=32), side)
    presets["lmdeploy:42"] = KVFormat(Side("qjl", 4, scale="plain"), Side("lloyd", 2, scale="plain"))
    return presets


PRESETS: dict[str, KVFormat] = _presets()
"""Formats of other systems, by the name under which they can be run, measured and compared with ours."""

ALIASES = {
    "turboquant": "k4v4",
    "fp8": "kf8vf8",
    "fp8_cast": "kf8castvf8cast",
    "fp8_e4m3": "kf8castvf8cast",
    "bf16": "kbf16vbf16",
    "fp16": "kf16vf16",
    "fp32": "kf32vf32",
    "exact": "kf32vf32",
    "metal:q8_0": "metal:q8_0/q3_0",
    "turboquant_k8v4": "vllm:k8v4",
    "turboquant_4bit_nc": "vllm:4bit_nc",
    "turboquant_k3v4_nc": "vllm:k3v4_nc",
    "turboquant_3bit_nc": "vllm:3bit_nc",
}
"""Short names. ``turboquant`` is the default format; ``exact`` loses nothing of float32, bfloat16 or float16."""


def spell(fmt: KVFormat) -> str:
    """The shortest text that :func:`parse` turns into this format."""
    preset = _preset_name(fmt)
    return _spell_grammar(fmt) if preset is None else preset


def _preset_name(fmt: KVFormat) -> str | None:
    for name, preset in PRESETS.items():
        if fmt == preset and _spells_otherwise(fmt):
            return name
    return None


def _spells_otherwise(fmt: KVFormat) -> bool:
    try:
        return _parse_grammar(_spell_grammar(fmt)) != fmt
    except FormatError:
        return True


def _spell_grammar(fmt: KVFormat) -> str:
    options: list[str] = []
    tuned = [(letter, side) for letter, side in (("k", fmt.k), ("v", fmt.v)) if side.scale != "none"]
    rules = {side.scale for _, side in tuned}
    counts = {side.prescales for _, side in tuned}
    for letter, side in tuned:
        prefix = letter if len(rules) > 1 else ""
        if side.scale != "unbiased":
            options.append(prefix + side.scale)
    for letter, side in tuned:
        prefix = letter if len(counts) > 1 or len(rules) > 1 else ""
        if side.prescales != _default_prescales(side.scale):
            options.append(f"{prefix}pre{side.prescales}")
    options += ["mean"] * fmt.mean
    options += [f"{name}{count}" for name, count in (("sinks", fmt.sinks), ("tail", fmt.tail)) if count]
    return "+".join([f"k{fmt.k.name}v{fmt.v.name}", *dict.fromkeys(options)])


def _set_once(known: dict[str, Any], key: str, value: Any, text: str) -> None:
    if known.setdefault(key, value) != value:
        raise FormatError(f"format {text!r} says both {known[key]!r} and {value!r}")


def _default_prescales(rule: str) -> int:
    return 1 if rule == "plain" else 3


def _parse_grammar(text: str) -> KVFormat:
    head, *options = text.split("+")
    match = _FORMAT.fullmatch(head)
    if not match:
        raise _unknown(text)
    sides = {"k": _side(match[1]), "v": _side(match[2])}
    extra: dict[str, bool | int] = {}
    rules: dict[str, str] = {}
    counts: dict[str, int] = {}
    for option in options:
        if options.count(option) > 1:
            raise FormatError(f"format {text!r} has {option!r} twice")
        if rule := _RULE_OPTION.fullmatch(option):
            _set_once(rules, rule[1] or "kv", rule[2], text)
        elif pre := _PRE_OPTION.fullmatch(option):
            _set_once(counts, pre[1] or "kv", int(pre[2]), text)
        elif count := _COUNT_OPTION.fullmatch(option):
            _set_once(extra, count[1], int(count[2]), text)
        elif option == "mean":
            extra["mean"] = True
        else:
            known = ["unbiased", "plain", "nc", "mse", "pre3", "mean", "sinks4", "tail128"]
            raise FormatError(f"unknown option {option!r} in format {text!r}{_did_you_mean(option, known)}")
    for letter, side in sides.items():
        if side.scale == "none":
            continue
        rule_name = rules.get(letter, rules.get("kv", "unbiased"))
        candidates = counts.get(letter, counts.get("kv", _default_prescales(rule_name)))
        sides[letter] = replace(side, scale=rule_name, prescales=candidates)
    named = {letter for key in (*rules, *counts) for letter in key}
    if named and all(sides[letter].scale == "none" for letter in named):
        raise FormatError(f"format {text!r}: a scale rule or prescale search has no meaning for {head!r}")
    return KVFormat(sides["k"], sides["v"], **extra)  # type: ignore[arg-type]


def known_names() -> list[str]:
    """Names worth proposing to somebody who misspelled one."""
    widths = [f"k{b}v{b}" for b in range(1, 9)] + [
        "k8v4",
        "k4v2",
        "k4v3",
        "k3v2",
        "kf8vf8",
        "kf8v4",
        "k3tv3t",
        "k4tv4t",
    ]
    return [*ALIASES, *PRESETS, *widths]


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def _unknown(text: str) -> FormatError:
    hint = _did_you_mean(text.split("+")[0], known_names()) or f"; formats look like {built_help()}"
    return FormatError(f"unknown format {text!r}{hint}")


def _names_layers(spec: object) -> FormatError:
    return FormatError(
        f"{spec!r} has formats of single layers, and this takes one format for all: write a format like k4v4. Formats "
        "of single layers go where the cache of a whole model is made or planned: kvfold.KVCache, kvfold plan, "
        "generate, compare, fidelity, needle, storage, and vLLM's --additional-config"
    )


@lru_cache(maxsize=1024)
def _parse_text(raw: str) -> KVFormat:
    text = raw.strip().lower()
    if "@" in text:
        raise _names_layers(raw)
    for prefix in ("kvfold_", "kvfold:"):
        text = text.removeprefix(prefix)
    head, plus, options = text.partition("+")
    head = ALIASES.get(head, head)
    if head in PRESETS:
        if plus:
            raise FormatError(f"format {raw!r}: {head!r} is another system's format and takes no options")
        return PRESETS[head]
    if re.fullmatch(r"[1-8](\.[05])?[tqa]?", head):
        head = re.sub(r"\.0", "", head)
        head = f"k{head}v{head}"
    return _parse_grammar(head + plus + options)


_OWN_KEYS = ("k", "v", "scale", "prescales", "mean", "sinks", "tail")
_METAL_KEYS = ("turboquant", "k_quant", "v_quant")
_OMNI_KEYS = ("bit_width", "use_qjl", "seed", "lite_mode", "outlier_channels", "outlier_fraction")
_METAL_TYPES = {"int8": "q8_0", "uint8": "q8_0", "int4": "q4_0", "uint4": "q4_0", "int2": "uint2"}
_ONLY = {"seed": (42, "one fixed rotation"), "lite_mode": (False, "the rotation is not optional")}
_ONLY |= dict.fromkeys(("outlier_channels", "outlier_fraction"), (0, "outlier channels are not built yet"))


def _parse_object(spec: Mapping[str, object]) -> KVFormat:
    """A JSON object: our own keys, or those of vllm-omni and vLLM #38280, or those of vllm-metal; not mixed."""
    known = (*_OWN_KEYS, *_METAL_KEYS, *_OMNI_KEYS)
    if "base" in spec or "layers" in spec:
        raise _names_layers(dict(spec))
    for key in spec:
        if key not in known:
            raise FormatError(f"unknown key {key!r} in format {dict(spec)!r}{_did_you_mean(str(key), list(known))}")
    for family in (_METAL_KEYS, _OMNI_KEYS):
        used = [key for key in family if key in spec]
        if used and (foreign := sorted(set(spec) - set(family))):
            raise FormatError(f"keys {foreign} do not go with {used} in format {dict(spec)!r}")
        if used:
            return _parse_metal(spec) if family is _METAL_KEYS else _parse_omni(spec)
    for key, kind in (("mean", bool), ("sinks", int), ("tail", int), ("prescales", int), ("scale", str)):
        if key in spec and (not isinstance(spec[key], kind) or (kind is int and isinstance(spec[key], bool))):
            raise FormatError(f"{key} is {spec[key]!r} in format {dict(spec)!r}, not {kind.__name__}")
    options = [str(spec["scale"])] if "scale" in spec else []
    options += [f"pre{spec['prescales']}"] if "prescales" in spec else []
    options += ["mean"] if spec.get("mean") else []
    options += [f"{name}{spec[name]}" for name in ("sinks", "tail") if spec.get(name)]
    return _parse_text("+".join([f"k{spec.get('k', 4)}v{spec.get('v', 4)}", *options]))


def _parse_metal(spec: Mapping[str, object]) -> KVFormat:
    if spec.get("turboquant", True) is not True:
        raise FormatError(f"format {dict(spec)!r} says that the cache is not compressed: leave the format out")
    if "k_quant" not in spec and "v_quant" not in spec:
        return _parse_text("turboquant")
    sides = (str(spec.get("k_quant", "q8_0")), str(spec.get("v_quant", "q3_0")))
    return _parse_text("metal:" + "/".join(_METAL_TYPES.get(side, side) for side in sides))


def _parse_omni(spec: Mapping[str, object]) -> KVFormat:
    for key, (only, reason) in _ONLY.items():
        if key in spec and spec[key] != only:
            raise NotBuiltError(f"{key} is {spec[key]!r} in format {dict(spec)!r}: {reason}; leave it out")
    try:
        bits = float(str(spec.get("bit_width", 4)))
    except ValueError:
        raise FormatError(f"bit_width {spec['bit_width']!r} is not a number") from None
    return _parse_text(f"{bits:g}{'q' if spec.get('use_qjl') else ''}")


def parse(spec: str | float | Mapping[str, object] | KVFormat) -> KVFormat:
    if isinstance(spec, KVFormat):
        return spec
    if isinstance(spec, bool):
        raise FormatError(f"a format is a name, a number of bits, an object or a KVFormat, not {spec!r}")
    if isinstance(spec, (int, float)):
        return _parse_text(f"{spec:g}")
    if isinstance(spec, Mapping):
        return _parse_object(spec)
    if isinstance(spec, str):
        if spec.lstrip().startswith("{"):
            try:
                value = json.loads(spec)
            except json.JSONDecodeError as error:
                raise FormatError(f"format {spec!r} begins like JSON but is not: {error}") from None
            return _parse_object(value)
        return _parse_text(spec)
    if type(spec).__name__ == "ModelFormat":  # whose module imports this one
        raise _names_layers(str(spec))
    raise FormatError(f"a format is a name, a number of bits, an object or a KVFormat, not {type(spec).__name__}")
