"""ONNX, run by ONNX Runtime."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import env
from ..artifact.batches import Images
from ..artifact.readback import Contents
from ..artifact.session import Profile, RunOptions, Session
from ..env import needs
from ..errors import ArtifactError, InputError, UsageError
from ..graph.onnx_contents import contents_of_onnx
from ..graph.onnx_files import refuse_files_outside
from ..graph.onnx_read import PROFILE_TYPES, convolution_groups, precision_of_onnx, precision_of_profile
from ..quantization import saturation
from ..quantization.eight_bits import EightBits
from ..records.base import Device
from ..records.manifest import ExportRequest, Manifest, PrecisionTruth
from ..records.plan import Plan, QuantizationRecord
from ..records.timing import LayerKind, LayerTime
from .base import Format

EXACT_ON_TILES = (1, 25)  # the first release after microsoft/onnxruntime#27671
PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


if TYPE_CHECKING:  # it needs torch, and what only loads does not
    from ..graph.capture import DeployGraph


def build(graph: "DeployGraph", folder: Path) -> None:
    from ..graph.onnx_fuse import fuse_products
    from ..graph.onnx_write import save_onnx

    save_onnx(graph, folder / FILE, finish=fuse_products if graph.export.quantization else None)


def refuse(request: ExportRequest, plan: Plan | None) -> None:
    _refuse_tiles(request.device, plan)


def _refuse_tiles(device: Device, record: Plan | QuantizationRecord | None) -> None:
    """Refuse products of codes where ONNX Runtime computes them wrongly, without a word: outputs are off by a fifth.

    Raises:
        UsageError: with the cure.
    """
    in_codes = record is not None and not {"u8s8", "s8s8"}.isdisjoint(record.types)
    if device != "cpu" or not in_codes or "amx_int8" not in env.cpu_features():
        return
    with needs("onnxruntime"):
        import onnxruntime as ort
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < EXACT_ON_TILES:
        raise UsageError(
            f"onnxruntime {ort.__version__} computes 8-bit products wrongly on CPUs with AMX, such as this one; "
            "install onnxruntime 1.25 or newer (it needs Python 3.11), or take another format"
        )


class OnnxSession(Session):
    def __init__(self, path: Path, manifest: Manifest, options: RunOptions) -> None:
        super().__init__(manifest, options)
        self._path = path
        self._images: Any = None
        _refuse_tiles(options.device, manifest.export.quantization)
        refuse_files_outside(path)
        self._start()

    def _start(self, profile: Path | None = None, prepack: bool = True) -> None:
        self._session = self._open(profile, prepack)
        self._binding = self._session.io_binding()
        if self._images is not None:
            self._bind_tensors()

    def _open(self, profile: Path | None, prepack: bool) -> Any:
        with needs("onnxruntime"):
            import onnxruntime as ort
        provider = PROVIDERS[self.options.device]
        if provider not in ort.get_available_providers():
            raise InputError(f"this onnxruntime has no {provider}; install onnxruntime-gpu, or use --device cpu")
        settings = ort.SessionOptions()
        settings.log_severity_level = 3  # errors; its warnings speak of its own optimizer
        if saturation.in_danger(self.manifest.export.quantization):
            settings.add_session_config_entry(saturation.ORT_OPTION, "1")
        if self.options.threads is not None:
            settings.intra_op_num_threads = self.options.threads
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile)
        if not prepack:
            settings.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = ort.InferenceSession(str(self._path), settings, providers=[provider])
        except Exception as error:  # onnxruntime raises pybind types that share no base below Exception
            raise ArtifactError(f"onnxruntime cannot load {self._path}: {str(error).partition(chr(10))[0]}") from None
        if session.get_providers()[0] != provider:  # it falls back without an error
            raise InputError(f"onnxruntime could not start {provider} and fell back to {session.get_providers()[0]}")
        return session

    def _bind(self, images: Images) -> None:
        import onnxruntime as ort

        record = self.manifest.inputs[0]
        if self.manifest.splice is not None:  # somebody's graph, which may take one image alone, and half floats
            images = images.astype(record.dtype, copy=False)
            images = images[0] if len(record.shape) == 3 else images
        self._images = ort.OrtValue.ortvalue_from_numpy(images, self.options.device, 0)
        self._bind_tensors()

    def _bind_tensors(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.bind_ortvalue_input(self.manifest.inputs[0].name, self._images)
        self._binding.clear_binding_outputs()
        for output in self.manifest.outputs:
            self._binding.bind_output(output.name, self.options.device)

    def _unshare(self) -> None:
        self._images = None
        self._binding = self._session.io_binding()

    def _step(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def _sync(self) -> None:
        self._binding.synchronize_outputs()

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        self._sync()
        return tuple(np.array(output) for output in self._binding.copy_outputs_to_cpu())

    def _precision(self) -> PrecisionTruth:
        del self._session, self._binding  # it contains the weights, and so does each of the next two steps
        graph = precision_of_onnx(self._path, tuple(self._images.shape()))
        with tempfile.TemporaryDirectory() as folder:
            self._start(Path(folder) / "profile", prepack=False)  # packing hides weights' shapes
            self.step()
            events = json.loads(Path(self._session.end_profiling()).read_text())
        self._start()
        executed, quantized = precision_of_profile(events)
        provider = PROVIDERS[self.options.device]
        differs = max(graph, key=graph.__getitem__) != max(executed, key=executed.__getitem__)
        notes = [f"onnxruntime's {provider} runs this graph as {next(iter(executed))} here"] if differs else []
        if saturation.in_danger(self.manifest.export.quantization):
            notes.append(f"exact in 8 bits on this CPU without VNNI by {saturation.ORT_OPTION}=1")
        return PrecisionTruth(graph=graph, executed=executed, note="; ".join(notes) or None, quantized=quantized)

    def _profile(self, steps: int, warmup: int) -> Profile:
        """From ONNX Runtime's profile, of a session of its own: it cannot be switched on later."""
        del self._session, self._binding  # see precision
        groups = convolution_groups(self._path)
        with tempfile.TemporaryDirectory() as folder:
            self._start(Path(folder) / "profile")
            for _ in range(warmup + steps):
                self.step()
                self.sync()
            events = json.loads(Path(self._session.end_profiling()).read_text())
        self._start()
        return Profile("ONNX Runtime's profile", tuple(profiled_steps(events, groups))[warmup:])


