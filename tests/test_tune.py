"""`kvfold tune`: the allocation against brute force, and the command on tiny random models."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.commands import tune as command
from kvfold.errors import FormatError, NotBuiltError
from kvfold.eval import tune
from kvfold.eval.tune import Allocation, BudgetError, Option, frontier, pieces, widest
from kvfold.formats import KVFormat
from kvfold.layerformats import ModelFormat
from kvfold.modelshape import FULL, LayerGroup, ModelShape
from kvfold.planner import plan

# --- the allocation ---------------------------------------------------------------------------------------------------

LOSSES = st.floats(-1, 10, allow_nan=False)
ITEMS = st.lists(
    st.lists(st.builds(Option, st.integers(0, 12), LOSSES), min_size=1, max_size=4), min_size=0, max_size=5
)


def allocate(items: list[list[Option]], budget: int) -> Allocation:
    return frontier(items, budget)[-1]


def brute_force(items: list[list[Option]], budget: int) -> float | None:
    """The least loss within the budget, None if nothing fits."""
    fits = [
        sum(option.loss for option in chosen)
        for chosen in itertools.product(*items)
        if sum(option.cost for option in chosen) <= budget
    ]
    return min(fits, default=None)


@given(ITEMS, st.integers(0, 60))
def test_the_allocation_is_the_best_within_the_budget(items: list[list[Option]], budget: int) -> None:
    best = brute_force(items, budget)
    if best is None:
        with pytest.raises(BudgetError, match=f"the budget is {budget}"):
            allocate(items, budget)
        return
    found = allocate(items, budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(best, abs=1e-9)
    chosen = [options[choice] for options, choice in zip(items, found.choices, strict=True)]
    assert found.cost == sum(option.cost for option in chosen)
    assert found.loss == pytest.approx(sum(option.loss for option in chosen), abs=1e-9)


@given(ITEMS, st.integers(0, 60), st.integers(0, 20))
def test_a_larger_budget_loses_no_more(items: list[list[Option]], budget: int, more: int) -> None:
    if brute_force(items, budget) is None:
        return
    assert allocate(items, budget + more).loss <= allocate(items, budget).loss + 1e-12


@given(ITEMS, st.integers(0, 60))
def test_the_frontier_is_what_smaller_budgets_would_give(items: list[list[Option]], budget: int) -> None:
    if brute_force(items, budget) is None:
        return
    points = frontier(items, budget)
    assert [point.cost for point in points] == sorted({point.cost for point in points})
    assert all(one.loss > other.loss for one, other in itertools.pairwise(points))
    for point in points:
        assert point.loss == pytest.approx(brute_force(items, point.cost), abs=1e-9)
        assert allocate(items, point.cost).loss == pytest.approx(point.loss, abs=1e-9)
    assert frontier(items, budget) == points


def test_bits_go_where_they_help_most() -> None:
    """Four layers whose loss falls to a quarter with every bit: the more sensitive, the more bits."""
    items = [[Option(bits, scale * 4.0**-bits) for bits in (2, 3, 4, 8)] for scale in (1, 4, 16, 64)]
    assert allocate(items, 11).choices == (0, 0, 1, 2)
    assert allocate(items, 8).choices == (0, 0, 0, 0)
    assert allocate(items, 32).choices == (3, 3, 3, 3)
    assert allocate(items, 999).cost == 32
    assert allocate([], 0).choices == ()


def test_of_equals_the_first_wins() -> None:
    same = [[Option(1, 0.5), Option(1, 0.5), Option(2, 0.5)]] * 3
    assert allocate(same, 6).choices == (0, 0, 0)


def test_many_layers_take_no_time() -> None:
    rng = np.random.default_rng(0)
    scales = rng.lognormal(size=160)
    items = [[Option(64 * (16 * bits + 2), scale * 4.0**-bits) for bits in (2, 3, 4, 5, 8)] for scale in scales]
    budget = sum(options[0].cost for options in items) * 3 // 2
    found = allocate(items, budget)
    assert budget - 64 * 16 < found.cost <= budget


@given(
    st.lists(st.tuples(st.integers(1, 9), st.tuples(st.integers(0, 5), st.integers(0, 5))), max_size=8),
    st.integers(0, 10),
)
def test_whatever_is_left_out_is_beaten_by_what_is_measured(sizes: list[Any], budget: int) -> None:
    kept = widest(sizes, budget)
    assert kept == sorted(set(kept))
    within = [place for place, (cost, _) in enumerate(sizes) if cost <= budget]
    assert set(kept) <= set(within)
    assert bool(kept) == bool(within)
    for place in within:
        errors = sizes[place][1]
        assert any(sizes[one][1][0] <= errors[0] and sizes[one][1][1] <= errors[1] for one in kept)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_pieces_are_means_of_neighbours(lengths: list[int]) -> None:
    windows = [np.arange(length, dtype=float) for length in lengths]
    means = pieces(windows)
    assert len(means) == sum(max(1, length // tune.BLOCK) for length in lengths)
    if len(lengths) == 1 and lengths[0] % tune.BLOCK == 0:
        assert means.mean() == pytest.approx(windows[0].mean())


# --- what is to be decided --------------------------------------------------------------------------------------------

LAYERS = {index: LayerGroup(FULL, 1, 2, 64, 64) for index in (0, 2, 3)}


def task(bits: str = "3.5", sides: tuple[str, ...] = command.SIDES, options: tuple[str, ...] = ()) -> command.Task:
    return command.Task.of(command.make_candidates(sides, options), LAYERS, Fraction(bits), 64)


@pytest.mark.parametrize(
    ("bits", "sides", "names"),
    [
        ("3.5", ("2", "3", "4", "5", "8"), ["k2v4", "k3v3", "k4v2"]),
        ("3.25", ("2", "3", "4"), ["k2v4", "k3v3", "k4v2"]),
        ("3.24", ("2", "3", "4"), ["k2v3", "k3v2"]),
        ("2.25", ("2", "3"), ["k2v2"]),
        ("3.25", ("2t", "2", "3t", "3"), ["k3tv3t"]),
        ("99/4", ("4", "f8", "8"), ["k8v8"]),
    ],
)
def test_candidates_are_the_widest_within_the_budget(bits: str, sides: tuple[str, ...], names: list[str]) -> None:
    assert [str(fmt) for fmt in task(bits, sides).candidates] == names


def test_options_are_those_of_all_formats_and_their_bytes_count() -> None:
    one = task("3.34", ("2", "3", "4"), ("mean", "+sinks4"))
    assert {str(fmt) for fmt in one.candidates} == {f"{name}+mean+sinks4" for name in ("k2v4", "k3v3", "k4v2")}
    assert str(one.format(one.k_sides[2], one.v_sides[0])) == "k4v2+mean+sinks4"
    assert {str(fmt) for fmt in task("3.32", ("2", "3", "4"), ("mean",)).candidates} == {"k2v3+mean", "k3v2+mean"}
    alone = one.alone(2, "k", KVFormat.parse("k3v4+mean+sinks4"))
    assert (str(alone.format), alone.skipped) == ("k3vf32+mean+sinks4", (0, 3))
    assert str(one.alone(2, "v", KVFormat.parse("k3v4+mean+sinks4")).format) == "kf32v4+sinks4"


@pytest.mark.parametrize("options", [(), ("mean",)])
def test_costs_of_options_add_up_to_the_bytes_of_the_format(options: tuple[str, ...]) -> None:
    one = task("5", options=options)
    best = one.candidates[0]
    alone = {(layer, which): 0.1 for layer in LAYERS for which in "kv"}
    items = one.items(best, alone)
    assert len(items) == 2 * len(LAYERS)
    rng = np.random.default_rng(0)
    for _ in range(20):
        choices = rng.integers(0, 5, size=len(items)).tolist()
        fmt = one.chosen(choices)
        cost = sum(options[choice].cost for options, choice in zip(items, choices, strict=True))
        assert cost == fmt.page_bytes(LAYERS, 64)
    for options_of, which in zip(items, "kv" * len(LAYERS), strict=True):
        sides = one.k_sides if which == "k" else one.v_sides
        measured = options_of[sides.index(getattr(best, which))]
        assert measured.loss == pytest.approx(0.1)  # what was measured is taken as it is
        assert [option.loss for option in options_of] == sorted((o.loss for o in options_of), reverse=True)


@pytest.mark.parametrize(
    ("argv", "error", "says"),
    [
        ((("2", "9"), ()), FormatError, "unknown format 'k2v9'"),
        ((("2", "3q"), ()), NotBuiltError, "not built"),
        ((("4", "bf16"), ()), command.UsageError, "lose nothing that could be weighed"),
        ((("4",), ("mane",)), FormatError, "unknown option 'mane'"),
        ((("f8",), ("mean",)), FormatError, "leave \\+mean out"),
        ((("3@0=4",), ()), command.UsageError, "'3@0=4' names layers, which tune chooses"),
        ((("3",), ("mean@0=k4v4",)), command.UsageError, "'mean@0=k4v4' names layers"),
    ],
    ids=str,
)
def test_sides_and_options_that_do_not_exist(argv: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        command.make_candidates(*argv)


def test_a_budget_below_the_smallest_format_is_refused() -> None:
    with pytest.raises(command.UsageError, match=r"2\.2 is below the 2\.25 of k2v2.*--bits 2\.25 or more"):
        task("2.2")


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "33", "", "1/0"])
def test_bits_are_a_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a number of bits"):
        command.bits(text)


def test_bits_are_exact() -> None:
    assert command.bits("3.1") == Fraction(31, 10)


# --- the command ------------------------------------------------------------------------------------------------------

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tiny_models import CONFIGS  # noqa: E402  # it needs transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
WINDOWS = ("--windows", 1, "--held-out", 2, "--window-tokens", 200)
LAST = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, of which the last hardly matters."""
    folder = tmp_path_factory.mktemp("tune")
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<bos>", "<eos>", *LETTERS])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(CONFIGS["llama"] | {"num_hidden_layers": LAST + 1}))
    made = transformers.LlamaForCausalLM(config)
    made.model.layers[LAST].self_attn.o_proj.weight.data *= 0.01
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), 700)))
    return path


