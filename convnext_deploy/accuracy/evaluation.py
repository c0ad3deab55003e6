"""Accuracy of a loaded artifact over a labelled image source, with every prediction kept.

Images are decoded by a pool of threads while the session runs the batch before. Finished predictions go to
`<out>.partial/` as the work proceeds, so that an interrupted evaluation goes on where it stopped; at the end they
become `<out>.parquet`, and the summary `<out>.json`.
"""

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact.manifest import Artifact, encode, write_file
from ..artifact.session import Session, run_in_batches
from ..data import numbering, preprocess, sources
from ..data.image_tables import PARQUET_ERRORS
from ..env import needs, usable_cores
from ..errors import CheckFailed, DataError, UsageError
from ..records.accuracy import ClassAccuracy, EvalResult
from ..records.base import Record, Sha256
from . import statistics

CHUNK = 256  # images between two saves, in whole batches; what a process that is killed loses at most
IDENTITY_NAME = "identity.json"
_METADATA = b"convnext-deploy"  # key in a predictions file's schema


class Identity(Record, frozen=True, kw_only=True):
    """What a folder of unfinished predictions belongs to. The batch size is not part of it."""

    artifact_sha256: Sha256
    data_sha256: Sha256


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model said about each readable image of a source, in the source's order. k = min(5, classes)."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,)
    top_classes: NDArray[np.int32]  # (N, k), the likeliest first; of equal ones the lower class
    top_log_probs: NDArray[np.float32]  # (N, k), natural logarithm
    label_log_prob: NDArray[np.float32]  # (N,)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The outcome of the source's images start..stop-1: of one batch, or of several that follow one another."""

    start: int
    stop: int
    predictions: Predictions
    corrupt: tuple[str, ...]  # "name: reason"


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
        out: `<out>.json` and `<out>.parquet` are written, and `<out>.partial/` until then. None keeps nothing.
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
    if out is not None:
        needs_pyarrow()  # before the work and not after it
    partial = None if out is None else _opened_partial(out, artifact, source, force)
    finished = [] if partial is None else _read_chunks(partial)
    done = finished[-1].stop if finished else 0
    pending: list[_Chunk] = []

    def save() -> None:
        if not pending:
            return
        chunk = _joined(pending)
        if partial is not None:
            write_file(partial / f"{chunk.start:09d}.parquet", _encode(chunk))
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

    outcome = _joined(finished)
    predictions, corrupt = outcome.predictions, outcome.corrupt
    if not predictions.names:
        raise DataError(f"none of the {len(corrupt)} images of {source.name} can be read; the first is {corrupt[0]}")
    hits = _hits(predictions, 1)
    chance = statistics.expected_agreement(predictions.top_classes[:, 0], predictions.labels)
    notes = source.notes
    if not statistics.is_above_chance(int(hits.sum()), len(hits), chance):
        notes = (*notes, at_chance(float(hits.mean()), chance))
        tell(notes[-1])
    result = EvalResult(
        artifact=artifact.path.resolve().name,
        artifact_sha256=artifact.sha256,
        data=source.name,
        data_sha256=source.sha256,
        images=len(predictions.names),
        corrupt=corrupt,
        top1=float(hits.mean()),
        top5=float(np.mean(_hits(predictions, 5))),
        per_class=_per_class(predictions, artifact.manifest.labels or source.class_names),
        images_per_s=ran / elapsed if ran else 0.0,
        predictions=None if out is None else f"{out.name}.parquet",
        notes=notes,
    )
    if out is not None and partial is not None:
        # The summary last: where it exists, the predictions do too.
        write_file(_beside(out, ".parquet"), _encode(outcome))
        write_file(_beside(out, ".json"), encode(result))
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


def read_predictions(path: Path) -> Predictions:
    """Read the predictions of an evaluation, `<out>.parquet`.

    Raises:
        DataError: the file cannot be read, or does not hold predictions.
    """
    return _decode(path).predictions


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


def needs_pyarrow() -> None:
    with needs("pyarrow"):
        import pyarrow  # noqa: F401


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
    folder, predictions, result = (_beside(out, suffix) for suffix in (".partial", ".parquet", ".json"))
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
        strange = [path for path in folder.iterdir() if path.name != IDENTITY_NAME and path.suffix != ".parquet"]
        if strange or not (folder / IDENTITY_NAME).is_file():
            raise UsageError(f"{folder} holds no unfinished evaluation; remove it or give another --out")
        _remove_partial(folder)
    for written in (result, predictions):
        written.unlink(missing_ok=True)


