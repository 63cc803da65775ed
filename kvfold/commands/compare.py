"""Answer one long prompt twice, on transformers' own cache and on a compressed one: text, speed and bytes.

Greedy. The bytes are read off the live buffers and must equal the planner's figure; if not, the exit code is 1. The
prompt is the beginning of Moby Dick and a task about it, or --prompt-file. Speed is that of this machine, now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvfold.commands import UsageError, table
from kvfold.commands.measure import (
    ORDINARY,
    Answer,
    Clock,
    Subject,
    add_model_arguments,
    answer,
    environment,
    load_subject,
    quiet_transformers,
    read_prompt,
    say,
)
from kvfold.layerformats import ModelFormat
from kvfold.planner import ModelShape, compressed_bytes

EPILOG = """\
JSON (--json): model, dtype, environment, chunk, page_size, prompt_tokens, max_new_tokens, rows [{format, cache, text,
new_tokens, prefill_seconds, tokens_per_second, bytes_per_token, bytes, compressed_bytes, capacity, planned_bytes,
planned_equal, ratio, ratio_16bit, same_tokens}]. The first row is the ordinary cache, format none; its planned_bytes,
planned_equal and same_tokens are null. planned_bytes is the planner's figure for compressed_bytes. ratio is the
ordinary cache's bytes over these, ratio_16bit the same if the ordinary cache held 16-bit numbers; same_tokens counts
the tokens before the first that differs.

example: kvfold compare --format k4v4 k3v3 --max-new-tokens 64
"""

TEXT = Path(__file__).parents[2] / "examples" / "data" / "moby_dick_excerpt.txt"
TASK = "Summarise this text in a few sentences."
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Row:
    """One cache's figures; see :data:`EPILOG`."""

    format: str
    given: Answer
    planned_bytes: int | None
    ratio: float
    ratio_16bit: float
    same_tokens: int | None

    @property
    def planned_equal(self) -> bool | None:
        return None if self.planned_bytes is None else self.planned_bytes == self.given.compressed_bytes

    def json(self) -> dict[str, object]:
        given = asdict(self.given)
        new_tokens = len(given.pop("tokens"))
        del given["prompt_tokens"]
        planned = {"planned_bytes": self.planned_bytes, "planned_equal": self.planned_equal}
        against = {"ratio": self.ratio, "ratio_16bit": self.ratio_16bit, "same_tokens": self.same_tokens}
        return {"format": self.format, "new_tokens": new_tokens, **given, **planned, **against}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", nargs="+", action="extend", metavar="F", help="one format or several (k4v4)")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with another prompt")
    add_model_arguments(parser, max_new_tokens=96)


def run(args: argparse.Namespace) -> int:
    formats = list(dict.fromkeys(ModelFormat.parse(spec).require_built() for spec in args.format or ["k4v4"]))
    prompt = _prompt(args.prompt_file)
    with quiet_transformers():
        subject = load_subject(args.model)
        rows = _measure(args, subject, formats, prompt)
    print(_json(args, subject, rows) if args.json else _text(subject, rows))
    wrong = [row.format for row in rows if row.planned_equal is False]
    if wrong:
        sys.stdout.flush()
        say(f"kvfold: error: {', '.join(wrong)}: live bytes and planned bytes differ, which is a bug: please report it")
    return 1 if wrong else 0


def _prompt(path: Path | None) -> str:
    if path is not None:
        return read_prompt(path)
    if not TEXT.exists():
        raise UsageError("the excerpt of Moby Dick is in the repository, not in the package: give --prompt-file FILE")
    return f"{read_prompt(TEXT)}\n{TASK}"


