"""The candidates of a detector of two stages: which regions the first proposes, as far as rounding lets one know.

The first stage keeps the best regions of each level, lets them suppress each other, and keeps the best of all. A score
or an overlap near a limit may be on either side of it in an artifact. What follows from that is followed too, so each
region is proposed for certain, certainly not, or perhaps. The reference tells the second stage's answer for all of
them, and for regions between two maps of the pyramid the answer of both maps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.manifest import ModelSpec, Regions
from .detections import (
    ROUNDING,
    UNEVEN,
    Candidates,
    Flags,
    Places,
    Values,
    anchor_counts,
    box_room,
    logit_room,
    logits_of,
    overlap_range,
    score_range,
    unsuppressed,
)
from .instance_masks import INSIDE

SMALLEST_PROPOSAL, SMALLEST_BOX = 1e-3, 1e-2  # pixels of the shorter side; torchvision leaves smaller ones out
LEAST_SHARED = 0.5  # of the places of two masks that are alike, whatever rounding explains
CANONICAL_SIDE = 224.0  # of the region whose map has the stride 16


@dataclass(frozen=True, slots=True)
class _First:
    """What the first stage says of one image's candidates (S,), in the order of the reference."""

    logits: Values
    boxes: Values  # (S, 4)
    levels: Places  # of which level of anchors each is
    room: float  # of a logit
    away: Values  # of a box, pixels


def candidates_of(
    expected: Sequence[NDArray[np.generic]], index: int, model: ModelSpec, image_size: tuple[int, int], error: float
) -> Candidates:
    """One image's candidates of the second stage.

    Args:
        expected: what `models.two_stage.TwoStageDetector` returns for candidates.
        error: relative error that is tolerated of all of them.
    """
    facts = model.detection
    assert facts is not None
    assert facts.regions is not None
    logits, regions, scores, boxes = (output[index].astype(np.float64) for output in expected[:4])
    anchors, maps = (output[index].astype(np.int64) for output in expected[-4:-2])
    counts = anchor_counts(model, image_size)
    starts = np.cumsum(counts)
    levels = np.searchsorted(starts, anchors, side="right")
    units = np.array([max(sizes) for sizes in facts.anchor_sizes])[levels]
    away = box_room(regions, units, error, image_size)
    first = _First(logits, regions, levels, logit_room(logits, error), away)
    once = _first_of_each(anchors)
    between, own_map = _between_maps(regions, away, maps, model)
    present, perhaps = np.zeros(len(anchors), bool), np.zeros(len(anchors), bool)
    for which, flags in ((present, proposed(first, facts.regions, facts.most_candidates, once)),
                         (perhaps, perhaps_proposed(first, facts.regions, facts.most_candidates, once))):  # fmt: skip
        which[:] = np.isin(anchors, anchors[flags])
    scores, small = scores.copy(), (boxes[..., 2:] - boxes[..., :2]).min(axis=-1)
    scores[:, 0] = 0  # the background
    scores[small < SMALLEST_BOX] = 0
    sides = (regions[:, 2:] - regions[:, :2]).max(axis=1)
    near_small = np.abs(small - SMALLEST_BOX) <= 2 * away[:, None]
    scores[~own_map & ~between] = 0  # nothing would cut it out of this map
    return Candidates(
        scores=scores,
        boxes=boxes,
        counts=[len(scores)],
        most=scores.size,
        # A box is off as its region is, and by its own four numbers, which count in sides of the region.
        units=sides + (away / (UNEVEN * error) if error else 0),
        present=present & once,
        uncertain=(perhaps | between)[:, None] | near_small,
    )


def _first_of_each(anchors: Places) -> Flags:
    """Which of the candidates are not there a second time, for another map."""
    once = np.zeros(len(anchors), bool)
    once[np.unique(anchors, return_index=True)[1]] = True
    return once


def proposed(first: _First, facts: Regions, most: int, once: Flags) -> Flags:
    """Which candidates the reference proposes, as torchvision chooses them."""
    kept = []
    for level in np.unique(first.levels):
        own = np.flatnonzero((first.levels == level) & once)
        own = own[np.argsort(-first.logits[own], kind="stable")][:most]
        own = own[_is_large(first.boxes[own]) & (_score(first.logits[own]) >= facts.score_threshold)]
        kept.append(own[unsuppressed(first.boxes[own], facts.nms_threshold)])
    survivors = np.concatenate(kept)
    survivors = survivors[np.argsort(-first.logits[survivors], kind="stable")][: facts.most_proposals]
    flags = np.zeros(len(first.logits), bool)
    flags[survivors] = True
    return flags


def perhaps_proposed(first: _First, facts: Regions, most: int, once: Flags) -> Flags:
    """Which candidates rounding may make a proposal, or none."""
    perhaps, certain = np.zeros(len(first.logits), bool), np.zeros(len(first.logits), bool)
    for level in np.unique(first.levels):
        own = np.flatnonzero((first.levels == level) & once)
        _decided(own[np.argsort(-first.logits[own], kind="stable")], first, facts, most, certain, perhaps)
    candidates = np.flatnonzero(certain | perhaps)
    candidates = candidates[np.argsort(-first.logits[candidates], kind="stable")]
    logits = first.logits[candidates]
    before = np.concatenate([[0], np.cumsum(certain[candidates])])
    for place, index in enumerate(candidates):
        reached = int(np.searchsorted(-logits, -(logits[place] - 2 * first.room), side="right"))
        at_least = int(np.searchsorted(-logits, -(logits[place] + 2 * first.room), side="left"))
        if before[at_least] >= facts.most_proposals:
            perhaps[index] = False  # so many others are certainly before it
        elif reached > facts.most_proposals:
            perhaps[index] = True
    return perhaps


