"""Layers and their times from TensorRT's IProfiler. Never run: it needs the GPU (see docs/reference/tensorrt.md)."""

import json
import re
import time
from typing import Any

from ...artifact.session import Profile, Session
from ...errors import UsageError
from ...records.timing import LayerKind, LayerTime
from .inspector import INSPECTOR_TYPES

WORDS: tuple[tuple[str, LayerKind], ...] = (
    ("reformat", "layout"), ("transpose", "layout"), ("shuffle", "layout"), ("copy", "layout"), ("noop", "layout"),
    ("quantize", "quantize"), ("gemm", "GEMM"), ("matmul", "GEMM"), ("matrixmultiply", "GEMM"),
    ("conv", "convolution"), ("layer_norm", "norm"), ("normalization", "norm"), ("reduce", "norm"),
    ("gelu", "activation"), ("pointwise", "elementwise"), ("elementwise", "elementwise"),
)  # fmt: skip


def profiled(session: Session, trt: Any, context: Any, engine: Any, steps: int, warmup: int) -> Profile:
    """Each step reports its layers when it is done: the profiler makes an enqueue wait for them.

    Raises:
        UsageError: the session replays CUDA graphs, whose layers are not reported.
    """
    if session.options.cuda_graph:
        raise UsageError("a replayed CUDA graph does not tell its layers; profile without --cuda-graph")
    inspector = engine.create_engine_inspector()
    facts = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)).get("Layers", [])
    known = {layer["Name"]: layer for layer in facts if isinstance(layer, dict)}
    reported: list[tuple[str, float]] = []

    class Recorder(trt.IProfiler):  # type: ignore[misc]  # whose module is an argument
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # the binding needs its own, not super()'s

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            reported.append((layer_name, ms))

    context.profiler = Recorder()
    done = []
    try:
        for _ in range(warmup + steps):
            reported.clear()
            start = time.perf_counter_ns()
            session.step()
            session.sync()
            wall_ms = (time.perf_counter_ns() - start) / 1e6
            done.append((wall_ms, tuple(layer(name, ms, known.get(name, {})) for name, ms in reported)))
    finally:
        context.profiler = None
    return Profile("TensorRT's IProfiler", tuple(done[warmup:]))


def layer(name: str, ms: float, facts: dict[str, Any]) -> LayerTime:
    """One report, with what the engine inspector says of the layer: its type, and the ONNX nodes it was fused from.

    The first of WORDS that its own name and type hold decides its kind, or else the first in the nodes' names.
    """
    op = str(facts.get("LayerType", ""))
    nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(facts.get("Metadata", "")))
    kind: LayerKind = "other"
    for text in (f"{op} {name}", " ".join(nodes)):
        kind_name = next((kind for word, kind in WORDS if word in text.lower()), None)
        if kind_name is not None:
            kind = kind_name
            break
    if kind == "convolution" and int(facts.get("Groups", 1)) > 1:
        kind = "depthwise"
    first: dict[str, Any] = next(iter(facts.get("Inputs", ())), {})
    words = str(first.get("Format/Datatype", first.get("Datatype", ""))).lower()
    type_ = next((name for word, name in INSPECTOR_TYPES if word in words), "")
    return LayerTime(name=name, op=op, kind=kind, type=type_, ms=ms)
