"""Accuracy of a loaded artifact over a labelled image source, with every prediction kept.

Images are decoded by a pool of threads while the session runs the batch before. Finished predictions go to
`<out>.partial/` as the work proceeds, so that an interrupted evaluation goes on where it stopped; at the end they
become `<out>.npz`, and the summary `<out>.json`.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact import manifest
from ..artifact.manifest import Artifact, write_file
from ..artifact.session import Session, run_in_batches
from ..data import preprocess, sources
from ..errors import CheckFailed, DataError, UsageError, printable
from ..records.accuracy import EvalResult, OutputScore, ScoreResult
from ..records.base import Goal
from . import boxes, outputs, partial, segments, statistics
from .boxes import Detections
from .outputs import Outputs, Scored, Segments
from .predictions import (
    NONE,
    SUFFIX,
    Chunk,
    Kept,
    Predictions,
    encode,
    hits,
    joined,
    of_logits,
    per_class,
)
from .targets import labelled, problem_of, refuse_lost_classes, targets_of

# From the names of images, their places in the source, the outputs for them and their (height, width), to what is kept.
Arrays = tuple[NDArray[np.float32], ...]
Sides = list[tuple[int, int]]
Answers = Callable[[tuple[str, ...], list[int], Arrays, Sides], Kept]

CHUNK = 256  # images between two saves, in whole batches; what a process that is killed loses at most


def evaluate(
    session: Session,
    source: sources.ImageSource,
    *,
    artifact: Artifact,
    batch: int,
    out: Path | None = None,
    limit: int | None = None,
    classes: dict[str, int] | None = None,
    problem: Goal | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> EvalResult:
    """Run a classifier over a labelled source and count how often the label is its first, or among its first five.

    What was assumed about the images and their classes, and an accuracy no better than chance, is in the result's
    notes. Corrupt images are listed in the result and are not part of any share. With fewer than five classes, top-5
    takes all there are. The result's `images_per_s` is of the images that this call itself ran, 0 where it ran none.

    Args:
        session: of `artifact`, loaded.
        source: its labels index the model's outputs, or its class names tell which ones (`data.numbering.numbered`).
        artifact: gives preprocessing, class names and identity.
        batch: images a call of the session; the last one may be smaller.
        out: `<out>.json` and `<out>.npz` are written, and `<out>.partial/` until then. None keeps nothing.
        limit: evaluate at most so many images, evenly spaced over the source.
        classes: class names and the outputs that they mean; None: the artifact's labels, WordNet ids, or positions.
        problem: single-label or binary; None: as the artifact says. A binary model's one logit is that of class 1.
        force: replace an earlier result of `out`, and begin again instead of going on.
        progress: called with (images done, images in all), first before any work: with more than 0 done where
            an interrupted evaluation goes on.
        say: told what is assumed about the images, and where an interrupted evaluation goes on.

    Raises:
        UsageError: not a classifier, a batch that the artifact does not take, or `out` belongs to something else.
        DataError: no labels, labels that are not the model's, or not one readable image.
        CheckFailed: the model's outputs are not finite.
    """
    problem = problem_of(artifact.manifest.model, problem)
    if problem not in ("single-label", "binary"):
        raise UsageError(f"a {problem} model has no top-1; take `score`")
    source = labelled(_limited(source, limit), artifact, classes, problem)
    labels = source.labels
    assert labels is not None  # `labelled` refuses them

    def answers(names: tuple[str, ...], indices: list[int], outputs: Arrays, sides: Sides) -> Predictions:
        (logits,) = outputs
        both = np.concatenate([np.zeros_like(logits), logits], axis=1) if problem == "binary" else logits
        return of_logits(names, labels[indices], both)

    tell = say or (lambda line: None)
    run = _run(session, source, artifact, batch, problem, answers, out, force, progress, tell)
    predictions = run.outcome.predictions
    assert isinstance(predictions, Predictions)
    if limit is None:
        refuse_lost_classes(source, predictions, run.outcome.corrupt)
    first = hits(predictions, 1)
    chance = statistics.expected_agreement(predictions.top_classes[:, 0], predictions.labels)
    notes = run.notes
    if not statistics.is_above_chance(int(first.sum()), len(first), chance):
        notes = (*notes, at_chance(float(first.mean()), chance))
        tell(notes[-1])
    names = None if problem == "binary" and len(artifact.manifest.labels or ()) < 2 else artifact.manifest.labels
    result = EvalResult(
        artifact=printable(artifact.path.resolve().name),
        artifact_sha256=artifact.sha256,
        data=source.name,
        data_sha256=source.sha256,
        images=len(predictions.names),
        corrupt=run.outcome.corrupt,
        top1=float(first.mean()),
        top5=float(np.mean(hits(predictions, 5))),
        per_class=per_class(predictions, names or source.class_names),
        images_per_s=run.images_per_s,
        predictions=None if out is None else f"{out.name}{SUFFIX}",
        notes=notes,
        problem=problem,
    )
    _keep(out, run.outcome, result)
    return result


def score(
    session: Session,
    source: sources.ImageSource,
    *,
    artifact: Artifact,
    batch: int,
    problem: Goal,
    out: Path | None = None,
    limit: int | None = None,
    classes: dict[str, int] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ScoreResult:
    """Run a model that has no top-1 over a source: mAP (multi-label, detector), R2 (regression), mIoU (segmenter).

    Args as those of `evaluate`.

    Raises:
        UsageError, DataError, CheckFailed: as `evaluate`.
    """
    problem = problem_of(artifact.manifest.model, problem)
    source = labelled(_limited(source, limit), artifact, classes, problem)
    tell = say or (lambda line: None)
    if problem == "segmentation":
        answers = _counting(source, artifact)
    elif problem == "detection":
        answers = _boxing(source, artifact)
    else:
        answers = _keeping(source, artifact, problem)
    run = _run(session, source, artifact, batch, problem, answers, out, force, progress, tell)
    found = run.outcome.predictions
    assert not isinstance(found, Predictions)
    quality = outputs.scored(found, problem)
    notes = run.notes
    if not outputs.is_above_chance(found, quality, problem):
        notes = (*notes, outputs.chance_words(found, quality, problem))
        tell(notes[-1])
    called = artifact.manifest.labels or source.class_names or ()
    positives = outputs.positives(found, problem, len(quality.per_output))
    result = ScoreResult(
        problem=problem,
        artifact=printable(artifact.path.resolve().name),
        artifact_sha256=artifact.sha256,
        data=source.name,
        data_sha256=source.sha256,
        images=len(found.names),
        corrupt=run.outcome.corrupt,
        score=quality.score,
        per_output=tuple(
            OutputScore(
                output=number,
                name=called[number] if number < len(called) else str(number),
                positives=positives[number],
                score=one,
            )
            for number, one in enumerate(quality.per_output)
        ),
        images_per_s=run.images_per_s,
        predictions=None if out is None else f"{out.name}{SUFFIX}",
        notes=notes,
        **_beside(found, problem, quality),
    )
    _keep(out, run.outcome, result)
    return result


def _keeping(source: sources.ImageSource, artifact: Artifact, problem: Goal) -> Answers:
    """What keeps a multi-label model's or a regression's outputs beside what they are to be."""
    targets = targets_of(source, artifact.manifest.model.num_classes, problem)

    def answers(names: tuple[str, ...], indices: list[int], outputs: Arrays, sides: Sides) -> Outputs:
        (logits,) = outputs
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            raise CheckFailed(f"the model's outputs for {names[int(np.argmin(finite))]} hold NaN or infinite values")
        return Outputs(names, targets[indices], logits)

    return answers


def _counting(source: sources.ImageSource, artifact: Artifact) -> Answers:
    """What counts a segmenter's pixels beside those of the masks."""
    truth, classes = source.masks, artifact.manifest.model.num_classes
    assert truth is not None  # `labelled` refuses that
    return lambda names, indices, found, sides: segments.counted(names, indices, found[0], truth, classes)


