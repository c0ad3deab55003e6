"""What a model said about each image: of one batch, of several that are joined, and its counts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckFailed
from ..records.accuracy import ClassAccuracy
from .boxes import Detections, InstanceMasks
from .outputs import Outputs, Segments


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model said about each readable image of a source, in the source's order. k = min(5, classes)."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,)
    top_classes: NDArray[np.int32]  # (N, k), the likeliest first; of equal ones the lower class
    top_log_probs: NDArray[np.float32]  # (N, k), natural logarithm
    label_log_prob: NDArray[np.float32]  # (N,)


Kept = Predictions | Outputs | Segments | Detections


@dataclass(frozen=True, slots=True)
class Chunk:
    """The outcome of the source's images start..stop-1: of one batch, or of several that follow one another."""

    start: int
    stop: int
    predictions: Kept
    corrupt: tuple[str, ...]  # "name: reason"

    def moved(self, by: int) -> "Chunk":
        """The same, of images that are so many places further on."""
        return replace(self, start=self.start + by, stop=self.stop + by)


def of_logits(names: tuple[str, ...], labels: NDArray[np.int64], logits: NDArray[np.float32]) -> Predictions:
    """Of one batch; logits (N, classes). Log-probabilities are computed in float64."""
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise CheckFailed(f"the model's outputs for {names[int(np.argmin(finite))]} have NaN or infinite values")
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


NONE = Predictions(
    names=(),
    labels=np.empty(0, np.int64),
    top_classes=np.empty((0, 0), np.int32),
    top_log_probs=np.empty((0, 0), np.float32),
    label_log_prob=np.empty(0, np.float32),
)


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """One outcome of several that follow one another."""
    corrupt = tuple(itertools.chain.from_iterable(chunk.corrupt for chunk in chunks))
    parts = [chunk.predictions for chunk in chunks if chunk.predictions.names]
    names = tuple(itertools.chain.from_iterable(part.names for part in parts))
    outputs = [part for part in parts if isinstance(part, Outputs)]
    segments = [part for part in parts if isinstance(part, Segments)]
    boxes = [part for part in parts if isinstance(part, Detections)]
    kept: Kept
    if boxes:
        names_of = ("predicted", "predicted_counts", "truth", "truth_counts")
        rows = [np.concatenate([getattr(part, column) for part in boxes]) for column in names_of]
        kept = Detections(names, rows[0], rows[1], rows[2], rows[3], _joined_masks([part.masks for part in boxes]))
    elif segments:
        columns = ([getattr(part, column) for part in segments] for column in ("hits", "truth", "predicted"))
        kept = Segments(names, *(np.concatenate(column) for column in columns))
    elif outputs:
        kept = Outputs(
            names,
            np.concatenate([part.targets for part in outputs]),
            np.concatenate([part.outputs for part in outputs]),
        )
    else:
        answers = [part for part in parts if isinstance(part, Predictions)] or [NONE]
        kept = Predictions(
            names=names,
            labels=np.concatenate([part.labels for part in answers]),
            top_classes=np.concatenate([part.top_classes for part in answers]),
            top_log_probs=np.concatenate([part.top_log_probs for part in answers]),
            label_log_prob=np.concatenate([part.label_log_prob for part in answers]),
        )
    return Chunk(chunks[0].start, chunks[-1].stop, kept, corrupt)


def _joined_masks(parts: Sequence[InstanceMasks | None]) -> InstanceMasks | None:
    """All have masks or none has: they are of one model and one source."""
    masks = [part for part in parts if part is not None]
    if not masks:
        return None
    predicted, truth = (
        tuple(itertools.chain.from_iterable(getattr(one, side) for one in masks)) for side in ("predicted", "truth")
    )
    return InstanceMasks(predicted, truth, np.concatenate([one.sides for one in masks]))


def hits(predictions: Predictions, count: int) -> NDArray[np.bool_]:
    """(N,): the label is among the first `count` classes."""
    return (predictions.top_classes[:, :count] == predictions.labels[:, None]).any(axis=1)


def per_class(predictions: Predictions, names: tuple[str, ...] | None) -> tuple[ClassAccuracy, ...]:
    """Of every class that has images, in label order."""
    first = hits(predictions, 1)
    images, right = np.bincount(predictions.labels), np.bincount(predictions.labels, weights=first)
    return tuple(
        ClassAccuracy(
            label=label,
            name=names[label] if names and label < len(names) else str(label),
            images=int(images[label]),
            top1=float(right[label] / images[label]),
        )
        for label in np.flatnonzero(images).tolist()
    )
