"""Plots as SVG that stands inside a page: text stays text, and lines take the page's own colour, dark or light."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from ..env import needs
from ..records.accuracy import EvalResult
from ..records.optimize import OptimizeResult
from ..records.timing import ProfileResult, RooflineResult
from .published import PAIRS, accuracies
from .results import KINDS, Measurement, Results, accuracy_of, by_kind, machine_words, share_interval, type_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour, and is replaced by it
# Distinct to colour-blind readers, and with enough contrast on white and on near-black (after Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56a0d3", "#8c564b", "#7f7f7f", "#9467bd", "#e0484d")
DASHES = ("-", "--", "-.", ":")
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "convnext-deploy", "text.parse_math": False, "font.family": "sans-serif",
    "font.size": 9, "axes.titlesize": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none", "figure.facecolor": "none",
    "savefig.facecolor": "none", "legend.framealpha": 0.0, "legend.fontsize": 8, "grid.color": INK, "grid.alpha": 0.15,
    "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.5,
}  # fmt: skip
PANEL, ALONE = (4.6, 3.1), (7.0, 3.6)  # inches, of one of several panels and of a single one
COLUMNS = 2


def _drawn(name: str, panels: int, draw: Callable[["Figure", list["Axes"]], None]) -> str:
    """One figure of so many panels as SVG text; `name` keeps its ids apart from those of other figures."""
    with needs("matplotlib"):
        import matplotlib
    from matplotlib.figure import Figure

    columns = min(panels, COLUMNS)
    rows = math.ceil(panels / columns)
    with matplotlib.rc_context(SETTINGS):
        size = ALONE if panels == 1 else (PANEL[0] * columns, PANEL[1] * rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
        draw(figure, axes)
        buffer = StringIO()
        with warnings.catch_warnings():
            # Letters stay text in SVG, and are of the browser's fonts; matplotlib's own only measure them.
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from (current )?font", UserWarning)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return svg.replace(INK, "currentColor")


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of each series, the same in every panel."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        for i, name in enumerate(dict.fromkeys(names))
    }


def _legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3)


COUNTERPARTS = {pair.swin: pair.convnext for pair in PAIRS}


def _setting(m: Measurement) -> str:
    """Model, pixels, and what is timed where that is not the plain case: only equal ones share a panel.

    A Swin shares that of the ConvNeXt of its size, or the two could not be compared by eye.
    """
    height, width = m.image_size
    words = [COUNTERPARTS.get(m.model, m.model), str(height) if height == width else f"{height}x{width}"]
    words += [word for word in (m.scenario, m.scope, m.task) if word not in ("single-stream", "compute", "classify")]
    return ", ".join(words)


def _series(m: Measurement) -> str:
    return f"Swin, {m.series}" if m.model in COUNTERPARTS else m.series


def _paired_styles(measurements: Iterable[Measurement]) -> dict[str, dict[str, Any]]:
    """A runtime has one colour, and Swin's line is dotted."""
    rows = list(measurements)
    colours = _styles(m.series for m in rows)
    return {_series(m): colours[m.series] | ({"linestyle": ":"} if m.model in COUNTERPARTS else {}) for m in rows}


def _plain_numbers(panel: "Axes", *axes: str) -> None:
    """Logarithmic axes with the numbers themselves: powers would need mathematical text, which is off."""
    for name in axes:
        axis = panel.xaxis if name == "x" else panel.yaxis
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}" if name == "x" else "")
    panel.tick_params(axis="x", which="both", labelsize=7, rotation=30)


def throughput(measurements: Sequence[Measurement], name: str = "throughput") -> str | None:
    """Images per second by batch, a panel a model."""
    models = _grouped((m for m in measurements if m.valid), _setting)
    if not models:
        return None
    styles = _paired_styles(m for group in models.values() for m in group)

    def draw(figure: "Figure", axes: list["Axes"]) -> None:
        for panel, (title, group) in zip(axes, models.items(), strict=True):
            for name, rows in _grouped(group, _series).items():
                best: dict[int, float] = {}
                for m in rows:
                    best[m.batch] = max(best.get(m.batch, 0.0), m.images_per_s)
                panel.plot(sorted(best), [best[b] for b in sorted(best)], label=name, marker="o", **styles[name])
            batches = sorted({m.batch for m in group})
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, [str(b) for b in batches])
            panel.minorticks_off()
            panel.set_ylim(0, 1.08 * max(m.images_per_s or 0.0 for m in group))
            panel.set(title=title, xlabel="batch", ylabel="images/s")
        _legend(figure, axes)

    return _drawn(name, len(models), draw)


