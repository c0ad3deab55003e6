"""`eval`."""

from pathlib import Path
from typing import Annotated

import typer

from ..records.accuracy import ScoreResult
from .options import (
    AnnotationsOption,
    ClassOrderOption,
    Debug,
    DeviceOption,
    Json,
    LabelsOption,
    MultiLabel,
    ProblemOption,
    Quiet,
    ReduceLabels,
    Threads,
    Trust,
    class_order_of,
    one_of,
    problem_of,
    resumable,
)
from .terminal import Terminal, progress_bar


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    data: Annotated[str, typer.Option(help="Folder of class folders, tar, Parquet, list, or hfds:NAME.")],
    split: Annotated[str | None, typer.Option(help="Which split, where the source has several.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images at once; default: what the artifact is tuned for.")] = None,
    labels: LabelsOption = None,
    annotations: AnnotationsOption = None,
    class_order: ClassOrderOption = "torchvision",
    problem: ProblemOption = None,
    multi_label: MultiLabel = False,
    reduce_labels: ReduceLabels = False,
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
    """Accuracy over labelled images: top-1, top-5 and per class; mAP, R2 or mIoU where the model has no top-1."""
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
            annotations=annotations,
            class_order=class_order_of(class_order),
            problem=problem_of(problem, multi_label),
            reduce_labels=reduce_labels,
            out=out,
            force=force,
            device=one_of("--device", device, Device),
            threads=threads,
            cuda_graph=cuda_graph,
            trust=trust,
            progress=progress,
            say=terminal.say,
        )
    if isinstance(result, ScoreResult):
        from . import words

        lines = words.score_lines(result)
        if out is not None:
            lines.append(f"outputs in {out.with_name(f'{out.name}.npz')}")
        terminal.result(result, "\n".join(lines))
        return
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
