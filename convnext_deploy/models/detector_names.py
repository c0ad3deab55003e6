"""What no tensor of a detector shows, in the names of torchvision's constructors and in those of a `Detection`."""

from typing import Any

from ..records.manifest import Detection

SIDES = {"min_size": "min_side", "max_size": "max_side"}
ONE_STAGE = {
    "anchor_sizes": "anchor_sizes", "aspect_ratios": "aspect_ratios", "score_thresh": "score_threshold",
    "nms_thresh": "nms_threshold", "detections_per_img": "most_detections", "topk_candidates": "most_candidates",
    **SIDES,
}  # fmt: skip
# `sampling_ratio` is what torchvision's MultiScaleRoIAlign is given.
TWO_STAGE = {
    "anchor_sizes": "anchor_sizes", "aspect_ratios": "aspect_ratios", "box_score_thresh": "score_threshold",
    "box_nms_thresh": "nms_threshold", "box_detections_per_img": "most_detections",
    "rpn_pre_nms_top_n_test": "most_candidates", **SIDES,
    "rpn_post_nms_top_n_test": "regions.most_proposals", "rpn_nms_thresh": "regions.nms_threshold",
    "rpn_score_thresh": "regions.score_threshold", "bbox_reg_weights": "regions.box_weights",
    "sampling_ratio": "regions.samples",
}  # fmt: skip
ALL = {*ONE_STAGE, *TWO_STAGE}


def fields(two_stages: bool) -> dict[str, str]:
    """Of each name of a constructor, where a `Detection` has it."""
    return TWO_STAGE if two_stages else ONE_STAGE


def facts_of(detection: Detection) -> dict[str, Any]:
    """What a detector is, by the names of its constructor."""
    return {name: _at(detection, place) for name, place in fields(detection.regions is not None).items()}


def _at(value: Any, place: str) -> Any:
    for name in place.split("."):
        value = getattr(value, name)
    return value
