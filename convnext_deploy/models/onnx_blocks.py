"""The network inside an ONNX graph, followed from its stem to its last stage: every weight of it, by official names.

    stem 4x4 of stride 4 ──► norm ──► depthwise, norm, linear to 4C, activation, (GRN), linear to C, scale, + ──► ...
                                          └── norm ──► 2x2 of stride 2 ──► the next stage

Between two products stands little, and all of it is asked for: what does not fit is an error that names the node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError
from .onnx_graph import LAYOUT, OnnxGraph, attribute

Array = NDArray[Any]
PREFIX = "onnx."  # of the keys of the layout "onnx"


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor at which the graph is cut. `axes` is the order of its axes, as "NCHW"."""

    level: int  # 0 for the stem's input, else the stage's number
    tensor: str
    axes: str


@dataclass(slots=True)
class OnnxConvNeXt:
    """What was read. `state` has the official names below `PREFIX`."""

    input: str  # that the stem reads
    state: dict[str, Array] = field(default_factory=dict)
    epsilons: set[float] = field(default_factory=set)
    activations: set[str] = field(default_factory=set)
    nodes: set[int] = field(default_factory=set)
    ends: list[str] = field(default_factory=list)  # of the four stages, before any norm of a map
    cuts: list[Cut] = field(default_factory=list)  # at the ends, ascending
    sides: list[int] | None = None  # height and width of images, where the graph takes no others

    def keep(self, name: str, values: Array) -> None:
        self.state[PREFIX + name] = values

    @property
    def half(self) -> bool:
        """Whether the graph contains half floats."""
        return any(values.dtype == np.float16 for values in self.state.values())


def is_depthwise(graph: OnnxGraph, index: int) -> bool:
    node = graph.nodes[index]
    if node.op_type != "Conv" or attribute(node, "group", 1) == 1:
        return False
    weight = graph.constant(node.input[1])
    return weight is not None and weight.ndim == 4 and weight.shape[1] == 1 and weight.shape[2] >= 3


def _is_downsampling(graph: OnnxGraph, index: int) -> bool:
    node = graph.nodes[index]
    same = node.op_type == "Conv" and attribute(node, "group", 1) == 1
    return same and [*attribute(node, "strides", [])] == [2, 2] and _weight(graph, index).shape[2:] == (2, 2)


def follow(graph: OnnxGraph, stem: int) -> OnnxConvNeXt:
    """Follow the network from its stem to the end of its last stage."""
    network = OnnxConvNeXt(graph.nodes[stem].input[0])
    network.sides = graph.sides(network.input)
    channels = _convolution(graph, network, stem, "downsample_layers.0.0", 4)
    at, stage, block = graph.nodes[stem].output[0], 0, 0
    norm: str | None = "downsample_layers.0.1"  # whose values stand before the next block; None: there is none
    while True:
        readers = sorted({index for _, index in graph.around(at) if index >= 0})
        depthwise = [index for index in readers if is_depthwise(graph, index)]
        if len(depthwise) > 1:
            raise WeightsError(f"{graph.where}: {len(depthwise)} depthwise convolutions read {at}; expected one")
        if depthwise:
            between = _path(graph, network, at, graph.nodes[depthwise[0]].input[0])
            if norm is not None:
                keep_norm(graph, network, between, norm, channels)
                norm = None
            elif any(graph.nodes[index].op_type not in LAYOUT for index in between):
                raise WeightsError(f"{graph.where} has {graph.named(between[-1])} between two blocks of a ConvNeXt")
            at, block = _block(graph, network, depthwise[0], f"stages.{stage}.{block}", channels), block + 1
            continue
        if block == 0:
            raise WeightsError(f"{graph.where}: stage {stage + 1} of the ConvNeXt has no block")
        network.ends.append(at)
        down = [index for index in readers if stage < 3 and _is_downsampling(graph, index)]
        if not down:
            break
        if len(down) > 1:
            raise WeightsError(f"{graph.where}: {len(down)} convolutions of stride 2 read {at}; expected one")
        stage, block = stage + 1, 0
        between = _path(graph, network, at, graph.nodes[down[0]].input[0])
        keep_norm(graph, network, between, f"downsample_layers.{stage}.0", channels)
        channels = _convolution(graph, network, down[0], f"downsample_layers.{stage}.1", 2)
        at = graph.nodes[down[0]].output[0]
    if stage != 3:
        raise WeightsError(f"the ConvNeXt in {graph.where} ends after stage {stage + 1}, at {at}; expected four stages")
    return network


def _path(graph: OnnxGraph, region: OnnxConvNeXt, start: str, end: str) -> list[int]:
    between = graph.path(start, end)
    if between is None:
        raise WeightsError(f"{graph.where}: {end} depends on more than {start}, so it is no ConvNeXt")
    region.nodes |= {*between}
    return between


def _weight(graph: OnnxGraph, index: int) -> Array:
    weight = graph.constant(graph.nodes[index].input[1])
    if weight is None or weight.dtype.kind != "f":
        raise WeightsError(
            f"{graph.where}: the weight of {graph.named(index)} is not in the graph as numbers (quantized, or computed)"
            "; export the detector in fp32 or fp16"
        )
    return weight


