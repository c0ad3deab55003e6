"""Whether an artifact's detections are its reference's. Needs no framework.

An artifact puts out detections only. Its reference's candidates are known: of every anchor or proposal the scores and
the boxes. So each detection is looked for among them, and each that only one of the two has needs a decision that
rounding can turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.manifest import Detection, ModelSpec, Parity
from . import proposals
from .detections import (
    Candidates,
    Places,
    Room,
    Values,
    chosen,
    logits_of,
    of_all_anchors,
    overlap_range,
    room_of,
    score_range,
)

LEAST_ALIKE = 0.5  # of the expected detections, however many others rounding explains


@dataclass(frozen=True, slots=True)
class _Image:
    """What was found on one image. `owners`: of each candidate that was found, which detection it is."""

    owners: dict[int, int]
    strange: int  # detections that are no candidate's
    worst: float  # relative error of what is one


def _looked_up(boxes: Values, scores: Values, labels: Places, candidates: Candidates, room: Room) -> _Image:
    """Each detection as the candidate that it is, no candidate twice."""
    classes = candidates.scores.shape[1]
    fits: list[list[int]] = []  # of each detection, the candidates that it may be, the nearest first
    for box, score, label in zip(boxes, scores, labels.tolist(), strict=True):
        near = np.array([], np.int64)
        if 0 <= label < classes:
            near = np.flatnonzero((room.least[:, label] <= score) & (score <= room.most[:, label]))
        away = np.abs(candidates.boxes[near, label] - box).max(axis=1) / room.boxes[near, label]
        order = near[np.argsort(away, kind="stable")][: int((away <= 1).sum())]
        fits.append((order * classes + label).tolist())
    owners = _matched(fits)
    worst = 0.0
    for pair, index in owners.items():
        anchor, label = divmod(pair, classes)
        own = candidates.boxes[anchor, label]
        side = max(float(candidates.units[anchor]), float((own[2:] - own[:2]).max()))
        away_by = float(np.abs(own - boxes[index]).max())
        worst = max(worst, away_by / side, abs(float(candidates.scores[anchor, label] - scores[index])))
    return _Image(owners, len(boxes) - len(owners), worst)


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
    places: Places, expected: Places, lowest: Values, candidates: Candidates, facts: Detection, room: Room
) -> tuple[int, int]:
    """Detections that only one side has: (those that rounding explains, the others).

    Rounding moves a score over a threshold or past another, and an overlap over its limit. What it lets in or keeps out
    decides about others in turn: those that it overlaps, and the last of as many as an image may have.
    """
    classes = candidates.scores.shape[1]
    scores = candidates.scores.reshape(-1)
    odd = np.setxor1d(places, expected)
    if not len(odd):
        return 0, 0
    starts = np.cumsum(candidates.counts)
    all_pairs = np.union1d(places, expected)
    extra = set(np.setdiff1d(places, expected).tolist())
    explained: set[int] = set()
    followed: set[int] = set()
    changed = True
    while changed and len(explained) < len(odd):
        changed = False
        for pair in odd.tolist():
            if pair in explained:
                continue
            anchor, number = divmod(pair, classes)
            score = scores[pair]
            (low, high), (low_of_two, high_of_two) = (
                score_range(logits_of(score), times * room.logits) for times in (1, 2)
            )
            level = int(np.searchsorted(starts, anchor, side="right"))
            is_extra = pair in extra
            other = expected if is_extra else places
            last = float(scores[other].min()) if len(other) >= facts.most_detections else -1.0
            follows = False
            if (
                candidates.uncertain[anchor, number]
                or low <= facts.score_threshold <= high
                or (lowest[level] > 0 and low_of_two <= lowest[level] <= high_of_two)
                or low_of_two <= last <= high_of_two
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
    pair: int, rivals: Places, explained: set[int], candidates: Candidates, facts: Detection, room: Room
) -> bool:
    """Whether a box may or may not be suppressed by one of its class, as far as rounding goes."""
    low, high = room.least.reshape(-1), room.most.reshape(-1)
    rivals = rivals[(rivals != pair) & (high[rivals] >= low[pair])]
    boxes, away = candidates.boxes.reshape(-1, 4), room.boxes.reshape(-1)
    least, most = overlap_range(boxes[pair], float(away[pair]), boxes[rivals], away[rivals])
    beside = most > facts.nms_threshold
    at_limit = beside & (least <= facts.nms_threshold)
    may_swap = (low[rivals] <= high[pair]) & (low[pair] <= high[rivals])
    came_or_went = np.array([one in explained for one in rivals.tolist()], bool)
    return bool((beside & (at_limit | may_swap | came_or_went)).any())


def compare(
    outputs: Sequence[NDArray[np.generic]],
    expected: Sequence[NDArray[np.float32]],
    model: ModelSpec,
    image_size: tuple[int, int],
    error: float,
    images: str,
    reference: str = "source",
) -> Parity:
    """An artifact's detections beside the candidates of its reference.

    Args:
        outputs: boxes (N, D, 4), scores (N, D), classes (N, D), and masks (N, D, M, M) where the model has them.
        expected: scores (N, A, K) and boxes (N, A, 4) of every anchor; of two stages what `TwoStageDetector` returns.
        error: relative error that is tolerated of the candidates.
    """
    facts = model.detection
    assert facts is not None
    failures, worst, near_ties, agreeing, unequal, asked = [], 0.0, 0, 0, 0, 0
    wrong = [output for output in outputs if not np.isfinite(output.astype(np.float64)).all()]
    shapes = [output.shape for output in outputs]
    size, side = (len(expected[0]), facts.most_detections), facts.mask_side
    if shapes != [(*size, 4), size, size, *([(*size, side, side)] if side else [])] or wrong:
        problem = "values that are not finite" if wrong else f"outputs of shapes {shapes}, expected {size} detections"
        return _parity(images, reference, len(expected[0]), None, None, 0, (problem,))
    for index in range(len(expected[0])):
        candidates = candidates_of(expected, index, model, image_size, error)
        room = room_of(candidates, error, image_size)
        boxes, scores, labels = (output[index].astype(np.float64) for output in outputs[:3])
        is_one = labels >= 0
        filled = np.any(
            [output[index].reshape(len(is_one), -1).any(1) for output in (*outputs[:2], *outputs[3:])], axis=0
        )
        one = _looked_up(boxes[is_one], scores[is_one], labels[is_one].astype(np.int64), candidates, room)
        choice, lowest = chosen(candidates, facts)
        pairs = np.array(list(one.owners), np.int64)
        near, others = _near_ties(pairs, choice, lowest, candidates, facts, room)
        worst, near_ties = max(worst, one.worst), near_ties + near
        agreeing, asked = agreeing + len(np.intersect1d(pairs, choice)), asked + len(choice)
        unequal += others + one.strange
        if one.strange or (filled & ~is_one).any():
            count = one.strange + int((filled & ~is_one).sum())
            failures.append(
                f"{count} of {int(is_one.sum())} detections on sample {index} are no candidates' of the reference"
            )
        if others:
            failures.append(
                f"{others} detections on sample {index} are on one side only, and no rounding explains it: "
                f"{int(is_one.sum())} found, {len(choice)} expected"
            )
        if side:
            own = {pair: outputs[3][index][is_one][place] for pair, place in one.owners.items()}
            masks = proposals.masks_beside(own, expected, index, model, room.boxes, error)
            worst, near_ties = max(worst, masks.worst), near_ties + masks.near_ties
            if masks.wrong:
                failures.append(f"{masks.wrong} of {len(own)} masks on sample {index} are not those of the reference")
            elif masks.alike < LEAST_ALIKE * masks.compared:
                failures.append(
                    f"{masks.alike} of {masks.compared} masks on sample {index} have half of their pixels in common "
                    "with the reference's; the rest may be rounding, which is too many to tell"
                )
    if agreeing < LEAST_ALIKE * asked and not failures:
        failures.append(
            f"{agreeing} of {asked} expected detections were found; the rest may be rounding, which is too many to tell"
        )
    agreement = agreeing / (agreeing + unequal) if agreeing + unequal else 1.0
    return _parity(images, reference, len(expected[0]), worst, agreement, near_ties, tuple(failures))


def candidates_of(
    expected: Sequence[NDArray[np.float32]], index: int, model: ModelSpec, image_size: tuple[int, int], error: float
) -> Candidates:
    """One image's candidates, as a reference returns them."""
    assert model.detection is not None
    if model.detection.regions is not None:
        return proposals.candidates_of(expected, index, model, image_size, error)
    return of_all_anchors(expected, index, model, image_size)


def detections_in(expected: Sequence[NDArray[np.float32]], model: ModelSpec, image_size: tuple[int, int]) -> int:
    """How many detections there are among the candidates of all images."""
    facts = model.detection
    assert facts is not None
    images = (candidates_of(expected, index, model, image_size, 0.0) for index in range(len(expected[0])))
    return sum(len(chosen(candidates, facts)[0]) for candidates in images)


def highest_score(
    expected: Sequence[NDArray[np.float32]], model: ModelSpec, image_size: tuple[int, int]
) -> float | None:
    """The highest score of any class but the background, of all images; None where the first stage proposes nothing."""
    images = (candidates_of(expected, index, model, image_size, 0.0) for index in range(len(expected[0])))
    return max((float(one.scores[one.present].max()) for one in images if one.present.any()), default=None)


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
