"""The source's own implementation as the judge of what was loaded: timm, transformers or torchvision, from the file.

Everything after loading is compared with this package's own module. Whether that module is the checkpoint's is
compared here, before any rewrite, with a model that another library builds and fills from the same files: its keys,
its architecture, its epsilon, and, where its configuration stands beside the weights, its preprocessing.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..artifact import deviation
from ..data import preprocess
from ..env import cure_of_broken, import_failure, missing
from ..errors import ParityError, plain
from ..models import beside
from ..models.files import read_file
from ..models.names import LAYOUTS
from ..records.manifest import ModelSpec, OracleRecord
from . import detector_oracle
from .library_models import BUILDERS, NotBuilt, State, upernet

if TYPE_CHECKING:
    from ..models.checkpoint import Loaded

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


def judge(loaded: "Loaded", images: NDArray[np.float32], ours: tuple[NDArray[np.float32], ...]) -> OracleRecord:
    """Compare a loaded checkpoint with its own library's model.

    Args:
        images: normalized, (N, C, H, W).
        ours: this package's outputs on them, before any rewrite.

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
    broken = import_failure(library)
    if broken is not None:
        return _self(f"{library} cannot be imported: {broken}; {cure_of_broken()}")
    try:
        state = _read(origin.files, origin.key)
        if loaded.model.spec.task == "segment":
            model, call = upernet(state, origin.config, loaded)
        elif loaded.model.spec.task == "detect":
            body = (BUILDERS[library], _bare(state, origin.layout), origin.config)
            model, call = detector_oracle.of_torchvision(state, body, loaded, ours)
        else:
            model, call = BUILDERS[library](_bare(state, origin.layout), origin.config, loaded)
    except (NotBuilt, RuntimeError, TypeError, ValueError, KeyError, AttributeError, StopIteration) as reason:
        return _self(f"{library} does not take the file: {plain(reason)}")
    with torch.inference_mode():
        outputs = call(model.eval(), torch.from_numpy(images))
    if loaded.model.spec.task == "detect":
        library = "torchvision"  # on the ConvNeXt of the file's own
    name = f"{library} {importlib.metadata.version(library)}"
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != [output.shape for output in ours]:
        raise ParityError(f"{name} gives outputs of shapes {shapes} for {loaded.weights.source}: ours have others")
    error = float(deviation.worst(ours, [output.numpy() for output in outputs]).max())
    if not error <= LIMIT:
        raise ParityError(
            f"{loaded.weights.source} as it was loaded differs from {name}'s own model of the same file by "
            f"{error:.3g} (relative), above {LIMIT:g}; give --variant if it was taken for another, or report a bug"
        )
    return OracleRecord(name=name, relative_error=error, preprocessing=_pixels(loaded, library))


def _self(why: str) -> OracleRecord:
    return OracleRecord(name="self", why=why)


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
        raise NotBuilt("its reader finds no tensors")
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


# Preprocessing --------------------------------------------------------------------------------------------------------


def _pixels(loaded: "Loaded", library: str) -> str | None:
    """Whose preprocessing was compared with; None where there is none to compare with, or it was given by the user.

    Raises:
        ParityError: photographs come out otherwise.
    """
    spec, facts, origin = loaded.model.spec, loaded.preprocessing, loaded.origin
    if origin is None or spec.in_chans not in (1, 3) or origin.overridden:
        return None
    try:
        theirs = _preparation(origin.config, spec, library)
        if theirs is None:
            return None
        theirs(Image.new("L" if spec.in_chans == 1 else "RGB", (8, 8)))
    except (TypeError, ValueError, AttributeError, KeyError):
        return None  # a configuration that its own library does not take
    ours = preprocess.transform(facts, spec.image_size, spec.in_chans)
    files = sorted((Path(__file__).parent.parent / "data" / "images").glob("*.jpg"))[:PHOTOGRAPHS]
    for file in files:
        with Image.open(file) as photograph:
            image = photograph.convert("L" if spec.in_chans == 1 else "RGB")
        actual, expected = preprocess.as_input(ours(image)[None], facts, "float32")[0], theirs(image)
        if actual.shape != expected.shape:
            if library == "transformers":  # another image size was asked for than its processor returns
                return None
            raise ParityError(f"{library} prepares {expected.shape} of a photograph, ours is {actual.shape}")
        error = float(np.abs(actual - expected).mean())
        if not error <= PIXELS[library]:
            raise ParityError(
                f"a photograph prepared as {library} prepares it for this checkpoint differs from what was understood "
                f"by {error:.3g} a pixel, above {PIXELS[library]:g} (normalized); say --mean, --std, --crop-pct and "
                "--interpolation, or report a bug"
            )
    return library


def _preparation(
    config: Mapping[str, Any], spec: ModelSpec, library: str
) -> Callable[[Image.Image], NDArray[np.float32]] | None:
    """What the library itself makes of an image, by the configuration beside the checkpoint, where it says one."""
    own = config.get("pretrained_cfg")
    if library == "timm":
        if not isinstance(own, Mapping):
            return None
        from timm.data import create_transform, resolve_data_config

        at_test = list(own.get("test_input_size") or ())[-2:] == list(spec.image_size)
        if not at_test and list(own.get("input_size") or ())[-2:] != list(spec.image_size):
            return None
        transform = create_transform(**resolve_data_config(pretrained_cfg=dict(own), use_test_size=at_test))
        return lambda image: np.asarray(transform(image))
    if isinstance(config.get("preprocessor"), Mapping):
        import transformers

        given = config["preprocessor"]
        named = given.get("image_processor_type") or given.get("feature_extractor_type") or "ConvNextImageProcessor"
        name = str(named).replace("FeatureExtractor", "ImageProcessor")
        # transformers 5 has no two kinds any more, and warns where the name of the fast one is used.
        kind = getattr(transformers, name.removesuffix("Fast"), None) or getattr(transformers, name, None)
        if kind is None:
            return None
        processor: Any = kind(**{k: v for k, v in given.items() if not k.endswith("_type")})
        # As torch's, because the fast kind of transformers 4 gives no other tensors.
        return lambda image: np.asarray(processor(image, return_tensors="pt")["pixel_values"][0])
    return None
