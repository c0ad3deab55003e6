"""The source's own implementation as the judge of what was loaded: timm, transformers or torchvision, from the file.

Everything after loading is compared with this package's own module. Whether that module is the checkpoint's is
compared here, before any rewrite, with a model that another library builds and fills from the same files: its keys,
its architecture, its epsilon, and, where its configuration stands beside the weights, its preprocessing.
"""

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..artifact import deviation
from ..data import preprocess
from ..env import missing
from ..errors import ParityError, plain
from ..models import beside
from ..models.files import read_file
from ..models.names import LAYOUTS
from ..records.manifest import ModelSpec, OracleRecord
from . import detector_oracle

if TYPE_CHECKING:
    from ..models.checkpoint import Loaded, Origin
    from ..models.convnext import ConvNeXt

LIMIT = 1e-5  # relative, fp32: all architectures of all layouts measure at most 7e-7 (tests/models/test_layouts.py)
# Of normalized pixels: timm's own transform takes the same steps, transformers resizes with another library, whose
# pixels differ by a level or two at edges.
PIXELS = {"timm": 1e-5, "transformers": 0.05}  # the mean difference
LIBRARIES = {
    "timm": "timm", "timm_features": "timm", "official": "timm", "dinov3": "timm", "mmpretrain": "timm",
    "open_clip": "timm", "torchvision": "torchvision", "torchvision_features": "torchvision",
    "transformers": "transformers", "dinov3_transformers": "transformers",
}  # fmt: skip
PHOTOGRAPHS = 2

State = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


def judge(loaded: "Loaded", images: NDArray[np.float32], found: tuple[NDArray[np.float32], ...]) -> OracleRecord:
    """Compare a loaded checkpoint with its own library's model.

    Args:
        images: normalized, (N, C, H, W).
        found: this package's outputs on them, before any rewrite.

    Raises:
        ParityError: they differ, in outputs, preprocessing or labels.
    """
    origin = loaded.origin
    if origin is None:
        return _self("random weights have no other source")
    library = "transformers" if loaded.model.spec.task == "segment" else LIBRARIES.get(origin.layout)
    if library is None:
        return _self(f"no library is known for the layout {origin.layout}")
    if missing((library,)):
        return _self(f"{library} is not installed")
    try:
        state = _read(origin.files, origin.key)
        if loaded.model.spec.task == "segment":
            model, call = _upernet(state, origin.config, loaded)
        elif loaded.model.spec.task == "detect":
            model, call = _detector(state, origin, library, loaded)
        else:
            model, call = BUILDERS[library](_bare(state, origin.layout), origin.config, loaded)
    except (_NotBuilt, RuntimeError, TypeError, ValueError, KeyError, StopIteration) as reason:
        return _self(f"{library} does not take the file: {plain(reason)}")
    with torch.inference_mode():
        outputs = call(model.eval(), torch.from_numpy(images))
    if loaded.model.spec.task == "detect":
        library = "torchvision"
    name = f"{library} {importlib.metadata.version(library)}"
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != [output.shape for output in found]:
        raise ParityError(f"{name} gives outputs of shapes {shapes} for {loaded.weights.source}: ours have others")
    error = float(deviation.worst(found, [output.numpy() for output in outputs]).max())
    if not error <= LIMIT:
        raise ParityError(
            f"{loaded.weights.source} as it was loaded differs from {name}'s own model of the same file by "
            f"{error:.3g} (relative), above {LIMIT:g}; give --variant if it was taken for another, or report a bug"
        )
    return OracleRecord(name=name, relative_error=error, preprocessing=_pixels(loaded, library))


def _self(why: str) -> OracleRecord:
    return OracleRecord(name="self", why=why)


class _NotBuilt(Exception):
    """A library has no model for the tensors, in words."""


# Reading, by the libraries' own functions -----------------------------------------------------------------------------


