"""Checkpoints of torchvision's detectors: pyramid and head beside the ConvNeXt, and what tensors do not show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import WeightsError, counted, plain
from ..records.manifest import Detection, MaskHead, ModelSpec, Preprocessing, Regions
from . import torchvision_two_stage as two_stage
from .detector_names import ALL, ONE_STAGE, fields
from .provenance import joined, shown, sourced

if TYPE_CHECKING:  # `given` asks for facts, and a command that refuses an argument needs no torch
    from torch import Tensor

CODE = "torchvision's code"
CLASSES = 91  # of COCO, as torchvision numbers them
PYRAMID, HEAD = "backbone.fpn.", "head."
STAGES = ("1", "3", "5", "7")  # of torchvision's `features`; between them maps of the next width are made smaller
NAMES = (*dict.fromkeys((*ONE_STAGE, *sorted(ALL - {*ONE_STAGE}))), "image_mean", "image_std", "labels")
DEFAULTS: dict[str, dict[str, Any]] = {
    "retinanet": {
        "anchor_sizes": [[x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))] for x in (32, 64, 128, 256, 512)],
        "aspect_ratios": [[0.5, 1.0, 2.0]] * 5,
        "score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 300, "topk_candidates": 1000,
    },
    "fcos": {
        "anchor_sizes": [[8], [16], [32], [64], [128]],
        "aspect_ratios": [[1.0]] * 5,
        "score_thresh": 0.2, "nms_thresh": 0.6, "detections_per_img": 100, "topk_candidates": 1000,
    },
    "faster_rcnn": two_stage.DEFAULTS,
    "mask_rcnn": two_stage.DEFAULTS,
}  # fmt: skip
SIDES = {"min_size": 800, "max_size": 1333}
# How torchvision's transform prepares images, which it has no options for.
PREPARED: dict[str, Any] = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "fit"}


def split(state: Mapping[str, Tensor], prefix: str | None, where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of pyramid and head under this project's names, all others).

    Args:
        prefix: only keys below it are the detector's.

    Raises:
        WeightsError: no detector, several, or one that is not exported whole.
    """
    anchor = re.compile(rf"{re.escape(prefix or '')}(.*?){re.escape(PYRAMID)}inner_blocks\.0\.(?:0\.)?weight")
    prefixes = [match[1] for key in state if (match := anchor.fullmatch(key))]
    if not prefixes:
        raise WeightsError(
            f"{where} has no {PYRAMID}inner_blocks.0.0.weight; --task detect expected a detector of torchvision with "
            "its BackboneWithFPN; --task features gives the maps of a backbone alone"
        )
    if len(prefixes) > 1:
        raise WeightsError(
            f"{where} has {len(prefixes)} detectors, below {', '.join(map(repr, prefixes))}; "
            "choose one with --weights-key"
        )
    root = (prefix or "") + prefixes[0]
    head: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(root + PYRAMID):
            name = re.sub(r"^((?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", key[len(root + PYRAMID) :])
            head[f"detector.pyramid.{name}"] = value
        elif key.startswith(root + HEAD):
            head[f"detector.head.{key[len(root + HEAD) :]}"] = value
        elif not key.startswith(tuple(root + part for part in two_stage.PARTS)):
            rest[key] = value
    return _in_current_names(head) | two_stage.renamed(state, root, where), rest


def random_spec(spec: ModelSpec) -> ModelSpec:
    """The Mask R-CNN of both papers' COCO systems (arXiv:2201.03545, table 3), for weights without training."""
    facts = two_stage.DEFAULTS
    detection = Detection(
        kind="mask_rcnn",
        convolutions=1,
        anchor_sizes=tuple(map(tuple, facts["anchor_sizes"])),
        aspect_ratios=tuple(map(tuple, facts["aspect_ratios"])),
        most_detections=facts["box_detections_per_img"],
        regions=Regions(masks=MaskHead()),
    )
    return msgspec.structs.replace(spec, detection=detection)


