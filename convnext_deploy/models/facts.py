"""What stands beside a checkpoint's tensors: preprocessing, labels, licence, and settings that shapes do not show.

Facts are a plain dictionary until they become a ModelSpec's fields, a Preprocessing and labels. They come from a
safetensors header, or from `config.json` and `preprocessor_config.json` as timm and transformers write them.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ..arguments import shown
from ..errors import WeightsError, plain
from ..records.base import Problem
from ..records.manifest import ModelSpec, Preprocessing
from . import registry
from .labels import label_list, refuse_contradiction
from .open_clip import CONFIG, open_clip_facts
from .processor import processor_facts
from .provenance import joined, says_sides, sourced
from .segmenters import facts_in as segmenter_facts
from .timm_config import activation, is_timm, refuse_pooling, timm_facts
from .torchvision_detectors import facts_in as detector_facts

# Of transformers' models, and the epsilon where their config does not say it. It is the last norm's; DINOv3's is every
# norm's.
EPSILONS = {"convnext": 1e-12, "convnextv2": 1e-12, "dinov3_convnext": 1e-6}
# transformers' words for what a classifier's outputs mean.
PROBLEMS: dict[str, Problem] = {
    "single_label_classification": "single-label", "multi_label_classification": "multi-label",
    "regression": "regression",
}  # fmt: skip
SIZES = (("depths", "depths"), ("hidden_sizes", "dims"))  # transformers' names and this project's
NESTED = ("backbone_config", "vision_config", "encoder")  # where models around others say what is inside
OF_BACKBONES = (
    "model_type", "layer_norm_eps", "hidden_act", "depths", "hidden_sizes", "num_channels", "out_features",
)  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def understood(
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    text: Mapping[str, Any],
    where: str,
    cure: str = "mend it, or load the weights file alone",
) -> dict[str, Any]:
    """Facts as `read` finds them; a value of the wrong type or form is the file's fault, not ours."""
    try:
        return read(text)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, ArithmeticError) as error:
        raise WeightsError(f"{where} cannot be understood ({plain(error)}); {cure}") from None


def metadata_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Facts in a safetensors header, as `scripts/train_demo.py` writes them."""
    facts: dict[str, Any] = {}
    if "image_size" in metadata:
        size = json.loads(metadata["image_size"])
        facts["input_size"] = [int(side) for side in (size if isinstance(size, list) else [size] * 2)]
    for name in ("mean", "std"):
        if name in metadata:
            value = json.loads(metadata[name])
            facts[name] = value if isinstance(value, list) else [value]
    for name in ("interpolation", "license"):
        if name in metadata:
            facts[name] = metadata[name]
    if "crop_pct" in metadata:
        facts["crop_pct"] = json.loads(metadata["crop_pct"])
    if "labels" in metadata:
        facts["labels"] = label_list(json.loads(metadata["labels"]))
    if {"input_size", "mean", "std"} <= facts.keys():
        facts["global_pool"] = "avg"  # these facts are this project's own, and it has no other pooling
    return facts


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts in a `config.json` of timm or transformers: preprocessing, labels, licence, epsilon, activation."""
    if is_timm(config):
        return timm_facts(config)
    if isinstance(config.get("detector"), Mapping):
        return detector_facts(config["detector"])
    if isinstance(config.get("open_clip"), Mapping):
        facts = open_clip_facts(config["open_clip"])
        refuse_pooling(facts.pop("global_pool"), CONFIG)
        return facts | {"global_pool": "avg"}
    facts = {}
    kind, preprocessor = config.get("model_type"), config.get("preprocessor")
    nested = () if kind in EPSILONS else NESTED
    inner = next((config[name] for name in nested if isinstance(config.get(name), Mapping)), None)
    if inner is not None:
        if kind == "upernet":
            facts |= segmenter_facts(config)
            if config.get("id2label"):
                facts["labels"] = label_list(config["id2label"])
        if is_timm(inner):
            facts |= timm_facts(inner)
        # Of a detector or segmenter, whose labels and sizes are not its backbone's.
        config = {name: inner[name] for name in OF_BACKBONES if name in inner}
        kind = None if is_timm(inner) else f"{kind} with a backbone {config.get('model_type')}"
    if config.get("model_type") in EPSILONS:
        kind = config["model_type"]
        epsilon = float(config.get("layer_norm_eps", EPSILONS[kind]))
        facts |= {"head_norm_eps": epsilon, "activation": activation(config.get("hidden_act", "gelu"), "hidden_act")}
        facts |= {own: tuple(config[name]) for name, own in SIZES if isinstance(config.get(name), list)}
        if isinstance(config.get("num_channels"), int):
            facts["in_chans"] = config["num_channels"]
        facts["grn"] = kind == "convnextv2"
        facts["norm_eps"] = 1e-6  # of every norm but the last, which its code does not take from the configuration
        if kind == "dinov3_convnext":
            facts |= {"norm_eps": epsilon, "license": "dinov3-license"}
            facts |= _levels_of(config) if inner is not None or _is_backbone(config) else {}
        if config.get("id2label"):
            refuse_contradiction(config["id2label"], config.get("label2id"))
            facts["labels"] = label_list(config["id2label"])
        if config.get("problem_type") is not None:
            if config["problem_type"] not in PROBLEMS:
                raise WeightsError(
                    f"config.json has problem_type {config['problem_type']!r}; expected one of {', '.join(PROBLEMS)}"
                )
            facts["problem"] = PROBLEMS[config["problem_type"]]
        facts["global_pool"] = "avg"  # transformers has no other
        if "image_size" in config:
            size = config["image_size"]
            facts["input_size"] = list(size) if isinstance(size, list) else [size] * 2
    elif kind is not None:
        raise WeightsError(
            f"config.json describes a {kind!r}; expected {', '.join(EPSILONS)}, or a backbone of these; for a ConvNeXt "
            "in it give the file of weights with --weights, which leaves config.json out"
        )
    if not isinstance(preprocessor, Mapping):
        return facts
    if isinstance(preprocessor.get("pretrained_cfg"), Mapping):  # of transformers around timm, and no network's
        of_timm = timm_facts({"pretrained_cfg": preprocessor["pretrained_cfg"]})
        return joined(facts, sourced(of_timm, "the image processor's config"))
    return joined(facts, sourced(processor_facts(preprocessor), "the image processor's config"))


