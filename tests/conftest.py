"""Fixtures that every test may use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anybody imports triton: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kvfold import cli, ops

BACKENDS = ("reference", "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each implementation of the operations."""
    with ops.backend(request.param):
        yield request.param


class Result:
    """Of a command line: its exit code, and what it printed."""

    def __init__(self, code: int, captured: pytest.CaptureResult[str]) -> None:
        self.code, self.out, self.err = code, captured.out, captured.err

    def json(self) -> Any:
        """What it printed, if it went well and said nothing else."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line."""
    return lambda *argv: Result(cli.main([str(word) for word in argv]), capsys.readouterr())


@pytest.fixture
def kvfold_on_cpu(kvfold: Callable[..., Result]) -> Callable[..., Result]:
    """Runs the command line on the CPU, unless it says otherwise."""
    return lambda *argv: kvfold(*argv, *(() if "--device" in map(str, argv) else ("--device", "cpu")))
