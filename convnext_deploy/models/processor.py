"""What an image processor of transformers does to an image, as facts that a `Preprocessing` can express, or a refusal.

Read are `preprocessor_config.json` and the `image_processor` of `processor_config.json`. The classes differ in what a
size means: ConvNextImageProcessor crops by `crop_pct` below 384 pixels and squashes from there on, the others
(BitImageProcessor, CLIPImageProcessor, ViTImageProcessor) resize to `size` and crop to `crop_size`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import WeightsError
from .open_clip import MEAN, STD

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_SQUASHED_FROM = 384  # pixels, in ConvNextImageProcessor
_PER_PIXEL = 255.0
# What each class normalizes by where its configuration is silent (transformers 5.23).
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "ConvNext": (0.5, 0.5), "ViT": (0.5, 0.5), "CLIP": (MEAN, STD), "Bit": (MEAN, STD),
}  # fmt: skip
# Classes in which the same words mean other steps, and what is other.
_OTHER_KINDS = {
    "Levit": "it resizes to 256/224 of its size",
    "PoolFormer": "its crop_pct is of another computation",
    "EfficientNet": "it divides by the standard deviation a second time (include_top)",
    "Perceiver": "it crops before it resizes",
    "MobileViT": "it gives images with blue first (do_flip_channel_order)",
}

# Steps that no `Preprocessing` has; refused where they are switched on.
_OTHER_STEPS = (
    "do_pad", "do_flip_channel_order", "do_thumbnail", "do_align_long_axis", "do_grayscale", "do_color_quantize",
    "do_crop_margin", "rescale_offset", "keep_aspect_ratio", "size_divisor",
)  # fmt: skip


def merged(preprocessor: Mapping[str, Any] | None, processor: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The one image processor that the two files describe; None where neither does.

    Args:
        preprocessor: `preprocessor_config.json`.
        processor: `processor_config.json`, which transformers 5 writes; the image processor is one of its entries.

    Raises:
        WeightsError: they contradict each other.
    """
    nested = (processor or {}).get("image_processor")
    if not isinstance(nested, Mapping):
        return None if preprocessor is None else dict(preprocessor)
    for name in sorted(nested.keys() & (preprocessor or {}).keys()):
        if preprocessor and nested[name] != preprocessor[name]:
            raise WeightsError(
                f"{name} is {preprocessor[name]!r} in preprocessor_config.json and {nested[name]!r} in "
                "processor_config.json; remove the file that is wrong"
            )
    return {**(preprocessor or {}), **nested}


def processor_facts(processor: Mapping[str, Any]) -> dict[str, Any]:
    """mean, std, interpolation, input_size, crop_pct and crop_mode, as far as the processor says them.

    Raises:
        WeightsError: it does what a `Preprocessing` cannot express, or contradicts itself.
    """
    for name in _OTHER_STEPS:
        if processor.get(name):
            raise _refused(f"{name} {processor[name]!r}", "it is no step of the preprocessing here")
    if _kind(processor) in _OTHER_KINDS:
        raise _refused(
            f"the class {processor.get('image_processor_type') or processor['feature_extractor_type']}",
            f"{_OTHER_KINDS[_kind(processor)]}; give the weights file alone, and --image-size, --mean, --std and "
            "--crop-pct",
        )
    facts = _normalization(processor)
    resample = processor.get("resample")
    if resample is not None:
        facts["interpolation"] = _filter(resample)
    return facts | _geometry(processor)


def _filter(resample: Any) -> str:
    """A filter by Pillow's number, or by its name with whatever stands before it."""
    name = str(resample).rpartition(".")[2].lower()
    filter_name = name if name in _FILTERS.values() else _FILTERS.get(resample) if isinstance(resample, int) else None
    if filter_name is None:
        raise _refused(f"resample {resample!r}", "expected 0 (nearest), 1 (lanczos), 2 (bilinear) or 3 (bicubic)")
    return filter_name


