"""That the Triton kernels compile for a GPU: their types and shapes, which the interpreter does not check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FORMATS = ("k3v2", "k1v8", "k4v4+mean", "k3tv4t+mean", "k3tv4t")


@pytest.mark.parametrize("spec", FORMATS)
def test_every_launch_compiles(spec: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_sm90.py")
    done = subprocess.run(
        [sys.executable, script, spec], capture_output=True, text=True, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"('{spec}'" in done.stdout
    assert "kernels compile" in done.stdout
