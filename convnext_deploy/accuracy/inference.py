"""Every image of a source through a session, from where an interrupted call stopped; the session may be elsewhere.

Images are decoded by a pool of threads while the session runs the batch before. Finished predictions go to
`<out>.partial/` as the work proceeds.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact.manifest import Artifact, write_file
from ..artifact.session import Session, run_in_batches
from ..data import preprocess, sources
from ..errors import CheckFailed, DataError, UsageError, counted
from ..records.base import Goal
from . import boxes, partial, segments
from .outputs import Outputs
from .prediction_files import SUFFIX, encode
from .predictions import NONE, Chunk, Kept, Predictions, joined, of_logits
from .targets import targets_of

CHUNK = 256  # images between two saves, in whole batches; what a process that is killed loses at most

Arrays = tuple[NDArray[np.float32], ...]
Sides = list[tuple[int, int]]
# From the names of images, their places in the source, the outputs for them and their (height, width), to what is kept.
Answers = Callable[[tuple[str, ...], list[int], Arrays, Sides], Kept]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked: an artifact's answers to all images of a source, `batch` at once."""

    artifact: Artifact
    source: sources.ImageSource  # with what is right (`targets.labelled`)
    problem: Goal
    batch: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The outcome of some images that follow one another in the source."""

    chunk: Chunk
    turned: list[int]  # the indices of those that have an EXIF orientation
    computed_by: str = ""  # the machine's kind and versions, where it is another one than this


# Runs the images of these ranges in whole batches from the start of each range; pieces may come in any order.
Runner = Callable[[Work, Sequence[range]], Generator[Piece, None, None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the work."""

    chunk: Chunk  # of all images
    images_per_s: float  # of those that this call ran; 0 where it ran none
    notes: tuple[str, ...]


def run(
    runner: Runner,
    work: Work,
    *,
    out: Path | None,
    force: bool,
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None],
) -> Outcome:
    """All images, but those that an interrupted call of the same has done.

    Raises:
        UsageError: a batch that the artifact does not take, or `out` belongs to something else.
        DataError: not one readable image.
    """
    source = work.source
    _check_batch(work.batch, work.artifact)
    answers_of(work)  # refuses what cannot be judged, before anything is written
    for note in source.notes:
        tell(note)
    folder = None if out is None else partial.opened(out, work.artifact, source, work.problem, force)
    finished = [] if folder is None else partial.chunks_of(folder)
    missing = partial.missing(finished, len(source))
    done = before = len(source) - sum(map(len, missing))
    pending: list[Chunk] = []
    turned: list[int] = []
    kinds: set[str] = set()

    def save() -> None:
        if not pending:
            return
        chunk = joined(pending)
        if folder is not None:
            write_file(folder / f"{chunk.start:09d}{SUFFIX}", encode(chunk))
        finished.append(chunk)
        pending.clear()

    if done:
        tell(f"going on: {done:,} of {len(source):,} images are done")
    report = progress or (lambda done, total: None)
    report(done, len(source))
    begin = time.perf_counter()
    try:
        with closing(runner(work, missing)) as pieces:
            for piece in pieces:
                chunk = piece.chunk
                if pending and chunk.start != pending[-1].stop:
                    save()
                pending.append(chunk)
                turned += piece.turned
                kinds.add(piece.computed_by)
                done += chunk.stop - chunk.start
                report(done, len(source))
                if chunk.stop - pending[0].start >= CHUNK:
                    save()
    finally:  # Ctrl-C too: whole batches only, so that the next call forms the same ones
        save()
    elapsed = time.perf_counter() - begin
    outcome = joined(sorted(finished, key=lambda chunk: chunk.start))
    if not outcome.predictions.names:
        corrupt = outcome.corrupt
        raise DataError(f"none of the {len(corrupt)} images of {source.name} can be read; the first is {corrupt[0]}")
    preprocessing = work.artifact.manifest.preprocessing
    notes = [preprocess.turned_words(len(turned), source.names[min(turned)] if turned else "", preprocessing)]
    if len(kinds) > 1:
        notes.append(
            f"computed by {len(kinds)} kinds of machines, whose last bits may differ: {'; '.join(sorted(kinds))}"
        )
    said = [note for note in notes if note is not None]
    for note in said:
        tell(note)
    ran = done - before
    return Outcome(outcome, ran / elapsed if ran else 0.0, (*source.notes, *said))


