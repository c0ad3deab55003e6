"""DeployGraph to a checked, typed ONNX model.

The same graph feeds ONNX Runtime, OpenVINO and TensorRT: precision lives in its types. LayerNorm and GELU are single
nodes (opset 17 and 20), LayerNormalization accumulates in fp32 whatever its input's type (`stash_type` 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import BuildError
from .capture import DeployGraph
from .onnx_operators import translations

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20  # the first with Gelu
OPSET_BF16 = 22  # the first whose Conv takes bfloat16
EXTERNAL_DATA_ABOVE = 2_000_000_000  # bytes of weights; protobuf itself ends at 2 GiB


def save_onnx(
    graph: DeployGraph, path: Path, one_file: bool = True, finish: Callable[[ir.Model], None] | None = None
) -> None:
    """Write the graph as ONNX.

    Weights are copied tensor by tensor: protobuf's own writer would hold them twice more.

    Args:
        finish: what one runtime wants rewritten after the check: the checker knows no runtime's own operators.
        one_file: False leaves the weights in `<name>.data`, where they always are if they exceed 2 GB.

    Raises:
        BuildError: ONNX's own checker or shape inference refuses the result.
    """
    import onnx
    import onnx_ir as ir

    model = onnx_from_graph(graph)
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = path.with_name(f"{path.name}.data")
    ir.save(model, path, external_data=data.name)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"the ONNX checker refuses the exported graph: {str(error).partition(chr(10))[0]}") from None
    if finish is not None:
        finish(model)
        ir.save(model, path, external_data=data.name)
    for value in model.graph.initializers.values():
        value.const_value = None  # the exporter's rewriting rules keep the graph that they last matched
    if one_file and weights <= EXTERNAL_DATA_ABOVE and data.exists():
        _embed_weights(path, data)


def _embed_weights(path: Path, data: Path) -> None:
    """Move the weights from the data file into the ONNX file itself, one at a time.

    A protobuf message is its fields one after the other, and the entries of a repeated field may stand anywhere
    among them: so the file is the model without its graph, then the graph's length, the graph, and each tensor.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    heads, places = [], []
    for tensor in outside:
        where = {entry.key: entry.value for entry in tensor.external_data}
        places.append((int(where["offset"]), int(where["length"])))
        head = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        heads.append(head.SerializeToString() + _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, places[-1][1]))
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in inside]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    body = model.graph.SerializeToString()
    model.ClearField("graph")
    number = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
    sizes = [len(head) + length for head, (_, length) in zip(heads, places, strict=True)]
    total = len(body) + sum(len(_field(number, size)) + size for size in sizes)
    merged = path.with_name(f"{path.name}.merged")
    with data.open("rb") as weights, merged.open("wb") as file:
        file.write(model.SerializeToString() + _field(onnx.ModelProto.GRAPH_FIELD_NUMBER, total) + body)
        for head, size, (offset, length) in zip(heads, sizes, places, strict=True):
            weights.seek(offset)
            file.write(_field(number, size) + head + weights.read(length))
    merged.replace(path)
    data.unlink()


def _field(number: int, length: int) -> bytes:
    """The start of a length-delimited protobuf field: its key and its length, as variable-length integers."""
    encoded = bytearray()
    for value in (number << 3 | 2, length):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)


def onnx_from_graph(graph: DeployGraph) -> ir.Model:
    """Convert through torch.onnx, name the axes, and remove pairs of transposes that cancel."""
    with warnings.catch_warnings():
        # torch's exporter warns about its own internals (pytree registration, deprecated spellings).
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.program,
            (),
            dynamo=True,
            opset_version=OPSET_BF16 if graph.export.precision == "bf16" else OPSET,
            input_names=[graph.input.name],
            output_names=[output.name for output in graph.outputs],
            verbose=False,
            custom_translation_table=translations(),
        )
    assert program is not None
    model: ir.Model = program.model
    cancel_transposes(model)
    _name_axes(model, graph)
    _forget_where(model)
    model.producer_name = "convnext-deploy"
    return model


def _forget_where(model: ir.Model) -> None:
    """Remove what the exporter notes beside every node: stack traces, with the folders of this machine."""
    for node in model.graph.all_nodes():
        for props in (node.metadata_props, *(output.metadata_props for output in node.outputs)):
            for key in [key for key in props if key.startswith("pkg.torch.")]:
                del props[key]


def cancel_transposes(model: ir.Model) -> None:
    """Replace a transpose of a transpose by the original where the two undo each other."""
    import onnx_ir.passes.common as common

    for node in list(model.graph):
        before = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if before is None or before.op_type != "Transpose":
            continue
        first, second = before.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
        original = before.inputs[0]
        if original is not None and [first[axis] for axis in second] == list(range(len(first))):
            node.outputs[0].replace_all_uses_with(original)
    common.RemoveUnusedNodesPass()(model)


def _name_axes(model: ir.Model, graph: DeployGraph) -> None:
    """Call dynamic axes `batch`, `height`, `width`; torch.export calls them s34 and the like."""
    import onnx_ir as ir

    records = {record.name: record for record in (graph.input, *graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None
        value.shape = ir.Shape(list(records[value.name].shape))
    interface = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value not in interface and value.shape is not None and not value.shape.is_static():
                value.shape = None  # said in the exporter's own symbols; runtimes infer it anew