def latency(measurements: Sequence[Measurement], name: str = "latency") -> str | None:
    """Share of samples below each latency, a panel a model and batch; every sample is in the curve."""
    groups = _grouped((m for m in measurements if m.valid), lambda m: f"{_setting(m)}, batch {m.batch}")
    if not groups:
        return None
    styles = _paired_styles(m for group in groups.values() for m in group)

    def draw(figure: "Figure", axes: list["Axes"]) -> None:
        for panel, (title, group) in zip(axes, groups.items(), strict=True):
            for m in group:
                panel.ecdf(m.samples_ms, label=_series(m), **styles[_series(m)])
            panel.set_xscale("log")
            panel.set(title=title, xlabel="ms", ylabel="share of samples", ylim=(0, 1))
            _plain_numbers(panel, "x")
        _legend(figure, axes)

    return _drawn(name, len(groups), draw)


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement at an accuracy."""

    m: Measurement
    top1: float  # fraction
    origin: str  # "measured", or what published weights were trained on before: "in1k", "in22k"
    data: str  # that the accuracy is of
    interval: tuple[float, float] | None = None  # 95 %


def pareto_points(measurements: Sequence[Measurement], evaluations: Sequence[EvalResult] = ()) -> list[Point]:
    """Every valid measurement at the accuracies that are known of it.

    An artifact's own evaluations come first, then what its record says. Published accuracies are those of published
    weights: a row with random weights stands for its architecture and has them, a user's weights never.
    """
    points = []
    for m in measurements:
        if not m.valid or m.task != "classify":
            continue
        own = accuracy_of(m, evaluations)
        if own:
            points += [Point(m, e.top1, "measured", e.data, share_interval(e.top1, e.images)) for e in own]
        elif m.top1 is not None:
            points.append(Point(m, m.top1, "measured", "the record's own images"))
        elif m.random_weights and m.type == m.precision:  # 8 bits have an accuracy of their own
            points += [
                Point(m, a.top1, a.pretraining, "ImageNet-1k, published") for a in accuracies(m.model, m.image_size)
            ]
    return points


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (images/s, top-1) that no other point equals or beats in both, slowest first."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def pareto(
    measurements: Sequence[Measurement], evaluations: Sequence[EvalResult] = (), name: str = "pareto"
) -> str | None:
    """Top-1 against images per second, a panel a batch and data; the front of what no other choice beats in both."""
    panels = _grouped(pareto_points(measurements, evaluations), lambda point: (point.m.batch, point.data))
    if not panels:
        return None
    styles = _styles(point.m.series for points in panels.values() for point in points)

    def draw(figure: "Figure", axes: list["Axes"]) -> None:
        for panel, ((batch, data), points) in zip(axes, panels.items(), strict=True):
            named: dict[tuple[str, float], tuple[float, float]] = {}
            for point in points:
                m, speed, top1 = point.m, point.m.images_per_s or 0.0, 100 * point.top1
                marker = "o" if m.model.startswith("convnext") else "s" if m.model.startswith("swin") else "^"
                colour = styles[m.series]["color"]
                panel.plot(
                    speed, top1, marker=marker, color=colour, linestyle="none", label=m.series,
                    fillstyle="none" if point.origin == "in22k" else "full",
                )  # fmt: skip
                if point.interval is not None:
                    panel.vlines(speed, *(100 * bound for bound in point.interval), color=colour, linewidth=1)
                named[m.model, top1] = max(named.get((m.model, top1), (0.0, 0.0)), (speed, top1))
            front = pareto_front([(point.m.images_per_s or 0.0, 100 * point.top1) for point in points])
            panel.plot(*zip(*front, strict=True), color=INK, alpha=0.5, linewidth=1, linestyle=":", label="front")
            for (model, _), at in named.items():  # a name stands at the fastest point of its height
                panel.annotate(_short(model), at, (4, 3), fontsize=7, textcoords="offset points")
            panel.set_xscale("log")
            panel.margins(x=0.15, y=0.1)
            panel.set(title=f"batch {batch}", xlabel="images/s", ylabel=f"top-1, %, {_shortened(data)}")
            _plain_numbers(panel, "x")
        _legend(figure, axes)

    return _drawn(name, len(panels), draw)


def _shortened(data: str) -> str:
    """The end of a long path."""
    return data if len(data) <= 40 else "…" + data[-39:]


FRONT = (
    "Circles fp32, triangles half precision, squares 8 bits; the diamond was chosen. The dotted line joins what no "
    "other candidate beats in both."
)


def front(result: OptimizeResult, name: str = "front") -> str | None:
    """Agreement with fp32 against the time of a batch, of every candidate that was timed; fp32 is at the top."""
    timed = [
        (c, c.ms, 100 * (c.agreement or 0.0) if not c.exact else 100.0)
        for c in result.candidates
        if c.ms is not None and (c.exact or c.agreement is not None)
    ]
    if not timed:
        return None
    styles = _styles(c.runtime for c, _, _ in timed)

    def draw(figure: "Figure", axes: list["Axes"]) -> None:
        from matplotlib.ticker import LogLocator

        (panel,) = axes
        for c, ms, agrees in timed:
            colour, chosen = styles[c.runtime]["color"], c.name == result.chosen
            marker = "D" if chosen else "o" if c.exact else "s" if c.eight_bits else "^"
            panel.plot(ms, agrees, marker=marker, markersize=10 if chosen else 6, color=colour, linestyle="none",
                       label=c.runtime)  # fmt: skip
        line = [(-speed, agrees) for speed, agrees in pareto_front([(-ms, agrees) for _, ms, agrees in timed])]
        panel.plot(*zip(*line, strict=True), color=INK, alpha=0.5, linewidth=1, linestyle=":", label="front")
        for c, ms, agrees in timed:  # names of all would overlap; the table has them
            if c.name in (result.chosen, result.baseline) or (ms, agrees) in line:
                panel.annotate(c.name + (", chosen" if c.name == result.chosen else ""), (ms, agrees), (6, -10),
                               fontsize=7, textcoords="offset points")  # fmt: skip
        panel.set_xscale("log")
        _plain_numbers(panel, "x")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_formatter("")
        panel.tick_params(axis="x", rotation=0)
        panel.margins(x=0.2, y=0.3)
        panel.set_ylim(panel.get_ylim())  # fixed, so that no tick stands above 100 %
        panel.set_yticks([tick for tick in panel.get_yticks() if panel.get_ylim()[0] <= tick < 100.0001])
        panel.set(xlabel=f"ms a batch of {result.batch}", ylabel="first class as fp32, %")
        _legend(figure, axes)

    return _drawn(name, 1, draw)


def _short(model: str) -> str:
    return re.sub(r"_patch\d+_window\d+_\d+", "", model.partition(".")[0])


def roofline(result: RooflineResult, measurements: Sequence[Measurement], name: str) -> str:
    """What the device allows at each intensity, where the operations stand, and where measured runs of the model do."""
    ceilings = result.ceilings
    rows = result.rows
    intensity = [row.gflop / row.mb * 1e3 for row in rows]
    reached = [row.gflop / row.ms for row in rows]
    matrix, copy = ceilings.matrix_tflops[result.precision], ceilings.copy_gb_s / 1e3
    achieved = [
        m for m in measurements
        if m.valid and m.model.partition(".")[0] == result.model and m.type == result.precision
        and m.batch == result.batch and m.image_size == result.image_size and result.machine is not None
        and m.machine.get("cpu") == result.machine.get("cpu") and m.scope == "compute"
    ]  # fmt: skip

    def draw(figure: "Figure", axes: list["Axes"]) -> None:
        panel = axes[0]
        ends = [min(intensity) / 2, max(*intensity, 2 * matrix / copy)]
        x = [ends[0], matrix / copy, ends[1]]
        panel.plot(x, [min(matrix, copy * i) for i in x], color=INK, label=f"{result.precision} products, copy")
        if ceilings.vector_tflops < matrix:
            turn = ceilings.vector_tflops / copy
            panel.plot([turn, ends[1]], [ceilings.vector_tflops] * 2, color=INK, linestyle="--", label="vector")
        styles = _styles(row.operation for row in rows)
        for row, at, rate in zip(rows, intensity, reached, strict=True):
            panel.plot(at, rate, marker="o", linestyle="none", label=row.operation,
                       color=styles[row.operation]["color"])  # fmt: skip
        for index, m in enumerate(achieved):
            rate = result.gflop / (m.median_ms or math.inf)
            panel.plot(result.gflop / result.mb * 1e3, rate, marker="*", markersize=9, linestyle="none",
                       color=COLOURS[-1 - index % len(COLOURS)], label=f"measured: {m.series}")  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        _plain_numbers(panel, "x", "y")
        panel.set(
            xlabel="FLOP/byte", ylabel="TFLOP/s", title=f"{result.model} {result.precision}, batch {result.batch}"
        )
        _legend(figure, axes)

    return _drawn(name, 1, draw)


def kinds(profiles: Sequence[ProfileResult]) -> str | None:
    """Milliseconds of each kind of layer, a bar a profile; what no layer explains is the last part."""
    if not profiles:
        return None
    parts = [*KINDS, "outside layers"]
    styles = _styles(parts)

    def draw(figure: "Figure", axes: list["Axes"]) -> None:
        panel = axes[0]
        labels = [f"{p.model} {p.format} {type_of(p)}, batch {p.batch}" for p in profiles]
        for row, profile in enumerate(profiles):
            left = 0.0
            outside = max(0.0, profile.wall_ms - profile.layers_ms)
            for kind, ms in {**by_kind(profile), "outside layers": outside}.items():
                panel.barh(row, ms, left=left, label=kind, height=0.7, color=styles[kind]["color"])
                left += ms
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.grid(False, axis="y")
        panel.set(xlabel="ms an inference")
        figure.set_size_inches(2 * PANEL[0], 1.2 + 0.35 * len(profiles))
        _legend(figure, axes)

    return _drawn("kinds", 1, draw)


def all_of(results: Results, measurements: Sequence[Measurement]) -> list[tuple[str, str, str]]:
    """(title, caption, SVG) of every plot that the results fill; speeds of different machines are kept apart."""
    plots = []
    machines = _grouped(measurements, lambda m: machine_words(m.machine))
    for index, (machine, group) in enumerate(machines.items()):
        where = f": {machine}" if len(machines) > 1 else ""
        plots += [
            ("Throughput by batch" + where, "Median of each setting; each batch was measured by itself.",
             throughput(group, f"throughput{index}")),
            ("Latency" + where, "Share of all samples that took no longer; steep curves are steady machines.",
             latency(group, f"latency{index}")),
            ("Accuracy against throughput" + where, "Circles ConvNeXt, squares Swin, triangles others; hollow: "
             "pretrained on ImageNet-22k. The dotted line joins what no other choice beats in both. Lines up and down: "
             "95 % of a measured accuracy. Published accuracies stand for architectures timed with random weights; "
             "artifacts have their own evaluations or none.", pareto(group, results.evaluations, f"pareto{index}")),
        ]  # fmt: skip
    plots.append(("Where the time goes", "Layers by kind, from each runtime's own profiler.", kinds(results.profiles)))
    for index, run in enumerate(results.optimizations):
        plots.append((f"Front: {run.model}", FRONT, front(run, f"front{index}")))
    for index, result in enumerate(results.rooflines):
        caption = f"Ceilings: {result.ceilings.name}, {result.ceilings.source}."
        plots.append(("Roofline", caption, roofline(result, measurements, f"roofline{index}")))
    return [(title, caption, svg) for title, caption, svg in plots if svg is not None]
