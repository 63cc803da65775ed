"""The subcommands of ``kvfold``, one a file: ``add_arguments(parser)`` declares options, ``run(args)`` does the work.

A command's module is imported to build the help text, so it imports what ``run`` needs inside ``run``, unless that is
cheap: pure Python, no torch, no numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfold.errors import KVFoldError


class UsageError(KVFoldError):
    """The command line asks for something that makes no sense."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    """Rows under a header, columns two spaces apart; numbers to the right, the ``text_columns`` to the left."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join(line(cells) for cells in (header, *rows))