def _normalization(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Pixel p becomes (p * factor - mean) / std there and (p / 255 - mean) / std here."""
    usual = _DEFAULTS.get(_kind(processor), (None, None))
    mean, std = (processor.get(name, own) for name, own in zip(("image_mean", "image_std"), usual, strict=True))
    if processor.get("do_normalize", True) is False:
        mean, std = 0.0, 1.0
    factor = processor.get("rescale_factor")
    scale = 1.0 if factor is None else float(factor) * _PER_PIXEL
    if abs(scale - 1) < 1e-9:
        scale = 1.0  # 0.00392156862745098 times 255 is not 1 in binary
    if processor.get("do_rescale", True) is False:
        if mean is None or max(_listed(mean)) <= 1:
            raise _refused(
                "do_rescale false", f"pixels of 0..255 do not go with image_mean {mean}; give --mean and --std"
            )
        scale = _PER_PIXEL
    if not scale > 0:
        raise _refused(f"rescale_factor {factor!r}", "expected a number above 0")
    if scale != 1.0 and (mean is None or std is None):
        raise _refused(f"rescale_factor {factor!r} without image_mean and image_std", "give --mean and --std")
    statistics = {"mean": mean, "std": std}
    return {
        name: [float(entry) / scale if scale != 1.0 else entry for entry in _listed(value)]
        for name, value in statistics.items()
        if value is not None
    }


def _kind(processor: Mapping[str, Any]) -> str:
    """A class's name without the ends that say how it computes."""
    name = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    return re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _geometry(processor: Mapping[str, Any]) -> dict[str, Any]:
    size, crop = processor.get("size"), processor.get("crop_size")
    if processor.get("do_resize", True) is False:
        raise _refused("do_resize false", "images are resized here; give the processor's size, or load the file alone")
    crops = processor.get("do_center_crop", crop is not None)
    kind = _kind(processor)
    by_sides = isinstance(size, Mapping) and "height" in size
    if kind == "ConvNext" or (not kind and not crops and not by_sides):
        return _convnext(processor, size, crop if crops else None)
    if size is None:
        return {}
    sides = _sides(crop) if crops and crop is not None else None
    if crops and sides is None:
        raise _refused("do_center_crop true without crop_size", "give crop_size")
    if isinstance(size, Mapping) and not by_sides:
        if set(size) != {"shortest_edge"}:
            raise _refused(f"size {dict(size)}", "expected height and width, or shortest_edge")
        if sides is None:
            raise _refused(f"size {dict(size)} without a crop", "images would keep their shapes; give crop_size")
    if sides is None:
        return {"input_size": list(_sides(size)), "crop_pct": 1.0, "crop_mode": "squash"}
    if by_sides:
        return _cropped(sides, _sides(size), "squash", f"size {size} and crop_size {crop}")
    edge = size["shortest_edge"] if isinstance(size, Mapping) else size
    if sides[0] != sides[1]:
        raise _refused(f"crop_size {crop} after a resize of the shortest edge", "expected a square")
    return _cropped(sides, (edge, edge), "center", f"size {size} and crop_size {crop}")


def _convnext(processor: Mapping[str, Any], size: Any, crop: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if processor.get("crop_pct") is not None:
        facts["crop_pct"] = processor["crop_pct"]
    if size is None:
        return facts
    if isinstance(size, Mapping) and set(size) != {"shortest_edge"}:
        raise _refused(f"size {dict(size)}", "ConvNextImageProcessor takes shortest_edge")
    edge = size["shortest_edge"] if isinstance(size, Mapping) else size  # a number before transformers 4.26
    if isinstance(edge, (list, tuple)):
        if len(set(edge)) != 1:
            raise _refused(f"size {list(edge)}", "ConvNextImageProcessor takes one number, the shortest edge")
        edge = edge[0]
    if crop is not None and _sides(crop) != (edge, edge):
        raise _refused(f"crop_size {crop} after a crop to {edge}", "ConvNextImageProcessor crops by crop_pct already")
    facts["input_size"] = [edge] * 2
    if edge >= _SQUASHED_FROM:
        facts |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return facts


def _sides(size: Any) -> tuple[int, int]:
    """(height, width)"""
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            raise _refused(f"size {dict(size)}", "expected height and width")
        return size["height"], size["width"]
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _cropped(crop: tuple[int, int], resized: tuple[int, int], mode: str, said: str) -> dict[str, Any]:
    """The `crop_pct` from which timm's transform computes exactly these sides: floor(crop / crop_pct)."""
    share = crop[0] / resized[0]
    for candidate in (share, math.nextafter(share, 0.0)):
        if 0 < candidate <= 1 and all(
            math.floor(side / candidate) == edge for side, edge in zip(crop, resized, strict=True)
        ):
            return {"input_size": list(crop), "crop_pct": candidate, "crop_mode": mode}
    raise _refused(said, "expected a crop that fits into the resized image and has its shape")


def _refused(what: str, why: str) -> WeightsError:
    return WeightsError(f"the image processor has {what}: {why}")
