"""TensorRT-RTX engines: built ahead of time, with no GPU, for the compute capabilities that are named."""

from functools import partial

from ..runtimes.tensorrt import artifact, session
from .base import Format

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
    build=partial(artifact.build, "tensorrt_rtx"),
    load=partial(session.EngineSession, "tensorrt_rtx"),
    refuse=partial(artifact.refuse, "tensorrt_rtx"),
    ahead_of_time=True,
    cuda_graphs=True,
    eight_bits=artifact.EIGHT_BITS,
    benched=frozenset({"cuda"}),
)
