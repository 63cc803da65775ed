"""`kvfold fidelity`: its mathematics against brute force in float64, and the command on tiny random models."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold import KVCache, cli
from kvfold.commands import evaluation
from kvfold.commands import fidelity as command
from kvfold.commands.measure import Subject, load_subject
from kvfold.errors import KVFoldError, ShapeError
from kvfold.eval import bootstrap, fidelity
from kvfold.eval.bootstrap import Interval
from kvfold.eval.fidelity import Bin, Tokens
from kvfold.formats import KVFormat

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tiny_models import CONFIGS, tiny  # noqa: E402  # it needs transformers


def random_logits(seed: int, n: int = 7, vocabulary: int = 33, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))


def targets_of(logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, logits.shape[1], logits.shape[:1], generator=torch.Generator().manual_seed(seed))


def brute_force(p_logits: torch.Tensor, q_logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """Every figure of every token as its definition says, in float64 and one at a time."""
    kl, same, nll = [], [], []
    for p_row, q_row, target in zip(p_logits.double().numpy(), q_logits.double().numpy(), targets, strict=True):
        log_p, log_q = (row - row.max() - math.log(np.exp(row - row.max()).sum()) for row in (p_row, q_row))
        kl.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if math.exp(a) > 0))
        same.append(float(log_p.argmax() == log_q.argmax()))
        nll.append(-log_q[int(target)])
    return {"kl": np.array(kl), "same_top": np.array(same), "nll": np.array(nll)}


def compared(p_logits: torch.Tensor, q_logits: torch.Tensor, targets: torch.Tensor) -> Tokens:
    return fidelity.compare(fidelity.reference(p_logits.clone(), targets), q_logits)


# --- one window -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 100, 1 << 20])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 200.0])
def test_tokens_against_brute_force(monkeypatch: pytest.MonkeyPatch, spread: float, elements: int) -> None:
    monkeypatch.setattr(fidelity, "_BLOCK_ELEMENTS", {"cpu": elements})
    p, q = random_logits(1, spread=spread), random_logits(2, spread=spread)
    targets = targets_of(p)
    expected = brute_force(p, q, targets)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        found = compared(p.to(dtype), q.to(dtype), targets)
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(found, name), values, rtol=tolerance, atol=tolerance * 1e-3)
            assert getattr(found, name).dtype == np.float64
    base = fidelity.reference(p.clone(), targets)
    np.testing.assert_allclose(base.nll, brute_force(q, p, targets)["nll"], rtol=2e-5)


@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(1e-6, 100))
def test_divergence_is_never_negative(seed: int, spread: float, change: float) -> None:
    p = random_logits(seed, spread=spread)
    q = p + random_logits(seed + 1, spread=change)
    found = compared(p, q, targets_of(p))
    assert (found.kl >= 0).all()
    assert np.isfinite(found.kl).all()
    np.testing.assert_allclose(found.kl, brute_force(p, q, targets_of(p))["kl"], rtol=1e-3, atol=1e-6)


@given(st.integers(0, 2**31), st.floats(0.01, 1000))
def test_divergence_of_equal_logits_is_zero(seed: int, spread: float) -> None:
    p = random_logits(seed, spread=spread)
    found = compared(p, p, targets_of(p))
    assert (found.kl == 0).all()
    assert (found.same_top == 1).all()
    np.testing.assert_array_equal(found.nll, fidelity.reference(p.clone(), targets_of(p)).nll)


def test_a_divergence_far_below_float32_comes_out_right() -> None:
    p = random_logits(3, n=5, vocabulary=5000)
    q = p + 1e-4 * random_logits(4, n=5, vocabulary=5000)
    expected = brute_force(p, q, targets_of(p))["kl"]
    assert (expected < 1e-6).all()  # log p itself is only good to 1e-6
    np.testing.assert_allclose(compared(p, q, targets_of(p)).kl, expected, rtol=0.02)


def test_a_constant_added_to_logits_changes_nothing() -> None:
    p = random_logits(5)
    assert (compared(p, p + 3.0, targets_of(p)).kl < 1e-11).all()


def test_logits_of_minus_infinity() -> None:
    p, q = random_logits(6, n=2), random_logits(7, n=2)
    p[:, :3] = q[:, :2] = -math.inf  # both exclude 0 and 1; 2 is only possible in q
    kept = brute_force(p[:, 2:], q[:, 2:], torch.zeros(2, dtype=torch.int64))["kl"]
    np.testing.assert_allclose(compared(p, q, torch.full((2,), 5)).kl, kept, rtol=1e-5)
    assert np.isinf(compared(q, p, torch.full((2,), 5)).kl).all()


def test_the_reference_takes_no_memory_of_its_own() -> None:
    for dtype in (torch.float32, torch.float64):
        logits = random_logits(8).to(dtype)
        assert fidelity.reference(logits, targets_of(logits)).log_probs.data_ptr() == logits.data_ptr()
    logits = random_logits(8).bfloat16()
    base = fidelity.reference(logits, targets_of(logits))
    assert base.log_probs.dtype == torch.float32
    assert torch.equal(logits, random_logits(8).bfloat16())
    torch.testing.assert_close(base.log_probs, torch.log_softmax(logits.float(), dim=-1))
    assert (fidelity.compare(base, logits).kl == 0).all()


def test_wrong_shapes_are_refused() -> None:
    logits = random_logits(9)
    with pytest.raises(ShapeError, match=r"not \[7, 33\] and \[6\]"):
        fidelity.reference(logits, targets_of(logits)[:-1])
    with pytest.raises(ShapeError, match="n from 1"):
        fidelity.reference(logits[:0], targets_of(logits)[:0])
    with pytest.raises(ShapeError, match=r"logits are \[6, 33\], and the reference is \[7, 33\]"):
        fidelity.compare(fidelity.reference(logits.clone(), targets_of(logits)), logits[:-1])


# --- all windows ------------------------------------------------------------------------------------------------------


def windows_of(seed: int, windows: int = 6, n: int = 40) -> tuple[list[Tokens], list[np.ndarray]]:
    """Random tokens that look like real ones: skewed divergences, windows that differ."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.5, 2, size=(windows, 1))
    kl, nll = level * rng.exponential(0.05, size=(windows, n)), level + rng.exponential(2.0, size=(windows, n))
    tokens = [Tokens(kl[i], (rng.random(n) < 0.8).astype(float), nll[i] + kl[i]) for i in range(windows)]
    return tokens, list(nll)