@pytest.fixture
def tuned(kvfold_on_cpu: Any, model: Path, text: Path, tmp_path: Path) -> Any:
    """What one run printed, and its JSON."""

    def run(*argv: object, file: str = "tune.json") -> tuple[Any, Any]:
        path = tmp_path / file
        result = kvfold_on_cpu("tune", "--model", model, "--text", text, *WINDOWS, *argv, "--json", path)
        return result, json.loads(path.read_text()) if path.exists() else None

    return run


def test_formats_of_single_layers_are_proposed_where_they_win(tuned: Any, model: Path) -> None:
    result, found = tuned("--bits", "4.5")
    assert result.code == 0, result.err
    proposed = ModelFormat.parse(result.out.strip())
    assert result.out == f"{proposed}\n"
    assert found["chosen"]["by_layer"] is True
    assert found["chosen"]["format"] == str(proposed) == found["allocation"]["format"]
    assert ModelFormat.parse(found["chosen"]["object"]) == proposed
    # the layer that hardly matters has no more bits than any other
    widths = {layer: proposed.layer(layer).k.bits + proposed.layer(layer).v.bits for layer in range(LAST + 1)}
    assert widths[LAST] == min(widths.values()) < max(widths.values())
    loss = {row["layer"]: row["k"] + row["v"] for row in found["layers"]}
    assert loss[LAST] == min(loss.values())
    shape = ModelShape.from_config(str(model))
    bits = plan(shape, 2**20, 64, [proposed])[-1].bits_per_element
    assert found["chosen"]["bits"] == pytest.approx(bits)
    assert bits <= 4.5
    difference = found["held_out"]["difference"]
    assert difference["high"] < 0
    changed = found["held_out"]["allocation"]["value"] - found["held_out"]["uniform"]["value"]
    assert difference["value"] == pytest.approx(changed)
    assert found["held_out"]["pieces"] == 2 * 2
    points = found["frontier"]
    assert points[-1]["bits"] == pytest.approx(bits)
    assert [point["bits"] for point in points] == sorted(point["bits"] for point in points)
    uniform = {row["format"]: row for row in found["uniform"]}
    assert min(row["kl"] for row in uniform.values()) > found["allocation"]["kl"] > 0
    for said in ("by layer", "K alone in", "held out", "beyond its interval"):
        assert said in result.err


