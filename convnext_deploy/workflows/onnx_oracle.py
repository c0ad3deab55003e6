"""An ONNX graph as the judge of the ConvNeXt that was read from it: both compute the maps of the same images."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..accuracy import oracle
from ..artifact import deviation, verify
from ..env import missing
from ..errors import BuildError, ParityError
from ..models import onnx_convnext, onnx_graph
from ..records.manifest import OracleRecord
from ..runtimes.onnx_graphs import OnnxRun

if TYPE_CHECKING:
    import onnx

    from ..models.checkpoint import Loaded
    from ..models.onnx_blocks import OnnxConvNeXt


def knows(loaded: Loaded) -> bool:
    """Whether it was read from a graph."""
    return loaded.origin is not None and loaded.origin.layout == "onnx"


def judge(loaded: Loaded, images: NDArray[np.float32], ours: tuple[NDArray[np.float32], ...]) -> OracleRecord:
    """Compare what was read with what the graph computes behind the tensor that its stem reads.

    Args:
        images: normalized, (N, C, H, W).
        ours: this package's maps of them, before any rewrite.

    Raises:
        ParityError: they differ: between the operators that were recognized stands something else.
    """
    assert loaded.origin is not None
    (file,), key = loaded.origin.files, loaded.origin.key
    if missing(("onnxruntime",)):
        return OracleRecord(name="self", why="onnxruntime is not installed")
    model = onnx_graph.load(file)
    network = onnx_convnext.read_model(model, file.name, key.split(",") if key else ())
    try:
        outputs = _maps(model, network, images)
    except BuildError as reason:
        return OracleRecord(name="self", why=str(reason))
    name = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    theirs = [outputs[level] for level in loaded.model.spec.levels]
    shapes = [output.shape for output in theirs]
    if shapes != [output.shape for output in ours]:
        raise ParityError(f"{file.name} computes maps of shapes {shapes} in {name}: ours have others")
    error = float(deviation.worst(ours, theirs).max())
    limit = verify.TOLERANCES["fp16"].relative_error if network.half else oracle.LIMIT
    if not error <= limit:
        raise ParityError(
            f"the ConvNeXt that was read from {file.name} differs from what the graph computes in {name} by "
            f"{error:.3g} (relative), above {limit:g}; give the checkpoint that it was exported from, or report a bug"
        )
    return OracleRecord(name=name, relative_error=error)


def _maps(model: onnx.ModelProto, network: OnnxConvNeXt, images: NDArray[np.float32]) -> dict[int, NDArray[np.float32]]:
    """Of each level that is cut, (N, C, H, W), an image at a time.

    Raises:
        BuildError: ONNX Runtime does not take the graph.
    """
    import onnx

    inner = onnx.ModelProto()
    inner.CopyFrom(model)
    given = {value.name: value for value in model.graph.input}.get(network.input)
    batch = given.type.tensor_type.shape.dim[0].dim_value if given is not None else 0
    kind = onnx.TensorProto.FLOAT16 if network.half else onnx.TensorProto.FLOAT
    start = onnx.helper.make_tensor_value_info(network.input, kind, None)
    nodes = [node for node in model.graph.node if network.input not in node.output]
    initializers = {tensor.name for tensor in model.graph.initializer}
    for field, values in (
        ("node", nodes),
        ("input", [start, *(v for v in model.graph.input if v.name in initializers)]),
    ):
        target: Any = getattr(inner.graph, field)
        del target[:]
        target.extend(values)
    run = OnnxRun(inner, [cut.tensor for cut in network.cuts])
    dtype = np.float16 if network.half else np.float32
    maps: list[list[NDArray[Any]]] = [[] for _ in network.cuts]
    for image in images.astype(dtype):
        for kept, output in zip(maps, run(network.input, np.repeat(image[None], max(batch, 1), 0)), strict=True):
            kept.append(output[:1].astype(np.float32))
    return {
        cut.level: np.concatenate(kept).transpose((0, 1, 2, 3) if cut.axes == "NCHW" else (0, 3, 1, 2))
        for cut, kept in zip(network.cuts, maps, strict=True)
    }
