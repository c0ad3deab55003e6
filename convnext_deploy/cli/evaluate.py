"""`eval`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import counted
from ..records.accuracy import ScoreResult
from . import hints
from .groups import Labelled, Meaning, ReduceLabels, grouped
from .options import (
    DATA,
    OUTPUT,
    RUNTIME,
    CudaGraph,
    Debug,
    DeviceOption,
    Force,
    Json,
    Quiet,
    RayOption,
    Threads,
    Trust,
    one_of,
    resumable,
)
from .terminal import Terminal, progress_bar, stdout_kept


@grouped
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    data: Annotated[str, typer.Option(help="Folder of class folders, tar, Parquet, list, or hfds:NAME.")],
    labelled: Labelled,
    meaning: Meaning,
    reduce_labels: ReduceLabels = False,
    limit: Annotated[
        int | None,
        typer.Option(help="Only so many images, evenly spaced. Default: all.", rich_help_panel=DATA),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep OUT.json and OUT.npz; resumes when run again.", rich_help_panel=OUTPUT),
    ] = None,
    force: Force = False,
    batch: Annotated[
        int | None,
        typer.Option(help="Images at once. Default: what the artifact is tuned for.", rich_help_panel=RUNTIME),
    ] = None,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    cuda_graph: CudaGraph = False,
    trust: Trust = False,
    ray: RayOption = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Accuracy over labelled images: top-1, top-5 and per class; mAP, R2 or mIoU where the model has no top-1."""
    from .. import api
    from ..records.base import Device

    terminal = Terminal(json, quiet)
    with progress_bar(terminal) as progress, resumable(terminal, out is not None), stdout_kept():
        terminal.say(f"opening {artifact} and listing the images of {data}")
        result = api.evaluate(
            artifact,
            data,
            batch=batch,
            limit=limit,
            problem=meaning.read(),
            reduce_labels=reduce_labels,
            out=out,
            force=force,
            device=one_of("--device", device, Device),
            threads=threads,
            cuda_graph=cuda_graph,
            trust=trust,
            ray=ray,
            progress=progress,
            say=terminal.say,
            **labelled.read(),
        )
    from ..workflows.evaluate import Images

    named = Images(data=data, **labelled.read(), problem=meaning.read(), reduce_labels=reduce_labels).words()
    whole = None if limit is not None else out  # a gate needs the same images on both sides
    next_ = hints.after_eval(artifact, whole, named, device, trust)
    if isinstance(result, ScoreResult):
        from . import words

        lines = words.score_lines(result)
        if out is not None:
            lines.append(f"outputs in {out.with_name(f'{out.name}.npz')}")
        terminal.result(result, "\n".join(lines), next_)
        return
    lines = [
        f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  on {counted(result.images, 'image')} of {result.data}",
        f"{result.images_per_s:.1f} images/s including reading and resizing",
    ]
    if result.corrupt:
        lines.append(f"{counted(len(result.corrupt), 'corrupt image')} left out, the first: {result.corrupt[0]}")
    worst = sorted(result.per_class, key=lambda c: c.top1)[:3]
    lines.append("lowest classes: " + ", ".join(f"{c.name} {c.top1:.1%}" for c in worst))
    if out is not None:
        lines.append(f"predictions in {out.with_name(str(result.predictions))}")
    terminal.result(result, "\n".join(lines), next_)