KINDS: dict[str, LayerKind] = {
    "MatMul": "GEMM", "Gemm": "GEMM", "FusedMatMul": "GEMM", "FusedGemm": "GEMM", "QLinearMatMul": "GEMM",
    "MatMulInteger": "GEMM", "MatMulIntegerToFloat": "GEMM", "DynamicQuantizeMatMul": "GEMM", "QGemm": "GEMM",
    "LayerNormalization": "norm", "SimplifiedLayerNormalization": "norm", "SkipLayerNormalization": "norm",
    "ReduceMean": "norm", "ReduceL2": "norm", "ReduceSumSquare": "norm",
    "Gelu": "activation", "BiasGelu": "activation", "FastGelu": "activation", "QuickGelu": "activation",
    "QLinearGelu": "activation", "Erf": "activation", "Tanh": "activation", "Sigmoid": "activation",
    "Transpose": "layout", "ReorderInput": "layout", "ReorderOutput": "layout", "Reshape": "layout",
    "Squeeze": "layout", "Unsqueeze": "layout", "MemcpyFromHost": "layout", "MemcpyToHost": "layout",
    "QuantizeLinear": "quantize", "DequantizeLinear": "quantize", "DynamicQuantizeLinear": "quantize",
    "Add": "elementwise", "Sub": "elementwise", "Mul": "elementwise", "Div": "elementwise", "QLinearAdd": "elementwise",
    "QLinearMul": "elementwise", "Sqrt": "elementwise", "Pow": "elementwise", "Cast": "elementwise",
}  # fmt: skip


def profiled_steps(
    events: list[dict[str, Any]], groups: Mapping[str, int]
) -> Iterator[tuple[float, tuple[LayerTime, ...]]]:
    """Wall milliseconds and layers of each run in ONNX Runtime's profile, which lists a run after its nodes."""
    layers: list[LayerTime] = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            layers.append(_layer(event, groups))
        elif event["name"] == "model_run":
            yield event["dur"] / 1e3, tuple(layers)
            layers = []


def _layer(event: dict[str, Any], groups: Mapping[str, int]) -> LayerTime:
    op, name = event["args"]["op_name"], event["name"].removesuffix("_kernel_time")
    inputs = [next(iter(entry.items())) for entry in event["args"]["input_type_shape"]]
    kind = KINDS.get(op, "other")
    if op.endswith("Conv"):  # Conv, FusedConv, QLinearConv, NhwcFusedConv
        kind = "depthwise" if _is_depthwise(name, [shape for _, shape in inputs], groups) else "convolution"
    type_ = PROFILE_TYPES.get(inputs[0][0], inputs[0][0]) if inputs else ""
    return LayerTime(name=name, op=op, kind=kind, type=type_, ms=event["dur"] / 1e3)


def _is_depthwise(name: str, shapes: list[list[int]], groups: Mapping[str, int]) -> bool:
    """By the weight (C, 1, kH, kW); where it was packed away, by the node that this one was made from.

    Optimization passes append to a node's name (`node_conv2d_1_token_42`).
    """
    weight = next((shape for shape in shapes[1:] if len(shape) == 4), None)
    if weight is not None:
        return weight[1] == 1 and weight[0] > 1
    origin = max((known for known in groups if f"{name}_".startswith(f"{known}_")), key=len, default=None)
    return origin is not None and groups[origin] > 1


def load(folder: Path, manifest: Manifest, options: RunOptions) -> OnnxSession:
    return OnnxSession(folder / FILE, manifest, options)


def read_back(folder: Path) -> Contents:
    return contents_of_onnx(folder / FILE)


FILE = "model.onnx"
FORMAT = Format(
    name="onnx",
    summary="typed ONNX graph, run by ONNX Runtime",
    suffix=".onnx",
    runtime="onnxruntime",
    requires=("onnxruntime",),
    build_requires=("torch", "timm", "safetensors", "onnx", "onnxscript", "onnx_ir"),
    extra="onnx",
    runs_code=False,
    precisions=frozenset({"fp32", "fp16"}),
    devices=frozenset({"cpu", "cuda"}),
    tasks=frozenset({"classify", "embed", "features", "segment", "detect"}),
    builds_in=4.0,
    optimized=frozenset({"cpu", "cuda"}),
    typed_graph=True,
    build=build,
    load=load,
    refuse=refuse,
    read_back=read_back,
    # ONNX Runtime computes GELU's tanh form in three quarters of the time.
    eight_bits=EightBits(int8="u8s8", gelu_tanh=True),
    benched=frozenset({"cpu", "cuda"}),
)
