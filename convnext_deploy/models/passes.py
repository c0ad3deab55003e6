"""Exact rewrites of the module: each computes the same function with fewer operations.

Products of weights are formed in float64 and stored in the parameters' own type. In float64 every pass keeps the
outputs to 1e-10; what an export records is the change in float32, which is rounding.
"""

from collections.abc import Callable, Collection, Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..artifact import deviation
from ..errors import PassError
from ..records.base import Precision
from ..records.manifest import PassRecord, Preprocessing
from .convnext import DTYPES, Block, ChannelNorm, ConvNeXt, Downsample
from .upernet import EPS

# The float32 outputs after a pass against those before it, worst sample. Rounding of re-associated products measured
# over all 31 architectures with random weights stays below 3e-6; a wrong fold moves outputs by 1e-2 and more.
PASS_TOLERANCE = 1e-4


def blocks(model: ConvNeXt) -> Iterator[Block]:
    for stage in model.stages:
        yield from cast("nn.ModuleList", stage)  # type: ignore[misc]


@torch.no_grad()
def fold_layer_scale(model: ConvNeXt) -> None:
    """`s * (W h + c)` becomes `(s W) h + (s c)` in every block's project linear."""
    for block in blocks(model):
        project = block.project
        if project.layer_scale is None:
            continue
        scale = project.layer_scale.double()  # (C,)
        _store(project.linear.weight, scale[:, None] * project.linear.weight.double())
        _store(project.linear.bias, scale * project.linear.bias.double())
        project.layer_scale = None


@torch.no_grad()
def fold_norm_affine(model: ConvNeXt) -> None:
    """`W (g n + b) + c` becomes `(W g) n + (W b + c)` wherever a norm is followed by a linear or a convolution.

    The stem's norm stays: its output is the residual stream and meets a zero-padded convolution. An embedding's
    last norm and those of maps stay too: nothing follows them.
    """
    for block in blocks(model):
        _fold_affine(block.dwconv_norm.norm, block.expand.linear)
    for downsample in model.downsamples:
        assert isinstance(downsample, Downsample)
        _fold_affine(downsample.norm, downsample.conv)  # 2x2 of stride 2: no padding, so the bias is exact
    if model.head is not None:
        follower = model.head.hidden or model.head.classifier
        if follower is not None:
            # Where the norm precedes the pooling, the mean of an affine map is the affine map of the mean.
            _fold_affine(model.head.norm, follower)


def _fold_affine(norm: ChannelNorm, follower: nn.Linear | nn.Conv2d) -> None:
    weight = follower.weight.double()  # (out, in) or (out, in, kH, kW)
    per_input = (1, -1) + (1,) * (weight.ndim - 2)
    assert follower.bias is not None
    if norm.bias is not None:
        shift = (weight * norm.bias.double().reshape(per_input)).flatten(1).sum(1)
        _store(follower.bias, follower.bias.double() + shift)
        norm.bias = None
    if norm.weight is not None:
        _store(follower.weight, weight * norm.weight.double().reshape(per_input))
        norm.weight = None


@torch.no_grad()
def fold_grn_bias(model: ConvNeXt) -> None:
    """GRN's bias is added before project, so it moves into project's bias. (V2)"""
    for block in blocks(model):
        if block.grn is None or block.grn.bias is None:
            continue
        linear = block.project.linear
        # A layer scale, where not folded yet, multiplies the linear's whole output: the order does not matter.
        _store(linear.bias, linear.bias.double() + linear.weight.double() @ block.grn.bias.double())
        block.grn.bias = None


@torch.no_grad()
def fold_batch_norm(model: ConvNeXt) -> None:
    """A segmenter's `g (W x + c - m) / s + b` becomes `(g / s W) x + (g (c - m) / s + b)`."""
    assert model.segmenter is not None
    for _, unit in model.segmenter.units():
        norm = unit.norm
        if norm is None:
            continue
        assert unit.conv.bias is not None
        scale = norm.weight.double() / (norm.variance.double() + EPS).sqrt()  # (C,)
        shift = scale * (unit.conv.bias.double() - norm.mean.double()) + norm.bias.double()
        _store(unit.conv.weight, scale[:, None, None, None] * unit.conv.weight.double())
        _store(unit.conv.bias, shift)
        unit.norm = None


def put_out_classes(model: ConvNeXt) -> None:
    """Let a segmenter give each pixel's class in the place of logits: the last rewrite, and no exact one."""
    model.puts_out_classes = True


