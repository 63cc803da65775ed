"""One HTML file (or PDF) of the JSON files that the other commands wrote: tables, figures, and where each comes from.

The frontier of bits and KL divergence of kvfold's formats and of other systems' (fidelity), needle maps (needle),
capacity curves and bytes (storage, plan), kernels (bench) and serving (benchmarks/vllm_engine.py). Nothing is measured.
Of a folder every JSON file is read and what is not theirs is named; without an argument that folder is
benchmarks/results if there is one, else the current one.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from kvfold import __version__
from kvfold.commands import UsageError
from kvfold.commands.measure import say

EPILOG = """\
Files of kvfold fidelity with the same model, dtype, text and windows share a frontier, so that formats that were
measured later join those before; others get a section of their own. `kvfold plan --json >plan.json` gives a plan.

example: kvfold report benchmarks/results mine/fidelity.json --output report.html
"""

RESULTS = Path("benchmarks/results")
PAGES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help="JSON files, or folders of them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="what to write, .html or .pdf (report.html)")
    parser.add_argument("--pdf", action="store_true", help="write the figures as PDF (report.pdf)")


def run(args: argparse.Namespace) -> int:
    output = _output(args)
    if find_spec("matplotlib") is None:
        raise UsageError("report draws with matplotlib, which is not installed: pip install 'kvfold[plot]'")
    from kvfold.report import html, pdf, sources
    from kvfold.report.document import Report

    files, skipped = sources.gather(args.paths or [RESULTS if RESULTS.is_dir() else Path()])
    for name, reason in skipped:
        say(f"left out {name}: {reason}")
    made = datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC")
    report = Report(sources.sections(files), f"Made by kvfold {__version__}, {made}.", skipped)
    content = pdf.pages(report) if output.suffix.lower() == ".pdf" else html.page(report).encode()
    output.write_bytes(content)
    print(
        f"{output}: {_count(len(report.sections), 'section')} and {_count(report.pictures, 'figure')} "
        f"of {_count(len(files), 'file')}"
    )
    return 0


def _output(args: argparse.Namespace) -> Path:
    """The file to write, refused before anything is read if it cannot be."""
    output: Path = args.output or Path("report.pdf" if args.pdf else "report.html")
    ending = output.suffix.lower()
    if ending not in (*PAGES, ".pdf"):
        raise UsageError(f"argument --output: {output} ends in none of .html and .pdf")
    if args.pdf and ending != ".pdf":
        raise UsageError(f"--pdf and --output {output} contradict each other: let its name end in .pdf")
    if output.is_dir():
        raise UsageError(f"{output} is a folder: name a file in it")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output}: there is no folder {output.absolute().parent}")
    return output


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
