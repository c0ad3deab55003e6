"""ONNX to engine, by TensorRT or TensorRT-RTX: two modules with one interface, of which one is handed in.

Networks are strongly typed: precision is that of the ONNX graph, no builder flag changes it. TensorRT builds on the
GPU it builds for. TensorRT-RTX needs none and then builds ahead of time, for the compute capabilities it is given.
"""

import contextlib
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ... import env
from ...artifact import private
from ...artifact.manifest import write_file
from ...errors import BuildError, UsageError
from ...graph.capture import DeployGraph
from ...records.base import STRIDE
from ...records.manifest import EngineRecord, ExportSpec, ModelSpec, TensorRtSpec
from .choose import NO_GPU, TITLES, Name, import_module, known_targets
from .files import ENGINE_FILE, save_record, unwritten, write_engine
from .network import layer_census, products_of_network

Say = Callable[[str], None]
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # shapes: smallest, tuned for, largest

FP8_SINCE = 89

SIDES = (STRIDE, 1024)  # pixels, smallest and largest of a dynamic image size where nothing is said


# Building -------------------------------------------------------------------------------------------------------------


def profiles(model: ModelSpec, export: ExportSpec) -> tuple[Range, ...]:
    """Input shapes to tune for: one profile of `export.batch`, and one for each further range.

    Raises:
        UsageError: a range that is upside down, outside the batch, or sides below 32 pixels.
    """
    spec = export.tensorrt or TensorRtSpec()
    ranges = [export.batch, *spec.profiles]
    for r in ranges:
        if not r.min <= r.opt <= r.max:
            raise UsageError(f"batch {r.min}:{r.opt}:{r.max}; expected min <= opt <= max")
        if r.min < export.batch.min or r.max > export.batch.max:
            raise UsageError(
                f"profile {r.min}:{r.opt}:{r.max} leaves --batch {export.batch.min}:{export.batch.opt}:"
                f"{export.batch.max}; widen --batch"
            )
    sizes: tuple[tuple[int, int], ...] = (model.image_size,) * 3
    if export.dynamic_image_size:
        default = (SIDES[0], max(model.image_size), max(SIDES[1], *model.image_size))
        low, opt, high = spec.sides or default
        if not STRIDE <= low <= opt <= high:
            raise UsageError(f"sides {low}:{opt}:{high}; expected {STRIDE} <= min <= opt <= max")
        sizes = (low, low), (opt, opt) if spec.sides else model.image_size, (high, high)
    elif spec.sides is not None:
        raise UsageError("--trt-sides is for --dynamic-image-size")

    def shape(batch: int, size: tuple[int, int]) -> tuple[int, ...]:
        return (batch, *size, model.in_chans) if export.input == "uint8" else (batch, model.in_chans, *size)

    return tuple(
        (shape(r.min, sizes[0]), shape(r.opt, sizes[1]), shape(r.max, sizes[2]))
        for r in ranges
    )  # fmt: skip


def check_spec(trt: Any, name: Name, spec: TensorRtSpec) -> None:
    """Refuse what this module cannot do, before anything is parsed.

    Raises:
        UsageError: naming the option and what to use instead.
    """
    gpu = bool(env.nvidia_gpus())
    if name == "tensorrt":
        if not gpu:
            raise UsageError(NO_GPU)
        if spec.targets:
            raise UsageError("--trt-target is for TensorRT-RTX (--trt rtx); TensorRT builds for the GPU it runs on")
        return
    for flag, option in ((spec.hardware_compatible, "--trt-hardware-compatible"),
                         (spec.version_compatible, "--trt-version-compatible")):  # fmt: skip
        if flag:
            raise UsageError(f"TensorRT-RTX has no {option}; it builds for any GPU from Ampere on without --trt-target")
    known = known_targets(trt)
    for target in spec.targets:
        if target not in known:
            raise UsageError(
                f"TensorRT-RTX {trt.__version__} cannot build for {target}; it has {', '.join(known)}"
                + "; TensorRT itself builds on that GPU (--trt tensorrt)"
            )
    if spec.refit != "none" and not gpu:
        raise UsageError(f"--trt-refit {spec.refit} needs an NVIDIA GPU to build on: TensorRT-RTX fails without one")


