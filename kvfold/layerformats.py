"""What each layer of a model stores: a format for all layers and others for some, as one frozen value.

Its text form puts what differs behind the format of all others:

    <format>[@<layers>=<format> ...]
    layers = <n> | <n>-<m>, several with commas between; the first layer of the model is 0

so ``k3v3@0-1,29=k4v4@5=k8v8`` stores layers 0, 1 and 29 in ``k4v4``, layer 5 in ``k8v8`` and all others in ``k3v3``. A
format alone, in any spelling that :meth:`KVFormat.parse <kvfold.formats.KVFormat.parse>` understands, is that of all
layers. No character of it means anything to a shell inside a word, and none stands in the name of a format.

As JSON the same is ``{"base": "k3v3", "layers": {"0-1,29": "k4v4", "5": "k8v8"}}``.

Bytes and bits over all layers come from here, for planners and for live caches alike. Pure Python, no torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from kvfold.errors import FormatError
from kvfold.formats import KVFormat, check_heads
from kvfold.modelshape import MAX_LAYERS, LayerGroup

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_EXAMPLE = "k3v3@0-1,29=k4v4"


@dataclass(frozen=True)
class ModelFormat:
    """What the layers of a model store: hashable, and round-trips through :func:`str` and :meth:`parse`.

    Attributes:
        base: The format of every layer that has none of its own.
        overrides: Layers, from 0, with formats of their own. Sorted, and without those that have the base's, so that
            values that store the same are equal.

    Raises:
        FormatError: A layer is no whole number from 0, or has two formats.
    """

    base: KVFormat
    overrides: tuple[tuple[int, KVFormat], ...] = ()

    def __post_init__(self) -> None:
        own: dict[int, KVFormat] = {}
        for layer, fmt in self.overrides:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < MAX_LAYERS:
                raise FormatError(f"layer {layer!r} is not a whole number from 0 to {MAX_LAYERS - 1}")
            if own.setdefault(layer, fmt) != fmt:
                raise FormatError(f"layer {layer} has two formats, {own[layer]} and {fmt}: give it one")
        kept = tuple((layer, own[layer]) for layer in sorted(own) if own[layer] != self.base)
        object.__setattr__(self, "overrides", kept)

    @staticmethod
    def parse(spec: ModelFormatSpec) -> ModelFormat:
        """Understand a model's format however it is written: what :meth:`KVFormat.parse` takes, or the grammar above.

        Raises:
            FormatError: The spelling is unknown; the message says what is meant to stand there.
        """
        if isinstance(spec, ModelFormat):
            return spec
        if isinstance(spec, str):
            return _of_text(spec)
        if isinstance(spec, Mapping) and ("base" in spec or "layers" in spec):
            return _of_object(spec)
        return ModelFormat(KVFormat.parse(spec))

    @staticmethod
    def of_layers(formats: Mapping[int, KVFormat]) -> ModelFormat:
        """The shortest value in which each of these layers has its format: the base is the most frequent one, or the
        first of those.

        Raises:
            FormatError: No layer is given.
        """
        if not formats:
            raise FormatError("a model without layers has no format: give one layer or more")
        counts = Counter(formats[layer] for layer in sorted(formats))
        return ModelFormat(counts.most_common(1)[0][0], tuple(formats.items()))

    def __str__(self) -> str:
        return "@".join([str(self.base), *(f"{layers}={fmt}" for layers, fmt in self._clauses())])

    def json(self) -> dict[str, object]:
        """The JSON form, which :meth:`parse` reads back."""
        return {"base": str(self.base), "layers": dict(self._clauses())}

    def _clauses(self) -> list[tuple[str, str]]:
        """Each format that some layers have of their own, after those layers: in the order of the first of them."""
        of: dict[KVFormat, list[int]] = {}
        for layer, fmt in self.overrides:
            of.setdefault(fmt, []).append(layer)
        return [(spell_layers(layers), str(fmt)) for fmt, layers in of.items()]

    # --- what a layer stores ------------------------------------------------------------------------------------------

    def layer(self, index: int) -> KVFormat:
        """The format of the model's layer ``index``, from 0."""
        return self._own.get(index, self.base)

    @cached_property
    def _own(self) -> dict[int, KVFormat]:
        return dict(self.overrides)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same format."""
        return not self.overrides

    @property
    def formats(self) -> tuple[KVFormat, ...]:
        """The different formats, the base first."""
        return tuple(dict.fromkeys([self.base, *(fmt for _, fmt in self.overrides)]))

    def require_built(self) -> ModelFormat:
        """Return self, or raise :class:`~kvfold.errors.NotBuiltError` if something in a format is not built yet."""
        for fmt in self.formats:
            fmt.require_built()
        return self

    def require_layers(self, layers: int, compressed: Iterable[int] | None = None) -> ModelFormat:
        """Return self, or refuse formats for layers that store nothing in them.

        Args:
            layers: Layers of the model.
            compressed: Those that are compressed; None for all.

        Raises:
            FormatError: A layer is outside the model's range, or is not compressed.
        """
        outside = [layer for layer in self._own if layer >= layers]
        if outside:
            raise FormatError(
                f"format {str(self)!r}: the model has layers 0 to {layers - 1}, and no layer {spell_layers(outside)}"
            )
        held = range(layers) if compressed is None else sorted(compressed)
        idle = sorted(set(self._own) - set(held))
        if idle:
            raise FormatError(
                f"format {str(self)!r}: layers {spell_layers(idle)} are not compressed and store nothing in it; "
                f"compressed are {spell_layers(held) or 'none'}: name only these"
            )
        return self

    # --- bytes and bits over all layers -------------------------------------------------------------------------------

    def page_bytes(self, layers: Mapping[int, LayerGroup], page_size: int) -> int:
        """Bytes of a page of all KV heads of these layers, everything included but exact sinks and tails.

        Args:
            layers: By their index, each with its heads; see :attr:`ModelShape.compressed_layers
                <kvfold.modelshape.ModelShape.compressed_layers>`.
            page_size: Tokens in a page.

        Raises:
            NotBuiltError: A format needs something that is not built yet.
            FormatError: The heads of a layer are too small for its format.
        """
        total = 0
        for (fmt, group), count in self.kinds(layers).items():
            check_heads(fmt, group.head_size, group.head_size_v)
            total += count * group.num_kv_heads * fmt.page_bytes(page_size, group.head_size, group.head_size_v)
        return total

    def exact_bytes(self, layers: Mapping[int, LayerGroup], itemsize: int) -> int:
        """Bytes per sequence of the exact sinks and tails of these layers, ``itemsize`` bytes an element."""
        return sum(
            count * group.num_kv_heads * fmt.exact_bytes(group.head_size, group.head_size_v, itemsize)
            for (fmt, group), count in self.kinds(layers).items()
        )

    def bits_per_element(self, layers: Mapping[int, LayerGroup], page_size: int) -> float | None:
        """All-in bits per element of K and V in full pages, over all elements of these layers; None without any."""
        elements = elements_of(layers)
        return 8 * self.page_bytes(layers, page_size) / page_size / elements if elements else None

    def kinds(self, layers: Mapping[int, LayerGroup]) -> Counter[tuple[KVFormat, LayerGroup]]:
        """How many of these layers have which format and which heads, in the order in which they first appear."""
        return Counter((self.layer(index), group) for index, group in layers.items())


def elements_of(layers: Mapping[int, LayerGroup]) -> int:
    """Elements of K and V that a token has in these layers."""
    return sum(group.num_kv_heads * (group.head_size + group.head_size_v) for group in layers.values())


ModelFormatSpec = str | float | Mapping[str, object] | KVFormat | ModelFormat
"""A model's format in any spelling that :meth:`ModelFormat.parse` understands."""


