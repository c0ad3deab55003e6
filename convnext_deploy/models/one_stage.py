"""RetinaNet and FCOS on a ConvNeXt's maps, as torchvision computes them, with a fixed number of detections an image.

The pyramid and the convolutions of the heads are torchvision's own modules. What it does image by image with lists of
any length is written here for a whole batch, so that it can be captured: candidates and detections are as many on every
image, and those that are none have the score 0. Papers: arXiv:1708.02002, arXiv:1904.01355, arXiv:1612.03144.
Conventions as torchvision 0.29.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from ..records.manifest import Detection, ModelSpec
from .anchors import Anchors
from .suppression import unsuppressed

GROUPS = 32  # of torchvision's group norms
LARGEST_GROWTH = math.log(1000 / 16)  # of a side of an anchor; torchvision's limit

Candidates = tuple[Tensor, Tensor]  # scores (N, A, K) and boxes (N, A, 4) of all anchors


class OneStageDetector(nn.Module):
    """Maps of `spec.levels` to every anchor's scores and box, or to the detections that are chosen of them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.detection is not None
        self.spec = spec
        facts = self.facts = spec.detection
        self.pyramid = pyramid(spec)
        self.head = _head(facts, spec.num_classes)
        self.anchors = Anchors(spec)

    def forward(
        self, maps: Sequence[Tensor], sides: tuple[int, int], padded: tuple[int, int], places: None = None
    ) -> Candidates:
        """Every anchor's scores (N, A, K), after the logistic function, and its box (N, A, 4) in pixels.

        Args:
            sides: (height, width) of the images; boxes end there.
            padded: of what the maps were computed from, multiples of 32.
            places: all anchors are followed.
        """
        dtype = next(self.parameters()).dtype
        named = {str(index): x.to(dtype) for index, x in enumerate(maps)}
        levels = list(self.pyramid(named).values())
        wide = torch.promote_types(dtype, torch.float32)
        outputs = {name: output.to(wide) for name, output in self.head(levels).items()}
        anchors = self.anchors.of(levels, padded, wide)
        scores = torch.sigmoid(outputs["cls_logits"])
        if self.facts.kind == "fcos":
            scores = torch.sqrt(scores * torch.sigmoid(outputs["bbox_ctrness"]))
            boxes = from_distances(outputs["bbox_regression"], anchors)
        else:
            boxes = from_deltas(outputs["bbox_regression"], anchors)
        return scores, clipped(boxes, sides)

    def tables(self) -> list[NDArray[np.float32]]:
        return self.anchors.tables()

    def detections(
        self, maps: Sequence[Tensor], sides: tuple[int, int], padded: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is chosen of the candidates (`chosen`)."""
        counts = self.anchors.counts([(x.shape[2], x.shape[3]) for x in maps])
        return self.chosen(self(maps, sides, padded), counts)

    def chosen(self, candidates: Candidates, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The detections of each image, those with the highest score first.

        Returns:
            boxes (N, D, 4) in pixels, scores (N, D), and classes (N, D), int32. What is no detection has a box of
            zeros, the score 0 and the class -1.
        """
        facts, (scores, boxes) = self.facts, candidates
        classes = scores.shape[2]
        parts, start = [], 0
        for count in counts:
            own = scores[:, start : start + count], boxes[:, start : start + count]
            level, places = (enough(x, facts.most_candidates, 0.0) for x in own)
            # The best pairs of an anchor and a class are among those of the anchors whose best class is best.
            most = min(facts.most_candidates, level.shape[1])
            best = level.amax(2).topk(most)[1]
            level = level.gather(1, best[:, :, None].expand(-1, -1, classes)).flatten(1)
            pairs, which = level.topk(min(facts.most_candidates, most * classes))
            anchor = best.gather(1, torch.div(which, classes, rounding_mode="floor"))
            parts.append((pairs, which % classes, places.gather(1, anchor[:, :, None].expand(-1, -1, 4))))
            start += count
        rest = parts[0][0].new_zeros(parts[0][0].shape[0], facts.most_detections)  # so that there are always as many
        score = torch.cat([*(pairs for pairs, _, _ in parts), rest], 1)
        number = torch.cat([*(numbers for _, numbers, _ in parts), rest.long()], 1)
        box = torch.cat([*(boxes for _, _, boxes in parts), rest[:, :, None].expand(-1, -1, 4)], 1)
        score = torch.where(score > facts.score_threshold, score, 0)
        by_class = torch.where(
            number[:, None] == torch.arange(classes, device=score.device)[:, None], score[:, None], 0
        )
        kept = unsuppressed(box, by_class, facts.nms_threshold, facts.score_threshold).any(1)
        score, place = torch.where(kept, score, 0).topk(facts.most_detections)
        is_one = score > 0
        number = torch.where(is_one, number.gather(1, place), -1).to(torch.int32)
        box = torch.where(is_one[:, :, None], box.gather(1, place[:, :, None].expand(-1, -1, 4)), 0)
        return box, score, number


def pyramid(spec: ModelSpec) -> FeaturePyramidNetwork:
    """torchvision's, on the maps of `spec.levels`."""
    facts = spec.detection
    assert facts is not None
    widths = [spec.dims[level - 1] for level in spec.levels]
    extra = (
        LastLevelP6P7(widths[-1] if facts.extra_of_map else facts.channels, facts.channels)
        if facts.extra == "p6p7"
        else LastLevelMaxPool()
    )
    return FeaturePyramidNetwork(widths, facts.channels, extra)


def _head(facts: Detection, classes: int) -> nn.Module:
    anchors = facts.anchors[0]
    norm: Any = functools.partial(nn.GroupNorm, GROUPS) if facts.group_norm else None
    if facts.kind == "fcos":
        return FCOSHead(facts.channels, anchors, classes, facts.convolutions)
    return RetinaNetHead(facts.channels, anchors, classes, norm_layer=norm)


def enough(x: Tensor, least: int, fill: float) -> Tensor:
    """(N, A, ...) with `least` rows of `fill` behind the others where A is not known at capture.

    So of images of any size as many are chosen, and what follows has fixed shapes.
    """
    count: Any = x.shape[1]
    if isinstance(count, int):  # and no torch.SymInt
        return x
    return torch.cat((x, x.new_full((x.shape[0], least, *x.shape[2:]), fill)), 1)


def from_deltas(deltas: Tensor, anchors: Tensor) -> Tensor:
    """A regression (..., 4) of centre and sides to boxes, of anchors (..., 4)."""
    sides = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * sides
    middle = deltas[..., :2] * sides + centre
    half = 0.5 * torch.exp(deltas[..., 2:].clamp(max=LARGEST_GROWTH)) * sides
    return torch.cat((middle - half, middle + half), dim=-1)


def from_distances(distances: Tensor, anchors: Tensor) -> Tensor:
    """FCOS' regression (N, A, 4), the distances of the four sides in sizes of the anchor, to boxes."""
    sides = anchors[:, 2:] - anchors[:, :2]
    centre = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    return torch.cat((centre - distances[..., :2] * sides, centre + distances[..., 2:] * sides), dim=2)


def clipped(boxes: Tensor, sides: tuple[int, int]) -> Tensor:
    height, width = sides
    x, y = boxes[..., 0::2].clamp(min=0, max=width), boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack((x, y), dim=-1).flatten(-2)
