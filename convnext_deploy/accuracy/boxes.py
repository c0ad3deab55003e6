"""A detector's answers beside the objects of the images, judged by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..artifact import instance_masks
from ..data.image_source import Boxes
from ..data.preprocess import fitted_sides
from ..env import needs
from ..errors import CheckFailed, DataError

Values = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class InstanceMasks:
    """Of each predicted and each true object its mask, as pycocotools encodes it, in the order of the rows."""

    predicted: tuple[bytes, ...]
    truth: tuple[bytes, ...]
    sides: Counts  # (N, 2), height and width of each image


@dataclass(frozen=True, slots=True)
class Detections:
    """Of each readable image of a source, in the source's order, what a detector put out and what there is."""

    names: tuple[str, ...]
    predicted: NDArray[np.float32]  # (M, 6): left, top, right and bottom in the image's pixels, score, class
    predicted_counts: Counts  # (N,)
    truth: Values  # (G, 7), as in `Boxes`
    truth_counts: Counts  # (N,)
    masks: InstanceMasks | None = None  # where the model outputs masks and the objects have some

    @property
    def targets(self) -> Values:
        return self.truth


def detected(
    names: tuple[str, ...],
    indices: Sequence[int],
    outputs: Sequence[NDArray[np.generic]],
    sides: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    truth: Boxes,
) -> Detections:
    """One batch's detections in the pixels of the images as they are in their files.

    Args:
        outputs: boxes (N, D, 4), scores (N, D), classes (N, D), and masks (N, D, M, M) where an artifact outputs them.
        sides: (height, width) of each image.
        image_size: of what the artifact was given.

    Raises:
        CheckFailed: outputs that are not finite.
    """
    boxes, scores, classes = outputs[:3]
    predicted, masks = [], []
    for name, index, size in zip(names, range(len(names)), sides, strict=True):
        if not all(np.isfinite(output[index].astype(np.float32, copy=False)).all() for output in outputs):
            raise CheckFailed(f"the model's outputs for {name} have NaN or infinite values")
        own = placed(boxes[index], scores[index], classes[index], size, image_size)
        predicted.append(own)
        if truth.masks is not None and len(outputs) > 3:
            masks += encoded(outputs[3][index][classes[index] >= 0], own[:, :4], size)
    objects = [truth.objects[index] for index in indices]
    instance = None
    if truth.masks is not None and len(outputs) > 3:
        asked = tuple(mask for index in indices for mask in truth.masks[index])
        instance = InstanceMasks(tuple(masks), asked, np.array(sides, np.int64).reshape(-1, 2))
    return Detections(
        names,
        np.concatenate(predicted) if predicted else np.empty((0, 6), np.float32),
        np.array([len(one) for one in predicted], np.int64),
        np.concatenate(objects) if objects else np.empty((0, 7)),
        np.array([len(one) for one in objects], np.int64),
        instance,
    )


def encoded(masks: NDArray[np.generic], boxes: NDArray[np.float32], sides: tuple[int, int]) -> list[bytes]:
    """Masks (D, M, M) of boxes (D, 4) in an image's pixels as pycocotools encodes them; a half or more is inside."""
    with needs("pycocotools"):
        from pycocotools import mask as coder

    codes = []
    for index in range(len(boxes)):
        (whole,) = instance_masks.pasted(masks[index : index + 1].astype(np.float32), boxes[index : index + 1], sides)
        codes.append(bytes(coder.encode(np.asfortranarray(whole > instance_masks.INSIDE))["counts"]))
    return codes


def placed(
    boxes: NDArray[Any],
    scores: NDArray[Any],
    classes: NDArray[Any],
    sides: tuple[int, int],
    image_size: tuple[int, int],
) -> NDArray[np.float32]:
    """One image's detections (D, 6) in its own pixels, cut off at its sides; what is filled up is left out."""
    is_one = classes >= 0
    resized = fitted_sides(sides, image_size)
    scale = np.array([sides[1] / resized[1], sides[0] / resized[0]] * 2)
    most = np.array([sides[1], sides[0]] * 2, np.float64)
    own = np.clip(boxes[is_one].astype(np.float64) * scale, 0, most)
    table = np.column_stack([own, scores[is_one].astype(np.float64), classes[is_one].astype(np.float64)])
    return table.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Judged:
    """`average_precision` is COCO's, the mean over overlaps from 0.50 to 0.95 and over classes."""

    average_precision: float
    at_50: float  # at an overlap of 0.50
    per_class: tuple[float | None, ...]  # None of a class that no image has
    moves: Values  # (N,): its derivative by each image's weight
    shares: Values  # (N,), sum 1: how much of what can be lost each image accounts for


def judged(detections: Detections, by: Literal["bbox", "segm"] = "bbox") -> Judged:
    """COCO's average precision of boxes or of masks, by pycocotools.

    Raises:
        DataError: no image has an object.
    """
    if not len(detections.truth) or detections.truth[:, 6].all():
        raise DataError("not one image has an object, so that there is nothing to be right or wrong about")
    judge = _evaluated(detections, by)
    precision = judge.eval["precision"][:, :, :, 0, -1]  # (overlaps, recalls, classes), -1 where no image has the class
    numbers = judge.params.catIds
    by_class: list[float | None] = [None] * (int(numbers[-1]) + 1)
    moves, shares, known = np.zeros(len(detections.names)), np.zeros(len(detections.names)), 0
    for place, number in enumerate(numbers):
        own = precision[:, :, place]
        if (own < 0).all():
            continue
        by_class[int(number)] = float(own.mean())
        one, share = _moves(judge, place, len(detections.names))
        moves, shares, known = moves + one, shares + share, known + 1
    return Judged(float(judge.stats[0]), float(judge.stats[1]), tuple(by_class), moves / known, shares / known)


