"""What an ONNX file contains, in the order in which it computes with it. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifact import readback

if TYPE_CHECKING:
    import onnx

BITS = {"BFLOAT16": ("bfloat16", np.uint16), "FLOAT8E4M3FN": ("float8_e4m3fn", np.uint8)}


def contents_of_onnx(path: Path) -> readback.Contents:
    """Initializers as the nodes take them, each node's at its place; with the epsilons and forms of its attributes."""
    import onnx

    model = onnx.load(str(path))
    initializers = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer}
    dequantized: dict[str, list[str]] = {}  # what a node of constants only makes, and from which
    grids: dict[str, frozenset[str]] = {}  # of 8-bit codes: the scale and zero point that they were made with
    tensors: list[readback.Tensor] = []
    scalars: list[float] = []
    activations: list[str] = []
    for node in model.graph.node:
        given = [name for name in node.input if name]
        if given and all(name in initializers or name in dequantized for name in given):
            for name in node.output:
                dequantized[name] = [leaf for source in given for leaf in dequantized.get(source, [source])]
            continue
        quantizes = node.op_type == "QuantizeLinear"
        grid = frozenset(given[1:]) if quantizes else grids.get(node.input[0] if given else "", frozenset())
        if node.op_type == "Concat" and any(grids.get(name) != grid for name in given):
            grid = frozenset()  # codes of several grids are of none
        if quantizes or node.op_type in ("Reshape", "Slice", "Transpose", "Pad", "Concat"):
            grids |= dict.fromkeys(node.output, grid)
        for name in given:
            if name in grid and not quantizes:
                continue  # codes are read with the grid that they were made with; any other one is a constant too many
            for leaf in dequantized.get(name, [name]):
                if leaf not in initializers or initializers[leaf].type.startswith(("int64", "int32")):
                    continue
                tensors.append(initializers[leaf])
                if (
                    initializers[leaf].values.size == 1
                    and initializers[leaf].type in ("float32", "float16")
                    and not quantizes
                ):
                    scalars.append(float(initializers[leaf].values.reshape(-1)[0]))
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "LayerNormalization":
            scalars.append(attributes["epsilon"])
        elif node.op_type == "Gelu":
            activations.append("gelu_tanh" if attributes.get("approximate") == b"tanh" else "gelu")
        elif node.op_type in ACTIVATIONS:
            activations.append(ACTIVATIONS[node.op_type])
    return readback.Contents(tensors=tensors, scalars=scalars, activations=activations)


ACTIVATIONS = {"Sigmoid": "silu", "Relu": "relu", "Tanh": "tanh"}


def _tensor(tensor: onnx.TensorProto) -> readback.Tensor:
    import onnx

    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if kind in BITS:
        name, bits = BITS[kind]
        values = np.frombuffer(tensor.raw_data, bits).reshape(tuple(tensor.dims))
        return readback.Tensor(tensor.name, name, values)
    values = onnx.numpy_helper.to_array(tensor)
    return readback.Tensor(tensor.name, values.dtype.name, values)