def _is_backbone(config: Mapping[str, Any]) -> bool:
    return str((config.get("architectures") or [""])[0]).endswith("Backbone")  # as transformers names its classes


def _levels_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which maps a backbone without norms gives, which tensors do not show."""
    stages = config.get("out_features")
    if not isinstance(stages, list):
        return {}
    return {"levels": tuple(sorted(int(name.removeprefix("stage")) for name in stages if name != "stem"))}


def with_facts(spec: ModelSpec, facts: Mapping[str, Any], where: str) -> ModelSpec:
    """With what the tensors do not show.

    Raises:
        WeightsError: what stands beside the tensors contradicts them.
    """
    stages = registry.stages_in(spec.depths)  # what stands beside a backbone that ends early says all four
    for name in ("depths", "dims", "kernel_sizes", "in_chans", "grn", "num_classes"):
        own, said = getattr(spec, name), facts.get(name)
        differs = said[:stages] != own[:stages] if isinstance(own, tuple) and said is not None else said != own
        if said is not None and differs and (name != "num_classes" or own):
            raise WeightsError(
                f"{where}: its configuration says {name} {said}, and its tensors {own}; mend one of them"
            )
    if facts.get("arch") is not None and not _is_arch(spec, facts["arch"]):
        raise WeightsError(
            f"{where}: its configuration says arch {facts['arch']!r}, and its tensors have depths {spec.depths} and "
            f"widths {spec.dims}; mend one of them"
        )
    if facts.get("norm", spec.norm) != spec.norm:
        raise WeightsError(
            f"{where}: beside it stands norm_layer {facts['norm']!r}; its tensors say {spec.norm!r}; mend one of them"
        )
    hidden = ("activation", "norm_eps", "head_norm_eps", "head")
    return msgspec.structs.replace(spec, **{name: facts[name] for name in hidden if name in facts})


def with_tokens(spec: ModelSpec, asked: bool) -> ModelSpec:
    """With the patch tokens where they are asked for.

    Raises:
        WeightsError: another task, or a head that does not norm a pooled vector and nothing more.
    """
    if asked and spec.task != "embed":
        raise WeightsError(f"--patch-tokens is for --task embed, not for {spec.task}; --task features gives maps")
    if asked and (spec.head != "pool_norm" or spec.head_hidden):
        raise WeightsError("--patch-tokens: the head norms before it pools, or has a linear; use --task features")
    return msgspec.structs.replace(spec, patch_tokens=asked)


def _is_arch(spec: ModelSpec, arch: str) -> bool:
    """Whether mmpretrain's short name of an architecture has these depths and widths."""
    known = [
        registry.VARIANTS[name] for name in (f"convnext_{arch}", f"convnextv2_{arch}") if name in registry.VARIANTS
    ]
    stages = registry.stages_in(spec.depths)
    own = (spec.depths[:stages], spec.dims[:stages])
    return not known or any(own == (one["depths"][:stages], one["dims"][:stages]) for one in known)


