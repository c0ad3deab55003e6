"""A detector's candidates, which of them are its detections, and how far rounding moves them. Needs no framework."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.base import STRIDE
from ..records.manifest import Detection, ModelSpec

Values = NDArray[np.float64]
Places = NDArray[np.int64]
Flags = NDArray[np.bool_]

# A candidate's logit and box may differ by so many times the relative error that is tolerated of all together: errors
# are not spread evenly, and of a hundred thousand values the largest is five or six times as far away as usual.
UNEVEN = 8.0
ROUNDING = 2.0**-21  # of a coordinate, beside the side of the image: a few roundings of float32
SHARPEST = 30.0  # logits beyond it are scores of 0 and 1 in float32


def padded_sides(sides: tuple[int, int]) -> tuple[int, int]:
    """(height, width) as multiples of 32."""
    height, width = sides
    return (height + STRIDE - 1) // STRIDE * STRIDE, (width + STRIDE - 1) // STRIDE * STRIDE


def level_sides(first: Sequence[tuple[int, int]], facts: Detection) -> list[tuple[int, int]]:
    """(height, width) of the pyramid's maps: those of the backbone's, then those with half the sides, rounded up."""
    sides = list(first)
    for _ in range(1 if facts.extra == "pool" else 2):
        height, width = sides[-1]
        sides.append(((height + 1) // 2, (width + 1) // 2))
    return sides


def pyramid_sides(model: ModelSpec, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of the pyramid's maps for images of a size."""
    assert model.detection is not None
    maps = model.map_sizes(padded_sides(image_size))
    return level_sides([maps[level - 1] for level in model.levels], model.detection)


def anchor_counts(model: ModelSpec, image_size: tuple[int, int]) -> list[int]:
    """How many anchors each level has for images of a size."""
    assert model.detection is not None
    sides = pyramid_sides(model, image_size)
    return [height * width * count for (height, width), count in zip(sides, model.detection.anchors, strict=True)]


@dataclass(frozen=True, slots=True)
class Candidates:
    """One image's, of which the detections are chosen.

    Args:
        scores: (A, K); 0 of what can be no detection.
        boxes: (A, K, 4) in pixels.
        counts: how many each level has.
        most: of each level, before boxes suppress each other.
        units: (A,), pixels: a box's error is one of these.
        present: (A,) whether the reference has it: of a detector of two stages, what was proposed.
        uncertain: (A, K) whether rounding may let a pair in or keep it out before any is chosen.
    """

    scores: Values
    boxes: Values
    counts: Sequence[int]
    most: int
    units: Values
    present: Flags
    uncertain: Flags


def of_all_anchors(
    expected: Sequence[NDArray[np.float32]], index: int, model: ModelSpec, image_size: tuple[int, int]
) -> Candidates:
    """One image's of a detector of one stage: every anchor, with one box for all classes.

    Args:
        expected: scores (N, A, K) and boxes (N, A, 4) of every anchor.
    """
    facts = model.detection
    assert facts is not None
    counts = anchor_counts(model, image_size)
    scores, boxes = (output[index].astype(np.float64) for output in expected)
    return Candidates(
        scores=scores,
        boxes=np.broadcast_to(boxes[:, None], (*scores.shape, 4)),
        counts=counts,
        most=facts.most_candidates,
        units=np.repeat([max(sizes) for sizes in facts.anchor_sizes], counts),
        present=np.ones(len(scores), bool),
        uncertain=np.zeros(scores.shape, bool),
    )


def chosen(candidates: Candidates, facts: Detection) -> tuple[Places, Values]:
    """The detections as torchvision chooses them, in the order of their scores.

    Returns:
        anchor times classes plus class of each (D,), and of each level the lowest score that is still a candidate.
    """
    scores, classes = candidates.scores, candidates.scores.shape[1]
    parts, lowest, start = [], [], 0
    for count in candidates.counts:
        own = slice(start, start + count)
        flat = np.where(candidates.present[own, None], scores[own], 0).reshape(-1)
        above = np.flatnonzero(flat > facts.score_threshold)
        order = above[np.argsort(-flat[above], kind="stable")][: candidates.most]
        lowest.append(float(flat[order[-1]]) if len(order) == candidates.most else 0.0)
        parts.append(order + start * classes)
        start += count
    pairs = np.concatenate(parts)
    boxes = candidates.boxes.reshape(-1, 4)
    kept = []
    for number in np.unique(pairs % classes):
        own_class = pairs[pairs % classes == number]
        own_class = own_class[np.argsort(-scores.reshape(-1)[own_class], kind="stable")]
        kept.append(own_class[unsuppressed(boxes[own_class], facts.nms_threshold)])
    survivors = np.concatenate(kept) if kept else pairs[:0]
    order = np.argsort(-scores.reshape(-1)[survivors], kind="stable")
    return survivors[order][: facts.most_detections], np.array(lowest)


