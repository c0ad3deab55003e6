"""ConvNeXts as other libraries build them, filled from the tensors of a checkpoint's files.

Each function takes the tensors by the names of the library's own layout, the configuration beside them, and what was
loaded of them. It returns the library's module, and how it is called for the outputs of the task.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..records.manifest import ModelSpec

if TYPE_CHECKING:
    from ..models.checkpoint import Loaded

State = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Call = Callable[[Any, Tensor], Outputs]
Built = tuple[nn.Module, Call]


class NotBuilt(Exception):
    """A library has no model for the tensors, in words."""


def timm_model(state: State, config: Mapping[str, Any], loaded: "Loaded") -> Built:
    """timm's model, for its own files, the official layouts and open_clip's towers.

    Raises:
        NotBuilt: the head is another's, or names are not in both.
    """
    import timm
    from timm.models import convnext

    spec = loaded.model.spec
    state, norms = _split_level_norms(_in_official_names(state), spec)
    # Linears as 1x1 convolutions: timm's filter would look for their shapes in a model, which is not made yet.
    wide = {k: v[..., None, None] if v.ndim == 2 and ("pwconv" in k or ".mlp.fc" in k) else v for k, v in state.items()}
    state = convnext.checkpoint_filter_fn(wide, None)
    name = config.get("architecture") or loaded.model.spec.architecture
    arguments: dict[str, Any] = {**(config.get("model_args") or {})}
    head = state.get("head.fc.weight", state.get("head.fc.fc2.weight"))
    if head is None and spec.task == "classify":
        raise NotBuilt("the head is not timm's own")
    if head is not None and "head.fc.bias" not in state:
        state["head.fc.bias"] = torch.zeros(len(head))  # open_clip projects without one
    arguments |= {"num_classes": 0 if head is None else len(head), "in_chans": state["stem.0.weight"].shape[1]}
    with torch.device("meta"):  # it is filled below: initializing it takes longer than running it
        if not timm.is_model(name):
            model: nn.Module = convnext.ConvNeXt(**_arguments(state), **arguments)
        else:
            model = timm.create_model(name, pretrained=False, **arguments)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    state = {k: v.reshape(shapes[k]) if ".mlp.fc" in k and k in shapes else v for k, v in state.items()}
    lacking = model.load_state_dict(state, strict=spec.task != "features", assign=True)
    absent = ("head.", *(f"stages.{stage}." for stage, depth in enumerate(spec.depths) if not depth))
    if lacking.unexpected_keys or not all(name.startswith(absent) for name in lacking.missing_keys):
        raise NotBuilt(f"{(*lacking.unexpected_keys, *lacking.missing_keys)[:4]} are not in it and in the file")

    def call(model: Any, images: Tensor) -> Outputs:
        if spec.task == "classify":
            return (model(images),)
        if spec.task == "embed":
            map = model.forward_features(images)
            vector = model.forward_head(map, pre_logits=True)
            return (vector, model.head.norm(map).flatten(2).mT) if spec.patch_tokens else (vector,)
        maps, x = [], model.stem(images)
        for stage in model.stages[: spec.stages]:
            x = stage(x)
            maps.append(x)
        return tuple(_normed(maps[level - 1], norms.get(level)) for level in spec.levels)

    return model, call


def _in_official_names(state: State) -> State:
    """mmpretrain's names as those of the official code, and those of `features_only` as those of the whole model."""
    names = {"depthwise_conv": "dwconv", "pointwise_conv1": "pwconv1", "pointwise_conv2": "pwconv2"}
    renamed = {}
    for name, value in state.items():
        joined = re.sub(r"^(stem|stages)_(\d)", r"\1.\2", name)
        renamed[".".join(names.get(part, part) for part in joined.split("."))] = value
    return renamed


def _split_level_norms(state: State, spec: ModelSpec) -> tuple[State, dict[int, dict[str, Tensor]]]:
    """What of the official names is no norm of a map, and these norms by level, which the detection code adds."""
    rest, norms = {}, dict[int, dict[str, Tensor]]()
    for name, value in state.items():
        level = re.fullmatch(r"norm([0-3])\.(weight|bias)", name)
        if level is None:
            rest[name] = value
        elif spec.task == "features" and spec.level_norms:
            norms.setdefault(int(level[1]) + 1, {})[level[2]] = value
        else:
            rest[f"norm.{level[2]}"] = value  # of a classifier, which has the last only
    return rest, norms


