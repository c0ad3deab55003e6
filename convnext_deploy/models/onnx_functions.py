"""Functions of an ONNX model, which some exporters write for modules, written out into its main graph."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ..errors import WeightsError, plain

if TYPE_CHECKING:
    import onnx

DEEPEST = 64  # functions within functions
MOST_NODES = 2**18  # of all functions, written out; functions that call others twice each are as many in 20 lines


def written_out(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model without functions; names of its main graph's tensors stay.

    A function of another opset than the model's stays, as a node that nothing is read through.

    Args:
        model: without the weights that are beside it, which no protobuf could contain.

    Raises:
        WeightsError: a function calls itself, or they are far too many nodes.
    """
    import onnx.inliner

    nodes = _nodes(model, where)
    if nodes > MOST_NODES:
        raise WeightsError(
            f"{where} has functions of {nodes:,} nodes in all, written out; at most {MOST_NODES:,} are read: export it "
            "without functions"
        )
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:  # onnx's own errors have no base but Exception
        raise WeightsError(f"{where}: its functions cannot be written out: {plain(error)}; export it without") from None


def _nodes(model: onnx.ModelProto, where: str) -> int:
    """How many nodes the calls of functions are, written out."""
    bodies = {(one.domain, one.name, one.overload): one for one in model.functions}
    entered: list[tuple[str, str, str]] = []

    @functools.cache
    def of_call(key: tuple[str, str, str]) -> int:
        if key in entered or len(entered) == DEEPEST:
            why = "calls itself" if key in entered else f"is within {DEEPEST} others, and as many are read"
            raise WeightsError(f"{where} has a function {key[1]!r} that {why}; export it without functions")
        entered.append(key)
        count = of_nodes(bodies[key].node)
        entered.pop()
        return count

    def of_nodes(nodes) -> int:  # type: ignore[no-untyped-def]  # a repeated field of a graph's or a function's
        count = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            count += of_call(key) if key in bodies else 1
            for attribute in node.attribute:
                count += sum(of_nodes(graph.node) for graph in (attribute.g, *attribute.graphs))
        return count

    return of_nodes(model.graph.node)
