"""Other systems' formats in `kvfold fidelity`: their arithmetic, their bits, their layers, and their rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvfold import cli
from kvfold.commands.evaluation import forward
from kvfold.commands.fidelity import parse_format
from kvfold.commands.measure import Subject
from kvfold.errors import FormatError, UnsupportedModelError
from kvfold.eval import rivals
from kvfold.eval.rivals import Rival, blocks, lmdeploy, metal, paper, vllm
from kvfold.eval.rivals.levels import lloyd_max_levels

transformers = pytest.importorskip("transformers")

from test_fidelity import LETTERS, WINDOW, save  # noqa: E402  # they need transformers
from tiny_models import CONFIGS, tiny  # noqa: E402

from kvfold.eval.rivals.cache import RivalCache, RivalLayer  # noqa: E402


def gaussian(rows: int = 4096, size: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def uneven(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    """Vectors of very different length, with a channel that sticks out and values that share a mean."""
    x = gaussian(rows, size, seed) * torch.exp(2 * gaussian(rows, 1, seed + 1)) + 0.1
    x[:, 5] += 9
    return x


def distortion(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).square().sum(-1) / x.square().sum(-1)).mean().item()


def rival(name: str) -> Rival:
    found = rivals.find(name)
    assert found is not None, name
    return found


# --- what every one of them keeps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(rivals.known()))
def test_a_round_trip_is_of_the_vector_alone(name: str) -> None:
    x = uneven(12, 64)
    for codec in (rival(name).k, rival(name).v):
        whole = codec.round_trip(x)
        assert (whole.shape, whole.dtype) == (x.shape, torch.float32)
        torch.testing.assert_close(codec.round_trip(x.view(3, 4, 64)), whole.view(3, 4, 64), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(codec.round_trip(x[7:8]), whole[7:8], rtol=1e-5, atol=1e-5)
        assert codec.round_trip(x.bfloat16()).dtype == torch.float32
        assert 0 < distortion(x, whole) < 2
    assert rival(name).what
    assert rival(name).source


ON_GAUSSIAN = {  # the figures of the formats' theory at 128 coordinates, keys and values
    "paper:mse1": (0.3609, 0.3609),
    "paper:mse2": (0.1160, 0.1160),
    "paper:mse3": (0.0340, 0.0340),
    "paper:mse4": (0.00932, 0.00932),
    "paper:mse5": (0.00245, 0.00245),
    "ggml:q4_0": (0.0074, 0.0074),
    "ggml:q4_0+rot": (0.0074, 0.0074),
    "nvfp4": (0.0091, 0.0091),
    "mxfp4": (0.0132, 0.0132),
    "vllm:k8v4": (0.000703, None),
    "vllm:4bit_nc": (0.0093, None),
    "vllm:3bit_nc": (0.0340, None),
    "lmdeploy:42": (None, 0.1160),
}


@pytest.mark.parametrize("name", sorted(ON_GAUSSIAN))
def test_distortion_on_gaussian_vectors(name: str) -> None:
    x = gaussian()
    for codec, expected in zip((rival(name).k, rival(name).v), ON_GAUSSIAN[name], strict=True):
        if expected is not None:
            assert distortion(x, codec.round_trip(x)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("name", "top"), [("vllm:4bit_nc", 15), ("vllm:3bit_nc", 7), ("lmdeploy:4", 15)])
def test_distortion_of_uniform_steps_from_minimum_to_maximum(name: str, top: int) -> None:
    x = gaussian()
    step = (x.amax(-1) - x.amin(-1)) / top  # an error is uniform within a step
    expected = (step.square() * x.shape[-1] / 12 / x.square().sum(-1)).mean().item()
    assert distortion(x, rival(name).v.round_trip(x)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("bits", "size", "magnitudes"), [
    (1, None, [0.7979]),
    (2, None, [0.4528, 1.5104]),
    (3, None, [0.2451, 0.7560, 1.3439, 2.1519]),
    (4, None, [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326]),
])  # fmt: skip
def test_levels_of_the_normal_law(bits: int, size: int | None, magnitudes: list[float]) -> None:
    levels = lloyd_max_levels(bits, size).numpy()
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], magnitudes, atol=1.5e-4)
    np.testing.assert_array_equal(levels, -levels[::-1])


def test_levels_of_no_bits_and_of_short_vectors() -> None:
    assert lloyd_max_levels(0).tolist() == [0.0]
    ends = [lloyd_max_levels(4, size)[-1].item() for size in (8, 64, 1024, None)]
    assert ends == sorted(ends)  # the law's tails grow with the dimension
    assert ends[0] < 8**0.5


# --- bits -------------------------------------------------------------------------------------------------------------

SLOT_BYTES = {  # of one token of one head of 128, K and V, as those systems allocate them
    "vllm:k8v4": 196,
    "vllm:4bit_nc": 134,
    "vllm:k3v4_nc": 118,
    "vllm:3bit_nc": 102,
    "vllm:int4_per_token_head": 2 * (64 + 4),
    "paper:mse4": 2 * (64 + 2),
    "paper:prod4": (64 + 4) + (64 + 2),
    "paper:prod4o": (64 + 4) + (64 + 2),
    "metal:q8_0/q3_0": 200,
    "metal:q4_0/q3_0": 136,
    "metal:uint2/q3_0": 104,
    "lmdeploy:42": 102,
    "lmdeploy:8": 2 * (128 + 4),
    "lmdeploy:4": 2 * (64 + 4),
    "ggml:q8_0": 2 * 4 * 34,
    "ggml:q4_0+rot": 2 * 4 * 18,
    "ggml:q8_0/q4_0": 4 * 34 + 4 * 18,
    "nvfp4": 2 * (64 + 8),
    "mxfp4": 2 * (64 + 4),
}


@pytest.mark.parametrize("name", sorted(SLOT_BYTES))
def test_bits_are_the_bytes_that_the_systems_allocate(name: str) -> None:
    found = rival(name)
    assert found.bits(128, 128) == 8 * SLOT_BYTES[name]
    assert found.k.bits(128) + found.v.bits(64) == found.bits(128, 64)


def test_bits_at_head_size_64() -> None:
    expected = {
        "vllm:k8v4": 6.25,
        "vllm:4bit_nc": 4.375,
        "vllm:3bit_nc": 3.375,
        "paper:mse4": 4.25,
        "paper:prod4": 4.375,
    }
    expected |= {"lmdeploy:42": 3.375, "metal:q8_0/q3_0": 6.25, "metal:q4_0/q3_0": 4.25, "ggml:q4_0": 4.5, "nvfp4": 4.5}
    for name, bits in expected.items():
        assert rival(name).bits(64, 64) / 128 == bits, name


def test_bits_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "fidelity.md").read_text(encoding="utf-8")
    names_table = page.partition("| name |")[2].partition("\n\n")[0]
    checked = set()
    for line in names_table.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        names = [name.strip().strip("`") for name in cells[1].split(",")]
        for size, column in ((64, 3), (128, 4)):
            for name, bits in zip(names, cells[column].split(","), strict=False):
                if name in rivals.known():
                    found = rivals.known()[name]
                    assert float(bits) == pytest.approx(found.bits(size, size) / (2 * size), abs=1e-9), name
                    checked.add(name)
    assert len(checked) == 13


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vllm:4bit_nc", 96, "head sizes that are powers of two, not 96"),
        ("metal:q8_0/q3_0", 96, "head sizes 64, 128, 256 and 512, not 96"),
        ("ggml:q4_0", 80, "head sizes that 32 divides, not 80"),
        ("ggml:q4_0+rot", 96, "head sizes that 64 divides, not 96"),
        ("nvfp4", 40, "head sizes that 16 divides, not 40"),
    ],
)
def test_head_sizes_that_a_system_cannot_store(name: str, size: int, words: str) -> None:
    with pytest.raises(FormatError, match=f"{name} stores {words}".replace("+", r"\+")):
        rival(name).bits(size, size)


# --- vLLM -------------------------------------------------------------------------------------------------------------


def test_levels_of_vllm() -> None:
    """What vLLM 0.33's get_centroids(64, bits) returned, over sigma: near the normal law's, and not the same."""
    found = {bits: (vllm._centroids(bits, 64) * 8).tolist() for bits in (3, 4)}
    np.testing.assert_allclose(found[3][4:], [0.24498, 0.75565, 1.34318, 2.15035], atol=6e-6)
    expected = [0.12843, 0.38814, 0.65688, 0.94245, 1.25626, 1.61788, 2.06845, 2.73092]
    np.testing.assert_allclose(found[4][8:], expected, atol=6e-6)


def test_vllm_keys_keep_their_norm_in_float16() -> None:
    x = uneven(50, 64)
    norm = torch.linalg.vector_norm(x, dim=-1)
    for bits in (3, 4):
        found = torch.linalg.vector_norm(vllm.mse_keys(x, bits), dim=-1)
        torch.testing.assert_close(found, norm.half().float(), rtol=1e-5, atol=0)
    assert (vllm.mse_keys(torch.zeros(1, 64), 4) == 0).all()


def test_vllm_values_by_hand() -> None:
    whole_steps = torch.arange(8.0).repeat(2) * 0.5 - 1.0
    assert torch.equal(vllm.uniform_values(whole_steps[None], 3)[0], whole_steps)
    halfway = torch.tensor([[0.0, 0.5, 1.5, 6.4, 7.0]])  # a step of 1: half a step goes up
    assert vllm.uniform_values(halfway, 3).tolist() == [[0.0, 1.0, 2.0, 6.0, 7.0]]
    third = torch.tensor([[1 / 3, 1 / 3 + 15 * 0.1]])  # neither minimum nor step is exact in float16
    step, low = np.float32(np.float16(np.float32(0.1))), np.float32(np.float16(np.float32(1 / 3)))
    np.testing.assert_allclose(vllm.uniform_values(third, 4).numpy(), [[low, low + 15 * step]], rtol=1e-6)


def test_vllm_fp8_keys_saturate_and_are_not_scaled() -> None:
    x = torch.tensor([[1000.0, -1000.0, 0.1, 1e-4]])
    assert vllm.fp8_keys(x).tolist() == [[448.0, -448.0, 0.1015625, 0.0]]


def test_int4_per_token_head_hides_its_zero_point_in_the_scale() -> None:
    x = uneven(200, 96)  # a Hadamard transform of 32 coordinates, three times
    y = vllm.int4_per_token_head(x)
    assert 0.003 < distortion(x, y) < 0.02
    constant = torch.full((1, 64), 2.0)  # after signs and transform it is not: no division by a step of zero
    assert torch.isfinite(vllm.int4_per_token_head(constant)).all()


# --- the paper --------------------------------------------------------------------------------------------------------


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the seed of the paper's matrices; they are the usual ones again afterwards."""

    def draw(seed: int) -> None:
        monkeypatch.setattr(paper, "_SEED", seed)
        paper._matrices.cache_clear()

    yield draw
    monkeypatch.undo()
    paper._matrices.cache_clear()


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_inner_products_with_prod_keys_are_unbiased(draws: Any, orthogonal: bool, bits: int) -> None:
    x, q = gaussian(2, 16, seed=3)
    x = x / x.norm()
    q = x + 0.3 * q
    products: dict[str, list[float]] = {"prod": [], "mse": []}
    for seed in range(1500):
        draws(seed)
        products["prod"].append((q @ paper.prod(x[None], bits, orthogonal)[0]).item())
        products["mse"].append((q @ paper.mse(x[None], bits)[0]).item())
    exact = (q @ x).item()
    error = {name: np.std(found) / math.sqrt(len(found)) for name, found in products.items()}
    assert abs(np.mean(products["prod"]) - exact) < 4 * error["prod"]
    assert np.mean(products["mse"]) < exact - 6 * error["mse"]  # Lloyd–Max shrinks; so the test above can fail
    assert np.std(products["prod"]) > 1.05 * np.std(products["mse"])  # what unbiasedness costs


