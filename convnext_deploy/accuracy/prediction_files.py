"""The .npz file that keeps what a model said about each image: its columns and its checks."""

import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..data.boxes import MOST_SIDE, lengths_of
from ..data.readers import PARQUET_ERRORS
from ..env import needs
from ..errors import DataError, plain
from .boxes import Detections, InstanceMasks
from .outputs import Outputs, Segments
from .predictions import Chunk, Predictions

SUFFIX = ".npz"
_METADATA = b"convnext-deploy"  # key in the schema of a Parquet file
_MOST_BYTES = 2**32  # of a file, decompressed; ten million images take less than half


def read_predictions(path: Path) -> Predictions:
    """Read the predictions of an evaluation, `<out>.npz`, or the `<out>.parquet` that version 0.1 wrote.

    Raises:
        DataError: the file cannot be read, or does not hold predictions of classes.
    """
    predictions = decode(path).predictions
    if not isinstance(predictions, Predictions):
        raise DataError(
            f"{path} contains outputs of a multi-label or regression model; expected predictions of classes"
        )
    return predictions


def read_outputs(path: Path) -> Outputs | Segments | Detections:
    """Likewise of a multi-label model, a regression, a segmenter or a detector."""
    predictions = decode(path).predictions
    if isinstance(predictions, Predictions):
        raise DataError(
            f"{path} contains predictions of classes; expected outputs of a multi-label or regression model"
        )
    return predictions


def encode(chunk: Chunk) -> bytes:
    """As an .npz file of numpy: an array a column, and in two of them JSON: the names, and what concerns the chunk."""
    predictions = chunk.predictions
    columns: dict[str, NDArray[Any]] = {
        "about": np.frombuffer(msgspec.json.encode((chunk.start, chunk.stop, chunk.corrupt)), np.uint8),
        "names": np.frombuffer(msgspec.json.encode(predictions.names), np.uint8),
    }
    if isinstance(predictions, Outputs):
        columns |= {"targets": predictions.targets, "outputs": predictions.outputs}
    elif isinstance(predictions, Detections):
        columns |= {"boxes_predicted": predictions.predicted, "boxes_predicted_counts": predictions.predicted_counts}
        columns |= {"boxes_truth": predictions.truth, "boxes_truth_counts": predictions.truth_counts}
        if predictions.masks is not None:
            for name, masks in (("predicted", predictions.masks.predicted), ("truth", predictions.masks.truth)):
                columns[f"masks_{name}"] = np.frombuffer(b"".join(masks), np.uint8)
                columns[f"masks_{name}_bytes"] = np.array([len(mask) for mask in masks], np.int64)
            columns["masks_sides"] = predictions.masks.sides
    elif isinstance(predictions, Segments):
        columns |= {"hits": predictions.hits, "truth": predictions.truth, "predicted": predictions.predicted}
    else:
        columns |= {
            "labels": predictions.labels,
            "top_classes": predictions.top_classes,
            "top_log_probs": predictions.top_log_probs,
            "label_log_prob": predictions.label_log_prob,
        }
    file = io.BytesIO()
    np.savez_compressed(file, **columns)  # type: ignore[arg-type]  # the stub takes a name for an option
    return file.getvalue()


