"""The page of one run of `optimize`: the verdict first, then what it rests on, and how to repeat it."""

import base64
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from .. import env
from ..records.accuracy import Flip, Verdict
from ..records.optimize import Candidate, OptimizeResult
from . import html, plots, tables
from .results import machine_words
from .tables import Cell, Table, number, rate, three_digits

FLIPS_SHOWN = 40
SIDE = 128  # pixels of an image on the page
STYLE = """
.verdict { border: 1px solid var(--line); border-left: .5rem solid #2e8540; background: var(--soft);
  padding: 1rem 1.2rem; border-radius: .4rem; max-width: 62rem; }
.verdict.none { border-left-color: var(--bad); } .verdict strong { font-size: 1.25rem; } .verdict p { margin: .4rem 0; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: .8rem 0 0; }
.facts div { min-width: 7rem; } .facts dt { font-size: .8rem; opacity: .75; } .facts dd { margin: 0; font-size: 1.15rem;
  font-variant-numeric: tabular-nums; }
.flips { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
.flip { display: flex; gap: .7rem; border: 1px solid var(--line); border-radius: .4rem; padding: .5rem;
  font-size: .84rem; overflow-wrap: anywhere; break-inside: avoid; }
.flip img { width: 5rem; height: 5rem; object-fit: contain; image-rendering: pixelated; background: var(--soft); }
.flip p { margin: 0 0 .15rem; } .right::after { content: " \\2713"; color: #2e8540; } .name { opacity: .7; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
td:last-child:not([data-value]) { white-space: normal; min-width: 18ch; }
"""

Read = Callable[[str], Image.Image]  # an image by its name in the data


def page(result: OptimizeResult, read: Read, next_commands: tuple[str, ...] = ()) -> str:
    """The whole page as text.

    Args:
        read: returns the images that changed class, from the same data.
        next_commands: what to type next.
    """
    rows = {row.name: row for row in result.candidates}
    chosen = rows[result.chosen] if result.chosen is not None else None
    parts = [_verdict(result, chosen)]
    if absent := env.missing(("matplotlib",)):  # of the extra `report`
        line = f"The picture of accuracy and latency is left out: {env.missing_line(*absent)}"
        parts.append(f'<p class="note">{escape(line)}</p>')
    elif drawn := plots.front(result):
        parts.append(html.figure("Accuracy and latency", plots.FRONT, drawn))
    parts.append(html.table(tables.optimized(result)))
    judged = chosen.verdict if chosen is not None else None
    if judged is not None:
        parts += [_flips(judged, read), html.table(_classes(judged))]
    parts.append(html.table(_assumed(result)))
    parts.append(html.table(_conditions(result)))
    if result.notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in result.notes) + "</ul>")
    if result.command or next_commands:
        again = [shlex.join(result.command)] if result.command else []
        lines = "\n".join(["# again", *again, "", "# next", *next_commands] if again else next_commands)
        parts.append(f"<h2>Repeat it, and go on</h2>\n<pre>{escape(lines)}</pre>")
    return html.document(f"optimize: {result.model}", parts, STYLE, images=True)


def next_commands(out: Path, images: Sequence[str], result: OptimizeResult) -> tuple[str, ...]:
    """What to type next, ready to be copied.

    Args:
        images: the words that name the labelled images.
    """
    where, named = shlex.quote(str(out)), shlex.join(images)
    return (
        f"convnext-deploy predict {where} IMAGE",
        f"convnext-deploy serve {where}",
        f"convnext-deploy inspect {where}",
        f"convnext-deploy gate --baseline {where} --candidate NEXT {named} --max-drop {result.max_drop:g}",
    )


def _verdict(result: OptimizeResult, chosen: Candidate | None) -> str:
    if chosen is None or chosen.ms is None:
        return f'<div class="verdict none"><strong>Nothing was chosen</strong><p>{escape(result.why)}</p></div>'
    baseline = result.fastest_exact
    facts = [
        ("ms a batch" if result.batch > 1 else "ms an image", three_digits(chosen.ms)),
        ("images/s", rate(1e3 * result.batch / chosen.ms)),
        ("MB", three_digits((chosen.bytes or 0) / 1e6)),
    ]
    if baseline.ms is not None and not chosen.exact:
        facts.append((f"times as fast as {baseline.name}", f"{baseline.ms / chosen.ms:.2f}"))
    if chosen.verdict is not None:
        check = chosen.verdict.checks[0]
        facts += [
            ("top-1 before", f"{chosen.verdict.baseline_top1:.2%}"),
            ("top-1 after", f"{chosen.verdict.candidate_top1:.2%}"),
            ("drop, points", f"{100 * check.value:.2f}"),
            ("drop at most", f"{100 * (check.upper or 0):.2f} of {result.max_drop:g}"),
        ]
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    disturbed = ""
    if chosen.timing not in (None, "valid"):
        disturbed = f'<p class="bad">The machine was not quiet while it was timed: {escape(chosen.timing or "")}.</p>'
    return (
        f'<div class="verdict"><strong>{escape(chosen.name)}</strong><p>{escape(result.why)}.</p>{disturbed}'
        f'<dl class="facts">{listed}</dl></div>'
    )


