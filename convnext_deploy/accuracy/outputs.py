"""What a multi-label or regression model said of each image, how good that is, and how sure a drop of it is.

A multi-label model is judged by its mean average precision (mAP), a regression by R2; both are functions of all images
together. How much each image moves them is their derivative by the image's weight, and the sum of squares of these is
the variance that other images would bring (the infinitesimal jackknife, Efron 1982). Two models that saw the same
images have one such derivative an image of their difference, so that what both find hard does not count.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..records.base import Problem
from . import statistics

Values = NDArray[np.float64]
METRICS: dict[Problem, str] = {"multi-label": "mAP", "regression": "R2"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model put out for each readable image of a source, in the source's order."""

    names: tuple[str, ...]
    targets: NDArray[np.float32]  # (N, K): 0 and 1 of the labels, or the values of a regression
    outputs: NDArray[np.float32]  # (N, K): logits, or values


@dataclass(frozen=True, slots=True)
class Scored:
    """`score` is the mean over the outputs that have one."""

    score: float
    per_output: tuple[float | None, ...]
    moves: Values  # (N,): its derivative by each image's weight
    shares: Values  # (N,), sum 1: how much of what can be lost each image holds


def scored(found: Outputs, problem: Problem) -> Scored:
    """mAP of a multi-label model, R2 of a regression.

    Raises:
        DataError: no image has a label, or all have the same value.
    """
    one = _average_precision if problem == "multi-label" else _r_squared
    targets, outputs = found.targets.astype(np.float64), found.outputs.astype(np.float64)
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


def _r_squared(wanted: Values, given: Values) -> tuple[float, Values, Values] | None:
    centred = (wanted - wanted.mean()) ** 2
    total = centred.sum()
    if not total:
        return None
    errors = (wanted - given) ** 2
    lost = errors.sum() / total
    return float(1 - lost), -(errors - lost * centred) / total, centred / total


@dataclass(frozen=True, slots=True)
class Drop:
    """By how much a candidate's score lies below the baseline's, with one-sided bounds."""

    value: float
    lower: float
    upper: float
    standard_error: float


def drop_between(baseline: Scored, candidate: Scored, alpha: float) -> Drop:
    """The drop of two models that saw the same images.

    Bounds are normal ones, widened by what chance can hide where nothing has changed: of a change that costs an image
    all that it holds, a share of 1 - alpha^(1/N) is seen on none of N images with probability alpha. N is Kish's
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


def _chance(found: Outputs, problem: Problem) -> float:
    """What answers that have nothing to do with the images score: the labels' mean share, or 0."""
    shares = found.targets.mean(axis=0)
    return float(shares[shares > 0].mean()) if problem == "multi-label" else 0.0


def is_above_chance(found: Outputs, scored: Scored, problem: Problem) -> bool:
    """Whether a score is clearly better than chance's."""
    error = float(np.sqrt(np.sum((scored.moves - scored.moves.mean()) ** 2)))
    far = NormalDist().inv_cdf(1 - statistics.CHANCE_ALPHA) * error
    return scored.score - _chance(found, problem) > far


def chance_words(found: Outputs, scored: Scored, problem: Problem) -> str:
    return (
        f"{METRICS[problem]} {scored.score:.2%} is not clearly above what answers without the images would give "
        f"({_chance(found, problem):.2%}): are the outputs numbered as the model's are (--labels), and is this its "
        "preprocessing?"
    )