def _convolution(graph: OnnxGraph, region: OnnxConvNeXt, index: int, name: str, side: int) -> int:
    """Keep a convolution of patches. Returns its channels."""
    node, weight = graph.nodes[index], _weight(graph, index)
    if weight.shape[2:] != (side, side) or any(attribute(node, "pads", [0])):
        raise WeightsError(
            f"{graph.where}: {graph.named(index)} has other patches than the {side}x{side} of a ConvNeXt"
        )
    region.nodes.add(index)
    region.keep(f"{name}.weight", weight)
    region.keep(f"{name}.bias", _bias(graph, index, len(weight)))
    return len(weight)


def _bias(graph: OnnxGraph, index: int, channels: int) -> Array:
    node = graph.nodes[index]
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return np.zeros(channels, np.float32) if bias is None else bias.reshape(-1)


def keep_norm(graph: OnnxGraph, region: OnnxConvNeXt, nodes: list[int], name: str, channels: int) -> None:
    values = norm_of(graph, nodes, channels)
    if values is None:
        kinds = ", ".join(dict.fromkeys(graph.nodes[index].op_type for index in nodes)) or "nothing"
        raise WeightsError(f"{graph.where}: expected a LayerNorm of {channels} channels for {name}, found {kinds}")
    weight, bias, epsilon = values
    region.keep(f"{name}.weight", weight)
    region.keep(f"{name}.bias", bias)
    region.epsilons.add(epsilon)


def norm_of(graph: OnnxGraph, nodes: list[int], channels: int) -> tuple[Array, Array, float] | None:
    """(weight, bias, epsilon) of the LayerNorm that these nodes are, whole or in parts; None where they are none."""
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    whole = [graph.nodes[index] for index in nodes if graph.nodes[index].op_type == "LayerNormalization"]
    others = [graph.nodes[index].op_type for index in nodes if graph.nodes[index].op_type not in LAYOUT]
    if len(whole) == 1 and len(others) == 1:
        node = whole[0]
        weight = graph.constant(node.input[1])
        bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else zeros
        if weight is None or bias is None or weight.size != channels or attribute(node, "axis", -1) not in (-1, 3):
            return None
        return weight.reshape(-1), bias.reshape(-1), _rounded(attribute(node, "epsilon", 1e-5))
    epsilons = [value for value in graph.scalars(nodes, "Add") if 0 < value < 0.01]
    if others.count("ReduceMean") < 2 or "Sub" not in others or len(epsilons) != 1 or whole:
        return None
    weights, biases = graph.vectors(nodes, "Mul", channels), graph.vectors(nodes, "Add", channels)
    if len(weights) > 1 or len(biases) > 1:
        return None
    return (
        weights[0].reshape(-1) if weights else ones,
        biases[0].reshape(-1) if biases else zeros,
        _rounded(epsilons[0]),
    )


def _rounded(epsilon: float) -> float:
    """Graphs hold it in float32, people write it with a digit or two."""
    return float(f"{epsilon:.4g}")


