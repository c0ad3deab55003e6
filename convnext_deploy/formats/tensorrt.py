"""TensorRT engines: built on the GPU they run on."""

from functools import partial

from ..runtimes.tensorrt import artifact, session
from .base import Format

FORMAT = Format(
    name="tensorrt",
    summary="TensorRT engine, built on the GPU it runs on",
    suffix=".engine",
    runtime="tensorrt",
    requires=("tensorrt", "torch"),
    build_requires=("timm", "safetensors", "onnx", "onnxscript", "onnx_ir", "onnxruntime"),
    extra="trt",
    runs_code=True,
    precisions=frozenset({"fp32", "tf32", "fp16", "bf16"}),
    devices=frozenset({"cuda"}),
    builds_in=30.0,
    optimized=frozenset({"cuda"}),
    typed_graph=True,
    build=partial(artifact.build, "tensorrt"),
    load=partial(session.EngineSession, "tensorrt"),
    refuse=partial(artifact.refuse, "tensorrt"),
    ahead_of_time=True,
    cuda_graphs=True,
    eight_bits=artifact.EIGHT_BITS,
    benched=frozenset({"cuda"}),
)
