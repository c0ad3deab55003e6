"""How many multiply-accumulates a network takes, by the weights it multiplies with."""

import math
from collections.abc import Collection

import torch

from ..artifact.detections import padded_sides
from ..records.manifest import ModelSpec
from . import upernet
from .convnext import ConvNeXt


def multiply_accumulates(spec: ModelSpec) -> dict[str, int]:
    """Multiply-accumulates for one image of `spec.image_size`, by the name of the weight they multiply with.

    The sum is what the papers call FLOPs; norms, activations and GRN are not counted, as there.
    """
    pixels = [height * width for height, width in spec.map_sizes()]
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in ConvNeXt(spec).named_parameters() if name.endswith("weight")}
    if spec.task == "detect":
        from . import detectors  # which loads much of PyTorch that nothing else needs

        pixels = [height * width for height, width in spec.map_sizes(padded_sides(spec.image_size))]
    counts = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue  # norms, GRN
        part, index = name.split(".")[:2]
        if part == "stages":
            positions = pixels[int(index)]
        elif part == "downsamples":
            positions = pixels[int(index) + 1]
        elif part == "stem":
            halved = name == "stem.convs.0.weight" and spec.stem != "patch"
            positions = math.prod(-(-side // 2) for side in spec.image_size) if halved else pixels[0]
        elif part == "segmenter":
            positions = upernet.positions(spec, name.removeprefix("segmenter."))
        elif part == "detector":
            positions = detectors.positions(spec, name.removeprefix("detector."))
        else:
            positions = 1  # the head sees one pooled vector
        counts[name] = positions * math.prod(shape)
    return counts


def share_of(spec: ModelSpec, operations: Collection[str]) -> float:
    """The part of the multiply-accumulates that is in the named operations (`stages.2.0.project`, `head`)."""
    counts = multiply_accumulates(spec)
    inside = sum(count for path, count in counts.items() if any(path.startswith(f"{name}.") for name in operations))
    return inside / sum(counts.values())
