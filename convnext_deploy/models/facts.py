"""What stands beside a checkpoint's tensors: preprocessing, labels, licence, and settings that shapes do not show.

Facts are a plain dictionary until they become a ModelSpec's fields, a Preprocessing and labels. They come from a
safetensors header, or from `config.json` and `preprocessor_config.json` as timm and transformers write them.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ..errors import WeightsError
from ..types import ModelSpec, Preprocessing
from .convnext import ACTIVATIONS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def understood(
    read: Callable[[Mapping[str, Any]], dict[str, Any]], text: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Facts as `read` finds them; a value of the wrong type or form is the file's fault, not ours."""
    try:
        return read(text)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise WeightsError(
            f"{where} cannot be understood ({error!r}); mend it, or load the weights file alone"
        ) from None


def metadata_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Facts in a safetensors header, as `scripts/train_demo.py` writes them."""
    facts: dict[str, Any] = {}
    if "image_size" in metadata:
        facts["input_size"] = [int(metadata["image_size"])] * 2
    for name in ("mean", "std"):
        if name in metadata:
            value = json.loads(metadata[name])
            facts[name] = value if isinstance(value, list) else [value]
    for name in ("interpolation", "license"):
        if name in metadata:
            facts[name] = metadata[name]
    for name in ("crop_pct", "labels"):
        if name in metadata:
            facts[name] = json.loads(metadata[name])
    return facts


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts in a `config.json` of timm or transformers: preprocessing, labels, licence, epsilon, activation."""
    timm_config = config.get("pretrained_cfg")
    if isinstance(timm_config, Mapping):
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
        facts = {name: timm_config[name] for name in names if timm_config.get(name) is not None}
        if "input_size" in timm_config:
            facts["input_size"] = list(timm_config["input_size"][-2:])
        if "test_input_size" in timm_config and timm_config.get("test_crop_pct"):
            facts["test"] = (list(timm_config["test_input_size"][-2:]), timm_config["test_crop_pct"])
        labels = timm_config.get("label_names") or config.get("label_names")
        if labels:
            facts["labels"] = list(labels)
        return facts | _timm_arguments(config.get("model_args") or {})
    facts = {}
    if config.get("model_type") in ("convnext", "convnextv2"):
        facts["head_norm_eps"] = float(config.get("layer_norm_eps", 1e-12))
        if config.get("hidden_act", "gelu") != "gelu":
            raise WeightsError(f"config.json asks for hidden_act {config['hidden_act']!r}; expected 'gelu'")
        if config.get("id2label"):
            facts["labels"] = [label for _, label in sorted(config["id2label"].items(), key=lambda i: int(i[0]))]
        if "image_size" in config:
            size = config["image_size"]
            facts["input_size"] = list(size) if isinstance(size, list) else [size] * 2
    elif "model_type" in config:
        raise WeightsError(f"config.json describes a {config['model_type']!r}; expected convnext or convnextv2")
    preprocessor = config.get("preprocessor")
    if isinstance(preprocessor, Mapping):
        for name, ours in (("image_mean", "mean"), ("image_std", "std"), ("crop_pct", "crop_pct")):
            if preprocessor.get(name) is not None:
                facts[ours] = preprocessor[name]
        filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
        if preprocessor.get("resample") in filters:
            facts["interpolation"] = filters[preprocessor["resample"]]
        size = preprocessor.get("size")
        edge = size.get("shortest_edge") if isinstance(size, Mapping) else size  # a number before transformers 4.26
        if edge is not None:
            facts["input_size"] = [edge] * 2
            if edge >= 384:  # transformers squashes from 384 pixels on and crops nothing
                facts |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return facts


def _timm_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `model_args` of timm's `config.json` change that tensors do not show."""
    facts: dict[str, Any] = {}
    if arguments.get("act_layer") is not None:
        if arguments["act_layer"] not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise WeightsError(f"config.json asks for act_layer {arguments['act_layer']!r}; expected one of {known}")
        facts["activation"] = arguments["act_layer"]
    if arguments.get("norm_eps") is not None:
        facts["norm_eps"] = facts["head_norm_eps"] = float(arguments["norm_eps"])
    if arguments.get("norm_layer") is not None:
        facts["norm"] = str(arguments["norm_layer"]).removesuffix("2d")
    for name, only in (("global_pool", "avg"), ("output_stride", 32)):
        if arguments.get(name, only) not in (only, ""):
            raise WeightsError(f"config.json asks for {name} {arguments[name]!r}; expected {only!r}")
    return facts


def with_facts(spec: ModelSpec, facts: Mapping[str, Any], where: str) -> ModelSpec:
    if facts.get("norm", spec.norm) != spec.norm:
        raise WeightsError(f"{where}: config.json asks for norm_layer {facts['norm']!r}; its tensors say {spec.norm!r}")
    hidden = ("activation", "norm_eps", "head_norm_eps")
    return msgspec.structs.replace(spec, **{name: facts[name] for name in hidden if name in facts})


def preprocessing_of(facts: Mapping[str, Any], spec: ModelSpec) -> Preprocessing:
    channels = spec.in_chans
    paper: dict[str, Any] = {
        "mean": IMAGENET_MEAN if channels == 3 else (0.5,) * channels,
        "std": IMAGENET_STD if channels == 3 else (0.5,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
    fields = {name: facts.get(name, value) for name, value in paper.items()}
    fields["crop_mode"] = facts.get("crop_mode", "center")  # not a guess: sources that use another say so
    if "test" in facts and list(spec.image_size) == facts["test"][0]:
        fields["crop_pct"] = facts["test"][1]
    assumed = tuple(name for name in paper if name not in facts)
    try:
        found = msgspec.convert({**fields, "assumed": assumed}, Preprocessing)
    except msgspec.ValidationError as error:
        raise WeightsError(f"the preprocessing given, or beside the checkpoint: {error}") from None
    if len(found.mean) != channels or len(found.std) != channels or not all(value > 0 for value in found.std):
        raise WeightsError(
            f"mean {found.mean} and std {found.std}; expected {channels} numbers each, one a channel, and no std of 0"
        )
    return found


def labels_of(facts: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...] | None:
    labels = facts.get("labels")
    if spec.task != "classify" or not labels:
        return None
    if len(labels) != spec.num_classes:
        raise WeightsError(
            f"{len(labels)} labels for {spec.num_classes} classes beside the checkpoint; mend its config"
        )
    return tuple(str(label) for label in labels)
