"""`eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, DeviceOption, Json, LabelsOption, Quiet, Threads, Trust, one_of, resumable
from .terminal import Terminal, progress_bar


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    data: Annotated[str, typer.Option(help="Folder of class folders, tar, Parquet, or hfds:NAME.")],
    split: Annotated[str | None, typer.Option(help="Which split, where the source has several.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images at once; default: what the artifact is tuned for.")] = None,
    labels: LabelsOption = None,
    limit: Annotated[int | None, typer.Option(help="Only so many images, evenly spaced.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep OUT.json and OUT.npz; resumes when run again.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the result of an earlier run.")] = False,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="TensorRT: replay a captured CUDA graph.")] = False,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Top-1, top-5 and per-class accuracy over labelled images."""
    from .. import api
    from ..records.base import Device

    terminal = Terminal(json, quiet)
    with progress_bar(terminal) as progress, resumable(terminal, out is not None):
        terminal.say(f"opening {artifact} and listing the images of {data}")
        result = api.evaluate(
            artifact,
            data,
            split=split,
            batch=batch,
            limit=limit,
            labels=labels,
            out=out,
            force=force,
            device=one_of("--device", device, Device),
            threads=threads,
            cuda_graph=cuda_graph,
            trust=trust,
            progress=progress,
            say=terminal.say,
        )
    lines = [
        f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  on {result.images} images of {result.data}",
        f"{result.images_per_s:.1f} images/s including reading and resizing",
    ]
    if result.corrupt:
        lines.append(f"{len(result.corrupt)} corrupt images left out, the first: {result.corrupt[0]}")
    worst = sorted(result.per_class, key=lambda c: c.top1)[:3]
    lines.append("lowest classes: " + ", ".join(f"{c.name} {c.top1:.1%}" for c in worst))
    if out is not None:
        lines.append(f"predictions in {out.with_name(str(result.predictions))}")
    terminal.result(result, "\n".join(lines))
