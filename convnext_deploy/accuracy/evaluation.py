"""Accuracy of a loaded artifact over a labelled image source, with every prediction kept.

Images are decoded by a pool of threads while the session runs the batch before. Finished predictions go to
`<out>.partial/` as the work proceeds, so that an interrupted evaluation goes on where it stopped; at the end they
become `<out>.npz`, and the summary `<out>.json`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact import manifest
from ..artifact.manifest import Artifact, write_file
from ..artifact.session import Session, run_in_batches
from ..data import numbering, preprocess, sources
from ..errors import DataError, UsageError
from ..records.accuracy import EvalResult
from ..records.base import Record, Sha256
from . import statistics
from .predictions import (
    NONE,
    SUFFIX,
    Chunk,
    decode,
    encode,
    hits,
    joined,
    of_logits,
    per_class,
    read_predictions,
)

CHUNK = 256  # images between two saves, in whole batches; what a process that is killed loses at most
IDENTITY_NAME = "identity.json"


class Identity(Record, frozen=True, kw_only=True):
    """What a folder of unfinished predictions belongs to. The batch size is not part of it."""

    artifact_sha256: Sha256
    data_sha256: Sha256


def evaluate(
    session: Session,
    source: sources.ImageSource,
    *,
    artifact: Artifact,
    batch: int,
    out: Path | None = None,
    limit: int | None = None,
    classes: dict[str, int] | None = None,
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
        force: replace an earlier result of `out`, and begin again instead of going on.
        progress: called with (images done, images in all), first before any work: with more than 0 done where
            an interrupted evaluation goes on.
        say: told what is assumed about the images, and where an interrupted evaluation goes on.

    Raises:
        UsageError: not a classifier, a batch that the artifact does not take, or `out` belongs to something else.
        DataError: no labels, labels that are not the model's, or not one readable image.
        CheckFailed: the model's outputs are not finite.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}; expected at least 1 image")
    _check_batch(batch, artifact)
    source = labelled(source, artifact, classes)
    if limit is not None:
        source = sources.subset(source, limit)
    labels = source.labels
    assert labels is not None  # `labelled` refuses them
    model, preprocessing = artifact.manifest.model, artifact.manifest.preprocessing
    to_pixels = preprocess.transform(preprocessing, model.image_size, model.in_chans)
    tell = say or (lambda line: None)
    for note in source.notes:
        tell(note)
    partial = None if out is None else _opened_partial(out, artifact, source, force)
    finished = [] if partial is None else _read_chunks(partial)
    done = finished[-1].stop if finished else 0
    pending: list[Chunk] = []

    def save() -> None:
        if not pending:
            return
        chunk = joined(pending)
        if partial is not None:
            write_file(partial / f"{chunk.start:09d}{SUFFIX}", encode(chunk))
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
            for piece in _batches(pool, session, source, labels, to_pixels, batch, done):
                pending.append(piece)
                report(piece.stop, len(source))
                if piece.stop - pending[0].start >= CHUNK:
                    save()
        finally:  # Ctrl-C too: whole batches only, so that the next call forms the same ones
            save()
    elapsed = time.perf_counter() - begin

    outcome = joined(finished)
    predictions, corrupt = outcome.predictions, outcome.corrupt
    if not predictions.names:
        raise DataError(f"none of the {len(corrupt)} images of {source.name} can be read; the first is {corrupt[0]}")
    first = hits(predictions, 1)
    chance = statistics.expected_agreement(predictions.top_classes[:, 0], predictions.labels)
    notes = source.notes
    if not statistics.is_above_chance(int(first.sum()), len(first), chance):
        notes = (*notes, at_chance(float(first.mean()), chance))
        tell(notes[-1])
    result = EvalResult(
        artifact=artifact.path.resolve().name,
        artifact_sha256=artifact.sha256,
        data=source.name,
        data_sha256=source.sha256,
        images=len(predictions.names),
        corrupt=corrupt,
        top1=float(first.mean()),
        top5=float(np.mean(hits(predictions, 5))),
        per_class=per_class(predictions, artifact.manifest.labels or source.class_names),
        images_per_s=ran / elapsed if ran else 0.0,
        predictions=None if out is None else f"{out.name}{SUFFIX}",
        notes=notes,
    )
    if out is not None and partial is not None:
        # The summary last: where it exists, the predictions do too.
        write_file(_beside(out, SUFFIX), encode(outcome))
        write_file(_beside(out, ".json"), manifest.encode(result))
        _remove_partial(partial)
    return result


def read_result(path: Path) -> EvalResult:
    """Read the summary of an evaluation.

    Raises:
        DataError: the file cannot be read, or is not an EvalResult of this version.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=EvalResult)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected a result of eval") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a result of eval: {error}") from None


