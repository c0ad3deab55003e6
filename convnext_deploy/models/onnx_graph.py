"""An ONNX graph as something to look around in: who makes a tensor, who reads it, and what is constant.

It reads any exporter's graph, so it takes nothing from names. Operators that it does not know, of any domain, are nodes
that nothing is read through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError, counted, plain
from .onnx_functions import written_out

if TYPE_CHECKING:
    import onnx

LAYOUT = frozenset({"Transpose", "Identity", "Cast", "Dropout"})  # the same numbers, in another order or type
# What norms are made of, where they are not one node.
NORM = LAYOUT | {"ReduceMean", "Sub", "Pow", "Mul", "Add", "Sqrt", "Div", "Reciprocal", "LayerNormalization"}
PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
# Of constants alone: exporters that fold none leave transposes and reshapes of weights in the graph.
FOLDED = LAYOUT | {
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Mul",
    "Add",
    "Sub",
    "Div",
    "DequantizeLinear",
    "Expand",
    "Concat",
}
# Numbers that such nodes may give in all: so many for each byte of the graph's own constants, and beside them.
PER_BYTE, BESIDE = 4, 2**24
# Inputs that a node of these kinds has.
_LEAST = {**dict.fromkeys(NORM, 1), **dict.fromkeys(PRODUCTS, 2), "LayerNormalization": 2}


def load(path: Path) -> onnx.ModelProto:
    """A whole model, with the weights that are beside it, and its functions written out.

    Raises:
        WeightsError: it is none, is damaged, or lacks the file of its weights.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        if model.functions:
            model = written_out(model, path.name)
        onnx.load_external_data_for_model(model, str(path.parent))
    except WeightsError:
        raise
    except Exception as error:  # protobuf's, onnx's checker's and the system's errors share no base below Exception
        raise WeightsError(f"{path} is not a readable ONNX model: {plain(error)}") from None
    return model


def has_functions(path: Path) -> bool:
    """Whether `load` gives another graph than the file's."""
    import onnx

    return bool(onnx.load(str(path), load_external_data=False).functions)