def put_out_detections(model: ConvNeXt) -> None:
    """Let a detector give what is chosen of its candidates in their place: the last rewrite, and no exact one."""
    model.puts_out_detections = True


@torch.no_grad()
def fold_preprocessing(model: ConvNeXt, preprocessing: Preprocessing) -> None:
    """Let the model take raw uint8 images (N, H, W, C): `(x / 255 - mean) / std` goes into the stem's convolution.

    With an overlapping stem the mean remains as one subtraction before the zero padding (see `models.convnext.Stem`).
    """
    conv = cast(nn.Conv2d, model.stem.convs[0])
    assert conv.bias is not None
    weight = conv.weight.double()  # (out, in, kH, kW)
    mean = 255 * torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = 255 * torch.tensor(preprocessing.std, dtype=torch.float64)
    weight = weight / std[:, None, None]
    if model.spec.stem == "patch":
        _store(conv.bias, conv.bias.double() - (weight * mean[:, None, None]).sum((1, 2, 3)))
    else:
        model.stem.input_mean = mean[:, None, None].to(conv.weight.dtype)  # (C, 1, 1)
    _store(conv.weight, weight)
    model.takes_uint8 = True


@torch.no_grad()
def cast_parameters(model: ConvNeXt, precision: Precision, kept: Collection[str] = ()) -> None:
    """Convert parameters and float buffers; norms of what is put out stay in float32, quantized weights as they are.

    Args:
        kept: names of operations (`stages.2.0.project`, `head`) that stay in float32.

    Raises:
        PassError: a parameter does not fit the type's range.
    """
    dtype, limits = DTYPES[precision], torch.finfo(DTYPES[precision])
    stay = {id(tensor) for name in kept for tensor in _tensors(model.get_submodule(name))}
    if model.head is not None and not model.head.norm_first:
        stay |= {id(tensor) for tensor in _tensors(model.head.norm)}
    stay |= {id(tensor) for tensor in _tensors(model.level_norms)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1 or id(tensor) in stay:
            continue
        largest = tensor.abs().max().item()
        if not largest <= limits.max:
            raise PassError(f"{name} reaches {largest:.3g}, above {precision}'s {limits.max:.3g}; use bf16 or fp32")
        if (
            name.rpartition(".")[2] in ("scale", "weight_scale") and not tensor.min().item() >= limits.smallest_normal
        ):  # of a quantizer
            raise PassError(
                f"{name} reaches down to {tensor.min().item():.3g}, below {precision}'s smallest normal number "
                f"{limits.smallest_normal:.3g}; use bf16 or fp32"
            )
        tensor.data = tensor.data.to(dtype)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _store(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def fold(
    model: ConvNeXt, uint8: Preprocessing | None, outputs: Callable[[ConvNeXt], tuple[Tensor, ...]]
) -> tuple[PassRecord, ...]:
    """Run every folding pass in place and record how far each moved the outputs.

    Args:
        uint8: fold this preprocessing too, so that the model takes raw images.
        outputs: runs the model on the probe images (it knows whether the model takes them raw).

    Raises:
        PassError: naming the pass that moved the outputs beyond `PASS_TOLERANCE`.
    """
    steps: list[tuple[str, Callable[[ConvNeXt], None]]] = [("fold_norm_affine", fold_norm_affine)]
    if model.spec.layer_scale:
        steps.append(("fold_layer_scale", fold_layer_scale))
    if model.spec.grn:
        steps.append(("fold_grn_bias", fold_grn_bias))
    if model.segmenter is not None:
        steps.append(("fold_batch_norm", fold_batch_norm))
    if uint8 is not None:
        steps.append(("fold_preprocessing", lambda m: fold_preprocessing(m, uint8)))
    records = []
    before = outputs(model)
    for name, step in steps:
        step(model)
        after = outputs(model)
        change = float(deviation.worst(_arrays(after), _arrays(before)).max())
        if not np.isfinite(change):
            raise PassError(f"the outputs are NaN or infinite after {name}; the weights are too large for float32")
        if not change <= PASS_TOLERANCE:
            raise PassError(f"{name} moved the outputs by {change:.2g} (relative), above {PASS_TOLERANCE:g}: a bug")
        records.append(PassRecord(name=name, relative_change=change))
        before = after
    return tuple(records)


def _arrays(outputs: tuple[Tensor, ...]) -> list[NDArray[np.floating]]:
    return [output.numpy() for output in outputs]
