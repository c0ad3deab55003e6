"""One self-contained page: no network, light and dark, tables that sort, plots that print.

Whatever comes from a file is escaped; the page's own policy allows one script, by its hash, and no connection.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from . import plots, tables
from .results import Results, latest, rated
from .tables import Cell, Table

SCRIPT = """
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentNode, body = head.closest("table").tBodies[0];
    var column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    head.parentNode.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    function key(row) {
      var cell = row.cells[column];
      return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    }
    function empty(row) { return row.cells[column].textContent === ""; }
    Array.from(body.rows).sort(function (a, b) {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      var x = key(a), y = key(b);
      var order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""

LONG = 60  # characters; a longer cell is broken into lines

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d0d0; --soft: #f3f3f3; --bad: #b00020; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3d42; --soft: #1f2226; --bad: #ff7b8a; }
}
body { margin: 2rem auto; max-width: 108rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 36ch; }
ol.notes { list-style: none; padding: 0; } ol.notes li { overflow-wrap: anywhere; }
td[data-value] { text-align: right; } tbody tr:hover { background: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.bad { color: var(--bad); } .note { font-size: .87rem; opacity: .8; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; color: var(--ink); }
@media print {
  :root { --ink: #000; --paper: #fff; --line: #999; --soft: #fff; --bad: #000; color-scheme: light; }
  body { max-width: none; margin: 0; font-size: 10pt; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } details > * { display: block; }
}
"""


def page(results: Results, title: str) -> str:
    """The whole page as text."""
    rows = rated(results)
    parts = [_conditions(results)]
    timed: list[tables.Timed] = [*rows, *results.profiles, *results.rooflines]
    if timed:
        parts.append(table(tables.conditions(timed)))
    if results.evaluations:
        parts.append(table(tables.evaluated(results.evaluations)))
    if results.scores:
        parts.append(table(tables.scored(results.scores)))
    parts += [table(tables.judged(verdict)) for verdict in results.verdicts]
    parts += [table(tables.optimized(result)) for result in results.optimizations]
    if rows:
        parts.append(table(tables.measured(rows, results.evaluations)))
    parts += [figure(*plot) for plot in plots.all_of(results, rows)]
    if results.profiles:
        parts += [table(tables.kinds(results.profiles)), table(tables.gaps(results.profiles))]
        parts += [table(tables.slowest(profile)) for profile in results.profiles]
    parts += [table(tables.roofline(result)) for result in results.rooflines]
    return document(title, parts)


def document(title: str, parts: Sequence[str], style: str = "", *, images: bool = False) -> str:
    """Everything around a page's parts, which are HTML.

    Args:
        images: it shows some, which come with it.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    shown = "img-src data:; " if images else ""
    policy = f"default-src 'none'; {shown}style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _conditions(results: Results) -> str:
    counts = (
        (len(results.measurements), "measurements"), (len(results.profiles), "profiles"),
        (len(results.rooflines), "rooflines"), (len(results.evaluations) + len(results.scores), "evaluations"),
        (len(results.verdicts), "verdicts"), (len(results.optimizations), "runs of optimize"),
    )  # fmt: skip
    listing = ", ".join(f"{count} {name}" for count, name in counts if count)
    text = f"From {', '.join(results.files)}: {listing}."
    if results.left_out:
        text += " Not shown: " + ", ".join(f"{count} {name}" for name, count in results.left_out.items()) + "."
    older = len(results.measurements) - len(latest(results.measurements))
    if older:
        text += f" {older} older measurements of the same settings are left out."
    return f'<p class="note">{escape(text)}</p>'


def table(shown: Table) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in shown.columns)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in shown.rows)
    note = f'<p class="note">{escape(shown.note)}</p>' if shown.note else ""
    return (
        f"<h2>{escape(shown.title)}</h2>\n{note}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        + _footnotes(shown)
    )


def _footnotes(table: Table) -> str:
    """Across the page, where no table's width hides them."""
    items = "".join(f"<li>{escape(text)}</li>" for text in table.footnotes)
    return f'<ol class="notes note">{items}</ol>' if items else ""


def _cell(cell: Cell) -> str:
    if cell.value is not None:
        return f'<td data-value="{cell.value!r}">{escape(cell.text)}</td>'
    classes = []
    if cell.text.startswith(("invalid", "failed", "not steady", "partial", "FAIL")):
        classes.append("bad")
    if len(cell.text) > LONG:
        classes.append("long")
    given = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{given}>{escape(cell.text)}</td>"


def figure(title: str, caption: str, svg: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<figure>{svg}<figcaption class="note">{escape(caption)}</figcaption></figure>'
