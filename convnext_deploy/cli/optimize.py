"""`optimize`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import hints
from .groups import Checkpoint, Labelled, grouped
from .options import DATA, RUNTIME, Debug, DeviceOption, Force, Json, Quiet, RayOption, Threads, one_of
from .terminal import Terminal, clock_words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..records.optimize import Candidate, OptimizeResult
    from ..workflows.agenda import View

ROWS_SHOWN = 24
STYLES = {
    "chosen": "bold green", "passed": "green", "rejected": "red", "dropped": "red", "not proven": "yellow",
    "left out": "dim", "slower": "dim", "not tried": "dim", "waiting": "dim",
}  # fmt: skip


GOAL = "Goal"  # a panel of --help


@grouped
def optimize(
    *,
    context: typer.Context,
    data: Annotated[str, typer.Option(help="Labelled images, as for eval; best none that training saw.")],
    out: Annotated[Path, typer.Option(help="Artifact folder; the page and the work go to OUT.optimize.")],
    checkpoint: Checkpoint,
    max_drop: Annotated[
        float, typer.Option(help="Percentage points of top-1 that may be lost.", rich_help_panel=GOAL)
    ] = 0.5,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(help="The one that loses least among those that take so long at most.", rich_help_panel=GOAL),
    ] = None,
    maximize: Annotated[
        str, typer.Option(help="latency (shortest) or throughput (images a second).", rich_help_panel=GOAL)
    ] = "latency",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Whose time counts. Default: 1; throughput: 32.", rich_help_panel=GOAL)
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Formats to choose among, comma separated. Default: all that run here.", rich_help_panel=GOAL
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Chance of choosing one that loses more, over all tried.", rich_help_panel=GOAL)
    ] = 0.05,
    labelled: Labelled,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Images for the scales, labels not needed. Default: an eighth of --data.",
            rich_help_panel=DATA,
        ),
    ] = None,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    ray: RayOption = None,
    node_kind: Annotated[
        str | None,
        typer.Option(help="With --ray: which nodes, by a part of processor, cores, GPUs.", rich_help_panel=RUNTIME),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The fastest artifact on this machine whose accuracy is proven: every runtime and type, in one command.

    Ctrl-C keeps everything; the same command goes on where it stopped.
    """
    from ..records.base import Device
    from ..records.optimize import Objective

    terminal = Terminal(json, quiet)
    options = {
        **checkpoint.read(),
        **labelled.read(),
        "maximize": one_of("--maximize", maximize, Objective),
        "device": one_of("--device", device, Device),
    }
    names = [word for part in (runtime or "").split(",") if (word := part.strip())]
    from .. import api

    try:
        with _table(terminal) as (say, watch):
            result = api.optimize(
                checkpoint.weights,
                data=data,
                out=out,
                max_drop=max_drop,
                max_latency_ms=max_latency_ms,
                batch=batch,
                calibration=calibration,
                runtimes=names,
                alpha=alpha,
                threads=threads,
                force=force,
                ray=ray,
                node_kind=node_kind,
                say=say,
                watch=watch,
                command=("convnext-deploy", "optimize", *hints.typed(context)),
                **options,
            )
    except KeyboardInterrupt:  # after the table, which is drawn over what is said while it stands
        terminal.say("everything is kept; the same command goes on where this one stopped")
        raise
    from ..reports.optimized import next_commands

    next_ = next_commands(out, labelled.images(data).words(), result)
    show(terminal, result)
    terminal.result({"path": str(out), "result": result}, verdict(out, result), next_)


def show(terminal: Terminal, result: "OptimizeResult") -> None:
    if terminal.quiet or terminal.json:
        return
    from rich.console import Console

    from .terminal import console_width

    Console(width=console_width(), highlight=False).print(table(result.candidates))


