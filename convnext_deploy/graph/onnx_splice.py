"""Somebody's ONNX graph with another ConvNeXt in the place of its own. Everything else stays, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import BuildError, UsageError
from ..models.onnx_blocks import OnnxConvNeXt
from .onnx_lower import Lowered

if TYPE_CHECKING:
    import onnx

NAME = "convnext_deploy"  # what the names of all that is put in begin with
DEFAULT = ("", "ai.onnx")  # ONNX's own operators, which have two names


def opset(model: onnx.ModelProto) -> int:
    return next((int(one.version) for one in model.opset_import if one.domain in DEFAULT), 1)


def spliced(user: onnx.ModelProto, part: onnx.ModelProto, region: OnnxConvNeXt) -> onnx.ModelProto:
    """The user's model with `part` between the cuts.

    Args:
        user: the whole model; it is left unchanged.
        part: this package's ConvNeXt, one input and an output for each cut, all in fp32 and NCHW.
        region: of the user's graph.

    Raises:
        UsageError: something outside reads the ConvNeXt between the cuts, or the opset is too old.
    """
    import onnx

    lowered = Lowered(part, opset(user))
    prefix = _unused(user)
    nodes, constants = _between_cuts(part, region, lowered, prefix)
    ends = frozenset(cut.tensor for cut in region.cuts)
    removed = taken_out(user, region)
    result = onnx.ModelProto()
    result.CopyFrom(user)
    gone = {name for index in removed for name in user.graph.node[index].output} - ends
    del result.graph.node[:]
    for index, node in enumerate(user.graph.node):
        if index == removed[0]:
            result.graph.node.extend(nodes)
        if index not in {*removed}:
            result.graph.node.append(node)
    _keep(result.graph.value_info, lambda value: value.name not in gone)
    read = {*_read(result.graph.node), *(value.name for value in user.graph.output)}
    once = {*_read(user.graph.node), *(value.name for value in user.graph.output)}
    _keep(result.graph.initializer, lambda tensor: tensor.name in read or tensor.name not in once)
    names = {tensor.name for tensor in user.graph.initializer} - {tensor.name for tensor in result.graph.initializer}
    _keep(result.graph.input, lambda value: value.name not in names)  # where IR before 4 lists initializers too
    result.graph.initializer.extend(constants)
    known = {one.domain for one in user.opset_import}
    result.opset_import.extend(o for o in part.opset_import if o.domain not in DEFAULT and o.domain not in known)
    return result


def taken_out(user: onnx.ModelProto, region: OnnxConvNeXt) -> list[int]:
    """The nodes that only the old ConvNeXt needed. What nobody needed before is left as it was.

    Raises:
        UsageError: something outside reads the ConvNeXt between the cuts.
    """
    left = alive(user.graph, (region.input,), frozenset(cut.tensor for cut in region.cuts))
    removed = sorted(alive(user.graph, (), frozenset()) - left)
    _refuse_readers(user, region, {*removed})
    return removed


def _keep(field, is_kept) -> None:  # type: ignore[no-untyped-def]  # a repeated field of any message
    kept = [one for one in field if is_kept(one)]
    if len(kept) < len(field):
        copies = [type(one).FromString(one.SerializeToString()) for one in kept]
        del field[:]
        field.extend(copies)


def _between_cuts(
    part: onnx.ModelProto, region: OnnxConvNeXt, lowered: Lowered, prefix: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The part's nodes and constants under names of their own, from the cut's input to its outputs."""
    import onnx

    names = {part.graph.input[0].name: region.input}
    nodes: list[onnx.NodeProto] = []
    if region.half:
        names[part.graph.input[0].name] = f"{prefix}wide"
        nodes.append(_node("Cast", region.input, f"{prefix}wide", to=onnx.TensorProto.FLOAT))
    behind = []
    for output, cut in zip(part.graph.output, region.cuts, strict=True):
        at = cut.tensor
        if cut.axes == "NHWC":
            source = f"{prefix}{output.name}_nchw"
            behind.append(_node("Transpose", source, at if not region.half else f"{prefix}{output.name}_nhwc",
                                perm=[0, 2, 3, 1]))  # fmt: skip
            names[output.name] = source
            source = f"{prefix}{output.name}_nhwc"
        else:
            source = f"{prefix}{output.name}"
            names[output.name] = source if region.half else at
        if region.half:
            behind.append(_node("Cast", source, at, to=onnx.TensorProto.FLOAT16))

    def named(name: str) -> str:
        return names.get(name, f"{prefix}{name}") if name else ""

    for old in lowered.nodes:
        node = onnx.NodeProto()
        node.CopyFrom(old)
        node.name = f"{prefix}{old.name}"
        node.input[:] = [named(name) for name in old.input]
        node.output[:] = [named(name) for name in old.output]
        nodes.append(node)
    constants = []
    read = {*_read(lowered.nodes)}
    for tensor in (*part.graph.initializer, *lowered.constants):
        if tensor.name in read:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            copy.name = named(tensor.name)
            constants.append(copy)
    return [*nodes, *behind], constants


