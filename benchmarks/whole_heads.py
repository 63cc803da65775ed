"""A model whose KV heads divide by a number of GPUs: heads of zeros are added, which change nothing of what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

PROJECTION = re.compile(r"self_attn\.([qkvo])_proj\.(weight|bias)$")


def with_whole_heads(folder: Path, target: Path, gpus: int) -> Path:
    """The model itself if its KV heads divide by ``gpus``, else a copy in ``target``, a folder to be made.

    Added are whole groups, KV heads with the query heads that use them: q, k and v are 0, and so are the columns of o.

    Args:
        folder: A model of transformers' with safetensors, whose projections are ``self_attn.{q,k,v,o}_proj``.
    """
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    missing = -kv_heads % gpus
    if not missing:
        return folder
    from safetensors.torch import load_file, save_file
    from torch.nn.functional import pad

    size = config.get("head_dim") or config["hidden_size"] // heads
    rows = {"q": missing * heads // kv_heads * size, "k": missing * size, "v": missing * size}
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    for name, weight in weights.items():
        if found := PROJECTION.search(name):
            letter, kind = found.groups()
            if letter != "o":
                weights[name] = pad(weight, (0, 0) * (kind == "weight") + (0, rows[letter]))
            elif kind == "weight":
                weights[name] = pad(weight, (0, rows["q"]))
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copy(file, target)
    config["num_attention_heads"] = heads + missing * heads // kv_heads
    config |= {"num_key_value_heads": kv_heads + missing, "head_dim": size}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