def _flips(verdict: Verdict, read: Read) -> str:
    """The images whose first class changed, each with both answers; the surest of the baseline first."""
    names = {row.label: row.name for row in verdict.per_class}
    ordered = sorted(verdict.flips, key=lambda flip: -(flip.baseline_margin or 0.0))
    title = f"<h2>Images that changed class: {len(ordered)} of {verdict.images:,}</h2>"
    if not ordered:
        return title
    said = "The surest answers of the baseline first; a tick marks the label."
    if len(ordered) > FLIPS_SHOWN:
        said += f" The first {FLIPS_SHOWN} are shown; result.json has all."
    cards = "".join(_flip(flip, names, read) for flip in ordered[:FLIPS_SHOWN])
    return f'{title}\n<p class="note">{said}</p><div class="flips">{cards}</div>'


def _flip(flip: Flip, names: Mapping[int, str], read: Read) -> str:
    def answer(title: str, number_: int, margin: float | None) -> str:
        sure = "" if margin is None else f" <span class='name'>({margin:.2f} nats ahead)</span>"
        mark = ' class="right"' if number_ == flip.label else ""
        return f"<p>{title}: <b{mark}>{escape(names.get(number_, str(number_)))}</b>{sure}</p>"

    label = names.get(flip.label, str(flip.label))
    return (
        f'<div class="flip"><img alt="{escape(label)}" src="{_data(read(flip.name))}"><div>'
        + answer("before", flip.baseline, flip.baseline_margin)
        + answer("after", flip.candidate, flip.candidate_margin)
        + f'<p>label: {escape(label)}</p><p class="name">{escape(flip.name)}</p></div></div>'
    )


def _data(image: Image.Image) -> str:
    """An image as it is seen, small, inside the page."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "PNG" if max(small.size) <= 64 else "JPEG")
    kind = "png" if max(small.size) <= 64 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _classes(verdict: Verdict) -> Table:
    rows = tuple(
        (Cell(c.name), number(c.images, ",d"), number(c.lost, "d"), number(c.gained, "d"),
         number(100 * (c.gained - c.lost) / c.images, "+.2f"), number(c.p_value, ".3f"),
         Cell("FAIL: beyond chance" if c.beyond_chance else ""))
        for c in sorted(verdict.per_class, key=lambda c: c.gained - c.lost)
    )  # fmt: skip
    columns = ("class", "images", "lost", "gained", "change of top-1, points", "p, over all classes", "")
    note = "Lost: only the baseline is right. Gained: only the chosen one is."
    return Table("Change of each class", columns, rows, note)


def _assumed(result: OptimizeResult) -> Table:
    """How images become pixels, and where each fact is from."""
    facts = result.preprocessing
    known = {
        "image_size": "x".join(map(str, result.image_size)), "mean": ", ".join(f"{m:g}" for m in facts.mean),
        "std": ", ".join(f"{s:g}" for s in facts.std), "interpolation": facts.interpolation,
        "crop_pct": f"{facts.crop_pct:g}", "crop_mode": facts.crop_mode,
    }  # fmt: skip
    rows = tuple(
        (Cell(name), Cell(value), Cell("assumed: nothing says it" if name in facts.assumed else "given, or known"))
        for name, value in known.items()
    )
    return Table("What the images are prepared by", ("fact", "value", "from"), rows)


def _conditions(result: OptimizeResult) -> Table:
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    rows = [
        ("machine", machine_words(result.machine)), ("system", str(result.machine.get("system", ""))),
        ("CPU features", str(result.machine.get("cpu_features", ""))), ("versions", versions),
        ("weights", f"{result.weights}, tensors {result.weights_sha256[:16]}"), ("data", result.data),
        ("images", ", ".join(f"{count:,} {name}" for name, count in result.images.items())),
        ("objective", f"{result.objective}, batch {result.batch}, threads {result.threads or 'all'}"),
        ("finalists, in order", ", ".join(result.order) or "none"), ("time", spent), ("made", result.created),
    ]  # fmt: skip
    return Table("Machine, versions and data", ("fact", "value"), tuple((Cell(a), Cell(b)) for a, b in rows))
