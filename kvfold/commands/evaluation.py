"""What the commands that measure a model share: the text, the device, files that can be written, progress, logits."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold import __version__
from kvfold.commands import UsageError
from kvfold.commands.compare import TEXT
from kvfold.commands.measure import Subject, cache_argument, environment, read_prompt, say
from kvfold.modelshape import FULL, LayerGroup

if TYPE_CHECKING:
    import torch

    from kvfold.integrations.transformers import KVCache


def check_outputs(json_path: Path | None, plot_path: Path | None) -> None:
    """Refuse files that cannot be written: before minutes of measuring, not after.

    Raises:
        UsageError: A path is a folder or in none, or no plot can have this ending, or matplotlib is not installed.
    """
    for path in (json_path, plot_path):
        if path is not None and path.is_dir():
            raise UsageError(f"{path} is a folder: name a file in it")
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.absolute().parent}")
    if plot_path is None:
        return
    from kvfold.bench.report import require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    known = Figure().canvas.get_supported_filetypes()
    if plot_path.suffix.lower().removeprefix(".") not in known:
        raise UsageError(f"argument --plot: {plot_path} has none of the endings {', '.join(sorted(known))}")


def read_text(path: Path | None) -> tuple[Path, str]:
    """A text and where it comes from: the excerpt of Moby Dick unless a file is named.

    Raises:
        UsageError: The file is not UTF-8 text, or none is named and the excerpt is not there.
        OSError: The file cannot be read.
    """
    if path is None and not TEXT.exists():
        raise UsageError("the excerpt of Moby Dick is in the repository, not in the package: give --text FILE")
    path = TEXT if path is None else path
    return path, read_prompt(path)


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: There is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"argument --device: {name!r} is not one of auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise UsageError(f"argument --device: {name}: torch finds {count} CUDA devices; give --device auto or cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels are launched on the current one
    return device


def environment_of(device: torch.device) -> dict[str, object]:
    """What figures depend on, for the JSON: versions, commit, processor or GPU."""
    if device.type == "cpu":
        return {"kvfold": __version__, **environment()}
    from kvfold.commands.bench import environment_of_gpu

    return environment_of_gpu(None)


def check_context(subject: Subject, tokens: int, what: str) -> None:
    """Refuse with :class:`UsageError` more tokens than the model was made for, where its config tells."""
    config = subject.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(limit, int) and tokens > limit:
        raise UsageError(f"{what} of {tokens:,} tokens are longer than the model's context of {limit:,}")


def first_tokens(subject: Subject) -> list[int]:
    """The token with which the model's tokenizer begins a text, in a list; empty if it does not."""
    start: list[int] = subject.tokenizer("a")["input_ids"][:1]
    return start if start == [subject.tokenizer.bos_token_id] else []


def forward(subject: Subject, ids: torch.Tensor, cache: Any, keep: int = 0) -> torch.Tensor:
    """Logits ``[n, vocabulary]`` of the tokens ``[1, n]`` that follow those in the cache.

    Args:
        keep: Logits of that many last tokens are enough, 0 for all. A model that cannot leave any out gives all, which
            are then cut: the result is ``[keep, vocabulary]`` either way.
    """
    options: dict[str, Any] = {cache_argument(subject.model): cache}
    if keep and "logits_to_keep" in inspect.signature(subject.model.forward).parameters:
        options["logits_to_keep"] = keep
    logits: torch.Tensor = subject.model(ids, **options, use_cache=True).logits[0]
    return logits[-keep:]  # 0 keeps all


def stored_layers(cache: KVCache) -> dict[int, LayerGroup]:
    """The compressed layers of a used cache with their heads, as :mod:`kvfold.layerformats` takes them."""
    return {
        index: LayerGroup(FULL, 1, layer.num_heads, layer.layout.head_size, layer.layout.head_size_v)
        for index, layer in cache.compressed_layers.items()
    }


def bits_per_element(cache: KVCache) -> float:
    """All-in bits per element that the format states for its pages, over the compressed layers of a used cache."""
    bits = cache.format.bits_per_element(stored_layers(cache), cache.page_size)
    assert bits is not None, "a cache without compressed layers is refused when it is made"
    return bits


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Told what begins: a bar on a terminal that has rich, a line of text elsewhere. To stderr."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        live = False
    else:
        live = sys.stderr.isatty()
    if not live:
        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, begun = bar.add_task("", total=total), 0

        def step(text: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=text)
            begun += 1

        yield step
        bar.update(task, completed=begun)
