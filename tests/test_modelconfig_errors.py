"""Configs in files, and configs that are wrong: an error names the key, the file and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.errors import KVFoldError, UnsupportedModelError
from kvfold.modelshape import LayerGroup, ModelShape, PlanError

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip


def test_reads_a_file_and_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for source in (folder, str(folder), folder / "config.json"):
        shape = ModelShape.from_config(source)
        assert (shape.name, shape.groups) == ("Llama-8B", (LayerGroup("full", 32, 8, 128, 128),))
    (tmp_path / "mine.json").write_text(json.dumps(LLAMA))
    assert ModelShape.from_config(tmp_path / "mine.json").name == "mine"


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_a_missing_key_is_named_with_its_file(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != key and name != "num_key_value_heads"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(PlanError) as error:
        ModelShape.from_config(path)
    assert key in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_hidden_layers": "32"}, PlanError, "'num_hidden_layers' is '32'"),
        ({"num_hidden_layers": 10**12}, PlanError, "layers are more"),
        ({"num_key_value_heads": [8, 4]}, PlanError, "'num_key_value_heads' is"),
        ({"num_key_value_heads": True}, PlanError, "'num_key_value_heads' is True"),
        ({"hidden_size": 4000, "num_attention_heads": 33}, PlanError, "'head_dim'"),
        ({"head_dim": 4096}, PlanError, "head size 4096"),
        ({"torch_dtype": "int3"}, PlanError, "'int3'"),
        ({"layer_types": ["full_attention"] * 31}, PlanError, "31 entries, but there are 32 layers"),
        ({"layer_types": "full_attention"}, PlanError, "'layer_types'"),
        ({"layer_types": ["telepathy"] * 32}, UnsupportedModelError, "'telepathy'"),
        ({"layer_types": ["sliding_attention"] * 32}, PlanError, "'sliding_window'"),
        ({"num_kv_shared_layers": 32}, PlanError, "only 32 layers"),
        ({"hybrid_override_pattern": "M*M*"}, UnsupportedModelError, "by hand"),
        ({"attn_layer_period": 8}, UnsupportedModelError, "by hand"),
        ({"is_encoder_decoder": True}, UnsupportedModelError, "encoder-decoder"),
        ({"kv_lora_rank": 512}, PlanError, "'qk_rope_head_dim'"),
    ],
)
def test_a_config_that_makes_no_sense(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=r"^config: ") as caught:
        ModelShape.from_config({**LLAMA, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00\x01", "null", '"llama"'])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"config\.json is not a"):
        ModelShape.from_config(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\xff\xfe\x80")
    with pytest.raises(PlanError, match="not a JSON config"):
        ModelShape.from_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing is downloaded"):
        ModelShape.from_config("meta-llama/Llama-8B")
    with pytest.raises(PlanError, match=r"no config\.json in"):
        ModelShape.from_config(tmp_path)


def test_by_hand() -> None:
    assert ModelShape.uniform(36, 8, 128).groups == (LayerGroup("full", 36, 8, 128, 128),)
    assert ModelShape.uniform(61, 1, 512, 64).groups == (LayerGroup("full", 61, 1, 512, 64),)
    for wrong in ((0, 8, 128), (36, 0, 128), (36, 8, 0), (36, 8, 4096)):
        with pytest.raises(KVFoldError):
            ModelShape.uniform(*wrong)
    with pytest.raises(PlanError, match="kind"):
        LayerGroup("psychic", 1)
    with pytest.raises(PlanError, match="window"):
        LayerGroup("sliding", 1, 8, 128, 128)
