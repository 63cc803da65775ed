"""`kvfold tune`: the allocation against brute force, and the command on tiny random models."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.commands import tune as command
from kvfold.commands.formats import expected_distortion
from kvfold.errors import FormatError, NotBuiltError
from kvfold.eval import tune
from kvfold.eval.tune import Allocation, BudgetError, Option, frontier, pieces, unbeaten, widest
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


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), max_size=8))
def test_of_sides_those_are_kept_that_no_other_one_beats(sizes: list[tuple[int, float]]) -> None:
    kept = [sizes[place] for place in unbeaten(sizes)]
    for (cost, error), (next_cost, next_error) in itertools.pairwise(kept):
        assert cost < next_cost
        assert error > next_error
    for cost, error in sizes:
        assert any(own_cost <= cost and own_error <= error for own_cost, own_error in kept)


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


@pytest.mark.parametrize("bits", ["2.25", "3.25", "4.25", "6", "8.25", "9"])
def test_sides_that_another_one_beats_are_not_measured(bits: str) -> None:
    one = task(bits, ("8", "f8", "f8cast", "3", "3t", "2", "2t", "4"))
    assert [side.name for side in one.k_sides] == ["2t", "3t", "4", "f8cast", "8"]
    assert one.v_sides == one.k_sides
    for best in one.candidates:
        for which in "kv":
            measured = one.measured(which, best)
            assert measured == one.k_sides[: len(measured)]
            assert measured[-1] == getattr(best, which)


def test_options_are_those_of_all_formats_and_their_bytes_count() -> None:
    one = task("3.34", ("2", "3", "4"), ("mean", "+sinks4"))
    assert {str(fmt) for fmt in one.candidates} == {f"{name}+mean+sinks4" for name in ("k2v4", "k3v3", "k4v2")}
    assert str(one.format(one.k_sides[2], one.v_sides[0])) == "k4v2+mean+sinks4"
    assert {str(fmt) for fmt in task("3.32", ("2", "3", "4"), ("mean",)).candidates} == {"k2v3+mean", "k3v2+mean"}
    alone = one.alone(2, "k", one.k_sides[1])
    assert (str(alone.format), alone.skipped) == ("k3vf32+mean+sinks4", (0, 3))
    assert str(one.alone(2, "v", one.v_sides[2]).format) == "kf32v4+sinks4"


@pytest.mark.parametrize("options", [(), ("mean",)])
def test_costs_of_options_add_up_to_the_bytes_of_the_format(options: tuple[str, ...]) -> None:
    one = task("5", options=options)
    best = one.candidates[0]
    alone = losses(one, best)
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
        assert options_of[sides.index(getattr(best, which))].loss == 0.1
        assert [option.loss for option in options_of] == sorted((o.loss for o in options_of), reverse=True)


def losses(one: command.Task, best: KVFormat, *, factor: float = 50, own: float = 0.1) -> command.Alone:
    """Every K and V loses ``own`` in the side of ``best``, and ``factor`` times as much with each narrower one."""
    found: command.Alone = {}
    for which in "kv":
        measured = reversed(one.measured(which, best))
        by_side = {side: own * factor**place for place, side in enumerate(measured)}
        found.update({(layer, which): by_side for layer in one.layers})
    return found


def test_narrower_sides_are_as_measured_and_wider_ones_follow_from_the_best() -> None:
    one = task("4.25")
    best = KVFormat.parse("k4v3")
    assert one.parts(best)[:5] == [(0, "k", side) for side in one.k_sides[:3]] + [(0, "v", s) for s in one.v_sides[:2]]
    assert len(one.parts(best)) == len(LAYERS) * (3 + 2)
    for options_of, which in zip(one.items(best, losses(one, best)), "kv" * len(LAYERS), strict=True):
        narrower = [250, 5] if which == "k" else [5]
        own = getattr(best, which)
        wider = [side for side in one.k_sides if side.bits > own.bits]
        ratios = [expected_distortion(side, 64) / expected_distortion(own, 64) for side in wider]
        assert len(wider) == 4 - len(narrower)
        assert [option.loss for option in options_of] == pytest.approx([*narrower, 0.1, *(0.1 * r for r in ratios)])


def test_of_sides_that_lose_the_same_the_narrower_is_taken() -> None:
    """Noise may put a narrower side below a wider one: its bytes go to others, and nothing else is moved by it."""
    one = task("3.25", ("2", "3", "4"))
    best = KVFormat.parse("k3v3")
    alone = losses(one, best)
    alone[2, "k"] = {one.k_sides[0]: 0.0999, one.k_sides[1]: 0.1}
    found = frontier(one.items(best, alone), one.budget)[-1]
    assert str(one.chosen(found.choices).layer(2)) == "k2v3"
    assert sorted(found.choices) == [0, 1, 1, 1, 1, 2]
    gain = 0.1 - 0.1 * expected_distortion(one.k_sides[2], 64) / expected_distortion(best.k, 64)
    assert found.loss == pytest.approx(0.6 - 0.0001 - gain)


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
    best = KVFormat.parse(min(found["uniform"], key=lambda row: row["kl"])["format"])
    for row in found["layers"]:
        for which in "kv":
            widest_measured = getattr(best, which).name
            assert list(row[which]) == [side for side in command.SIDES if side <= widest_measured]
    for k in found["layers"][0]["k"]:
        assert f"K alone in {k}: " in result.err
    loss = {row["layer"]: row["k"][best.k.name] + row["v"][best.v.name] for row in found["layers"]}
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


@pytest.mark.parametrize("cliff", [1, 1000])
def test_a_narrow_side_that_loses_more_than_its_error_says_is_avoided(
    tuned: Any, monkeypatch: pytest.MonkeyPatch, cliff: float
) -> None:
    """The loss in 3 bits says nothing of that in 2, which is measured: ``cliff`` times what the errors promise."""

    def loss(side: Any) -> float:
        return expected_distortion(side, 32) * (cliff if side.bits == 2 else 1)

    def measure(self: Any, jobs: list[command.Job], windows: torch.Tensor) -> list[list[Any]]:
        weights = {layer: 1e-5 if layer == LAST else 1e-3 for layer in range(LAST + 1)}
        kl = [
            sum(
                weight * (loss(job.format.layer(layer).k) + loss(job.format.layer(layer).v))
                for layer, weight in weights.items()
                if layer not in job.skipped
            )
            for job in jobs
        ]
        return [[np.full(136, value)] * len(windows) for value in kl]

    monkeypatch.setattr(command.Measure, "all", measure)
    result, found = tuned("--bits", "3.75", "--sides", "2", "3", "4")
    assert result.code == 0, result.err
    assert min(found["uniform"], key=lambda row: row["kl"])["format"] == "k3v3"
    assert {tuple(row[which]) for row in found["layers"] for which in "kv"} == {("2", "3")}
    proposed = ModelFormat.parse(result.out.strip())
    widths = [width for n in range(LAST + 1) for width in (proposed.layer(n).k.bits, proposed.layer(n).v.bits)]
    # without scales the budget is 3.25 bits: of 8 sides two may have 4 bits, and two more where two others have 2
    assert sorted(widths) == ([2, 2] + [3] * 2 + [4] * 4 if cliff == 1 else [3] * 6 + [4] * 2)
    assert found["allocation"]["kl"] == pytest.approx(found["allocation"]["predicted_kl"])


@pytest.mark.parametrize("argv", [(), ("--uniform",)], ids=str)
def test_progress_counts_every_pass(tuned: Any, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    bars: list[tuple[int, list[str]]] = []

    @contextlib.contextmanager
    def progress(total: int) -> Iterator[Any]:
        bars.append((total, []))
        yield bars[-1][1].append

    monkeypatch.setattr(command, "progress", progress)
    result, found = tuned("--bits", "4", "--sides", "3", "4", *argv)
    assert result.code == 0, result.err
    assert [total for total, _ in bars] == [len(begun) for _, begun in bars]
    assert len(bars) == (1 if argv else 2)
    alone = [
        f"window 1 of 1: layer {row['layer']}, {which.upper()} in {side}"
        for row in found["layers"]
        for which in "kv"
        for side in row[which]
    ]
    assert [text for text in bars[-1][1] if ": layer" in text] == alone
    assert len(alone) == (0 if argv else 3 * (LAST + 1))  # one of K and V has a narrower side


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