def _in_current_names(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """RetinaNet's convolutions as torchvision names them from 0.13 on: those before were 0, 2, 4, 6."""
    if _is_fcos(head) or "detector.head.classification_head.conv.0.weight" not in head:
        return head
    old = re.compile(r"(detector\.head\.\w+\.conv)\.(\d+)\.(weight|bias)")
    return {old.sub(lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}", name): value for name, value in head.items()}


def _is_fcos(head: Mapping[str, Tensor]) -> bool:
    return "detector.head.regression_head.bbox_ctrness.weight" in head


def described(spec: ModelSpec, head: Mapping[str, Tensor], facts: Mapping[str, Any], where: str) -> ModelSpec:
    """The spec with the detector that the tensors and the facts show; what nothing says is torchvision's default.

    Raises:
        WeightsError: they contradict each other, or are of no detector that torchvision builds.
    """
    for name in head:
        if name.endswith("running_mean") or re.fullmatch(r"detector\.pyramid\.\w+\.\d+\.1\.\w+", name):
            raise WeightsError(
                f"{where}: {name.removeprefix('detector.')} is of a norm that the pyramid and head of torchvision's "
                "RetinaNet and FCOS have not; expected convolutions, and group norms in the head"
            )
    widths = [_shape(head, f"detector.pyramid.inner_blocks.{i}.0.weight", where)[1] for i in range(_levels(head))]
    strange = [width for width in widths if width not in spec.dims]
    if strange or widths != sorted(widths):
        raise WeightsError(
            f"{where}: its pyramid takes maps of {', '.join(map(str, widths))} channels, and the ConvNeXt's have "
            f"{', '.join(map(str, spec.dims))}; expected some of these in their order"
        )
    alike = [width for width in widths if spec.dims.count(width) > 1]
    if alike and widths != list(spec.dims):
        raise WeightsError(
            f"{where}: its pyramid takes a map of {alike[0]} channels, and two stages of the ConvNeXt have as many; "
            "which one is meant cannot be known. Give the module itself, in Python"
        )
    levels = tuple(spec.dims.index(width) + 1 for width in widths) if not alike else (1, 2, 3, 4)
    channels = _shape(head, "detector.pyramid.layer_blocks.0.0.weight", where)[0]
    p6 = head.get("detector.pyramid.extra_blocks.p6.weight")
    count = len(levels) + (1 if p6 is None else 2)
    shown_by_tensors = (
        two_stage.facts_in_tensors(head, channels, where)
        if two_stage.is_two_stage(head)
        else _of_one_stage(head, where)
    )
    classes, outputs, logits = (shown_by_tensors.pop(name) for name in ("classes", "outputs", "logits"))
    kind = shown_by_tensors["kind"]
    places = fields(kind in ("faster_rcnn", "mask_rcnn"))
    strange_name = next((name for name in ALL if name in facts and name not in places), None)
    if strange_name is not None:
        raise WeightsError(f"{where}: {strange_name} is no name of a {kind}; expected some of {', '.join(places)}")
    said = {**SIDES, **DEFAULTS[kind], **{name: facts[name] for name in places if name in facts}}
    said["aspect_ratios"] = _of_levels(said["aspect_ratios"], count, "aspect_ratios" not in facts)
    for name in ("anchor_sizes", "aspect_ratios"):
        if not isinstance(said[name], (list, tuple)) or len(said[name]) != count:
            lists = len(said[name]) if isinstance(said[name], (list, tuple)) else shown(said[name])
            raise WeightsError(
                f"{where}: its pyramid has {count} levels, and the {name}{'' if name in facts else ' assumed'} "
                f"are of {lists}; say {name} with a list for each level in --config FILE.json"
            )
    told: dict[str, Any] = {
        "channels": channels,
        "extra": "pool" if p6 is None else "p6p7",
        "extra_of_map": p6 is not None and p6.ndim == 4 and p6.shape[1] != channels,
        **shown_by_tensors,
    }
    for name, place in places.items():
        if place.startswith("regions."):
            told["regions"][place.removeprefix("regions.")] = said[name]
        else:
            told[place] = said[name]
    try:
        detection = msgspec.convert(told, Detection)
    except msgspec.ValidationError as error:
        raise WeightsError(f"{where}: what is said of its detector: {plain(error)}") from None
    anchors = set(detection.anchors)
    at_each = logits if classes is not None else outputs // 4
    if anchors != {outputs // 4} or (kind == "fcos" and anchors != {1}) or not outputs or logits % at_each:
        raise WeightsError(
            f"{where}: its head gives {logits} scores and {outputs} sides of boxes at each place, and the anchors are "
            f"{', '.join(map(str, detection.anchors))} at each level's; say anchor_sizes and aspect_ratios in --config "
            "FILE.json"
        )
    classes = logits // at_each if classes is None else classes
    _check_labels(facts.get("labels"), classes, where)
    return msgspec.structs.replace(spec, detection=detection, num_classes=classes, levels=levels)


def _of_one_stage(head: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The fields of a `Detection` that a head's tensors show; the number of classes follows from the anchors."""
    kind = "fcos" if _is_fcos(head) else "retinanet"
    return {
        "kind": kind,
        "convolutions": _convolutions(head, 3 if kind == "fcos" else 1),
        "group_norm": kind == "retinanet" and "detector.head.classification_head.conv.0.1.weight" in head,
        "classes": None,
        "outputs": _shape(head, "detector.head.regression_head.bbox_reg.weight", where)[0],
        "logits": _shape(head, "detector.head.classification_head.cls_logits.weight", where)[0],
    }


def _levels(head: Mapping[str, Tensor]) -> int:
    return len([name for name in head if re.fullmatch(r"detector\.pyramid\.inner_blocks\.\d+\.0\.weight", name)])


def _convolutions(head: Mapping[str, Tensor], steps: int) -> int:
    """Of one branch: those numbered with `steps` from one to the next."""
    own = re.compile(r"detector\.head\.classification_head\.conv\.(\d+)\.(?:0\.)?weight")
    numbers = {int(match[1]) for name, value in head.items() if (match := own.fullmatch(name)) and value.ndim == 4}
    return max(len({number // steps for number in numbers}), 1)


def _shape(head: Mapping[str, Tensor], name: str, where: str) -> tuple[int, ...]:
    value = head.get(name)
    if value is None or value.ndim != 4 or 0 in value.shape:
        raise WeightsError(
            f"{where} lacks a 4-dimensional {name.removeprefix('detector.').replace('pyramid.', PYRAMID)}; expected "
            "torchvision's RetinaNet or FCOS; save the checkpoint again"
        )
    return tuple(value.shape)


def _of_levels(ratios: Any, count: int, assumed: bool) -> Any:
    """One list of ratios for each level, as torchvision's AnchorGenerator takes one for all."""
    if isinstance(ratios, Sequence) and ratios and not isinstance(ratios[0], Sequence):
        return [list(ratios)] * count
    return [ratios[0]] * count if assumed else ratios


def _check_labels(labels: Sequence[str] | None, classes: int, where: str) -> None:
    if labels is not None and len(labels) != classes:
        raise WeightsError(
            f"{where}: {counted(len(labels), 'label')} for {counted(classes, 'class')}; torchvision's detectors "
            "count the background as "
            "class 0, which needs a name too"
        )


def facts_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a detector, in the names of torchvision's constructors.

    Raises:
        ValueError: a name that is none of them.
    """
    unknown = [name for name in config if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown name {unknown[0]!r}; expected some of {', '.join(NAMES)}")
    facts = {name: value for name, value in config.items() if name in ALL}
    for name, own in (("image_mean", "mean"), ("image_std", "std")):
        if name in config:
            facts[own] = list(config[name])
    if isinstance(facts.get("min_size"), Sequence):  # of training at several sizes; evaluation takes the last
        facts["min_size"] = list(facts["min_size"])[-1]
    sizes = facts.get("anchor_sizes")
    if isinstance(sizes, Sequence) and sizes and not isinstance(sizes[0], Sequence):
        facts["anchor_sizes"] = [[size] for size in sizes]
    if "labels" in config:
        facts["labels"] = list(map(str, config["labels"]))
    return facts


def is_config(content: Mapping[str, Any]) -> bool:
    """Whether a JSON file is of a detector: it has a name of a constructor's, or `labels` and nothing of others.

    `max_size`, `image_mean` and `image_std` are names of an image processor's too.
    """
    own = content.keys() & {*ALL, "labels"}
    return bool(own - {"max_size", "labels"} or (own and content.keys() <= set(NAMES)))


def module_facts(module: Any) -> dict[str, Any] | None:
    """What a detector of torchvision in memory says of itself, in the names of `facts_in`; None of another module."""
    transform, anchors = getattr(module, "transform", None), getattr(module, "anchor_generator", None)
    if transform is None:
        return None
    own = two_stage.module_facts(module)
    if own is None:
        if not hasattr(module, "topk_candidates") or anchors is None:
            return None
        own = {
            "anchor_sizes": [list(sizes) for sizes in anchors.sizes],
            "aspect_ratios": [list(ratios) for ratios in anchors.aspect_ratios],
            **{name: getattr(module, name) for name in ("score_thresh", "nms_thresh", "detections_per_img")},
            "topk_candidates": module.topk_candidates,
        }
    layers = getattr(getattr(getattr(module, "backbone", None), "body", None), "return_layers", None) or {}
    strange = [name for name in layers if name.isdecimal() and name not in STAGES]
    if strange:
        raise WeightsError(
            f"the detector's pyramid takes the map behind layer {strange[0]} of torchvision's ConvNeXt; expected those "
            f"at the end of a stage, {', '.join(STAGES)}"
        )
    minimum = transform.min_size
    return {
        **own,
        "min_size": minimum[-1] if isinstance(minimum, Sequence) else minimum,
        "max_size": transform.max_size,
        "image_mean": list(transform.image_mean),
        "image_std": list(transform.image_std),
    }


def prepared(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with what torchvision's transform does to images."""
    return joined(sourced(PREPARED, CODE), facts)


def refuse_other_preparation(steps: Preprocessing, where: str) -> None:
    """Refuse what torchvision's transform does not do: boxes would be elsewhere, or be of other pixels.

    Raises:
        WeightsError: with what to say instead.
    """
    for name, value in PREPARED.items():
        if getattr(steps, name) != value:
            raise WeightsError(
                f"{where}: {name} {getattr(steps, name)}; --task detect prepares images as torchvision's detectors do, "
                f"with {name} {value}: leave it out"
            )