class OnnxGraph:
    """The main graph of a model. Tensors are told by their names, which are unique in it."""

    def __init__(self, model: onnx.ModelProto, where: str) -> None:
        self.where = where
        self.nodes = list(model.graph.node)
        self.functions = [f"{one.domain}.{one.name}" for one in model.functions]
        self.inputs = [value.name for value in model.graph.input]
        self._shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
        self.outputs = [value.name for value in model.graph.output]
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._maker: dict[str, int] = {}
        self._readers: dict[str, list[int]] = {}
        self._constants: dict[str, NDArray[Any] | None] = {}
        for index, node in enumerate(self.nodes):
            for name in filter(None, node.output):
                if name in self._maker:
                    raise WeightsError(
                        f"{where} makes the tensor {name!r} twice, so it is no valid ONNX; export it again"
                    )
                self._maker[name] = index
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(index)
        constants = [
            *self._initializers.values(),
            *(one.t for node in self.nodes if node.op_type == "Constant" for one in node.attribute),
        ]
        self._room = BESIDE + PER_BYTE * sum(len(one.raw_data) + 4 * len(one.float_data) for one in constants)
        self._check()

    def _check(self) -> None:
        """Refuse what everything here would follow for ever, or stumble over."""
        for index, node in enumerate(self.nodes):
            late = next((name for name in node.input if self._maker.get(name, -1) >= index), None)
            if late is not None:
                raise WeightsError(
                    f"{self.where} reads the tensor {late!r} before it makes it, so it is no valid ONNX; export it "
                    "again"
                )
            if not node.output or len(node.input) < _LEAST.get(node.op_type, 0):
                raise WeightsError(
                    f"{self.where} has a {node.op_type} with {counted(len(node.input), 'input')} and "
                    f"{counted(len(node.output), 'output')}, "
                    "so it is no valid ONNX; export it again"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._maker or name in self.inputs

    def sides(self, name: str) -> list[int] | None:
        """Height and width of an input of images; None where it takes several, and of other tensors."""
        sides = [dim.dim_value for dim in self._shapes.get(name, ())[-2:]]
        return sides if len(sides) == 2 and all(sides) else None

    def maker(self, name: str) -> int | None:
        """The node that a tensor comes from; None for inputs and initializers."""
        return self._maker.get(name)

    def readers(self, name: str) -> list[int]:
        """The nodes that read a tensor."""
        return self._readers.get(name, [])

    def constant(self, name: str) -> NDArray[Any] | None:
        """What a tensor contains whatever the images are; None where that depends on them."""
        if name not in self._constants:
            try:
                self._constants[name] = self._constant(name)
            except WeightsError:
                raise
            except Exception as error:  # numpy's and onnx's, of values that do not go together
                raise WeightsError(
                    f"{self.where}: the constant {name!r} cannot be read or computed: {plain(error)}; export it again"
                ) from None
        return self._constants[name]

    def _constant(self, name: str) -> NDArray[Any] | None:
        from onnx import numpy_helper
        from onnx.reference import ReferenceEvaluator

        if name in self._initializers:
            return numpy_helper.to_array(self._initializers[name])
        index = self._maker.get(name)
        if index is None:
            return None
        node = self.nodes[index]
        if node.op_type == "Constant":
            return np.asarray(ReferenceEvaluator(node).run(None, {})[0])
        if node.op_type not in FOLDED or node.domain not in ("", "ai.onnx"):
            return None
        given = {one: self.constant(one) for one in node.input if one}
        if not given or any(value is None for value in given.values()):
            return None
        self._room -= _size(node, {name: value for name, value in given.items() if value is not None})
        if self._room < 0:
            raise WeightsError(
                f"{self.where}: {self.named(index)} makes far more numbers of the graph's constants than they are; "
                "export it with its constants folded"
            )
        return np.asarray(ReferenceEvaluator(node).run(None, given)[0])

    def computed(self, index: int) -> list[str]:
        """The inputs of a node that depend on the images."""
        return [name for name in self.nodes[index].input if name and self.constant(name) is None]

    def root(self, name: str) -> str:
        """The tensor whose numbers a tensor has, back through what only changes their order or type."""
        while (index := self._maker.get(name)) is not None and self.nodes[index].op_type in LAYOUT:
            name = self.nodes[index].input[0]
        return name

    def path(self, start: str, end: str) -> list[int] | None:
        """Every node between two tensors, in the graph's order; None where anything else than constants comes in.

        Products are not passed: what is between two of them is what is asked for.
        """
        nodes: set[int] = set()
        waiting = [end]
        while waiting:
            name = waiting.pop()
            index = self._maker.get(name)
            if name == start or index in nodes:
                continue
            if index is None or self.nodes[index].op_type in PRODUCTS:
                return None
            nodes.add(index)
            waiting += self.computed(index)
        return sorted(nodes)

    def around(self, start: str, stops: frozenset[int] = frozenset()) -> Iterator[tuple[str, int]]:
        """(tensor, reader) for all that reads a tensor through norms and changes of layout, and is neither of them.

        Sums of two computed tensors are not passed: they are residual connections, or a neck's.

        Args:
            stops: nodes that are left out.
        """
        visited, waiting = {start}, [start]
        while waiting:
            name = waiting.pop()
            for index in self.readers(name):
                node = self.nodes[index]
                if index in stops:
                    continue
                joins = node.op_type == "Add" and len(self.computed(index)) > 1
                if node.op_type not in NORM or joins:
                    yield name, index
                elif node.output[0] not in visited:
                    visited.add(node.output[0])
                    waiting.append(node.output[0])
            if name in self.outputs:
                yield name, -1

    def vectors(self, nodes: list[int], op: str, channels: int) -> list[NDArray[Any]]:
        """The constants of that many values which nodes of one kind multiply with or add, in the graph's order."""
        vectors = []
        for index in nodes:
            if self.nodes[index].op_type == op:
                vectors += [v for v in self._constants_of(index) if v.size == channels]
        return vectors

    def scalars(self, nodes: list[int], op: str) -> list[float]:
        """The single numbers that nodes of one kind take."""
        scalars = []
        for index in nodes:
            if self.nodes[index].op_type == op:
                scalars += [float(v.reshape(-1)[0]) for v in self._constants_of(index) if v.size == 1]
        return scalars

    def _constants_of(self, index: int) -> Iterator[NDArray[Any]]:
        for name in self.nodes[index].input:
            value = self.constant(name) if name else None
            if value is not None:
                yield value

    def axes(self, name: str) -> str | None:
        """The order of a map's axes, as "NCHW": a convolution's, through everything since; None where unknown."""
        turned: list[list[int]] = []
        while (index := self._maker.get(name)) is not None:
            node = self.nodes[index]
            if node.op_type == "Conv":
                axes = "NCHW"
                for permutation in reversed(turned):
                    axes = "".join(axes[axis] for axis in permutation)
                return axes
            if node.op_type == "Transpose":
                turned.append([*attribute(node, "perm", [3, 2, 1, 0])])
            if node.op_type not in NORM and node.op_type != "MatMul" and node.op_type not in ACTIVATING:
                return None
            # Of a residual connection, the shorter way: the later one in the graph.
            name = max(self.computed(index), key=lambda one: self._maker.get(one, -1))
        return None

    def named(self, index: int) -> str:
        """A node as an error names it."""
        node = self.nodes[index]
        return f"{node.op_type} {node.name or node.output[0]}"


def _size(node: onnx.NodeProto, given: dict[str, NDArray[Any]]) -> int:
    """How many numbers a node of constants has."""
    if node.op_type in ("Mul", "Add", "Sub", "Div"):
        return math.prod(np.broadcast_shapes(*(value.shape for value in given.values())))
    if node.op_type == "Expand":
        to = (int(side) for side in given[node.input[1]].reshape(-1))
        return math.prod(np.broadcast_shapes(given[node.input[0]].shape, tuple(to)))
    if node.op_type == "Concat":
        return sum(given[name].size for name in node.input)
    return given[node.input[0]].size


ACTIVATING = frozenset({"Gelu", "Erf", "Tanh", "Sigmoid", "ReduceL2", "ReduceSum", "Abs"})


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """One attribute of a node, or what it is where it is left out."""
    import onnx

    for one in node.attribute:
        if one.name == name:
            value = onnx.helper.get_attribute_value(one)
            return value.decode() if isinstance(value, bytes) else value
    return default