def test_the_matrices_of_the_paper() -> None:
    rotation, gauss, signs = paper._matrices(64, torch.device("cpu"))
    for matrix in (rotation, signs):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(64), rtol=0, atol=1e-5)
    assert gauss.std().item() == pytest.approx(1, abs=0.05)
    assert abs(gauss.mean().item()) < 0.05
    assert (rotation.T @ signs).abs().max() < 0.7  # drawn apart
    assert torch.equal(paper._matrices(64, torch.device("cpu"))[0], rotation)


def test_prod_of_one_bit_is_the_sketch_of_signs() -> None:
    x = gaussian(3, 64)
    _, gauss, _ = paper._matrices(64, torch.device("cpu"))
    norm = x.norm(dim=-1, keepdim=True)
    expected = math.sqrt(math.pi / 2) / 64 * norm.half().float() * torch.sign(x @ gauss.T) @ gauss
    torch.testing.assert_close(paper.prod(x, 1, False), expected, rtol=1e-3, atol=1e-5)


def test_zero_vectors_of_the_paper() -> None:
    assert (paper.mse(torch.zeros(2, 64), 4) == 0).all()
    assert (paper.prod(torch.zeros(2, 64), 4, True) == 0).all()


# --- vllm-metal and lmdeploy, against one number at a time ------------------------------------------------------------