def with_problem(spec: ModelSpec, said: Problem | None, asked: Problem | None, where: str) -> ModelSpec:
    """With what the outputs mean, as the checkpoint or the user says it.

    Raises:
        WeightsError: they contradict each other, or the outputs cannot mean that.
    """
    if spec.task != "classify":
        if asked is not None:
            raise WeightsError(f"--problem {asked} is for a classifier's outputs, not for --task {spec.task}")
        return spec
    if said == "multi-label" and spec.num_classes == 1:
        said = "binary"  # a loss of one logit, which transformers computes as one of several
    if asked is not None and said not in (None, asked):
        raise WeightsError(f"--problem {asked}, and config.json beside {where} says {said}; leave the option out")
    problem = asked or said
    if problem == "binary" and spec.num_classes != 1:
        raise WeightsError(f"--problem binary is for one output, and {where} has {spec.num_classes}; leave it out")
    if problem in ("single-label", "multi-label") and spec.num_classes == 1:
        raise WeightsError(f"{where} has one output and is said to be {problem}; expected binary or regression")
    return msgspec.structs.replace(spec, problem=problem)


def preprocessing_of(
    facts: Mapping[str, Any], spec: ModelSpec, silent: Mapping[str, Any] | None = None
) -> Preprocessing:
    """The preprocessing that facts describe; what they leave open is the paper's, and named in `assumed`.

    Two names there are no fields of a Preprocessing: `image_size`, and `global_pool` of a classifier or embedding.

    Args:
        silent: what the source's own code does where nothing is said, in the paper's place.

    Raises:
        WeightsError: values of another form, or mean and std of another number of channels or in 0..255.
    """
    channels = spec.in_chans
    paper: dict[str, Any] = {
        "mean": IMAGENET_MEAN if channels == 3 else (0.5,) * channels,
        "std": IMAGENET_STD if channels == 3 else (0.5,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if spec.task in ("segment", "detect") else 0.875,
    } | dict(silent or {})
    fields = {name: facts.get(name, value) for name, value in paper.items()}
    # Not a guess: sources that use another say so, and a segmenter takes whole images.
    fields["crop_mode"] = facts.get("crop_mode", "squash" if spec.task == "segment" else "center")
    fields["exif_orientation"] = facts.get("exif_orientation", False)  # as the loaders of training scripts
    if "test" in facts and list(spec.image_size) == facts["test"][0]:
        fields["crop_pct"] = facts["test"][1]
    hidden = [("image_size", "input_size"), *([] if spec.has_maps else [("global_pool", "global_pool")])]
    assumed = [name for name in paper if name not in facts] + [name for name, fact in hidden if fact not in facts]
    if says_sides(facts):
        assumed = [name for name in assumed if name != "image_size"]
    for name in ("mean", "std"):
        value = fields[name]
        if isinstance(value, (int, float)):
            value = [value]
        fields[name] = tuple(value) * channels if isinstance(value, (list, tuple)) and len(value) == 1 else value
    stds = fields["std"] if isinstance(fields["std"], (list, tuple)) else ()
    if any(isinstance(value, (int, float)) and not 0 < value < math.inf for value in stds):
        raise WeightsError(f"std {shown(list(stds))}; expected no std of 0 or below")
    try:
        preprocessing = msgspec.convert({**fields, "assumed": tuple(assumed)}, Preprocessing)
    except msgspec.ValidationError as error:
        raise WeightsError(f"the preprocessing given, or beside the checkpoint: {plain(error)}") from None
    _check_normalization(preprocessing, channels)
    return preprocessing


def _check_normalization(steps: Preprocessing, channels: int) -> None:
    if len(steps.mean) != channels or len(steps.std) != channels:
        remedy = "give --mean and --std with one number a channel"
        if channels == 1 and len(steps.mean) == len(steps.std) == 3:
            mean, std = sum(steps.mean) / 3, sum(steps.std) / 3
            remedy = f"for grey images give their averages, --mean {mean:.3g} --std {std:.3g}"
        raise WeightsError(
            f"mean {_words(steps.mean)} and std {_words(steps.std)} for {channels} channels; expected {channels} "
            f"numbers each; {remedy}"
        )
    if all(0 <= value <= 1 for value in steps.mean) and max(steps.std) <= 1:
        return
    cure = []
    for name, values in (("mean", steps.mean), ("std", steps.std)):
        if max(values) > 1:
            cure.append(f"--{name} {_words(tuple(value / 255 for value in values))}")
    raise WeightsError(
        f"mean {_words(steps.mean)} and std {_words(steps.std)}; expected values in [0, 1], because pixels are divided "
        "by 255 first" + (f": give {' '.join(cure)}, which is those divided by 255" if cure else "")
    )


def _words(values: tuple[float, ...]) -> str:
    """As an option takes them."""
    return ",".join(f"{value:.6g}" for value in values)
