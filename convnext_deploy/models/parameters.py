"""The parameters of our module: a checkpoint's tensors in their places, random values, and the hash of either."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import WeightsError
from ..records.manifest import ModelSpec
from .architecture import Converted
from .convnext import ConvNeXt


def filled(spec: ModelSpec, converted: Converted, where: str) -> ConvNeXt:
    """The module of `spec` holding a checkpoint's tensors as float32, in eval mode.

    Raises:
        WeightsError: a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = ConvNeXt(spec)
    parameters = model.state_dict()
    unused = _unused(spec)
    tensors = {name: value for name, value in converted.tensors.items() if not name.startswith(unused)}
    missing, extra = sorted(parameters.keys() - tensors), sorted(tensors.keys() - parameters)
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has more than the architecture:", extra)
        raise WeightsError(
            f"{where} ({converted.layout} layout) {what} {', '.join(names[:4])}"
            + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            + (" (--task features needs no head)" if missing and all(n.startswith("head.") for n in missing) else "")
        )
    ready = {}
    for name, value in tensors.items():
        shape = parameters[name].shape
        if [size for size in value.shape if size != 1] != [size for size in shape if size != 1]:
            raise WeightsError(f"{where}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        if not value.is_floating_point() or value.layout is not torch.strided:
            raise WeightsError(
                f"{where}: {name} is {value.dtype}, {value.layout}; expected a dense floating-point type"
            )
        # A 1x1 convolution is a linear, and (C, 1, 1) a vector: the same numbers under a shape with ones.
        ready[name] = value.detach().to(torch.float32).reshape(shape).contiguous()
    model.load_state_dict(ready, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _unused(spec: ModelSpec) -> tuple[str, ...]:
    """How the names of tensors begin that a task leaves out."""
    if not spec.has_maps:
        return ("level_norms.",) if spec.task == "classify" else ("level_norms.", "head.classifier.")
    after = [name for i in range(spec.stages, 4) for name in (f"stages.{i}.", f"downsamples.{i - 1}.")]
    return ("head.", *after, *(f"level_norms.{level}." for level in range(1, 5) if level not in spec.levels))


def random_model(spec: ModelSpec, seed: int = 0) -> ConvNeXt:
    """A module whose every parameter matters: for tests, timing and trying things out, never for predictions.

    PyTorch's own initialisation would leave layer scale at 1 or 1e-6 and norms at identity, which hides mistakes
    in exactly the parameters that converters and folding touch.
    """
    with torch.device("meta"):
        model = ConvNeXt(spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.state_dict().items():
        value = torch.empty(parameter.shape).normal_(generator=generator)
        if parameter.ndim > 1:
            value /= math.sqrt(parameter[0].numel())
            if name.endswith("bbox_pred.weight"):  # or nearly every region would be cut off at the image
                value *= 0.1
        elif name.endswith("layer_scale"):
            value.mul_(0.1).add_(0.3)
        elif "norm" in name and name.endswith("weight"):
            value.mul_(0.2).add_(1.0)
        elif name.endswith("variance"):
            value = value.abs().mul_(0.5).add_(0.5)
        else:
            value *= 0.2
        tensors[name] = value
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and float32 bytes in name order, whatever file held them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        value = state[name].detach().cpu().contiguous()
        digest.update((value.float() if value.is_floating_point() else value).numpy().data)
    return digest.hexdigest()


def refuse_not_finite(model: ConvNeXt, converted: Converted, read: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are NaN, infinite or without values.

    Args:
        read: the state dict as it was read: messages use its names.

    Raises:
        WeightsError: there are such weights.
    """
    keys = {id(value): key for key, value in read.items()}
    state = model.state_dict()
    empty = [name for name, value in state.items() if value.is_meta]
    if empty:
        raise WeightsError(
            f"{where}: {keys.get(id(converted.tensors.get(empty[0])), empty[0])} is on the meta device and "
            "has no values; save it once it has them"
        )
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        listing = ", ".join(keys.get(id(converted.tensors.get(name)), name) for name in broken[:4])
        raise WeightsError(
            f"{where} has NaN or infinite values in {len(broken)} of {len(state)} tensors: {listing}"
            + (f" and {len(broken) - 4} more" if len(broken) > 4 else "")
            + "; take a checkpoint from before training diverged"
        )