def h(value: float) -> float:
    return float(np.float16(value))


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_metal_keys_one_number_at_a_time(bits: int) -> None:
    x = uneven(6, 64)
    found = metal.affine_keys(x, bits)
    for row, out in zip(x, found, strict=True):
        for group, result in zip(row.split(32), out.split(32), strict=True):
            low, high = group.min().item(), group.max().item()
            bottom, top = (-127, 127) if bits == 8 else (0, 2**bits - 1)
            step = (high - low) / (top - bottom)
            zero = round((high + low) / 2 / step) if bits == 8 else round(low / step)
            codes = [min(max(round(value / step - zero), bottom), top) for value in group.tolist()]
            expected = [(code + h(zero)) * h(step) for code in codes]
            np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_metal_values_one_group_at_a_time() -> None:
    x = uneven(6, 64)
    y = metal.rotate_blocks(x * metal._signs(64), 64)
    levels = np.array([-2.15195, -1.34391, -0.75601, -0.24509, 0.24509, 0.75601, 1.34391, 2.15195])
    expected = np.empty((6, 64))
    for row in range(6):
        for start in (0, 32):
            group = y[row, start : start + 32].double().numpy()
            rms = math.sqrt((group**2).mean())
            nearest = np.abs(group[:, None] / rms - levels).argmin(axis=1)
            expected[row, start : start + 32] = levels[nearest] * h(rms)
    found = metal.rotate_blocks(metal.lloyd_values(x, 3) * metal._signs(64), 64)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_lmdeploy_keys_one_number_at_a_time() -> None:
    x = uneven(4, 64)
    y = blocks.rotate_blocks(x, 64)
    levels = np.array([-2.1519456, -1.3439093, -0.7560052, -0.2450942, 0.2450942, 0.7560052, 1.3439093, 2.1519456]) / 8
    for row, out in zip(y.double().numpy(), blocks.rotate_blocks(lmdeploy.turbo(x, 3, True), 64).numpy(), strict=True):
        norm = math.sqrt((row**2).sum())
        unit = row / norm
        nearest = levels[np.abs(unit[:, None] - levels).argmin(axis=1)]
        residual = unit - nearest
        rms = math.sqrt((residual**2).mean())
        expected = h(norm) * (nearest + h(rms) * np.where(residual >= 0, 1, -1))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * norm)


