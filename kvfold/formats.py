"""What keys and values are stored as: one frozen value from which every byte count is derived.

A format has a side for K and a side for V. Its text form is the grammar

    k<side>v<side>[+option ...]
    side   = 1 | 2 | ... | 8 | 2.5 | 3.5, optionally followed by t (trellis), q (MSE + QJL) or a (affine per 32)
             | f8 (e4m3 with a scale per token) | f8cast (e4m3 without) | bf16 | f16 | f32
    option = [k|v] (unbiased | plain | nc | mse)      which scale is stored, default unbiased
             | [k|v] pre<odd number>                  candidates of the prescale search, default 3 (1 with plain)
             | mean | sinks<n> | tail<n>              key reference per page; exact first and last tokens

so ``k4v4``, ``k8v3+sinks4+tail128`` and ``kf8v4+vplain`` are formats. Other people's spellings are aliases of the
same values (:data:`ALIASES`, :data:`PRESETS`). A width that is well spelled but whose family is not built yet parses,
and is refused with :class:`~kvfold.errors.NotBuiltError` when somebody wants to store with it.

Pure Python, no torch: planners, engines and the command line import this module alone.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from kvfold.errors import FormatError, NotBuiltError

TILE = 16
"""Tokens in a tile, the smallest unit of layout: a page is one, two or four tiles, and every count of bytes per token
is exact because a tile holds nothing but its sixteen tokens."""

PAGE_SIZES = (16, 32, 64)
SCALE_RULES = ("unbiased", "plain", "nc", "mse")
MAX_PRESCALES = 13
MAX_HEAD_SIZE = 1024
SCALE_BYTES = 2  # bfloat16: any float32 K or V has a scale in range, and codes adapt to the rounded scale

# A code of b bits is cut into planes of 4, 2 and 1 bits (8 stays whole), lowest bits first, so that a plane's codes
# never straddle a byte and one byte of codes belongs to one token.
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_EXACT_BITS = {"bf16": 16, "f16": 16, "f32": 32}
_SUFFIX_FAMILY = {"": "lloyd", "t": "trellis", "q": "qjl", "a": "affine"}
_FAMILY_SUFFIX = {family: suffix for suffix, family in _SUFFIX_FAMILY.items()}
_NOT_BUILT = {
    "trellis": "trellis-coded quantisation",
    "qjl": "the MSE + QJL estimator",
    "affine": "affine groups",
    "outlier": "fractional widths",
}


@dataclass(frozen=True)
class Side:
    """What one of K and V is stored as.

    Attributes:
        family: ``lloyd``, ``fp8``, ``fp8cast``, ``exact``; or, not built yet, ``trellis``, ``qjl``, ``affine``,
            ``outlier``.
        bits: Bits of a code.
        dtype: For ``exact``: ``bf16``, ``f16`` or ``f32``.
        scale: Which scale is stored for a Lloyd–Max vector; ``none`` where the family stores none or its own.
        prescales: Candidates of the prescale search at encode time.
        group: Coordinates that share a scale; 0 is the whole head.
    """

    family: str
    bits: float
    dtype: str = ""
    scale: str = "none"
    prescales: int = 1
    group: int = 0

    @property
    def rotated(self) -> bool:
        """Whether vectors are rotated before they are quantised."""
        return self.family in ("lloyd", "trellis", "qjl", "outlier")

    @property
    def scaled(self) -> bool:
        """Whether a scale is stored beside the codes of a vector."""
        return self.family in ("lloyd", "fp8")

    @property
    def lossless(self) -> bool:
        return self.family == "exact"

    @property
    def missing(self) -> str | None:
        """Why nothing can be stored this way yet, or None."""
        if self.family in _NOT_BUILT:
            return f"{_NOT_BUILT[self.family]} (side {self.name!r}) is not built yet"
        if self.group:
            return f"scales per group of {self.group} coordinates are not built yet"
        return None

    @property
    def name(self) -> str:
        """The side's spelling inside a format."""
        if self.family == "exact":
            return self.dtype
        if self.family in ("fp8", "fp8cast"):
            return "f8" + self.family[3:]
        return f"{self.bits:g}{_FAMILY_SUFFIX.get(self.family, '')}"

    def planes(self) -> tuple[int, ...]:
        """Widths in bits of the planes that a code is cut into, lowest bits first."""
        if self.missing:
            raise NotBuiltError(f"{self.missing}; built are widths 1 to 8, f8, f8cast, bf16, f16 and f32")
        return (int(self.bits),) if self.bits > 8 else _PLANES[int(self.bits)]

    def plane_bytes(self, head_size: int) -> tuple[int, ...]:
        """Bytes of one token's row in each plane: whole 32-bit words."""
        return tuple(4 * -(-head_size * width // 32) for width in self.planes())

    def bytes_per_token(self, head_size: int) -> int:
        """Bytes of one vector of ``head_size`` coordinates: codes, padding to words and scale."""
        return sum(self.plane_bytes(head_size)) + (SCALE_BYTES if self.scaled else 0)


@dataclass(frozen=True)
class KVFormat:
    """What K and V are stored as: frozen, hashable, and round-trips through :func:`str` and :func:`KVFormat.parse`.

    Attributes:
        k: The side of the keys.
        v: The side of the values.
        mean: A key reference vector per page is subtracted before quantising (not built yet).
        sinks: First tokens of a sequence that are also kept exact.
        tail: Last tokens of a sequence that are also kept exact.
    """

    k: Side
    v: Side
    mean: bool = False
    sinks: int = 0
    tail: int = 0

    @staticmethod
    def parse(spec: str | float | Mapping[str, object] | KVFormat) -> KVFormat:
        """Understand a format however it is written: a name, a number of bits, a JSON object or a format.

        Raises:
            FormatError: The spelling is unknown; the message proposes the nearest known ones.
        """
        return _parse(spec)

    def __str__(self) -> str:
        preset = _preset_name(self)
        return preset if preset is not None else _spell(self)

    def require_built(self) -> KVFormat:
        """Return self, or raise :class:`NotBuiltError` if something in the format is not built yet."""
        reasons = [side.missing for side in (self.k, self.v) if side.missing]
        if self.mean:
            reasons.append("a key reference vector per page (mean) is not built yet")
        if reasons:
            raise NotBuiltError(
                f"format {str(self)!r}: {'; '.join(dict.fromkeys(reasons))}. Built today: {built_help()}"
            )
        return self

    @property
    def lossless(self) -> bool:
        return self.k.lossless and self.v.lossless

    def bytes_per_token(self, head_size: int, head_size_v: int | None = None) -> int:
        """Bytes in the pages for one token of one KV head, everything included but the exact sinks and tail."""
        self.require_built()
        size_v = check_head_size(head_size if head_size_v is None else head_size_v)
        return self.k.bytes_per_token(check_head_size(head_size)) + self.v.bytes_per_token(size_v)

    def bits_per_element(self, head_size: int, head_size_v: int | None = None) -> float:
        """All-in bits per element of K and V in the pages."""
        elements = head_size + (head_size_v or head_size)
        return 8 * self.bytes_per_token(head_size, head_size_v) / elements

    def exact_bytes(self, head_size: int, head_size_v: int | None = None, itemsize: int = 2) -> int:
        """Bytes per sequence and KV head of the exact sinks and tail, kept beside the pages in the model's dtype."""
        return (self.sinks + self.tail) * (head_size + (head_size_v or head_size)) * itemsize


def check_page_size(page_size: int) -> int:
    """Return ``page_size``, or raise :class:`FormatError` naming the sizes that exist."""
    if not isinstance(page_size, int) or page_size not in PAGE_SIZES:
        raise FormatError(f"page_size {page_size!r} is not one of {', '.join(map(str, PAGE_SIZES))} tokens")
    return page_size


def check_head_size(head_size: int) -> int:
    """Return ``head_size``, or raise :class:`FormatError` naming the range."""
    if not isinstance(head_size, int) or not 1 <= head_size <= MAX_HEAD_SIZE:
        raise FormatError(f"head size {head_size!r} is not an integer from 1 to {MAX_HEAD_SIZE}")
    return head_size


def built_help() -> str:
    """One line that names what can be stored today, for error messages and help texts."""
    return "k<b>v<b> with b from 1 to 8, f8, f8cast, bf16, f16 or f32 (k4v4, k8v4, kf8v3), +sinks<n>, +tail<n>"


# --- spelling ---------------------------------------------------------------------------------------------------------

_SIDE = r"[1-8](?:\.5)?[tqa]?|f8cast|f8|bf16|f16|f32"
_FORMAT = re.compile(rf"k({_SIDE})v({_SIDE})")
_RULE_OPTION = re.compile(r"(k|v)?(unbiased|plain|nc|mse)")
_PRE_OPTION = re.compile(r"(k|v)?pre(\d+)")
_COUNT_OPTION = re.compile(r"(sinks|tail)(\d+)")


def _side(text: str) -> Side:
    if text in _EXACT_BITS:
        return Side("exact", _EXACT_BITS[text], dtype=text)
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
}
"""Short names. ``turboquant`` is the default format; ``exact`` loses nothing of float32, bfloat16 or float16."""


def _preset_name(fmt: KVFormat) -> str | None:
    for name, preset in PRESETS.items():
        if fmt == preset and _spells_otherwise(fmt):
            return name
    return None


def _spells_otherwise(fmt: KVFormat) -> bool:
    try:
        return _parse_grammar(_spell(fmt)) != fmt
    except FormatError:
        return True


def _spell(fmt: KVFormat) -> str:
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
        if rule := _RULE_OPTION.fullmatch(option):
            rules |= dict.fromkeys(rule[1] or "kv", rule[2])
        elif pre := _PRE_OPTION.fullmatch(option):
            counts |= dict.fromkeys(pre[1] or "kv", _check_prescales(int(pre[2])))
        elif count := _COUNT_OPTION.fullmatch(option):
            extra[count[1]] = int(count[2])
        elif option == "mean":
            extra["mean"] = True
        else:
            known = ["unbiased", "plain", "nc", "mse", "pre3", "mean", "sinks4", "tail128"]
            raise FormatError(f"unknown option {option!r} in format {text!r}{_did_you_mean(option, known)}")
    for letter, side in sides.items():
        if side.scale == "none":
            continue
        rule_name = rules.get(letter, "unbiased")
        sides[letter] = replace(side, scale=rule_name, prescales=counts.get(letter, _default_prescales(rule_name)))
    if (rules or counts) and all(sides[letter].scale == "none" for letter in {*rules, *counts}):
        raise FormatError(f"format {text!r}: a scale rule or prescale search has no meaning for {head!r}")
    return KVFormat(sides["k"], sides["v"], **extra)  # type: ignore[arg-type]


def _check_prescales(count: int) -> int:
    if count % 2 == 0 or not 1 <= count <= MAX_PRESCALES:
        raise FormatError(
            f"pre{count}: the prescale search takes an odd number of candidates from 1 to {MAX_PRESCALES}"
        )
    return count


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


@lru_cache(maxsize=1024)
def _parse_text(raw: str) -> KVFormat:
    text = raw.strip().lower()
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


_JSON_KEYS = (
    "k",
    "v",
    "scale",
    "prescales",
    "mean",
    "sinks",
    "tail",
    "bit_width",
    "use_qjl",
    "k_quant",
    "v_quant",
    "turboquant",
)


def _parse_object(spec: Mapping[str, object]) -> KVFormat:
    for key in spec:
        if key not in _JSON_KEYS:
            raise FormatError(
                f"unknown key {key!r} in format {dict(spec)!r}{_did_you_mean(str(key), list(_JSON_KEYS))}"
            )
    for own in ({"k_quant", "v_quant", "turboquant"}, {"bit_width", "use_qjl"}):
        if own & set(spec) - {"turboquant"} and (foreign := set(spec) - own):
            raise FormatError(f"keys {sorted(foreign)} do not go with {sorted(own & set(spec))}")
    if "k_quant" in spec or "v_quant" in spec:
        return _parse_text(f"metal:{spec.get('k_quant', 'q8_0')}/{spec.get('v_quant', 'q3_0')}")
    if "bit_width" in spec:
        suffix = "q" if spec.get("use_qjl") else ""
        try:
            bits = float(str(spec["bit_width"]))
        except ValueError:
            raise FormatError(f"bit_width {spec['bit_width']!r} is not a number") from None
        return _parse_text(f"{bits:g}{suffix}")
    options = [str(spec["scale"])] if "scale" in spec else []
    options += [f"pre{spec['prescales']}"] if "prescales" in spec else []
    options += ["mean"] if spec.get("mean") else []
    options += [f"{name}{spec[name]}" for name in ("sinks", "tail") if spec.get(name)]
    return _parse_text("+".join([f"k{spec.get('k', 4)}v{spec.get('v', 4)}", *options]))


def _parse(spec: str | float | Mapping[str, object] | KVFormat) -> KVFormat:
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
    raise FormatError(f"a format is a name, a number of bits, an object or a KVFormat, not {type(spec).__name__}")
