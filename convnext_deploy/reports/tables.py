"""The tables of a report as rows of cells, for HTML and Markdown alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..accuracy.outputs import METRICS
from ..errors import counted
from ..records.accuracy import EvalResult, ScoreResult, ScoreVerdict, Verdict
from ..records.optimize import OptimizeResult
from ..records.timing import ProfileResult, RooflineResult
from .results import Measurement, accuracy_of, by_kind, machine_words, share_interval, type_of

Timed = Measurement | ProfileResult | RooflineResult


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell's text, and the number to sort it by where it contains one."""

    text: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    footnotes: tuple[str, ...] = ()  # what is too long for a cell


def number(value: float | None, form: str = "") -> Cell:
    """A number in at least three digits, or in the format given; empty where there is none."""
    if value is None:
        return Cell("")
    return Cell(format(value, form) if form else three_digits(value), value)


def three_digits(value: float) -> str:
    """As short as three significant digits are: 0.00123, 12.3, 1235."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def rate(value: float) -> str:
    """A rate, such as images/s: as `three_digits`, and thousands apart: 1,235."""
    return f"{value:,.0f}" if value >= 1000 else three_digits(value)


def measured(measurements: Sequence[Measurement], evaluations: Sequence[EvalResult] = ()) -> Table:
    """One row a setting; what is not valid names its state in place of a speed, and why in a footnote."""
    rows = []
    reasons = list(dict.fromkeys(_state(m) for m in measurements if m.reason is not None))
    for m in measurements:
        interval = m.interval_ms()
        p95 = _p95(m.samples_ms)
        size = "x".join(map(str, m.image_size))
        spread = Cell("") if interval is None else Cell(f"{three_digits(interval[0])} to {three_digits(interval[1])}")
        valid = m.valid
        rows.append(
            (
                Cell(m.model), Cell(" ".join(filter(None, (m.runtime, m.label)))), Cell(m.type),
                Cell(m.status if m.reason is None else f"{m.status} [{reasons.index(_state(m)) + 1}]"),
                _top1(m, evaluations), number(m.batch, "d"),
                Cell(size, m.image_size[0] * m.image_size[1]), Cell(f"{m.scenario}, {m.scope}"),
                number(m.median_ms if valid else None), spread if valid else Cell(""), number(p95 if valid else None),
                number(m.images_per_s if valid else None), number(m.tflops if valid else None),
                number(m.percent_of_bound if valid else None, ".0f"), number(len(m.samples_ms), "d"),
            )
        )  # fmt: skip
    return Table(
        "Measurements",
        ("model", "runtime", "type", "state", "top-1 %", "batch", "pixels", "what is timed", "median ms",
         "95 % of the median", "p95 ms", "images/s", "TFLOP/s", "% of bound", "samples"),
        tuple(rows),
        "Interval of the median from order statistics. Only valid rows are in the plots. Accuracy is the artifact's "
        "own, where its evaluation was given.",
        tuple(f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)),
    )  # fmt: skip


def _state(m: Measurement) -> str:
    return f"{m.status}: {m.reason}"


def _top1(m: Measurement, evaluations: Sequence[EvalResult]) -> Cell:
    """The top-1 of this artifact's last evaluation, or the record's own."""
    own = accuracy_of(m, evaluations)
    return number(100 * own[-1].top1 if own else None if m.top1 is None else 100 * m.top1, ".2f")


def evaluated(evaluations: Sequence[EvalResult]) -> Table:
    """Accuracy of each artifact on each set of images."""
    rows = []
    for e in evaluations:
        low, high = share_interval(e.top1, e.images)
        rows.append(
            (Cell(e.artifact), Cell(e.artifact_sha256[:8]), Cell(e.data), number(e.images, ",d"),
             number(100 * e.top1, ".2f"), Cell(f"{100 * low:.2f} to {100 * high:.2f}"), number(100 * e.top5, ".2f"),
             number(len(e.corrupt), "d"))
        )  # fmt: skip
    columns = ("artifact", "sha256", "data", "images", "top-1 %", "95 % of top-1", "top-5 %", "unreadable")
    return Table("Accuracy", columns, tuple(rows), "Exact intervals (Clopper and Pearson), each artifact by itself.")


def scored(results: Sequence[ScoreResult]) -> Table:
    """The score of each model without a top-1 on each set of images."""
    rows = [
        (Cell(e.artifact), Cell(e.artifact_sha256[:8]), Cell(e.data), number(e.images, ",d"), Cell(METRICS[e.problem]),
         number(100 * e.score, ".2f"), number(len(e.corrupt), "d"))
        for e in results
    ]  # fmt: skip
    return Table("Scores", ("artifact", "sha256", "data", "images", "score", "%", "unreadable"), tuple(rows))


def judged(verdict: Verdict | ScoreVerdict) -> Table:
    """What the gate held against its limits. Shares are in percent, as limits are written."""
    rows = []
    for check in verdict.checks:
        scale = 1 if check.name in ("latency_ratio", "size_ratio") else 100
        numbers = [None if v is None else scale * v for v in (check.value, check.lower, check.upper, check.limit)]
        rows.append((Cell(check.name), Cell(check.decision), *(number(v, ".3f") for v in numbers)))
    title = f"Gate: {verdict.decision}, {verdict.candidate} against {verdict.baseline}"
    if isinstance(verdict, ScoreVerdict):
        what, before, after = METRICS[verdict.problem], verdict.baseline_score, verdict.candidate_score
    else:
        what, before, after = "top-1", verdict.baseline_top1, verdict.candidate_top1
    note = f"On {counted(verdict.images, 'image')} of {verdict.data}: {what} {before:.2%} before, {after:.2%} after."
    return Table(title, ("check", "decision", "measured", "lower", "upper", "limit"), tuple(rows), note)


def optimized(result: OptimizeResult) -> Table:
    """Every candidate of a run of `optimize`, the fastest first, and why it was not chosen."""
    rows = []
    for c in sorted(result.candidates, key=lambda c: (c.ms is None, c.ms or 0.0)):
        check = None if c.verdict is None else c.verdict.checks[0]
        bounds = None if check is None or check.upper is None else check.upper
        spread = (
            "" if c.interval_ms is None else f"{three_digits(c.interval_ms[0])} to {three_digits(c.interval_ms[1])}"
        )
        agrees = None if c.agreement is None else 100 * c.agreement
        rows.append(
            (Cell(c.name), Cell(c.state), number(c.ms), Cell(spread), number(agrees, ".1f"),
             number(None if check is None else 100 * check.value, ".2f"),
             number(None if bounds is None else 100 * bounds, ".2f"),
             number(None if c.bytes is None else c.bytes / 1e6), number(len(c.operations) or None, "d"),
             number(c.parity, ".1e"), Cell(c.reason or (c.timing or "").replace("valid", "")))
        )  # fmt: skip
    columns = ("candidate", "state", "ms a batch", "95 % of the median", "agrees %", "drop, points", "at most",
               "MB", "in 8 bits", "relative error", "why")  # fmt: skip
    note = (
        f"Batch {result.batch} on {result.device}. Agreement with {result.baseline} on {result.images['selection']:,} "
        f"images, drop of top-1 with its upper bound on {result.images['final']:,} others; limit {result.max_drop:g} "
        "points. Relative error against the fp32 source on the bundled images."
    )
    return Table(f"Candidates: {result.model}", columns, tuple(rows), note)


def _p95(samples: Sequence[float]) -> float | None:
    """None for fewer than 59 samples: with fewer, all of them lie below the p95 more than 1 time in 20."""
    return sorted(samples)[-(-len(samples) * 95 // 100) - 1] if len(samples) >= 59 else None


def kinds(profiles: Sequence[ProfileResult]) -> Table:
    """Milliseconds and share of each kind, a row a profile and kind."""
    rows = []
    for p in profiles:
        for kind, ms in sorted(by_kind(p).items(), key=lambda item: -item[1]):
            count = sum(layer.kind == kind for layer in p.layers)
            rows.append((*_whose(p), Cell(kind), number(ms), _share(ms, p.layers_ms), number(count, "d")))
    return Table("Time by kind of layer", ("artifact", "batch", "kind", "ms", "share", "layers"), tuple(rows))


def gaps(profiles: Sequence[ProfileResult]) -> Table:
    """How far the layers account for the time on the clock."""
    rows = tuple(
        (*_whose(p), number(p.layers_ms), number(p.wall_ms), _share(p.wall_ms - p.layers_ms, p.wall_ms),
         number(p.plain_ms), Cell(p.profiler + (f"; {p.note}" if p.note else "")))
        for p in profiles
    )  # fmt: skip
    columns = ("artifact", "batch", "layers ms", "clock ms", "outside layers", "without profiler ms", "profiler")
    return Table("What the layers account for", columns, rows)


def slowest(profile: ProfileResult, count: int = 25) -> Table:
    """The slowest layers of one profile."""
    rows = tuple(
        (Cell(layer.name), Cell(layer.op), Cell(layer.kind), Cell(layer.type), number(layer.ms),
         _share(layer.ms, profile.layers_ms))
        for layer in profile.layers[:count]
    )  # fmt: skip
    artifact, batch = _whose(profile)
    title = f"Slowest layers: {artifact.text}, batch {batch.text}"
    return Table(title, ("layer", "operation", "kind", "type", "ms", "share"), rows)


def roofline(result: RooflineResult) -> Table:
    """What bounds each operation."""
    rows = tuple(
        (Cell(row.stage), Cell(row.operation), number(row.count, "d"), number(row.gflop), number(row.mb),
         number(row.gflop / row.mb * 1e3 if row.mb else None), number(row.ms), _share(row.ms, result.ms),
         Cell(row.limit))
        for row in result.rows
    )  # fmt: skip
    title = f"Roofline: {result.model} {result.precision}, batch {result.batch}, {result.ceilings.name}"
    columns = ("stage", "operation", "count", "GFLOP", "MB", "FLOP/byte", "ms", "share", "bound by")
    note = f"At least {three_digits(result.ms)} ms a batch: at most {three_digits(result.images_per_s)} images/s."
    return Table(title, columns, rows, note)


def conditions(items: Iterable[Timed]) -> Table:
    """Machines and versions that the results come from, each combination once."""
    distinct: dict[tuple[str, str, str], None] = {}
    for item in items:
        if item.machine is not None:
            kept = ("python", "torch", "timm", "onnxruntime", "openvino", "tensorrt")
            versions = ", ".join(f"{n} {item.versions[n]}" for n in kept if n in item.versions)
            system = str(item.machine.get("system", ""))
            distinct[machine_words(item.machine), system, versions] = None
    rows = tuple(tuple(Cell(text) for text in row) for row in distinct)
    return Table("Machines and versions", ("machine", "system", "versions"), rows)


def _whose(p: ProfileResult) -> tuple[Cell, Cell]:
    return Cell(f"{p.artifact}: {p.model} {p.format} {type_of(p)}"), number(p.batch, "d")


def _share(part: float, whole: float) -> Cell:
    """Empty where there is nothing to take a share of."""
    return Cell(f"{part / whole:.1%}", part / whole) if whole else Cell("")