def _boxing(source: sources.ImageSource, artifact: Artifact) -> Answers:
    """What keeps a detector's boxes beside those of the objects."""
    truth, image_size = source.boxes, artifact.manifest.model.image_size
    assert truth is not None  # `labelled` refuses that
    return lambda names, indices, found, sides: boxes.detected(names, indices, found, sides, image_size, truth)


def _beside(found: Outputs | Segments | Detections, problem: Goal, quality: Scored) -> dict[str, Any]:
    """The fields of a ScoreResult that one kind of model has."""
    beside: dict[str, Any] = dict.fromkeys(("exact", "mean_absolute_error", "root_mean_square_error"))
    if isinstance(found, Detections):
        return beside | {"average_precision_50": quality.at_50}
    if isinstance(found, Segments):
        return beside | {"pixel_accuracy": float(found.hits.sum() / found.wanted.sum())}
    if problem == "multi-label":
        return beside | {"exact": float(np.mean(((found.outputs > 0) == (found.targets > 0)).all(axis=1)))}
    errors = found.outputs.astype(np.float64) - found.targets
    return beside | {
        "mean_absolute_error": float(np.abs(errors).mean()),
        "root_mean_square_error": float(np.sqrt((errors**2).mean())),
    }


@dataclass(frozen=True, slots=True)
class _Run:
    outcome: Chunk
    images_per_s: float
    notes: tuple[str, ...]


