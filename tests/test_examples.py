"""The examples run, and the README says what the code computes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.commands.formats import describe
from kvfold.formats import KVFormat

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# `| k4v4 | 4.125 | 132 | 3.88 | ... |` with the name in backticks
ROW = re.compile(r"^\| `(\S+?)`[^|]*\| ([\d.]+) \| (\d+) \| ([\d.]+) \|", re.MULTILINE)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example: Path) -> None:
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_transformers_example_says_what_is_stored() -> None:
    command = [sys.executable, "examples/transformers_generate.py", "--format", "k8v4", "--max-new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert "KVCache(k8v4, chunk=exact, compressed 2 of 2 layers)" in done.stdout
    # 10 bytes of prompt and 2 of 3 new tokens: the first answer's token comes from the prompt
    assert "12 tokens in " in done.stdout


def test_the_table_of_formats_in_the_readme() -> None:
    rows = ROW.findall(README)
    assert len(rows) >= 8
    for name, bits, size, ratio in rows:
        row = describe(KVFormat.parse(name), 128, 128)
        assert (f"{row.bits_per_element:.3f}", str(row.bytes_per_token), f"{row.ratio:.2f}") == (bits, size, ratio)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
