"""The same tables as Markdown, and the ones that stand in the pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..records.timing import ProfileResult
from . import tables
from .results import KINDS, Results, by_kind, rated, type_of
from .tables import Table


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], code: bool = True) -> str:
    """A Markdown table; what would break its cells is escaped.

    Args:
        code: what stands in backquotes is code.
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(escaped(cell, code) for cell in line) + " |" for line in lines) + "\n"


def escaped(text: str, code: bool = False) -> str:
    """A name out of the data may contain what Markdown or HTML takes for its own."""
    signs = [("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;")]
    for sign, instead in signs if code else (*signs, ("`", "&#96;")):
        text = text.replace(sign, instead)
    return " ".join(text.split())


def page(results: Results, title: str) -> str:
    """Every table of the report under one title."""
    rows = rated(results)
    timed: list[tables.Timed] = [*rows, *results.profiles, *results.rooflines]
    sections = [tables.conditions(timed)] if timed else []
    if results.evaluations:
        sections.append(tables.evaluated(results.evaluations))
    if results.scores:
        sections.append(tables.scored(results.scores))
    sections += [tables.judged(verdict) for verdict in results.verdicts]
    sections += [tables.optimized(result) for result in results.optimizations]
    if rows:
        sections.append(tables.measured(rows, results.evaluations))
    if results.profiles:
        sections += [tables.kinds(results.profiles), tables.gaps(results.profiles)]
    sections += [tables.roofline(result) for result in results.rooflines]
    return f"# {escaped(title)}\n\n" + "\n".join(map(_section, sections))


def _section(table_: Table) -> str:
    body = table(table_.columns, [[cell.text for cell in row] for row in table_.rows])
    note = f"\n{escaped(table_.note)}\n" if table_.note else ""
    footnotes = "".join(f"\n{escaped(text)}\n" for text in table_.footnotes)
    return f"## {escaped(table_.title)}\n\n{body}{note}{footnotes}"


# Of the pages --------------------------------------------------------------------------------------------------------


def exports(records: Sequence[Mapping[str, Any]], variant: str) -> str:
    """Seconds and peak memory of one export, a row a format: the last record of each, in the order of the first."""
    by_format = {str(r["format"]): r for r in records if r["variant"] == variant and r["precision"] == "fp32"}
    rows = [
        [f"`{name}`", f"{r['seconds']:.0f}", f"{r['peak_growth_in_weights']:.1f} x"] for name, r in by_format.items()
    ]
    return table(["format", "seconds", "peak memory"], rows)


def kinds(profiles: Sequence[ProfileResult]) -> str:
    """Milliseconds of each kind of layer, a row a kind, a column an artifact."""
    sums = [by_kind(profile) for profile in profiles]
    rows = [
        [kind, *("" if kind not in times else f"{times[kind]:.1f}" for times in sums)]
        for kind in KINDS
        if any(kind in times for times in sums)
    ]
    rows.append(["outside layers", *(f"{p.wall_ms - p.layers_ms:.1f}" for p in profiles)])
    rows.append(["clock", *(f"{p.wall_ms:.1f}" for p in profiles)])
    rows.append(["without profiler", *(f"{p.plain_ms:.1f}" for p in profiles)])
    return table(["ms", *(f"`{p.format}` {type_of(p)}" for p in profiles)], rows)
