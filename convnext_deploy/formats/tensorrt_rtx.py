"""TensorRT-RTX engines: built ahead of time, with no GPU, for the compute capabilities that are named."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.session import RunOptions, Session
from ..quantization.eight_bits import EightBits
from ..records.manifest import ExportRequest, Manifest
from ..records.plan import Plan
from .base import Format, StandIn

if TYPE_CHECKING:  # it needs torch, and `list` does not
    from ..graph.capture import DeployGraph


def refuse(request: ExportRequest, plan: Plan | None) -> None:
    from ..runtimes.tensorrt import artifact

    artifact.refuse("tensorrt_rtx", request)


def build(graph: "DeployGraph", folder: Path) -> StandIn | None:
    from ..runtimes.tensorrt import artifact

    return artifact.build("tensorrt_rtx", graph, folder)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> Session:
    from ..runtimes.tensorrt import session

    return session.EngineSession("tensorrt_rtx", folder, manifest, options)


FORMAT = Format(
    name="tensorrt_rtx",
    summary="TensorRT-RTX engine, built without a GPU",
    suffix=".engine",
    runtime="tensorrt_rtx",
    requires=("tensorrt_rtx", "torch"),
    build_requires=("timm", "safetensors", "onnx", "onnxscript", "onnx_ir", "onnxruntime"),
    extra="trt-rtx",
    runs_code=True,
    precisions=frozenset({"fp32", "tf32", "fp16", "bf16"}),
    devices=frozenset({"cuda"}),
    tasks=frozenset({"classify", "embed", "features", "segment"}),
    builds_in=30.0,
    optimized=frozenset({"cuda"}),
    typed_graph=True,
    build=build,
    load=load,
    refuse=refuse,
    ahead_of_time=True,
    cuda_graphs=True,
    eight_bits=EightBits(int8="s8s8", fp8=True, rest="fp16", scales_in_rest=True, convolutions=True, family="tensorrt"),
    benched=frozenset({"cuda"}),
)