# --- reading and writing ----------------------------------------------------------------------------------------------


def spell_layers(layers: Iterable[int]) -> str:
    """Numbers of layers, in rising order, as :func:`read_layers` reads them: ``0-1,29``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_layers(text: str, where: str) -> list[int]:
    """The layers that ``0-1,29`` names; ``where`` is what messages call the format that it stands in.

    Raises:
        FormatError: It is no list of layers.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise FormatError(f"format {where!r}: {part!r} is neither a layer nor a range of layers: 5, or 0-3,7")
        first, last = (int(number) for number in (match[1], match[2] or match[1]))
        if not first <= last < MAX_LAYERS:
            way_out = f"write {last}-{first}" if last < first else f"a model has {MAX_LAYERS} at most"
            raise FormatError(f"format {where!r}: there are no layers {part.strip()}; {way_out}")
        layers += range(first, last + 1)
    return layers


@lru_cache(maxsize=256)
def _of_text(text: str) -> ModelFormat:
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text  # for what reads formats of single layers to complain about
        return ModelFormat(KVFormat.parse(text)) if isinstance(value, str) else ModelFormat.parse(value)
    base, *clauses = text.split("@")
    overrides: list[tuple[int, KVFormat]] = []
    for clause in clauses:
        layers, equals, own = clause.partition("=")
        if not equals:
            raise FormatError(f"format {text!r}: behind @ come layers, = and their format, as in {_EXAMPLE}")
        overrides += [(layer, KVFormat.parse(own)) for layer in read_layers(layers, text)]
    return ModelFormat(KVFormat.parse(base), tuple(overrides))


def _of_object(spec: Mapping[str, object]) -> ModelFormat:
    unknown = sorted(set(spec) - {"base", "layers"})
    if unknown or "base" not in spec:
        reason = f"keys {unknown} do not go with base and layers" if unknown else "there is no base beside layers"
        raise FormatError(
            f'{reason} in format {dict(spec)!r}: write {{"base": "k3v3", "layers": {{"0-1,29": "k4v4"}}}}'
        )
    layers = spec.get("layers", {})
    if not isinstance(layers, Mapping):
        raise FormatError(f"layers is {layers!r} in format {dict(spec)!r}, not an object of layers and their formats")
    where = str(dict(spec))
    overrides = [(layer, KVFormat.parse(own)) for key, own in layers.items() for layer in read_layers(str(key), where)]
    return ModelFormat(KVFormat.parse(spec["base"]), tuple(overrides))  # type: ignore[arg-type]  # parse says what it is not
