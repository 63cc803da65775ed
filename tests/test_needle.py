"""`kvfold needle`: needles in haystacks, scores against brute force, and the command on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold import KVCache, cli
from kvfold.commands import needle as command
from kvfold.commands import needle_report as report
from kvfold.commands.evaluation import forward
from kvfold.commands.measure import Subject, load_subject
from kvfold.errors import KVFoldError, ShapeError
from kvfold.eval import bootstrap, needle
from kvfold.eval.needle import Encoding, Needle, Score

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tiny_models import CONFIGS, tiny  # noqa: E402  # it needs transformers

NEEDLE = Needle("Oslo", "3141592")
LETTERS = Encoding(lambda message: f"<{message}>", lambda prompt: [ord(letter) for letter in prompt])
"""A token for each letter."""


def words_of(seed: int, count: int) -> list[str]:
    """Random words, some of which end a sentence or a paragraph."""
    draw, ends = np.random.default_rng(seed), [" ", " ", " ", ". ", '!" ', "\n"]
    return ["".join(draw.choice(list("abcdefg"), draw.integers(1, 7))) + str(draw.choice(ends)) for _ in range(count)]


# --- needles and haystacks --------------------------------------------------------------------------------------------


def test_needles_are_repeatable_and_differ() -> None:
    drawn = {needle.draw_needle(0, trial, 512, 25.0) for trial in range(200)}
    assert len(drawn) == 200
    assert needle.draw_needle(0, 1, 512, 25.0) == Needle("Tunis", "2780403")  # on every machine
    assert needle.draw_needle(1, 1, 512, 25.0) != needle.draw_needle(0, 1, 512, 25.0)
    for one in drawn:
        assert one.place in needle.PLACES
        assert len(one.secret) == needle.DIGITS == 7
        assert one.secret in one.sentence
        assert one.secret not in one.question + one.lead
        assert all(one.place in text for text in (one.sentence, one.question, one.lead))
    digits = np.bincount([int(digit) for one in drawn for digit in one.secret], minlength=10)
    assert digits.min() > 90  # 140 each on average


@given(st.integers(0, 2**31), st.integers(32, 400), st.floats(0, 1))
def test_a_needle_is_in_the_haystack_where_it_was_asked_for(seed: int, count: int, depth: float) -> None:
    words = words_of(seed, count)
    text = needle.hide(words, depth, NEEDLE.sentence)
    before, found, after = text.partition(NEEDLE.sentence)
    assert found
    assert NEEDLE.sentence not in after
    assert (before + after).split() == "".join(words).split()  # nothing else is lost or moved
    assert abs(len(before.split()) - depth * count) <= 0.04 * count + 1
    assert not before or before[-1].isspace()
    assert not after or after[0].isspace()


def test_a_needle_at_the_ends_and_between_sentences() -> None:
    words = needle.split_words("One two. " + "word " * 45 + "three. Four " + "word " * 50)
    assert len(words) == 99
    sentence = NEEDLE.sentence
    assert needle.hide(words, 0, sentence).startswith(f"{sentence} One two. word")
    assert needle.hide(words, 1, sentence).endswith(f"word {sentence}")
    assert f"three. {sentence} Four" in needle.hide(words, 0.5, sentence)
    assert needle.hide(words, 0.3, sentence).split().index("The") == 30  # no end of a sentence is near
    assert needle.hide(["one", "two"], 0.5, "X.") == "one X. two"


@given(st.integers(0, 2**31), st.integers(400, 900), st.floats(0, 1))
def test_a_prompt_is_the_longest_that_fits(seed: int, length: int, depth: float) -> None:
    words = words_of(seed, 500)
    prompt = needle.make_prompt(LETTERS, words, depth, NEEDLE, length)
    text = "".join(map(chr, prompt.ids))
    assert length - 12 < len(prompt.ids) <= length  # another word, with its space and full stop, would be too long
    assert text[prompt.at :].startswith(NEEDLE.sentence)
    assert text.count(NEEDLE.sentence) == 1
    assert text.endswith(f"\n\n{NEEDLE.question}>{NEEDLE.lead} {NEEDLE.secret}")
    assert text[-prompt.answer :] == NEEDLE.secret
    words_before = len(text[1 : prompt.at].split())
    hidden = len(text[1 : text.index("\n\n" + NEEDLE.question)].split()) - len(NEEDLE.sentence.split())
    assert abs(words_before - depth * hidden) <= 0.04 * hidden + 1


@pytest.mark.parametrize(
    ("split", "answer"),
    [
        (r" \d\d\d|\d\d|\S| ", [" 314", "15", "92"]),  # the space belongs to the number, as in GPT-2
        (r"\d\d\d|\S| ", ["314", "159", "2"]),  # and here it does not
        (r" ?[a-z]+|\d| |\S", list(NEEDLE.secret)),
    ],
)
def test_the_answer_is_the_number_whatever_tokens_it_has(split: str, answer: list[str]) -> None:
    import re

    known: list[str] = []

    def encode(prompt: str) -> list[int]:
        pieces = re.findall(split, prompt)
        known.extend(piece for piece in pieces if piece not in known)
        return [known.index(piece) for piece in pieces]

    prompt = needle.make_prompt(Encoding(lambda message: f"{message}|", encode), words_of(0, 400), 0.5, NEEDLE, 500)
    assert [known[token] for token in prompt.ids[-prompt.answer :]] == answer


def test_no_room_for_a_haystack() -> None:
    words = words_of(0, 400)
    with pytest.raises(KVFoldError, match=r"a length of 100 tokens leaves no room .* give that or more") as refusal:
        needle.make_prompt(LETTERS, words, 0.5, NEEDLE, 100)
    least = int(str(refusal.value).split(" words take ")[1].split(";")[0])
    assert len(needle.make_prompt(LETTERS, words, 0.5, NEEDLE, least).ids) == least
    with pytest.raises(KVFoldError, match=f"take {least}"):
        needle.make_prompt(LETTERS, words, 0.5, NEEDLE, least - 1)


def test_a_template_that_changes_the_text() -> None:
    loud = Encoding(lambda message: message.upper(), LETTERS.encode)
    with pytest.raises(KVFoldError, match="add --no-chat-template"):
        needle.make_prompt(loud, words_of(0, 400), 0.5, NEEDLE, 600)


# --- scores -----------------------------------------------------------------------------------------------------------


def certain(answer: torch.Tensor, vocabulary: int = 13) -> torch.Tensor:
    """Logits of somebody who knows the answer."""
    return 100.0 * torch.nn.functional.one_hot(answer, vocabulary).float()


def test_who_knows_scores_one_and_who_knows_nothing_zero() -> None:
    answer = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    found, log_prob = needle.score(certain(answer), answer)
    assert found
    assert log_prob == pytest.approx(0)
    for place in range(7):  # one digit is wrong
        other = answer.clone()
        other[place] += 1
        assert not needle.score(certain(other), answer).found
    found, log_prob = needle.score(torch.ones(7, 10), answer)
    assert not found
    assert log_prob == pytest.approx(needle.GUESS)


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_a_score_against_brute_force(seed: int, n: int) -> None:
    source = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, 11, generator=source)
    answer = torch.randint(0, 11, (n,), generator=source)
    rows = logits.double().numpy()
    probabilities = [np.exp(row[token]) / np.exp(row).sum() for row, token in zip(rows, answer, strict=True)]
    found, log_prob = needle.score(logits, answer)
    assert found == all(row.argmax() == token for row, token in zip(rows, answer, strict=True))
    assert log_prob == pytest.approx(sum(map(math.log, probabilities)) / 7)


def test_a_guess_costs_the_same_in_other_tokens() -> None:
    """Digits one by one, or three in a token."""
    one = needle.score(torch.zeros(7, 10), torch.zeros(7, dtype=torch.int64))
    three = needle.score(torch.zeros(7, 1000)[:2], torch.zeros(2, dtype=torch.int64)).log_prob + math.log(0.1) / 7
    assert one.log_prob == pytest.approx(three)


def test_wrong_shapes_are_refused() -> None:
    for logits, answer in ((torch.zeros(3, 5), torch.zeros(2)), (torch.zeros(0, 5), torch.zeros(0))):
        with pytest.raises(ShapeError, match="n from 1"):
            needle.score(logits, answer.long())


def test_summary_against_brute_force() -> None:
    draw = np.random.default_rng(0)
    base = [Score(bool(draw.random() < 0.9), -draw.exponential(0.1)) for _ in range(40)]
    scores = [Score(one.found and bool(draw.random() < 0.6), one.log_prob - draw.exponential(0.5)) for one in base]
    draws = bootstrap.draw(40, 300)
    found = needle.summarise(scores, base, draws)
    assert tuple(found) == needle.FIGURES

    def figures(chosen: list[int]) -> list[float]:
        pairs = [(scores[i], base[i]) for i in chosen]
        return [
            np.mean([one.found for one, _ in pairs]),
            np.mean([one.found - other.found for one, other in pairs]),
            np.mean([one.log_prob for one, _ in pairs]),
            np.mean([one.log_prob - other.log_prob for one, other in pairs]),
        ]

    resampled = np.array([figures([i for i, times in enumerate(row) for _ in range(times)]) for row in draws])
    lows, highs = np.quantile(resampled, [0.025, 0.975], axis=0)
    for figure, value, low, high in zip(found.values(), figures(list(range(40))), lows, highs, strict=True):
        np.testing.assert_allclose(figure, (value, low, high), rtol=1e-10, atol=1e-12)
    alone = needle.summarise(scores[:1], base[:1], bootstrap.draw(1))
    assert all(figure[1:] == (None, None) for figure in alone.values())


# --- answering --------------------------------------------------------------------------------------------------------


class Memory(list[int]):
    """What an :class:`Oracle` has read."""


class Forgetful(Memory):
    """A cache that is broken: of every piece but the newest it keeps the length alone."""

    def extend(self, tokens: Any) -> None:
        self[:] = [0] * len(self)
        super().extend(tokens)


class Oracle:
    """A model of letters that writes the number that it has read, and nothing else."""

    device = torch.device("cpu")

    def forward(self, ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        before = len(past_key_values)
        past_key_values.extend(ids[0].tolist())
        says = [self.next("".join(map(chr, past_key_values[: end + 1]))) for end in range(before, len(past_key_values))]
        logits = certain(torch.tensor([list(map(ord, says))]), 128)
        return type("Output", (), {"logits": logits})

    __call__ = forward

    @staticmethod
    def next(text: str) -> str:
        import re

        lead, secret = NEEDLE.lead, re.search(r"pass number of Oslo is (\d{7})\.", text)
        asked = re.search(rf".*{lead} (\d*)$", text, re.DOTALL)
        return secret[1][len(asked[1])] if secret and asked and len(asked[1]) < 7 else " "


@pytest.mark.parametrize("piece", [16, 100, 4096])
def test_an_oracle_scores_one_and_a_broken_cache_zero(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(command, "PIECE", piece)
    subject = Subject(Oracle(), None)
    for depth in (0, 0.3, 1):
        prompt = needle.make_prompt(LETTERS, words_of(1, 400), depth, NEEDLE, 600)
        memory = Memory()
        assert command.answer(subject, prompt, memory, "") == Score(True, 0)
        assert list(memory) == prompt.ids[:-1]  # all has been read but the last token of the answer
        broken = command.answer(subject, prompt, Forgetful(), "")
        assert not broken.found
        assert broken.log_prob < -10


def test_only_the_logits_asked_for_come_back(model: Path) -> None:
    """Whether the model can leave the others out or not, as the oracle cannot."""
    ids = torch.tensor([[ord(letter) for letter in "The cat"]])
    for subject, new_cache in (
        (Subject(Oracle(), None), Memory),
        (real := load_subject(str(model)), lambda: real.new_cache(None, 64, "packed")),
    ):
        with torch.no_grad():
            every = forward(subject, ids % 97, new_cache())
            last = forward(subject, ids % 97, new_cache(), keep=3)
        assert every.shape[0] == 7
        torch.testing.assert_close(last, every[-3:])


def test_values_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = type("Output", (), {"logits": torch.full((1, 9, 128), math.nan)})
    monkeypatch.setattr(Oracle, "__call__", lambda self, ids, **options: nothing)
    prompt = needle.make_prompt(LETTERS, words_of(1, 400), 0.5, NEEDLE, 600)
    prompt = needle.Prompt(NEEDLE, prompt.ids[-10:], 9, 0)
    with pytest.raises(KVFoldError, match=r"k4v4: trial 1: gave values that are not finite"):
        command.answer(Subject(Oracle(), None), prompt, Memory(), "k4v4: trial 1")


def test_what_is_lost_and_gained_and_where() -> None:
    tasks = [
        report.Task(length, depth, trial, needle.Prompt(NEEDLE, [1], 1, 0))
        for trial in (0, 1)
        for length in (256, 512)
        for depth in (0.0, 100.0)
    ]
    base = report.Column("none", scores=[Score(letter == "x", -0.1) for letter in "xxx.xxx."])
    other = report.Column("k2v2", scores=[Score(letter == "x", -1.1) for letter in "x.xx..xx"])
    result = report.Result.of(tasks, [base, other])
    plain, row = result.rows
    assert (plain.lost, plain.gained, row.lost, row.gained) == (0, 0, 3, 2)
    assert [(c.length, c.depth, c.needles, c.found, c.lost) for c in row.cells] == [
        (256, 0.0, 2, 1, 1), (256, 100.0, 2, 0, 2), (512, 0.0, 2, 2, 0), (512, 100.0, 2, 2, 0),
    ]  # fmt: skip
    assert [cell.log_prob for cell in row.cells] == [pytest.approx(-1.1)] * 4
    assert row.figures["recall_change"].value == pytest.approx(-1 / 8)
    assert row.figures["log_prob_change"].value == pytest.approx(-1)
    text = report.text_of(result)
    assert "k2v2 loses 3: 256 at 0 % (1 of 2), 256 at 100 % (2 of 2)" in text
    marginals = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.count("/") == 4}
    assert marginals == {"none": ["4/4", "2/4", "4/4", "2/4"], "k2v2": ["1/4", "4/4", "3/4", "2/4"]}
    assert result.title == "8 needles (2 lengths x 2 depths)"
    assert plain.json()["recall_change"] is None
    part = report.Result.of(tasks[:3], [base, other])
    assert [len(one.scores) for one in part.rows] == [3, 3]
    assert part.rows[1].lost == 1


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("recall", 0.0, "0.0%"),
        ("recall", 0.956, "95.6%"),
        ("recall_change", -0.0, "+0.0%"),
        ("recall_change", -0.044, "-4.4%"),
        ("log_prob", -1e-5, "0.000"),
        ("log_prob", -2.5, "-2.500"),
        ("log_prob_change", -1e-5, "+0.000"),
        ("log_prob_change", 0.25, "+0.250"),
    ],
)
def test_numbers_of_the_table(name: str, value: float, shown: str) -> None:
    assert report._number(name, value) == shown


# --- the command ------------------------------------------------------------------------------------------------------

TEXT_WORDS = ["alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "willow"]
TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<model> {% endif %}"
)
GRID = ("--length", 128, 192, "--depth", 0, 50, 100, "--trials", 2)


def save(folder: Path, model_type: str, bos: bool = False, chat: bool = False) -> Path:
    """A tiny model of ``tiny_models`` in a folder, with a tokenizer of words and digits."""
    one = Needle("", "")
    phrases = " ".join((one.sentence, one.question, *needle.PLACES, *"0123456789"))
    words = phrases.replace("?", " ? ").replace(".", " . ").split()
    names = dict.fromkeys(["<pad>", "<bos>", "<eos>", "<user>", "<model>", *TEXT_WORDS, *words])
    vocabulary = {name: index for index, name in enumerate(names)}
    assert len(vocabulary) <= 97
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Whitespace(), digits])
    raw.add_special_tokens(["<user>", "<model>"])
    if bos:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny(model_type).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny-llama"), "llama", bos=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 words in sentences of six, which are 350 tokens."""
    words = np.random.default_rng(0).choice(TEXT_WORDS, 300)
    path = tmp_path_factory.mktemp("text") / "trees.txt"
    path.write_text(" ".join(f"{word}." if place % 6 == 5 else word for place, word in enumerate(words)))
    return path


