"""Detections beside their reference's candidates: torchvision's choice, and faults that no rounding explains."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from convnext_deploy.artifact import detections, matching
from convnext_deploy.records.manifest import Detection, ModelSpec, Parity

ERROR, SIZE = 1e-5, (64, 96)
FACTS = Detection(
    kind="retinanet",
    anchor_sizes=((16.0,), (32.0,), (64.0,), (96.0,), (128.0,)),
    aspect_ratios=((1.0,),) * 5,
    most_detections=40,
    most_candidates=60,
    score_threshold=0.3,
)
MODEL = ModelSpec(
    architecture="a", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), task="detect", num_classes=3, detection=FACTS
)
COUNTS = detections.anchor_counts(MODEL, SIZE)
Found = tuple[Any, ...]


def candidates(seed: int = 0, images: int = 2) -> tuple[Any, Any]:
    """Scores (N, A, K) and boxes (N, A, 4) of every anchor, many of which overlap."""
    generator = np.random.default_rng(seed)
    anchors = sum(COUNTS)
    scores = 1 / (1 + np.exp(-generator.normal(-1, 1.5, (images, anchors, 3))))
    corner = generator.uniform(0, 50, (images, anchors, 2))
    sides = generator.uniform(4, 40, (images, anchors, 2))
    return scores.astype(np.float32), np.concatenate([corner, corner + sides], 2).astype(np.float32)


def torchvisions(scores: Any, boxes: Any, facts: Detection = FACTS) -> Found:
    """What torchvision's RetinaNet chooses, written with its own suppression, as an artifact puts it out."""
    made: list[Any] = []
    for one, places in zip(torch.from_numpy(scores), torch.from_numpy(boxes), strict=True):
        parts = []
        for level, own in zip(one.split(COUNTS), places.split(COUNTS), strict=True):
            flat = level.flatten()
            above = torch.where(flat > facts.score_threshold)[0]
            best, order = flat[above].topk(min(len(above), facts.most_candidates))
            pairs = above[order]
            parts.append((own[pairs // 3], best, pairs % 3))
        all_boxes, values, numbers = (torch.cat(part) for part in zip(*parts, strict=True))
        kept = batched_nms(all_boxes, values, numbers, facts.nms_threshold)[: facts.most_detections]
        rest = facts.most_detections - len(kept)
        made.append(
            (
                np.pad(all_boxes[kept].numpy(), ((0, rest), (0, 0))),
                np.pad(values[kept].numpy(), (0, rest)),
                np.pad(numbers[kept].numpy().astype(np.int32), (0, rest), constant_values=-1),
            )
        )
    return tuple(np.stack(part) for part in zip(*made, strict=True))


def compared(found: Found, expected: tuple[Any, Any], error: float = ERROR) -> Parity:
    return matching.compare(found, expected, MODEL, SIZE, error, "images")


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_torchvisions(seed: int) -> None:
    expected = candidates(seed)
    record = compared(torchvisions(*expected), expected)
    assert not record.failures
    assert (record.top1_agreement, record.near_ties) == (1.0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_no_fault(seed: int) -> None:
    """Candidates that differ by what is tolerated are chosen in another order, and some of them in others' place."""
    scores, boxes = candidates(seed)
    generator = np.random.default_rng(seed + 10)
    for error in (1e-5, 1e-3):
        logits = np.log(scores / (1 - scores)) + 2 * error * generator.normal(size=scores.shape)
        moved = (1 / (1 + np.exp(-logits))).astype(np.float32)
        shifted = (boxes + 30 * error * generator.normal(size=boxes.shape)).astype(np.float32)
        assert not compared(torchvisions(moved, shifted), (scores, boxes), error).failures


def _with_labels(found: Found, change: Callable[[Any], Any]) -> Found:
    boxes, scores, labels = found
    return boxes, scores, np.where(labels >= 0, change(labels), labels).astype(np.int32)


FAULTS: dict[str, Callable[[Any, Any], Found]] = {
    "anchors that are 10 % larger": lambda s, b: torchvisions(s, (b * 1.1).astype(np.float32)),
    "a stride that is a pixel too long": lambda s, b: torchvisions(s, (b + 1).astype(np.float32)),
    "boxes with x and y exchanged": lambda s, b: torchvisions(s, b[:, :, [1, 0, 3, 2]]),
    "labels that are counted from 1": lambda s, b: _with_labels(torchvisions(s, b), lambda x: (x + 1) % 3),
    "a class that counts as background": lambda s, b: torchvisions(s * np.array([0, 1, 1], np.float32), b),
    "another threshold of overlaps": lambda s, b: torchvisions(
        s, b, Detection(**{name: getattr(FACTS, name) for name in FACTS.__struct_fields__} | {"nms_threshold": 0.6})
    ),
    "another threshold of scores": lambda s, b: torchvisions(
        s, b, Detection(**{name: getattr(FACTS, name) for name in FACTS.__struct_fields__} | {"score_threshold": 0.9})
    ),
    "suppression across classes": lambda s, b: torchvisions(s * (s == s.max(2, keepdims=True)), b),
    "no logistic function": lambda s, b: torchvisions(np.log(s / (1 - s)), b),
    "nothing at all": lambda s, b: tuple(np.full_like(x, -1 if x.ndim == 2 and x.dtype == np.int32 else 0)
                                         for x in torchvisions(s, b)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    expected = candidates()
    assert compared(FAULTS[fault](*expected), expected).failures


def test_one_detection_more_less_or_twice_is_found() -> None:
    expected = candidates()
    found = torchvisions(*expected)
    boxes, scores, labels = (output.copy() for output in found)
    labels[0, 5], scores[0, 5], boxes[0, 5] = -1, 0, 0
    (failure,) = compared((boxes, scores, labels), expected).failures
    assert "1 detections on sample 0 are on one side only" in failure
    boxes, scores, labels = (output.copy() for output in found)
    boxes[1, 6], scores[1, 6], labels[1, 6] = boxes[1, 5], scores[1, 5], labels[1, 5]
    assert (
        "1 of 40 detections on sample 1 are no candidates'" in compared((boxes, scores, labels), expected).failures[0]
    )
    boxes, scores, labels = (output.copy() for output in found)
    scores[0, 3] = np.nan
    assert "not finite" in compared((boxes, scores, labels), expected).failures[0]


def test_sides_are_those_of_the_pyramid() -> None:
    assert detections.padded_sides((64, 65)) == (64, 96)
    assert detections.pyramid_sides(MODEL, (65, 96)) == [(24, 24), (12, 12), (6, 6), (3, 3), (2, 2)]
