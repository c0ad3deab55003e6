"""The module as the native CPU engine takes it: its arrays, each product in the type that it has in the module."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.convnext import Block, ChannelNorm, ConvNeXt, Downsample
from ..native import packed
from ..quantization.apply import QuantizedConvolution, QuantizedLinear, rows_of

TYPES: dict[torch.dtype, packed.ProductType] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def network_of(model: ConvNeXt) -> packed.Network:
    """A folded module as the engine's file stores it."""
    stem, mean = model.stem, model.stem.input_mean
    return packed.Network(
        input="uint8" if model.takes_uint8 else "float32",
        in_chans=model.spec.in_chans,
        stem=packed.Stem(
            convs=tuple(_product(conv) for conv in stem.convs),
            norm=_norm(stem.norm),
            activation=stem.activation,
            input_mean=None if mean is None else _array(mean).reshape(-1),
        ),
        stages=tuple(tuple(_block(b) for b in cast("nn.ModuleList", blocks)) for blocks in model.stages),
        downsamples=tuple(_downsample(downsample) for downsample in model.downsamples),
        head=None
        if model.head is None
        else packed.Head(
            norm=_norm(model.head.norm),
            norm_first=model.head.norm_first,
            hidden=None if model.head.hidden is None else _product(model.head.hidden),
            classifier=None if model.head.classifier is None else _product(model.head.classifier),
            activation=model.head.activation,
        ),
        features=() if model.head is not None else tuple(_features(model, stage) for stage in range(len(model.stages))),
    )


def _features(model: ConvNeXt, stage: int) -> packed.Features | None:
    level, spec = str(stage + 1), model.spec
    if stage + 1 not in spec.levels:
        return None
    norm = _norm(cast(ChannelNorm, model.level_norms[level])) if level in model.level_norms else None
    return packed.Features(channels=spec.dims[stage], norm=norm)


def _block(block: nn.Module) -> packed.Block:
    assert isinstance(block, Block)
    assert block.project.layer_scale is None
    conv, grn = block.dwconv_norm.conv, block.grn
    return packed.Block(
        dw_weight=_array(conv.weight[:, 0]),
        dw_bias=_array(conv.bias),
        norm=_norm(block.dwconv_norm.norm),
        expand=_product(block.expand.linear),
        activation=block.expand.activation,
        project=_product(block.project.linear),
        grn_weight=None if grn is None else _array(grn.weight),
        grn_bias=None if grn is None or grn.bias is None else _array(grn.bias),
        grn_eps=1e-6 if grn is None else grn.eps,
    )


def _downsample(module: nn.Module) -> packed.Downsample:
    assert isinstance(module, Downsample)
    return packed.Downsample(norm=_norm(module.norm), conv=_product(module.conv))


def _norm(norm: ChannelNorm) -> packed.ChannelNorm:
    return packed.ChannelNorm(
        kind=norm.kind,
        eps=norm.eps,
        weight=None if norm.weight is None else _array(norm.weight),
        bias=None if norm.bias is None else _array(norm.bias),
    )


def _product(module: nn.Module) -> packed.Product:
    if not isinstance(module, QuantizedLinear):
        rows = rows_of(module)
        return packed.Product(weight=_array(rows), bias=_array(module.get_parameter("bias")), type=TYPES[rows.dtype])
    assert not isinstance(module, QuantizedConvolution)  # no plan for this target makes one
    return packed.Product(
        weight=module.weight.t().contiguous().numpy(),
        bias=_array(module.bias),
        type="int8",
        weight_scale=_array(module.weight_scale),
        scale=module.scale.item(),
        zero_point=int(module.zero_point),
        shift=module.shift,
    )


def _array(tensor: Tensor | None) -> Any:
    assert tensor is not None
    return tensor.detach().float().contiguous().numpy()
