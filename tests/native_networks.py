"""What the tests of the native engine share: networks whose products are in one type, and quantized modules."""

import dataclasses
from typing import Any

import numpy as np
import torch
from references import randomize_
from torch import nn

from convnext_deploy import formats
from convnext_deploy.graph import native_network
from convnext_deploy.models import passes
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.native import packed
from convnext_deploy.quantization import apply as applying
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.plan import LoadedPlan
from convnext_deploy.quantization.ranges import scale_and_zero_point
from convnext_deploy.records.manifest import ModelSpec, Preprocessing
from convnext_deploy.records.plan import OperationPlan, Plan

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SIZE = (64, 96)  # pixels: the last map is 2x3


def network_of(model: ConvNeXt, precision: packed.ProductType = "fp32") -> packed.Network:
    """A folded fp32 module, its products in `precision` unless they are quantized; all else stays in fp32."""
    return _retyped(native_network.network_of(model), precision)


def _retyped(part: Any, precision: packed.ProductType) -> Any:
    if isinstance(part, packed.Product):
        return dataclasses.replace(part, type=precision) if part.type == "fp32" else part
    if isinstance(part, tuple):
        return tuple(_retyped(inner, precision) for inner in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        changed = {f.name: _retyped(getattr(part, f.name), precision) for f in dataclasses.fields(part)}
        return dataclasses.replace(part, **changed)
    return part


def quantize_(
    model: ConvNeXt, images: torch.Tensor, target: Any = "native", only: tuple[str, ...] | None = None
) -> None:
    """Rewrite a folded module to a plan of its products in 8 bits, with the ranges that these images give."""
    paths = {name: path for name, path in plans.products(model).items() if only is None or name in only}
    ranges: dict[str, tuple[float, float]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            ranges[name] = (inputs[0].min().item(), inputs[0].max().item())

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(keep(name)) for name, path in paths.items()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    operations = {}
    for name, (low, high) in ranges.items():
        scale, zero_point = scale_and_zero_point(np.float64(min(low, 0)), np.float64(max(high, 0)), "u8_asymmetric")
        operations[name] = OperationPlan(type="u8s8", scale=float(np.float32(scale)), zero_point=int(zero_point))
    if model.takes_uint8 and "stem" in operations:
        operations["stem"] = OperationPlan(type="u8s8", scale=1.0, zero_point=0)
    plan = Plan(
        target=target, architecture=model.spec.architecture, weights_sha256="0" * 64,
        input="uint8" if model.takes_uint8 else "float32", image_size=model.spec.image_size, rest="fp32",
        calibration=None, operations=operations,
    )  # fmt: skip
    applying.apply(model, LoadedPlan(plan, {}, eight_bits=formats.eight_bits_of(target)))


def folded(spec: ModelSpec, uint8: bool = False) -> ConvNeXt:
    model = randomize_(ConvNeXt(spec))
    assert isinstance(model, ConvNeXt)
    passes.fold_norm_affine(model)
    if spec.layer_scale:
        passes.fold_layer_scale(model)
    if spec.grn:
        passes.fold_grn_bias(model)
    if uint8:
        passes.fold_preprocessing(model, IMAGENET)
    return model


def images_for(model: ConvNeXt, batch: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if model.takes_uint8:
        return torch.randint(0, 256, (batch, *size, model.spec.in_chans), dtype=torch.uint8, generator=generator)
    return torch.randn((batch, model.spec.in_chans, *size), generator=generator)
