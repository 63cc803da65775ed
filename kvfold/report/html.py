"""A report as one HTML file: figures are SVG inside it, there are no scripts and nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvfold.report.document import SUMMARY_NOTE, Origin, Picture, Report, Section, Table
from kvfold.report.drawing import SHADES, style
from kvfold.report.svg import inline, variable

LIGHT = {"--ink": "#1b1f24", "--soft": "#57606a", "--line": "#d6dbe1", "--page": "#ffffff", "--band": "#f5f7f9"}
DARK = {"--ink": "#e8eaed", "--soft": "#a3abb5", "--line": "#363c44", "--page": "#14171b", "--band": "#1c2026"}

CSS = """\
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 64rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; padding-top: .8rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem }
p { margin: .3rem 0; overflow-wrap: anywhere }
a { color: inherit }
.soft, figcaption, small { color: var(--soft) }
nav ol { margin: .5rem 0; padding-left: 1.4rem }
figure { margin: 0 }
figure svg { display: block; width: 100%; min-width: 40rem; height: auto }
svg * { stroke-linejoin: round; stroke-linecap: butt }
svg text { font-family: var(--font) }
figcaption { font-size: .85rem }
.note { font-size: .85rem; margin-top: .6rem }
.origin { font-size: .78rem; margin-top: .35rem }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
th, td { padding: .26rem .55rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th.text, td.text { text-align: left }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page) }
thead th, thead th:first-child { background: var(--band); vertical-align: bottom }
th.group { text-align: left; border-left: 2px solid var(--page); white-space: normal; min-width: 8rem }
td small { display: block; font-size: .86em }
ul.notes { margin: .8rem 0; padding-left: 1.2rem; font-size: .88rem }
ul.notes li { overflow-wrap: anywhere }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt }
  figure svg { min-width: 0 }
  figure, tr { break-inside: avoid }
  h2, h3, section > p { break-after: avoid }
  .scroll { overflow: visible }
  table { font-size: 6.8pt }
  th, td { padding: .15rem .3rem; white-space: normal }
  th.group { min-width: 0 }
  td:first-child, th:first-child { position: static }
}
"""


def page(report: Report) -> str:
    """The whole file."""
    with style():
        sections = [_section(number, section) for number, section in enumerate(report.sections, 1)]
    contents = "".join(
        f'<li><a href="#s{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(report.sections, 1)
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta name="color-scheme" content="light dark"><title>kvfold report</title>',
        f"<style>\n{_colors()}{CSS}</style></head><body>",
        f'<header><h1>kvfold report</h1><p class="soft">{escape(report.made)}</p></header>',
        f"<nav><ol>{contents}</ol></nav>",
        f'<main>{_table(report.summary())}<p class="soft note">{escape(SUMMARY_NOTE)}</p>',
        *sections,
        _left_out(report.left_out),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _colors() -> str:
    light = LIGHT | {variable(color): color for color in SHADES}
    dark = DARK | {variable(color): shade for color, shade in SHADES.items()}
    sheets = ["; ".join(f"{name}: {value}" for name, value in colors.items()) for colors in (light, dark)]
    return (
        f":root {{ color-scheme: light dark; {sheets[0]} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {sheets[1]} }} }}\n"
        "@media print { :root { color-scheme: light } }\n"
    )


def _section(number: int, section: Section) -> str:
    blocks = [
        _figure(block, f"f{number}-{place}") if isinstance(block, Picture) else _table(block)
        for place, block in enumerate(section.blocks, 1)
    ]
    title = f'<h2 id="s{number}">{number}. {escape(section.title)}</h2><p class="soft">{escape(section.facts)}</p>'
    return "\n".join([f"<section>{title}", *blocks, f"{_notes(section.notes)}</section>"])


def _figure(picture: Picture, name: str) -> str:
    svg = inline(picture.draw(), name, picture.title)
    origins = "".join(_origin(origin) for origin in picture.origins)
    caption = f"<figcaption><p>{escape(picture.caption)}</p>{origins}</figcaption>"
    return f'<h3>{escape(picture.title)}</h3>\n<figure><div class="scroll">{svg}</div>{caption}</figure>'


def _origin(origin: Origin) -> str:
    """Where figures come from; its remarks too."""
    parts = [f"From {escape(origin.file)}"]
    if origin.command:
        parts.append(f"<code>{escape(origin.command)}</code>")
    if origin.facts:
        parts.append(escape(origin.facts))
    remarks = "".join(f" ({escape(remark)})" for remark in origin.remarks)
    return f'<p class="origin">{": ".join(parts[:2])}{"; " if parts[2:] else ""}{"".join(parts[2:])}.{remarks}</p>'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = []
        for column, cell in enumerate(cells):
            text, _, below = cell.partition("\n")
            kind = ' class="text"' if column in table.text_columns else ""
            small = f"<small>{escape(below)}</small>" if below else ""
            shown.append(f"<{tag}{kind}>{escape(text)}{small}</{tag}>")
        return f"<tr>{''.join(shown)}</tr>"

    groups = "".join(
        f'<th class="group" colspan="{span}"><a href="#s{number}">{escape(title)}</a></th>'
        for title, number, span in table.groups
    )
    head = (f"<tr><th></th>{groups}</tr>" if groups else "") + row(table.header, "th")
    body = "\n".join(row(cells, "td") for cells in table.rows)
    return (
        f'<h3>{escape(table.title)}</h3>\n<div class="scroll"><table><thead>{head}</thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""


def _left_out(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return ""
    listed = _notes([f"{name}: {reason}" for name, reason in skipped])
    return f"<section><h2>Files that are not in it</h2>{listed}</section>"