def test_a_run_repeats_to_the_bit(tuned: Any) -> None:
    (one, first), (other, second) = (tuned("--bits", "4", "--sides", "2", "3", "4", file=f"{i}.json") for i in range(2))
    assert one.out == other.out
    for key in ("uniform", "layers", "frontier", "allocation", "held_out", "chosen"):
        assert first[key] == second[key]


def test_uniform_measures_no_layer(tuned: Any) -> None:
    result, found = tuned("--bits", "4.25", "--uniform")
    assert result.code == 0, result.err
    best = min(found["uniform"], key=lambda row: row["kl"])
    assert result.out.strip() == best["format"] == found["chosen"]["format"]
    assert (found["layers"], found["frontier"], found["allocation"], found["held_out"]) == ([], [], None, None)
    assert found["chosen"]["by_layer"] is False
    assert "layer" not in result.err.split("Proposed")[0]


def test_where_all_fits_there_is_nothing_to_choose(tuned: Any) -> None:
    result, found = tuned("--bits", "16", "--sides", "4", "8")
    assert (result.code, result.out) == (0, "k8v8\n")
    assert found["layers"] == []
    assert "nothing to choose" in found["chosen"]["reason"]


def test_formats_of_single_layers_that_do_not_win_are_not_proposed(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = command._check
    monkeypatch.setattr(command, "_check", lambda uniform, allocation: check(allocation, uniform))
    result, found = tuned("--bits", "4.5")
    assert result.code == 0, result.err
    assert ModelFormat.parse(result.out.strip()).uniform
    assert found["held_out"]["difference"]["low"] > 0
    assert not found["chosen"]["by_layer"]
    assert found["allocation"]["format"] != found["chosen"]["format"]
    assert "not better beyond doubt" in result.err


def test_an_allocation_that_is_the_best_uniform_format_needs_no_check(tuned: Any) -> None:
    """The budget is that of the smallest format, so that no layer can have more bits."""
    result, found = tuned("--bits", "4.5", "--sides", "4", "8")
    assert (result.code, result.out) == (0, "k4v4\n")
    assert found["allocation"]["format"] == "k4v4"
    assert found["held_out"] is None
    assert "no allocation to single layers promises more" in found["chosen"]["reason"]


def test_the_proposal_is_what_other_commands_take(tuned: Any, kvfold: Any, model: Path, text: Path) -> None:
    result, _ = tuned("--bits", "4.5", "--sides", "2", "4", "8")
    fmt = result.out.strip()
    assert kvfold("plan", "--model", model, "--memory", "1MiB", "--format", fmt).code == 0
    argv = ("--model", model, "--text", text, "--windows", 1, "--window-tokens", 200, "--device", "cpu")
    measured = kvfold("fidelity", *argv, "--format", fmt)
    assert measured.code == 0, measured.err
    assert fmt in measured.out
    assert kvfold("generate", "--model", model, "--prompt", "abc", "--max-new-tokens", 2, "--format", fmt).code == 0


def test_plot(tuned: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, argv in (("full.png", ()), ("uniform.svg", ("--uniform",))):
        path = tmp_path / name
        result, _ = tuned("--bits", "4.25", "--sides", "3", "4", "5", "--plot", path, *argv)
        assert result.code == 0, result.err
        assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "required: --bits"),
        (("--bits", "0"), "not a number of bits above 0"),
        (("--bits", "1"), "below the 2.5 of k2v2"),
        (("--bits", "4", "--window-tokens", 100), "give 128 or more"),
        (("--bits", "4", "--windows", 3), "--text FILE, or --window-tokens 140"),
        (("--bits", "4", "--windows", 90), "give a longer text with --text FILE"),
        (("--bits", "4", "--window-tokens", 300, "--held-out", 1), "longer than the model's context"),
        (("--bits", "4", "--sides", "4", "bf16"), "lose nothing"),
        (("--bits", "4", "--plot", "tune.xyz"), "none of the endings"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(tuned: Any, argv: tuple[Any, ...], says: str) -> None:
    if "--plot" in argv:
        pytest.importorskip("matplotlib")
    result, found = tuned(*argv)
    assert result.code == 2
    assert says in result.err
    assert (result.out, found) == ("", None)


def test_what_was_measured_before_an_interruption_is_kept(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(task: Any, best: Any, alone: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Task, "items", stop)
    result, found = tuned("--bits", "4.25")
    assert result.code == 130
    assert (len(found["layers"]), found["allocation"], found["chosen"]) == (LAST + 1, None, None)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4))
def test_a_window_shorter_than_a_piece_is_one(count: int) -> None:
    assert len(pieces([np.ones(10)] * count)) == count
    assert math.isclose(pieces([np.ones(10)] * count).mean(), 1)
