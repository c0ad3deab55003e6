"""`predict`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Debug,
    DeviceOption,
    Json,
    LabelsOption,
    MultiLabel,
    ProblemOption,
    Quiet,
    Threads,
    Trust,
    one_of,
    problem_of,
)
from .terminal import Terminal, progress_bar

SHOWN = 20  # images in the table


def predict(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    images: Annotated[str, typer.Argument(help="Image, folder, tar, Parquet, http(s) address, or - for stdin.")],
    top: Annotated[int, typer.Option(help="Classes an image.")] = 5,
    labels: LabelsOption = None,
    problem: ProblemOption = None,
    multi_label: MultiLabel = False,
    batch: Annotated[int | None, typer.Option(help="Images at once; default: what the artifact is tuned for.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep the result: NAME.csv, .json, .npz with all outputs; masks: .png or a folder."),
    ] = None,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The most probable classes of images that nobody has labelled."""
    from .. import api
    from ..records.base import Device

    terminal = Terminal(json, quiet)
    with progress_bar(terminal, "predicting", transient=True) as progress:
        result = api.predict(
            artifact,
            sys.stdin.buffer if images == "-" else images,
            top=top,
            labels=labels,
            problem=problem_of(problem, multi_label),
            batch=batch,
            out=out,
            device=one_of("--device", device, Device),
            threads=threads,
            trust=trust,
            progress=progress,
            say=terminal.say,
        )
    several = len(result.predictions) > 1  # then the first class of each; a file keeps the others
    rows = [
        [one.image if not rank else "", f"{best.probability:.1%}", best.name or f"class {best.number}"]
        for one in result.predictions[:SHOWN]
        for rank, best in enumerate(one.classes[: 1 if several else None])
    ]
    if rows:
        terminal.table("", ["image", "probability", "class"], rows)
    if result.problem == "regression":
        rows = [[one.image, ", ".join(f"{value:.6g}" for value in one.values)] for one in result.predictions[:SHOWN]]
        terminal.table("", ["image", "value"], rows)
    if result.problem == "segmentation":
        rows = [
            [one.image if not rank else "", f"{area.share:.1%}", area.name or f"class {area.number}"]
            for one in result.predictions[:SHOWN]
            for rank, area in enumerate(one.areas[: 1 if several else None])
        ]
        terminal.table("", ["image", "pixels", "class"], rows)
    lines = []
    if len(result.predictions) > SHOWN and rows:
        keeps = "" if out else "; --out NAME.csv keeps them all, with the other classes"
        lines.append(f"and {len(result.predictions) - SHOWN:,} images more{keeps}")
    if result.unreadable:
        lines.append(f"{len(result.unreadable)} images cannot be read, the first: {result.unreadable[0]}")
    if out is not None:
        lines.append(f"{len(result.predictions):,} images in {out}")
    if lines or json:
        terminal.result(result, "\n".join(lines))