def _decided(own: Places, first: _First, facts: Regions, most: int, certain: Flags, perhaps: Flags) -> None:
    """Of one level's candidates, the best first: those that nothing suppresses for certain, and perhaps."""
    logits, boxes = first.logits[own], first.boxes[own]
    last = logits[most - 1] if len(own) > most else -np.inf
    following = logits[most] if len(own) > most else -np.inf
    shorter = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    score, spread = _score(logits), 0.25 * first.room
    may = (logits >= last - 2 * first.room) & (shorter >= SMALLEST_PROPOSAL - 2 * first.away[own])
    may &= score >= facts.score_threshold - spread
    must = (logits > following + 2 * first.room) & (shorter >= SMALLEST_PROPOSAL + 2 * first.away[own])
    must &= score >= facts.score_threshold + (spread if facts.score_threshold else 0)
    in_for_sure, out, away = np.zeros(len(own), bool), ~may, first.away[own]
    for place in range(len(own)):
        if out[place]:
            continue
        upto = int(np.searchsorted(-logits, -(logits[place] - 2 * first.room), side="right"))
        least, most_overlap = overlap_range(boxes[place], away[place], boxes[:upto], away[:upto])
        higher = logits[:upto] > logits[place] + 2 * first.room
        rival = ~out[:upto]
        rival[place] = False
        if (in_for_sure[:upto] & higher & (least > facts.nms_threshold)).any():
            out[place] = True
        elif must[place] and not (rival & (most_overlap > facts.nms_threshold)).any():
            in_for_sure[place] = True
    certain[own[in_for_sure]] = True
    perhaps[own[~in_for_sure & ~out]] = True


def _score(logits: Values) -> Values:
    scores: Values = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
    return scores


def _is_large(boxes: Values) -> Flags:
    return (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= SMALLEST_PROPOSAL


def _between_maps(boxes: Values, away: Values, maps: Places, model: ModelSpec) -> tuple[Flags, Flags]:
    """Whether rounding may have each box cut out of another map, and whether `maps` has that of the reference."""
    low, own, high = _map_range(boxes, away, model)
    between = low != high
    # Where the two are so near that float32 and float64 may differ, the first of a pair is the reference's.
    return between, (maps == own - (model.levels[0] + 1)) | between


def _map_range(boxes: Values, away: Values, model: ModelSpec) -> tuple[Places, Places, Places]:
    """The lowest map that each box (B, 4) may be cut out of, its own and the highest, as logarithms of strides."""
    first, last = model.levels[0] + 1, model.levels[-1] + 1  # logarithms of their strides
    sides, by = boxes[:, 2:] - boxes[:, :2], 2 * away[:, None]
    areas = [np.maximum(one, 1e-12).prod(axis=1) for one in (sides - by, sides, sides + by)]
    numbers = [4 + np.log2(np.sqrt(area) / CANONICAL_SIDE) + 1e-6 for area in areas]
    low, own, high = (
        np.clip(np.floor(number + rounding), first, last).astype(np.int64)
        for number, rounding in zip(numbers, (-ROUNDING, 0.0, ROUNDING), strict=True)
    )
    return low, own, high


@dataclass(frozen=True, slots=True)
class MasksBeside:
    """How many masks of an image were compared, how many of them are wrong, and how many have most places in common.

    Args:
        near_ties: those that were not compared, since rounding may have them cut out of another map.
    """

    worst: float  # difference of a place
    compared: int
    wrong: int
    alike: int
    near_ties: int


def masks_beside(
    outputs: Mapping[int, NDArray[np.generic]],
    expected: Sequence[NDArray[np.generic]],
    index: int,
    model: ModelSpec,
    away: Values,
    error: float,
) -> MasksBeside:
    """Masks (M, M) by the candidate that each is of, beside the reference's.

    A place's logit may differ as others do. Where a box's sides differ, its places are elsewhere in the image, and
    their logits differ by what the mask changes there from one place to the next.

    Args:
        away: (A, K) how far each candidate's box may be, pixels.
    """
    masks, pairs = expected[4][index].astype(np.float64), expected[-2][index].astype(np.int64)
    boxes = expected[3][index].astype(np.float64).reshape(-1, 4)
    logits = logits_of(masks)
    spread = logit_room(logits[pairs >= 0], error) if (pairs >= 0).any() else 0.0
    worst, compared, wrong, alike, near_ties = 0.0, 0, 0, 0, 0
    lowest, _, highest = _map_range(boxes[pairs], away.reshape(-1)[pairs], model)
    for place, pair in enumerate(pairs.tolist()):
        if pair not in outputs:
            continue
        if lowest[place] != highest[place]:
            near_ties += 1
            continue
        own = logits[place]
        sides = np.maximum(boxes[pair, 2:] - boxes[pair, :2], 1e-9)
        shift = 2 * float(away.reshape(-1)[pair]) * masks.shape[1] / float(sides.min())
        room = spread + min(shift, float(masks.shape[1])) * _steps(own)
        least, most = score_range(own, room)
        mask = outputs[pair].astype(np.float64)
        worst = max(worst, float(np.abs(mask - masks[place]).max()))
        compared += 1
        wrong += bool(((mask < least) | (mask > most)).any())
        inside, reference = mask > INSIDE, masks[place] > INSIDE
        alike += int((inside & reference).sum()) >= LEAST_SHARED * int((inside | reference).sum())
    return MasksBeside(worst, compared, wrong, alike, near_ties)


def _steps(values: Values) -> Values:
    """The largest difference of each place (M, M) to a neighbour."""
    padded = np.pad(values, 1, mode="edge")
    middle = padded[1:-1, 1:-1]
    beside = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    steps: Values = np.max([np.abs(middle - other) for other in beside], axis=0)
    return steps
