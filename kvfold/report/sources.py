"""Which of the commands wrote a JSON file, and what every file says of itself.

:data:`KINDS` is the one place that knows; a kind's own module knows what is in it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvfold.commands import UsageError
from kvfold.report import fidelity, kernels, memory, needle, serving
from kvfold.report.document import Origin, Section
from kvfold.report.entries import LINE, Damaged, Entry, printable

MOST_BYTES = 64 << 20
"""Of a file: the commands write some 100 kB."""


@dataclass(frozen=True)
class Kind:
    """Files of one command.

    Attributes:
        keys: By which they are known: no other kind has all of them.
        read: Makes an object of a file's content, and raises :class:`Damaged` if that is wrong.
        sections: Makes sections of all such objects.
    """

    name: str
    keys: frozenset[str]
    read: Callable[[Entry, Origin], Any]
    sections: Callable[[Sequence[Any]], list[Section]]


KINDS = (
    Kind("fidelity", frozenset(("measured_windows", "baseline", "rows")), fidelity.read, fidelity.sections),
    Kind("needle", frozenset(("needles", "settings", "rows")), needle.read, needle.sections),
    Kind("storage", frozenset(("layers", "kept_bytes", "rows")), memory.read_storage, memory.sections),
    Kind("plan", frozenset(("layers", "memory_bytes", "rows")), memory.read_plan, memory.sections),
    Kind("bench", frozenset(("baselines", "copy_tb_per_second", "rows")), kernels.read, kernels.sections),
    Kind("vllm_engine", frozenset(("utilization", "caches")), serving.read, serving.sections),
)
"""In the order in which the report shows them."""

WITHOUT_FIGURES = {
    "kvfold compare": frozenset(("prompt_tokens", "chunk", "rows")),
    "kvfold formats": frozenset(("formats", "not_built")),
    "kvfold tune": frozenset(("frontier", "held_out", "chosen")),
    "benchmarks/prefill_limits.py": frozenset(("copy_bytes_per_second", "l2_bytes", "rounds", "rows")),
    "benchmarks/decode_limits.py": frozenset(("copy_bytes_per_second", "l2_bytes", "rows")),
    "benchmarks/decode_timeline.py": frozenset(("l2_bytes", "points", "rows")),
    "benchmarks/vllm_answers.py": frozenset(("modes", "settings")),
    "benchmarks/vllm_fidelity.py": frozenset(("engines", "difference")),
}
"""Files that are known too, and of which the report shows nothing."""


class Source(NamedTuple):
    """A file that was read: its kind, and what :attr:`Kind.read` made of it."""

    kind: Kind
    content: Any


class Skipped(NamedTuple):
    """A file of a folder that was not used, and why."""

    name: str
    reason: str


def gather(paths: Sequence[Path]) -> tuple[list[Source], list[Skipped]]:
    """Read files, and the JSON files of folders.

    Raises:
        UsageError: A file that was named is damaged or foreign, or none of the files has figures.
        OSError: A path cannot be read.
    """
    sources, skipped = [], []
    seen: set[Path] = set()
    for path in sorted(paths, key=Path.is_dir):  # a file that is named is never only one of a folder
        in_folder = path.is_dir()
        for file in sorted(path.glob("*.json")) if in_folder else [path]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                if in_folder and not file.is_file():  # a pipe would be waited for
                    raise Damaged("it is not a file that can be read")
                sources.append(read(file))
            except (Damaged, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                if in_folder:
                    skipped.append(Skipped(printable(file.name, LINE), str(reason)))
                elif isinstance(error, OSError):
                    raise
                else:
                    raise UsageError(f"{file}: {reason}") from None
    if not sources:
        where = " and ".join(str(path) for path in paths)
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped) or "there is no JSON file"
        raise UsageError(f"no figures in {where} ({why}): name files that --json of another command wrote")
    return sources, skipped


def read(path: Path) -> Source:
    """Read one file.

    Raises:
        Damaged: It is not JSON, no command wrote it, or a value in it is wrong; the message says which.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Damaged(f"it is larger than {MOST_BYTES >> 20} MiB")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not JSON ({printable(str(error), 100)})") from None
    return recognise(data, path.name)


def recognise(data: Any, name: str) -> Source:
    """Say whose file this is, and read it; raises :class:`Damaged` as :func:`read`."""
    keys = data.keys() if isinstance(data, dict) else set()
    for kind in KINDS:
        if kind.keys <= keys:
            entry = Entry(data)
            return Source(kind, kind.read(entry, origin(entry, name)))
    for command, known in WITHOUT_FIGURES.items():
        if known <= keys:
            raise Damaged(f"it is of `{command}`, of which the report shows nothing")
    *others, last = (kind.name for kind in KINDS)
    raise Damaged(f"it has not the keys of a JSON file of {', '.join(others)} or {last}")


def sections(sources: Sequence[Source]) -> list[Section]:
    """The sections of all files, kind by kind; kinds that make the same sections make them together, and sections that
    would have the same title have their files in it."""
    made: list[Section] = []
    for make in dict.fromkeys(kind.sections for kind in KINDS):
        contents = [source.content for source in sources if source.kind.sections is make]
        if contents:
            made += make(contents)
    titles = Counter(section.title for section in made)
    return [section if titles[section.title] == 1 else section.with_files() for section in made]


def origin(entry: Entry, name: str) -> Origin:
    """Where the figures of a file come from, as far as it says so."""
    environment = entry.maybe("environment") or Entry({})

    def fact(key: str) -> str | None:
        found = environment.maybe(key)
        return None if found is None else printable(str(found.value), LINE)

    command, date = entry.maybe("command"), entry.maybe("date")
    device = fact("gpu")
    if device is None and (machine := fact("machine")):
        threads = fact("threads")
        device = f"{machine} CPU" + (f", {threads} thread{'s' * (threads != '1')}" if threads else "")
    remarks = entry.maybe("remarks")
    return Origin(
        file=printable(name, LINE),
        command=None if command is None else command.text(LINE),
        date=None if date is None else re.sub(r"T(\d\d:\d\d):\d\d\+00:00$", r" \1 UTC", date.text()),
        commit=fact("commit"),
        device=device,
        versions=tuple(f"{tool} {found}" for tool in ("kvfold", "torch", "vllm") if (found := fact(tool))),
        remarks=() if remarks is None else tuple(remark.text(LINE) for remark in remarks.list()),
    )