def _measure(args: argparse.Namespace, subject: Subject, formats: list[ModelFormat], prompt: str) -> list[Row]:
    inputs = subject.encode(prompt, chat=not args.no_chat_template)
    config = subject.model.config.get_text_config(decoder=True).to_dict()
    shape = replace(ModelShape.from_config(config), itemsize=subject.model.dtype.itemsize)
    caches: list[ModelFormat | None] = [None, *formats]

    say("warming up: the first tokens compile the CPU kernels, which takes a while and is not measured")
    short = {name: tensor[:, : args.page_size] for name, tensor in inputs.items()}
    for fmt in caches:
        answer(subject, short, subject.new_cache(fmt, args.page_size, args.chunk), Clock(), WARM_UP_TOKENS)

    rows: list[Row] = []
    for fmt in caches:
        name = ORDINARY if fmt is None else str(fmt)
        cache = subject.new_cache(fmt, args.page_size, args.chunk)
        say(f"{_title(name, subject)}: prefill of {inputs['input_ids'].shape[1]:,} tokens")
        clock = Clock(tick=_counter(args.max_new_tokens))
        given = answer(subject, inputs, cache, clock, args.max_new_tokens)
        if sys.stderr.isatty() and len(given.tokens) < args.max_new_tokens:
            say("")  # the counter's line is still open
        planned = None
        if fmt is not None:
            # the planner counts a window whole; live windows are those of transformers and not compressed
            planned = compressed_bytes(shape, fmt, given.capacity, args.page_size)
        ordinary = rows[0].given if rows else given
        ratio = ordinary.bytes / given.bytes
        same = None if fmt is None else same_tokens(ordinary.tokens, given.tokens)
        rows.append(Row(name, given, planned, ratio, ratio * 2 / shape.itemsize, same))
    return rows


def same_tokens(one: list[int], other: list[int]) -> int:
    """How many tokens two texts share before the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _title(name: str, subject: Subject) -> str:
    return f"DynamicCache, {subject.dtype}" if name == ORDINARY else f"KVCache, {name}"


def _counter(total: int) -> Callable[[int], None]:
    """Shows how many tokens have come: a line that counts on a terminal, a line now and then elsewhere."""
    live = sys.stderr.isatty()

    def tick(count: int) -> None:
        if live:
            end = "\n" if count == total else ""
            print(f"\r  {count} of {total} tokens", end=end, file=sys.stderr, flush=True)
        elif count in (1, total) or count % 32 == 0:
            say(f"  {count} of {total} tokens")

    return tick


def _text(subject: Subject, rows: list[Row]) -> str:
    lines = []
    for row in rows:
        lines += [f"--- {_title(row.format, subject)}", row.given.text.strip(), ""]
    header = ["cache", "prefill s", "tokens/s", "bytes/token", "bytes", "planned", "equal", "smaller", "same tokens"]
    cells = [
        [
            _title(row.format, subject),
            f"{row.given.prefill_seconds:.2f}",
            "-" if row.given.tokens_per_second is None else f"{row.given.tokens_per_second:.1f}",
            f"{row.given.bytes_per_token:,.0f}",
            f"{row.given.bytes:,}",
            "-" if row.planned_bytes is None else f"{row.planned_bytes:,}",
            {None: "-", True: "yes", False: "NO"}[row.planned_equal],
            f"{row.ratio:.2f} x",
            "-" if row.same_tokens is None else f"{row.same_tokens} of {len(row.given.tokens)}",
        ]
        for row in rows
    ]
    return "\n".join([*lines, table(header, cells), "", *_notes(subject, rows)])


def _notes(subject: Subject, rows: list[Row]) -> list[str]:
    capacities = ", ".join(f"{row.format} {row.given.capacity:,}" for row in rows[1:])
    stored = rows[0].given.capacity
    notes = [
        f"bytes: of the live buffers after {stored:,} tokens, with the room they keep for more ({capacities} tokens).",
        "planned: the planner's figure for the same room in the compressed layers. tokens/s: from the median step of",
        "decoding, without the first. same tokens: before the texts first differ.",
    ]
    for row in rows[1:]:
        if left := row.given.bytes - row.given.compressed_bytes:
            notes.append(f"{row.format}: {left:,} of the bytes are not compressed: {row.given.cache}")
    if rows[0].ratio_16bit != 1:
        ratios = ", ".join(f"{row.format} {row.ratio_16bit:.2f} x" for row in rows[1:])
        notes.append(f"The model runs in {subject.dtype}; smaller than an ordinary cache of 16-bit numbers: {ratios}.")
    return notes


def _json(args: argparse.Namespace, subject: Subject, rows: list[Row]) -> str:
    result = {
        "model": args.model,
        "dtype": subject.dtype,
        "environment": environment(),
        "chunk": args.chunk,
        "page_size": args.page_size,
        "prompt_tokens": rows[0].given.prompt_tokens,
        "max_new_tokens": args.max_new_tokens,
        "rows": [row.json() for row in rows],
    }
    return json.dumps(result, indent=2)
