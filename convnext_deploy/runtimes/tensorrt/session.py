"""Running an engine of TensorRT or TensorRT-RTX, replacing its weights, and asking first whether it can run here.

Written from the interface of tensorrt_rtx 1.7.1, which builds without a GPU but runs on none: `EngineSession` and
`refit` have never run (docs/reference/tensorrt.md keeps the list).
"""

import json
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ... import env
from ...artifact.session import Images, Profile, RunOptions, Session
from ...errors import ArtifactError, BuildError, InputError
from ...graph.capture import DeployGraph
from ...graph.onnx_read import shares
from ...graph.onnx_write import save_onnx
from ...processes import Group
from ...records.manifest import EngineRecord, ExportRequest, Manifest, PrecisionTruth, TensorRtSpec
from ..stand_in import OnnxStandIn, TorchStandIn, open_onnx
from .build import (
    ENGINE_FILE,
    build_artifact,
    check_spec,
    make_logger,
    profiles,
    read_record,
    save_record,
    write_engine,
)
from .choose import TITLES, Name, import_module
from .inspector import precision_of_layers
from .network import quantized_products

# Where the serialized form says what it is. Not documented: read off the engines of TensorRT-RTX 1.7.1, built for one
# compute capability after another. The size is that of the whole file; a set bit of the mask is one of BITS.
MAGIC = {b"vtrt", b"ptrt"}
HEADER = struct.Struct("<4s12xQ4B4sI")  # magic, size in bytes, version, magic again, mask of compute capabilities
BITS = {0x01: "sm75", 0x02: "sm80", 0x04: "sm86", 0x08: "sm89", 0x10: "sm120", 0x20: "sm121"}
AMPERE_ON = 0x40  # set where no target was named: every GPU from Ampere on, later ones included


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
        if graph.export.precision != "bf16":  # whose stand-in runs the program
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
        if graph.export.precision == "bf16":
            return partial(TorchStandIn, graph, truth, why)
        return partial(OnnxStandIn, open_onnx(path), truth, why)


# Before loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preflight:
    """Whether an engine can run here: `facts` about it, and `problems` with their cures (none: it should run)."""

    facts: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Header:
    version: str
    targets: tuple[str, ...]
    ampere_on: bool
    bytes: int


def read_header(path: Path) -> Header:
    """What an engine file says about itself, without loading it.

    Raises:
        ArtifactError: no engine, or one that was cut short.
    """
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size or start[:4] not in MAGIC:
        raise ArtifactError(f"{path} is not a TensorRT engine (its first bytes are {start[:4]!r}); export it again")
    _, size, *version, inner, mask = HEADER.unpack(start)
    actual = path.stat().st_size
    if size != actual:
        raise ArtifactError(f"{path} has {actual} bytes where its header says {size}: cut short; copy or export again")
    known = inner in MAGIC
    return Header(
        version=".".join(map(str, version)),
        targets=tuple(name for bit, name in BITS.items() if known and mask & bit),
        ampere_on=bool(known and mask & AMPERE_ON),
        bytes=size,
    )


def preflight(
    engine: Path, name: Name | None = None, record: EngineRecord | None = None, trust: bool = False
) -> Preflight:
    """Say, before loading, what an engine needs and whether this machine has it.

    Args:
        engine: the engine file.
        name: the module it is for; None: taken from its version (TensorRT-RTX counts from 1, TensorRT from 7).
        trust: try to load it where everything else fits; an engine holds code.

    Raises:
        ArtifactError: no engine, or one that was cut short.
    """
    header = read_header(engine)
    name = name or ("tensorrt_rtx" if int(header.version.split(".")[0]) < 5 else "tensorrt")
    title = TITLES[name]
    where = "every GPU from Ampere on" if header.ampere_on else ", ".join(header.targets) or "the GPU it was built on"
    facts = [f"{title} {header.version} engine for {where}, {header.bytes / 1e6:.1f} MB"]
    if record is not None:
        facts += [f"profile: {shape_words(profile)}" for profile in record.profiles]
        facts.append(f"built in {record.build_s:.1f} s; layers: {_census_words(record.layers)}")
    problems = []
    installed = None if env.missing((name,)) else import_module(name).__version__
    package = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}[name]
    if installed is None:
        problems.append(f"{title} is not installed; run: pip install {package}=={header.version}")
    elif installed != header.version:
        problems.append(
            f"{title} {installed} is installed, the engine is of {header.version}; run: pip install "
            f"{package}=={header.version}, or export again"
        )
    gpus = env.nvidia_gpu_facts()
    if not gpus:
        problems.append("no NVIDIA GPU here (nvidia-smi lists none); the engine runs on a machine with one")
    for gpu in gpus[:1]:
        facts.append(f"GPU here: {gpu['name']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}")
        sm = "sm" + gpu["compute_capability"].replace(".", "")
        fits = sm in header.targets or (header.ampere_on and int(sm[2:]) >= 80) or not header.targets
        if not fits:
            problems.append(f"the engine is for {where}, the GPU here is {sm}; export again with --target {sm}")
    if gpus and not problems:
        untried = "it was not tried: others built it, and loading it runs its code; --trust loads it in a trial process"
        problems += probe(name, engine) if trust else [untried]
    return Preflight(tuple(facts), tuple(problems))


