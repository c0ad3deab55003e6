"""`predict`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import counted
from .groups import Meaning, grouped
from .options import (
    DATA,
    OUTPUT,
    RUNTIME,
    WRITES_EITHER,
    Debug,
    DeviceOption,
    Json,
    LabelsOption,
    Quiet,
    Threads,
    Trust,
    one_of,
)
from .terminal import Terminal, progress_bar

if TYPE_CHECKING:
    from ..records.prediction import Box, ClassProbability

SHOWN = 20  # images in the table


@grouped
def predict(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    images: Annotated[str, typer.Argument(help="Image, folder, tar, Parquet, http(s) address, or - for stdin.")],
    meaning: Meaning,
    labels: LabelsOption = None,
    split: Annotated[
        str | None, typer.Option(help="Which split of the images, where they have several.", rich_help_panel=DATA)
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            help="Classes or boxes an image. Default: 5; of several images in the table the first, or all above 50 %.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            **WRITES_EITHER,
            help="Keep the result: NAME.csv, .json, .npz with all outputs; masks: .png or a folder.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Images at once. Default: what the artifact is tuned for.", rich_help_panel=RUNTIME),
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
            top=5 if top is None else top,
            labels=labels,
            problem=meaning.read(),
            split=split,
            batch=batch,
            out=out,
            device=one_of("--device", device, Device),
            threads=threads,
            trust=trust,
            progress=progress,
            say=terminal.say,
        )
    several = len(result.predictions) > 1 and top is None
    rows = [
        [one.image if not rank else "", f"{best.probability:.1%}", best.name or f"class {best.number}"]
        for one in result.predictions[:SHOWN]
        for rank, best in enumerate(_likely(one.classes) if several else one.classes)
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
    if result.problem == "detection":
        rows = [
            [one.image if not rank else "", f"{box.score:.1%}", box.name or f"class {box.number}", _place(box)]
            for one in result.predictions[:SHOWN]
            for rank, box in enumerate(one.boxes[: 1 if several else None])
        ]
        terminal.table("", ["image", "score", "class", "left, top, right, bottom"], rows)
    lines = []
    if len(result.predictions) > SHOWN and rows:
        keeps = "" if out else "; --out NAME.csv keeps them all, with the other classes"
        lines.append(f"and {counted(len(result.predictions) - SHOWN, 'image')} more{keeps}")
    if result.unreadable:
        lines.append(f"{counted(len(result.unreadable), 'image')} cannot be read, the first: {result.unreadable[0]}")
    if out is not None:
        lines.append(f"{counted(len(result.predictions), 'image')} in {out}")
    if lines or json:
        terminal.result(result, "\n".join(lines))


def _place(box: "Box") -> str:
    return ", ".join(f"{side:.0f}" for side in (box.left, box.top, box.right, box.bottom))


def _likely(classes: "tuple[ClassProbability, ...]") -> "tuple[ClassProbability, ...]":
    """The first class, and of several that an image may have each that is likelier than not; a file keeps the rest."""
    return classes[:1] + tuple(one for one in classes[1:] if one.probability > 0.5)
