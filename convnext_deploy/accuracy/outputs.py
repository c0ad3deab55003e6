"""What a multi-label model, a regression or a segmenter said of each image, how good that is, how sure a drop is.

A multi-label model and a detector are judged by their mean average precision (mAP), a regression by R2, a segmenter by
its mean intersection over union (mIoU); all are functions of all images together. How much each image moves them is
their derivative by the image's weight, and the sum of squares of these is the variance that other images would bring
(the infinitesimal jackknife, Efron 1982). Two models that saw the same images have one such derivative an image of
their difference, so that what both find hard does not count.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..records.base import Goal
from . import boxes, statistics
from .boxes import Detections

Values = NDArray[np.float64]
METRICS: dict[Goal, str] = {"multi-label": "mAP", "regression": "R2", "segmentation": "mIoU", "detection": "mAP"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model put out for each readable image of a source, in the source's order."""

    names: tuple[str, ...]
    targets: NDArray[np.float32]  # (N, K): 0 and 1 of the labels, or the values of a regression
    outputs: NDArray[np.float32]  # (N, K): logits, or values


@dataclass(frozen=True, slots=True)
class Segments:
    """Pixels of each readable image of a source and each class, int64 (N, K); those that count nowhere are in none."""

    names: tuple[str, ...]
    hits: NDArray[np.int64]  # of the class in the mask and in the answer
    truth: NDArray[np.int64]  # of the class in the mask
    predicted: NDArray[np.int64]  # of the class in the answer

    @property
    def targets(self) -> NDArray[np.int64]:
        return self.truth

    @property
    def unions(self) -> NDArray[np.int64]:
        return self.truth + self.predicted - self.hits

    @property
    def per_image(self) -> Values:
        """(N,): each image's own mIoU, over the classes of its mask and answer; NaN where no pixel counts."""
        unions = self.unions
        shares = self.hits / np.maximum(unions, 1)
        present = (unions > 0).sum(axis=1)
        return np.where(present > 0, shares.sum(axis=1) / np.maximum(present, 1), np.nan)


@dataclass(frozen=True, slots=True)
class Scored:
    """`score` is the mean over the outputs that have one."""

    score: float
    per_output: tuple[float | None, ...]
    moves: Values  # (N,): its derivative by each image's weight
    shares: Values  # (N,), sum 1: how much of what can be lost each image accounts for
    at_50: float | None = None  # of a detector: the average precision at an overlap of 0.50
    of_masks: "Scored | None" = None  # of one that outputs masks, where the objects have some


def positives(answers: Outputs | Segments | Detections, problem: Goal, outputs: int) -> list[int | None]:
    """Images that have each label or class; None of a regression."""
    if problem == "regression":
        return [None] * outputs
    if isinstance(answers, Detections):
        image = np.repeat(np.arange(len(answers.names)), answers.truth_counts)
        pairs = np.unique(np.column_stack([image, answers.truth[:, 4].astype(np.int64)]), axis=0)
        counts: list[int | None] = np.bincount(pairs[:, 1], minlength=outputs).tolist()
        return counts
    held: list[int | None] = (answers.targets > 0).sum(axis=0).tolist()
    return held


def scored(answers: Outputs | Segments | Detections, problem: Goal) -> Scored:
    """mAP of a multi-label model or a detector, R2 of a regression, mIoU of a segmenter.

    Raises:
        DataError: no image has a label, all have the same value, or no pixel counts.
    """
    if isinstance(answers, Detections):
        of_masks = None if answers.masks is None else _average_precision_of(boxes.judged(answers, "segm"))
        return replace(_average_precision_of(boxes.judged(answers)), of_masks=of_masks)
    if isinstance(answers, Segments):
        return _intersections_over_unions(answers)
    one = _average_precision if problem == "multi-label" else _r_squared
    targets, outputs = answers.targets.astype(np.float64), answers.outputs.astype(np.float64)
    parts = [one(targets[:, output], outputs[:, output]) for output in range(targets.shape[1])]
    known = [part for part in parts if part is not None]
    if not known:
        what = "not one image has a label" if problem == "multi-label" else "all images have the same value"
        raise DataError(f"{what}, so that there is nothing to be right or wrong about")
    return Scored(
        score=float(np.mean([score for score, _, _ in known])),
        per_output=tuple(None if part is None else part[0] for part in parts),
        moves=np.mean([moves for _, moves, _ in known], axis=0),
        shares=np.mean([shares for _, _, shares in known], axis=0),
    )


def _average_precision_of(judged: boxes.Judged) -> Scored:
    return Scored(judged.average_precision, judged.per_class, judged.moves, judged.shares, judged.at_50)


def _average_precision(labels: Values, scores: Values) -> tuple[float, Values, Values] | None:
    """Mean of the precisions at the images that have the label, images of equal scores together, as scikit-learn's.

    Returns:
        The score, its derivative by each image's weight, and the images' shares of it; None where no image has the
        label.
    """
    positives = labels.sum()
    if not positives:
        return None
    order = np.argsort(-scores, kind="stable")
    hits, ranked = labels[order], scores[order]
    ends = np.searchsorted(-ranked, -ranked, side="right")  # (N,): images with this score or a higher one
    true = np.cumsum(hits)[ends - 1]
    precision = true / ends
    score = float((hits * precision).sum() / positives)
    # An image stands in the counts of all positives that are not ranked above it.
    begins = np.searchsorted(-ranked, -ranked, side="left")
    more_true = _sum_from(hits / ends)[begins]
    more_images = _sum_from(hits * true / ends**2)[begins]
    moves = np.empty(len(order))
    moves[order] = (hits * (precision + more_true - score) - more_images) / positives
    return score, moves, labels / positives


