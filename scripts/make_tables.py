"""Write the pages' tables of measurements from the committed results, or check that the written ones are current.

python scripts/make_tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from convnext_deploy.records.timing import BenchResult
from convnext_deploy.reports import markdown, results
from convnext_deploy.timing import compare

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import paper_table  # noqa: E402 - from benchmarks

CPU = ROOT / "benchmarks" / "results" / "2026-11-22-cpu.jsonl"
WHERE = ROOT / "benchmarks" / "results" / "2026-11-22-where-time-goes.jsonl"
SWIN = ROOT / "benchmarks" / "results" / "2026-11-23-swin.jsonl"
NATIVE = ROOT / "benchmarks" / "results" / "2026-11-23-native.jsonl"
ZEN5 = ROOT / "benchmarks" / "results" / "2026-11-27-native-zen5.jsonl"
ZEN5_OTHERS = ROOT / "benchmarks" / "results" / "2026-11-27-native-zen5-v2-base.jsonl"
AVX2 = ROOT / "benchmarks" / "results" / "2026-11-27-native-zen5-as-avx2.jsonl"
XEON = ROOT / "benchmarks" / "results" / "2026-11-28-native-xeon-amx.jsonl"
XEON_AVX_VNNI = ROOT / "benchmarks" / "results" / "2026-11-28-native-xeon-as-avx-vnni.jsonl"
XEON_AVX2 = ROOT / "benchmarks" / "results" / "2026-11-28-native-xeon-as-avx2.jsonl"
FORMATS = ROOT / "benchmarks" / "results" / "2026-11-27-formats-zen5.jsonl"
PAGES = [ROOT / "benchmarks" / "README.md", ROOT / "docs" / "design" / "native-measured.md"]
BLOCK = re.compile(r"(^<!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL | re.MULTILINE)


def exports() -> str:
    records = [json.loads(line) for line in CPU.read_text().splitlines()]
    return markdown.exports([r for r in records if r["benchmark"] == "export"], "base")


def kinds() -> str:
    return markdown.kinds(results.read([WHERE]).profiles)


def swin() -> str:
    return markdown.table(paper_table.COLUMNS, paper_table.rows_of(compare.read_results(SWIN)))


def cpu(results: Path) -> str:
    """Milliseconds a batch and error of each engine and type, a row each, beside the native engine in the same type.

    Where the share of the peak was measured, it stands behind the milliseconds.
    """
    rows = compare.read_results(results)
    cells = {(row.model, _engine(row), row.batch, row.threads): row for row in rows}
    settings = list(dict.fromkeys((row.model, row.batch, row.threads) for row in rows))
    lines = []
    for name in dict.fromkeys(_engine(row) for row in rows):
        line, error = [name], ""
        for model, batch, threads in settings:
            row = cells.get((model, name, batch, threads))
            ours = cells.get((model, f"`native` {name.split()[-1]}", batch, threads))
            if row is None or ours is None or row.median_ms is None or ours.median_ms is None:
                line += ["", ""]
                continue
            error = error or ("" if row.parity is None else f"{row.parity:.2g}")
            state = "" if row.status == "valid" else f" ({row.status})"
            if row.percent_of_bound is not None:
                state = f", {row.percent_of_bound:.0f} %{state}"
            line += [f"{row.median_ms:#.3g}".rstrip(".") + state, f"{row.median_ms / ours.median_ms:.2f}"]
        lines.append([*line, error])
    several = len({threads for _, _, threads in settings}) > 1
    heads = []
    for model, batch, threads in settings:
        width = f"{threads} thread{'s' if threads > 1 else ''}, " if several else ""
        heads.append(f"{model.replace('convnext_', '')}, batch {batch}, {width}ms")
    columns = ["engine", *(word for head in heads for word in (head, "/ native")), "error"]
    return markdown.table(columns, lines)


def _engine(row: BenchResult) -> str:
    """The last word is the type of its products."""
    label = row.subject.split()[-1]
    if label.startswith("nncf"):
        return f"OpenVINO, {label.replace('nncf', 'NNCF').replace('-', ' ')}, int8"
    if row.artifact is None:
        return f"timm, {row.runtime} {row.precision}"
    return f"`{row.runtime}` {label.rpartition('-')[2]}"


TABLES: dict[str, Callable[[], str]] = {
    "exports": exports,
    "kinds": kinds,
    "swin": swin,
    "cpu": partial(cpu, NATIVE),
    "cpu-zen5": partial(cpu, ZEN5),
    "cpu-zen5-v2-base": partial(cpu, ZEN5_OTHERS),
    "cpu-avx2": partial(cpu, AVX2),
    "cpu-xeon": partial(cpu, XEON),
    "cpu-xeon-avx-vnni": partial(cpu, XEON_AVX_VNNI),
    "cpu-xeon-avx2": partial(cpu, XEON_AVX2),
    "formats": partial(cpu, FORMATS),
}


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """The text with every block between markers made anew; leaving with a message where a marker names no table."""

    def fill(found: re.Match[str]) -> str:
        if found["name"] not in tables:
            sys.exit(f"no table is called {found['name']!r}; expected one of {', '.join(tables)}")
        return found[1] + tables[found["name"]]() + found[4]

    if len(re.findall("^<!-- table:", text, re.MULTILINE)) != len(BLOCK.findall(text)):
        sys.exit("a table's marker has no <!-- end --> after it, or a name of other than letters, digits and -")
    return BLOCK.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table is stale")
    parser.add_argument("paths", nargs="*", type=Path, default=PAGES)
    args = parser.parse_args()
    for path in args.paths:
        text = path.read_text()
        made = filled(text, TABLES)
        if not args.check:
            path.write_text(made)
        elif made != text:
            sys.exit(f"{path}: its tables are stale; run: make tables")


if __name__ == "__main__":
    main()
