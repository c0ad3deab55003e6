"""Any tensors of any ONNX graph, computed by ONNX Runtime."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..env import needs
from ..errors import BuildError, plain

if TYPE_CHECKING:
    import onnx

LARGEST = 1_500_000_000  # bytes that are given to ONNX Runtime at once; protobuf itself ends at 2 GiB


class OnnxRun:
    """A session of ONNX Runtime's CPU provider that puts out the named tensors of a graph, and computes no others.

    Raises:
        BuildError: ONNX Runtime does not take the graph, such as for operators that it has not.
    """

    def __init__(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        with needs("onnxruntime"):
            import onnxruntime as ort
        settings = ort.SessionOptions()
        settings.log_severity_level = 3  # errors
        self.names = [*names]
        try:
            with _as_file(_putting_out(model, names)) as graph:
                self._session: Any = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises pybind types that share no base below Exception
            raise BuildError(f"ONNX Runtime does not take the graph: {plain(error)}") from None
        self._inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, name: str, images: NDArray[Any]) -> list[NDArray[Any]]:
        """The tensors for one batch, given to the input of that name.

        Raises:
            BuildError: the graph cannot compute it.
        """
        try:
            return [np.asarray(one) for one in self._session.run(self.names, {name: images})]
        except Exception as error:  # as above
            raise BuildError(f"ONNX Runtime cannot run the graph: {plain(error)}") from None

    def timed(self, name: str, images: NDArray[Any]) -> float:
        """Milliseconds of one run."""
        start = time.perf_counter()
        self(name, images)
        return (time.perf_counter() - start) * 1e3


def _putting_out(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with these outputs, and without what they do not need: operators that a runtime lacks, for one."""
    import onnx

    from ..graph.onnx_splice import alive

    result = onnx.ModelProto()
    result.CopyFrom(model)
    known = {value.name: value for value in (*model.graph.output, *model.graph.value_info)}
    del result.graph.output[:]
    result.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    needed = alive(result.graph, (), frozenset())
    nodes = [node for index, node in enumerate(model.graph.node) if index in needed]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def weight_bytes(model: onnx.ModelProto) -> int:
    """Of its constants, which are nearly all of it: protobuf cannot say the size of a message above 2 GiB."""
    constants = (attribute.t for node in model.graph.node if node.op_type == "Constant" for attribute in node.attribute)
    return sum(tensor.ByteSize() for tensor in (*model.graph.initializer, *constants))


@contextlib.contextmanager
def _as_file(model: onnx.ModelProto) -> Any:
    """What ONNX Runtime opens: the bytes, or a file with the weights beside it."""
    import onnx

    if weight_bytes(model) < LARGEST:
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save(model, str(path), save_as_external_data=True, location="graph.data")
        yield str(path)
