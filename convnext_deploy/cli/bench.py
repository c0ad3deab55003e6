"""`bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import hints
from .options import (
    OUTPUT,
    WRITES,
    CudaGraph,
    Debug,
    DeviceOption,
    Json,
    Quiet,
    RayOption,
    Threads,
    Trust,
    image_size_of,
    one_of,
)
from .terminal import Terminal, progress_bar, stdout_kept

if TYPE_CHECKING:
    from ..records.timing import BenchResult, Comparison

MODELS, LOAD, COMPARISON = "Models that are built", "Load", "Comparison"  # panels of --help
SECONDS = 2.0  # of timing, a row
ALONE_SECONDS, ALONE_WARMUP_S = 1.0, 4.0  # without arguments: all of its twelve rows in under two minutes


def bench(
    context: typer.Context,
    artifacts: Annotated[
        list[Path] | None, typer.Argument(help="Artifact folders. Without any, models with random weights are built.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="ConvNeXts to build, comma separated. Default: tiny; with a family, every size.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Families (swin, deit, resnet) or timm models to compare with, comma separated; or none.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Formats, torch, torch.compile. Default: torch, onnx, openvino, native.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="Precisions of the models that are built, comma separated: fp32, fp16, bf16.", rich_help_panel=MODELS
        ),
    ] = "fp32",
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Image sizes of the models that are built: 224,384 or 800x1280. Default: 224.", rich_help_panel=MODELS
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="Task of the models that are built: classify, embed, features, segment or detect.",
            rich_help_panel=MODELS,
        ),
    ] = "classify",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma separated.", rich_help_panel=LOAD)] = "1,8",
    scenario: Annotated[
        str,
        typer.Option(
            help="Load: single-stream, multi-stream, offline (all batches and streams) or server.", rich_help_panel=LOAD
        ),
    ] = "single-stream",
    scope: Annotated[
        str, typer.Option(help="What is timed: compute, transfer, preprocess or jpeg.", rich_help_panel=LOAD)
    ] = "compute",
    streams: Annotated[
        str | None,
        typer.Option(help="Sessions side by side, comma separated. Default: offline 1,CORES.", rich_help_panel=LOAD),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Seconds of timing for each row, on average. Default: 2; without arguments 1.", rich_help_panel=LOAD
        ),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option(help="Measure until the samples suffice for this percentile, such as 99.", rich_help_panel=LOAD),
    ] = None,
    slo_ms: Annotated[
        float | None,
        typer.Option(help="With --scenario server: the largest latency at the percentile.", rich_help_panel=LOAD),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="With --scenario server: the seed of the arrivals.", rich_help_panel=LOAD)
    ] = 0,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    cuda_graph: CudaGraph = False,
    trust: Trust = False,
    ray: RayOption = None,
    save: Annotated[
        Path | None,
        typer.Option(**WRITES, help="Write the results, every sample, as JSON Lines.", rich_help_panel=OUTPUT),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Earlier results of --save to compare with; exit 1 if a row is SLOWER.", rich_help_panel=COMPARISON
        ),
    ] = None,
    max_slowdown: Annotated[
        str,
        typer.Option(help="With --against: a smaller increase of time counts as the same.", rich_help_panel=COMPARISON),
    ] = "5%",
    junit: Annotated[
        Path | None,
        typer.Option(**WRITES, help="With --against: the verdicts as JUnit XML.", rich_help_panel=COMPARISON),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(**WRITES, help="With --against: the verdicts as a Markdown table.", rich_help_panel=COMPARISON),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure latency and throughput. Without arguments, compares ConvNeXt-T with Swin-T."""
    from .. import api, env
    from ..artifact import manifest
    from ..records.base import Device, Precision, Task
    from ..records.timing import Scenario, Scope
    from ..reports import comparisons
    from ..timing import compare as regress
    from ..timing.measure import WARMUP_LIMIT_S
    from ..workflows.bench import Plan

    terminal = Terminal(json, quiet)
    margin = _fraction(max_slowdown)
    before = regress.read_results(against) if against else ()
    if against is None and (junit or markdown):
        raise UsageError("--junit and --markdown write verdicts; give --against RESULTS")
    for path in (save, junit, markdown):
        if path is not None:
            manifest.check_file(path)
    case = one_of("--scenario", scenario, Scenario)
    cores = env.usable_cores()
    default_streams = {"offline": tuple(dict.fromkeys((1, cores))), "multi-stream": (cores,)}.get(case, (1,))
    alone = not artifacts and variant is None and compare is None
    plan = Plan(
        scenario=case,
        scope=one_of("--scope", scope, Scope),
        batches=_integers("--batch", batch),
        streams=_integers("--streams", streams) if streams else default_streams,
        seconds=seconds if seconds is not None else ALONE_SECONDS if alone else SECONDS,
        percentile=None if percentile is None else percentile / 100,
        device=one_of("--device", device, Device),
        threads=threads,
        slo_ms=slo_ms,
        seed=seed,
        warmup_limit_s=ALONE_WARMUP_S if alone else WARMUP_LIMIT_S,
    )
    rows: list[BenchResult] = []
    interrupted: KeyboardInterrupt | None = None
    # Redrawn once a second: more often would take time from what is being measured.
    with progress_bar(terminal, "preparing", redraws_per_s=1, transient=True) as progress, stdout_kept():
        try:
            for row in api.bench(
                artifacts or (),
                plan,
                variants=_words(variant) or (["tiny"] if alone else []),
                compare=["swin"] if alone else [word for word in _words(compare) if word != "none"],
                runtimes=_words(runtime),
                precisions=[one_of("--precision", word, Precision) for word in _words(precision)],
                image_sizes=[size for word in _words(image_size) if (size := image_size_of(word))],
                task=one_of("--task", task, Task),
                cuda_graph=cuda_graph,
                trust=trust,
                ray=ray,
                say=terminal.say,
                progress=progress,
            ):
                rows.append(row)
                if save:
                    manifest.write_file(save, regress.encode_results(rows))
        except KeyboardInterrupt as error:
            interrupted = error  # what was measured is kept and shown first
    verdicts = regress.compare(before, rows, margin) if against else ()
    if junit:
        manifest.write_file(junit, comparisons.junit(verdicts))
    if markdown:
        manifest.write_file(markdown, comparisons.markdown(verdicts).encode())
    _show(terminal, rows, verdicts)
    next_ = () if interrupted or against else hints.after_bench(hints.typed(context), save)
    terminal.result({"results": rows, "comparisons": verdicts}, next=next_)
    if interrupted:
        raise interrupted
    if any(v.verdict == "SLOWER" for v in verdicts) or any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


