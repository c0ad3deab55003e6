"""The tables of a report as rows of cells, for HTML and Markdown alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..types import ProfileResult, RooflineResult
from .results import Measurement, by_kind, machine_words


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell's text, and the number to sort it by where it holds one."""

    text: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def number(value: float | None, form: str = "") -> Cell:
    """A number in at least three digits, or in the format given; empty where there is none."""
    if value is None:
        return Cell("")
    return Cell(format(value, form) if form else three_digits(value), value)


def three_digits(value: float) -> str:
    """As short as three significant digits are: 0.00123, 12.3, 1235."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def measured(measurements: Sequence[Measurement]) -> Table:
    """One row a setting; what is not valid says why, in place of a speed."""
    rows = []
    for m in measurements:
        interval = m.interval_ms()
        p95 = _p95(m.samples_ms)
        size = "x".join(map(str, m.image_size))
        spread = Cell("") if interval is None else Cell(f"{three_digits(interval[0])} to {three_digits(interval[1])}")
        valid = m.valid
        rows.append(
            (
                Cell(m.model), Cell(m.runtime), Cell(m.precision), number(m.batch, "d"),
                Cell(size, m.image_size[0] * m.image_size[1]), Cell(f"{m.scenario}, {m.scope}"),
                number(m.median_ms if valid else None), spread if valid else Cell(""), number(p95 if valid else None),
                number(m.images_per_s if valid else None), number(m.tflops if valid else None),
                number(m.percent_of_bound if valid else None, ".0f"), number(len(m.samples_ms), "d"),
                Cell(m.status if m.reason is None else f"{m.status}: {m.reason}"),
            )
        )  # fmt: skip
    return Table(
        "Measurements",
        ("model", "runtime", "precision", "batch", "pixels", "what is timed", "median ms", "95 % of the median",
         "p95 ms", "images/s", "TFLOP/s", "% of bound", "samples", "state"),
        tuple(rows),
        "Interval of the median from order statistics. Only valid rows are in the plots.",
    )  # fmt: skip


def _p95(samples: Sequence[float]) -> float | None:
    """None for fewer than 59 samples: with fewer, all of them lie below the p95 more than 1 time in 20."""
    return sorted(samples)[-(-len(samples) * 95 // 100) - 1] if len(samples) >= 59 else None


def kinds(profiles: Sequence[ProfileResult]) -> Table:
    """Milliseconds and share of each kind, a row a profile and kind."""
    rows = []
    for p in profiles:
        for kind, ms in sorted(by_kind(p).items(), key=lambda item: -item[1]):
            count = sum(layer.kind == kind for layer in p.layers)
            rows.append((*_whose(p), Cell(kind), number(ms), _share(ms / p.layers_ms), number(count, "d")))
    return Table("Time by kind of layer", ("artifact", "batch", "kind", "ms", "share", "layers"), tuple(rows))


def gaps(profiles: Sequence[ProfileResult]) -> Table:
    """How far the layers account for the time on the clock."""
    rows = tuple(
        (*_whose(p), number(p.layers_ms), number(p.wall_ms), _share((p.wall_ms - p.layers_ms) / p.wall_ms),
         number(p.plain_ms), Cell(p.profiler + (f"; {p.note}" if p.note else "")))
        for p in profiles
    )  # fmt: skip
    columns = ("artifact", "batch", "layers ms", "clock ms", "outside layers", "without profiler ms", "profiler")
    return Table("What the layers account for", columns, rows)


def slowest(profile: ProfileResult, count: int = 25) -> Table:
    """The slowest layers of one profile."""
    rows = tuple(
        (Cell(layer.name), Cell(layer.op), Cell(layer.kind), Cell(layer.type), number(layer.ms),
         _share(layer.ms / profile.layers_ms))
        for layer in profile.layers[:count]
    )  # fmt: skip
    artifact, batch = _whose(profile)
    title = f"Slowest layers: {artifact.text}, batch {batch.text}"
    return Table(title, ("layer", "operation", "kind", "type", "ms", "share"), rows)


def roofline(result: RooflineResult) -> Table:
    """What bounds each operation."""
    rows = tuple(
        (Cell(row.stage), Cell(row.operation), number(row.count, "d"), number(row.gflop), number(row.mb),
         number(row.gflop / row.mb * 1e3), number(row.ms), _share(row.ms / result.ms), Cell(row.limit))
        for row in result.rows
    )  # fmt: skip
    title = f"Roofline: {result.model} {result.precision}, batch {result.batch}, {result.ceilings.name}"
    columns = ("stage", "operation", "count", "GFLOP", "MB", "FLOP/byte", "ms", "share", "bound by")
    note = f"At least {three_digits(result.ms)} ms a batch: at most {three_digits(result.images_per_s)} images/s."
    return Table(title, columns, rows, note)


def conditions(items: Iterable[Measurement | ProfileResult | RooflineResult]) -> Table:
    """Machines and versions that the results come from, each combination once."""
    seen: dict[tuple[str, str, str], None] = {}
    for item in items:
        if item.machine is not None:
            kept = ("python", "torch", "timm", "onnxruntime", "openvino", "tensorrt")
            versions = ", ".join(f"{n} {item.versions[n]}" for n in kept if n in item.versions)
            system = str(item.machine.get("system", ""))
            seen[machine_words(item.machine), system, versions] = None
    rows = tuple(tuple(Cell(text) for text in row) for row in seen)
    return Table("Machines and versions", ("machine", "system", "versions"), rows)


def _whose(p: ProfileResult) -> tuple[Cell, Cell]:
    return Cell(f"{p.model} {p.format} {p.precision}"), number(p.batch, "d")


def _share(value: float) -> Cell:
    return Cell(f"{value:.1%}", value)