def _block(graph: OnnxGraph, region: OnnxConvNeXt, depthwise: int, name: str, channels: int) -> str:
    """Keep one block. Returns the tensor behind its residual connection."""
    node, weight = graph.nodes[depthwise], _weight(graph, depthwise)
    side = weight.shape[-1]
    plainly = [*attribute(node, "pads", [0])] == [side // 2] * 4
    ones = [*attribute(node, "strides", [1, 1]), *attribute(node, "dilations", [1, 1])] == [1] * 4
    if weight.shape != (channels, 1, side, side) or not plainly or not ones:
        raise WeightsError(
            f"{graph.where}: {graph.named(depthwise)} has a weight {weight.shape}, strides, padding or dilation that a "
            f"ConvNeXt's depthwise convolution of {channels} channels has not"
        )
    region.nodes.add(depthwise)
    region.keep(f"{name}.dwconv.weight", weight)
    region.keep(f"{name}.dwconv.bias", _bias(graph, depthwise, channels))
    expand = _product_behind(graph, node.output[0], depthwise)
    keep_norm(graph, region, _path(graph, region, node.output[0], _data(graph, expand)), f"{name}.norm", channels)
    hidden = _linear(graph, region, expand, f"{name}.pwconv1", channels, 4 * channels)
    project = _product_behind(graph, hidden, expand)
    _activation(graph, region, _path(graph, region, hidden, _data(graph, project)), name, 4 * channels)
    at = _linear(graph, region, project, f"{name}.pwconv2", 4 * channels, channels)
    return _residual(graph, region, at, graph.root(node.input[0]), name, channels)


def _product_behind(graph: OnnxGraph, start: str, before: int) -> int:
    """The one product that everything behind a tensor comes together in."""
    visited, waiting, products = {start}, [start], set()
    while waiting:
        for index in graph.readers(waiting.pop()):
            if graph.nodes[index].op_type in ("Conv", "MatMul", "Gemm"):
                products.add(index)
            else:
                new = [name for name in graph.nodes[index].output if name not in visited]
                visited.update(new)
                waiting += new
        if len(products) > 1:
            break
    if len(products) != 1:
        raise WeightsError(
            f"{graph.where}: {len(products)} products read {graph.named(before)} where a block of a ConvNeXt has one"
        )
    return products.pop()


def _data(graph: OnnxGraph, index: int) -> str:
    computed = graph.computed(index)
    if len(computed) != 1:
        raise WeightsError(f"{graph.where}: {graph.named(index)} has no weight that is in the graph")
    return computed[0]


def _linear(graph: OnnxGraph, region: OnnxConvNeXt, index: int, name: str, inputs: int, outputs: int) -> str:
    """Keep a linear: MatMul and Add, Gemm, or a 1x1 convolution. Returns the tensor behind it."""
    node, weight = graph.nodes[index], _weight(graph, index)
    rows = weight.reshape(weight.shape[:2]) if node.op_type == "Conv" and weight.shape[2:] == (1, 1) else weight
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)):
        rows = weight.T
    if rows.shape != (outputs, inputs):
        raise WeightsError(
            f"{graph.where}: {graph.named(index)} has a weight {weight.shape}; expected {inputs} inputs and {outputs} "
            f"outputs, as {name} has them"
        )
    region.nodes.add(index)
    region.keep(f"{name}.weight", rows)
    at, bias = node.output[0], _bias(graph, index, outputs)
    readers = graph.readers(at)
    if node.op_type == "MatMul" and len(readers) == 1 and graph.nodes[readers[0]].op_type == "Add":
        added = graph.vectors(readers, "Add", outputs)
        if added:
            bias, at = added[0].reshape(-1), graph.nodes[readers[0]].output[0]
            region.nodes.add(readers[0])
    region.keep(f"{name}.bias", bias)
    return at


ACTIVATIONS = {"Erf": "gelu", "Tanh": "gelu_tanh", "Sigmoid": "silu"}


def _activation(graph: OnnxGraph, region: OnnxConvNeXt, nodes: list[int], name: str, channels: int) -> None:
    """The activation, and GRN behind it."""
    kinds = set()
    for index in nodes:
        node = graph.nodes[index]
        if node.op_type == "Gelu":
            kinds.add("gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu")
        elif node.op_type in ACTIVATIONS:
            kinds.add(ACTIVATIONS[node.op_type])
    if len(kinds) != 1:
        ops = ", ".join(dict.fromkeys(graph.nodes[index].op_type for index in nodes)) or "nothing"
        raise WeightsError(f"{graph.where}: expected GELU or SiLU in the block {name}, found {ops}")
    scales = [*graph.scalars(nodes, "Mul"), *graph.scalars(nodes, "Div")]
    if kinds == {"silu"} and scales:
        raise WeightsError(
            f"{graph.where}: the sigmoid in the block {name} has a factor of {scales[0]:.6g} (a quick GELU); expected "
            "GELU or SiLU"
        )
    region.activations |= kinds
    if any(graph.nodes[index].op_type.startswith(("ReduceL2", "ReduceSum")) for index in nodes):
        weights, biases = graph.vectors(nodes, "Mul", channels), graph.vectors(nodes, "Add", channels)
        if len(weights) != 1 or len(biases) > 1:
            raise WeightsError(f"{graph.where}: the response normalization of {name} has {len(weights)} weights, not 1")
        region.keep(f"{name}.grn.gamma", weights[0].reshape(-1))
        region.keep(f"{name}.grn.beta", biases[0].reshape(-1) if biases else np.zeros(channels, np.float32))


def _residual(graph: OnnxGraph, region: OnnxConvNeXt, at: str, residual: str, name: str, channels: int) -> str:
    """Keep the layer scale. Returns the sum with the block's input."""
    while True:
        readers = graph.readers(at)
        if len(readers) != 1:
            raise WeightsError(f"{graph.where}: {len(readers)} nodes read {at}, inside the block {name}; expected one")
        index = readers[0]
        node = graph.nodes[index]
        region.nodes.add(index)
        if node.op_type == "Add" and len(graph.computed(index)) == 2:
            other = next((one for one in node.input if one != at), at)
            if graph.root(other) != residual:
                raise WeightsError(f"{graph.where}: {graph.named(index)} adds {other}, not the input of {name}")
            while (maker := graph.maker(other)) is not None and graph.nodes[maker].op_type in LAYOUT:
                region.nodes.add(maker)
                other = graph.nodes[maker].input[0]
            return str(node.output[0])
        scale = graph.vectors([index], "Mul", channels)
        if scale and PREFIX + f"{name}.gamma" not in region.state:
            region.keep(f"{name}.gamma", scale[0].reshape(-1))
        elif node.op_type not in LAYOUT:
            raise WeightsError(f"{graph.where}: {graph.named(index)} stands in the block {name} of a ConvNeXt")
        at = node.output[0]
