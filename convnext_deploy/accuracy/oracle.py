"""The source's own implementation as the judge of what was loaded: timm, transformers or torchvision, from the file.

Everything after loading is compared with this package's own module. Whether that module is the checkpoint's is
compared here, before any rewrite, with a model that another library builds and fills from the same files: its keys,
its architecture, its epsilon, and, where its configuration stands beside the weights, its preprocessing.
"""

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..artifact import deviation
from ..data import preprocess
from ..env import missing
from ..errors import ParityError
from ..models.files import read_file
from ..models.layouts import LAYOUTS
from ..records.manifest import OracleRecord

if TYPE_CHECKING:
    from ..models.checkpoint import Loaded

LIMIT = 1e-5  # relative, fp32: all architectures of all layouts measure at most 7e-7 (tests/test_layouts.py)
# Of normalized pixels: timm's own transform takes the same steps, transformers resizes with another library, whose
# pixels differ by a level or two at edges.
PIXELS = {"timm": 1e-5, "transformers": 0.05}  # the mean difference
LIBRARIES = {
    "timm": "timm", "official": "timm", "open_clip": "timm", "torchvision": "torchvision",
    "transformers": "transformers",
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
    library = LIBRARIES.get(origin.layout)
    if library is None:
        return _self(f"no library is known for the layout {origin.layout}")
    if missing((library,)):
        return _self(f"{library} is not installed")
    try:
        state = _bare(_read(origin.files, origin.key), origin.layout)
        model, call = BUILDERS[library](state, origin.config, loaded)
    except (_NotBuilt, RuntimeError, TypeError, ValueError, KeyError, StopIteration) as reason:
        return _self(f"{library} does not take the file: {' '.join(str(reason).split())[:200]}")
    with torch.inference_mode():
        outputs = call(model.eval(), torch.from_numpy(images))
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
    if key is not None and any(name.startswith(key) for name in state):
        state = {name.removeprefix(key): value for name, value in state.items() if name.startswith(key)}
    tensors = {name: value.float() for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise _NotBuilt("its reader finds no tensors")
    return tensors


def _bare(state: State, layout: str) -> State:
    """Without what training scripts put before the layout's own names."""
    anchor = next(known.anchor for known in LAYOUTS if known.name == layout)
    prefix = next((name.removesuffix(anchor) for name in state if name.endswith(anchor)), "")
    if layout == "transformers":  # its classifier stands beside its body
        prefix = prefix.removesuffix("convnext.").removesuffix("convnextv2.")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# timm, which converts the official layouts and open_clip's towers too -------------------------------------------------

Call = Callable[[Any, Tensor], Outputs]
BUILT = tuple[nn.Module, Call]


def _timm(state: State, config: Mapping[str, Any], loaded: "Loaded") -> BUILT:
    import timm
    from timm.models import convnext

    # Linears as 1x1 convolutions: timm's filter would look for their shapes in a model, which is not made yet.
    wide = {k: v[..., None, None] if v.ndim == 2 and "pwconv" in k else v for k, v in state.items()}
    state = convnext.checkpoint_filter_fn(wide, None)
    name = config.get("architecture") or loaded.model.spec.architecture
    arguments: dict[str, Any] = {**(config.get("model_args") or {})}
    head = state.get("head.fc.weight", state.get("head.fc.fc2.weight"))
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
    model.load_state_dict(state, strict=True, assign=True)
    task = loaded.model.spec.task

    def call(model: Any, images: Tensor) -> Outputs:
        if task == "classify":
            return (model(images),)
        if task == "embed":
            return (model.forward_head(model.forward_features(images), pre_logits=True),)
        maps, x = [], model.stem(images)
        for stage in model.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    return model, call


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
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt  # type: ignore[import-untyped]  # it ships none

    counts = [
        len({name.split(".")[2] for name in state if name.startswith(f"features.{stage}.")}) for stage in (1, 3, 5, 7)
    ]
    dims = [len(state[f"features.{stage}.0.block.0.weight"]) for stage in (1, 3, 5, 7)]
    head = state.get("classifier.2.weight")
    if head is None:
        raise _NotBuilt("its model has a classifier, the file has none")
    stages = [CNBlockConfig(*stage) for stage in zip(dims, [*dims[1:], None], counts, strict=True)]
    model = ConvNeXt(stages, num_classes=len(head))
    model.load_state_dict(state, strict=True, assign=True)
    task = loaded.model.spec.task

    def call(model: Any, images: Tensor) -> Outputs:
        if task == "classify":
            return (model(images),)
        if task == "embed":
            return (model.classifier[:2](model.avgpool(model.features(images))),)
        maps, x = [], images
        for index, part in enumerate(model.features):
            x = part(x)
            if index % 2:
                maps.append(x)
        return tuple(maps)

    return model, call


def _transformers(state: State, config: Mapping[str, Any], loaded: "Loaded") -> BUILT:
    import transformers

    second = any(".grn." in name for name in state)
    body = "convnextv2." if second else "convnext."
    kind = "ConvNextV2" if second else "ConvNext"
    own = {name: value for name, value in config.items() if name not in ("preprocessor", "architectures")}
    if not own:
        stages = [f"encoder.stages.{stage}.layers." for stage in range(4)]
        names = [[name.partition(stage)[2] for name in state if stage in name] for stage in stages]
        first = [next(v for n, v in state.items() if f"{stage}0.dwconv.weight" in n) for stage in stages]
        own = {
            "depths": [len({name.split(".")[0] for name in found}) for found in names],
            "hidden_sizes": [len(weight) for weight in first],
        }
    classifier = state.get("classifier.weight")
    pixels = next(value for name, value in state.items() if name.endswith("patch_embeddings.weight"))
    own |= {"num_channels": pixels.shape[1]}
    if classifier is not None:
        own["num_labels"] = len(classifier)
        own.pop("id2label", None)
        own.pop("label2id", None)
    made = getattr(transformers, f"{kind}Config")(**own)
    if classifier is None:
        model = getattr(transformers, f"{kind}Model")(made)
        state = {name.removeprefix(body): value for name, value in state.items()}
    else:
        model = getattr(transformers, f"{kind}ForImageClassification")(made)
    model.load_state_dict(state, strict=True, assign=True)
    task = loaded.model.spec.task

    def call(model: Any, images: Tensor) -> Outputs:
        if task == "classify":
            return (model(images).logits,)
        found = model.base_model(images, output_hidden_states=True)
        return (found.pooler_output,) if task == "embed" else tuple(found.hidden_states[1:])

    return model, call


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