@pytest.mark.parametrize("bits", [8, 4])
def test_lmdeploy_affine_one_number_at_a_time(bits: int) -> None:
    x = uneven(4, 64)
    for row, out in zip(x.tolist(), lmdeploy.affine(x, bits), strict=True):
        step = (max(row) - min(row)) / (2**bits - 1)
        zero = -min(row) / step
        expected = [(math.floor(value / step + zero + 0.5) - h(zero)) * h(step) for value in row]
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=step * 1e-2)


def test_lmdeploy_stores_scales_as_the_model_computes() -> None:
    x = gaussian(500, 64).bfloat16()  # zero points near 128, which bfloat16 rounds to whole numbers
    in_bfloat16, in_float16 = lmdeploy.affine(x, 8), lmdeploy.affine(x.float(), 8)
    assert distortion(x.float(), in_bfloat16) > 1.5 * distortion(x.float(), in_float16)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_those_of_ggml_bit_for_bit() -> None:
    gguf = pytest.importorskip("gguf")
    x = torch.cat([uneven(300, 128), torch.zeros(1, 128), torch.full((1, 128), 3.0), -uneven(300, 128, seed=7)])
    for codec, name in ((blocks.q8_0, "Q8_0"), (blocks.q4_0, "Q4_0"), (blocks.mxfp4, "MXFP4")):
        if not hasattr(gguf.GGMLQuantizationType, name):
            pytest.skip(f"this gguf has no {name}")
        kind = gguf.GGMLQuantizationType[name]
        expected = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
        np.testing.assert_array_equal(codec(x).numpy(), expected, err_msg=name)