@pytest.fixture
def kvfold(kvfold_on_cpu: Any) -> Any:
    return kvfold_on_cpu


@pytest.fixture(scope="module")
def full(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The JSON of one run with formats from exact to 2 bits."""
    path = tmp_path_factory.mktemp("json") / "needle.json"
    formats = ["kf32vf32", "k8v8", "k4v4+sinks4+tail32", "k2v2", "k8v8"]
    argv = ["needle", "--device", "cpu", "--model", model, "--text", text, *GRID, "--format", *formats, "--json", path]
    assert cli.main([str(word) for word in argv]) == 0
    return json.loads(path.read_text())


def test_json(full: Any, kvfold: Any, text: Path) -> None:
    settings = full["settings"]
    assert (settings["lengths"], settings["depths"], settings["trials"]) == ([128, 192], [0, 50, 100], 2)
    assert (settings["text"]["file"], settings["chunk"], settings["chat_template"]) == (str(text), "packed", False)
    assert full["environment"]["torch"]
    assert len(full["needles"]) == 12
    assert len({one["secret"] for one in full["needles"]}) == 12
    assert [row["format"] for row in full["rows"]] == ["none", "kf32vf32", "k8v8", "k4v4+sinks4+tail32", "k2v2"]
    for row in full["rows"]:
        assert len(row["found"]) == len(row["log_probs"]) == 12
        assert row["recall"]["value"] == np.mean(row["found"])
        assert row["log_prob"]["value"] == pytest.approx(np.mean(row["log_probs"]))
        assert row["log_prob"]["low"] <= row["log_prob"]["value"] <= row["log_prob"]["high"]
        cells = [(cell["length"], cell["depth"]) for cell in row["cells"]]
        assert cells == [(length, depth) for length in (128, 192) for depth in (0, 50, 100)]
    base, *rows = full["rows"]
    assert (base["recall_change"], base["log_prob_change"], base["bits_per_element"]) == (None, None, None)
    for row in rows:
        change = np.mean(row["log_probs"]) - np.mean(base["log_probs"])
        assert row["log_prob_change"]["value"] == pytest.approx(change, abs=1e-12)
    assert rows[1]["bits_per_element"] == 8.5  # 8 bits and a scale of 16 for 32 coordinates
    usage = kvfold("needle", "--help").out
    for key in [*full, *full["needles"][0], *base, *base["cells"][0], "value", "low", "high"]:
        assert key in usage, key


def test_exact_is_exact_and_fewer_bits_differ_more(full: Any) -> None:
    base = np.array(full["rows"][0]["log_probs"])
    moved = {row["format"]: np.abs(np.array(row["log_probs"]) - base).mean() for row in full["rows"]}
    assert moved["kf32vf32"] < 1e-5
    assert 1e-4 < moved["k8v8"] < moved["k2v2"] / 10


def test_a_run_can_be_repeated(full: Any, kvfold: Any, model: Path, text: Path, tmp_path: Path) -> None:
    argv = ("--model", model, "--text", text, *GRID, "--format", "k2v2", "--json", tmp_path / "n.json")
    for seed, same in ((0, True), (1, False)):
        assert kvfold("needle", *argv, "--seed", seed).code == 0
        again = json.loads((tmp_path / "n.json").read_text())
        assert (again["needles"] == full["needles"]) == same
        assert (again["rows"][1]["log_probs"] == full["rows"][-1]["log_probs"]) == same


def test_figures_are_those_of_a_model_run_by_hand(full: Any, model: Path, text: Path) -> None:
    subject = load_subject(str(model))
    arguments = cli.build_parser().parse_args(["needle", *map(str, GRID)])
    tasks = command.make_tasks(arguments, subject, text, text.read_text())
    assert [task.json() for task in tasks] == full["needles"]
    plain = subject.model
    for index in (0, 4, 11):
        prompt = tasks[index].prompt
        ids, secret = torch.tensor([prompt.ids]), torch.tensor(prompt.ids[-7:])
        assert subject.tokenizer.decode(secret).replace(" ", "") == prompt.needle.secret
        with torch.no_grad():
            expected = needle.score(plain(ids).logits[0, -8:-1], secret)
            cache = KVCache.for_model(plain, "k2v2", chunk="packed")
            steps = [forward(subject, ids[:, i : i + 1], cache) for i in range(len(prompt.ids) - 1)]
        subject.new_cache(None, 64, "packed")
        packed = needle.score(torch.cat(steps[-7:]), secret)  # token by token, as decoding does
        assert full["rows"][0]["log_probs"][index] == pytest.approx(expected.log_prob, rel=1e-4)
        assert full["rows"][-1]["log_probs"][index] == pytest.approx(packed.log_prob, rel=1e-3)
        assert full["rows"][-1]["found"][index] == packed.found


def test_the_needle_is_in_the_prompt_at_its_depth(full: Any, model: Path, text: Path) -> None:
    subject = load_subject(str(model))
    arguments = cli.build_parser().parse_args(["needle", *map(str, GRID)])
    tasks = command.make_tasks(arguments, subject, text, text.read_text())

    def encode(words: str) -> list[int]:
        return subject.tokenizer(words, add_special_tokens=False)["input_ids"]

    for task in tasks:
        prompt, size = task.prompt, len(encode(task.prompt.needle.sentence))
        assert task.length - 2 <= len(prompt.ids) <= task.length  # a word and a full stop are two tokens
        assert prompt.ids[0] == 1  # the tokenizer begins texts with <bos>
        sentence = subject.tokenizer.decode(prompt.ids[prompt.at : prompt.at + size])
        assert sentence.replace(" ", "") == prompt.needle.sentence.replace(" ", "")
        asked = encode(f"{prompt.needle.question} {prompt.needle.lead}")
        haystack = len(prompt.ids) - 1 - size - len(asked) - prompt.answer
        assert abs((prompt.at - 1) / haystack - task.depth / 100) < 0.06
    begins = {task.trial: task.prompt.ids[20:40] for task in tasks}
    assert begins[0] != begins[1]  # trials read other places of the text


def test_the_chat_template_is_used_unless_told_otherwise(kvfold: Any, tmp_path: Path, text: Path) -> None:
    folder = save(tmp_path / "chat", "llama", chat=True)
    subject = load_subject(str(folder))
    for flag, chat in (((), True), (("--no-chat-template",), False)):
        argv = ("needle", "--length", "192", "--depth", "50", "--trials", "1", *flag)
        arguments = cli.build_parser().parse_args(list(argv))
        ids = command.make_tasks(arguments, subject, text, text.read_text())[0].prompt.ids
        assert (ids[0] == 3, ids.count(4)) == (chat, int(chat))  # <user> and <model>
        path = tmp_path / "n.json"
        result = kvfold(*argv, "--model", folder, "--text", text, "--format", "k4v4", "--json", path)
        assert result.code == 0, result.err
        assert json.loads(path.read_text())["settings"]["chat_template"] == chat


def test_the_answer_does_not_depend_on_the_pieces(
    full: Any, kvfold: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PIECE", 50)
    path = tmp_path / "n.json"
    formats = ("k2v2", "k4v4+sinks4+tail32")
    assert kvfold("needle", "--model", model, "--text", text, *GRID, "--format", *formats, "--json", path).code == 0
    pieces = {row["format"]: row["log_probs"] for row in json.loads(path.read_text())["rows"]}
    whole = {row["format"]: row["log_probs"] for row in full["rows"]}
    for name, values in pieces.items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-3)


def test_table_and_progress(kvfold: Any, model: Path, text: Path) -> None:
    grid = ("--length", 192, "--length", 128, "--depth", 50, "--trials", 2)
    result = kvfold("needle", "--model", model, "--text", text, *grid, "--format", "k4v4", "--format", "k2v2")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == f"{model}: 4 needles (2 lengths x 1 depth) in trees.txt"
    lines = {line.split()[0]: line.split() for line in result.out.splitlines()[:8] if line and line[0] != " "}
    assert lines["k4v4"][1:3] == ["4.500", "0.0%"]
    assert len(lines["none"]) == 3
    assert result.out.count("..") == 2 + 2 * 4
    assert "The model itself finds 0%" in result.out
    assert "all 4 were alike" in result.out
    steps = [
        f"trial {trial} of 2, {length} tokens, depth 50 %: {name}"
        for trial in (1, 2)
        for length in (128, 192)
        for name in ("none", "k4v4", "k2v2")
    ]
    assert result.err.splitlines() == [f"loading {model}", "trying k4v4", "trying k2v2", *steps]


def test_one_needle_has_no_intervals(kvfold: Any, model: Path, text: Path) -> None:
    grid = ("--length", 128, "--depth", 50, "--trials", 1, "--format", "k4v4")
    result = kvfold("needle", "--model", model, "--text", text, *grid)
    assert result.code == 0, result.err
    assert ".." not in result.out
    assert "Intervals need more than one needle" in result.out
    assert "1 needle (1 length x 1 depth)" in result.out


@pytest.mark.parametrize("model_type", sorted(set(CONFIGS) - {"llama"}))
def test_other_models(kvfold: Any, tmp_path: Path, text: Path, model_type: str) -> None:
    folder, path = save(tmp_path / model_type, model_type), tmp_path / "n.json"
    grid = ("--length", 160, "--depth", 0, 60, "--trials", 1, "--format", "kf32vf32", "k2v2", "--json", path)
    result = kvfold("needle", "--model", folder, "--text", text, *grid)
    assert result.code == 0, result.err
    base, exact, packed = (np.array(row["log_probs"]) for row in json.loads(path.read_text())["rows"])
    np.testing.assert_allclose(exact, base, rtol=1e-3)
    assert np.abs(packed - base).min() > 1e-3
    assert ("uncompressed:" in result.out) == (model_type in ("gemma2", "gemma3_text", "gpt_oss", "qwen3_next"))


def test_plot(kvfold: Any, model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, begin in (("n.png", b"\x89PNG"), ("n.svg", b"<?xml"), ("n.pdf", b"%PDF")):
        path = tmp_path / name
        grid = ("--length", 128, 192, "--depth", 0, 50, "--trials", 1, "--format", "k4v4", "--plot", path)
        result = kvfold("needle", "--model", model, "--text", text, *grid)
        assert result.code == 0, result.err
        assert path.read_bytes().startswith(begin)


def test_an_interruption_keeps_what_was_measured(
    kvfold: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, answer = [], command.answer

    def interrupted(*args: Any) -> Score:
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(command, "answer", interrupted)
    path = tmp_path / "n.json"
    result = kvfold("needle", "--model", model, "--text", text, *GRID, "--format", "k4v4", "--json", path)
    assert (result.code, result.out) == (130, "")
    found = json.loads(path.read_text())
    assert [len(row["found"]) for row in found["rows"]] == [2, 2]
    assert len(found["needles"]) == 2


def test_running_out_of_memory_is_an_error_with_a_way_out(
    kvfold: Any, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(command, "answer", full)
    result = kvfold("needle", "--model", model, "--text", text, *GRID, "--format", "k4v4")
    assert result.code == 1
    assert "Tried to allocate 2 GiB.; give a smaller --length, or --device cpu" in result.err


@pytest.mark.slow
def test_smollm2(kvfold: Any, tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    grid = ("--length", 512, "--depth", 50, "--trials", 2, "--format", "kf32vf32", "k8v8", "k1v1", "--json", path)
    result = kvfold("needle", *grid)
    assert result.code == 0, result.err
    rows = {row["format"]: row for row in json.loads(path.read_text())["rows"]}
    assert [row["recall"]["value"] for row in rows.values()] == [1, 1, 1, 0]
    assert (rows["k8v8"]["lost"], rows["k1v1"]["lost"]) == (0, 2)
    assert abs(rows["kf32vf32"]["log_prob_change"]["value"]) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(kvfold: Any, full: Any, model: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    argv = ("--device", "cuda", *GRID, "--format", "k8v8", "k2v2", "--json", path)
    result = kvfold("needle", "--model", model, "--text", text, *argv)
    assert result.code == 0, result.err
    on_cpu = {row["format"]: row["log_probs"] for row in full["rows"]}
    for row in json.loads(path.read_text())["rows"]:
        np.testing.assert_allclose(row["log_probs"], on_cpu[row["format"]], rtol=0.05)


# --- refused before anything is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--format k9v9", "unknown format 'k9v9'"),
        ("--format k4v4 k4qv4q", "not built yet"),
        ("--text /nowhere/text.txt", "cannot use /nowhere/text.txt: No such file"),
        ("--json /nowhere/f.json", "there is no folder /nowhere"),
        ("--plot /nowhere/f.png", "there is no folder /nowhere"),
        ("--json /tmp", "/tmp is a folder"),
        ("--length 0", "--length: '0'"),
        ("--length 4k", "--length: '4k'"),
        ("--depth 101", "'101' is not a percentage from 0 to 100"),
        ("--depth -1", "--depth"),
        ("--depth half", "'half' is not a percentage from 0 to 100"),
        ("--depth nan", "'nan' is not a percentage"),
        ("--trials 0", "--trials: '0'"),
        ("--seed x", "--seed"),
        ("--device gpu", "'gpu' is not one of auto, cpu, cuda"),
        ("--page-size 48", "choose from 16, 32, 64"),
        ("--model ./nowhere", "there is no such directory"),
    ],
)
def test_wrong_usage(kvfold: Any, argv: str, words: str) -> None:
    result = kvfold("needle", *argv.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("kvfold: error: ")
    assert words in result.err
    assert "trying" not in result.err


def test_lengths_that_do_not_fit(kvfold: Any, model: Path, text: Path, tmp_path: Path) -> None:
    argv = ("needle", "--model", model, "--format", "k4v4")
    long = kvfold(*argv, "--text", text, "--length", 300)
    assert long.code == 2
    assert "prompts of 300 tokens are longer than the model's context of 256" in long.err
    short = kvfold(*argv, "--text", text, "--length", 64)
    assert short.code == 2
    assert "a length of 64 tokens leaves no room for a haystack: question, answer and 32 words take" in short.err
    path = tmp_path / "short.txt"
    path.write_text("oak " * 80)
    result = kvfold(*argv, "--text", path, "--length", 128)
    assert result.code == 2
    assert f"{path} has 80 tokens, and a prompt of 128 takes a longer one: give --text FILE" in result.err
    path.write_text("1234567890" * 20)
    assert "has 1 words, and a haystack takes 32" in kvfold(*argv, "--text", path, "--length", 128).err
    assert "trying" not in long.err + short.err


def test_a_format_that_the_heads_are_too_small_for(kvfold: Any, tmp_path: Path, text: Path) -> None:
    save(tmp_path, "llama")
    config = transformers.LlamaConfig(**{**CONFIGS["llama"], "head_dim": 4, "hidden_size": 16})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = kvfold("needle", "--model", tmp_path, "--text", text, *GRID, "--format", "kf32vf32", "k4v4")
    assert result.code == 2
    assert "head size 4 is too small for k4v4" in result.err
    assert "trial 1" not in result.err
