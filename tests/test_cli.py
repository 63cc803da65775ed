"""The command line as a program: exit codes, one line per error, what it imports (results: test_commands.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvfold import cli
from kvfold.commands import formats as formats_command
from kvfold.errors import CapacityError

CONFIG = {
    "model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "torch_dtype": "bfloat16", "max_position_embeddings": 40960,
}  # fmt: skip
BY_HAND = ["plan", "--layers", "36", "--kv-heads", "8", "--head-size", "128", "--memory", "40GiB"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


class Result:
    def __init__(self, code: int, captured: pytest.CaptureResult[str]) -> None:
        self.code, self.out, self.err = code, captured.out, captured.err


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *argv: Result(cli.main([str(word) for word in argv]), capsys.readouterr())


# --- wrong usage: one line, code 2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "a command is missing: formats, plan"),
        ("formts", "did you mean 'formats'"),
        ("xyz", "the commands are formats, plan"),
        ("--nonsense", "--nonsense"),
        ("formats k9v9", "did you mean"),
        ("formats k4v4+sink4", "did you mean 'sinks4'"),
        ("formats k4qv4q", "not built yet"),
        ("formats --head-size 0", "--head-size: '0' is not a whole number"),
        ("formats --head-size 4096", "from 1 to 1024"),
        ("formats --head-size-v x", "--head-size-v: 'x'"),
        ("formats --head-size 4", "too small for k8v8"),
        ("formats --jsn", "--jsn"),
        ("plan", "--memory"),
        ("plan --memory 1GB", "no model: give --model"),
        ("plan --memory 1GB --layers 3", "also needs --kv-heads, --head-size"),
        ("plan --memory 40G --layers 1 --kv-heads 1 --head-size 64", "40GB (powers of 1000) or 40GiB"),
        ("plan --memory 0 --model x", "--memory"),
        ("plan --memory 1GB --layers 0 --kv-heads 1 --head-size 64", "--layers: '0'"),
        ("plan --memory 1GB --layers 1 --kv-heads -1 --head-size 64", "--kv-heads"),
        ("plan --memory 1GB --layers 1 --kv-heads 1.5 --head-size 64", "--kv-heads: '1.5'"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 9999", "--head-size"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 64 --head-size-v 0", "--head-size-v"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 64 --context 0", "--context"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 64 --context 32k", "--context: '32k'"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 64 --page-size 48", "choose from 16, 32, 64"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 64 --format k4w4", "did you mean"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 64 --format", "--format"),
        ("plan --memory 1GB --layers 1 --kv-heads 1 --head-size 64 --format k4av4a", "not built yet"),
        ("plan --memory 1GB --model Qwen/Qwen3-8B", "nothing is downloaded"),
        ("plan --memory 1GB --model x --layers 3", "--model and --layers exclude each other"),
        ("plan --memory 1GB --mod x", "--mod"),
    ],
)
def test_wrong_usage(kvfold: Any, argv: str, words: str) -> None:
    result = kvfold(*argv.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvfold: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_a_config_without_a_key(kvfold: Any, model: Path) -> None:
    (model / "config.json").write_text("{}")
    result = kvfold("plan", "--model", model, "--memory", "1GB")
    assert result.code == 2
    assert "config.json: no key 'num_hidden_layers'" in result.err


def test_a_config_that_cannot_be_read(kvfold: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()  # root may read every file, so a permission would not do
    result = kvfold("plan", "--model", tmp_path, "--memory", "1GB")
    assert result.code == 2
    assert result.err.startswith(f"kvfold: error: cannot use {tmp_path}/config.json: ")


@pytest.mark.parametrize(
    ("error", "code"), [(CapacityError("full"), 1), (OSError("disk full"), 1), (KeyboardInterrupt(), 130)]
)
def test_failures(kvfold: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(formats_command, "run", fail)
    result = kvfold("formats")
    assert result.code == code
    assert result.err.startswith("kvfold: error: ")


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["formats", "--help"], ["plan", "--help"], ["--version"]])
def test_help(kvfold: Any, argv: list[str]) -> None:
    result = kvfold(*argv)
    assert (result.code, result.err) == (0, "")
    assert "kvfold" in result.out


def test_as_a_program(model: Path) -> None:
    command = [sys.executable, "-m", "kvfold", "plan", "--model", model, "--memory", "80GB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["memory_bytes"] == 80 * 10**9
    done = subprocess.run([*command[:3], "formats", "k9v9"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("kvfold: error: unknown format 'k9v9'")


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m kvfold formats k4v4 | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_help_and_plan_import_no_torch_and_no_numpy() -> None:
    script = (
        "import sys, kvfold.cli\n"
        f"assert kvfold.cli.main(['--help']) == 0 and kvfold.cli.main({BY_HAND!r}) == 0\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
