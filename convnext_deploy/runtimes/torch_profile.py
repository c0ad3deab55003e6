"""Layers and their times from torch.profiler, for every format that PyTorch runs."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..artifact.session import Profile, Session
from ..records.timing import LayerKind, LayerTime

TYPES = {"float": "fp32", "c10::Half": "fp16", "c10::BFloat16": "bf16", "double": "fp64",
         "signed char": "int8", "unsigned char": "int8"}  # fmt: skip
COMPILED = "boxed_run"  # a whole AOTInductor package is one call to the profiler

KINDS: dict[str, LayerKind] = {
    "addmm": "GEMM", "mm": "GEMM", "bmm": "GEMM", "matmul": "GEMM", "linear": "GEMM", "_addmm_activation": "GEMM",
    "mkldnn_linear": "GEMM", "_linear_pointwise": "GEMM", "_int_mm": "GEMM", "_scaled_mm": "GEMM",
    "native_layer_norm": "norm", "layer_norm": "norm", "mean": "norm", "sum": "norm", "linalg_vector_norm": "norm",
    "gelu": "activation", "silu": "activation", "tanh": "activation", "sigmoid": "activation",
    "copy_": "layout", "clone": "layout", "contiguous": "layout", "permute": "layout", "transpose": "layout",
    "to": "layout", "_to_copy": "layout", "reshape": "layout",
    "quantize_per_tensor": "quantize", "dequantize": "quantize", "quantize_per_channel": "quantize",
    "add": "elementwise", "add_": "elementwise", "mul": "elementwise", "mul_": "elementwise", "sub": "elementwise",
    "expand": "GEMM", "expand_squares": "GEMM", "project": "GEMM", "mlp": "GEMM", "expand_quantized": "GEMM",
    "expand_squares_quantized": "GEMM", "project_quantized": "GEMM", "stem": "convolution", "downsample": "convolution",
    "grn_factor": "norm", "pool_norm": "norm",
    "div": "elementwise", "div_": "elementwise", "rsqrt": "elementwise", "square": "elementwise", "pow": "elementwise",
}  # fmt: skip


def profiled(session: Session, steps: int, warmup: int) -> Profile:
    """Each step under a profiler of its own, so that starting it is not in the step's wall time."""
    from torch.profiler import ProfilerActivity, profile

    cuda = session.options.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    done = []
    with _quiet():
        for _ in range(warmup + steps):
            with profile(activities=activities, record_shapes=True) as profiler:
                start = time.perf_counter_ns()
                session.step()
                session.sync()
                wall_ms = (time.perf_counter_ns() - start) / 1e6
            done.append((wall_ms, layers(profiler, cuda)))
    compiled = any(COMPILED in layer.op for _, step_layers in done for layer in step_layers)
    note = f"compiled kernels and the products they call are one row, {COMPILED}: AOTInductor does not name them"
    return Profile("torch.profiler", tuple(done[warmup:]), note if compiled else None)


def layers(profiler: Any, cuda: bool) -> tuple[LayerTime, ...]:
    """Time of each operator by itself, without the operators it calls; equal operators on equal shapes in one row."""
    sums: dict[tuple[str, str, LayerKind, str], float] = {}
    # The profiler's own events have no types in PyTorch 2.9 to 2.11; what they are made from always has.
    recorded = profiler.profiler.kineto_results.events()
    dtypes = {(event.correlation_id(), event.name()): event.dtypes() for event in recorded}
    for event in profiler.events() or ():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if not microseconds:
            continue
        shapes = [tuple(shape) for shape in event.input_shapes or () if shape and isinstance(shape[0], int)]
        op = event.name.removeprefix("aten::").removeprefix("convnext_deploy::")
        words = " ".join("x".join(map(str, shape)) for shape in shapes[:3])
        types = [TYPES[word] for word in dtypes.get((event.id, event.name), ()) if word in TYPES]
        key = (f"{op} {words}".strip(), event.name, _kind(op, shapes), types[0] if types else "")
        sums[key] = sums.get(key, 0.0) + microseconds / 1e3
    return tuple(LayerTime(name=n, op=o, kind=k, type=t, ms=ms) for (n, o, k, t), ms in sums.items())


def _kind(op: str, shapes: list[tuple[int, ...]]) -> LayerKind:
    if "conv" in op:
        weight = next((shape for shape in shapes[1:] if len(shape) == 4), None)
        return "depthwise" if weight is not None and weight[1] == 1 and weight[0] > 1 else "convolution"
    return KINDS.get(op, "other")  # views, allocations: PyTorch's own work around the kernels


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library logs to stderr that there is no GPU; only an environment variable stops it."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before
