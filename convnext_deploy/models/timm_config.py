"""What a `config.json` of timm says, in each form that it has: its own, an older flat one, and transformers' wrapper's.

Facts follow timm 1.0.31 (`timm/models/_hub.py`) and transformers 5.23 (`models/timm_wrapper`, `models/timm_backbone`).
"""

from collections.abc import Mapping
from typing import Any

from ..errors import WeightsError
from . import registry
from .convnext import ACTIVATIONS
from .labels import label_list

WRAPPERS = ("timm_wrapper", "timm_backbone")  # of transformers, around timm's models
_PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "license")
# Other names of the activations that are computed here, in timm and in transformers.
SYNONYMS = {
    "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
}  # fmt: skip


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether it is a configuration of timm, or of transformers around timm."""
    if config.get("model_type") in WRAPPERS or isinstance(config.get("pretrained_cfg"), Mapping):
        return True
    return "model_type" not in config and isinstance(config.get("architecture"), str)


def timm_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing, labels, licence, and what the network is.

    Raises:
        WeightsError: another network than a ConvNeXt, or an activation, pooling or stride that is not computed here.
    """
    nested = config.get("pretrained_cfg")
    said = nested if isinstance(nested, Mapping) else config
    facts = {name: said[name] for name in _PREPROCESSING if said.get(name) is not None}
    if said.get("interpolation") not in (None, "random"):  # which is of training
        facts["interpolation"] = said["interpolation"]
    if said.get("input_size"):
        facts["input_size"] = list(said["input_size"][-2:])
    if said.get("test_input_size") and said.get("test_crop_pct"):
        facts["test"] = (list(said["test_input_size"][-2:]), said["test_crop_pct"])
    labels = said.get("label_names") or config.get("label_names")
    if labels:
        facts["labels"] = label_list(labels)
    if config.get("num_classes") is not None and config.get("model_type") != "timm_backbone":
        facts["num_classes"] = config["num_classes"]
    indices = config.get("out_indices")
    if config.get("model_type") == "timm_backbone" and indices is not None:
        levels = [index % 4 + 1 for index in ([indices] if isinstance(indices, int) else indices)]
        facts["levels"] = tuple(sorted(levels))
    refuse_pooling(config.get("global_pool"), "config.json")
    arguments = config.get("model_args") or {}
    if "" in (config.get("global_pool"), arguments.get("global_pool")):
        facts["pooled"] = False
    if config.get("global_pool") or "model_args" in config or config.get("do_pooling"):
        facts["global_pool"] = "avg"
    network = _network(config.get("architecture") or config.get("backbone"), arguments)
    return facts | network | argument_facts(arguments, "config.json")


def _network(architecture: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's name of an architecture stands for, as far as the arguments do not say otherwise."""
    name = str(architecture or "").partition(".")[0]
    if name.startswith(registry.OTHERS):
        raise WeightsError(f"config.json describes a {name!r}; expected a ConvNeXt")
    known = registry.VARIANTS.get(name)
    if known is None:
        return {}
    facts: dict[str, Any] = {"architecture": name, "depths": known["depths"], "dims": known["dims"]}
    facts["grn"] = arguments.get("use_grn", known.get("grn", False))
    for field in ("depths", "dims"):
        if isinstance(arguments.get(field), list):
            facts[field] = tuple(arguments[field])
    kernels = arguments.get("kernel_sizes", known.get("kernel_sizes", (7, 7, 7, 7)))
    facts["kernel_sizes"] = (kernels,) * 4 if isinstance(kernels, int) else tuple(kernels)
    return facts


def argument_facts(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What arguments of timm's constructor (`model_args`, `--model-kwargs`) change that tensors do not show.

    Args:
        where: what contains them, in an error.

    Raises:
        WeightsError: an activation, a pooling or a stride that is not computed here.
    """
    facts: dict[str, Any] = {}
    if arguments.get("act_layer") is not None:
        facts["activation"] = activation(arguments["act_layer"], "act_layer", where)
    if arguments.get("norm_eps") is not None:
        facts["norm_eps"] = facts["head_norm_eps"] = float(arguments["norm_eps"])
    if arguments.get("norm_layer") is not None:
        facts["norm"] = str(arguments["norm_layer"]).removesuffix("2d")
    refuse_pooling(arguments.get("global_pool"), where)
    refuse_stride(arguments.get("output_stride"), where)
    return facts


def activation(name: Any, field: str, where: str = "config.json") -> str:
    """The activation that is called so.

    Raises:
        WeightsError: one that is not computed here.
    """
    synonym = SYNONYMS.get(str(name), str(name))
    if synonym not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *SYNONYMS))
        raise WeightsError(f"{where} asks for {field} {name!r}; expected one of {known}")
    return synonym


def refuse_pooling(pooling: Any, where: str) -> None:
    """Refuse what is not the average over all pixels; "fast" and "fastavg" are that too, and "" is none at all.

    Raises:
        WeightsError: another pooling.
    """
    if pooling not in (None, "", "avg", "fast", "fastavg"):
        raise WeightsError(f"{where} asks for global_pool {pooling!r}; expected 'avg'")


def refuse_stride(stride: Any, where: str) -> None:
    """Refuse a network whose last stages are dilated, which tensors do not show.

    Raises:
        WeightsError: another stride than 32.
    """
    if stride not in (None, "", 32):
        raise WeightsError(f"{where} asks for output_stride {stride!r}; expected 32, because no stage is dilated here")
