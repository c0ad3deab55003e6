"""Accuracy of an artifact over a labelled image source, with every prediction kept.

Finished predictions go to `<out>.partial/` as the work proceeds (`inference`), so that an interrupted evaluation goes
on where it stopped; at the end they become `<out>.npz`, and the summary `<out>.json`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import manifest
from ..artifact.manifest import Artifact, write_file
from ..artifact.session import Session
from ..data import sources
from ..errors import DataError, UsageError, printable
from ..records.accuracy import EvalResult, OutputScore, ScoreResult
from ..records.base import Goal
from . import inference, outputs, partial, statistics
from .boxes import Detections
from .inference import Runner
from .outputs import Outputs, Scored, Segments
from .prediction_files import SUFFIX, encode
from .predictions import Chunk, Predictions, hits, per_class
from .targets import labelled, problem_of, refuse_lost_classes


def evaluate(
    session: Session | Runner,
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
        session: of `artifact`, loaded; or what runs images elsewhere.
        source: its labels index the model's outputs, or its class names tell which ones (`data.numbering.numbered`).
        artifact: has preprocessing, class names and identity.
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
    tell = say or (lambda line: None)
    work = inference.Work(artifact=artifact, source=source, problem=problem, batch=batch)
    run = inference.run(_runner(session), work, out=out, force=force, progress=progress, tell=tell)
    predictions = run.chunk.predictions
    assert isinstance(predictions, Predictions)
    if limit is None:
        refuse_lost_classes(source, predictions, run.chunk.corrupt)
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
        corrupt=run.chunk.corrupt,
        top1=float(first.mean()),
        top5=float(np.mean(hits(predictions, 5))),
        per_class=per_class(predictions, names or source.class_names),
        images_per_s=run.images_per_s,
        predictions=None if out is None else f"{out.name}{SUFFIX}",
        notes=notes,
        problem=problem,
    )
    _keep(out, run.chunk, result)
    return result


def score(
    session: Session | Runner,
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
    work = inference.Work(artifact=artifact, source=source, problem=problem, batch=batch)
    run = inference.run(_runner(session), work, out=out, force=force, progress=progress, tell=tell)
    predictions = run.chunk.predictions
    assert not isinstance(predictions, Predictions)
    quality = outputs.scored(predictions, problem)
    notes = run.notes
    if not outputs.is_above_chance(predictions, quality, problem):
        notes = (*notes, outputs.chance_words(predictions, quality, problem))
        tell(notes[-1])
    called = artifact.manifest.labels or source.class_names or ()
    positives = outputs.positives(predictions, problem, len(quality.per_output))
    result = ScoreResult(
        problem=problem,
        artifact=printable(artifact.path.resolve().name),
        artifact_sha256=artifact.sha256,
        data=source.name,
        data_sha256=source.sha256,
        images=len(predictions.names),
        corrupt=run.chunk.corrupt,
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
        **_beside(predictions, problem, quality),
    )
    _keep(out, run.chunk, result)
    return result


def _beside(answers: Outputs | Segments | Detections, problem: Goal, quality: Scored) -> dict[str, Any]:
    """The fields of a ScoreResult that one kind of model has."""
    beside: dict[str, Any] = dict.fromkeys(("exact", "mean_absolute_error", "root_mean_square_error"))
    if isinstance(answers, Detections):
        masks = quality.of_masks
        of_masks = (
            {} if masks is None else {"mask_average_precision": masks.score, "mask_average_precision_50": masks.at_50}
        )
        return beside | {"average_precision_50": quality.at_50} | of_masks
    if isinstance(answers, Segments):
        return beside | {"pixel_accuracy": float(answers.hits.sum() / answers.truth.sum())}
    if problem == "multi-label":
        return beside | {"exact": float(np.mean(((answers.outputs > 0) == (answers.targets > 0)).all(axis=1)))}
    errors = answers.outputs.astype(np.float64) - answers.targets
    return beside | {
        "mean_absolute_error": float(np.abs(errors).mean()),
        "root_mean_square_error": float(np.sqrt((errors**2).mean())),
    }


def _keep(out: Path | None, outcome: Chunk, result: EvalResult | ScoreResult) -> None:
    if out is not None:
        # The summary last: where it exists, the predictions do too.
        write_file(partial.beside(out, SUFFIX), encode(outcome))
        write_file(partial.beside(out, ".json"), manifest.encode(result))
        partial.remove(partial.beside(out, ".partial"))


def _runner(session: Session | Runner) -> Runner:
    return inference.here(session) if isinstance(session, Session) else session


def _limited(source: sources.ImageSource, limit: int | None) -> sources.ImageSource:
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}; expected at least 1 image")
    return source if limit is None else sources.subset(source, limit)


def read_result(path: Path) -> EvalResult:
    """Read the summary of a classifier's evaluation.

    Raises:
        DataError: the file cannot be read, or is not an EvalResult of this version.
    """
    record = partial.read_any(path)
    if not isinstance(record, EvalResult):
        raise DataError(f"{path} is of a {record.problem} model; expected a classifier's result of eval")
    return record


def at_chance(top1: float, chance: float) -> str:
    return (
        f"top-1 {top1:.2%} is not clearly above what the same answers in any order would give ({chance:.2%}): are the "
        "classes numbered as the model's are (--labels), and is this its preprocessing?"
    )