def test_draws() -> None:
    draws = bootstrap.draw(7, 300, seed=3)
    assert draws.shape == (300, 7)
    assert (draws.sum(axis=1) == 7).all()
    assert (draws >= 0).all()
    np.testing.assert_array_equal(draws, bootstrap.draw(7, 300, seed=3))
    assert (draws != bootstrap.draw(7, 300, seed=4)).any()
    assert bootstrap.draw(10).shape == (1000, 10)
    np.testing.assert_allclose(bootstrap.draw(10, 20000).mean(axis=0), 1, atol=0.05)


def test_summary_against_brute_force() -> None:
    tokens, base = windows_of(0)
    draws = bootstrap.draw(len(tokens), 200)
    found = fidelity.summarise(tokens, base, draws)
    assert tuple(found) == fidelity.METRICS

    def figures(chosen: list[int]) -> list[float]:
        kl, same, nll = (
            np.concatenate([getattr(tokens[i], name) for i in chosen]) for name in ("kl", "same_top", "nll")
        )
        plain = np.concatenate([base[i] for i in chosen])
        ppl = np.exp(nll.mean())
        quantiles = (np.median(kl), np.quantile(kl, 0.999))
        return [kl.mean(), *quantiles, same.mean(), ppl, ppl / np.exp(plain.mean()) - 1]

    resampled = np.array([figures([i for i, count in enumerate(row) for _ in range(count)]) for row in draws])
    lows, highs = np.quantile(resampled, [0.025, 0.975], axis=0)
    expected = [Interval(*map(float, row)) for row in zip(figures(list(range(6))), lows, highs, strict=True)]
    for figure, reference in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(figure, reference, rtol=1e-10)
    plain = fidelity.perplexity(base, draws)
    assert plain.value == pytest.approx(np.exp(np.concatenate(base).mean()))
    change = found["perplexity_change"]
    assert found["perplexity"].value == pytest.approx(plain.value * (1 + change.value))


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 50))
def test_intervals_hold_the_mean_and_are_ordered(seed: int, windows: int, n: int) -> None:
    tokens, base = windows_of(seed, windows, n)
    found = fidelity.summarise(tokens, base, bootstrap.draw(windows, 400, seed))
    for figure in found.values():
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.high
    for name in ("kl_mean", "top1", "perplexity", "perplexity_change"):
        value, low, high = found[name]
        assert low is not None
        assert high is not None
        assert low - 1e-12 <= value <= high + 1e-12
    assert found["kl_median"].value <= found["kl_p999"].value


