"""What an argument's name means, which is the same in every public function that has it."""

import math
from collections.abc import Callable
from typing import Any, get_args

from . import arguments
from .records.base import Device, InputKind, KernelChoice, PlanType, Precision, Problem, Task
from .records.manifest import HeadActivation, TensorRtSpec
from .records.plan import RangeMethod, WeightBits


def _is_one_of(words: Any) -> Callable[[str, Any], Any]:
    return lambda name, value: arguments.one_of(name, value, words)


def _is_told(*told: str) -> Callable[[str, Any], Any]:
    return lambda name, value: arguments.called(name, value, told)


# What one name means in every function that has it. None is for the names that may be left open.
_OPEN = {
    "variant", "image_size", "num_classes", "in_chans", "weights_key", "preprocessing", "precision", "rest", "device",
    "levels", "head_activation", "threads",
    "split", "limit", "problem", "max_drop", "tensorrt", "weight_bits", "images", "ray",
}  # fmt: skip
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "variant": arguments.text,
    "format": arguments.text,
    "task": _is_one_of(Task),
    "levels": arguments.levels,
    "head_activation": _is_one_of(HeadActivation),
    "input": _is_one_of(InputKind),
    "problem": _is_one_of(Problem),
    "class_order": _is_one_of(("torchvision", "timm")),
    "precision": _is_one_of(Precision),
    "rest": _is_one_of(Precision),
    "device": _is_one_of(Device),
    "kernels": _is_one_of(KernelChoice),
    "trt": _is_one_of(("auto", "tensorrt", "rtx")),
    "target": arguments.text,
    "type": _is_one_of(PlanType),
    "method": _is_one_of(RangeMethod),
    "image_size": arguments.image_size,
    "num_classes": lambda name, value: arguments.whole(name, value, 0),
    "in_chans": arguments.whole,
    "weights_key": arguments.text,
    "split": arguments.text,
    "ray": arguments.text,
    "title": arguments.text,
    "preprocessing": arguments.preprocessing,
    "threads": arguments.whole,
    "limit": arguments.whole,
    "steps": arguments.whole,
    "images": arguments.whole,
    "weight_bits": lambda name, value: arguments.one_number(name, value, get_args(WeightBits)),
    "max_drop": lambda name, value: arguments.number(name, value, 0, 100, "percentage points above 0 and at most 100"),
    "alpha": lambda name, value: arguments.number(
        name, value, 0, math.nextafter(0.5, 0), "a chance above 0 and below 0.5"
    ),
    "force": arguments.flag,
    "trust": arguments.flag,
    "rounding": arguments.flag,
    "cuda_graph": arguments.flag,
    "dynamic_image_size": arguments.flag,
    "argmax": arguments.flag,
    "reduce_labels": arguments.flag,
    "patch_tokens": arguments.flag,
    "say": _is_told("a line"),
    "watch": _is_told("a workflows.agenda.View"),
    "ready": _is_told("the server"),
    "tensorrt": lambda name, value: arguments.record(
        name, value, TensorRtSpec, "a records.manifest.TensorRtSpec or its fields"
    ),
}


def check(**given: Any) -> None:
    """Refuse the first argument that is not what its name means."""
    for name, value in given.items():
        if value is not None or name not in _OPEN:
            _READERS[name](name, value)
