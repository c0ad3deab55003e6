"""Checkpoints of torchvision's Faster and Mask R-CNN: what their tensors show, and what their modules say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

PARTS = {"rpn.head.": "detector.rpn.", "roi_heads.": "detector.heads."}
DEFAULTS: dict[str, Any] = {
    "anchor_sizes": [[32], [64], [128], [256], [512]],
    "aspect_ratios": [[0.5, 1.0, 2.0]] * 5,
    "box_score_thresh": 0.05, "box_nms_thresh": 0.5, "box_detections_per_img": 100,
    "rpn_pre_nms_top_n_test": 1000, "rpn_post_nms_top_n_test": 1000, "rpn_nms_thresh": 0.7, "rpn_score_thresh": 0.0,
    "bbox_reg_weights": [10.0, 10.0, 5.0, 5.0], "sampling_ratio": 2,
}  # fmt: skip
ADDED_MAPS = {"pool", "p6", "p7"}  # of the pyramid, which no region is cut out of by default
MASK_SIZE = 14  # of torchvision's mask_roi_pool, which tensors do not show
# What torchvision builds from other arguments, by tensors that nothing else has.
OTHERS = {
    "roi_heads.keypoint_": "a Keypoint R-CNN",
    "roi_heads.box_head.0.": "a Faster or Mask R-CNN whose box head has convolutions (FastRCNNConvFCHead)",
    "roi_heads.mask_head.0.1.": "a Mask R-CNN with norms in its mask head",
}


def is_two_stage(names: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("detector.rpn.") for name in names)


def renamed(state: Mapping[str, Tensor], root: str, where: str) -> dict[str, Tensor]:
    """The tensors of both stages' heads, under this project's names.

    Raises:
        WeightsError: a detector of two stages of another kind.
    """
    other = next((what for name, what in OTHERS.items() if any(key.startswith(root + name) for key in state)), None)
    if other is not None:
        raise WeightsError(
            f"{where} is {other}, which is not exported whole; expected torchvision's FasterRCNN or MaskRCNN with its "
            "own heads, or export the maps with --task features"
        )
    tensors = {}
    for key, value in state.items():
        for part, own in PARTS.items():
            if key.startswith(root + part):
                name = key[len(root + part) :]
                name = re.sub(r"^conv\.(weight|bias)$", r"conv.0.0.\1", name)  # torchvision before 0.13
                name = re.sub(r"^mask_head\.mask_fcn(\d+)\.", lambda m: f"mask_head.{int(m[1]) - 1}.0.", name)
                tensors[own + name] = value
    return tensors


def facts_in_tensors(head: Mapping[str, Tensor], channels: int, where: str) -> dict[str, Any]:
    """The fields of a `Detection` that the heads' tensors show.

    Raises:
        WeightsError: no heads that torchvision builds.
    """
    first = _shape(head, "detector.heads.box_head.fc6.weight", 2, where)
    size = math.isqrt(first[1] // channels)
    if size * size * channels != first[1]:
        raise WeightsError(
            f"{where}: roi_heads.box_head.fc6 takes {first[1]} numbers, which are no square of places with {channels} "
            "channels each; expected torchvision's TwoMLPHead behind a MultiScaleRoIAlign"
        )
    classes = _shape(head, "detector.heads.box_predictor.cls_score.weight", 2, where)[0]
    if classes < 2:
        raise WeightsError(
            f"{where}: its box predictor is of {classes} class, which is the background; expected at least 2"
        )
    boxes = _shape(head, "detector.heads.box_predictor.bbox_pred.weight", 2, where)[0]
    if boxes != 4 * classes:
        raise WeightsError(
            f"{where}: its box predictor gives {classes} scores and {boxes} numbers of boxes; expected 4 a class"
        )
    convolutions = [name for name in head if re.fullmatch(r"detector\.rpn\.conv\.\d+\.0\.weight", name)]
    masks = None
    if any(name.startswith("detector.heads.mask_") for name in head):
        layers = sorted(
            int(m[1]) for name in head if (m := re.fullmatch(r"detector\.heads\.mask_head\.(\d+)\.0\.weight", name))
        )
        upsampled = _shape(head, "detector.heads.mask_predictor.conv5_mask.weight", 4, where)[1]
        logits = _shape(head, "detector.heads.mask_predictor.mask_fcn_logits.weight", 4, where)[0]
        if logits != classes or not layers:
            raise WeightsError(
                f"{where}: its mask predictor is of {logits} classes, and its box predictor of {classes}"
            )
        widths = [_shape(head, f"detector.heads.mask_head.{layer}.0.weight", 4, where)[0] for layer in layers]
        masks = {"channels": widths, "upsampled": upsampled, "size": MASK_SIZE}
    return {
        "kind": "mask_rcnn" if masks else "faster_rcnn",
        "convolutions": max(len(convolutions), 1),
        "regions": {"size": size, "hidden": first[0], "masks": masks},
        "classes": classes,
        "outputs": _shape(head, "detector.rpn.bbox_pred.weight", 4, where)[0],
        "logits": _shape(head, "detector.rpn.cls_logits.weight", 4, where)[0],
    }


def _shape(head: Mapping[str, Tensor], name: str, axes: int, where: str) -> tuple[int, ...]:
    value = head.get(name)
    if value is None or value.ndim != axes or 0 in value.shape:
        own = name.removeprefix("detector.").replace("heads.", "roi_heads.", 1).replace("rpn.", "rpn.head.", 1)
        raise WeightsError(
            f"{where} lacks a {axes}-dimensional {own}; expected torchvision's FasterRCNN or MaskRCNN; save the "
            "checkpoint again"
        )
    return tuple(value.shape)


def module_facts(module: Any) -> dict[str, Any] | None:
    """What a Faster or Mask R-CNN in memory says of itself; None of another module.

    Raises:
        WeightsError: it cuts regions out in another way than its tensors tell.
    """
    rpn: Any = getattr(module, "rpn", None)
    heads: Any = getattr(module, "roi_heads", None)
    anchors: Any = getattr(rpn, "anchor_generator", None)
    cutter: Any = getattr(heads, "box_roi_pool", None)
    masks: Any = getattr(heads, "mask_roi_pool", None)
    if anchors is None or cutter is None:
        return None
    pyramid: Any = getattr(getattr(module, "backbone", None), "fpn", None)
    maps = {str(index) for index in range(len(getattr(pyramid, "inner_blocks", ())))}
    for one in (cutter, masks or cutter):
        names = set(one.featmap_names)
        said = {
            "canonical_scale": (one.canonical_scale, 224), "canonical_level": (one.canonical_level, 4),
            "sampling_ratio": (one.sampling_ratio, cutter.sampling_ratio),
            "featmap_names": (sorted(names), sorted((names | maps) - ADDED_MAPS)),
        }  # fmt: skip
        wrong = next(
            (f"{name} {actual}, expected {own}" for name, (actual, own) in said.items() if actual != own), None
        )
        if wrong is None and len(set(one.output_size)) > 1:
            wrong = f"output_size {tuple(one.output_size)}, expected a square"
        if wrong is None and one is masks and one.output_size[0] != MASK_SIZE:
            wrong = f"output_size {one.output_size[0]} for masks, expected {MASK_SIZE}"
        if wrong is not None:
            raise WeightsError(f"the detector's MultiScaleRoIAlign has {wrong}; build it with torchvision's default")
    return {
        "anchor_sizes": [list(sizes) for sizes in anchors.sizes],
        "aspect_ratios": [list(ratios) for ratios in anchors.aspect_ratios],
        "box_score_thresh": heads.score_thresh,
        "box_nms_thresh": heads.nms_thresh,
        "box_detections_per_img": heads.detections_per_img,
        "rpn_pre_nms_top_n_test": rpn._pre_nms_top_n["testing"],
        "rpn_post_nms_top_n_test": rpn._post_nms_top_n["testing"],
        "rpn_nms_thresh": rpn.nms_thresh,
        "rpn_score_thresh": rpn.score_thresh,
        "bbox_reg_weights": list(heads.box_coder.weights),
        "sampling_ratio": max(cutter.sampling_ratio, 0),
    }