def _read(files: tuple[Path, ...], key: str | None) -> State:
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in files:
        # Which of several models in a file is taken, and how a pickle is read safely, is not what is judged here.
        state |= load_file(file) if file.suffix == ".safetensors" else read_file(file, key).state
    state = {beside.unwrapped(name): value for name, value in state.items()}
    key = None if key is None else beside.unwrapped(key)
    if key is not None and any(name.startswith(key) for name in state):
        state = {name.removeprefix(key): value for name, value in state.items() if name.startswith(key)}
    tensors = {name: value.float() for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise _NotBuilt("its reader finds no tensors")
    return tensors


def _bare(state: State, layout: str) -> State:
    """Without what training scripts put before the layout's own names."""
    prefixes = next(known for known in LAYOUTS if known.name == layout).prefixes(state)
    prefix = beside.averaged(prefixes) or prefixes[0]
    if layout == "transformers":  # its classifier stands beside its body
        prefix = prefix.removesuffix("convnext.").removesuffix("convnextv2.")
    elif layout == "dinov3_transformers":  # its last norm stands beside its body
        prefix = prefix.removesuffix("model.")
    elif layout == "mmpretrain":  # its classifier stands beside its body
        heads = {f"head.{name.rpartition('.')[2]}": v for name, v in state.items() if name.startswith("head.fc.")}
        return heads | {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# timm, which converts the official layouts and open_clip's towers too -------------------------------------------------

Call = Callable[[Any, Tensor], Outputs]
BUILT = tuple[nn.Module, Call]


def _timm(state: State, config: Mapping[str, Any], loaded: "Loaded") -> BUILT:
    import timm
    from timm.models import convnext

    spec = loaded.model.spec
    state, norms = _split_level_norms(_in_official_names(state), spec)
    # Linears as 1x1 convolutions: timm's filter would look for their shapes in a model, which is not made yet.
    wide = {k: v[..., None, None] if v.ndim == 2 and "pwconv" in k else v for k, v in state.items()}
    state = convnext.checkpoint_filter_fn(wide, None)
    name = config.get("architecture") or loaded.model.spec.architecture
    arguments: dict[str, Any] = {**(config.get("model_args") or {})}
    head = state.get("head.fc.weight", state.get("head.fc.fc2.weight"))
    if head is None and spec.task == "classify":
        raise _NotBuilt("the head is not timm's own")
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
    if lacking.unexpected_keys or not all(name.startswith("head.") for name in lacking.missing_keys):
        raise _NotBuilt(f"{(*lacking.unexpected_keys, *lacking.missing_keys)[:4]} are not in it and in the file")

    def call(model: Any, images: Tensor) -> Outputs:
        if spec.task == "classify":
            return (model(images),)
        if spec.task == "embed":
            map = model.forward_features(images)
            vector = model.forward_head(map, pre_logits=True)
            return (vector, model.head.norm(map).flatten(2).mT) if spec.patch_tokens else (vector,)
        maps, x = [], model.stem(images)
        for stage in model.stages:
            x = stage(x)
            maps.append(x)
        return tuple(_normed(maps[level - 1], norms.get(level)) for level in spec.levels)

    return model, call


def _in_official_names(state: State) -> State:
    """mmpretrain's names as those of the official code, and those of `features_only` as those of the whole model."""
    names = {"depthwise_conv": "dwconv", "pointwise_conv1": "pwconv1", "pointwise_conv2": "pwconv2"}
    found = {}
    for name, value in state.items():
        joined = re.sub(r"^(stem|stages)_(\d)", r"\1.\2", name)
        found[".".join(names.get(part, part) for part in joined.split("."))] = value
    return found


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
    depthwise = [state[f"stages.{stage}.blocks.0.conv_dw.weight"] for stage in range(4)]
    if state["stem.0.weight"].shape[-1] != 4:
        raise _NotBuilt("an overlapping stem of no published architecture")
    hidden = state.get("head.pre_logits.fc.weight")
    return {
        "depths": tuple(counts),
        "dims": tuple(weight.shape[0] for weight in depthwise),
        "kernel_sizes": tuple(weight.shape[-1] for weight in depthwise),
        "ls_init_value": 1e-6 if "stages.0.blocks.0.gamma" in state else None,
        "use_grn": "stages.0.blocks.0.mlp.grn.weight" in state,
        "head_hidden_size": None if hidden is None else len(hidden),
        "head_norm_first": "norm_pre.weight" in state,
    }


def _torchvision(state: State, config: Mapping[str, Any], loaded: "Loaded") -> BUILT:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    spec = loaded.model.spec
    if "0.0.weight" in state:
        state = {f"features.{name}": value for name, value in state.items()}
    counts = [
        len({name.split(".")[2] for name in state if name.startswith(f"features.{stage}.")}) for stage in (1, 3, 5, 7)
    ]
    dims = [len(state[f"features.{stage}.0.block.0.weight"]) for stage in (1, 3, 5, 7)]
    head = state.get("classifier.2.weight")
    if head is None and spec.task != "features":
        raise _NotBuilt("its model has a classifier, the file has none")
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
                raise _NotBuilt("its ConvNeXt gives no patch tokens")
            return (model.classifier[:2](model.avgpool(model.features(images))),)
        maps, x = [], images
        for index, part in enumerate(model.features):
            x = part(x)
            if index % 2:
                maps.append(x)
        return tuple(maps[level - 1] for level in spec.levels)

    return model, call


def _transformers(state: State, config: Mapping[str, Any], loaded: "Loaded") -> BUILT:
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
        raise _NotBuilt("the head is not transformers' own")
    if classifier is not None:
        own["num_labels"] = len(classifier)
    if levels:
        own["out_features"] = [f"stage{level}" for level in levels]
    form = "Backbone" if levels else "Model" if classifier is None else "ForImageClassification"
    for name in (f"{kind}Config", kind + form):
        if not hasattr(transformers, name):
            raise _NotBuilt(f"this release has no {name}; update it")
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
        raise _NotBuilt(f"{(*lacking.unexpected_keys, *lacking.missing_keys)[:4]} are not in it and in the file")

    def call(model: Any, images: Tensor) -> Outputs:
        if spec.task == "classify":
            return (model(images).logits,)
        if levels:
            maps = dict(zip(levels, model(images).feature_maps, strict=True))
            return tuple(maps[level] for level in spec.levels)
        body = model if third else model.base_model
        found = body(images, output_hidden_states=True)
        if spec.task == "embed":
            if not spec.patch_tokens:
                return (found.pooler_output,)
            if not third:
                raise _NotBuilt("its ConvNeXt gives no patch tokens")
            return (found.pooler_output, found.last_hidden_state[:, 1:])
        return tuple(found.hidden_states[-4:][level - 1] for level in spec.levels)

    return model, call


def _upernet(state: State, config: Mapping[str, Any], loaded: "Loaded") -> BUILT:
    """transformers' UPerNet, from its configuration or, where there is none, from the spec of what was loaded."""
    import transformers

    spec = loaded.model.spec
    assert spec.segmentation is not None
    roots = [
        name.removesuffix("decode_head.classifier.weight")
        for name in state
        if name.endswith("decode_head.classifier.weight")
    ]
    if len(roots) != 1:
        raise _NotBuilt("the head has other names than transformers'")
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
        raise _NotBuilt(f"{(*lacking.unexpected_keys, *missing)[:4]} are not in it and in the file")

    def call(model: Any, images: Tensor) -> Outputs:
        return (model.decode_head(model.backbone(images).feature_maps),)

    return model, call


def _detector(state: State, origin: "Origin", library: str, loaded: "Loaded") -> BUILT:
    """torchvision's detector on the ConvNeXt of the library that the file is of."""
    spec = msgspec.structs.replace(loaded.model.spec, task="features")
    network = cast("ConvNeXt", SimpleNamespace(spec=spec))
    body, call = BUILDERS[library](_bare(state, origin.layout), origin.config, replace(loaded, model=network))
    body.eval()
    model = detector_oracle.detector(state, loaded, lambda images: call(body, images))
    return model, lambda model, images: detector_oracle.candidates(model, images, loaded)


BUILDERS: dict[str, Callable[[State, Mapping[str, Any], "Loaded"], BUILT]] = {
    "timm": _timm, "torchvision": _torchvision, "transformers": _transformers,
}  # fmt: skip


# Preprocessing --------------------------------------------------------------------------------------------------------


def _pixels(loaded: "Loaded", library: str) -> str | None:
    """Whose preprocessing was compared with; None where there is none to compare with, or it was given by the user.

    Raises:
        ParityError: photographs come out otherwise.
    """
    spec, facts, origin = loaded.model.spec, loaded.preprocessing, loaded.origin
    if origin is None or spec.in_chans not in (1, 3) or origin.overridden:
        return None
    theirs: Callable[[Image.Image], NDArray[np.float32]]
    own = origin.config.get("pretrained_cfg")
    if library == "timm":
        if not isinstance(own, Mapping):
            return None
        from timm.data import create_transform, resolve_data_config

        at_test = list(own.get("test_input_size") or ())[-2:] == list(spec.image_size)
        if not at_test and list(own.get("input_size") or ())[-2:] != list(spec.image_size):
            return None
        transform = create_transform(**resolve_data_config(pretrained_cfg=dict(own), use_test_size=at_test))
        theirs = lambda image: np.asarray(transform(image))  # noqa: E731 - a name of its own says no more
    elif isinstance(origin.config.get("preprocessor"), Mapping):
        import transformers

        given = origin.config["preprocessor"]
        named = given.get("image_processor_type") or given.get("feature_extractor_type") or "ConvNextImageProcessor"
        kind = getattr(transformers, str(named).replace("FeatureExtractor", "ImageProcessor"), None)
        if kind is None:
            return None
        processor: Any = kind(**{k: v for k, v in given.items() if not k.endswith("_type")})
        theirs = lambda image: np.asarray(processor(image, return_tensors="np")["pixel_values"][0])  # noqa: E731
    else:
        return None
    ours = preprocess.transform(facts, spec.image_size, spec.in_chans)
    files = sorted((Path(__file__).parent.parent / "data" / "images").glob("*.jpg"))[:PHOTOGRAPHS]
    for file in files:
        with Image.open(file) as photograph:
            image = photograph.convert("L" if spec.in_chans == 1 else "RGB")
        found, expected = preprocess.as_input(ours(image)[None], facts, "float32")[0], theirs(image)
        if found.shape != expected.shape:
            if library == "transformers":  # another image size was asked for than its processor gives
                return None
            raise ParityError(f"{library} prepares {expected.shape} of a photograph, ours is {found.shape}")
        error = float(np.abs(found - expected).mean())
        if not error <= PIXELS[library]:
            raise ParityError(
                f"a photograph prepared as {library} prepares it for this checkpoint differs from what was understood "
                f"by {error:.3g} a pixel, above {PIXELS[library]:g} (normalized); say --mean, --std, --crop-pct and "
                "--interpolation, or report a bug"
            )
    return library
