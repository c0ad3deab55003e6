"""Faults to plant in a module: each changes one thing, of which some move outputs by less than their rounding."""

import random
from collections.abc import Callable
from typing import Any

import torch

from convnext_deploy.models.convnext import Block, ChannelNorm, ConvNeXt, Grn
from convnext_deploy.quantization.apply import QuantizedLinear

Fault = Callable[[ConvNeXt, random.Random], None]  # raises NoSuch where the module has nothing of the kind


class NoSuch(Exception):
    """The module has nothing that this fault could change."""


def _tensors(model: ConvNeXt, ending: str = "", least: int = 1) -> list[torch.Tensor]:
    held = [*model.named_parameters(), *model.named_buffers()]
    return [
        value.data
        for name, value in held
        if name.endswith(ending) and value.numel() >= least and "weight_zero_point" not in name
    ]


def _one(values: list[Any], chance: random.Random) -> Any:
    if not values:
        raise NoSuch
    return chance.choice(values)


def modules_of(model: ConvNeXt, *kinds: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kinds)]


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, flat."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[value.dtype.itemsize]
    return value.reshape(-1).view(integer)


def flipped_bit(model: ConvNeXt, chance: random.Random) -> None:
    """The last bit of one weight, or another of its lowest seven."""
    bits = _bits(_one([t for t in _tensors(model, least=2) if t.is_contiguous()], chance))
    bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(7)


def negated_entry(model: ConvNeXt, chance: random.Random) -> None:
    flat = _one([t for t in _tensors(model, least=2) if t.is_contiguous()], chance).reshape(-1)
    flat[chance.randrange(len(flat))] *= -1


def rounded_tensor(model: ConvNeXt, chance: random.Random) -> None:
    """To fp16's mantissa for float32, to half the mantissa for the others, to seven bits for codes."""
    value = _one([t for t in _tensors(model, "weight") if t.is_contiguous()], chance)
    lost = {torch.float32: 13, torch.float16: 5, torch.bfloat16: 4}.get(value.dtype, 1)
    _bits(value).bitwise_and_(-(1 << lost) if value.dtype.itemsize > 1 else 254)


def zeroed_bias(model: ConvNeXt, chance: random.Random) -> None:
    _one(_tensors(model, "bias"), chance).zero_()


def zeroed_channel(model: ConvNeXt, chance: random.Random) -> None:
    value = _one(_tensors(model, "weight"), chance)
    value[chance.randrange(len(value))] = 0


def swapped_channels(model: ConvNeXt, chance: random.Random) -> None:
    value = _one(_tensors(model, "weight"), chance)
    pair = chance.sample(range(len(value)), 2)
    value[pair] = value[pair[::-1]]


def scaled_layer(model: ConvNeXt, chance: random.Random) -> None:
    _one([t for t in _tensors(model, "weight") if t.is_floating_point()], chance).mul_(1.01)


def transposed_kernel(model: ConvNeXt, chance: random.Random) -> None:
    """Height and width of one channel of a depthwise convolution."""
    weight = _one(modules_of(model, Block), chance).dwconv_norm.conv.weight.data
    channel = chance.randrange(len(weight))
    weight[channel] = weight[channel].transpose(-1, -2).clone()


def swapped_blocks(model: ConvNeXt, chance: random.Random) -> None:
    stage = _one([stage for stage in model.stages if len(list(stage.children())) > 1], chance)
    pair = chance.sample(range(len(stage)), 2)
    stage[pair[0]], stage[pair[1]] = stage[pair[1]], stage[pair[0]]


def other_epsilon(model: ConvNeXt, chance: random.Random) -> None:
    _one(modules_of(model, ChannelNorm, Grn), chance).eps *= 10


def other_gelu(model: ConvNeXt, chance: random.Random) -> None:
    expand = _one(modules_of(model, Block), chance).expand
    expand.activation = "gelu" if expand.activation == "gelu_tanh" else "gelu_tanh"


def other_scale(model: ConvNeXt, chance: random.Random) -> None:
    """Of a quantized product's input."""
    _one(modules_of(model, QuantizedLinear), chance).scale.mul_(1.01)


def other_zero_point(model: ConvNeXt, chance: random.Random) -> None:
    _one(modules_of(model, QuantizedLinear), chance).zero_point.sub_(1)


def other_weight_scale(model: ConvNeXt, chance: random.Random) -> None:
    """Of one output channel of a quantized product."""
    scales = _one(modules_of(model, QuantizedLinear), chance).weight_scale
    scales[chance.randrange(len(scales))] *= 1.01


FAULTS: tuple[Fault, ...] = (
    flipped_bit, negated_entry, rounded_tensor, zeroed_bias, zeroed_channel, swapped_channels, scaled_layer,
    transposed_kernel, swapped_blocks, other_epsilon, other_gelu,
)  # fmt: skip
OF_8_BITS: tuple[Fault, ...] = (other_scale, other_zero_point, other_weight_scale)
