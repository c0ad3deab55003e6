"""Which of a detector's candidates are its detections, and whether an artifact chose the same. Needs no framework.

An artifact puts out detections only. Its reference's candidates are known: of every anchor the scores and the box. So
each detection is looked for among them, and each that only one of the two has needs a decision that rounding can turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.base import STRIDE
from ..records.manifest import Detection, ModelSpec, Parity

Values = NDArray[np.float64]
Places = NDArray[np.int64]

# A candidate's logit and box may differ by so many times the relative error that is tolerated of all together: errors
# are not spread evenly, and of a hundred thousand values the largest is five or six times as far away as usual.
UNEVEN = 8.0
ROUNDING = 2.0**-21  # of a coordinate, beside the side of the image: a few roundings of float32
SHARPEST = 30.0  # logits beyond it are scores of 0 and 1 in float32


def padded_sides(sides: tuple[int, int]) -> tuple[int, int]:
    """(height, width) as multiples of 32."""
    height, width = sides
    return height + (STRIDE - height % STRIDE) % STRIDE, width + (STRIDE - width % STRIDE) % STRIDE


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
    """One image's: `scores` (A, K), `boxes` (A, 4) in pixels, and the number of anchors of each level."""

    scores: Values
    boxes: Values
    counts: Sequence[int]