def _node(op: str, source: str, target: str, **attributes: object) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node(op, [source], [target], name=f"{target}_{op}", **attributes)


def _unused(model: onnx.ModelProto) -> str:
    """A beginning of names that no name of the model has."""
    held = {name for node in model.graph.node for name in (*node.output, node.name)}
    held |= {tensor.name for tensor in model.graph.initializer}
    prefix, count = f"{NAME}/", 1
    while any(name.startswith(prefix) for name in held):  # it was spliced before
        count += 1
        prefix = f"{NAME}_{count}/"
    return prefix


def _read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Every tensor that nodes read, those inside of their subgraphs too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _read(graph.node)
                yield from (value.name for value in graph.output)


def alive(graph: onnx.GraphProto, needed: Iterable[str], ends: frozenset[str]) -> set[int]:
    """The nodes that the graph's outputs, or these tensors, depend on.

    Args:
        ends: tensors that are there without the nodes that made them.
    """
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name not in ends}
    waiting, nodes = [*(value.name for value in graph.output), *needed], set[int]()
    while waiting:
        index = makers.get(waiting.pop())
        if index is not None and index not in nodes:
            nodes.add(index)
            waiting += _read([graph.node[index]])
    return nodes


def _refuse_readers(user: onnx.ModelProto, region: OnnxConvNeXt, removed: set[int]) -> None:
    left = region.nodes - removed
    if not left:
        return
    inside = {name for index in region.nodes for name in user.graph.node[index].output}
    inside -= {cut.tensor for cut in region.cuts}
    for index, node in enumerate(user.graph.node):
        if index in removed or index in region.nodes:
            continue
        name = next((name for name in _read([node]) if name in inside), None)
        if name is not None:
            raise UsageError(
                f"{node.op_type} {node.name or node.output[0]} reads {name!r}, which is inside of the ConvNeXt; name "
                "it in --at if it is a stage's map, or change the graph so that only maps are read"
            )
    name = next((value.name for value in user.graph.output if value.name in inside), None)
    if name is not None:
        raise UsageError(f"the graph puts out {name!r}, which is inside of the ConvNeXt; name it in --at")


def exchanged(user: onnx.ModelProto, result: onnx.ModelProto) -> tuple[int, int]:
    """How many nodes `spliced` took out, and put in.

    Raises:
        BuildError: a node or a constant of the user's is not, byte for byte, what it was.
    """
    old = [node.SerializeToString(deterministic=True) for node in user.graph.node]
    new = [node.SerializeToString(deterministic=True) for node in result.graph.node]
    remaining = iter(old)
    kept = sum(node in remaining for node in (n for n in new if n in {*old}))
    held = {tensor.name: tensor for tensor in user.graph.initializer}
    changed = [t.name for t in result.graph.initializer if t.name in held and t != held[t.name]]
    if kept != sum(node in {*old} for node in new) or changed:
        raise BuildError(
            f"splicing changed what it was to leave alone: {', '.join(changed[:3]) or 'the order of nodes'}"
        )
    return len(old) - kept, len(new) - kept


def behind(user: onnx.ModelProto, tensors: Iterable[str], kinds: frozenset[str]) -> dict[str, list[str]]:
    """Of each output, the operators of those kinds, and of other domains than ONNX's, between the tensors and it."""
    reached = {*tensors}
    held: dict[str, set[str]] = {name: set() for name in reached}
    for node in user.graph.node:
        sources = [name for name in _read([node]) if name in held]
        if not sources:
            continue
        kinds_behind = {kind for name in sources for kind in held[name]}
        if node.op_type in kinds or node.domain not in DEFAULT:
            kinds_behind.add(node.op_type)
        held |= {name: kinds_behind for name in node.output if name not in reached}
    return {value.name: sorted(held.get(value.name, ())) for value in user.graph.output}