def _words(text: str | None) -> list[str]:
    return [word for part in (text or "").split(",") if (word := part.strip())]


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise UsageError(f"{option} {text}; expected whole numbers such as 1,8") from None


def _fraction(text: str) -> float:
    """ "5%" or "0.05"."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UsageError(f"--max-slowdown {text}; expected a share such as 5%, above 0% and below 100%")
    return value


def _show(terminal: Terminal, rows: "Sequence[BenchResult]", verdicts: "Sequence[Comparison]") -> None:
    from ..reports.results import machine_words
    from ..timing import compare as regress

    machines = list(dict.fromkeys(machine_words(row.machine) for row in rows))

    def setting(row: "BenchResult") -> str:
        machine = f"{machine_words(row.machine)}: " if len(machines) > 1 else ""
        return f"{machine}{regress.setting(row)}"

    for where in dict.fromkeys(setting(row) for row in rows):
        group = [row for row in rows if setting(row) == where]
        table = [[row.subject, *_figures(row), _rate(row), _beside(row, rows), row.status] for row in group]
        columns = [
            "what",
            "p50, ms (95 %)",
            "p99, ms",
            "images/s",
            "TFLOP/s, of the bound",
            "time beside the first",
            "result",
        ]
        terminal.table(where, columns, table)
        for row in group:
            if row.reason is not None:
                terminal.line(f"{row.status.upper()} {row.subject}: {row.reason}")
    if verdicts:
        table = [[v.verdict, v.subject, v.setting, regress.interval_words(v)] for v in verdicts]
        terminal.table("Beside the earlier results", ["verdict", "what", "setting", "new / old (95 %)"], table)
        for reason in dict.fromkeys(v.reason for v in verdicts if v.reason):
            terminal.line(f"INCONCLUSIVE: {reason}")


def _figures(row: "BenchResult") -> list[str]:
    if row.server is not None:
        passed = row.server.queries_per_s
        latency = next((t.latency for t in row.server.trials if t.queries_per_s == passed), None)
        value = "–" if latency is None or latency.value_ms is None else f"{latency.value_ms:.1f}"
        return ["–", value, "no rate" if passed is None else f"{passed:.1f} under {row.server.slo_ms:g} ms"]
    if row.images_per_s is None:
        return ["–", "–", "–"]
    words = []
    for fraction in (0.5, 0.99):
        (quantile,) = (q for q in row.quantiles if q.fraction == fraction)
        if quantile.value_ms is None:
            words.append("INSUFFICIENT")
        else:
            words.append(f"{quantile.value_ms:.4g} ({quantile.low_ms:.4g}–{quantile.high_ms:.4g})")
    return [*words, f"{row.images_per_s:.4g}"]


def _rate(row: "BenchResult") -> str:
    """How near to what this machine can do at most."""
    if row.tflops is None:
        return ""
    return f"{row.tflops:.3g}" + ("" if row.percent_of_bound is None else f", {row.percent_of_bound:.0f} %")


def _beside(row: "BenchResult", rows: "Sequence[BenchResult]") -> str:
    """Its time as a multiple of the first row's on the same runtime in the same run, turn by turn."""
    from ..timing import compare as regress

    same = ("run", "runtime", "precision", "batch", "streams", "scenario")
    first = next(r for r in rows if all(getattr(r, name) == getattr(row, name) for name in same))
    if first is row or not (first.turns and row.turns) or row.scenario == "server":
        return ""
    interval = regress.ratio_of_turns(regress.blocks_ms(row), regress.blocks_ms(first))
    return "" if interval is None else f"{interval[0]:.2f} ({interval[1]:.2f}–{interval[2]:.2f})"