def decode(path: Path) -> Chunk:
    """What `encode` wrote, or the Parquet file that it wrote up to version 0.1.

    Raises:
        DataError: the file cannot be read, or contains something else.
        MissingPackageError: a Parquet file without pyarrow.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {plain(error)}; expected predictions of eval") from None
    read = _of_parquet if path.suffix == ".parquet" else _of_npz
    try:
        chunk = read(content)
    except _DAMAGED as error:
        raise DataError(f"{path} does not contain predictions of eval: {plain(error)}") from None
    return chunk


# What numpy and zipfile raise for damaged files; where warnings are errors, those too.
_DAMAGED = (
    *PARQUET_ERRORS, msgspec.MsgspecError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
    EOFError, RuntimeError, SyntaxError, Warning,
)  # fmt: skip


def _of_npz(content: bytes) -> Chunk:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes; at most {_MOST_BYTES:,} are read")

        def column(name: str, dtype: type, dimensions: int) -> NDArray[Any]:
            with archive.open(f"{name}.npy") as file:
                return _typed(np.lib.format.read_array(file, allow_pickle=False), dtype, dimensions)

        about = column("about", np.uint8, 1).tobytes()
        start, stop, corrupt = msgspec.json.decode(about, type=tuple[int, int, tuple[str, ...]])
        names = msgspec.json.decode(column("names", np.uint8, 1).tobytes(), type=tuple[str, ...])
        if "outputs.npy" in archive.namelist():
            outputs = Outputs(names, column("targets", np.float32, 2), column("outputs", np.float32, 2))
            _check_outputs(outputs)
            return Chunk(start, stop, outputs, corrupt)
        if "boxes_predicted.npy" in archive.namelist():
            detections = Detections(
                names,
                column("boxes_predicted", np.float32, 2),
                column("boxes_predicted_counts", np.int64, 1),
                column("boxes_truth", np.float64, 2),
                column("boxes_truth_counts", np.int64, 1),
                _masks_of(column) if "masks_sides.npy" in archive.namelist() else None,
            )
            _check_detections(detections)
            return Chunk(start, stop, detections, corrupt)
        if "hits.npy" in archive.namelist():
            segments = Segments(names, *(column(name, np.int64, 2) for name in ("hits", "truth", "predicted")))
            _check_segments(segments)
            return Chunk(start, stop, segments, corrupt)
        predictions = Predictions(
            names=names,
            labels=column("labels", np.int64, 1),
            top_classes=column("top_classes", np.int32, 2),
            top_log_probs=column("top_log_probs", np.float32, 2),
            label_log_prob=column("label_log_prob", np.float32, 1),
        )
    _check_predictions(predictions)
    return Chunk(start, stop, predictions, corrupt)


def _masks_of(column: Callable[[str, type, int], NDArray[Any]]) -> InstanceMasks:
    sides = []
    for name in ("predicted", "truth"):
        content, lengths = column(f"masks_{name}", np.uint8, 1).tobytes(), column(f"masks_{name}_bytes", np.int64, 1)
        if (lengths < 0).any() or (lengths > len(content)).any() or int(lengths.sum()) != len(content):
            raise ValueError("its masks are of other lengths")
        ends = np.cumsum(lengths).tolist()
        sides.append(tuple(content[start:end] for start, end in zip([0, *ends], ends, strict=False)))
    return InstanceMasks(sides[0], sides[1], column("masks_sides", np.int64, 2))


def _typed(column: NDArray[Any], dtype: type, dimensions: int) -> NDArray[Any]:
    if column.dtype != dtype or column.ndim != dimensions:
        raise ValueError(f"a column is {column.dtype} {column.shape}; expected {np.dtype(dtype)}")
    return column


def _of_parquet(content: bytes) -> Chunk:
    with needs("pyarrow"):
        import pyarrow.parquet as pq

    table = pq.ParquetFile(io.BytesIO(content)).read()
    start, stop, corrupt = msgspec.json.decode(table.schema.metadata[_METADATA], type=tuple[int, int, tuple[str, ...]])
    predictions = Predictions(
        names=tuple(table["name"].to_pylist()),
        labels=_column(table["label"], np.int64),
        top_classes=_matrix(table["top_classes"], np.int32),
        top_log_probs=_matrix(table["top_log_probs"], np.float32),
        label_log_prob=_column(table["label_log_prob"], np.float32),
    )
    _check_predictions(predictions)
    return Chunk(start, stop, predictions, corrupt)


def _check_outputs(outputs: Outputs) -> None:
    """Raises ValueError where they are nothing that an evaluation makes."""
    if outputs.targets.shape != outputs.outputs.shape or len(outputs.targets) != len(outputs.names):
        raise ValueError("its columns are of different lengths")
    if not all(isinstance(name, str) for name in outputs.names):
        raise ValueError("an image has no name")
    if not (np.isfinite(outputs.targets).all() and np.isfinite(outputs.outputs).all()):
        raise ValueError("a value is not finite")


def _check_segments(segments: Segments) -> None:
    """Raises ValueError where they are no counts of pixels."""
    if segments.hits.shape != segments.truth.shape or segments.hits.shape != segments.predicted.shape:
        raise ValueError("its columns are of different lengths")
    if len(segments.hits) != len(segments.names) or not all(isinstance(name, str) for name in segments.names):
        raise ValueError("an image has no name")
    if (segments.hits < 0).any() or (segments.hits > np.minimum(segments.truth, segments.predicted)).any():
        raise ValueError("more pixels are right than there are")
    if segments.hits.size and max(int(segments.truth.max()), int(segments.predicted.max())) >= _MOST_PIXELS:
        raise ValueError(f"an image has {_MOST_PIXELS:,} pixels or more")


def _check_detections(detections: Detections) -> None:
    """Raises ValueError where they are no boxes of images."""
    if not all(isinstance(name, str) for name in detections.names):
        raise ValueError("an image has no name")
    for rows, counts, width, number in (
        (detections.predicted, detections.predicted_counts, 6, 5),
        (detections.truth, detections.truth_counts, 7, 4),
    ):
        if rows.shape[1] != width or len(counts) != len(detections.names) or (counts < 0).any():
            raise ValueError("its columns are of different lengths")
        if (counts > len(rows)).any() or int(counts.sum()) != len(rows):
            raise ValueError("its boxes are of other images")
        if not np.isfinite(rows).all():
            raise ValueError("a value is not finite")
        if len(rows) and not (rows[:, number].min() >= 0 and rows[:, number].max() < _MOST_CLASSES):
            raise ValueError("a class is negative or too large")
        if (rows[:, number] % 1).any():
            raise ValueError("a class is no whole number")
    if not np.isin(detections.truth[:, 6], (0, 1)).all():
        raise ValueError("an object is neither a crowd nor none")
    masks = detections.masks
    if masks is not None:
        if (len(masks.predicted), len(masks.truth)) != (len(detections.predicted), len(detections.truth)):
            raise ValueError("its masks are of other objects")
        if (
            masks.sides.shape != (len(detections.names), 2)
            or (masks.sides < 1).any()
            or (masks.sides > MOST_SIDE).any()
        ):
            raise ValueError("its masks are of no images")
        for coded, counts in ((masks.predicted, detections.predicted_counts), (masks.truth, detections.truth_counts)):
            for mask, sides in zip(coded, np.repeat(masks.sides, counts, axis=0).tolist(), strict=True):
                lengths_of(mask, sides)


def _check_predictions(predictions: Predictions) -> None:
    """Raises ValueError where they are nothing that `of_logits` makes."""
    count = len(predictions.names)
    shapes = (
        predictions.labels.shape,
        predictions.label_log_prob.shape,
        predictions.top_classes.shape[:1],
        predictions.top_log_probs.shape[:1],
    )
    if any(shape != (count,) for shape in shapes) or predictions.top_classes.shape != predictions.top_log_probs.shape:
        raise ValueError("its columns are of different lengths")
    if not all(isinstance(name, str) for name in predictions.names):
        raise ValueError("an image has no name")
    if count and (
        predictions.top_classes.shape[1] < 1 or predictions.labels.min() < 0 or predictions.top_classes.min() < 0
    ):
        raise ValueError("a class is missing or negative")
    if count and max(int(predictions.labels.max()), int(predictions.top_classes.max())) >= _MOST_CLASSES:
        raise ValueError(f"a class is {_MOST_CLASSES:,} or more")
    if not (np.isfinite(predictions.top_log_probs).all() and np.isfinite(predictions.label_log_prob).all()):
        raise ValueError("a probability is not finite")
    if count and max(float(predictions.top_log_probs.max()), float(predictions.label_log_prob.max())) > _ROUNDING:
        raise ValueError("a probability is above 1")


_MOST_CLASSES = 2**24  # what is counted by class takes memory for each
_MOST_PIXELS = 2**40  # of one image; sums over all stay in int64
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