def _normed(x: Tensor, norm: dict[str, Tensor] | None) -> Tensor:
    if norm is None:
        return x
    channels = x.shape[1]
    return F.layer_norm(x.permute(0, 2, 3, 1), (channels,), norm["weight"], norm["bias"], 1e-6).permute(0, 3, 1, 2)


def _arguments(state: State) -> dict[str, Any]:
    """timm's arguments for an architecture without a name, from the tensors themselves."""
    blocks = [re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.weight", name) for name in state]
    counts = [len([match for match in blocks if match and match[1] == str(stage)]) for stage in range(4)]
    held = [stage for stage in range(4) if counts[stage]]  # others are there, as small as can be, and are not run
    depthwise = [state[f"stages.{stage}.blocks.0.conv_dw.weight"] for stage in held]
    lacking = 4 - len(held)
    if state["stem.0.weight"].shape[-1] != 4:
        raise NotBuilt("an overlapping stem of no published architecture")
    hidden = state.get("head.pre_logits.fc.weight")
    return {
        "depths": tuple(max(count, 1) for count in counts),
        "dims": (*(weight.shape[0] for weight in depthwise), *(8,) * lacking),
        "kernel_sizes": (*(weight.shape[-1] for weight in depthwise), *(7,) * lacking),
        "ls_init_value": 1e-6 if "stages.0.blocks.0.gamma" in state else None,
        "use_grn": "stages.0.blocks.0.mlp.grn.weight" in state,
        "head_hidden_size": None if hidden is None else len(hidden),
        "head_norm_first": "norm_pre.weight" in state,
    }


def torchvision_model(state: State, config: Mapping[str, Any], loaded: "Loaded") -> Built:
    """torchvision's model; its widths and depths are the file's.

    Raises:
        NotBuilt: the file has no classifier.
    """
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    spec = loaded.model.spec
    if "0.0.weight" in state:
        state = {f"features.{name}": value for name, value in state.items()}
    held = [stage for stage in (1, 3, 5, 7) if f"features.{stage}.0.block.0.weight" in state]
    counts = [len({name.split(".")[2] for name in state if name.startswith(f"features.{stage}.")}) for stage in held]
    dims = [len(state[f"features.{stage}.0.block.0.weight"]) for stage in held]
    head = state.get("classifier.2.weight")
    if head is None and spec.task != "features":
        raise NotBuilt("its model has a classifier, the file has none")
    stages = [CNBlockConfig(*stage) for stage in zip(dims, [*dims[1:], None], counts, strict=True)]
    model = ConvNeXt(stages, num_classes=1 if head is None else len(head))
    part, features = (model, "") if head is not None else (model.features, "features.")
    part.load_state_dict(
        {name.removeprefix(features): value for name, value in state.items()}, strict=True, assign=True
    )

    def call(model: Any, images: Tensor) -> Outputs:
        if spec.task == "classify":
            return (model(images),)
        if spec.task == "embed":
            if spec.patch_tokens:
                raise NotBuilt("its ConvNeXt returns no patch tokens")
            return (model.classifier[:2](model.avgpool(model.features(images))),)
        maps, x = [], images
        for index, part in enumerate(model.features):
            x = part(x)
            if index % 2:
                maps.append(x)
        return tuple(maps[level - 1] for level in spec.levels)

    return model, call


def transformers_model(state: State, config: Mapping[str, Any], loaded: "Loaded") -> Built:
    """transformers' model, from its configuration or, where there is none, from the spec of what was loaded.

    Raises:
        NotBuilt: the head is another's, this release has no such model, or names are not in both.
    """
    import transformers

    spec = loaded.model.spec
    second, third = (
        any(".grn." in name for name in state),
        "stages.0.downsample_layers.0.weight" in {name.removeprefix("model.") for name in state},
    )
    kind = "ConvNextV2" if second else "DINOv3ConvNext" if third else "ConvNext"
    levels = sorted({int(name.split("stage")[1][0]) for name in state if name.startswith("hidden_states_norms.")})
    nested = config.get("backbone_config")
    config = nested if isinstance(nested, Mapping) and "depths" not in config else config
    left = ("preprocessor", "architectures", "id2label", "label2id", "num_labels", "out_features", "out_indices")
    own = {name: value for name, value in config.items() if name not in left}
    if not own:
        own = {"depths": list(spec.depths), "hidden_sizes": list(spec.dims)}
    own["num_channels"] = spec.in_chans
    classifier = state.get("classifier.weight")
    if classifier is None and spec.task == "classify":
        raise NotBuilt("the head is not transformers' own")
    if classifier is not None:
        own["num_labels"] = len(classifier)
    if levels:
        own["out_features"] = [f"stage{level}" for level in levels]
    form = "Backbone" if levels else "Model" if classifier is None else "ForImageClassification"
    for name in (f"{kind}Config", kind + form):
        if not hasattr(transformers, name):
            raise NotBuilt(f"this release has no {name}; update it")
    made = getattr(transformers, f"{kind}Config")(**own)
    model = getattr(transformers, kind + form)(made)
    if third:
        inside = "model." if "model.stages.0.layers.0.gamma" in model.state_dict() else ""  # releases differ
        bare = {name.removeprefix("model."): value for name, value in state.items()}
        state = {name if name.startswith("layer_norm.") else f"{inside}{name}": value for name, value in bare.items()}
    elif classifier is None:
        state = {re.sub(r"^convnext(v2)?\.", "", name): value for name, value in state.items()}
    lacking = model.load_state_dict(state, strict=spec.task != "features", assign=True)
    if lacking.unexpected_keys or not all(
        name.startswith(("layernorm.", "layer_norm.")) for name in lacking.missing_keys
    ):
        raise NotBuilt(f"{(*lacking.unexpected_keys, *lacking.missing_keys)[:4]} are not in it and in the file")

    def call(model: Any, images: Tensor) -> Outputs:
        if spec.task == "classify":
            return (model(images).logits,)
        if levels:
            maps = dict(zip(levels, model(images).feature_maps, strict=True))
            return tuple(maps[level] for level in spec.levels)
        body = model if third else model.base_model
        outputs = body(images, output_hidden_states=True)
        if spec.task == "embed":
            if not spec.patch_tokens:
                return (outputs.pooler_output,)
            if not third:
                raise NotBuilt("its ConvNeXt returns no patch tokens")
            return (outputs.pooler_output, outputs.last_hidden_state[:, 1:])
        return tuple(outputs.hidden_states[-4:][level - 1] for level in spec.levels)

    return model, call


def upernet(state: State, config: Mapping[str, Any], loaded: "Loaded") -> Built:
    """transformers' UPerNet, from its configuration or, where there is none, from the spec of what was loaded.

    Raises:
        NotBuilt: the head has other names, or names are not in both.
    """
    import transformers

    spec = loaded.model.spec
    assert spec.segmentation is not None
    roots = [
        name.removesuffix("decode_head.classifier.weight")
        for name in state
        if name.endswith("decode_head.classifier.weight")
    ]
    if len(roots) != 1:
        raise NotBuilt("the head has other names than transformers'")
    state = {name.removeprefix(roots[0]): value for name, value in state.items() if name.startswith(roots[0])}
    own = {name: value for name, value in config.items() if name not in ("preprocessor", "architectures")}
    if not isinstance(own.get("backbone_config"), Mapping):
        backbone = {
            "model_type": "convnextv2" if spec.grn else "convnext",
            "depths": list(spec.depths),
            "hidden_sizes": list(spec.dims),
            "out_features": [f"stage{level}" for level in spec.levels],
        }
        own = {"backbone_config": backbone, "hidden_size": spec.segmentation.channels}
        own["pool_scales"] = list(spec.segmentation.pool_scales)
        own["num_labels"] = spec.num_classes
    own["backbone_config"] = dict(own["backbone_config"]) | {"num_channels": spec.in_chans}
    made = transformers.UperNetConfig(**own)
    made.use_auxiliary_head = False
    model = transformers.UperNetForSemanticSegmentation(made)
    kept = {name: value for name, value in state.items() if not name.startswith("auxiliary_head.")}
    lacking = model.load_state_dict(kept, strict=False, assign=True)
    missing = [name for name in lacking.missing_keys if not name.endswith("num_batches_tracked")]
    if lacking.unexpected_keys or missing:
        raise NotBuilt(f"{(*lacking.unexpected_keys, *missing)[:4]} are not in it and in the file")

    def call(model: Any, images: Tensor) -> Outputs:
        return (model.decode_head(model.backbone(images).feature_maps),)

    return model, call


BUILDERS: dict[str, Callable[[State, Mapping[str, Any], "Loaded"], Built]] = {  # by the library's name
    "timm": timm_model, "torchvision": torchvision_model, "transformers": transformers_model,
}  # fmt: skip
