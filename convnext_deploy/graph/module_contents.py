"""What a folded, cast module contains, in the order in which it computes: the side of `readback` that is known."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..artifact import readback
from ..models import upernet
from ..models.convnext import Block, ChannelNorm, ConvNeXt, Grn
from ..quantization.apply import QuantizedLinear

BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """As numpy, types that it lacks as their bits."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(BITS[tensor.dtype]).numpy() if tensor.dtype in BITS else tensor.numpy()


def stored(name: str, tensor: torch.Tensor) -> readback.Tensor:
    return readback.Tensor(name, str(tensor.dtype).removeprefix("torch."), array_of(tensor))


def expected_of(model: ConvNeXt, halved: bool = False) -> readback.Expected:
    """Every tensor, epsilon and activation of a module, operation after operation."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    tensors, groups = [], []
    epsilons: list[float] = []
    activations: list[str] = []
    quantizers: list[tuple[readback.Quantizer, frozenset[str]]] = []
    shifts: dict[str, float] = {}
    constants = {0.0, 0.5, -0.5, 1.0, 2.0}
    units = [] if model.segmenter is None else [unit for _, unit in model.segmenter.units()]
    detector = () if model.detector is None else tuple(_parts(model.detector))
    branches = {id(operation) for operation in (*model.level_norms.values(), *units, *detector)}
    beside: set[int] = set()
    for group, operation in enumerate(_operations(model)):
        if id(operation) in branches:
            beside.add(group)
        for name, tensor in (*operation.named_parameters(), *operation.named_buffers()):
            if name.endswith("weight_zero_point") or (name.endswith("zero_point") and tensor.float().item() == 0):
                continue  # of symmetric weights, which files may leave out
            kept = stored(names[id(tensor)], tensor)
            if name.endswith("weight_scale"):
                scale = operation.get_buffer(f"{name.removesuffix('weight_scale')}scale")
                product = (scale.double() * tensor.double()).float().numpy()
                kept = readback.Tensor(kept.name, kept.type, kept.values, product)
            if name == "input_mean":
                kept = dataclasses.replace(kept, subtracted=True)
                if tensor.numel() == 1:
                    constants |= {tensor.item(), -tensor.item()}
            elif tensor.numel() == 1 and name.endswith(("weight", "bias")):
                constants.add(tensor.item())  # of one output: a tensor that looks like a scalar
            tensors.append(kept)
            groups.append(group)
        eps_values = [module.eps for module in operation.modules() if isinstance(module, ChannelNorm | Grn)]
        if group in beside:
            # A map's norm and that of the next downsample compute the same up to their affine part, which converters
            # may do once for both.
            constants |= set(eps_values)
        else:
            epsilons += eps_values
        for module in operation.modules():
            if isinstance(module, ChannelNorm):
                channels = module.channels
                constants |= {1 / channels, 1 / (channels - 1), channels / (channels - 1)}
            if isinstance(module, QuantizedLinear):
                if module.shift:
                    shifts[names[id(module.weight)].removesuffix(".weight")] = module.shift
                constants |= {module.shift, -module.shift, float(module.zero_point.float())}
                if module.zero_point.dtype in (torch.uint8, torch.int8):
                    scales = frozenset(names[id(tensor)] for tensor in (module.scale, module.zero_point))
                    quantizers.append((_quantizer(names[id(module.weight)], module), scales))
    stem, head = model.stem, model.head
    if stem.activation is not None:
        activations.append(stem.activation)
    activations += [module.expand.activation for module in model.stages.modules() if isinstance(module, Block)]
    if head is not None and head.hidden is not None:
        activations.append(head.activation)
    activations += ["relu"] * len(units)
    return readback.Expected(
        tensors=tensors,
        groups=groups,
        epsilons=epsilons,
        activations=activations,
        constants=frozenset(constants | {float(np.float32(value)) for value in constants}),
        checksums=[readback.checksum(tensor.values) for tensor in tensors],
        quantizers=quantizers,
        shifts=shifts,
        halved=halved,
        branches=frozenset(beside),
        tables=_tables(model),
        repeated=model.detector is not None,
    )


def _tables(model: ConvNeXt) -> list[NDArray[Any]]:
    """What a segmenter's pooling multiplies with, for images of the model's own size; a detector's anchors."""
    if model.detector is not None:
        return model.detector.tables()
    if model.segmenter is None:
        return []
    sides = set(model.spec.map_sizes()[model.spec.levels[-1] - 1])
    like = torch.zeros((), dtype=torch.float32)
    tables = [upernet.shares(side, bins, like) for side in sides for bins in model.segmenter.pool_scales]
    return [array_of(table) for table in tables]


def _quantizer(weight: str, module: QuantizedLinear) -> readback.Quantizer:
    codes = torch.iinfo(module.zero_point.dtype)
    scale, zero_point = module.scale.double().item(), int(module.zero_point)
    low, high = ((code - zero_point) * scale for code in (codes.min, codes.max))
    return readback.Quantizer(weight.removesuffix(".weight"), low, high, codes.max - codes.min + 1)


def _parts(detector: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Every convolution and norm of a detector's pyramid and head."""
    yield from (module for module in detector.modules() if [*module.parameters(recurse=False)])


def _operations(model: ConvNeXt) -> Iterator[torch.nn.Module]:
    yield model.stem
    for index, stage in enumerate(model.stages):
        if index:
            yield model.downsamples[index - 1]
        for block in stage.modules():
            if isinstance(block, Block):
                yield block.dwconv_norm
                yield block.expand
                if block.grn is not None:
                    yield block.grn
                yield block.project
        if str(index + 1) in model.level_norms:
            yield model.level_norms[str(index + 1)]
    if model.segmenter is not None:
        yield from (unit for _, unit in model.segmenter.units())
        yield model.segmenter.classifier
    if model.detector is not None:
        yield from _parts(model.detector)
    if model.head is not None:
        yield model.head.norm
        if model.head.hidden is not None:
            yield model.head.hidden
        if model.head.classifier is not None:
            yield model.head.classifier
