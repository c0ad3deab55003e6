"""Faster and Mask R-CNN on a ConvNeXt's maps, as torchvision computes them, with a fixed number of detections an image.

The first stage proposes regions, the second tells of each what it is and where, and of what it keeps the mask. Papers:
arXiv:1506.01497, arXiv:1703.06870. The convolutions and linears are torchvision's own modules; what it does image by
image with lists of any length is written here for a whole batch. Conventions as torchvision 0.29.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from ..records.manifest import ModelSpec
from . import one_stage
from .anchors import Anchors
from .regions import cut_out, level_numbers, levels_of
from .suppression import unsuppressed

SMALLEST_PROPOSAL, SMALLEST_BOX = 1e-3, 1e-2  # pixels of the shorter side; torchvision leaves smaller ones out
SPARE = 4  # of so many candidates for proposals, one more is followed: rounding may let it in
BETWEEN = 64  # regions nearest to the size at which the map changes are followed on the other map too


class Places(NamedTuple):
    """Which candidates are followed to the end: what makes two networks' candidates comparable, one by one.

    A region whose size is near that at which another map is taken is there twice, once for each map.
    """

    anchors: Tensor  # (N, S) of which anchor each candidate is
    levels: Tensor  # (N, S) the index of the map that it is cut out of
    pairs: Tensor  # (N, D) of the detections, candidate times classes plus class; -1: there is none
    mask_levels: Tensor  # (N, D) the index of the map that the mask is cut out of


class Heads(nn.Module):
    """The second stage's, with torchvision's names."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.detection is not None
        assert spec.detection.regions is not None
        channels, facts = spec.detection.channels, spec.detection.regions
        self.box_head = TwoMLPHead(channels * facts.size**2, facts.hidden)
        self.box_predictor = FastRCNNPredictor(facts.hidden, spec.num_classes)
        if facts.masks is not None:
            self.mask_head = MaskRCNNHeads(channels, list(facts.masks.channels), 1)
            self.mask_predictor = MaskRCNNPredictor(facts.masks.channels[-1], facts.masks.upsampled, spec.num_classes)


