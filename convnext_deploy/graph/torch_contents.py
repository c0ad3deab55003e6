"""What TorchScript files and torch.export programs hold, in the order in which they compute with it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..artifact import readback
from .module_contents import stored

ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "relu": "relu", "tanh": "tanh"}


def contents_of_script(module: Any) -> readback.Contents:
    """Read a traced, frozen and loaded TorchScript module: its weights are constants of the graph."""
    graph = torch.jit.freeze(module.eval()).graph if list(module.parameters()) else module.graph
    return _contents(
        (node.kind().partition("::")[2], [_constant(value) for value in node.inputs()])
        for node in graph.nodes()
        if node.kind() != "prim::Constant"
    )


def _constant(value: Any) -> object:
    """A graph value's content; None where it is computed."""
    node = value.node()
    return value.toIValue() if node.kind() == "prim::Constant" else None


def contents_of_program(program: torch.export.ExportedProgram) -> readback.Contents:
    """Read a captured program."""
    signature = program.graph_signature
    places = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    known: dict[str, Tensor] = {}
    for node, name in places.items():
        known[node] = program.state_dict[name] if name in program.state_dict else program.constants[name]
    for node, name in signature.inputs_to_lifted_tensor_constants.items():
        known[node] = program.constants[name]
    uses = []
    for node in program.graph.nodes:
        if node.op != "call_function" or "_assert" in str(node.target):
            continue
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        if name == "to" and isinstance(node.args[0], torch.fx.Node) and node.args[0].name in known:
            known[node.name] = known[node.args[0].name]  # of the same type: a cast that changes nothing
            continue
        arguments = [*node.args, *node.kwargs.values(), *_defaults(node)]
        values = [known.get(a.name) if isinstance(a, torch.fx.Node) else a for a in arguments]
        uses.append((name, values))
    return _contents(iter(uses))


def _defaults(node: torch.fx.Node) -> list[object]:
    """What a call leaves to its operator's defaults: PyTorch 2.9 does not write an argument that equals its own."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    left = node.target._schema.arguments[len(node.args) :]
    return [argument.default_value for argument in left if argument.name not in node.kwargs]


def _contents(uses: Iterator[tuple[str, list[object]]]) -> readback.Contents:
    """Args: uses: (operation's name, its constant arguments, None for computed ones)."""
    tensors: list[readback.Tensor] = []
    scalars: list[float] = []
    activations: list[str] = []
    for name, values in uses:
        name = name.removeprefix("_").rstrip("_")
        for value in values:
            if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype.itemsize == 1):
                if value.numel() == 1:
                    scalars.append(value.float().item())
                tensors.append(stored(f"{name} {len(tensors)}", value))
            elif isinstance(value, float):
                scalars.append(value)
        if name in ACTIVATIONS:
            activations.append("gelu_tanh" if "tanh" in values else ACTIVATIONS[name])
    return readback.Contents(tensors=tensors, scalars=scalars, activations=activations)
