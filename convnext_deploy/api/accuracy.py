"""Accuracy: measured by `evaluate`, and held against a baseline by `gate`."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .. import arguments, env
from ..artifact.session import RunOptions
from ..errors import UsageError, plain
from ..records.accuracy import EvalResult, Limits, ScoreResult, ScoreVerdict, Verdict
from ..records.base import Device, Problem
from ..workflows.export import Say, silent
from .artifacts import opened
from .images import ClassOrder, Images, images


@env.missing_named()
def evaluate(
    path: arguments.Location,
    data: Images,
    *,
    split: str | None = None,
    batch: int | None = None,
    limit: int | None = None,
    labels: arguments.Location | None = None,
    annotations: arguments.Location | None = None,
    class_order: ClassOrder = "torchvision",
    problem: Problem | None = None,
    reduce_labels: bool = False,
    out: arguments.Location | None = None,
    force: bool = False,
    device: Device = "cpu",
    threads: int | None = None,
    cuda_graph: bool = False,
    trust: bool = False,
    ray: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
) -> EvalResult | ScoreResult:
    """Accuracy of an artifact over labelled images; every prediction is kept when `out` is given.

    The labels must be the model's. Class names are looked up among the artifact's labels, in `labels`, or as WordNet
    ids; without any of these there must be as many classes as the model has outputs, and their order is assumed.

    Args:
        data: folder of class folders, tar, Parquet, a list of images, or `hfds:NAME`; or what a program holds: a list
            of (image, label), a dataset or loader of PyTorch, or a dataset of Hugging Face, whose images are paths,
            Pillow's, or arrays of uint8.
        annotations: what says the labels of the images in the folder `data`: a list, a COCO file, a folder of Pascal
            VOC's XML, or ImageNet's ground truth. Of a segmenter: a folder of masks with the images' names.
        class_order: how classes are numbered by their names: as torchvision ("10" before "2") or as timm.
        problem: what the outputs mean, where the artifact does not say it: single-label, multi-label, binary (one
            logit) or regression. A multi-label model is judged by its mAP, a regression by its R2.
        reduce_labels: the masks of a segmenter count from 1, and 0 counts nowhere, as ADE20K's do.
        batch: images at once; None: the size the artifact is tuned for.
        limit: only so many images, evenly spaced over the source.
        labels: file of the model's class names in their order: a name a line, or JSON (`data.numbering.class_map`).
        out: path without suffix for `<out>.json` and `<out>.npz`.
        force: replace what an earlier call wrote there.
        cuda_graph: on a GPU: replay a captured CUDA graph. Not for every format.
        trust: as for `load`.
        ray: evaluate on the nodes of a Ray cluster: HOST:PORT, "auto" for the one that runs on this machine, or
            "local" for one of this machine's cores that ends with the call.
        progress: told (images done, images in all).
        say: told what is assumed about the images, and where an interrupted call goes on.
    """
    data = images("data", data, class_order)
    annotations = arguments.maybe(arguments.images, "annotations", annotations)
    labels = arguments.maybe(arguments.path, "labels", labels)
    out = arguments.maybe(arguments.path, "out", out)
    batch = arguments.maybe(arguments.whole, "batch", batch)
    artifact = opened(
        path,
        split=split,
        limit=limit,
        force=force,
        device=device,
        threads=threads,
        cuda_graph=cuda_graph,
        trust=trust,
        ray=ray,
        progress=progress,
        say=say,
        class_order=class_order,
        problem=problem,
        reduce_labels=reduce_labels,
    )
    from ..workflows import evaluate as workflow

    return workflow.evaluate(
        artifact,
        workflow.Images(
            data=data,
            split=split,
            labels=labels,
            annotations=annotations,
            class_order=class_order,
            problem=problem,
            reduce_labels=reduce_labels,
        ),
        RunOptions(device=device, threads=threads, cuda_graph=cuda_graph),
        batch=batch,
        limit=limit,
        out=out,
        force=force,
        trust=trust,
        ray=ray,
        progress=progress,
        say=say,
    )


@env.missing_named()
def gate(
    baseline: arguments.Location,
    candidate: arguments.Location,
    *,
    limits: Limits | Mapping[str, Any] | arguments.Location,
    data: Images | None = None,
    split: str | None = None,
    labels: arguments.Location | None = None,
    annotations: arguments.Location | None = None,
    class_order: ClassOrder = "torchvision",
    problem: Problem | None = None,
    reduce_labels: bool = False,
    out: arguments.Location | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
) -> Verdict | ScoreVerdict:
    """Hold a candidate against its baseline: on accuracy, and where the limits ask for it on latency and size.

    Args:
        baseline: `<out>.json` of an evaluation, with its predictions beside it; or an artifact folder.
        candidate: likewise.
        limits: `records.accuracy.Limits`, a dictionary of its fields, or a TOML file of them.
        data: what artifact folders are evaluated on, as for `evaluate`.
        labels, annotations, class_order, problem, reduce_labels: as for `evaluate`.
        out: folder that keeps their evaluations, `baseline` and `candidate`, which are not run twice.
        trust: as for `load`, of both.
        progress: told (images done, images in all) of one evaluation after the other.

    Raises:
        DataError: the two were not evaluated on the same images.
        UsageError: a side that does not exist, an artifact without `data`, `data` without an artifact, or a limit that
            needs artifacts.
    """
    paths = {
        name: arguments.path(name, given, "an artifact folder, or OUT.json of an evaluation")
        for name, given in (("baseline", baseline), ("candidate", candidate))
    }
    data = None if data is None else images("data", data, class_order)
    annotations = arguments.maybe(arguments.images, "annotations", annotations)
    labels = arguments.maybe(arguments.path, "labels", labels)
    out = arguments.maybe(arguments.path, "out", out)
    arguments.check(
        split=split, device=device, threads=threads, progress=progress, say=say, trust=trust,
        class_order=class_order, problem=problem, reduce_labels=reduce_labels,
    )  # fmt: skip
    from ..workflows import gate as workflow
    from ..workflows.evaluate import Images

    judged = _limits(limits)
    if reduce_labels and all(path.is_file() for path in paths.values()):
        raise UsageError("--reduce-labels is for artifacts, and both sides are results of eval; leave it out")
    for option, given in (("labels", labels), ("annotations", annotations)):
        if given is not None and all(path.is_file() for path in paths.values()):
            raise UsageError(f"--{option} {given} is for artifacts, and both sides are results of eval; leave it out")
    return workflow.gate(
        paths,
        judged,
        None
        if data is None
        else Images(
            data=data,
            split=split,
            labels=labels,
            annotations=annotations,
            class_order=class_order,
            problem=problem,
            reduce_labels=reduce_labels,
        ),
        RunOptions(device=device, threads=threads),
        out=out,
        trust=trust,
        progress=progress,
        say=say,
    )


def _limits(given: Any) -> Limits:
    from ..accuracy.gate import limits_from, limits_from_toml

    if isinstance(given, Limits):
        return limits_from(msgspec.structs.asdict(given))
    if isinstance(given, Mapping):
        return limits_from(given)
    file = arguments.path("limits", given, "a dictionary of limits, types.Limits, or a TOML file of them")
    try:
        return limits_from(limits_from_toml(file.read_text("utf-8"), str(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"limits {file} cannot be read: {plain(error)}") from None
