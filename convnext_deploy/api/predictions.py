"""Opened artifacts, by `load`, and what they say of images that nobody has labelled, by `predict`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import argument_names, arguments, formats
from ..arguments import Unpack
from ..artifact.session import Session
from ..errors import UsageError
from ..records.base import Problem
from ..records.prediction import PredictResult
from ..workflows.export import Say, silent
from .artifacts import SessionOptions, opened, run_options
from .verbs import verb

if TYPE_CHECKING:
    from ..workflows.predict import Given


@verb
def load(path: arguments.Location, **options: Unpack[SessionOptions]) -> Session:
    """Open an artifact, check every file of it, and make it ready to run.

        with convnext_deploy.load("build/best") as model:
            print(model.predict("cat.jpg")[0].classes)

    Args:
        path: the artifact's folder.

    Raises:
        ArtifactError: naming the file that is missing, changed or unreadable, or code that is not trusted.
        MissingPackageError: the runtime is not installed.
    """
    run, trust = run_options(options)
    session = formats.opened(opened(path), run, trust)
    session.predictor = predict
    return session


@verb
def predict(
    model: arguments.Location | Session,
    images: "Given | Sequence[Given]",
    *,
    top: int = 5,
    labels: arguments.Location | None = None,
    problem: Problem | None = None,
    split: str | None = None,
    batch: int | None = None,
    out: arguments.Location | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
    **options: Unpack[SessionOptions],
) -> PredictResult:
    """The most probable classes of images that nobody has labelled.

    Args:
        model: an artifact, or the session that `load` returned: that opens nothing again, and its device, threads
            and CUDA graph are its own.
        images: an image file, a folder of images, a tar or Parquet file, an http(s) address, an open file, a Pillow
            image, or a list of files, addresses and Pillow images.
        top: so many classes an image.
        labels: file of class names (`data.numbering.class_map`); None: the artifact's, or ImageNet-1k's for 1000
            outputs.
        problem: what the outputs mean, where the artifact does not say it: single-label, multi-label (probabilities by
            the logistic function), binary (one logit) or regression.
        split: of images that have several, such as train and val.
        batch: images at once; None: what the artifact is tuned for.
        out: .csv, .json, or .npz with every output, which is the way for a model without classes.
        progress: told (images done, images in all).
        say: told what is being done, a line a step.

    Raises:
        UsageError, DataError, ArtifactError: one line each.
        CheckFailed: outputs that are not finite.
    """
    labels = arguments.maybe(arguments.path, "labels", labels)
    out = arguments.maybe(arguments.file, "out", out)
    batch = arguments.maybe(arguments.batch_size, "batch", batch)
    top = arguments.whole("top", top)
    argument_names.check(say=say, problem=problem, split=split)
    arguments.progress(progress, arguments.OF_IMAGES)
    run, trust = run_options(options)
    from ..workflows import predict as work

    work.check(images)
    artifact = None
    if isinstance(model, Session):
        if options:
            raise UsageError(f"{next(iter(options))} is the session's own; give it to `load`, or give the folder here")
        session = model
    else:
        artifact = opened(arguments.path("model", model, "an artifact folder, or a session of `load`"))
        session = formats.opened(artifact, run, trust)
    return work.predict(
        session,
        work.listed(images, split),
        artifact=artifact,
        batch=session.manifest.export.batch.opt if batch is None else batch,
        top=top,
        labels=labels,
        problem=problem,
        out=out,
        progress=progress,
        say=say,
    )