def chosen(candidates: Candidates, facts: Detection) -> tuple[Places, Values]:
    """The detections as torchvision chooses them, in the order of their scores.

    Returns:
        anchor times classes plus class of each (D,), and of each level the lowest score that is still a candidate.
    """
    scores, classes = candidates.scores, candidates.scores.shape[1]
    parts, lowest, start = [], [], 0
    for count in candidates.counts:
        flat = scores[start : start + count].reshape(-1)
        above = np.flatnonzero(flat > facts.score_threshold)
        order = above[np.argsort(-flat[above], kind="stable")][: facts.most_candidates]
        lowest.append(float(flat[order[-1]]) if len(order) == facts.most_candidates else 0.0)
        parts.append(order + start * classes)
        start += count
    pairs = np.concatenate(parts)
    kept = []
    for number in np.unique(pairs % classes):
        own = pairs[pairs % classes == number]
        own = own[np.argsort(-scores.reshape(-1)[own], kind="stable")]
        kept.append(own[_unsuppressed(candidates.boxes[own // classes], facts.nms_threshold)])
    found = np.concatenate(kept) if kept else pairs[:0]
    order = np.argsort(-scores.reshape(-1)[found], kind="stable")
    return found[order][: facts.most_detections], np.array(lowest)


def _unsuppressed(boxes: Values, overlap: float) -> NDArray[np.bool_]:
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


def detections_in(expected: tuple[NDArray[np.float32], ...], model: ModelSpec, image_size: tuple[int, int]) -> int:
    """How many detections there are among the candidates of all images."""
    assert model.detection is not None
    counts = anchor_counts(model, image_size)
    images = zip(*(output.astype(np.float64) for output in expected), strict=True)
    return sum(len(chosen(Candidates(scores, boxes, counts), model.detection)[0]) for scores, boxes in images)


@dataclass(frozen=True, slots=True)
class _Room:
    """How far each candidate's score (A, K), box (A,) in pixels, and overlap (A,) may be from the reference's."""

    scores: Values
    boxes: Values
    overlaps: Values


def _room(candidates: Candidates, facts: Detection, error: float, image_size: tuple[int, int]) -> _Room:
    """Of what the relative error of all candidates' logits and boxes is.

    A box's error is one of its anchor's sides: the head gives it in them. Overlaps move by twice what moves each side.
    """
    scores = candidates.scores
    limit = 1 / (1 + np.exp(SHARPEST))
    inside = np.clip(scores, limit, 1 - limit)
    logits = np.log(inside) - np.log1p(-inside)
    spread = UNEVEN * error * max(float(np.sqrt((logits**2).mean())), 1.0)
    anchors = np.repeat([max(sizes) for sizes in facts.anchor_sizes], candidates.counts)
    sides = candidates.boxes[:, 2:] - candidates.boxes[:, :2]
    boxes = UNEVEN * error * np.maximum(anchors, sides.max(axis=1)) + ROUNDING * max(image_size)
    least = np.maximum(sides.min(axis=1), 1e-9)
    return _Room(
        scores=spread * inside * (1 - inside) + spread**2 + ROUNDING,
        boxes=boxes,
        overlaps=np.minimum(4 * boxes / least, 1.0),
    )


@dataclass(frozen=True, slots=True)
class _Image:
    """What was found on one image. `pairs`: of each detection that is some candidate, which."""

    pairs: Places
    strange: int  # detections that are no candidate's
    worst: float  # relative error of what is one


def _looked_up(
    boxes: Values, scores: Values, labels: Places, candidates: Candidates, facts: Detection, room: _Room
) -> _Image:
    """Each detection as the candidate that it is, no candidate twice."""
    classes = candidates.scores.shape[1]
    anchors = np.repeat([max(sizes) for sizes in facts.anchor_sizes], candidates.counts)
    fits: list[list[int]] = []  # of each detection, the candidates that it may be, the nearest first
    for box, score, label in zip(boxes, scores, labels.tolist(), strict=True):
        near = np.array([], np.int64)
        if 0 <= label < classes:
            near = np.flatnonzero(np.abs(candidates.scores[:, label] - score) <= room.scores[:, label])
        away = np.abs(candidates.boxes[near] - box).max(axis=1) / room.boxes[near]
        order = near[np.argsort(away, kind="stable")][: int((away <= 1).sum())]
        fits.append((order * classes + label).tolist())
    owners = _matched(fits)
    worst = 0.0
    for pair, index in owners.items():
        anchor, label = divmod(pair, classes)
        side = max(float(anchors[anchor]), float((candidates.boxes[anchor, 2:] - candidates.boxes[anchor, :2]).max()))
        away_by = float(np.abs(candidates.boxes[anchor] - boxes[index]).max())
        worst = max(worst, away_by / side, abs(float(candidates.scores[anchor, label] - scores[index])))
    return _Image(np.array(list(owners), np.int64), len(boxes) - len(owners), worst)


def _matched(fits: list[list[int]]) -> dict[int, int]:
    """As many detections as possible, each with a candidate of its own: which detection a candidate is.

    A detection that finds all of its candidates taken moves those that took them to others of theirs (Kuhn, 1955).
    """
    owners: dict[int, int] = {}
    for index in range(len(fits)):
        reached: dict[int, int] = {}  # candidate to the detection that it was reached from
        waiting, free = [index], None
        while waiting and free is None:
            one = waiting.pop(0)
            for pair in fits[one]:
                if pair not in reached:
                    reached[pair] = one
                    if pair not in owners:
                        free = pair
                        break
                    waiting.append(owners[pair])
        while free is not None:
            one = reached[free]
            before = next((pair for pair, owner in owners.items() if owner == one), None)
            owners[free] = one
            if before is not None:
                del owners[before]
            free = before
    return owners


def _near_ties(
    found: Places, wanted: Places, lowest: Values, candidates: Candidates, facts: Detection, room: _Room
) -> tuple[int, int]:
    """Detections that only one side has: (those that rounding explains, the others).

    Rounding moves a score over a threshold or past another, and an overlap over its limit. What it lets in or keeps out
    decides about others in turn: those that it overlaps, and the last of as many as an image may have.
    """
    classes = candidates.scores.shape[1]
    scores, spread = candidates.scores.reshape(-1), room.scores.reshape(-1)
    odd = np.setxor1d(found, wanted)
    if not len(odd):
        return 0, 0
    starts = np.cumsum(candidates.counts)
    all_pairs = np.union1d(found, wanted)
    extra = set(np.setdiff1d(found, wanted).tolist())
    explained: set[int] = set()
    followed: set[int] = set()
    changed = True
    while changed and len(explained) < len(odd):
        changed = False
        for pair in odd.tolist():
            if pair in explained:
                continue
            anchor, number = divmod(pair, classes)
            score, room_of = scores[pair], spread[pair]
            level = int(np.searchsorted(starts, anchor, side="right"))
            is_extra = pair in extra
            other = wanted if is_extra else found
            last = float(scores[other].min()) if len(other) >= facts.most_detections else -1.0
            follows = False
            if (
                abs(score - facts.score_threshold) <= room_of
                or (lowest[level] > 0 and abs(score - lowest[level]) <= 2 * room_of)
                or abs(score - last) <= 2 * room_of
                or _turned(pair, all_pairs[all_pairs % classes == number], explained, candidates, facts, room)
                or (follows := score < last and _has_place(is_extra, explained, followed, extra))
            ):
                explained.add(pair)
                followed |= {pair} if follows else set()
                changed = True
    return len(explained), len(odd) - len(explained)


def _has_place(is_extra: bool, explained: set[int], followed: set[int], extra: set[int]) -> bool:
    """Whether a detection with a score below all others is there, or is not, because others are not there, or are.

    An image may have so many: each that rounding takes away makes place for one, and each that it adds takes one.
    """
    causes = sum((one in extra) != is_extra and one not in followed for one in explained)
    return causes > sum((one in extra) == is_extra for one in followed)


def _turned(
    pair: int, rivals: Places, explained: set[int], candidates: Candidates, facts: Detection, room: _Room
) -> bool:
    """Whether a box may or may not be suppressed by one of its class, as far as rounding goes."""
    classes = candidates.scores.shape[1]
    scores, spread = candidates.scores.reshape(-1), room.scores.reshape(-1)
    rivals = rivals[(rivals != pair) & (scores[rivals] >= scores[pair] - spread[pair] - spread[rivals])]
    own = pair // classes
    overlap = overlaps(candidates.boxes[own], candidates.boxes[rivals // classes])
    reach = room.overlaps[own] + room.overlaps[rivals // classes]
    beside = overlap > facts.nms_threshold - reach
    at_limit = np.abs(overlap - facts.nms_threshold) <= reach
    may_swap = np.abs(scores[rivals] - scores[pair]) <= spread[pair] + spread[rivals]
    came_or_went = np.array([one in explained for one in rivals.tolist()], bool)
    return bool((beside & (at_limit | may_swap | came_or_went)).any())


def compare(
    found: tuple[NDArray[np.generic], ...],
    expected: tuple[NDArray[np.float32], ...],
    model: ModelSpec,
    image_size: tuple[int, int],
    error: float,
    images: str,
    reference: str = "source",
) -> Parity:
    """An artifact's detections beside the candidates of its reference.

    Args:
        found: boxes (N, D, 4), scores (N, D), classes (N, D).
        expected: scores (N, A, K) and boxes (N, A, 4) of every anchor.
        error: relative error that is tolerated of the candidates.
    """
    facts = model.detection
    assert facts is not None
    boxes, scores, labels = found
    counts = anchor_counts(model, image_size)
    failures, worst, near_ties, agreeing, unequal = [], 0.0, 0, 0, 0
    wrong = [output for output in (boxes, scores) if not np.isfinite(output.astype(np.float64)).all()]
    shapes = [output.shape for output in found]
    size = (len(expected[0]), facts.most_detections)
    if shapes != [(*size, 4), size, size] or wrong:
        problem = "values that are not finite" if wrong else f"outputs of shapes {shapes}, expected {size} detections"
        return _parity(images, reference, len(expected[0]), None, None, 0, (problem,))
    for index in range(len(expected[0])):
        candidates = Candidates(expected[0][index].astype(np.float64), expected[1][index].astype(np.float64), counts)
        room = _room(candidates, facts, error, image_size)
        is_one = labels[index].astype(np.int64) >= 0
        filling = ~is_one & (scores[index].astype(np.float64) != 0)
        one = _looked_up(
            boxes[index][is_one].astype(np.float64),
            scores[index][is_one].astype(np.float64),
            labels[index][is_one].astype(np.int64),
            candidates,
            facts,
            room,
        )
        expected_rows, lowest = chosen(candidates, facts)
        near, others = _near_ties(one.pairs, expected_rows, lowest, candidates, facts, room)
        worst, near_ties = max(worst, one.worst), near_ties + near
        agreeing += len(np.intersect1d(one.pairs, expected_rows))
        unequal += others + one.strange
        if one.strange or filling.any():
            count = one.strange + int(filling.sum())
            failures.append(
                f"{count} of {int(is_one.sum())} detections on sample {index} are no candidates' of the reference"
            )
        if others:
            failures.append(
                f"{others} detections on sample {index} are on one side only, and no rounding explains it: "
                f"{int(is_one.sum())} found, {len(expected_rows)} expected"
            )
    agreement = agreeing / (agreeing + unequal) if agreeing + unequal else 1.0
    return _parity(images, reference, len(expected[0]), worst, agreement, near_ties, tuple(failures))


def _parity(
    images: str,
    reference: str,
    samples: int,
    error: float | None,
    agreement: float | None,
    near_ties: int,
    failures: tuple[str, ...],
) -> Parity:
    return Parity(
        images=images,
        reference=reference,  # type: ignore[arg-type]  # one of verify's
        samples=samples,
        relative_error=error,
        cosine=None,
        top1_agreement=agreement,
        near_ties=near_ties,
        failures=failures,
    )