def _run(
    session: Session,
    source: sources.ImageSource,
    artifact: Artifact,
    batch: int,
    problem: Goal,
    answers: Answers,
    out: Path | None,
    force: bool,
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None],
) -> _Run:
    """Every image through the session, from where an interrupted call of the same stopped."""
    _check_batch(batch, artifact)
    model, preprocessing = artifact.manifest.model, artifact.manifest.preprocessing
    to_pixels = preprocess.transform(preprocessing, model.image_size, model.in_chans)
    for note in source.notes:
        tell(note)
    folder = None if out is None else partial.opened(out, artifact, source, problem, force)
    finished = [] if folder is None else partial.chunks_of(folder)
    done = finished[-1].stop if finished else 0
    pending: list[Chunk] = []
    turned: list[int] = []

    def save() -> None:
        if not pending:
            return
        chunk = joined(pending)
        if folder is not None:
            write_file(folder / f"{chunk.start:09d}{SUFFIX}", encode(chunk))
        finished.append(chunk)
        pending.clear()

    if done:
        tell(f"going on at image {done:,} of {len(source):,}")
    report = progress or (lambda done, total: None)
    report(done, len(source))
    ran = len(source) - done
    begin = time.perf_counter()
    with preprocess.decoders() as pool:
        try:
            for piece, its_turned in _batches(pool, session, source, answers, to_pixels, batch, done):
                pending.append(piece)
                turned += its_turned
                report(piece.stop, len(source))
                if piece.stop - pending[0].start >= CHUNK:
                    save()
        finally:  # Ctrl-C too: whole batches only, so that the next call forms the same ones
            save()
    elapsed = time.perf_counter() - begin
    outcome = joined(finished)
    if not outcome.predictions.names:
        corrupt = outcome.corrupt
        raise DataError(f"none of the {len(corrupt)} images of {source.name} can be read; the first is {corrupt[0]}")
    said = preprocess.turned_words(len(turned), source.names[turned[0]] if turned else "", preprocessing)
    if said is not None:
        tell(said)
    notes = source.notes if said is None else (*source.notes, said)
    return _Run(outcome, ran / elapsed if ran else 0.0, notes)


def _keep(out: Path | None, outcome: Chunk, result: EvalResult | ScoreResult) -> None:
    if out is not None:
        # The summary last: where it exists, the predictions do too.
        write_file(partial.beside(out, SUFFIX), encode(outcome))
        write_file(partial.beside(out, ".json"), manifest.encode(result))
        partial.remove(partial.beside(out, ".partial"))


def _limited(source: sources.ImageSource, limit: int | None) -> sources.ImageSource:
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}; expected at least 1 image")
    return source if limit is None else sources.subset(source, limit)


def read_result(path: Path) -> EvalResult:
    """Read the summary of a classifier's evaluation.

    Raises:
        DataError: the file cannot be read, or is not an EvalResult of this version.
    """
    found = partial.read_any(path)
    if not isinstance(found, EvalResult):
        raise DataError(f"{path} is of a {found.problem} model; expected a classifier's result of eval")
    return found


def at_chance(top1: float, chance: float) -> str:
    return (
        f"top-1 {top1:.2%} is not clearly above what the same answers in any order would give ({chance:.2%}): are the "
        "classes numbered as the model's are (--labels), and is this its preprocessing?"
    )


def _check_batch(batch: int, artifact: Artifact) -> None:
    allowed = artifact.manifest.export.batch
    if not allowed.min <= batch <= allowed.max:
        raise UsageError(f"batch {batch}; this artifact takes {allowed.min} to {allowed.max} images at once")


def _batches(
    pool: ThreadPoolExecutor,
    session: Session,
    source: sources.ImageSource,
    answers: Answers,
    to_pixels: Callable[[Image.Image], NDArray[np.uint8]],
    batch: int,
    start: int,
) -> Iterator[tuple[Chunk, list[int]]]:
    """The outcome of `batch` images after another, and which have an EXIF orientation.

    A corrupt image leaves its batch smaller and moves no other image.
    """
    upright = session.manifest.preprocessing.exif_orientation
    for these in preprocess.decoded_batches(pool, source.read, to_pixels, range(start, len(source)), batch, upright):
        corrupt = tuple(f"{source.names[index]}: {line}" for index, line in these.failed)
        found: Kept = NONE
        if these.read:
            put_out = _outputs(session, np.stack(these.pixels))
            found = answers(tuple(source.names[index] for index in these.read), these.read, put_out, these.sides)
        yield Chunk(these.indices.start, these.indices.stop, found, corrupt), these.turned


def _outputs(session: Session, pixels: NDArray[np.uint8]) -> Arrays:
    """Of (N, C, H, W). Too few images for the artifact are filled up there and cut off again."""
    manifest = session.manifest
    images = preprocess.as_input(pixels, manifest.preprocessing, manifest.export.input)
    return run_in_batches(session, images, size=len(images))