def labelled(
    source: sources.ImageSource, artifact: Artifact, classes: dict[str, int] | None = None
) -> sources.ImageSource:
    """The source with labels that are the numbers of the model's outputs.

    Raises:
        UsageError: not a classifier.
        DataError: no labels, or labels that are not the model's.
    """
    model = artifact.manifest.model
    if model.task != "classify" or model.num_classes < 1:
        raise UsageError(f"{artifact.path} is exported for the task {model.task}; only classify has an accuracy")
    if source.labels is None:
        raise DataError(f"{source.name} has no labels; expected class folders or a column label")
    return numbering.numbered(source, model.num_classes, artifact.manifest.labels, classes)


def at_chance(top1: float, chance: float) -> str:
    return (
        f"top-1 {top1:.2%} is not clearly above what the same answers in any order would give ({chance:.2%}): are the "
        "classes numbered as the model's are (--labels), and is this its preprocessing?"
    )


def _check_batch(batch: int, artifact: Artifact) -> None:
    allowed = artifact.manifest.export.batch
    if not allowed.min <= batch <= allowed.max:
        raise UsageError(f"batch {batch}; this artifact takes {allowed.min} to {allowed.max} images at once")


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def _opened_partial(out: Path, artifact: Artifact, source: sources.ImageSource, force: bool) -> Path:
    """The folder for unfinished predictions, new or of the same evaluation."""
    if not out.name:
        raise UsageError(f"--out {out} names no file; expected the first part of the result's file names")
    folder, predictions, result = (_beside(out, suffix) for suffix in (".partial", SUFFIX, ".json"))
    if force:
        _remove_result(result, predictions, folder)
    for written in (result, predictions):
        # Predictions without a summary, beside a folder, are of a process that was killed between the two.
        if written.exists() and not (written == predictions and folder.is_dir()):
            raise UsageError(f"{written} exists; choose another --out, or replace it with --force")
    identity = Identity(artifact_sha256=artifact.sha256, data_sha256=source.sha256)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            write_file(folder / IDENTITY_NAME, msgspec.json.encode(identity))
            return folder
        found = msgspec.json.decode((folder / IDENTITY_NAME).read_bytes(), type=Identity)
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no unfinished evaluation; remove it or give another --out") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be used: {error.strerror}; choose another --out") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise UsageError(f"{folder / IDENTITY_NAME} is damaged; remove the folder or give another --out") from None
    if found != identity:
        other = "artifact" if found.artifact_sha256 != identity.artifact_sha256 else "set of images"
        raise UsageError(f"{folder} is of another {other}; remove the folder or give another --out")
    return folder


def _remove_result(result: Path, predictions: Path, folder: Path) -> None:
    """Remove what an evaluation wrote, and nothing that it did not write."""
    if result.exists():
        read_result(result)
    if predictions.exists():
        read_predictions(predictions)
    if folder.exists():
        strange = [path for path in folder.iterdir() if path.name != IDENTITY_NAME and path.suffix != SUFFIX]
        if strange or not (folder / IDENTITY_NAME).is_file():
            raise UsageError(f"{folder} holds no unfinished evaluation; remove it or give another --out")
        _remove_partial(folder)
    for written in (result, predictions):
        written.unlink(missing_ok=True)


def _remove_partial(folder: Path) -> None:
    """Remove what an evaluation has put there; a folder that somebody else has put more into stays."""
    for path in (folder / IDENTITY_NAME, *folder.glob(f"[0-9]*{SUFFIX}")):
        path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _read_chunks(folder: Path) -> list[Chunk]:
    """What an interrupted evaluation has finished: chunks that follow one another from the first image on."""
    chunks: list[Chunk] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        chunk = decode(path)
        if chunk.start != (chunks[-1].stop if chunks else 0):
            raise UsageError(f"{folder} lacks predictions before {path.name}; remove it or give another --out")
        chunks.append(chunk)
    return chunks


def _batches(
    pool: ThreadPoolExecutor,
    session: Session,
    source: sources.ImageSource,
    labels: NDArray[np.int64],
    to_pixels: Callable[[Image.Image], NDArray[np.uint8]],
    batch: int,
    start: int,
) -> Iterator[Chunk]:
    """The outcome of `batch` images after another. A corrupt one leaves its batch smaller and moves no other image."""
    decoded = preprocess.decoded_batches(pool, source.read, to_pixels, range(start, len(source)), batch)
    for indices, good, pixels, failed in decoded:
        corrupt = tuple(f"{source.names[index]}: {line}" for index, line in failed)
        predictions = NONE
        if good:
            logits = _logits(session, np.stack(pixels))
            predictions = of_logits(tuple(source.names[index] for index in good), labels[good], logits)
        yield Chunk(indices.start, indices.stop, predictions, corrupt)


def _logits(session: Session, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, C, H, W) -> (N, classes). Too few images for the artifact are filled up there and cut off again."""
    manifest = session.manifest
    images = preprocess.as_input(pixels, manifest.preprocessing, manifest.export.input)
    return run_in_batches(session, images, size=len(images))[0]
