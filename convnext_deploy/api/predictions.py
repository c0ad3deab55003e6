"""Predictions: what an artifact says of images that nobody has labelled."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import arguments, env, formats
from ..artifact.session import RunOptions, Session
from ..records.base import Device, Problem
from ..records.prediction import PredictResult
from ..workflows.export import Say, silent
from .artifacts import opened

if TYPE_CHECKING:
    from ..workflows.predict import Given


@env.missing_named()
def predict(
    model: arguments.Location | Session,
    images: "Given | Sequence[Given]",
    *,
    top: int = 5,
    labels: arguments.Location | None = None,
    problem: Problem | None = None,
    batch: int | None = None,
    out: arguments.Location | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    cuda_graph: bool = False,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
) -> PredictResult:
    """The most probable classes of images that nobody has labelled.

    Args:
        model: an artifact, or the session that `load` gave: that opens nothing again, and the options of a session
            (`device` to `trust`) are its own.
        images: an image file, a folder of images, a tar or Parquet file, an http(s) address, an open file, a Pillow
            image, or a list of files, addresses and Pillow images.
        top: so many classes an image.
        labels: file of class names (`data.numbering.class_map`); None: the artifact's, or ImageNet-1k's for 1000
            outputs.
        problem: what the outputs mean, where the artifact does not say it: single-label, multi-label (probabilities by
            the logistic function), binary (one logit) or regression.
        batch: images at once; None: what the artifact is tuned for.
        out: .csv, .json, or .npz with every output, which is the way for a model without classes.
        trust: as for `load`.

    Raises:
        UsageError, DataError, ArtifactError: one line each.
        CheckFailed: outputs that are not finite.
    """
    labels = arguments.maybe(arguments.path, "labels", labels)
    out = arguments.maybe(arguments.file, "out", out)
    batch = arguments.maybe(arguments.whole, "batch", batch)
    top = arguments.whole("top", top)
    arguments.check(
        device=device, threads=threads, cuda_graph=cuda_graph, trust=trust, progress=progress, say=say, problem=problem
    )
    from ..workflows import predict as work

    work.check(images)
    artifact = None
    if isinstance(model, Session):
        session = model
    else:
        artifact = opened(arguments.path("model", model, "an artifact folder, or a session of `load`"))
        session = formats.opened(artifact, RunOptions(device=device, threads=threads, cuda_graph=cuda_graph), trust)
    return work.predict(
        session,
        work.listed(images),
        artifact=artifact,
        batch=session.manifest.export.batch.opt if batch is None else batch,
        top=top,
        labels=labels,
        problem=problem,
        out=out,
        progress=progress,
        say=say,
    )