def test_e2m1() -> None:
    values = torch.tensor([0.0, 0.25, 0.26, 0.75, 1.25, 1.3, 1.75, 2.5, 2.51, 3.5, 5.0, 5.01, 6.0, 9.0])
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0, 6.0])
    assert torch.equal(blocks.e2m1(values), expected)
    assert torch.equal(blocks.e2m1(-values), -expected)


def test_nvfp4_by_hand() -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 5.9, 1.0  # a scale of .98333: e4m3 has 1
    x[0, 16], x[0, 17] = -0.75, 0.4  # .125 exactly, and 3.2 of it
    expected = torch.zeros(1, 32)
    expected[0, 0], expected[0, 1] = 6.0, 1.0
    expected[0, 16], expected[0, 17] = -0.75, 0.375
    assert torch.equal(blocks.nvfp4(x), expected)


def test_llama_cpp_rotates_keys_by_the_whole_head_and_values_by_64() -> None:
    found = rival("ggml:q4_0+rot")
    x = gaussian(1, 128)
    x[0, 64:] = 0
    assert (found.k.round_trip(x)[0, 64:] != 0).any()
    assert (found.v.round_trip(x)[0, 64:].abs() < 1e-6).all()


# --- names ------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    some = {"vllm:k8v4", "vllm:4bit_nc+skip", "paper:mse1", "paper:prod8o", "metal:q4_0/q3_0", "lmdeploy:42"}
    assert some | {"ggml:q8_0", "nvfp4", "mxfp4"} < set(rivals.known())
    assert all(found.name == name for name, found in rivals.known().items())
    assert rival(" VLLM:4bit_NC ").name == "vllm:4bit_nc"
    assert rival("turboquant_3bit_nc").name == "vllm:3bit_nc"
    assert rival("turboquant_3bit_nc+skip").name == "vllm:3bit_nc+skip"
    assert rival("metal:q8_0").name == "metal:q8_0/q3_0"
    assert rivals.find("k4v4") is None
    assert rivals.find("turboquant") is None  # kvfold's own default
    assert str(parse_format("k4v4")) == "k4v4"
    assert str(parse_format("paper:mse4")) == "paper:mse4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vllm:5bit_nc", "did you mean 'vllm:4bit_nc' or 'vllm:3bit_nc'"),
        ("paper:mse9", "did you mean 'paper:mse"),
        ("vllm:xyzzy", "unknown format 'vllm:xyzzy'"),
        ("metal:q8_0/q9_0", "metal:q8_0/q8_0"),
        ("nvfp8", "or of other systems: did you mean 'nvfp4'"),
        ("papr:mse4", "'paper:mse4'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fidelity", "--format", "k4v4", text]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("kvfold: error: unknown format")
    assert words in line


# --- the cache --------------------------------------------------------------------------------------------------------


def deep_model(layers: int = 6) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**CONFIGS["llama"], "num_hidden_layers": layers})
    ).eval()


def states(seed: int, tokens: int, size: int = 32) -> torch.Tensor:
    return torch.randn(1, 2, tokens, size, generator=torch.Generator().manual_seed(seed))