def inspected(folder: Path, manifest: Manifest, trust: bool = False) -> Preflight:
    """`preflight` of an artifact folder."""
    record = read_record(folder)
    return preflight(folder / ENGINE_FILE, _name(manifest.export.format), record, trust)


def _name(text: str) -> Name:
    return "tensorrt" if text == "tensorrt" else "tensorrt_rtx"


def shape_words(profile: dict[str, Any]) -> str:
    return ", ".join(f"{name} {' / '.join('x'.join(map(str, s)) for s in r)}" for name, r in profile.items())


def _census_words(layers: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in list(layers.items())[:6])


PROBE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
errors = []
class Log(trt.ILogger):
    def __init__(self): super().__init__()
    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR: errors.append(message)
log = Log()
engine = trt.Runtime(log).deserialize_cuda_engine(open(sys.argv[2], "rb").read())
print(json.dumps({"loaded": engine is not None, "errors": errors}))
"""


def probe(name: Name, engine: Path, code: str = PROBE, limit_s: float = 300) -> list[str]:
    """Deserialize in a process of its own, so that a wrong engine can crash nothing; why it failed, or nothing."""
    command = [sys.executable, "-c", code, name, str(engine)]
    with Group() as group:  # killed with this process
        child = group.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            said, complaint = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            said, complaint = "", f"no answer in {limit_s:g} s"
    child.communicate()
    if child.returncode > 128:  # a shell's word for a signal
        killed = signal.Signals(child.returncode - 128).name
        return [f"{TITLES[name]} crashed on this engine ({killed}); it is damaged or of another version, export again"]
    try:
        answer = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return [f"{TITLES[name]} could not be asked about this engine: {' '.join(complaint.split())[-300:]}"]
    if answer["loaded"]:
        return []
    reason = " ".join(answer["errors"][0].split())[:300] if answer["errors"] else "no reason given"
    return [f"{TITLES[name]} refuses this engine: {reason}; export again on this machine"]


# Running --------------------------------------------------------------------------------------------------------------


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
            bound.outputs.append(torch.empty(shape, dtype=torch.float32, device="cuda"))
            bound.fetched.append(torch.empty(shape, dtype=torch.float32, pin_memory=True))
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
        InputError: none holds it.
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


# Other weights --------------------------------------------------------------------------------------------------------


def refit(name: Name, engine: Path, onnx: Path, folder: Path) -> EngineRecord:
    """A copy of a refittable engine in `folder`, with the weights of an ONNX file of the same graph.

    Raises:
        BuildError: the engine cannot be loaded, or the weights do not fit it.
    """
    trt = import_module(name)
    log = make_logger(trt)
    loaded = trt.Runtime(log).deserialize_cuda_engine(engine.read_bytes())
    if loaded is None:
        raise BuildError(f"{TITLES[name]} cannot load {engine}: {log.reason()}")
    refitter = trt.Refitter(loaded, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(onnx)):
        reason = parser.get_error(0).desc() if parser.num_errors else log.reason()
        raise BuildError(f"the weights do not fit {engine}: {' '.join(reason.split())}")
    absent = refitter.get_missing_weights()
    if absent:
        raise BuildError(f"the weights for {', '.join(absent[:3])} are missing; the checkpoint is of another model")
    if not refitter.refit_cuda_engine():
        raise BuildError(f"{TITLES[name]} cannot refit {engine}: {log.reason()}")
    settings = loaded.create_serialization_config()
    settings.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)  # a stripped engine would leave them out again
    settings.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    built = loaded.serialize_with_config(settings)
    write_engine(folder / ENGINE_FILE, memoryview(built))
    record = read_record(engine.parent)
    record = msgspec.structs.replace(record, engine_bytes=built.nbytes)
    save_record(folder, record)
    return record