def _sum_from(values: Values) -> Values:
    """(N,): the sum of the values from each place on."""
    return np.cumsum(values[::-1])[::-1]


def _r_squared(truth: Values, predicted: Values) -> tuple[float, Values, Values] | None:
    centred = (truth - truth.mean()) ** 2
    total = centred.sum()
    if not total:
        return None
    errors = (truth - predicted) ** 2
    lost = errors.sum() / total
    return float(1 - lost), -(errors - lost * centred) / total, centred / total


def _intersections_over_unions(segments: Segments) -> Scored:
    """Over all pixels of all images; the mean is over the classes that a mask or an answer has."""
    hits, targets, unions = (each.astype(np.float64) for each in (segments.hits, segments.truth, segments.unions))
    whole = unions.sum(axis=0)
    known = whole > 0
    if not known.any():
        raise DataError("not one pixel of the masks counts, so that there is nothing to be right or wrong about")
    hits, targets, unions, whole = hits[:, known], targets[:, known], unions[:, known], whole[known]
    ratios = hits.sum(axis=0) / whole
    # A class that no mask has is lost by the images that give it.
    denominators = np.where(targets.sum(axis=0) > 0, targets, unions)
    per_class: list[float | None] = [None] * len(known)
    for place, ratio in zip(np.flatnonzero(known).tolist(), ratios.tolist(), strict=True):
        per_class[place] = ratio
    return Scored(
        score=float(ratios.mean()),
        per_output=tuple(per_class),
        moves=((hits - ratios * unions) / whole).mean(axis=1),
        shares=(denominators / denominators.sum(axis=0)).mean(axis=1),
    )


@dataclass(frozen=True, slots=True)
class Drop:
    """By how much a candidate's score is below the baseline's, with one-sided bounds."""

    value: float
    lower: float
    upper: float
    standard_error: float


def drop_between(baseline: Scored, candidate: Scored, alpha: float) -> Drop:
    """The drop of two models that saw the same images.

    Bounds are normal ones, widened by what chance can hide where nothing has changed: of a change that costs an image
    all that it contains, a share of 1 - alpha^(1/N) is seen on none of N images with probability alpha. N is Kish's
    effective number, because a rare label is held by few images. The two are independent, so their squares are added;
    how often a drop at the limit passes then is simulated in `tests/accuracy/test_outputs.py`.
    """
    moves = baseline.moves - candidate.moves
    standard_error = float(np.sqrt(np.sum((moves - moves.mean()) ** 2)))
    unseen = 1 - alpha ** float(np.sum(baseline.shares**2))
    reach = math.hypot(NormalDist().inv_cdf(1 - alpha) * standard_error, unseen)
    value = baseline.score - candidate.score
    return Drop(value, value - reach, value + reach, standard_error)


def images_needed(drop: Drop, images: int, limit: float) -> int | None:
    """About how many images decide with chance `statistics.POWER`; None where no number of them will."""
    gap = abs(limit - drop.value)
    z = NormalDist().inv_cdf
    reach = drop.upper - drop.value  # shrinks with the root of the images, or faster
    spread = (reach + z(statistics.POWER) * drop.standard_error) * math.sqrt(images)
    needed = (spread / gap) ** 2 if gap else math.inf
    return math.ceil(needed) if needed <= statistics.MOST_IMAGES else None


def _chance(answers: Outputs | Segments | Detections, problem: Goal) -> float:
    """What answers that have nothing to do with the images score: the labels' mean share, or 0.

    Of a segmenter: what as many pixels of each class score at any place.
    """
    if isinstance(answers, Detections):
        return 0.0
    if isinstance(answers, Segments):
        truth, predicted = (each.sum(axis=0) / max(1, each.sum()) for each in (answers.truth, answers.predicted))
        known = truth + predicted > 0
        both = (truth * predicted)[known]
        return float((both / ((truth + predicted)[known] - both)).mean()) if known.any() else 0.0
    shares = answers.targets.mean(axis=0)
    return float(shares[shares > 0].mean()) if problem == "multi-label" else 0.0


def is_above_chance(answers: Outputs | Segments | Detections, scored: Scored, problem: Goal) -> bool:
    """Whether a score is clearly better than chance's."""
    error = float(np.sqrt(np.sum((scored.moves - scored.moves.mean()) ** 2)))
    far = NormalDist().inv_cdf(1 - statistics.CHANCE_ALPHA) * error
    return scored.score - _chance(answers, problem) > far


def chance_words(answers: Outputs | Segments | Detections, scored: Scored, problem: Goal) -> str:
    numbered = "outputs numbered as the model's are (--labels)"
    if problem == "segmentation":
        numbered = "masks numbered as the model's classes are (--reduce-labels)"
    if problem == "detection":
        numbered = "categories numbered as the model's classes are (--labels)"
    return (
        f"{METRICS[problem]} {scored.score:.2%} is not clearly above what answers without the images would give "
        f"({_chance(answers, problem):.2%}): are the {numbered}, and is this its "
        "preprocessing?"
    )