def verdict(out: Path, result: "OptimizeResult") -> str:
    """A few lines: what was chosen, how fast it is, what it loses, and on what grounds."""
    from ..workflows.optimize import PAGE, work_folder

    rows = {row.name: row for row in result.candidates}
    chosen, baseline = rows[result.chosen or result.baseline], result.fastest_exact
    assert chosen.ms is not None
    assert baseline.ms is not None
    per_s = 1e3 * result.batch / chosen.ms
    speed = f"{chosen.ms:.3g} ms a batch of {result.batch}" if result.batch > 1 else f"{chosen.ms:.3g} ms an image"
    faster = "" if chosen.exact else f", {baseline.ms / chosen.ms:.2f} times as fast as {baseline.name}"
    lines = [f"{out}: {chosen.name}, {speed} ({per_s:,.0f} images/s){faster}, {(chosen.bytes or 0) / 1e6:.1f} MB"]
    if chosen.verdict is not None:
        check = chosen.verdict.checks[0]
        lines.append(
            f"top-1 {chosen.verdict.baseline_top1:.2%} before, {chosen.verdict.candidate_top1:.2%} after on "
            f"{chosen.verdict.images:,} images that nothing was chosen on: drop {100 * check.value:.2f} points "
            f"({100 * (check.lower or 0):.2f} to {100 * (check.upper or 0):.2f}), limit {result.max_drop:g}"
        )
    lines.append(f"why: {result.why}")
    disturbed = [row.name for row in result.candidates if row.ms is not None and row.timing != "valid"]
    if chosen.name in disturbed or baseline.name in disturbed:
        lines.append(f"the machine was not quiet while it was timed ({chosen.timing}); on a quiet one run it again")
    if result.preprocessing.assumed:
        lines.append(
            f"assumed, nothing says it: {', '.join(result.preprocessing.assumed)}; see inspect, and check it with "
            "`export --data`"
        )
    lines.append(f"page: {work_folder(out) / PAGE}")
    return "\n".join(lines)


def table(rows: "tuple[Candidate, ...]", live: bool = False) -> "RenderableType":
    """The candidates, the fastest first; what was not timed below them.

    Args:
        live: redrawn in place: a line a candidate, and what does not fit is cut off.
    """
    import math

    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("candidate", no_wrap=True)
    grid.add_column("ms", justify="right", no_wrap=True)
    grid.add_column("agrees", justify="right", no_wrap=True)
    grid.add_column("state", no_wrap=True)
    grid.add_column("why")  # the only one that gives way in a narrow terminal
    ordered = sorted(rows, key=lambda row: (row.state == "left out", math.inf if row.ms is None else row.ms))
    for row in ordered[:ROWS_SHOWN]:
        agrees = (
            "exact" if row.exact and row.ms is not None else "" if row.agreement is None else f"{row.agreement:.1%}"
        )
        ms = "" if row.ms is None else f"{row.ms:.3g}"
        style = STYLES.get(row.state, "")
        state = Text(row.state, style)
        grid.add_row(
            Text(row.name, "bold" if row.state == "chosen" else ""),
            ms,
            agrees,
            state,
            Text(row.reason or "", "dim", no_wrap=live, overflow="ellipsis" if live else "fold"),
        )
    if len(ordered) > ROWS_SHOWN:
        grid.add_row(f"and {len(ordered) - ROWS_SHOWN} more", "", "", "", "")
    return grid


@contextmanager
def _table(terminal: Terminal) -> Iterator[tuple[Any, Any]]:
    """(say, watch): a live table on stderr; plain lines where nobody watches a terminal."""
    if terminal.quiet or terminal.json or not sys.stderr.isatty():
        yield terminal.say, _lines(terminal)
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    latest: list[View] = []
    began = time.monotonic()

    def drawn() -> "RenderableType":
        if not latest:
            return Text(f"preparing, {clock_words(None, None, time.monotonic() - began)}", "dim")
        view = latest[-1]
        steps = f" {view.done:,}/{view.total:,}" if view.total else ""
        return Group(table(view.rows, live=True), Text(f"{view.doing}{steps}   {_clock_words(view)}", "cyan"))

    def watch(view: "View") -> None:
        latest[:] = [view]

    # Redrawn once a second: more often would take time from what is being measured.
    with Live(get_renderable=drawn, console=Console(stderr=True), refresh_per_second=1, transient=True):
        yield (lambda line: None), watch


def _lines(terminal: Terminal) -> Any:
    """A line whenever something else is being done."""
    last = [""]

    def watch(view: "View") -> None:
        kind = view.doing.partition(" ")[0]
        if view.doing and view.doing != last[0] and kind not in ("timing", "warming", "loading", "starting"):
            last[0] = view.doing
            terminal.say(f"{view.doing}, {_clock_words(view)}")

    return watch


def _clock_words(view: "View") -> str:
    words = clock_words(1, view.left_s, view.elapsed_s)
    return words if view.left_s is None else f"about {words}"
