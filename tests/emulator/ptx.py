"""Translates the asm statements of CUDA C++ into calls of the functions in ``ptx.h``.

An instruction becomes a call of the function of its name, with its operands in PTX's order; declarations, labels and
branches become C++'s. So nothing has to be listed by hand, and an instruction that ``ptx.h`` lacks is named.
"""

from __future__ import annotations

import re
from pathlib import Path

_STATEMENT = re.compile(r"\basm\b\s*(?:volatile\b)?\s*(?=\()")
_OPERAND = re.compile(r'"[^"]*"\s*\(')
_TYPES = {"b16": "unsigned short", "u16": "unsigned short", "b32": "unsigned", "u32": "unsigned", "f32": "float"}
_TYPES |= {"pred": "bool", "b64": "unsigned long long", "u64": "unsigned long long"}


class UnknownInstructionError(Exception):
    """A kernel uses PTX that the emulator does not know."""


def known_instructions() -> set[str]:
    """Names of the functions in ``ptx.h``."""
    text = (Path(__file__).parent / "ptx.h").read_text(encoding="utf-8")
    return set(re.findall(r"^inline void (\w+)\(", text, re.MULTILINE))


def translate(text: str, file: str) -> str:
    """CUDA C++ without asm statements; line numbers stay.

    Raises:
        UnknownInstructionError: A statement has an instruction, or a form, that is not known; with file and line.
    """
    known, parts, at = known_instructions(), [], 0
    for number, found in enumerate(_STATEMENT.finditer(text)):
        end = _closing(text, found.end())
        where = f"{file}:{text.count(chr(10), 0, found.start()) + 1}"
        calls = _calls(text[found.end() + 1 : end], number, known, where)
        lines = "\n" * text.count("\n", found.start(), end)
        parts += [text[at : found.start()], "do { ", calls, "} while (0)", lines]
        at = end + 1
    return "".join([*parts, text[at:]])


def _closing(text: str, opening: int) -> int:
    """Where the bracket at ``opening`` is closed; brackets in strings do not count."""
    depth, quoted, at = 0, False, opening
    while True:
        c = text[at]
        if quoted:
            at += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
            if not depth:
                return at
        at += 1


def _calls(statement: str, number: int, known: set[str], where: str) -> str:
    """C++ for what is between the brackets of one asm statement."""
    strings = re.match(r'(?:\s*"(?:[^"\\]|\\.)*")+', statement)
    if not strings:
        raise UnknownInstructionError(f"{where}: an asm statement does not begin with a string")
    template = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', strings.group()))
    template = template.replace(r"\n", "\n").replace(r"\t", " ")
    rest, values, at = statement[strings.end() :], [], 0
    while found := _OPERAND.search(rest, at):
        end = _closing(rest, found.end() - 1)
        values.append(rest[found.end() : end])
        at = end + 1

    lines = []
    for line in re.split(r"[;\n]", _without_block(template)):
        if line.strip():
            lines.append(_line(line.strip(), values, number, known, where))
    return "".join(lines)


def _without_block(template: str) -> str:
    """The template without the brackets of a scope around it."""
    inner = template.strip()
    return inner[1:-1] if inner.startswith("{") and inner.endswith("}") else template


def _line(line: str, values: list[str], number: int, known: set[str], where: str) -> str:
    if found := re.fullmatch(r"\.reg\s*\.(\w+)\s+(\w+)", line):
        return f"{_TYPES[found[1]]} {found[2]}; "
    if found := re.fullmatch(r"(\w+):", line):
        return f"{found[1]}_{number}: ; "
    if found := re.fullmatch(r"(?:@(!?\w+)\s+)?bra\s+(\w+)", line):
        return f"{f'if ({found[1]}) ' if found[1] else ''}goto {found[2]}_{number}; "
    name, _, operands = line.partition(" ")
    function = re.sub(r"\W", "_", name)
    if function not in known:
        raise UnknownInstructionError(
            f"{where}: the emulator has no {name}; add {function} to tests/emulator/ptx.h, operands in PTX's order"
        )
    arguments = []
    for operand in re.sub(r"[{}\[\]\s]", "", operands).split(","):
        if operand in ("", "_"):  # nothing, or a result that nobody wants
            continue
        operand = operand.removeprefix("_|")  # of two results the first is not wanted
        arguments.append(f"({values[int(operand[1:])]})" if re.fullmatch(r"%\d+", operand) else operand)
    return f"ptx::{function}({', '.join(arguments)}); "
