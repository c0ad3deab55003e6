"""Detectors on a ConvNeXt's maps: which module a description asks for, and what all of them have in common."""

import torch.nn.functional as F
from torch import Tensor

from ..artifact.detections import padded_sides, pyramid_sides
from ..records.manifest import ModelSpec
from . import two_stage
from .one_stage import OneStageDetector
from .two_stage import TwoStageDetector

Detector = OneStageDetector | TwoStageDetector


def made(spec: ModelSpec) -> Detector:
    """The detector of a description, without weights."""
    assert spec.detection is not None
    return OneStageDetector(spec) if spec.detection.regions is None else TwoStageDetector(spec)


def padded(images: Tensor) -> Tensor:
    """Zeros, which are the mean of the training images, to the right of images and below them."""
    height, width = images.shape[2:]
    to = padded_sides((height, width))
    return F.pad(images, (0, to[1] - width, 0, to[0] - height))


def positions(spec: ModelSpec, name: str) -> int:
    """At how many pixels of an image of `spec.image_size` a convolution of this detector is computed."""
    assert spec.detection is not None
    pixels = [height * width for height, width in pyramid_sides(spec, spec.image_size)]
    parts = name.split(".")
    if parts[0] in ("rpn", "heads"):
        return two_stage.positions(spec, name, pixels)
    if parts[0] == "head":
        return sum(pixels)
    if parts[1] == "extra_blocks":
        return pixels[len(spec.levels) + ("p6", "p7").index(parts[2])]
    return pixels[int(parts[2])]