def here(session: Session, threads: int | None = None) -> Runner:
    """Runs images in this process, in order.

    Args:
        threads: that decode; None: one a core.
    """

    def ran(work: Work, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        model, preprocessing = work.artifact.manifest.model, work.artifact.manifest.preprocessing
        to_pixels = preprocess.transform(preprocessing, model.image_size, model.in_chans)
        answers = answers_of(work)
        with preprocess.decoders(threads) as pool:
            for indices in ranges:
                yield from _batches(pool, session, work, answers, to_pixels, indices)

    return ran


def answers_of(work: Work) -> Answers:
    """What is kept of a model's outputs, beside what is right."""
    source, problem = work.source, work.problem
    model = work.artifact.manifest.model
    if problem == "segmentation":
        truth, classes = source.masks, model.num_classes
        assert truth is not None  # `labelled` refuses that
        return lambda names, indices, outputs, sides: segments.counted(names, indices, outputs[0], truth, classes)
    if problem == "detection":
        objects, image_size = source.boxes, model.image_size
        assert objects is not None  # likewise
        return lambda names, indices, outputs, sides: boxes.detected(
            names, indices, outputs, sides, image_size, objects
        )
    if problem in ("multi-label", "regression"):
        targets = targets_of(source, model.num_classes, problem)

        def kept(names: tuple[str, ...], indices: list[int], outputs: Arrays, sides: Sides) -> Outputs:
            (logits,) = outputs
            finite = np.isfinite(logits).all(axis=1)
            if not finite.all():
                raise CheckFailed(
                    f"the model's outputs for {names[int(np.argmin(finite))]} have NaN or infinite values"
                )
            return Outputs(names, targets[indices], logits)

        return kept
    labels = source.labels
    assert labels is not None  # `labelled` refuses them

    def best(names: tuple[str, ...], indices: list[int], outputs: Arrays, sides: Sides) -> Predictions:
        (logits,) = outputs
        both = np.concatenate([np.zeros_like(logits), logits], axis=1) if problem == "binary" else logits
        return of_logits(names, labels[indices], both)

    return best


def _check_batch(batch: int, artifact: Artifact) -> None:
    allowed = artifact.manifest.export.batch
    if not allowed.min <= batch <= allowed.max:
        raise UsageError(f"batch {batch}; this artifact takes {allowed.min} to {counted(allowed.max, 'image')} at once")


def _batches(
    pool: ThreadPoolExecutor,
    session: Session,
    work: Work,
    answers: Answers,
    to_pixels: Callable[[Image.Image], NDArray[np.uint8]],
    indices: range,
) -> Iterator[Piece]:
    """The outcome of one batch after another.

    A corrupt image leaves its batch smaller and moves no other image.
    """
    source = work.source
    upright = session.manifest.preprocessing.exif_orientation
    for these in preprocess.decoded_batches(pool, source.read, to_pixels, indices, work.batch, upright):
        corrupt = tuple(f"{source.names[index]}: {line}" for index, line in these.failed)
        predictions: Kept = NONE
        if these.read:
            put_out = _outputs(session, np.stack(these.pixels))
            predictions = answers(tuple(source.names[index] for index in these.read), these.read, put_out, these.sides)
        yield Piece(Chunk(these.indices.start, these.indices.stop, predictions, corrupt), these.turned)


def _outputs(session: Session, pixels: NDArray[np.uint8]) -> Arrays:
    """Of (N, C, H, W). Too few images for the artifact are filled up there and cut off again."""
    manifest = session.manifest
    images = preprocess.as_input(pixels, manifest.preprocessing, manifest.export.input)
    return run_in_batches(session, images, size=len(images))
