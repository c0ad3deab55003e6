"""This package's own CPU engine: fused blocks in C++, one file of packed weights, no framework at run time."""

import time
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..artifact.batches import Images
from ..artifact.readback import Contents
from ..artifact.session import Profile, RunOptions, Session
from ..env import usable_cores
from ..errors import UsageError
from ..native import library, packed_read
from ..native.engine import Engine, Network
from ..native.packed import TYPES
from ..quantization.eight_bits import EightBits
from ..records.manifest import ExportRequest, Manifest, ModelSpec, PrecisionTruth
from ..records.plan import Plan
from ..records.timing import LayerKind, LayerTime
from .base import Format

if TYPE_CHECKING:
    from ..graph.capture import DeployGraph


PLANS = 8  # batches up to 128 in powers of two


def build(graph: "DeployGraph", folder: Path) -> None:
    from ..graph.native_network import network_of
    from ..models.convnext import ConvNeXt
    from ..native import packed

    assert isinstance(graph.module, ConvNeXt)
    if graph.model.patch_tokens:
        raise UsageError("format native gives no patch tokens; leave --patch-tokens out, or use onnx or openvino")
    packed.write(network_of(graph.module), folder / FILE)


class NativeSession(Session):
    """An engine plans its memory for one batch and image size; those of the last `PLANS` are kept, over one network."""

    def __init__(self, path: Path, manifest: Manifest, options: RunOptions) -> None:
        super().__init__(manifest, options)
        self._network = Network(path)
        self._engines: dict[tuple[int, int, int], Engine] = {}  # the latest last
        height, width = manifest.model.image_size
        self._engine = self._planned(manifest.export.batch.opt, height, width)

    def _unshare(self) -> None:
        self._engines = {}

    def _planned(self, batch: int, height: int, width: int) -> Engine:
        size = (batch, height, width)
        engine = self._engines.pop(size, None) or Engine(self._network, *size, self.options.threads or usable_cores())
        self._engines[size] = engine
        if len(self._engines) > PLANS:
            self._engines.pop(next(iter(self._engines))).close()
        return engine

    def _bind(self, images: Images) -> None:
        if not self._engines or images.shape != self._engine.input_shape:
            batch, *sides = images.shape
            height, width = sides[:2] if self.manifest.export.input == "uint8" else sides[1:]
            self._engine = self._planned(batch, height, width)
        self._engine.bind(images)

    def _step(self) -> None:
        self._engine.run()

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        return tuple(output.copy() for output in self._engine.outputs)

    def _precision(self) -> PrecisionTruth:
        """Shares of the matrix products, as the file stores them and as this CPU multiplies them."""
        engine = self._engine
        macs = dict(engine.multiply_accumulates)
        macs["fp32"] -= depthwise_macs(self.manifest.model, engine.input_shape, self.manifest.export.input == "uint8")
        executed: dict[str, set[str | None]] = {}
        for part in engine.profile():
            if part.type is not None:
                executed.setdefault(part.type, set()).add(part.executed)
        graph: dict[str, float] = {name: macs[name] / sum(macs.values()) for name in TYPES if macs[name]}
        ran: dict[str, float] = {}
        for name in TYPES:
            if macs[name]:
                kinds = executed[name]  # one, unless the engine multiplies some products of a type otherwise
                kind = (kinds.pop() if len(kinds) == 1 else None) or "unknown"
                ran[kind] = ran.get(kind, 0.0) + graph[name]
        notes = [] if set(graph) == {"fp32"} else ["depthwise convolutions and norms are computed in fp32"]
        if lacking := library.refused():
            notes.append(lacking)
        if "bf16" in graph and (reason := library.slower()):
            notes.append(reason)
        note = "; ".join(notes) or None
        return PrecisionTruth(graph=graph, executed=ran, note=note, quantized=engine.products["int8"])

    def _profile(self, steps: int, warmup: int) -> Profile:
        """From the engine's own clock, read between the parts of an operation."""
        steps_seen = []
        for _ in range(warmup + steps):
            start = time.perf_counter_ns()
            parts = self._engine.profile()
            wall_ms = (time.perf_counter_ns() - start) / 1e6
            layers = tuple(
                LayerTime(
                    name=part.name,
                    op=part.part,
                    kind=KINDS[part.part],
                    type=part.executed or "fp32",
                    ms=part.ms,
                )
                for part in parts
            )
            steps_seen.append((wall_ms, layers))
        return Profile("the engine's own clock", tuple(steps_seen[warmup:]), "times are those of the calling thread")


KINDS: dict[str, LayerKind] = {
    "stem": "convolution", "dwconv_norm": "depthwise", "expand": "GEMM", "grn": "norm", "project": "GEMM",
    "downsample": "convolution", "head": "GEMM", "features": "layout", "wait": "other",
}  # fmt: skip


def depthwise_macs(model: ModelSpec, shape: tuple[int, ...], uint8: bool) -> int:
    """Multiply-accumulates of the depthwise convolutions for one image of an input batch of that shape."""
    height, width = shape[1:3] if uint8 else shape[2:4]
    stages = list(zip(model.depths, model.dims, model.kernel_sizes, model.map_sizes((height, width)), strict=True))
    return sum(depth * channels * kernel**2 * prod(size) for depth, channels, kernel, size in stages[: model.stages])


def refuse(request: ExportRequest, plan: Plan | None) -> None:
    """Build the engine's library now: without a compiler nothing else is worth doing."""
    library.build()


def read_back(folder: Path) -> Contents:
    return packed_read.contents(folder / FILE)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> NativeSession:
    return NativeSession(folder / FILE, manifest, options)


FILE = "model.cnxt"
FORMAT = Format(
    name="native",
    summary="this package's own CPU engine: fused blocks, int8, bf16 and fp32",
    suffix=".cnxt",
    runtime="native",
    requires=("numpy",),
    build_requires=("torch", "timm", "safetensors"),
    extra=None,
    runs_code=False,
    precisions=frozenset({"fp32", "bf16"}),
    devices=frozenset({"cpu"}),
    optimized=frozenset({"cpu"}),
    typed_graph=True,
    build=build,
    load=load,
    read_back=read_back,
    refuse=refuse,
    ready=library.state,
    own_network=True,
    eight_bits=EightBits(int8="u8s8"),
    benched=frozenset({"cpu"}),
    bf16_features=frozenset({"avx512_bf16", "amx_bf16", "bf16"}),  # the last is Arm's
)