def test_skipped_layers_are_exact_and_the_others_are_not() -> None:
    cache = RivalCache(deep_model().config, rival("vllm:3bit_nc+skip"))
    k, v = states(1, 7), states(2, 7)
    for index in range(6):
        keys, values = cache.update(k, v, index)
        if index in (2, 3):
            assert torch.equal(keys, cache.rival.k.round_trip(k))
            assert torch.equal(values, cache.rival.v.round_trip(v))
            assert (keys != k).any()
        else:
            assert torch.equal(keys, k)
            assert torch.equal(values, v)
    assert sorted(cache.rival_layers) == [2, 3]
    assert cache.skipped == {0, 1, 4, 5}
    own = rival("vllm:3bit_nc").bits(32, 32)
    assert cache.bits_per_element() == pytest.approx((2 * own + 4 * 16 * 64) / (6 * 64))
    assert cache.bytes_per_token() == pytest.approx(2 * (2 * own + 4 * 16 * 64) / 8)
    assert "0: DynamicLayer, 1: DynamicLayer, 4:" in repr(cache)


def test_without_skip_every_layer_is_compressed() -> None:
    cache = RivalCache(deep_model().config, rival("vllm:3bit_nc"))
    assert sorted(cache.rival_layers) == list(range(6))
    assert cache.skipped == set()


@pytest.mark.parametrize(
    ("layers", "skipped"),
    [(30, {0, 1, 28, 29}), (5, {0, 1, 3, 4}), (4, {0, 1, 2, 3}), (3, {0, 2}), (2, {0, 1}), (1, set())],
)
def test_which_layers_are_skipped(layers: int, skipped: set[int]) -> None:
    assert rival("vllm:4bit_nc+skip").skipped(layers) == skipped
    assert rival("vllm:4bit_nc").skipped(layers) == set()


def test_a_model_of_which_nothing_would_be_compressed_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"compresses no layer of LlamaConfig: it leaves layers \[0, 1\] alone"
    ):
        RivalCache(tiny("llama").config, rival("vllm:4bit_nc+skip"))


def test_hybrid_models_skip_nothing_and_layers_with_a_window_stay() -> None:
    hybrid = RivalCache(tiny("qwen3_next").config, rival("vllm:4bit_nc+skip"))
    assert (hybrid.skipped, sorted(hybrid.rival_layers)) == (set(), [1])
    windows = RivalCache(tiny("gemma3_text").config, rival("paper:mse4"))
    assert sorted(windows.rival_layers) == [2]
    assert "0: DynamicSlidingWindowLayer" in repr(windows)


def test_queries_see_their_own_token_stored_or_as_it_came() -> None:
    stored = [rival("paper:mse2").k.round_trip(states(seed, n)) for seed, n in ((1, 5), (2, 3), (3, 1))]
    for chunk in ("packed", "exact"):
        layer = RivalLayer(rival("paper:mse2"), chunk)
        for step, (seed, n) in enumerate(((1, 5), (2, 3), (3, 1))):
            keys, _ = layer.update(states(seed, n), states(seed, n))
            own = states(seed, n) if chunk == "exact" and n > 1 else stored[step]
            torch.testing.assert_close(keys, torch.cat([*stored[:step], own], dim=2), rtol=1e-5, atol=1e-5)


def test_the_cache_keeps_the_models_dtype() -> None:
    keys, values = RivalLayer(rival("vllm:4bit_nc"), "packed").update(states(1, 4).bfloat16(), states(2, 4).bfloat16())
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), 500)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("deep-llama"), "llama")
    deep_model().save_pretrained(folder)
    return folder


RIVALS = ("vllm:k8v4", "vllm:3bit_nc", "vllm:3bit_nc+skip", "paper:mse2", "nvfp4")
FORMATS = ("k4v4", *RIVALS, "turboquant_3bit_nc", "k3v3")


