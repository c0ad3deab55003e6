"""Any graph that OpenVINO reads: run as it is, and with a part of it replaced by another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..env import needs
from ..errors import BuildError, plain
from ..models.onnx_blocks import OnnxConvNeXt
from .openvino_core import core

NAME = "convnext_deploy"  # what the names of all that is put in begin with


def read(path: Path) -> Any:
    """The graph of an ONNX file or an IR, in memory.

    Raises:
        BuildError: OpenVINO does not take it, such as for operators that it has not.
    """
    with needs("openvino"):
        import openvino as ov
    reader = ov.Core()  # its own, for the property, and as it compiles nothing
    reader.set_property({"ENABLE_MMAP": False})  # the file may go before the graph does
    try:
        return reader.read_model(path)
    except Exception as error:  # the frontends raise types of their own that share no public base
        raise BuildError(f"OpenVINO does not take {path.name}: {plain(error)}") from None


class OpenVinoRun:
    """The CPU plugin in fp32, with the named tensors put out.

    Raises:
        BuildError: the plugin does not take the graph.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        model = model.clone()
        self._names = [*names]
        try:
            held = {name for output in model.outputs for name in output.get_names()}
            model.add_outputs([name for name in names if name not in held])
            settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            self._compiled = core().compile_model(model, "CPU", settings)
            self._ports = [self._compiled.output(name) for name in names]
        except Exception as error:  # as above
            raise BuildError(f"OpenVINO does not take the graph: {plain(error)}") from None

    def __call__(self, name: str, images: NDArray[Any]) -> list[NDArray[Any]]:
        """The tensors for one batch, given to the input of that name.

        Raises:
            BuildError: the graph cannot compute it.
        """
        try:
            outputs = self._compiled({name: images})
        except Exception as error:  # as above
            raise BuildError(f"OpenVINO cannot run the graph: {plain(error)}") from None
        return [np.array(outputs[port]) for port in self._ports]

    def timed(self, name: str, images: NDArray[Any]) -> float:
        """Milliseconds of one run."""
        start = time.perf_counter()
        self(name, images)
        return (time.perf_counter() - start) * 1e3


def spliced(user: Any, part: Any, region: OnnxConvNeXt) -> tuple[Any, tuple[int, int]]:
    """(the user's graph with `part` between the cuts, how many operations were taken out and put in).

    Args:
        user: is changed, and of no further use.
        part: this package's ConvNeXt, one input and an output for each cut, all in fp32 and NCHW; likewise.
        region: of the ONNX that the user's graph was read from.

    Raises:
        BuildError: reading it has left no tensor of a cut's name.
    """
    import openvino as ov
    from openvino import opset13 as ops

    before, put_in = _operations(user), _operations(part)
    for node in part.get_ops():
        node.set_friendly_name(f"{NAME}/{node.get_friendly_name()}")
    source = _tensor(user, region.input)
    if region.half:
        source = ops.convert(source, "f32").output(0)
    (given,) = part.get_parameters()
    for reader in given.output(0).get_target_inputs():
        reader.replace_source_output(source)
    made = []
    for result, cut in zip(part.get_results(), region.cuts, strict=True):
        output = result.input_value(0)
        output.set_names(set())
        if cut.axes == "NHWC":
            output = ops.transpose(output, np.array([0, 2, 3, 1])).output(0)
        made.append(ops.convert(output, "f16").output(0) if region.half else output)
    for output, cut in zip(made, region.cuts, strict=True):
        old = _tensor(user, cut.tensor)
        for reader in old.get_target_inputs():
            reader.replace_source_output(output)
        names = old.get_names()
        old.set_names(set())
        output.set_names(names)
    result = ov.Model(user.get_results(), user.get_parameters())
    result.validate_nodes_and_infer_types()
    put_in += sum(cut.axes == "NHWC" for cut in region.cuts) + (len(region.cuts) + 1) * region.half
    return result, (before - (_operations(result) - put_in), put_in)


def _operations(model: Any) -> int:
    return sum(node.get_type_name() not in ("Constant", "Parameter", "Result") for node in model.get_ops())


def _tensor(model: Any, name: str) -> Any:
    for node in model.get_ops():
        for output in node.outputs():
            if name in output.get_names() and node.get_type_name() != "Result":  # which has its input's names too
                return output
    raise BuildError(f"OpenVINO's graph has no tensor {name!r} any more; splice with --format onnx")


def save(model: Any, path: Path) -> None:
    """Write `<path>.xml` and `.bin`, with weights as they are."""
    import openvino as ov

    ov.save_model(model, path, compress_to_fp16=False)
