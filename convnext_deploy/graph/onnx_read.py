"""Reading back what an ONNX model computes in, from its graph or from ONNX Runtime's profile. Needs no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BuildError
from .onnx_fuse import DOMAIN, OPERATOR

if TYPE_CHECKING:
    import onnx

SHAPE_DATA_BYTES = 1024  # initializers up to here may be shapes or axes, which shape inference reads
TYPE_NAMES = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "INT8": "int8", "UINT8": "int8",
    "FLOAT8E4M3FN": "fp8",
}  # fmt: skip


def shares(macs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(type, multiply-accumulates) pairs as the share of each type, largest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, count in macs:
        sums[name] += count
    total = sum(sums.values())
    if not total:
        raise BuildError("no convolution or matrix product was found in the built graph")
    return {name: count / total for name, count in sorted(sums.items(), key=lambda item: -item[1])}


def precision_of_onnx(path: Path, input_shape: tuple[int, ...]) -> dict[str, float]:
    """Share of the multiply-accumulates by the type of the weights they multiply with.

    A product whose operands both come from a DequantizeLinear counts as of the type that is dequantized.

    Args:
        path: an ONNX file; weights in another file are not read.
        input_shape: a concrete shape of the one input, to infer all others from.
    """
    import onnx

    model = _without_weights(onnx.load(str(path), load_external_data=False))
    _unfuse(model)
    for axis, size in zip(model.graph.input[0].type.tensor_type.shape.dim, input_shape, strict=True):
        axis.ClearField("dim_param")
        axis.dim_value = size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    types = {t.name: (t.data_type, tuple(t.dims)) for t in inferred.graph.initializer}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        tensor = value.type.tensor_type
        types[value.name] = (tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim))
    macs = []
    dequantized = {n.output[0]: types[n.input[0]][0] for n in inferred.graph.node if n.op_type == "DequantizeLinear"}
    for node in inferred.graph.node:
        if node.op_type in ("Conv", "MatMul", "MatMulInteger", "Gemm"):
            elem_type, weight_shape = types[node.input[1]]
            if node.input[0] in dequantized and node.input[1] in dequantized:
                elem_type = dequantized[node.input[1]]
            name = onnx.TensorProto.DataType.Name(elem_type)
            # ONNX's inference does not divide, so it loses sides that a graph fills up; such an extent counts as one.
            output_shape = tuple(max(size, 1) for size in types[node.output[0]][1]) or weight_shape[-1:]
            count = macs_of(node.op_type, weight_shape, output_shape)
            macs.append((TYPE_NAMES.get(name, name.lower()), count))
    return shares(macs)


def _unfuse(model: onnx.ModelProto) -> None:
    """ONNX Runtime's fused 8-bit product as the standard operators that shape inference knows."""
    import onnx

    nodes = []
    for node in model.graph.node:
        if node.op_type == OPERATOR and node.domain == DOMAIN:
            integer = onnx.helper.make_node("MatMulInteger", node.input[:2], [f"{node.output[0]}_integer"])
            nodes += [
                integer,
                onnx.helper.make_node("Cast", integer.output, node.output, to=onnx.TensorProto.FLOAT),
            ]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with large initializers as typed inputs: shape inference would copy their data several times."""
    import onnx

    graph = model.graph
    small = [t for t in graph.initializer if len(t.raw_data) <= SHAPE_DATA_BYTES and not t.external_data]
    typed = [
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer if t not in small
    ]
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in small]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(typed)
    return onnx.ModelProto.FromString(model.SerializeToString())


def macs_of(op: str, weight_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> float:
    """Multiply-accumulates of one convolution (weight (out, in / groups, kH, kW)) or matrix product."""
    if op == "Conv":
        return math.prod(output_shape) * math.prod(weight_shape[1:])
    out = output_shape[-1]
    return math.prod(output_shape) * math.prod(weight_shape) / out


def convolution_groups(path: Path) -> dict[str, int]:
    """Name of each convolution in the graph to its number of groups."""
    import onnx

    nodes = [node for node in onnx.load(str(path), load_external_data=False).graph.node if node.op_type == "Conv"]
    return {node.name: next((a.i for a in node.attribute if a.name == "group"), 1) for node in nodes}


PROFILE_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}


def precision_of_profile(events: list[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """Share of the multiply-accumulates by type, and how many products ran in 8 bits, from a profile of one run.

    ONNX Runtime's profile names each executed kernel with the types and shapes it really saw, after ONNX Runtime's
    own casts and fusions.
    """
    macs = []
    for event in events:
        arguments = event.get("args", {})
        op = arguments.get("op_name", "")
        kind = "Conv" if "Conv" in op else "MatMul" if ("MatMul" in op or "Gemm" in op) else None
        if kind is None or "input_type_shape" not in arguments:
            continue
        inputs = [next(iter(entry.items())) for entry in arguments["input_type_shape"]]
        output = next(iter(arguments["output_type_shape"][0].values()))
        type_name, shape = inputs[0]
        # Packed weights are not listed among the inputs of a matrix product, so its depth comes from the activation.
        weight = tuple(inputs[1][1]) if kind == "Conv" else (shape[-1], output[-1])
        macs.append((PROFILE_TYPES.get(type_name, type_name), macs_of(kind, weight, tuple(output))))
    return shares(macs), sum(name == "int8" for name, _ in macs)
