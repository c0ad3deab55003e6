"""What a training script's checkpoint contains beside its weights: its arguments, and the names of the classes."""

import argparse
from collections.abc import Mapping
from typing import Any

from ..errors import WeightsError
from ..records.manifest import ModelSpec
from .facts import IMAGENET_MEAN, IMAGENET_STD
from .labels import held
from .provenance import joined, sourced
from .timm_config import argument_facts, refuse_pooling, refuse_stride

ARGUMENTS = "args"  # of timm's, the papers' and torchvision's scripts
SETTINGS = (ARGUMENTS, "hyper_parameters", "hparams", "config", "cfg")  # and Lightning's, and people's own
_SIZES = ("input_size", "img_size", "image_size", "val_crop_size")  # as timm's script, the first goes before the second
# Of the papers' scripts, and timm's.
_SHAPES = (("nb_classes", "num_classes"), ("num_classes", "num_classes"), ("in_chans", "in_chans"))
_POOLINGS = ("max", "avgmax", "catavgmax")  # timm's others, in settings of any name
_STRIDES = ("output_stride", "encoder_output_stride")  # the latter is segmentation_models_pytorch's
_MODEL_ARGUMENTS = ("model_kwargs", "model_args")  # what timm's script, and people's own, give its constructor
_OF_PAPERS = "imagenet_default_mean_and_std"  # an argument of the papers' scripts alone
_INCEPTION = [0.5, 0.5, 0.5]  # timm's IMAGENET_INCEPTION_MEAN and _STD
_WARPED_FROM = 384  # pixels, in the papers' scripts
HELD = "held labels"  # a fact: lists of names that may be those of the outputs, each with what it is called


def settings_in(content: Mapping[Any, Any]) -> list[tuple[str, Mapping[Any, Any]]]:
    """The dictionaries of settings in a checkpoint's content, with their names."""
    settings = [(name, content.get(name)) for name in SETTINGS]
    plain = [(name, vars(value) if isinstance(value, argparse.Namespace) else value) for name, value in settings]
    return [(name, value) for name, value in plain if isinstance(value, Mapping)]


def held_facts(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Facts in the settings, each with its place, and the lists of class names."""
    facts: dict[str, Any] = {}
    settings = settings_in(content)
    for name, values in reversed(settings):
        facts = joined(facts, sourced(training_facts(values, name), f"the checkpoint's {name}"))
    meta = content.get("meta")
    places: list[Mapping[Any, Any]] = [content, *(values for _, values in settings)]
    if isinstance(meta, Mapping):
        inner = meta.get("dataset_meta")
        places += [meta, *([inner] if isinstance(inner, Mapping) else [])]
    names = list(held(places))
    return facts | {HELD: names} if names else facts


def training_facts(arguments: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Facts among the arguments of a training script. In settings of another name the same words may mean other things.

    Of timm's (`img_size` or `input_size`, `mean`, `std`, `crop_pct`, `interpolation`, `gp`, `model_kwargs`), of the
    papers' repository (`_of_papers`) and of torchvision's references (`val_crop_size`, `val_resize_size`,
    `interpolation`).
    """
    facts: dict[str, Any] = {}
    if isinstance(arguments.get("gp"), str):
        refuse_pooling(arguments["gp"], f"the checkpoint's {where}.gp")
        facts["global_pool"] = "avg"
    if arguments.get("global_pool") in _POOLINGS:
        refuse_pooling(arguments["global_pool"], f"the checkpoint's {where}")
    for name in _STRIDES:
        if isinstance(arguments.get(name), int):
            refuse_stride(arguments[name], f"the checkpoint's {where}.{name}")
    for name in _MODEL_ARGUMENTS:
        if isinstance(arguments.get(name), Mapping):
            facts |= argument_facts(arguments[name], f"the checkpoint's {where}.{name}")
    for name in ("mean", "std", "crop_pct"):
        if arguments.get(name) and (where == ARGUMENTS or _are_numbers(arguments[name])):
            facts[name] = arguments[name]
    if isinstance(arguments.get("crop_mode"), str):
        facts["crop_mode"] = arguments["crop_mode"]
    if arguments.get("interpolation") in ("bicubic", "bilinear", "nearest", "lanczos"):  # timm has "random" too
        facts["interpolation"] = arguments["interpolation"]
    size: Any = next((arguments[name] for name in _SIZES if arguments.get(name)), None)
    if size is not None and (where == ARGUMENTS or _are_numbers(size)):
        facts["input_size"] = [int(side) for side in size[-2:]] if isinstance(size, (list, tuple)) else [int(size)] * 2
    if where == ARGUMENTS:
        facts |= {fact: arguments[name] for name, fact in _SHAPES if isinstance(arguments.get(name), int)}
    if isinstance(arguments.get(_OF_PAPERS), bool):
        facts |= _of_papers(arguments, facts.get("input_size"))
    resized, cropped = arguments.get("val_resize_size"), arguments.get("val_crop_size")
    if resized and cropped and _are_numbers([resized, cropped]):
        facts["crop_pct"] = min(cropped / resized, 1.0)
    return facts


def _of_papers(arguments: Mapping[Any, Any], sides: list[int] | None) -> dict[str, Any]:
    """How the papers' repositories prepare images to evaluate (`datasets.py` of ConvNeXt and of ConvNeXt-V2).

    They resize the shorter side bicubically and crop, and from 384 pixels on they squash whole images.
    """
    facts: dict[str, Any] = {"interpolation": "bicubic"}
    if not arguments[_OF_PAPERS]:
        facts |= {"mean": _INCEPTION, "std": _INCEPTION}
    else:
        facts |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    if sides is not None and sides[0] >= _WARPED_FROM:
        facts |= {"crop_pct": 1.0, "crop_mode": "squash"}
    elif sides is not None and not arguments.get("crop_pct"):
        facts["crop_pct"] = 224 / 256
    return facts


def with_held_labels(facts: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """With the names of the outputs that the checkpoint contains, where one of its lists has as many as there are.

    Raises:
        WeightsError: another list has the same names in another order.
    """
    if "labels" in facts or spec.task != "classify":
        return facts
    lists = [(name, labels) for name, labels in facts.get(HELD, ()) if len(labels) == spec.num_classes]
    if not lists:
        return facts
    (name, labels), *others = lists
    differing = next((other for other in others if set(other[1]) == set(labels) and other[1] != labels), None)
    if differing is not None:
        first = next(index for index, label in enumerate(labels) if label != differing[1][index])
        raise WeightsError(
            f"the checkpoint has the class {labels[first]!r} at number {first} in {name} and "
            f"{differing[1][first]!r} there in {differing[0]}; remove the list that is wrong"
        )
    return joined(facts, sourced({"labels": labels}, f"the checkpoint's {name}"))


def _are_numbers(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(values) and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)
