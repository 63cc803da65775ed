"""Values of a JSON file, checked when they are taken: what is wrong is said with its place in the file."""

from __future__ import annotations

from typing import Any

from kvfold.eval.bootstrap import Interval

NAME, LINE = 80, 4000
"""Most characters of a name, and of a command line or a remark."""
HUGE, TINY = 1e30, 1e-30
"""Numbers that are further from 0 are refused, and those that are nearer are 0: no axis has them."""
MOST = 10**15
"""The largest whole number."""


class Damaged(ValueError):
    """A value is missing or makes no sense; the message has its place."""


class Entry:
    """A value of a JSON file and its place there, such as ``rows[2].kl_mean``."""

    def __init__(self, value: Any, place: str = "") -> None:
        self.value, self.place = value, place

    def __getitem__(self, key: str) -> Entry:
        place = f"{self.place}.{key}" if self.place else key
        if not isinstance(self.value, dict):
            raise self._wrong("is not an object")
        if key not in self.value:
            raise Damaged(f"{place} is missing")
        return Entry(self.value[key], place)

    def maybe(self, key: str) -> Entry | None:
        """The value of a key, None if it is null or missing."""
        if isinstance(self.value, dict) and self.value.get(key) is None:
            return None
        return self[key]

    def list(self) -> list[Entry]:
        if not isinstance(self.value, list):
            raise self._wrong("is not a list")
        return [Entry(value, f"{self.place}[{index}]") for index, value in enumerate(self.value)]

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not abs(self.value) <= HUGE:
            raise self._wrong("is not a number, or not one that can be shown")
        return float(self.value) if abs(self.value) >= TINY else 0.0

    def positive(self) -> float:
        if self.number() <= 0:
            raise self._wrong("is not above 0")
        return self.number()

    def whole(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not 0 <= self.value <= MOST:
            raise self._wrong("is not a whole number from 0")
        return self.value

    def count(self) -> int:
        """A whole number from 1."""
        if self.whole() < 1:
            raise self._wrong("is not a whole number from 1")
        return self.whole()

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self._wrong("is neither true nor false")
        return self.value

    def text(self, limit: int = NAME) -> str:
        """A line of printable characters; a longer one is cut."""
        if not isinstance(self.value, str):
            raise self._wrong("is not a text")
        return printable(self.value, limit)

    def interval(self) -> Interval:
        """A figure as ``fidelity`` and ``needle`` write it."""
        low, high = self.maybe("low"), self.maybe("high")
        if low is None or high is None:
            return Interval(self["value"].number(), None, None)
        return Interval(self["value"].number(), low.number(), high.number())

    def _wrong(self, what: str) -> Damaged:
        shown = printable(repr(self.value), 40)
        return Damaged(f"{self.place or 'the file'} {what}: {shown}")


def printable(text: str, limit: int) -> str:
    """A line without control characters and without halves of characters, neither of which a file can hold."""
    line = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