def test_windows_that_are_equal_have_no_spread_and_one_window_no_interval() -> None:
    tokens, base = windows_of(1, windows=1)
    for figure in fidelity.summarise(tokens, base, bootstrap.draw(1)).values():
        assert (figure.low, figure.high) == (None, None)
    for figure in fidelity.summarise(tokens * 5, base * 5, bootstrap.draw(5)).values():
        assert (figure.low, figure.high) == (pytest.approx(figure.value), pytest.approx(figure.value))


@pytest.mark.parametrize("windows", [10, 30])
def test_intervals_cover_the_truth_about_as_often_as_they_say(windows: int) -> None:
    rng = np.random.default_rng(windows)
    draws = bootstrap.draw(windows)
    hits = 0
    for _ in range(200):
        kl = rng.normal(1.0, 0.2, size=(windows, 1))
        figure = fidelity.summarise([Tokens(row, row, row) for row in kl], list(kl), draws)["kl_mean"]
        hits += figure.low <= 1.0 <= figure.high  # type: ignore[operator]
    assert 0.83 <= hits / 200 <= 0.99


@given(st.integers(1, 9000))
def test_bins_cover_every_position_once(n: int) -> None:
    tokens = [Tokens(np.arange(n, dtype=float), np.ones(n), np.ones(n))]
    bins = fidelity.by_position(tokens, bootstrap.draw(1, 2))
    assert 1 <= len(bins) <= fidelity.MAX_BINS
    assert (bins[0].first, bins[-1].last) == (64, 64 + n - 1)
    assert all(one.last + 1 == other.first for one, other in pairwise(bins))
    for item in bins:  # the KL of position p was p - 64
        assert item.kl.value == pytest.approx((item.first + item.last) / 2 - 64)


def test_bins_have_intervals() -> None:
    tokens, base = windows_of(2, windows=8, n=300)
    draws = bootstrap.draw(8)
    bins = fidelity.by_position(tokens, draws)
    assert (bins[0], bins[1].first, bins[1].last) == (Bin(64, 95, bins[0].kl), 96, 127)
    sizes = [item.last - item.first + 1 for item in bins]
    mean = sum(size * item.kl.value for size, item in zip(sizes, bins, strict=True)) / 300
    assert mean == pytest.approx(fidelity.summarise(tokens, base, draws)["kl_mean"].value)
    assert all(item.kl.low <= item.kl.value <= item.kl.high for item in bins)  # type: ignore[operator]


# --- the command ------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
WINDOW = ("--windows", 3, "--window-tokens", 160)


def save(folder: Path, model_type: str, bos: bool = False) -> Path:
    """A tiny model of ``tiny_models`` in a folder, with a tokenizer of letters."""
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<bos>", "<eos>", *LETTERS])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    if bos:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    tiny(model_type).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny-llama"), "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 letters: three windows of 160."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), 500)))
    return path