def build_engine(
    name: Name,
    onnx: Path,
    engine: Path,
    ranges: tuple[Range, ...],
    spec: TensorRtSpec,
    *,
    tf32: bool = False,
    say: Say = lambda _: None,
) -> EngineRecord:
    """Parse, build, write: the engine at `engine`; how it was built and what the parsed network computes in.

    Args:
        onnx: typed ONNX; Q/DQ pairs make 8-bit products. Weights may be in a file beside it.
        ranges: one optimization profile each.
        tf32: let products of fp32 round their inputs to 11 bits. Off is off: TensorRT's own default is on.

    Raises:
        UsageError: an option this module does not have.
        BuildError: the parser or the builder refuses the graph, or the engine cannot be written.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    trt = import_module(name)
    check_spec(trt, name, spec)
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, onnx, log, name)
    _refuse_fp8(network, spec)
    config = _config(trt, builder, network, ranges, spec, tf32, log)
    products = products_of_network(trt, network, ranges[0][1], tf32)
    layers = layer_census(network)
    start = time.monotonic()
    with _timing_cache(trt, name, config) as timing, _cancelled_by_ctrl_c() as cancelled:
        config.progress_monitor = _monitor(trt, say, cancelled)
        streamed = name == "tensorrt_rtx"  # TensorRT's own streaming has not been tried
        size = _streamed(trt, builder, network, config, engine) if streamed else None
        built = None if streamed else builder.build_serialized_network(network, config)
    if cancelled.is_set():
        engine.unlink(missing_ok=True)
        raise KeyboardInterrupt
    if built is not None:
        write_engine(engine, memoryview(built))
        size = built.nbytes
    if size is None:
        engine.unlink(missing_ok=True)
        raise BuildError(f"{TITLES[name]} cannot build the engine: {log.reason() or 'it gave no reason'}")
    return EngineRecord(
        module=name,
        version=trt.__version__,
        targets=spec.targets,
        profiles=tuple({network.get_input(0).name: r} for r in ranges),
        layers=layers,
        products=products,
        build_s=round(time.monotonic() - start, 3),
        engine_bytes=size,
        peak_memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),  # KiB on Linux
        timing_cache=timing[0] if timing else None,
    )


def _parse(trt: Any, network: Any, onnx: Path, log: Any, name: Name) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)) or parser.num_errors:
        raise BuildError(f"{TITLES[name]} cannot read {onnx.name}: {_parser_reason(parser) or log.reason()}")
    if not network.num_inputs or not network.num_outputs:
        raise BuildError(f"{onnx.name} has no graph with inputs and outputs; export the ONNX again")


def _parser_reason(parser: Any) -> str:
    """The first error: which node, and why."""
    if not parser.num_errors:
        return ""
    error = parser.get_error(0)
    where = f"{error.node_operator()} node {error.node_name() or error.node()}: " if error.node_operator() else ""
    return where + _one_line(error.desc())


def _refuse_fp8(network: Any, spec: TensorRtSpec) -> None:
    old = [target for target in spec.targets if int(target[2:]) < FP8_SINCE]
    if old and any(key.endswith(" fp8") for key in layer_census(network)):
        raise UsageError(f"fp8 needs sm{FP8_SINCE} (Ada) or newer; --trt-target has {', '.join(old)}; use int8 or fp16")


def _config(
    trt: Any, builder: Any, network: Any, ranges: tuple[Range, ...], spec: TensorRtSpec, tf32: bool, log: Any
) -> Any:
    config = builder.create_builder_config()
    source = network.get_input(0)
    for low, opt, high in ranges:
        profile = builder.create_optimization_profile()
        profile.set_shape(source.name, low, opt, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"profile {low} {opt} {high} does not fit the input {source.name}: {log.reason()}")
    if tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if spec.refit != "none":
        config.set_flag(trt.BuilderFlag.REFIT)
    if spec.refit == "strip":
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if spec.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if spec.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if spec.optimization_level is not None:
        config.builder_optimization_level = spec.optimization_level
    if spec.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mb << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector tells types only then
    if spec.targets:
        config.num_compute_capabilities = len(spec.targets)
        for index, target in enumerate(spec.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    return config


def _streamed(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> int | None:
    """Build into the file, without the engine in memory beside the builder's weights; its size, None without success.

    Raises:
        BuildError: it cannot be written.
    """
    failed: list[OSError] = []

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the base comes from the module that was handed in
        def write(self, content: bytes) -> int:
            try:
                return file.write(content)
            except OSError as error:  # one that leaves here would end the process
                failed.append(error)
                return -1

    try:
        with path.open("wb") as file:
            built = builder.build_serialized_network_to_stream(network, config, Writer())
            size = file.tell()
    except OSError as error:
        failed.append(error)
    if failed:
        path.unlink(missing_ok=True)
        raise unwritten(path, failed[0]) from None
    return size if built else None


# What the module calls back -------------------------------------------------------------------------------------------


def make_logger(trt: Any) -> Any:
    """Keeps the messages of errors; `reason()` is the one to show."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base comes from the module that was handed in
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def reason(self) -> str:
            # Without a driver every error is followed by one about the missing driver, which is not the reason.
            own = [message for message in self.errors if "CUDA driver version is insufficient" not in message]
            messages = own or self.errors
            return _one_line(messages[-1]) if messages else ""

    return Log()


