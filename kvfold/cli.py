"""The command line: ``kvfold formats``, ``plan``, ``generate``, ``compare``, ``fidelity``, ``tune``,
``needle``, ``storage``, ``bench`` and ``report`` (docs/cli.md).

Exit codes: 0 done, 1 it failed, 2 wrong usage or input. An error is one line on stderr with the reason and the way out;
results go to stdout, so that ``--json`` can be piped.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from kvfold import __version__
from kvfold.commands import UsageError
from kvfold.errors import CapacityError, KVFoldError

COMMANDS = {
    "formats": "what keys and values can be stored as: bits, bytes, expected error",
    "plan": "how much context fits into a given memory, format by format",
    "generate": "let a model answer a prompt on a compressed cache",
    "compare": "the same answer on the ordinary and on a compressed cache: text, speed, bytes",
    "fidelity": "how far a compressed cache moves a model's predictions: KL divergence, perplexity",
    "tune": "widths for K and V, layer by layer, that lose least under a budget of bits",
    "needle": "whether a model still finds a fact in a long text on a compressed cache: depth by length",
    "storage": "the bytes that a cache really holds, format by format, beside the planner's figure",
    "bench": "the kernels of a CUDA device beside what else there is, in one run",
    "report": "one HTML file or PDF of what fidelity, needle, storage, plan and bench measured",
}
"""Name and help of every command; ``kvfold.commands.<name>`` has ``add_arguments`` and ``run``."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="kvfold", description="Compress the KV cache of large language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kvfold {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"kvfold.commands.{name}")
        command = commands.add_parser(
            name,
            help=text,
            description=module.__doc__,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _check_command(argv: Sequence[str]) -> None:
    """Answer a missing or misspelled command better than argparse does."""
    if not argv:
        raise UsageError(f"a command is missing: {', '.join(COMMANDS)} (see `kvfold --help`)")
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {argv[0]!r}; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises on wrong input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _check_command(argv)
        args = build_parser().parse_args(argv)
        code = int(args.run(args) or 0)
        sys.stdout.flush()  # so that a closed pipe is noticed here
        return code
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except BrokenPipeError:  # the reader, `head` say, has seen enough; keep the interpreter from flushing once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except CapacityError as error:
        return _fail(str(error), 1)
    except KVFoldError as error:
        return _fail(str(error), 2)
    except OSError as error:
        if error.filename is None:
            return _fail(str(error), 1)
        return _fail(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}", 2)


def _fail(reason: str, code: int) -> int:
    print("kvfold: error:", " ".join(reason.split()), file=sys.stderr)
    return code