@pytest.fixture
def kvfold(kvfold_on_cpu: Any) -> Any:
    return kvfold_on_cpu


@pytest.fixture(scope="module")
def full(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The JSON of one run with formats from exact to 2 bits."""
    path = tmp_path_factory.mktemp("json") / "fidelity.json"
    formats = ["kf32vf32", "k8v8", "k4v4", "k4v4+sinks4+tail32", "k3v3", "k2v2", "k3v3"]
    argv = ["fidelity", "--device", "cpu", "--model", model, "--text", text, *WINDOW, "--format", *formats]
    argv += ["--json", path]
    assert cli.main([str(word) for word in argv]) == 0
    return json.loads(path.read_text())


def test_exact_is_exact_and_more_bits_are_better(full: Any) -> None:
    rows = {row["format"]: row for row in full["rows"]}
    assert list(rows) == ["none", "kf32vf32", "k8v8", "k4v4", "k4v4+sinks4+tail32", "k3v3", "k2v2"]
    kl = {name: row["kl_mean"]["value"] for name, row in rows.items()}
    assert kl["none"] < 1e-8
    assert kl["kf32vf32"] < 1e-8
    assert rows["kf32vf32"]["top1"]["value"] == 1
    assert 1e-7 < kl["k8v8"] < kl["k4v4"] / 5
    assert kl["k4v4"] < kl["k3v3"] < kl["k2v2"]
    assert kl["k4v4+sinks4+tail32"] < kl["k4v4"]
    assert rows["k8v8"]["top1"]["value"] > rows["k2v2"]["top1"]["value"]
    for name, row in rows.items():
        change = row["perplexity"]["value"] / full["baseline"]["perplexity"]["value"] - 1
        assert row["perplexity_change"]["value"] == pytest.approx(change, abs=1e-9), name


def test_bits_are_the_formats_own_and_the_memory_agrees(full: Any) -> None:
    for row in full["rows"][1:]:
        fmt = KVFormat.parse(row["format"])
        assert row["bits_per_element"] == fmt.bits_per_element(32)
        elements, capacity = 2 * 2 * 64, 192  # layers, heads, K and V; three pages of 64
        exact = 2 * 2 * fmt.exact_bytes(32, itemsize=4) / capacity
        assert row["bytes_per_token"] == row["bits_per_element"] * elements / 8 + exact
    assert (full["rows"][0]["bits_per_element"], full["rows"][0]["bytes_per_token"]) == (None, None)


def test_json(full: Any, kvfold: Any, text: Path) -> None:
    assert (full["measured_windows"], full["scored_tokens"]) == (3, 3 * (160 - 64 - 1))
    settings = full["settings"]
    assert settings["text"]["file"] == str(text)
    assert settings["text"]["tokens"] == 500
    assert (settings["windows"], settings["window_tokens"], settings["chunk"]) == (3, 160, "packed")
    assert (settings["dtype"], settings["seed"], settings["begins_with_bos"]) == ("float32", 0, False)
    assert full["command"].startswith("kvfold")
    assert full["environment"]["torch"]
    for row in full["rows"]:
        assert (row["positions"][0]["first"], row["positions"][-1]["last"]) == (64, 158)
        for name in fidelity.METRICS:
            assert list(row[name]) == ["value", "low", "high"]
    assert [row["kind"] for row in full["rows"]] == ["noise", *["format"] * 6]
    usage = kvfold("fidelity", "--help").out
    for key in [*full, *full["rows"][0], *full["rows"][0]["positions"][0], "value", "low", "high"]:
        assert key in usage, key


def test_figures_are_those_of_a_model_run_by_hand(full: Any, model: Path, text: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([[3 + LETTERS.index(letter) for letter in text.read_text()]])
    kl, nll, nll_plain, same = [], [], [], []
    for start in (0, 160, 320):
        window = ids[:, start : start + 160]
        with torch.no_grad():
            base = plain(window).logits[0, 64:-1]
        cache = KVCache.for_model(plain, "k2v2", chunk="packed")
        with torch.no_grad():  # one token after the other, as decoding does
            steps = [evaluation.forward(Subject(plain, None), window[:, i : i + 1], cache) for i in range(160)]
        found = brute_force(base, torch.cat(steps)[64:-1], window[0, 65:])
        kl.append(found["kl"])
        same.append(found["same_top"])
        nll.append(found["nll"])
        nll_plain.append(brute_force(base, base, window[0, 65:])["nll"])
    row = next(row for row in full["rows"] if row["format"] == "k2v2")
    assert row["kl_mean"]["value"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert row["kl_median"]["value"] == pytest.approx(np.median(kl), rel=1e-3)
    assert row["kl_p999"]["value"] == pytest.approx(np.quantile(kl, 0.999), rel=1e-3)
    assert row["top1"]["value"] == pytest.approx(np.mean(same), abs=0.005)
    assert row["perplexity"]["value"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert full["baseline"]["perplexity"]["value"] == pytest.approx(np.exp(np.mean(nll_plain)), rel=1e-4)


def test_table_and_progress(kvfold: Any, model: Path, text: Path) -> None:
    result = kvfold("fidelity", "--model", model, "--text", text, *WINDOW, "--format", "k4v4", "--format", "k2v2")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == (
        f"{model}: 3 windows of 160 tokens of letters.txt; 285 tokens are scored, from position 64 of each window on"
    )
    lines = {line.split("  ")[0]: line.split() for line in result.out.splitlines() if line}
    assert lines["k4v4"][1:3] == ["4.500", "144"]
    assert lines["noise floor"][-3] == "100.0%"
    assert "none" in lines
    assert result.out.count("..") == 1 + 3 * 6  # an interval below every figure
    assert "from 3 windows they are too narrow" in result.out
    steps = [f"window {i} of 3: {name}" for i in (1, 2, 3) for name in ("none", "noise floor", "k4v4", "k2v2")]
    assert result.err.splitlines() == [f"loading {model}", "trying k4v4", "trying k2v2", *steps]


def test_one_window_has_no_intervals(kvfold: Any, model: Path, text: Path) -> None:
    argv = ("--windows", 1, "--window-tokens", 128, "--format", "k4v4")
    result = kvfold("fidelity", "--model", model, "--text", text, *argv)
    assert result.code == 0, result.err
    assert ".." not in result.out
    assert "one window has none" in result.out


@pytest.mark.parametrize("model_type", sorted(set(CONFIGS) - {"llama"}))
def test_other_models(kvfold: Any, tmp_path: Path, text: Path, model_type: str) -> None:
    folder = save(tmp_path / model_type, model_type, bos=True)
    path = tmp_path / "fidelity.json"
    argv = ("--windows", 2, "--window-tokens", 128, "--format", "kf32vf32", "k8v8", "k2v2", "--json", path)
    result = kvfold("fidelity", "--model", folder, "--text", text, *argv)
    assert result.code == 0, result.err
    found = json.loads(path.read_text())
    assert found["settings"]["begins_with_bos"]
    kl = [row["kl_mean"]["value"] for row in found["rows"]]
    assert kl[1] < 1e-6
    assert kl[1] < kl[2] < kl[3]
    left = [row["cache"] for row in found["rows"][1:] if "uncompressed:" in row["cache"]]
    assert all(cache in result.out for cache in left)
    assert bool(left) == (model_type in ("gemma2", "gemma3_text", "gpt_oss", "qwen3_next"))


def test_every_window_begins_with_the_first_token_where_the_model_wants_it(tmp_path: Path, text: Path) -> None:
    subject = load_subject(str(save(tmp_path / "with", "llama", bos=True)))
    cut = command.cut_windows(subject, text.read_text(), text, 3, 160)
    plain = command.cut_windows(load_subject(str(save(tmp_path / "without", "llama"))), text.read_text(), text, 3, 160)
    assert (cut.bos, plain.bos, cut.available) == (True, False, 500)
    assert cut.ids[:, 0].tolist() == [1, 1, 1]
    assert cut.ids[:, 1:].flatten().tolist() == plain.ids.flatten().tolist()[: 3 * 159]  # no token twice, none left out


def test_chunk_exact_is_measured_in_chunks(
    kvfold: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "EXACT_CHUNK", 32)
    argv = ("--model", model, "--text", text, *WINDOW, "--format", "k2v2", "--json", tmp_path / "f.json")
    kl = []
    for chunk in ("exact", "packed"):
        result = kvfold("fidelity", *argv, "--chunk", chunk)
        assert result.code == 0, result.err
        assert ("chunk=exact" in result.out) == (chunk == "exact")
        kl.append(json.loads((tmp_path / "f.json").read_text())["rows"][1]["kl_mean"]["value"])
    assert 1e-4 < kl[0] < kl[1]


def test_plot(kvfold: Any, model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for windows in (1, 2):
        path = tmp_path / f"{windows}.png"
        argv = ("--windows", windows, "--window-tokens", 128, "--format", "k4v4", "kf32vf32", "--plot", path)
        result = kvfold("fidelity", "--model", model, "--text", text, *argv)
        assert result.code == 0, result.err
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interruption_keeps_what_was_measured(
    kvfold: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, noise = [], command._noise

    def interrupted(*args: Any) -> Tokens:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noise(*args)

    monkeypatch.setattr(command, "_noise", interrupted)
    path = tmp_path / "f.json"
    argv = ("--model", model, "--text", text, *WINDOW, "--format", "k4v4", "--json", path)
    result = kvfold("fidelity", *argv)
    assert (result.code, result.out) == (130, "")
    found = json.loads(path.read_text())
    assert (found["measured_windows"], found["settings"]["windows"], len(found["rows"])) == (2, 3, 2)


def test_running_out_of_memory_is_an_error_with_a_way_out(
    kvfold: Any, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(command, "baseline", full)
    result = kvfold("fidelity", "--model", model, "--text", text, *WINDOW, "--format", "k4v4")
    assert result.code == 1
    assert "Tried to allocate 2 GiB.; give a smaller --window-tokens, or --device cpu" in result.err


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(KVFoldError, match=r"k4v4: window 2 .* not finite"):
        command.require_finite(np.array([1.0, math.nan]), "k4v4", 1)


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with evaluation.progress(2) as step:
        step("window 1 of 1: none")
        step("window 1 of 1: k4v4")
    assert "2/2" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2(kvfold: Any, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    argv = ("--windows", 2, "--window-tokens", 512, "--format", "kf32vf32", "k8v8", "k4v4", "k2v2", "--json", path)
    result = kvfold("fidelity", *argv)
    assert result.code == 0, result.err
    _, exact, *kl = (row["kl_mean"]["value"] for row in json.loads(path.read_text())["rows"])
    assert exact < 1e-9
    assert kl[0] < 0.002 < kl[1] < 0.1 < kl[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(kvfold: Any, full: Any, model: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    argv = ("--device", "cuda", *WINDOW, "--format", "k8v8", "k4v4", "k2v2", "--json", path)
    result = kvfold("fidelity", "--model", model, "--text", text, *argv)
    assert result.code == 0, result.err
    found = json.loads(path.read_text())
    on_cpu = {row["format"]: row["kl_mean"]["value"] for row in full["rows"]}
    assert found["environment"]["gpu"]
    for row in found["rows"][1:]:
        assert row["kl_mean"]["value"] == pytest.approx(on_cpu[row["format"]], rel=0.1)


# --- refused before anything is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--format k9v9", "unknown format 'k9v9'"),
        ("--format k4v4 k4qv4q", "not built yet"),
        ("--format 2.5+mean", "not built yet"),
        ("--text /nowhere/text.txt", "cannot use /nowhere/text.txt: No such file"),
        ("--json /nowhere/f.json", "there is no folder /nowhere"),
        ("--plot /nowhere/f.png", "there is no folder /nowhere"),
        ("--json /tmp", "/tmp is a folder"),
        ("--windows 0", "--windows: '0'"),
        ("--window-tokens 100", "100 is too short, because only positions from 64 on are scored: give 128 or more"),
        ("--device gpu", "'gpu' is not one of auto, cpu, cuda"),
        ("--device mps", "'mps' is not one of auto, cpu, cuda"),
        ("--device cuda:99", "CUDA devices; give --device auto or cpu"),
        ("--chunk whole", "--chunk"),
        ("--page-size 48", "choose from 16, 32, 64"),
        ("--model ./nowhere", "there is no such directory"),
    ],
)
def test_wrong_usage(kvfold: Any, argv: str, words: str) -> None:
    result = kvfold("fidelity", *argv.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("kvfold: error: ")
    assert words in result.err
    assert "trying" not in result.err


def test_a_text_that_is_too_short(kvfold: Any, model: Path, text: Path) -> None:
    result = kvfold("fidelity", "--model", model, "--text", text, "--windows", 4, "--window-tokens", 160)
    assert result.code == 2
    assert f"{text} has 500 tokens, and 4 windows of 160 that do not overlap take 640" in result.err
    assert "give a longer text with --text FILE, or --windows 3" in result.err
    excerpt = kvfold("fidelity", "--model", model, "--windows", 1000, "--window-tokens", 256)
    assert "moby_dick_excerpt.txt has " in excerpt.err
    result = kvfold("fidelity", "--model", model, "--text", text, "--window-tokens", 256)
    assert result.err.endswith("give a longer text with --text FILE, or --windows 1\n")
    for letters, end in ((130, "with --text FILE, or --windows 1 --window-tokens 130\n"), (3, "with --text FILE\n")):
        short = text.parent / "short.txt"
        short.write_text("a" * letters)
        result = kvfold("fidelity", "--model", model, "--text", short, *WINDOW)
        assert f"has {letters} tokens" in result.err
        assert result.err.endswith(end)


def test_a_window_longer_than_the_context(kvfold: Any, model: Path, text: Path) -> None:
    result = kvfold("fidelity", "--model", model, "--text", text, "--windows", 1, "--window-tokens", 300)
    assert result.code == 2
    assert "windows of 300 tokens are longer than the model's context of 256" in result.err


def test_a_text_that_is_not_text(kvfold: Any, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    result = kvfold("fidelity", "--text", tmp_path / "binary")
    assert result.code == 2
    assert "is not UTF-8 text" in result.err


def test_a_format_that_the_heads_are_too_small_for(kvfold: Any, tmp_path: Path, text: Path) -> None:
    save(tmp_path, "llama")
    config = transformers.LlamaConfig(**{**CONFIGS["llama"], "head_dim": 4, "hidden_size": 16})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = kvfold("fidelity", "--model", tmp_path, "--text", text, *WINDOW, "--format", "kf32vf32", "k4v4")
    assert result.code == 2
    assert "head size 4 is too small for k4v4" in result.err
    assert "window 1" not in result.err


def test_without_the_excerpt(kvfold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "TEXT", Path("/nowhere/excerpt.txt"))
    result = kvfold("fidelity")
    assert result.code == 2
    assert "give --text FILE" in result.err


def test_a_plot_of_an_unknown_kind(kvfold: Any) -> None:
    pytest.importorskip("matplotlib")
    for name in ("f.xyz", "f"):
        result = kvfold("fidelity", "--plot", name)
        assert result.code == 2
        assert f"--plot: {name} has none of the endings" in result.err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_a_plot_without_matplotlib(kvfold: Any) -> None:
    assert "pip install 'kvfold[plot]'" in kvfold("fidelity", "--plot", "f.png").err