def unsuppressed(boxes: Values, overlap: float) -> Flags:
    """Of boxes (M, 4), the one with the highest score first."""
    alive = np.ones(len(boxes), bool)
    for index in range(len(boxes)):
        if alive[index]:
            alive[index + 1 :] &= overlaps(boxes[index], boxes[index + 1 :]) <= overlap
    return alive


def overlaps(box: Values, others: Values) -> Values:
    """Intersection over union of one box (4,) with others (M, 4); 0 where neither has an area."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    inside = np.clip(sides, 0, None).prod(axis=1)
    whole = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - inside
    return np.divide(inside, whole, out=np.zeros_like(whole), where=whole > 0)


def overlap_range(box: Values, away: float, others: Values, aways: Values) -> tuple[Values, Values]:
    """The least and the largest overlap that one box (4,) may have with others (M, 4), each side so many pixels off."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    by = (away + aways)[:, None]
    inside = [np.clip(sides + one, 0, None).prod(axis=1) for one in (-by, by)]
    own, theirs = box[2:] - box[:2], others[:, 2:] - others[:, :2]
    areas = [
        np.clip(own + 2 * sign * away, 0, None).prod()
        + np.clip(theirs + 2 * sign * aways[:, None], 0, None).prod(axis=1)
        for sign in (1, -1)
    ]
    bounds = []
    for shared, area in zip(inside, areas, strict=True):
        whole = area - shared
        bounds.append(np.where(shared <= 0, 0.0, np.where(whole <= shared, 1.0, shared / np.maximum(whole, 1e-300))))
    return bounds[0], bounds[1]


@dataclass(frozen=True, slots=True)
class Room:
    """Between what each candidate's score (A, K) may be, and how far its box may be in pixels (A, K).

    Args:
        logits: how far the logit of any score may be from the reference's.
    """

    logits: float
    least: Values
    most: Values
    boxes: Values


def room_of(candidates: Candidates, error: float, image_size: tuple[int, int]) -> Room:
    """Of what the relative error of all candidates' logits and boxes is."""
    scores = candidates.scores
    spread = logit_room(logits_of(scores[scores > 0]), error) if scores.any() else 0.0
    boxes = box_room(candidates.boxes, candidates.units[:, None], error, image_size)
    least, most = score_range(logits_of(scores), spread)
    return Room(logits=spread, least=least, most=most, boxes=boxes)


def score_range(logits: Values, room: float | Values) -> tuple[Values, Values]:
    """The least and the largest score whose logit is so far from these: near 0 and 1 a wide room changes little."""
    least, most = (1 / (1 + np.exp(-np.clip(logits + by, -700, 700))) for by in (-room, room))
    return least - ROUNDING, most + ROUNDING


def logits_of(scores: Values) -> Values:
    """What the logistic function makes these scores of, as far as float32 keeps it."""
    limit = 1 / (1 + np.exp(SHARPEST))
    inside = np.clip(scores, limit, 1 - limit)
    logits: Values = np.log(inside) - np.log1p(-inside)
    return logits


def logit_room(logits: Values, error: float) -> float:
    """How far any of these may be from the reference's."""
    return UNEVEN * error * max(float(np.sqrt((logits**2).mean())), 1.0)


def box_room(boxes: Values, units: Values, error: float, image_size: tuple[int, int]) -> Values:
    """How far sides of boxes (..., 4) in pixels may be from the reference's, (...).

    A box's error is one of its unit, such as its anchor's side: the head outputs it in these.
    """
    largest = (boxes[..., 2:] - boxes[..., :2]).max(axis=-1)
    away: Values = UNEVEN * error * np.maximum(units, largest) + ROUNDING * max(image_size)
    return away
