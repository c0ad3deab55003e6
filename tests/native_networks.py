"""What the tests of the native engine share: its description of a network, taken from the PyTorch module."""

from typing import Any, cast

import numpy as np
import torch
from torch import nn

from convnext_deploy.kernels import packed
from convnext_deploy.models.convnext import Block, ChannelNorm, ConvNeXt, Downsample
from convnext_deploy.quantize import apply as applying
from convnext_deploy.quantize import plan as plans
from convnext_deploy.quantize.apply import QuantizedLinear, QuantizedPatches
from convnext_deploy.quantize.observers import scale_and_zero_point
from convnext_deploy.quantize.plan import LoadedPlan
from convnext_deploy.types import OperationPlan, Plan


def array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().float().numpy()


def product_of(module: nn.Module, precision: packed.ProductType = "fp32") -> packed.Product:
    """A linear, a convolution, or a quantized one, as the engine is given it."""
    if isinstance(module, QuantizedLinear):
        weight = module.weight.t() if not isinstance(module, QuantizedPatches) or module.weight.ndim == 2 else None
        if weight is None:  # a quantized convolution, (out, in, kH, kW)
            weight = module.weight.permute(0, 2, 3, 1).flatten(1)
        return packed.Product(
            weight=weight.contiguous().numpy(),
            bias=array(module.bias),
            type="int8",
            weight_scale=array(module.weight_scale),
            scale=module.scale.item(),
            zero_point=int(module.zero_point),
            shift=module.shift,
        )
    assert isinstance(module, nn.Linear | nn.Conv2d)
    weight = module.weight
    rows = weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight
    return packed.Product(weight=array(rows), bias=array(module.bias), type=precision)


def norm_of(norm: ChannelNorm) -> packed.ChannelNorm:
    return packed.ChannelNorm(kind=norm.kind, eps=norm.eps, weight=array(norm.weight), bias=array(norm.bias))


def network_of(model: ConvNeXt, precision: packed.ProductType = "fp32") -> packed.Network:
    """A folded module, its products in `precision` unless they are quantized."""

    def product(module: nn.Module) -> packed.Product:
        return product_of(module, precision)

    stem = model.stem
    stages = []
    for blocks in model.stages:
        rows = []
        for block in cast("nn.ModuleList", blocks):
            assert isinstance(block, Block)
            conv, grn = block.dwconv_norm.conv, block.grn
            assert block.project.layer_scale is None
            rows.append(
                packed.Block(
                    dw_weight=array(conv.weight[:, 0]),
                    dw_bias=array(conv.bias),
                    norm=norm_of(block.dwconv_norm.norm),
                    expand=product(block.expand.linear),
                    activation=block.expand.activation,
                    project=product(block.project.linear),
                    grn_weight=None if grn is None else array(grn.weight),
                    grn_bias=None if grn is None else array(grn.bias),
                )
            )
        stages.append(tuple(rows))
    head = model.head
    return packed.Network(
        input="uint8" if model.takes_uint8 else "float32",
        in_chans=model.spec.in_chans,
        stem=packed.Stem(
            convs=tuple(product(conv) for conv in stem.convs),
            norm=norm_of(stem.norm),
            activation=stem.activation,
            input_mean=None if stem.input_mean is None else array(stem.input_mean.flatten()),
        ),
        stages=tuple(stages),
        downsamples=tuple(
            packed.Downsample(norm=norm_of(d.norm), conv=product(d.conv))
            for d in model.downsamples
            if isinstance(d, Downsample)
        ),
        head=None
        if head is None
        else packed.Head(
            norm=norm_of(head.norm),
            norm_first=head.norm_first,
            hidden=None if head.hidden is None else product(head.hidden),
            classifier=None if head.classifier is None else product(head.classifier),
        ),
    )


def quantize_(
    model: ConvNeXt, images: torch.Tensor, target: Any = "openvino", only: tuple[str, ...] | None = None
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
    applying.apply(model, LoadedPlan(plan, {}))
