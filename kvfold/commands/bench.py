"""Time kvfold's kernels on a CUDA device, and what else there is beside them: decode, store, prefill.

All kernels of a shape are timed in the same run: CUDA-graph replays with a cold L2, twice each. kvfold's output is
checked against float64 attention over the stored vectors; if one is wrong, or fails, the exit code is 1. Rivals that
are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvfold import __version__
from kvfold.bench.cases import CASES, QUICK, Case, select
from kvfold.commands import UsageError
from kvfold.commands.measure import environment, say
from kvfold.commands.plan import whole
from kvfold.formats import PAGE_SIZES, KVFormat

EPILOG = f"""\
{textwrap.fill(f"shapes (batch x context): {', '.join(case.name for case in CASES)}", 118)}
with --quick: {", ".join(QUICK)}

JSON (--json FILE): command, date, environment, settings, copy_tb_per_second, baselines, rows [{{kind, case, kernel,
ours, us, us_rounds, spread, ratio, bytes, tb_per_second, share_of_copy, tflops, replays, calls_per_replay, note}}],
checks [{{case, kernel, what, value, limit, ok}}], missing [{{case, kernel, reason}}], failures. ratio is the baseline's
time over the kernel's.

example: kvfold bench --quick --format k4v4 --json bench.json
"""

FORMATS = ("k4v4", "k3v3", "k2v2")
BACKENDS = ("cuda", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", nargs="+", action="extend", metavar="F", help=f"one format or several ({' '.join(FORMATS)})"
    )
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="kvfold's implementations (both)"
    )
    parser.add_argument("--shapes", nargs="+", metavar="S", help="only these, by name or pattern: 8x32768 'store-*'")
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--no-rivals", action="store_true", help="kvfold's own kernels alone")
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page (%(default)s)")
    parser.add_argument("--replays", type=whole, default=30, metavar="N", help="in each of two rounds (%(default)s)")
    parser.add_argument("--commit", metavar="ID", help="what to record instead of what git says")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: show, and plot, an earlier --json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the decode shapes (PNG, SVG or PDF)")


def run(args: argparse.Namespace) -> int:
    if args.show is not None:
        return _show(args)
    formats = _formats(args.format or FORMATS)
    cases = _cases(args)
    for path in (args.json, args.plot):  # before minutes of measuring, not after
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.absolute().parent}")
    _require_cuda()
    import torch

    from kvfold.bench import report as reports
    from kvfold.bench.kernel import Setting
    from kvfold.bench.rivals import BASELINES
    from kvfold.bench.runner import measure

    if args.plot is not None:
        reports.require_matplotlib()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its log goes to stdout, where the table belongs
    device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting.of(device, args.page_size)
    report = reports.Report(dict(BASELINES))
    head = {
        "command": shlex.join(["kvfold", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment_of_gpu(args.commit),
        "settings": {
            "formats": [str(fmt) for fmt in formats],
            "backends": args.backend,
            "page_size": args.page_size,
            "replays": args.replays,
            "l2_bytes": setting.l2_bytes,
        },
    }
    try:
        measure(
            cases,
            formats,
            args.backend,
            setting,
            report,
            replays=args.replays,
            with_rivals=not args.no_rivals,
            say=say,
        )
    finally:  # what was measured before an interruption is kept
        if args.json is not None:
            args.json.write_text(json.dumps({**head, **report.json()}, indent=1) + "\n", encoding="utf-8")
    print(reports.text(report))
    sys.stdout.flush()
    if args.plot is not None:
        reports.plot(report, args.plot, _title(head["environment"]))  # type: ignore[arg-type]
    if not report.ok:
        say(f"kvfold: error: {len(report.wrong)} checks failed and {len(report.failures)} kernels did, see above")
    return 0 if report.ok else 1


def _show(args: argparse.Namespace) -> int:
    from kvfold.bench import report as reports

    if args.json is not None:
        raise UsageError("--show reads figures, and --json writes new ones: leave one of them out")
    try:
        data = json.loads(args.show.read_text(encoding="utf-8"))
        report, facts = reports.Report.of_json(data), data["environment"]
        print(reports.text(report))
        if args.plot is not None:
            reports.plot(report, args.plot, _title(facts))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(
            f"{args.show} is not what `kvfold bench --json` writes ({type(error).__name__}: {error})"
        ) from None
    return 0 if report.ok else 1


def _formats(specs: list[str] | tuple[str, ...]) -> list[KVFormat]:
    formats = list(dict.fromkeys(KVFormat.parse(spec).require_built() for spec in specs))
    for fmt in formats:
        if fmt.sinks or fmt.tail:
            raise UsageError(f"{fmt}: bench times pages, and exact sinks and tails lie outside them; leave them out")
        if any(side.family not in ("lloyd", "trellis") for side in (fmt.k, fmt.v)):
            raise UsageError(
                f"{fmt}: bench fills pages with random codes: give k1..k8, v1..v8 or the trellises 2t, 3t, 4t"
            )
    return formats


def _cases(args: argparse.Namespace) -> list[Case]:
    try:
        return select(args.shapes, args.quick)
    except ValueError as error:
        raise UsageError(f"argument --shapes: {error}") from None


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise UsageError(
            f"bench times kernels on a CUDA device, and {why}; on a CPU `kvfold compare` measures a whole model"
        )


def environment_of_gpu(commit: str | None) -> dict[str, object]:
    """What the figures depend on: device, driver, versions, commit."""
    import torch

    facts: dict[str, object] = {"kvfold": __version__, **environment()}
    facts["commit"] = commit or os.environ.get("KVFOLD_COMMIT") or facts["commit"]
    for name in ("triton", "vllm"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts |= {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }
    return facts


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _title(facts: dict[str, object]) -> str:
    return f"Decode attention, {facts['gpu']}, kvfold {facts['kvfold']} ({facts['commit'] or 'commit unknown'})"
