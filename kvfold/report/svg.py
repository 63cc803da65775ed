"""A figure as SVG for the middle of a page: no outside names, no ids that another figure has, colours that can change.

Colours of :data:`kvfold.report.drawing.SHADES` become CSS variables, so that the page chooses their shade.
"""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from kvfold.report.drawing import SHADES

_COLOR = re.compile("|".join(SHADES))
_FAMILY = re.compile(r"font-family:[^;]*;? ?")
_FAMILY_AT_END = re.compile(r"(?<=px )'DejaVu Sans'[^;]*")  # of `font:`, as older versions of matplotlib write it
_REFERENCE = re.compile(r"(?<=url\(#)[^)]+|^#.+")
_NOT_SHOWN = {"metadata", "style"}


def variable(color: str) -> str:
    """The CSS variable of a colour."""
    return f"--c{list(SHADES).index(color)}"


def inline(figure: Any, name: str, title: str) -> str:
    """An ``<svg>`` element. ``name`` is the figure's own, and begins its ids."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(written.getvalue())
    used = {
        found.lstrip("#")
        for element in root.iter()
        for value in element.attrib.values()
        for found in _REFERENCE.findall(value)
    }
    made = _copy(root, name, used)
    for attribute in ("width", "height", "version"):
        made.attrib.pop(attribute, None)
    made.attrib |= {"role": "img", "aria-label": title}
    return ElementTree.tostring(made, encoding="unicode")


def _copy(element: ElementTree.Element, name: str, used: set[str]) -> ElementTree.Element:
    """The element and all in it, without namespaces."""
    attributes = {}
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in used:
                attributes[key] = f"{name}-{value}"
            continue
        if key == "style":
            value = _FAMILY_AT_END.sub("var(--font)", _FAMILY.sub("", value))
        value = _REFERENCE.sub(lambda found: f"{'#' * found[0].startswith('#')}{name}-{found[0].lstrip('#')}", value)
        attributes[key] = _COLOR.sub(lambda found: f"var({variable(found[0])})", value)
    made = ElementTree.Element(element.tag.rpartition("}")[2], attributes)
    made.text = element.text if (element.text or "").strip() else None
    for child in element:
        if child.tag.rpartition("}")[2] not in _NOT_SHOWN:
            made.append(_copy(child, name, used))
    return made
