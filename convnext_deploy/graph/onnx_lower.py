"""Nodes of this package's opset as those of an older one: a graph has one opset, and it is the user's.

LayerNormalization came with opset 17, Gelu with 20, axes as an input of reductions with 18. Written out, they have the
form that ONNX Runtime and OpenVINO fuse again when they load the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError

if TYPE_CHECKING:
    import onnx

OLDEST = 11  # Erf, and every operator here in the form that it still has
OLDEST_8_BITS = 13  # a scale for each channel
OLDEST_8_BITS_HALF = 19  # scales in half precision
ATTRIBUTES = {"QuantizeLinear": {"saturate": 19, "output_dtype": 21, "block_size": 21, "precision": 23},
              "DequantizeLinear": {"block_size": 21, "output_dtype": 23},
              "Cast": {"saturate": 19, "round_mode": 24}, "Reshape": {"allowzero": 14}}  # fmt: skip


class Lowered:
    """The nodes of a model in another opset, and the constants that they need beside its own.

    Raises:
        UsageError: an opset that cannot say what the model does.
    """

    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        import onnx

        self.constants: list[onnx.TensorProto] = []
        self._held = {tensor.name: tensor for tensor in model.graph.initializer}
        kinds = {node.op_type for node in model.graph.node}
        halves = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
        oldest = OLDEST
        if "QuantizeLinear" in kinds:
            oldest = OLDEST_8_BITS_HALF if halves else OLDEST_8_BITS
        if opset < oldest:
            raise UsageError(f"the graph has opset {opset}; expected at least {oldest}: export it with a newer one")
        self._types = _types(model)
        self.nodes = [node for old in model.graph.node for node in self._lowered(old, opset)]

    def _lowered(self, node: onnx.NodeProto, opset: int) -> Iterator[onnx.NodeProto]:
        import onnx

        if node.op_type == "LayerNormalization" and opset < 17:
            yield from self._layer_norm(node)
        elif node.op_type == "Gelu" and opset < 20:
            yield from self._gelu(node)
        elif node.op_type.startswith("Reduce") and len(node.input) > 1 and opset < 18:
            axes = onnx.numpy_helper.to_array(self._held[node.input[1]]).tolist()
            new = onnx.NodeProto()
            new.CopyFrom(node)
            del new.input[1]
            _drop(new, {"noop_with_empty_axes"})
            new.attribute.append(onnx.helper.make_attribute("axes", axes))
            yield new
        else:
            later = {name for name, since in ATTRIBUTES.get(node.op_type, {}).items() if since > opset}
            if later & {one.name for one in node.attribute}:
                old, node = node, onnx.NodeProto()
                node.CopyFrom(old)
                _drop(node, later)
            yield node

    def _layer_norm(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Statistics in fp32, whatever the type, as the whole node has them."""
        import onnx

        name, wide = node.output[0], onnx.TensorProto.FLOAT
        epsilon = next((one.f for one in node.attribute if one.name == "epsilon"), 1e-5)
        x, half = node.input[0], self._types.get(node.input[0]) == onnx.TensorProto.FLOAT16
        weight = np.ravel(onnx.numpy_helper.to_array(self._held[node.input[1]])).astype(np.float32)
        bias = np.zeros_like(weight)
        if len(node.input) > 2 and node.input[2]:
            bias = np.ravel(onnx.numpy_helper.to_array(self._held[node.input[2]])).astype(np.float32)
        if half:
            yield _node("Cast", [x], f"{name}_wide", to=wide)
            x = f"{name}_wide"
        yield _node("ReduceMean", [x], f"{name}_mean", axes=[-1], keepdims=1)
        yield _node("Sub", [x, f"{name}_mean"], f"{name}_centred")
        yield _node("Pow", [f"{name}_centred", self._scalar(name, "two", 2.0)], f"{name}_squared")
        yield _node("ReduceMean", [f"{name}_squared"], f"{name}_variance", axes=[-1], keepdims=1)
        yield _node("Add", [f"{name}_variance", self._scalar(name, "epsilon", epsilon)], f"{name}_guarded")
        yield _node("Sqrt", [f"{name}_guarded"], f"{name}_deviation")
        yield _node("Div", [f"{name}_centred", f"{name}_deviation"], f"{name}_normed")
        yield _node("Mul", [f"{name}_normed", self._constant(name, "weight", weight)], f"{name}_scaled")
        end = f"{name}_whole" if half else name
        yield _node("Add", [f"{name}_scaled", self._constant(name, "bias", bias)], end)
        if half:
            yield _node("Cast", [end], name, to=onnx.TensorProto.FLOAT16)

    def _gelu(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        import onnx

        name, x = node.output[0], node.input[0]
        kind = np.float16 if self._types.get(x) == onnx.TensorProto.FLOAT16 else np.float32

        def number(what: str, value: float) -> str:
            return self._constant(name, what, np.array(value, kind))

        if any(one.name == "approximate" and one.s == b"tanh" for one in node.attribute):
            yield _node("Mul", [x, x], f"{name}_square")
            yield _node("Mul", [x, f"{name}_square"], f"{name}_cube")
            yield _node("Mul", [number("cubic", 0.044715), f"{name}_cube"], f"{name}_bent")
            yield _node("Add", [x, f"{name}_bent"], f"{name}_sum")
            yield _node("Mul", [number("root", math.sqrt(2 / math.pi)), f"{name}_sum"], f"{name}_inner")
            yield _node("Tanh", [f"{name}_inner"], f"{name}_curve")
        else:
            yield _node("Div", [x, number("root", math.sqrt(2))], f"{name}_inner")
            yield _node("Erf", [f"{name}_inner"], f"{name}_curve")
        yield _node("Add", [f"{name}_curve", number("one", 1.0)], f"{name}_raised")
        yield _node("Mul", [x, f"{name}_raised"], f"{name}_doubled")
        yield _node("Mul", [f"{name}_doubled", number("half", 0.5)], name)

    def _scalar(self, name: str, what: str, value: float) -> str:
        return self._constant(name, what, np.array(value, np.float32))

    def _constant(self, name: str, what: str, value: Any) -> str:
        import onnx

        self.constants.append(onnx.numpy_helper.from_array(value, f"{name}_{what}"))
        return f"{name}_{what}"


def _drop(node: onnx.NodeProto, names: set[str]) -> None:
    """Remove attributes; what they say here is what older opsets do."""
    for index in reversed(range(len(node.attribute))):
        if node.attribute[index].name in names:
            del node.attribute[index]


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor that shape inference knows."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}