def _evaluated(detections: Detections, by: Literal["bbox", "segm"]) -> Any:
    """pycocotools' evaluation, accumulated and summarized."""
    with needs("pycocotools"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    images: list[dict[str, int]] = [{"id": number + 1} for number in range(len(detections.names))]
    masks = detections.masks if by == "segm" else None
    if masks is not None:
        images = [one | {"height": h, "width": w} for one, (h, w) in zip(images, masks.sides.tolist(), strict=True)]
    classes = [{"id": int(number)} for number in np.unique(detections.truth[:, 4])]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        sides = []
        for rows, counts, scored, own in (
            (detections.truth, detections.truth_counts, False, None if masks is None else masks.truth),
            (
                detections.predicted.astype(np.float64),
                detections.predicted_counts,
                True,
                None if masks is None else masks.predicted,
            ),
        ):
            coco = COCO()
            listed = _listed(rows, counts, scored)
            for one, mask in zip(listed, own or (), strict=masks is not None):
                one["segmentation"] = {"size": [images[one["image_id"] - 1][side] for side in ("height", "width")],
                                       "counts": mask}  # fmt: skip
            coco.dataset = {"images": images, "categories": classes, "annotations": listed}
            coco.createIndex()
            sides.append(coco)
        judge = COCOeval(*sides, by)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def _listed(rows: Values, counts: Counts, scored: bool) -> list[dict[str, Any]]:
    """The objects or detections as pycocotools takes them; ids count from 1, because 0 means none there."""
    images = np.repeat(np.arange(len(counts)) + 1, counts).tolist()
    listed = []
    for id, (image, row) in enumerate(zip(images, rows.tolist(), strict=True), 1):
        left, top, right, bottom = row[:4]
        one: dict[str, Any] = {"id": id, "image_id": image, "bbox": [left, top, right - left, bottom - top]}
        if scored:
            one |= {"score": row[4], "category_id": int(row[5]), "iscrowd": 0}
            one["area"] = (right - left) * (bottom - top)
        else:
            one |= {"category_id": int(row[4]), "area": row[5], "iscrowd": int(row[6])}
        listed.append(one)
    return listed


def _moves(judge: Any, place: int, images: int) -> tuple[Values, Values]:
    """Of one class: the derivative of its average precision by each image's weight, and each image's share.

    The mean of the precisions at all recalls is taken, where COCO takes that at 101 of them.
    """
    areas = len(judge.params.areaRng)
    matches = judge.evalImgs[place * areas * images : (place * areas + 1) * images]
    objects = np.array(
        [0 if one is None else int((1 - np.asarray(one["gtIgnore"])).sum()) for one in matches], np.float64
    )
    positives = objects.sum()
    own = [(index, one) for index, one in enumerate(matches) if one is not None and len(one["dtScores"])]
    overlaps = len(judge.params.iouThrs)
    if not own:
        return np.zeros(images), objects / positives
    image = np.concatenate([np.full(len(one["dtScores"]), index) for index, one in own])
    scores = np.concatenate([one["dtScores"] for _, one in own])
    matched = np.concatenate([np.asarray(one["dtMatches"]) != 0 for _, one in own], axis=1)
    ignored = np.concatenate([np.asarray(one["dtIgnore"]) != 0 for _, one in own], axis=1)
    order = np.argsort(-scores, kind="mergesort")
    moves = np.zeros(images)
    for hits, counts in zip((matched & ~ignored)[:, order], ~ignored[:, order], strict=True):
        kept = np.flatnonzero(counts)
        if len(kept):
            moves += _slopes(hits[kept].astype(np.float64), image[order][kept], objects, positives)
    return moves / overlaps, objects / positives


def _slopes(hits: Values, image: Counts, objects: Values, positives: float) -> Values:
    """At one overlap, of detections in the order of their scores.

    The precision at a hit is the largest at any place from there on; `best` is that place.
    """
    ranks = np.arange(1, len(hits) + 1)
    precision = np.cumsum(hits) / ranks
    best = _last_argmax(precision)
    height = precision[best]
    area = float((hits * height).sum() / positives)
    # A detection stands in the counts of every hit whose best place is not before it.
    per_true, per_any = np.zeros(len(hits)), np.zeros(len(hits))
    np.add.at(per_true, best, hits / ranks[best])
    np.add.at(per_any, best, hits * height / ranks[best])
    more_true, more_any = (np.cumsum(values[::-1])[::-1] for values in (per_true, per_any))
    each = hits * height + hits * more_true - more_any
    moves: Values = (np.bincount(image, each, minlength=len(objects)) - objects * area) / positives
    return moves


def _last_argmax(values: Values) -> Counts:
    """(N,): of each place, where the largest value from there on is."""
    best = np.arange(len(values))
    for place in range(len(values) - 2, -1, -1):
        if values[best[place + 1]] >= values[place]:
            best[place] = best[place + 1]
    return best