@pytest.fixture(scope="module")
def full(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The JSON of one run of rivals between formats of kvfold's."""
    path = tmp_path_factory.mktemp("json") / "fidelity.json"
    argv = [
        "fidelity",
        "--device",
        "cpu",
        "--model",
        model,
        "--text",
        text,
        *WINDOW,
        "--format",
        *FORMATS,
        "--json",
        path,
    ]
    assert cli.main([str(word) for word in argv]) == 0
    return json.loads(path.read_text())


def test_rows(full: Any) -> None:
    rows = {row["format"]: row for row in full["rows"]}
    assert list(rows) == ["none", "k4v4", *RIVALS, "k3v3"]  # the alias is the same format once more
    assert [row["kind"] for row in full["rows"]] == ["noise", "format", *["rival"] * 5, "format"]
    assert full["settings"]["formats"] == list(rows)[1:]
    for name, row in rows.items():
        assert (row["source"] is None) == (row["kind"] != "rival"), name
    kl = {name: row["kl_mean"]["value"] for name, row in rows.items()}
    assert 1e-8 < kl["vllm:k8v4"] < kl["vllm:3bit_nc"] < kl["paper:mse2"]
    assert kl["vllm:3bit_nc+skip"] < kl["vllm:3bit_nc"]
    own = rival("vllm:3bit_nc").bits(32, 32)
    assert rows["vllm:3bit_nc"]["bits_per_element"] == own / 64
    assert rows["vllm:3bit_nc"]["bytes_per_token"] == 6 * 2 * own / 8
    assert rows["vllm:3bit_nc+skip"]["bits_per_element"] == pytest.approx((2 * own / 64 + 4 * 16) / 6)
    assert rows["paper:mse2"]["bytes_per_token"] == 6 * 2 * 2 * (8 + 2)


def test_rivals_between_them_do_not_change_the_others(full: Any, model: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    argv = ["fidelity", "--device", "cpu", "--model", model, "--text", text, *WINDOW, "--format", "k4v4", "k3v3"]
    assert cli.main([str(word) for word in [*argv, "--json", path]]) == 0
    alone = {row["format"]: row for row in json.loads(path.read_text())["rows"]}
    for row in full["rows"]:
        if row["format"] in alone:
            assert row == alone[row["format"]]


def test_figures_are_those_of_decoding_token_by_token(full: Any, model: Path, text: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([[3 + LETTERS.index(letter) for letter in text.read_text()]])
    kl = []
    with torch.no_grad():
        for start in (0, 160, 320):
            window = ids[:, start : start + 160]
            cache = RivalCache(plain.config, rival("paper:mse2"))
            steps = [forward(Subject(plain, None), window[:, i : i + 1], cache) for i in range(160)]
            log_p = torch.log_softmax(plain(window).logits[0].double(), -1)[64:-1]
            log_q = torch.log_softmax(torch.cat(steps).double(), -1)[64:-1]
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    row = next(row for row in full["rows"] if row["format"] == "paper:mse2")
    assert row["kl_mean"]["value"] == pytest.approx(np.mean(kl), rel=1e-3)


def test_chunk_exact_is_closer(
    full: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfold.commands.fidelity.EXACT_CHUNK", 32)
    path = tmp_path / "f.json"
    argv = ["fidelity", "--device", "cpu", "--model", model, "--text", text, *WINDOW, "--chunk", "exact"]
    assert cli.main([str(word) for word in [*argv, "--format", "paper:mse2", "--json", path]]) == 0
    exact = json.loads(path.read_text())["rows"][1]["kl_mean"]["value"]
    packed = next(row for row in full["rows"] if row["format"] == "paper:mse2")["kl_mean"]["value"]
    assert 1e-4 < exact < packed


def test_table_says_that_they_are_simulated(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    many = [name for name in rivals.known() if name.startswith("paper:mse")] + ["nvfp4", "mxfp4", "vllm:4bit_nc+skip"]
    plot = tmp_path / "f.png"
    argv = ["fidelity", "--device", "cpu", "--model", model, "--text", text, "--windows", 1, "--window-tokens", 128]
    assert cli.main([str(word) for word in [*argv, "--format", *many, "k4v4", "--plot", plot]]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert lines["paper:mse4"][1:3] == ["4.500", "432"]
    assert "simulated, not packed" in out
    assert "vllm:4bit_nc+skip: RivalCache(" in out
    assert "simulated in 2 of 6 layers; uncompressed: 0: DynamicLayer" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_heads_that_a_system_cannot_store_are_refused_before_measuring(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["fidelity", "--device", "cpu", "--model", model, "--text", text, *WINDOW, "--format", "k4v4", "metal:q8_0"]
    assert cli.main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "kvfold: error: metal:q8_0/q3_0 stores head sizes 64, 128, 256 and 512, not 32"
    assert "window 1" not in err
