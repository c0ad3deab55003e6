"""What the formats of TensorRT and TensorRT-RTX do with a captured graph: refuse it, or build its folder."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from ... import env
from ...graph.capture import DeployGraph
from ...graph.onnx_read import shares
from ...graph.onnx_write import save_onnx
from ...records.manifest import ExportRequest, PrecisionTruth, TensorRtSpec
from ..stand_in import OnnxStandIn, TorchStandIn, open_onnx, runs_onnx
from .build import build_artifact, check_spec, profiles
from .choose import Name, import_module
from .network import quantized_products
from .refit import refit


def refuse(name: Name, request: ExportRequest) -> None:
    """Refuse what the module cannot do here (see `Format.refuse`)."""
    check_spec(import_module(name), name, request.tensorrt or TensorRtSpec())


def build(name: Name, graph: DeployGraph, folder: Path) -> Any:
    """Build (or refit) the engine; a stand-in to verify with where it cannot run here (see `Format.build`)."""
    spec = graph.export.tensorrt
    profiles(graph.model, graph.export)  # refuses before the ONNX is made
    with tempfile.TemporaryDirectory(dir=folder, prefix=".nvinfer.") as scratch:
        path = Path(scratch) / "model.onnx"
        save_onnx(graph, path)
        in_pytorch = not runs_onnx(graph.export)
        if not in_pytorch:
            graph.release()
        if graph.refit_from is not None:
            record = refit(name, graph.refit_from, path, folder)
        else:
            record = build_artifact(name, graph, path, folder)
        if spec is not None and spec.refit == "strip" and graph.refit_from is None:
            why = "it was stripped of its weights"
        elif env.nvidia_gpus():
            return None
        else:
            why = "no NVIDIA GPU here"
        truth = PrecisionTruth(
            graph=shares(record.products.values()),
            note="types of the parsed, strongly typed network; not executed",
            quantized=quantized_products(record),
        )
        if in_pytorch:
            return partial(TorchStandIn, graph, truth, why)
        return partial(OnnxStandIn, open_onnx(path), truth, why)