class TwoStageDetector(nn.Module):
    """Maps of `spec.levels` to the detections, or to the candidates of both stages."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.detection is not None
        assert spec.detection.regions is not None
        self.spec, self.facts, self.regions = spec, spec.detection, spec.detection.regions
        self.pyramid = one_stage.pyramid(spec)
        self.rpn = RPNHead(self.facts.channels, self.facts.anchors[0], self.facts.convolutions)
        self.heads = Heads(spec)
        self.anchors = Anchors(spec)
        self.strides = [2 << level for level in spec.levels]

    def tables(self) -> list[NDArray[np.float32]]:
        weights = np.array(self.regions.box_weights, np.float32)
        return [*self.anchors.tables(), weights, np.float32(1) / weights]

    # The candidates, which are compared ------------------------------------------------------------------------------

    def forward(
        self, maps: Sequence[Tensor], sides: tuple[int, int], padded: tuple[int, int], places: Places | None = None
    ) -> tuple[Tensor, ...]:
        """What both stages compute of S candidates, before any is chosen; for images of one size.

        Args:
            places: which are followed; None: the best of each level, and the detections among them.

        Returns:
            Of each candidate the first stage's logit (N, S) and box (N, S, 4), the second's scores (N, S, K) and boxes
            (N, S, K, 4); of a Mask R-CNN the masks (N, D, M, M) of the detections; then `Places`.
        """
        levels, logits, boxes = self.proposals(maps, sides, padded)
        followed = self._followed(logits, boxes, maps) if places is None else (places.anchors, places.levels)
        regions = boxes.gather(1, followed[0][:, :, None].expand(-1, -1, 4))
        scores, refined = self.judged(levels, regions, followed[1], sides)
        if places is None:
            places = self._places(logits.gather(1, followed[0]), regions, scores, refined, followed, maps)
        classes = scores.shape[2]
        outputs = (logits.gather(1, places.anchors), regions, scores, refined)
        if not self.facts.mask_side:
            return (*outputs, *places)
        pairs = places.pairs.clamp(min=0)
        own = refined.flatten(1, 2).gather(1, pairs[:, :, None].expand(-1, -1, 4))
        return (*outputs, self.masks(levels, own, pairs % classes, places.mask_levels), *places)

    def _followed(self, logits: Tensor, boxes: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(anchors, levels): the best of each level of anchors, some to spare, and those between two maps twice."""
        parts, start = [], 0
        for count in self.anchors.counts([(x.shape[2], x.shape[3]) for x in maps]):
            parts.append(logits[:, start : start + count].topk(self._followed_of(count))[1] + start)
            start += count
        anchors = torch.cat(parts, 1)
        regions = boxes.gather(1, anchors[:, :, None].expand(-1, -1, 4))
        number, levels = level_numbers(regions), levels_of(regions, self.strides)
        near = (number - number.round()).abs().nan_to_num(1, 1, 1).topk(min(BETWEEN, anchors.shape[1]), largest=False)
        own = levels.gather(1, near[1])
        first = self.strides[0].bit_length() - 1
        boundary = number.gather(1, near[1]).round().nan_to_num(0, 0, 0).to(torch.int64) - first
        other = torch.where(own < boundary, boundary, boundary - 1).clamp(0, len(self.strides) - 1)
        return torch.cat((anchors, anchors.gather(1, near[1])), 1), torch.cat((levels, other), 1)

    def _followed_of(self, count: int) -> int:
        """Of so many anchors of a level."""
        return min(self.facts.most_candidates + self.facts.most_candidates // SPARE, count)

    def _places(
        self, logits: Tensor, regions: Tensor, scores: Tensor, refined: Tensor,
        followed: tuple[Tensor, Tensor], maps: Sequence[Tensor],
    ) -> Places:  # fmt: skip
        """With the detections among those that are followed."""
        counts = self.anchors.counts([(x.shape[2], x.shape[3]) for x in maps])
        place, is_one = self._proposed(logits, regions, [self._followed_of(count) for count in counts])
        own = [value.flatten(2).gather(1, place[:, :, None].expand(-1, -1, value[0, 0].numel()))
               for value in (scores, refined)]  # fmt: skip
        boxes, _, labels, which = self._detections(own[0], own[1].reshape(*place.shape, -1, 4), is_one)
        pairs = torch.where(labels >= 0, place.gather(1, which) * scores.shape[2] + labels, -1)
        return Places(*followed, pairs, levels_of(boxes, self.strides))

    # Both stages ------------------------------------------------------------------------------------------------------

    def proposals(
        self, maps: Sequence[Tensor], sides: tuple[int, int], padded: tuple[int, int]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The pyramid's maps, and of every anchor its logit (N, A) and its box (N, A, 4), cut off at the image."""
        dtype = self.rpn.cls_logits.weight.dtype
        levels = list(self.pyramid({str(index): x.to(dtype) for index, x in enumerate(maps)}).values())
        wide = torch.promote_types(dtype, torch.float32)
        first_stage = self.rpn(levels)
        logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in first_stage[0]], 1).to(wide)
        deltas = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for x in first_stage[1]]
        anchors = self.anchors.of(levels, padded, wide)
        boxes = one_stage.clipped(one_stage.from_deltas(torch.cat(deltas, 1).to(wide), anchors), sides)
        return levels[: len(maps)], logits, boxes

    def _proposed(self, logits: Tensor, boxes: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(which of the candidates (N, S) are proposals (N, R), which of these are none).

        Args:
            counts: of each level, whose candidates follow one another, the best first.
        """
        score = torch.sigmoid(logits)
        counted = (score >= self.regions.score_threshold) & _is_large(boxes, SMALLEST_PROPOSAL)
        score = torch.where(counted, score, 0)
        rows, start = [], 0
        for count in counts:
            own = score[:, start : start + torch.sym_min(count, self.facts.most_candidates)]
            rows.append(F.pad(own, (start, score.shape[1] - start - own.shape[1])))
            start += count
        kept = unsuppressed(boxes, torch.stack(rows, 1), self.regions.nms_threshold, 0.0).any(1)
        best, place = torch.where(kept, score, 0).topk(torch.sym_min(self.regions.most_proposals, score.shape[1]))
        return place, best > 0

    def judged(
        self, maps: Sequence[Tensor], regions: Tensor, levels: Tensor, sides: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Of each region (N, R, 4) the scores of all classes (N, R, K), and for each of these a box (N, R, K, 4)."""
        wide, facts = regions.dtype, self.regions
        x = cut_out([x.to(wide) for x in maps], regions, levels, self.strides, facts.size, facts.samples)
        x = self.heads.box_head(x.to(self.heads.box_head.fc6.weight.dtype))
        logits, deltas = (y.to(wide).unflatten(0, regions.shape[:2]) for y in self.heads.box_predictor(x))
        weights = torch.tensor(facts.box_weights, dtype=wide, device=regions.device)
        boxes = one_stage.from_deltas(deltas.reshape(*logits.shape, 4) / weights, regions[:, :, None])
        return torch.softmax(logits, -1), one_stage.clipped(boxes, sides)

    def masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
        """Of each box (N, D, 4) how likely each of its places is part of the object, (N, D, M, M)."""
        facts, wide = self.regions.masks, boxes.dtype
        assert facts is not None
        x = cut_out([x.to(wide) for x in maps], boxes, levels, self.strides, facts.size, self.regions.samples)
        x = self.heads.mask_head(x.to(self.heads.mask_predictor.conv5_mask.weight.dtype))
        logits = self.heads.mask_predictor(x)  # (N * D, K, M, M)
        of_class = labels.flatten()[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        own = torch.sigmoid(logits.gather(1, of_class)[:, 0].to(wide))
        return own.reshape(*labels.shape, *own.shape[1:])

    # The detections, which are put out --------------------------------------------------------------------------------

    def detections(self, maps: Sequence[Tensor], sides: tuple[int, int], padded: tuple[int, int]) -> tuple[Tensor, ...]:
        """The detections of each image, those with the highest score first.

        Returns:
            boxes (N, D, 4) in pixels, scores (N, D), classes (N, D), int32, and of a Mask R-CNN masks (N, D, M, M), of
            the places of each box. What is no detection is all zeros, with the class -1.
        """
        levels, logits, boxes = self.proposals(maps, sides, padded)
        values, best, counts, start = [], [], [], 0
        for count in self.anchors.counts([(x.shape[2], x.shape[3]) for x in maps]):
            own = one_stage.enough(logits[:, start : start + count], self.facts.most_candidates, -torch.inf)
            places = one_stage.enough(boxes[:, start : start + count], self.facts.most_candidates, 0.0)
            value, which = own.topk(min(self.facts.most_candidates, own.shape[1]))
            values.append(value)
            best.append(places.gather(1, which[:, :, None].expand(-1, -1, 4)))
            counts.append(value.shape[1])
            start += count
        regions = torch.cat(best, 1)
        place, is_one = self._proposed(torch.cat(values, 1), regions, counts)
        regions = regions.gather(1, place[:, :, None].expand(-1, -1, 4))
        scores, refined = self.judged(levels, regions, levels_of(regions, self.strides), sides)
        box, score, label, _ = self._detections(scores, refined, is_one)
        outputs = (box, score, label.to(torch.int32))
        if not self.facts.mask_side:
            return outputs
        mask = self.masks(levels, box, label.clamp(min=0), levels_of(box, self.strides))
        return (*outputs, torch.where((label >= 0)[:, :, None, None], mask, 0))

    def _detections(self, scores: Tensor, boxes: Tensor, is_one: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of regions' scores (N, R, K) and boxes (N, R, K, 4): box, score and class of detections (N, D), and whose."""
        facts, (images, count, classes) = self.facts, scores.shape
        score = scores[:, :, 1:].transpose(1, 2)  # (N, K - 1, R): the first class is the background
        places = boxes[:, :, 1:].transpose(1, 2)
        score = torch.where(
            is_one[:, None] & (score > facts.score_threshold) & _is_large(places, SMALLEST_BOX), score, 0
        )
        # Each class of an image is an image of its own, because its boxes are.
        kept = unsuppressed(
            places.flatten(0, 1), score.flatten(0, 1)[:, None], facts.nms_threshold, facts.score_threshold
        )
        score = torch.where(kept.view(images, classes - 1, count), score, 0).flatten(1)
        rest = score.new_zeros(images, facts.most_detections)  # so that there are always as many
        score, place = torch.cat((score, rest), 1).topk(facts.most_detections)
        is_object = score > 0
        place = torch.where(is_object, place, 0)
        label = torch.where(is_object, torch.div(place, count, rounding_mode="floor") + 1, -1)
        box = places.flatten(1, 2).gather(1, place[:, :, None].expand(-1, -1, 4))
        return torch.where(is_object[:, :, None], box, 0), score, label, place % count


def _is_large(boxes: Tensor, least: float) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0] >= least) & (boxes[..., 3] - boxes[..., 1] >= least)


def positions(spec: ModelSpec, name: str, pixels: Sequence[int]) -> int:
    """At how many places of an image a convolution or linear of this detector is computed, at most.

    Args:
        pixels: of each map of the pyramid.
    """
    assert spec.detection is not None
    regions = spec.detection.regions
    assert regions is not None
    part = name.split(".")
    if part[0] == "rpn":
        return sum(pixels)
    if part[1] in ("box_head", "box_predictor"):
        return regions.most_proposals
    assert regions.masks is not None
    places = regions.masks.size**2 * (4 if part[2] == "mask_fcn_logits" else 1)
    return spec.detection.most_detections * places