def _remove_partial(folder: Path) -> None:
    """Remove what an evaluation has put there; a folder that somebody else has put more into stays."""
    for path in (folder / IDENTITY_NAME, *folder.glob("[0-9]*.parquet")):
        path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _read_chunks(folder: Path) -> list[_Chunk]:
    """What an interrupted evaluation has finished: chunks that follow one another from the first image on."""
    chunks: list[_Chunk] = []
    for path in sorted(folder.glob("*.parquet")):
        chunk = _decode(path)
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
) -> Iterator[_Chunk]:
    """The outcome of `batch` images after another. A corrupt one leaves its batch smaller and moves no other image."""

    def decode(index: int) -> NDArray[np.uint8] | str:
        try:
            return to_pixels(source.read(index))  # (C, H, W)
        except OSError as error:
            return " ".join(str(error).split())

    decoded = preprocess.ahead(pool, decode, range(start, len(source)), batch + usable_cores())
    for first in range(start, len(source), batch):
        indices = range(first, min(first + batch, len(source)))
        good, pixels, corrupt = [], [], []
        for index, outcome in zip(indices, decoded, strict=False):  # `decoded` goes on in the next batch
            if isinstance(outcome, str):
                corrupt.append(f"{source.names[index]}: {outcome}")
            else:
                good.append(index)
                pixels.append(outcome)
        predictions = _NONE
        if good:
            logits = _logits(session, np.stack(pixels))
            predictions = _predictions(tuple(source.names[index] for index in good), labels[good], logits)
        yield _Chunk(first, indices.stop, predictions, tuple(corrupt))


def _logits(session: Session, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, C, H, W) -> (N, classes). Too few images for the artifact are filled up there and cut off again."""
    manifest = session.manifest
    images = preprocess.as_input(pixels, manifest.preprocessing, manifest.export.input)
    return run_in_batches(session, images, size=len(images))[0]


def _predictions(names: tuple[str, ...], labels: NDArray[np.int64], logits: NDArray[np.float32]) -> Predictions:
    """Of one batch; logits (N, classes). Log-probabilities are computed in float64."""
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise CheckFailed(f"the model's outputs for {names[int(np.argmin(finite))]} hold NaN or infinite values")
    log_probs = logits.astype(np.float64)
    log_probs -= log_probs.max(axis=1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
    rows = np.arange(len(logits))
    rest = logits.copy()
    top = np.empty((len(logits), min(5, logits.shape[1])), np.int32)
    for rank in range(top.shape[1]):
        top[:, rank] = rest.argmax(axis=1)  # of equal logits the first; a sort would be slower and leave that open
        rest[rows, top[:, rank]] = -np.inf
    return Predictions(
        names=names,
        labels=labels,
        top_classes=top,
        top_log_probs=log_probs[rows[:, None], top].astype(np.float32),
        label_log_prob=log_probs[rows, labels].astype(np.float32),
    )


_NONE = Predictions(
    names=(),
    labels=np.empty(0, np.int64),
    top_classes=np.empty((0, 0), np.int32),
    top_log_probs=np.empty((0, 0), np.float32),
    label_log_prob=np.empty(0, np.float32),
)


def _joined(chunks: list[_Chunk]) -> _Chunk:
    """One outcome of several that follow one another."""
    parts = [chunk.predictions for chunk in chunks if chunk.predictions.names] or [_NONE]
    predictions = Predictions(
        names=tuple(itertools.chain.from_iterable(part.names for part in parts)),
        labels=np.concatenate([part.labels for part in parts]),
        top_classes=np.concatenate([part.top_classes for part in parts]),
        top_log_probs=np.concatenate([part.top_log_probs for part in parts]),
        label_log_prob=np.concatenate([part.label_log_prob for part in parts]),
    )
    corrupt = tuple(itertools.chain.from_iterable(chunk.corrupt for chunk in chunks))
    return _Chunk(chunks[0].start, chunks[-1].stop, predictions, corrupt)


def _hits(predictions: Predictions, count: int) -> NDArray[np.bool_]:
    """(N,): the label is among the first `count` classes."""
    return (predictions.top_classes[:, :count] == predictions.labels[:, None]).any(axis=1)


def _per_class(predictions: Predictions, names: tuple[str, ...] | None) -> tuple[ClassAccuracy, ...]:
    """Of every class that has images, in label order."""
    hits = _hits(predictions, 1)
    images, right = np.bincount(predictions.labels), np.bincount(predictions.labels, weights=hits)
    return tuple(
        ClassAccuracy(
            label=label,
            name=names[label] if names and label < len(names) else str(label),
            images=int(images[label]),
            top1=float(right[label] / images[label]),
        )
        for label in np.flatnonzero(images).tolist()
    )


def _encode(chunk: _Chunk) -> bytes:
    """As a parquet file: a row an image, and what concerns the whole chunk in the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    predictions = chunk.predictions
    schema = pa.schema(
        [
            ("name", pa.string()),
            ("label", pa.int64()),
            ("top_classes", pa.list_(pa.int32())),
            ("top_log_probs", pa.list_(pa.float32())),
            ("label_log_prob", pa.float32()),
        ],
        metadata={_METADATA: msgspec.json.encode((chunk.start, chunk.stop, chunk.corrupt))},
    )
    columns = (
        predictions.names,
        predictions.labels,
        list(predictions.top_classes),
        list(predictions.top_log_probs),
        predictions.label_log_prob,
    )
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, compression="zstd")
    return file.getvalue()


