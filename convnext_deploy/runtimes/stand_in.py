"""Sessions that run what an engine was built from, where the engine itself cannot run."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.batches import Images
from ..artifact.session import RunOptions, Session
from ..graph.capture import DeployGraph
from ..records.manifest import ExportSpec, Manifest, PrecisionTruth
from .torch_session import TorchSession


class OnnxStandIn(Session):
    """ONNX Runtime's CPU provider on the ONNX file that went into the builder."""

    def __init__(self, session: Any, truth: PrecisionTruth, why: str, manifest: Manifest) -> None:
        super().__init__(manifest, RunOptions())
        self.stands_in = f"ONNX Runtime on the ONNX that the engine was built from; the engine was not run: {why}"
        self._session = session
        self._truth = truth

    def _bind(self, images: Images) -> None:
        self._images = images

    def _unshare(self) -> None: ...

    def _step(self) -> None:
        self._outputs = self._session.run(None, {self.manifest.inputs[0].name: self._images})

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        return tuple(
            np.array(output, dtype=record.dtype)
            for output, record in zip(self._outputs, self.manifest.outputs, strict=True)
        )

    def _precision(self) -> PrecisionTruth:
        return self._truth


class TorchStandIn(TorchSession):
    """PyTorch on the captured program, where `runs_onnx` says that ONNX Runtime cannot run what it became."""

    def __init__(self, graph: DeployGraph, truth: PrecisionTruth, why: str, manifest: Manifest) -> None:
        super().__init__(graph.program.module(check_guards=False), manifest, RunOptions())
        self.stands_in = f"PyTorch on the program that the engine's ONNX was made from; the engine was not run: {why}"
        self._truth = truth

    def _precision(self) -> PrecisionTruth:
        return self._truth


def runs_onnx(export: ExportSpec) -> bool:
    """Whether ONNX Runtime's CPU provider computes what the ONNX file of an artifact says.

    It has no bfloat16 convolution. Before its release 1.30 it quantizes half floats wrongly: of 20,000 normal values,
    8,900 get another code than the rounded quotient.
    """
    import onnxruntime as ort

    release = tuple(int(number) for number in ort.__version__.split(".")[:2])
    in_half = export.eight_bits is not None and export.precision == "fp16"
    return export.precision != "bf16" and not (in_half and release < (1, 30))


def open_onnx(path: Path) -> Any:
    """An ONNX Runtime session that no longer needs the file."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
