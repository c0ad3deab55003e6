"""The ConvNeXt inside somebody's ONNX graph: found by its pattern, its weights read, its ends named.

The numbers that are read are compared later, with what the graph itself computes (`workflows.onnx_oracle`, and whole
graphs in `workflows.splice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .onnx_blocks import PREFIX, Cut, OnnxConvNeXt, follow, is_depthwise, keep_norm, norm_of
from .onnx_graph import LAYOUT, OnnxGraph, attribute

if TYPE_CHECKING:
    import onnx


def find(graph: OnnxGraph, names: Sequence[str] = ()) -> OnnxConvNeXt:
    """The one ConvNeXt of a graph.

    Args:
        names: the tensor that the stem reads, and those to cut at behind it, the first stage's first; none: found.

    Raises:
        WeightsError: none, several, something that is no ConvNeXt, or names that are not at its ends.
    """
    for name in names:
        if name not in graph:
            raise WeightsError(f"{graph.where} has no tensor {name!r}; {_ends_of_all(graph)}")
    stems = [index for index, node in enumerate(graph.nodes) if _is_stem(graph, index)]
    if names:
        stems = [index for index in stems if graph.root(graph.nodes[index].input[0]) == graph.root(names[0])]
        if not stems:
            raise WeightsError(f"no stem of a ConvNeXt reads {names[0]!r} in {graph.where}; {_ends_of_all(graph)}")
    if not stems:
        raise WeightsError(
            f"{graph.where} has no ConvNeXt: expected a 4x4 convolution of stride 4 and depthwise ones behind it, "
            f"and it has {sum(is_depthwise(graph, index) for index in range(len(graph.nodes)))} depthwise convolutions"
            + (
                f"; nothing is read of its function {graph.functions[0]}, which has another opset than the graph"
                if graph.functions
                else ""
            )
        )
    if len(stems) > 1:
        inputs = ", ".join(graph.nodes[index].input[0] for index in stems)
        raise WeightsError(f"{graph.where} has {len(stems)} ConvNeXts, whose stems read {inputs}; choose with --at")
    network = follow(graph, stems[0])
    network.cuts = _asked(graph, network, names[1:]) if len(names) > 1 else _cuts(graph, network)
    if len(network.epsilons) > 1 or len(network.activations) > 1:
        several = sorted(network.epsilons) if len(network.epsilons) > 1 else sorted(network.activations)
        raise WeightsError(f"the ConvNeXt in {graph.where} has {several} at once; expected one of them everywhere")
    return network


def _ends_of_all(graph: OnnxGraph) -> str:
    """The ends of what is found, as the rest of an error."""
    stems = [index for index in range(len(graph.nodes)) if _is_stem(graph, index)]
    if not stems:
        return "and no ConvNeXt was found in it either"
    ends = []
    for stem in stems:
        network = follow(graph, stem)
        ends.append(",".join([network.input, *(cut.tensor for cut in _cuts(graph, network))]))
    return f"found --at {' or --at '.join(ends)}"


def _is_stem(graph: OnnxGraph, index: int) -> bool:
    node = graph.nodes[index]
    if node.op_type != "Conv" or attribute(node, "group", 1) != 1 or [*attribute(node, "strides", [])] != [4, 4]:
        return False
    return any(reader >= 0 and is_depthwise(graph, reader) for _, reader in graph.around(node.output[0]))


def _cut(graph: OnnxGraph, region: OnnxConvNeXt, stage: int, tensor: str) -> Cut | None:
    """The cut at a tensor behind a stage, with the norm that stands before it; None where there is no cut."""
    end = region.ends[stage]
    between, axes = graph.path(end, tensor), graph.axes(tensor)
    if between is None or axes not in ("NCHW", "NHWC"):
        return None
    if any(graph.nodes[index].op_type not in LAYOUT for index in between):
        channels = len(region.state[f"{PREFIX}stages.{stage}.0.norm.weight"])
        if norm_of(graph, between, channels) is None:
            return None
        keep_norm(graph, region, between, f"norm{stage}", channels)
    region.nodes |= {*between}
    return Cut(stage + 1, tensor, axes)


def _cuts(graph: OnnxGraph, region: OnnxConvNeXt) -> list[Cut]:
    """Where each stage's map leaves the network, behind its norm where it has one; nowhere where nothing reads it."""
    cuts = []
    for stage, end in enumerate(region.ends):
        leaving = sorted({name for name, index in graph.around(end) if index not in region.nodes})
        if not leaving:
            continue
        # What reads a map in several ways reads it before what they do to it.
        cut = _cut(graph, region, stage, leaving[0] if len(leaving) == 1 else end)
        cut = cut or _cut(graph, region, stage, end)
        if cut is None:
            raise WeightsError(f"{graph.where}: the axes of {end}, the map of stage {stage + 1}, are not known")
        cuts.append(cut)
    if not cuts:
        raise WeightsError(f"{graph.where}: nothing reads the maps of its ConvNeXt")
    return cuts


def _asked(graph: OnnxGraph, region: OnnxConvNeXt, names: Sequence[str]) -> list[Cut]:
    """The cuts at the tensors that were named."""
    cuts: list[Cut] = []
    for name in names:
        cut = next((c for s in reversed(range(4)) if (c := _cut(graph, region, s, name)) is not None), None)
        if cut is None:
            raise WeightsError(f"{name!r} is no map of the ConvNeXt in {graph.where}; {_ends_of_all(graph)}")
        if cuts and cut.level <= cuts[-1].level:
            raise WeightsError(
                f"{name!r} is the map of stage {cut.level}, named behind that of stage {cuts[-1].level}; name them in "
                f"the order of the stages, each once; {_ends_of_all(graph)}"
            )
        cuts.append(cut)
    return cuts


def facts_of(region: OnnxConvNeXt) -> dict[str, Any]:
    """What the tensors do not show, as `models.facts` calls it."""
    facts: dict[str, Any] = {"activation": next(iter(region.activations)), "norm_eps": next(iter(region.epsilons))}
    if region.sides is not None:
        facts["input_size"] = region.sides
    return facts | {"levels": tuple(cut.level for cut in region.cuts)}


def read_model(model: onnx.ModelProto, where: str, names: Sequence[str] = ()) -> OnnxConvNeXt:
    """The ConvNeXt of a loaded model (see `find`)."""
    return find(OnnxGraph(model, where), names)