_DAMAGED = (*PARQUET_ERRORS, msgspec.MsgspecError)


def _decode(path: Path) -> _Chunk:
    with needs("pyarrow"):
        import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; expected predictions of eval") from None
    try:
        table = pq.ParquetFile(io.BytesIO(content)).read()
        start, stop, corrupt = msgspec.json.decode(
            table.schema.metadata[_METADATA], type=tuple[int, int, tuple[str, ...]]
        )
        predictions = Predictions(
            names=tuple(table["name"].to_pylist()),
            labels=_column(table["label"], np.int64),
            top_classes=_matrix(table["top_classes"], np.int32),
            top_log_probs=_matrix(table["top_log_probs"], np.float32),
            label_log_prob=_column(table["label_log_prob"], np.float32),
        )
        _check_predictions(predictions)
    except _DAMAGED as error:
        raise DataError(f"{path} does not hold predictions of eval: {' '.join(str(error).split())}") from None
    return _Chunk(start, stop, predictions, corrupt)


def _check_predictions(found: Predictions) -> None:
    """Raises ValueError where they are nothing that `_predictions` makes."""
    count = len(found.names)
    shapes = (
        found.labels.shape,
        found.label_log_prob.shape,
        found.top_classes.shape[:1],
        found.top_log_probs.shape[:1],
    )
    if any(shape != (count,) for shape in shapes) or found.top_classes.shape != found.top_log_probs.shape:
        raise ValueError("its columns are of different lengths")
    if not all(isinstance(name, str) for name in found.names):
        raise ValueError("an image has no name")
    if count and (found.top_classes.shape[1] < 1 or found.labels.min() < 0 or found.top_classes.min() < 0):
        raise ValueError("a class is missing or negative")
    if count and max(int(found.labels.max()), int(found.top_classes.max())) >= _MOST_CLASSES:
        raise ValueError(f"a class is {_MOST_CLASSES:,} or more")
    if not (np.isfinite(found.top_log_probs).all() and np.isfinite(found.label_log_prob).all()):
        raise ValueError("a probability is not finite")
    if count and max(float(found.top_log_probs.max()), float(found.label_log_prob.max())) > _ROUNDING:
        raise ValueError("a probability is above 1")


_MOST_CLASSES = 2**24  # what is counted by class takes memory for each
_ROUNDING = 1e-3  # of a logarithm of 1


def _column(column: Any, dtype: type) -> NDArray[Any]:
    if column.null_count:
        raise ValueError("an entry is missing")
    values: NDArray[Any] = column.to_numpy().astype(dtype)
    return values


def _matrix(column: Any, dtype: type) -> NDArray[Any]:
    """A column of equally long lists as (N, k)."""
    rows = column.combine_chunks()
    values: NDArray[Any] = rows.flatten().to_numpy(zero_copy_only=False).astype(dtype)
    lengths = rows.value_lengths().to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != lengths[0]).any():
        raise ValueError("its lists are of different lengths")
    return values.reshape(len(column), -1) if len(column) else values.reshape(0, 0)
