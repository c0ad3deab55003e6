"""Write the READMEs' tables of measurements from the committed results, or check that the written ones are current.

python scripts/make_tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from convnext_deploy import regress
from convnext_deploy.report import markdown, results

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import paper_table  # noqa: E402 - from benchmarks

CPU = ROOT / "benchmarks" / "results" / "2026-11-22-cpu.jsonl"
WHERE = ROOT / "benchmarks" / "results" / "2026-11-22-where-time-goes.jsonl"
SWIN = ROOT / "benchmarks" / "results" / "2026-11-23-swin.jsonl"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"(^<!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL | re.MULTILINE)


def runtimes() -> str:
    return markdown.runtimes(results.read([CPU]).measurements)


def exports() -> str:
    records = [json.loads(line) for line in CPU.read_text().splitlines()]
    return markdown.exports([r for r in records if r["benchmark"] == "export"], "base")


def kinds() -> str:
    return markdown.kinds(results.read([WHERE]).profiles)


def swin() -> str:
    return markdown.table(paper_table.COLUMNS, paper_table.rows_of(regress.read_results(SWIN)))


TABLES: dict[str, Callable[[], str]] = {"runtimes": runtimes, "exports": exports, "kinds": kinds, "swin": swin}


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
