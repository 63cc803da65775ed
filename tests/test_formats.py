"""Formats: the grammar, other systems' spellings, refusals and byte counts, all without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold.formats
from kvfold.errors import FormatError, NotBuiltError
from kvfold.formats import (
    MAX_PRESCALES,
    PAGE_SIZES,
    SCALE_RULES,
    KVFormat,
    Side,
    check_head_size,
    check_page_size,
)
from kvfold.spelling import ALIASES, PRESETS, known_names

parse = KVFormat.parse

LLOYD_SIDES = [str(bits) for bits in range(1, 9)]
TRELLIS_SIDES = ["2t", "3t", "4t"]
PLAIN_SIDES = ["f8", "f8cast", "bf16", "f16", "f32"]  # no scale rule, no prescale search
MISSING_TUNED = ["2.5", "3.5", *(f"{bits}q" for bits in range(1, 9))]
MISSING_AFFINE = [f"{bits}a" for bits in range(1, 9)]
TUNED_SIDES = LLOYD_SIDES + TRELLIS_SIDES + MISSING_TUNED  # sides that take a scale rule and a prescale search
BUILT_SIDES = LLOYD_SIDES + TRELLIS_SIDES + PLAIN_SIDES
ALL_SIDES = TUNED_SIDES + PLAIN_SIDES + MISSING_AFFINE


# --- the grammar ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Spelled:
    """A text of the grammar and what it must mean, built side by side."""

    text: str
    rules: dict[str, str]
    counts: dict[str, int]
    mean: bool
    sinks: int
    tail: int


@st.composite
def spellings(draw: st.DrawFn) -> Spelled:
    sides = {"k": draw(st.sampled_from(ALL_SIDES)), "v": draw(st.sampled_from(ALL_SIDES))}
    tuned = [letter for letter in "kv" if sides[letter] in TUNED_SIDES]
    options: list[str] = []
    rules = dict.fromkeys(tuned, "unbiased")
    counts: dict[str, int] = {}
    candidates = st.integers(0, MAX_PRESCALES // 2).map(lambda half: 2 * half + 1)
    if tuned:
        if draw(st.booleans()):
            rule = draw(st.sampled_from(SCALE_RULES))
            options.append(rule)
            rules = dict.fromkeys(tuned, rule)
        for letter in tuned:  # a side's own option comes after the common one, and overrides it
            if draw(st.booleans()):
                rules[letter] = draw(st.sampled_from(SCALE_RULES))
                options.append(letter + rules[letter])
        if draw(st.booleans()):
            counts = dict.fromkeys(tuned, draw(candidates))
            options.append(f"pre{counts[tuned[0]]}")
        for letter in tuned:
            if draw(st.booleans()):
                counts[letter] = draw(candidates)
                options.append(f"{letter}pre{counts[letter]}")
    mean = draw(st.booleans()) and sides["k"] in TUNED_SIDES  # only keys that are rotated
    sinks, tail = draw(st.sampled_from([0, 1, 4, 64])), draw(st.sampled_from([0, 1, 128, 4096]))
    options += ["mean"] * mean + [f"sinks{sinks}"] * bool(sinks) + [f"tail{tail}"] * bool(tail)
    return Spelled("+".join([f"k{sides['k']}v{sides['v']}", *options]), rules, counts, mean, sinks, tail)


@settings(max_examples=300, deadline=None)
@given(spellings())
def test_every_spelling_means_what_it_says_and_round_trips(spelled: Spelled) -> None:
    fmt = parse(spelled.text)
    for letter, side in (("k", fmt.k), ("v", fmt.v)):
        if letter in spelled.rules:
            rule = spelled.rules[letter]
            assert side.scale == rule
            assert side.prescales == spelled.counts.get(letter, 1 if rule == "plain" else 3)
        else:
            assert (side.scale, side.prescales) == ("none", 1)
    assert (fmt.mean, fmt.sinks, fmt.tail) == (spelled.mean, spelled.sinks, spelled.tail)

    canonical = str(fmt)
    assert parse(canonical) == fmt
    assert str(parse(canonical)) == canonical
    assert hash(parse(canonical)) == hash(fmt)


@pytest.mark.parametrize("side", ALL_SIDES)
def test_a_sides_name_is_its_spelling(side: str) -> None:
    fmt = parse(f"k{side}vbf16")
    assert fmt.k.name == side
    assert str(fmt) == f"k{side}vbf16"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("K4V4", "k4v4"),
        ("  k4v4\n", "k4v4"),
        ("kvfold_k4v3", "k4v3"),
        ("kvfold:k4v3", "k4v3"),
        ("4", "k4v4"),
        ("3t", "k3tv3t"),
        ("2.5", "k2.5v2.5"),
        ("4.0", "k4v4"),
        ("k4v4+unbiased+pre3", "k4v4"),
        ("k4v4+plain+pre1", "k4v4+plain"),
        ("k4v4+kplain+vplain", "k4v4+plain"),
        ("k4v4+kpre5+vpre5", "k4v4+pre5"),
        ("k4v4+kplain", "k4v4+kplain"),
        ("kf8v4+vplain", "kf8v4+plain"),
        ("k4v4+tail128+sinks4", "k4v4+sinks4+tail128"),
        ("k4v4+sinks0+tail0", "k4v4"),
        ("turboquant+sinks4", "k4v4+sinks4"),
    ],
)
def test_canonical_spelling(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


def test_families_have_their_sides() -> None:
    assert parse("k4v8").k == Side("lloyd", 4, scale="unbiased", prescales=3)
    assert parse("kf8vf8cast").k == Side("fp8", 8)
    assert parse("kf8vf8cast").v == Side("fp8cast", 8)
    assert parse("kbf16vf32").k == Side("exact", 16, dtype="bf16")
    assert parse("kbf16vf32").v == Side("exact", 32, dtype="f32")
    assert parse("k4tv4q").k.family == "trellis"
    assert parse("k4tv4q").v.family == "qjl"
    assert parse("k4av2.5").k == Side("affine", 4, group=32)
    assert parse("k4av2.5").v.family == "outlier"


def test_what_a_side_stores() -> None:
    lloyd, fp8, cast, exact = (parse(f"k{side}v4").k for side in ("4", "f8", "f8cast", "bf16"))
    assert [side.rotated for side in (lloyd, fp8, cast, exact)] == [True, False, False, False]
    assert [side.scaled for side in (lloyd, fp8, cast, exact)] == [True, True, False, False]
    assert [side.lossless for side in (lloyd, fp8, cast, exact)] == [False, False, False, True]
    assert parse("exact").lossless
    assert parse("kbf16vf16").lossless
    assert not parse("kbf16v8").lossless


# --- other spellings of the same values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "meaning"),
    [
        ("turboquant", "k4v4"),
        ("fp8", "kf8vf8"),
        ("fp8_cast", "kf8castvf8cast"),
        ("fp8_e4m3", "kf8castvf8cast"),
        ("bf16", "kbf16vbf16"),
        ("fp16", "kf16vf16"),
        ("fp32", "kf32vf32"),
        ("exact", "kf32vf32"),
    ],
)
def test_alias(alias: str, meaning: str) -> None:
    assert parse(alias) == parse(meaning)
    assert str(parse(alias)) == meaning
    assert parse(alias + "+sinks4") == parse(meaning + "+sinks4")


@pytest.mark.parametrize("name", [*ALIASES, *PRESETS])
def test_every_known_name_round_trips(name: str) -> None:
    assert parse(str(parse(name))) == parse(name)
    assert name in known_names()


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "lmdeploy:42"])
def test_preset_keeps_its_name(name: str) -> None:
    assert str(parse(name)) == name


@pytest.mark.parametrize(
    ("name", "k_bits", "v_bits", "k_family", "v_family"),
    [
        ("vllm:k8v4", 8, 4, "fp8cast", "affine"),
        ("vllm:4bit_nc", 4, 4, "lloyd", "affine"),
        ("vllm:k3v4_nc", 3, 4, "lloyd", "affine"),
        ("vllm:3bit_nc", 3, 3, "lloyd", "affine"),
        ("metal:q8_0/q3_0", 8, 3, "affine", "lloyd"),
        ("metal:q4_0/q3_0", 4, 3, "affine", "lloyd"),
        ("metal:uint2/q2_0", 2, 2, "affine", "lloyd"),
        ("lmdeploy:42", 4, 2, "qjl", "lloyd"),
    ],
)
def test_preset_is_what_the_other_system_stores(
    name: str, k_bits: int, v_bits: int, k_family: str, v_family: str
) -> None:
    fmt = parse(name)
    assert (fmt.k.bits, fmt.v.bits) == (k_bits, v_bits)
    assert (fmt.k.family, fmt.v.family) == (k_family, v_family)
    if name.startswith("metal:"):
        assert (fmt.k.group, fmt.v.group) == (32, 32)
    if name.endswith("_nc"):
        assert fmt.k.scale == "nc"


@pytest.mark.parametrize(("number", "name"), [(4, "k4v4"), (4.0, "k4v4"), (1, "k1v1"), (2.5, "k2.5v2.5")])
def test_number_of_bits(number: float, name: str) -> None:
    assert parse(number) == parse(name)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({}, "k4v4"),
        ({"k": 8, "v": 3}, "k8v3"),
        ({"k": "f8", "v": "bf16"}, "kf8vbf16"),
        ({"k": 2.5, "v": "3t"}, "k2.5v3t"),
        ({"k": 4, "v": 4, "scale": "plain", "sinks": 4, "tail": 128}, "k4v4+plain+sinks4+tail128"),
        ({"k": 3, "v": 3, "mean": True, "prescales": 9}, "k3v3+pre9+mean"),
        ({"k": 3, "v": 3, "mean": False, "sinks": 0}, "k3v3"),
        ({"bit_width": 3}, "k3v3"),
        ({"bit_width": 3.5}, "k3.5v3.5"),
        ({"bit_width": "2"}, "k2v2"),
        ({"bit_width": 3, "use_qjl": False}, "k3v3"),
        ({"bit_width": 4, "use_qjl": True}, "k4qv4q"),
        ({"k_quant": "q4_0", "v_quant": "q2_0"}, "metal:q4_0/q2_0"),
        ({"turboquant": True, "k_quant": "q8_0", "v_quant": "q3_0"}, "metal:q8_0/q3_0"),
        ({"k_quant": "q4_0"}, "metal:q4_0/q3_0"),
        ({"v_quant": "q5_0"}, "metal:q8_0/q5_0"),
    ],
    ids=json.dumps,
)
def test_json_object(spec: dict[str, object], name: str) -> None:
    assert parse(spec) == parse(name)
    assert parse(json.dumps(spec)) == parse(name)
    assert parse("  " + json.dumps(spec)) == parse(name)


def test_a_format_parses_to_itself() -> None:
    fmt = parse("k4v3+sinks4")
    assert parse(fmt) is fmt


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "proposals"),
    [
        ("turboqant", ["turboquant"]),
        ("k4v9", ["k4v4"]),
        ("fp9", ["fp8"]),
        ("metal:q9_0/q3_0", ["metal:q8_0/q3_0"]),
        ("vllm:4bitnc", ["vllm:4bit_nc"]),
        ("lmdeploy:4", ["lmdeploy:42"]),
        ("k4v4+sink4", ["sinks4"]),
        ("k4v4+tails128", ["tail128"]),
        ("k4v4+unbias", ["unbiased"]),
        ({"bitwidth": 4}, ["bit_width"]),
        ({"prescale": 5}, ["prescales"]),
    ],
    ids=str,
)
def test_did_you_mean(spec: str | dict[str, object], proposals: list[str]) -> None:
    with pytest.raises(FormatError, match="did you mean") as caught:
        parse(spec)
    for proposal in proposals:
        assert repr(proposal) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "+",
        "zzzz",
        "k4",
        "v4",
        "k4v",
        "v4k4",
        "k0v4",
        "k9v4",
        "k-4v4",
        "k16v16",
        "k4v4v4",
        "k4 v4",
        "kf4v4",
        "k4tqv4",
        "0",
        "9",
        "16",
        "4.5",
        "1.5",
        "2.5t",
        "3.5q",
        "1t",
        "5t",
        "k8tv4",
        "k4v4+",
        "k4v4++sinks4",
        "k4v4+sinks",
        "k4v4+sinks-1",
        "k4v4+tail1.5",
        "k4v4+ksinks4",
        "k4v4+pre",
        "k4v4+pre0",
        "k4v4+pre2",
        "k4v4+pre15",
        "k4v4+kunbiasedd",
        "kf8vf8+plain",
        "kbf16vbf16+pre5",
        "kf8v4+kplain",
        "k4vf16+vpre5",
        "kf8v4a+unbiased",
        "vllm:4bit_nc+sinks4",
        "metal:q8_0/q3_0+plain",
        "metal:/",
        "{not json",
        '{"k": 4,',
        '{"k": 4} trailing',
    ],
)
def test_nonsense_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse(text)


@pytest.mark.parametrize(
    "spec",
    [
        None,
        True,
        False,
        [4, 4],
        (4, 4),
        b"k4v4",
        pytest.param(object(), id="object"),
        0,
        9,
        -4,
        4.5,
        float("nan"),
        float("inf"),
        {"bits": 4},
        {"k": 9},
        {"k": "4+sinks4"},
        {"sinks": -1},
        {"sinks": 1.5},
        {"prescales": 4},
        {"scale": "best"},
        {"k_quant": "q9_0"},
        {"bit_width": 9},
        {"bit_width": 2.5, "use_qjl": True},
        {"bit_width": "many"},
        {"bit_width": None},
    ],
    ids=repr,
)
def test_nonsense_values_are_refused(spec: object) -> None:
    with pytest.raises(FormatError):
        parse(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "extra"),
    [
        ({"bit_width": 4}, {"sinks": 4}),
        ({"bit_width": 4}, {"k": 8}),
        ({"bit_width": 4}, {"scale": "plain"}),
        ({"k_quant": "q8_0", "v_quant": "q3_0"}, {"tail": 128}),
        ({"k_quant": "q8_0"}, {"bit_width": 3}),
        ({"k": 4, "v": 4}, {"use_qjl": True}),
    ],
    ids=json.dumps,
)
def test_no_key_of_an_object_is_dropped_in_silence(spec: dict[str, object], extra: dict[str, object]) -> None:
    """Honoured or refused: a format that ignores half of what was asked for is the wrong format."""
    try:
        fmt = parse({**spec, **extra})
    except FormatError:
        return
    assert fmt != parse(spec), f"{extra} changed nothing"


def test_errors_are_catchable_by_kind() -> None:
    assert issubclass(FormatError, ValueError)
    assert issubclass(NotBuiltError, NotImplementedError)
    assert not issubclass(NotBuiltError, FormatError)


@pytest.mark.parametrize(
    ("name", "thing"),
    [
        ("k4qv4q", "QJL"),
        ("k4qv4", "QJL"),
        ("k4av4a", "affine"),
        ("k8v4a", "affine"),
        ("2.5", "fractional"),
        ("k4v3.5", "fractional"),
        ("k4tv4a+mean", "affine"),
        ("vllm:k8v4", "affine"),
        ("vllm:4bit_nc", "affine"),
        ("metal:q8_0/q3_0", "per group of 32"),
        ("lmdeploy:42", "QJL"),
    ],
)
def test_not_built_names_the_thing_and_the_way_out(name: str, thing: str) -> None:
    fmt = parse(name)  # well spelled, so it parses
    with pytest.raises(NotBuiltError, match=thing) as caught:
        fmt.require_built()
    message = str(caught.value)
    assert repr(str(fmt)) in message, "the format is named"
    assert "k4v4" in message, "a built one is proposed"
    assert "k<b>v<b>" in message
    with pytest.raises(NotBuiltError, match=thing):
        fmt.bytes_per_token(128)
    with pytest.raises(NotBuiltError, match=thing):
        fmt.bits_per_element(128)


def test_not_built_names_every_missing_thing_once() -> None:
    with pytest.raises(NotBuiltError) as caught:
        parse("k4qv4q+mean").require_built()
    assert str(caught.value).count("QJL") == 1
    with pytest.raises(NotBuiltError) as caught:
        parse("k4qv4a+mean").require_built()
    assert all(thing in str(caught.value) for thing in ("QJL", "affine"))


@pytest.mark.parametrize("side", MISSING_TUNED + MISSING_AFFINE)
def test_a_missing_side_has_no_planes(side: str) -> None:
    with pytest.raises(NotBuiltError):
        parse(f"k{side}v4").k.planes()


@pytest.mark.parametrize("side", BUILT_SIDES)
def test_a_built_side_is_built(side: str) -> None:
    fmt = parse(f"k{side}v{side}+sinks4+tail128")
    assert fmt.require_built() is fmt
    assert fmt.k.missing is None
    if side not in PLAIN_SIDES:
        parse(f"k{side}v{side}+mean").require_built()


@pytest.mark.parametrize("side", [*PLAIN_SIDES, "4a"])
def test_a_reference_is_subtracted_from_rotated_keys_only(side: str) -> None:
    """Anything else would be less than it says: exact keys are exact, and fp8 has relative precision."""
    for spec in (f"k{side}v4+mean", {"k": side, "v": 4, "mean": True}):
        with pytest.raises(FormatError, match=f"keys that are rotated, and {side} is not"):
            parse(spec)
    assert parse(f"k4v{side}+mean").mean, "V may be anything"


@pytest.mark.parametrize("bits", [1, 5, 8, 2.5, 3.5])
def test_trellis_codes_have_two_to_four_bits(bits: float) -> None:
    with pytest.raises(FormatError, match="trellis codes have 2, 3 or 4 bits"):
        Side("trellis", bits, scale="unbiased", prescales=3)


@pytest.mark.parametrize("family", ["lloyd", "trellis"])
def test_a_scale_rule_that_does_not_exist(family: str) -> None:
    with pytest.raises(FormatError, match="stores a scale by one of unbiased, plain, nc, mse, not 'none'"):
        Side(family, 4)


@pytest.mark.parametrize("size", [0, -1, 8, 17, 48, 128])
def test_page_sizes_that_do_not_exist(size: int) -> None:
    with pytest.raises(FormatError, match="16, 32, 64"):
        check_page_size(size)


@pytest.mark.parametrize("size", [0, -64, 1025, 64.0, "64", None])
def test_head_sizes_that_do_not_exist(size: object) -> None:
    with pytest.raises(FormatError, match="1024"):
        check_head_size(size)  # type: ignore[arg-type]


def test_sizes_that_exist_pass_through() -> None:
    assert [check_page_size(size) for size in PAGE_SIZES] == [16, 32, 64]
    assert [check_head_size(size) for size in (1, 80, 1024)] == [1, 80, 1024]


# --- values -----------------------------------------------------------------------------------------------------------


def test_formats_are_frozen_hashable_and_picklable() -> None:
    fmt = parse("k4v3+kplain+sinks4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.sinks = 8  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.k.bits = 8  # type: ignore[misc]
    assert {fmt: 1}[parse("k4v3+sinks4+kplain")] == 1
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    assert len({parse(name) for name in ("k4v4", "turboquant", "4", "k4v4+unbiased")}) == 1
    assert len({parse(name) for name in ("k4v4", "k4v4+plain", "k4v4+kplain", "k4v4+vplain", "k4v3", "k3v4")}) == 6


# --- bytes, worked out by hand: K codes + V codes + 2 bytes for each stored scale -------------------------------------

BYTES = [
    ("k1v1", 128, None, 16 + 16 + 4),
    ("k2v2", 128, None, 32 + 32 + 4),  # 68
    ("k3v3", 128, None, 48 + 48 + 4),  # 100
    ("k4v4", 128, None, 64 + 64 + 4),  # 132
    ("k5v5", 128, None, 80 + 80 + 4),
    ("k6v6", 128, None, 96 + 96 + 4),
    ("k7v7", 128, None, 112 + 112 + 4),
    ("k8v8", 128, None, 128 + 128 + 4),
    ("k4v4", 64, None, 32 + 32 + 4),
    ("k4v4", 80, None, 40 + 40 + 4),
    ("k4v4", 96, None, 48 + 48 + 4),
    ("k4v4", 112, None, 56 + 56 + 4),
    ("k4v4", 192, None, 96 + 96 + 4),
    ("k4v4", 256, None, 128 + 128 + 4),
    # 3 bits are a plane of 2 and a plane of 1, each padded to words of 4 bytes: 80 bits of the latter are 12 bytes.
    ("k3v3", 80, None, 2 * (20 + 12) + 4),
    ("k3v3", 96, None, 2 * (24 + 12) + 4),
    ("k3v3", 112, None, 2 * (28 + 16) + 4),
    ("k3v3", 192, None, 2 * (48 + 24) + 4),
    ("k2v2", 80, None, 2 * 20 + 4),
    ("k1v1", 80, None, 2 * 12 + 4),
    ("k1v1", 112, None, 2 * 16 + 4),
    ("k5v5", 112, None, 2 * (56 + 16) + 4),
    ("k7v7", 80, None, 2 * (40 + 20 + 12) + 4),
    ("k4v4", 33, None, 2 * 20 + 4),  # 132 bits are 5 words
    ("k8v8", 33, None, 2 * 36 + 4),
    ("kbf16vbf16", 33, None, 2 * 68),
    # K and V of different widths and head sizes
    ("k8v4", 128, None, 128 + 64 + 4),
    ("k4v2", 128, None, 64 + 32 + 4),
    ("k4v4", 192, 128, 96 + 64 + 4),
    ("k8v3", 96, 80, 96 + (20 + 12) + 4),
    ("kbf16v4", 192, 128, 384 + 64 + 2),
    # a scale only where one is stored
    ("kf8vf8", 128, None, 128 + 128 + 4),
    ("kf8castvf8cast", 128, None, 128 + 128),
    ("kf8v4", 128, None, 128 + 64 + 4),
    ("kf8castv4", 128, None, 128 + 64 + 2),
    ("kbf16vbf16", 128, None, 512),
    ("kf16vf32", 128, None, 256 + 512),
    ("kf32vf32", 80, None, 640),
    # a trellis side has the bytes of a Lloyd–Max side, but for 2 and 4 bits in heads that are no multiple of 32
    ("k2tv2t", 128, None, 32 + 32 + 4),
    ("k3tv3t", 128, None, 48 + 48 + 4),
    ("k4tv4t", 128, None, 64 + 64 + 4),
    ("k4tv3", 128, 64, 64 + 24 + 4),
    ("k2tv2t", 80, None, 2 * (12 + 12) + 4),
    ("k3tv3t", 80, None, 2 * (20 + 12) + 4),
    ("k4tv4t", 80, None, 2 * (20 + 12 + 12) + 4),
    ("k3tvf8cast", 33, None, (12 + 8) + 36 + 2),
    # options that cost nothing in the pages
    ("k4v4+plain", 128, None, 132),
    ("k4v4+pre13+sinks4+tail128", 128, None, 132),
]


@pytest.mark.parametrize(("name", "head_size", "head_size_v", "expected"), BYTES)
def test_bytes_per_token(name: str, head_size: int, head_size_v: int | None, expected: int) -> None:
    fmt = parse(name)
    assert fmt.bytes_per_token(head_size, head_size_v) == expected
    elements = head_size + (head_size_v or head_size)
    assert fmt.bits_per_element(head_size, head_size_v) == pytest.approx(8 * expected / elements)


@pytest.mark.parametrize(
    ("name", "page_size", "head_size", "head_size_v", "reference", "page"),
    [
        ("k4v4+mean", 64, 128, None, 144, 64 * 132 + 144),  # 128 codes of a byte, a scale of 2, to 16
        ("k4v4+mean", 16, 128, None, 144, 16 * 132 + 144),
        ("k4v4+mean", 64, 64, None, 80, 64 * 68 + 80),
        ("k4v4+mean", 64, 126, None, 128, 64 * (64 + 64 + 4) + 128),
        ("k4v4+mean", 64, 127, None, 144, 64 * (64 + 64 + 4) + 144),
        ("k3tv3t+mean", 64, 128, None, 144, 64 * 100 + 144),
        ("k3tv2+mean", 32, 192, 128, 208, 32 * (72 + 32 + 4) + 208),  # of K: V has no reference
        ("k4v4", 64, 128, None, 0, 64 * 132),
        ("kf8castvf8cast", 16, 40, None, 0, 16 * 80),
    ],
)
def test_bytes_of_a_page(
    name: str, page_size: int, head_size: int, head_size_v: int | None, reference: int, page: int
) -> None:
    fmt = parse(name)
    assert fmt.reference_bytes(head_size) == reference
    assert fmt.page_bytes(page_size, head_size, head_size_v) == page
    assert fmt.page_bytes(page_size, head_size, head_size_v) % 16 == 0
    elements = page_size * (head_size + (head_size_v or head_size))
    assert fmt.bits_per_element(head_size, head_size_v, page_size) == 8 * page / elements


def test_a_reference_costs_little_in_large_pages() -> None:
    fmt = parse("k4v4+mean")
    assert [fmt.bits_per_element(128, page_size=size) for size in (64, 32, 16)] == [
        4.125 + 144 * 8 / (size * 256) for size in (64, 32, 16)
    ]
    assert fmt.bits_per_element(128) == 4.1953125
    with pytest.raises(FormatError, match="16, 32, 64"):
        fmt.page_bytes(48, 128)
    with pytest.raises(FormatError, match="1024"):
        fmt.reference_bytes(0)


@pytest.mark.parametrize(("name", "bits"), [("k4v4", 4.125), ("k3v3", 3.125), ("k2v2", 2.125), ("k8v4", 6.125)])
def test_all_in_bits_count_the_scale(name: str, bits: float) -> None:
    assert parse(name).bits_per_element(128) == bits


@pytest.mark.parametrize("bad", [(0, None), (-8, None), (1025, None), (128, 0), (128, -8)], ids=str)
def test_bytes_of_a_head_that_does_not_exist_are_refused(bad: tuple[int, int | None]) -> None:
    """A planner that answers with a number for a head of 0 or -8 coordinates has miscounted."""
    with pytest.raises(FormatError):
        parse("k4v4").bytes_per_token(*bad)


def test_exact_tokens_are_counted_beside_the_pages() -> None:
    fmt = parse("k4v4+sinks4+tail128")
    assert fmt.exact_bytes(128) == 132 * (128 + 128) * 2
    assert fmt.exact_bytes(192, 128, itemsize=4) == 132 * (192 + 128) * 4
    assert parse("k4v4").exact_bytes(128) == 0


@pytest.mark.parametrize("side", BUILT_SIDES)
def test_planes_add_up_to_the_width(side: str) -> None:
    k = parse(f"k{side}v4").k
    assert sum(k.planes()) == k.bits
    assert all(32 % width == 0 for width in k.planes())


DOCUMENTATION = Path(__file__).parents[1] / "docs" / "formats.md"


def test_the_documented_sizes_are_the_real_ones() -> None:
    row = re.compile(r"^\| `(k\w+v[\w+]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.M)
    rows = row.findall(DOCUMENTATION.read_text(encoding="utf-8"))
    usual = {f"k{bits}v{bits}" for bits in range(1, 9)} | {
        f"k{bits}tv{bits}t{mean}" for bits in (2, 3, 4) for mean in ("", "+mean")
    }
    assert usual < {name for name, *_ in rows}
    for name, *figures in rows:
        fmt = parse(name)
        expected = [f"{x:.5g}" for d in (64, 128) for x in (fmt.page_bytes(64, d) / 64, fmt.bits_per_element(d))]
        assert figures == expected, name


# --- what a planner pays to import this -------------------------------------------------------------------------------


def test_importing_formats_pulls_in_no_torch() -> None:
    code = "import sys, kvfold.formats; kvfold.formats.KVFormat.parse('k4v4').bytes_per_token(128); print(*sys.modules)"
    root = Path(kvfold.formats.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
    )
    loaded = set(done.stdout.split())
    assert "kvfold.formats" in loaded
    assert not loaded & {"torch", "numpy", "triton", "transformers"}