def _one_line(message: str) -> str:
    """The sentence, without the library's source positions."""
    text = " ".join(message.split())
    text = re.sub(r"\s*In \w+ at /\S+:\d+|\s*\[\w+\.cpp::.*$", "", text)
    inner = re.match(r"^.*?Error Code \d+: (.*)$", text)
    return (inner[1] if inner else text).strip().rstrip(".")[:400]


def _monitor(trt: Any, say: Say, cancelled: threading.Event) -> Any:
    """Says each of the builder's top phases as it starts; stops the build once `cancelled` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            super().__init__()
            self.start = time.monotonic()
            self.top: str | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.top = self.top or phase
            if parent == self.top and not cancelled.is_set():
                say(f"  {phase.lower()} ({time.monotonic() - self.start:.1f} s)")

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return not cancelled.is_set()

    return Monitor()


@contextlib.contextmanager
def _cancelled_by_ctrl_c() -> Iterator[threading.Event]:
    """Ctrl-C sets the event rather than raise, because the bindings print and swallow what a callback raises."""
    cancelled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancelled  # Python gives signals to the main thread only
        return
    before = signal.signal(signal.SIGINT, lambda *_: cancelled.set())
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _timing_cache(trt: Any, name: Name, config: Any) -> Iterator[list[str]]:
    """TensorRT's measured kernel times, kept per version and GPU. TensorRT-RTX has none (its calls do nothing)."""
    if name != "tensorrt":
        yield []
        return
    gpu = re.sub(r"[^\w.-]+", "-", env.nvidia_gpus()[0].partition("(")[0].partition(":")[2].strip())
    path = private.made(private.cache_root()) / f"tensorrt-{trt.__version__}-{gpu}.timing"
    before = path.read_bytes() if path.is_file() else b""
    timing = config.create_timing_cache(before)
    config.set_timing_cache(timing, False)
    notes: list[str] = []
    yield notes
    after = bytes(config.get_timing_cache().serialize())
    write_file(path, after)
    notes.append(f"{path.name}: {len(before)} -> {len(after)} bytes")


def build_artifact(name: Name, graph: DeployGraph, onnx: Path, folder: Path) -> EngineRecord:
    """The engine and `build.json` of one captured graph, whose ONNX is at `onnx`."""
    spec = graph.export.tensorrt or TensorRtSpec()
    record = build_engine(
        name,
        onnx,
        folder / ENGINE_FILE,
        profiles(graph.model, graph.export),
        spec,
        tf32=graph.export.precision == "tf32",
        say=graph.say,
    )
    save_record(folder, record)
    where = ", ".join(spec.targets) or ("the GPU here" if name == "tensorrt" else "every GPU from Ampere on")
    graph.say(f"  built for {where} in {record.build_s:.1f} s, {record.engine_bytes / 1e6:.1f} MB")
    return record
