"""The Session that every PyTorch-run format shares, and reading back what PyTorch computes in."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..artifact.batches import Images
from ..artifact.session import Profile, RunOptions, Session
from ..errors import ArtifactError, InputError, plain
from ..graph.onnx_read import macs_of, shares
from ..records.base import Device, Precision
from ..records.manifest import Manifest, PrecisionTruth

TYPE_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int8: "int8", torch.float8_e4m3fn: "fp8",
}  # fmt: skip


class TorchSession(Session):
    """Runs a callable `images -> tensor or tuple of tensors` on CPU or a CUDA device."""

    def __init__(self, call: Callable[[Tensor], Any], manifest: Manifest, options: RunOptions) -> None:
        super().__init__(manifest, options)
        check_device(options)
        self._call = call
        self._images: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()
        self._graph: Any = None

    def _bind(self, images: Images) -> None:
        bound = torch.from_numpy(images).to(self.options.device)
        if self._graph is not None and self._images is not None and self._images.shape == bound.shape:
            self._images.copy_(bound)  # where the graph reads it
        else:
            self._images, self._graph = bound, None

    def _unshare(self) -> None:
        self._images, self._outputs, self._graph = None, (), None

    def _step(self) -> None:
        assert self._images is not None, "bind comes before step"
        if self._graph is not None:
            self._graph.replay()
            return
        self._outputs = self._computed(self._images)
        if self.options.cuda_graph:
            self._capture(self._images)

    def _computed(self, images: Tensor) -> tuple[Tensor, ...]:
        whole = whole_float32(self.manifest.export.precision, self.options.device)
        with threads(self.options.threads), whole, torch.inference_mode():
            outputs = self._call(images)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def _capture(self, images: Tensor) -> None:
        """From the second step on: a graph whose memory is planned once. The first has compiled what compiles late."""
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no stub for it
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._computed(images)  # libraries allocate their workspaces on the stream that is captured
        torch.cuda.current_stream().wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # other threads may run on
            self._outputs = self._computed(images)
        self._graph = graph
        graph.replay()  # a capture computes nothing

    def _sync(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        # A copy even on the CPU: compiled code may hand out the same buffer at the next step.
        pairs = zip(self._outputs, self.manifest.outputs, strict=True)
        return tuple(np.array(output.cpu().numpy(), dtype=record.dtype) for output, record in pairs)

    def _precision(self) -> PrecisionTruth:
        with MacCounter() as counter:
            self.step()
        dispatched = shares(counter.macs)  # PyTorch runs the types it dispatches
        quantized = sum(name in ("int8", "fp8") for name, _ in counter.macs)
        return PrecisionTruth(graph=dispatched, executed=dispatched, quantized=quantized)

    def _profile(self, steps: int, warmup: int) -> Profile:
        from .torch_profile import profiled

        return profiled(self, steps, warmup)


def check_device(options: RunOptions) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")


@contextmanager
def opening(path: Path, options: RunOptions) -> Iterator[None]:
    """Around what reads a file of PyTorch's: refuse a device that is not there, and damage in one line."""
    check_device(options)
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, BadZipFile, SafetensorError) as error:
        raise ArtifactError(f"PyTorch cannot load {path}: {plain(error)}; export the model again") from error


_CHANGING = threading.RLock()  # held while PyTorch's number of threads is another than the process's own
_KNOWS = threading.local()  # which threads have taken over the process's number


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch has one global number of threads: set it for a while, and put it back.

    A thread takes over the global number when it first asks, and keeps its own from then on. So it may not ask first
    while another thread has changed it, and threads that want another number than they have take turns.
    """
    if not hasattr(_KNOWS, "number"):
        with _CHANGING:
            _KNOWS.number = torch.get_num_threads()
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    with _CHANGING:
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Float32Products:
    """PyTorch's two global switches for tf32, off while anybody computes in fp32, and then as they were found."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._before = (False, False)

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
                self._set((False, False))
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._set(self._before)

    @staticmethod
    def _set(allowed: tuple[bool, bool]) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


_FLOAT32_PRODUCTS = _Float32Products()


def whole_float32(precision: Precision, device: Device) -> AbstractContextManager[None]:
    """Within it, fp32 on a GPU is fp32: PyTorch lets cuDNN round a convolution's operands to tf32 unless told not to.

    tf32 has 10 bits of mantissa, and the error that it makes (1e-4 to 1e-3) is beyond what fp32 is verified against.
    """
    return _FLOAT32_PRODUCTS if (precision, device) == ("fp32", "cuda") else nullcontext()


# Operations of `convnext_deploy.kernels` that multiply, once for each pixel that they make: with their second argument,
# `mlp` also with its ninth.
FUSED = frozenset({
    "dwconv_norm", "dwconv_moments", "expand", "expand_squares", "project", "mlp", "stem", "downsample",
    "dwconv_norm_quantized", "expand_quantized", "expand_squares_quantized", "project_quantized",
})  # fmt: skip


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no stub for it
    """Collects (type, multiply-accumulates) of every convolution and matrix product that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0].rstrip("_")
        if func.namespace == "convnext_deploy" and name in FUSED:
            output = result[0] if isinstance(result, tuple) else result
            for weight in (args[1], args[8]) if name == "mlp" else (args[1],):
                self.macs.append((TYPE_NAMES[weight.dtype], weight.numel() * output.numel() / output.shape[-1]))
            return result
        multiplies = any(word in name for word in ("conv", "linear", "mm", "matmul"))
        index = 2 if name == "addmm" else 1  # of the weight among the arguments
        if multiplies and isinstance(result, Tensor) and isinstance(args[index], Tensor):
            weight = args[index]
            kind = "Conv" if "conv" in name else "MatMul"
            count = macs_of(kind, tuple(weight.shape), tuple(result.shape))
            self.macs.append((TYPE_NAMES.get(weight.dtype, str(weight.dtype)), count))
        return result
