"""Running an engine of TensorRT or TensorRT-RTX.

Written from the interface of tensorrt_rtx 1.7.1, which builds without a GPU but runs on none: `EngineSession` has
never run (docs/reference/tensorrt.md keeps the list).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifact.batches import Images
from ...artifact.session import Profile, RunOptions, Session
from ...errors import ArtifactError, InputError
from ...graph.onnx_read import shares
from ...records.manifest import Manifest, PrecisionTruth
from .build import make_logger
from .choose import TITLES, Name, import_module
from .files import ENGINE_FILE, read_header, read_record
from .inspector import precision_of_layers
from .network import quantized_products
from .preflight import preflight


@dataclass(slots=True)
class _Bound:
    """Buffers of one input shape. The engine's addresses point into them, so they live as long as the shape."""

    shape: tuple[int, ...]
    profile: int
    pinned: Any  # host tensor the batch is copied through
    images: Any  # device
    outputs: list[Any]  # device, in the manifest's order
    fetched: list[Any]  # pinned host
    graph: Any = field(default=None)  # torch.cuda.CUDAGraph, once captured


class EngineSession(Session):
    """An engine on a CUDA device. Memory, streams and graphs are torch's; `step` only enqueues.

    `options.cuda_graph`: TensorRT-RTX captures graphs itself when told so; for TensorRT one graph a shape is captured
    at the second `step` (the first may still allocate) and replayed afterwards.
    """

    def __init__(self, name: Name, folder: Path, manifest: Manifest, options: RunOptions) -> None:
        super().__init__(manifest, options)
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                f"{TITLES[name]} engines run on an NVIDIA GPU, and PyTorch finds none here; "
                f"`convnext-deploy inspect {folder}` says what this one needs"
            )
        spec = manifest.export.tensorrt
        if spec is not None and spec.refit == "strip":
            raise ArtifactError(
                f"{folder} was stripped of its weights; run: convnext-deploy refit {folder} --weights …"
            )
        header = read_header(folder / ENGINE_FILE)
        self._trt = trt = import_module(name)
        versions_may_differ = spec is not None and spec.version_compatible
        if header.version != trt.__version__ and not versions_may_differ:
            raise ArtifactError("; ".join(preflight(folder / ENGINE_FILE, name).problems))
        self._torch = torch
        self._record = read_record(folder)
        self._log = make_logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._runtime.engine_host_code_allowed = versions_may_differ  # the lean runtime inside such an engine
        self._engine = self._runtime.deserialize_cuda_engine((folder / ENGINE_FILE).read_bytes())
        if self._engine is None:
            raise ArtifactError(f"{TITLES[name]} cannot load {folder / ENGINE_FILE}: {self._log.reason()}")
        self._folder = folder
        self._unshare()

    def _unshare(self) -> None:
        self._context = self._new_context()
        if self._context is None:
            raise ArtifactError(f"no room to run {self._folder}: {self._log.reason()}; use a smaller --batch")
        self._stream: Any = self._torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no stub for it
        self._active_profile = 0
        self._bound: _Bound | None = None
        self._steps = 0

    def _new_context(self) -> Any:
        trt = self._trt
        self._replays_itself = self.options.cuda_graph and hasattr(trt, "CudaGraphStrategy")
        if not self._replays_itself:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _bind(self, images: Images) -> None:
        torch = self._torch
        if self._bound is None or self._bound.shape != images.shape:
            self._bound = self._allocate(images)
            self._steps = 0
        bound = self._bound
        self._stream.synchronize()  # the pinned buffer may still be read
        bound.pinned.copy_(torch.from_numpy(images))
        with torch.cuda.stream(self._stream):
            bound.images.copy_(bound.pinned, non_blocking=True)

    def _allocate(self, images: Images) -> _Bound:
        torch, context, stream = self._torch, self._context, self._stream
        name = self.manifest.inputs[0].name
        profile = choose_profile([p[name] for p in self._record.profiles], tuple(images.shape))
        self._stream.synchronize()
        if profile != self._active_profile:
            if not context.set_optimization_profile_async(profile, stream.cuda_stream):
                raise InputError(f"profile {profile} cannot be set: {self._log.reason()}")
            stream.synchronize()
            self._active_profile = profile
        if not context.set_input_shape(name, tuple(images.shape)):
            raise InputError(f"images of shape {images.shape} are refused: {self._log.reason()}")
        host = torch.from_numpy(images)
        bound = _Bound(
            shape=tuple(images.shape),
            profile=profile,
            pinned=torch.empty(host.shape, dtype=host.dtype, pin_memory=True),
            images=torch.empty(host.shape, dtype=host.dtype, device="cuda"),
            outputs=[],
            fetched=[],
        )
        context.set_tensor_address(name, bound.images.data_ptr())
        for output in self.manifest.outputs:
            shape = tuple(context.get_tensor_shape(output.name))
            kind = getattr(torch, output.dtype)
            bound.outputs.append(torch.empty(shape, dtype=kind, device="cuda"))
            bound.fetched.append(torch.empty(shape, dtype=kind, pin_memory=True))
            context.set_tensor_address(output.name, bound.outputs[-1].data_ptr())
        # The allocations above belong to torch's current stream; ours must not start before they are usable.
        stream.wait_stream(torch.cuda.current_stream())
        return bound

    def _step(self) -> None:
        bound = self._bound
        assert bound is not None, "bind comes before step"
        if self.options.cuda_graph and not self._replays_itself and self._steps == 1:
            bound.graph = self._captured()
        if bound.graph is None:
            self._enqueue(self._stream.cuda_stream)
        else:
            with self._torch.cuda.stream(self._stream):
                bound.graph.replay()
        self._steps += 1

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise InputError(f"the engine did not start: {self._log.reason()}")

    def _captured(self) -> Any:
        self._stream.synchronize()
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):  # others may run on
            self._enqueue(self._stream.cuda_stream)
        return graph

    def _sync(self) -> None:
        self._stream.synchronize()

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        bound = self._bound
        assert bound is not None, "bind and step come before fetch"
        with self._torch.cuda.stream(self._stream):
            for host, device in zip(bound.fetched, bound.outputs, strict=True):
                host.copy_(device, non_blocking=True)
        self._stream.synchronize()
        return tuple(np.array(host.numpy()) for host in bound.fetched)

    def _precision(self) -> PrecisionTruth:
        graph = shares(self._record.products.values())
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        executed = precision_of_layers(text, self._record.products)
        note = None if executed else "the engine inspector names no convolution or matrix product"
        quantized = quantized_products(self._record)
        return PrecisionTruth(graph=graph, executed=executed or None, note=note, quantized=quantized)

    def _profile(self, steps: int, warmup: int) -> Profile:
        from .profile import profiled

        return profiled(self, self._trt, self._context, self._engine, steps, warmup)


def choose_profile(ranges: list[Any], shape: tuple[int, ...]) -> int:
    """Of the profiles that hold a shape, the one tuned for the nearest batch.

    Raises:
        InputError: none contains it.
    """
    fitting = [
        (abs(opt[0] - shape[0]), high[0] - low[0], index)
        for index, (low, opt, high) in enumerate(ranges)
        if all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
    ]
    if not fitting:
        listed = "; ".join(f"{'x'.join(map(str, low))} to {'x'.join(map(str, high))}" for low, _, high in ranges)
        raise InputError(f"images of shape {'x'.join(map(str, shape))}; this engine takes {listed}")
    return min(fitting)[2]
