"""OpenVINO IR, for Intel CPUs and GPUs (its CPU plugin also runs on other x86-64 and on Arm)."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.batches import Images
from ..artifact.readback import Contents, Quantizer, Tensor
from ..artifact.session import Profile, RunOptions, Session
from ..env import needs
from ..errors import ArtifactError, BuildError, UsageError
from ..graph.onnx_read import macs_of, shares
from ..quantization import saturation
from ..quantization.eight_bits import EightBits
from ..records.base import Precision
from ..records.manifest import ExportRequest, Manifest, PrecisionTruth
from ..records.plan import Plan
from ..records.timing import LayerKind, LayerTime
from ..runtimes.openvino_core import core
from .base import Format

# The type is a request to the plugin, not a property of the IR: the executed graph is what counts.
HINTS: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
TYPE_NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


if TYPE_CHECKING:  # it needs torch, and what only loads does not
    from ..graph.capture import DeployGraph
    from ..graph.channels_first import ChannelsFirst
    from ..models.convnext import ConvNeXt


def rewrite(model: "ConvNeXt") -> "ChannelsFirst":
    """One NCHW stream, which the plugin fuses."""
    from ..graph.channels_first import ChannelsFirst

    return ChannelsFirst(model)


def build(graph: "DeployGraph", folder: Path) -> None:
    from ..graph.onnx_write import save_onnx

    with needs("openvino"):
        import openvino as ov

    with tempfile.TemporaryDirectory(dir=folder, prefix=".openvino.") as scratch:
        path = Path(scratch) / "model.onnx"
        save_onnx(graph, path, one_file=False)  # which OpenVINO maps instead of reading
        try:
            model = ov.convert_model(path)
        except Exception as error:  # the frontends raise types of their own that share no public base
            raise BuildError(
                f"openvino cannot convert the model: {str(error).strip().partition(chr(10))[0]}"
            ) from error
        ov.save_model(model, folder / FILE, compress_to_fp16=graph.export.precision == "fp16")


class OpenVinoSession(Session):
    def __init__(self, path: Path, manifest: Manifest, options: RunOptions) -> None:
        super().__init__(manifest, options)
        refused = saturation.refusal("OpenVINO", manifest.export.quantization)
        if refused is not None:
            raise ArtifactError(f"{path}: {refused}")
        with needs("openvino"):
            import openvino as ov
        self._ov = ov
        self._path = path
        self._images: Images | None = None
        self._compile()

    def _compile(self, profile: bool = False) -> None:
        path, manifest = self._path, self.manifest
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[manifest.export.precision],
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": profile,
        }
        if self.options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.options.threads
        try:
            self._compiled = core().compile_model(path, "CPU", settings)
        except Exception as error:  # see build
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(f"openvino cannot load {path}: {reason}") from None
        self._request = self._compiled.create_infer_request()
        self._ports = [self._compiled.output(output.name) for output in manifest.outputs]
        if self._images is not None:
            self._place(self._images)

    def _bind(self, images: Images) -> None:
        if self.manifest.splice is not None:  # as in `formats.onnx`
            record = self.manifest.inputs[0]
            images = images.astype(record.dtype, copy=False)
            images = images[0] if len(record.shape) == 3 else images
        self._images = images  # shared with the request's tensor, so it has to live as long
        self._place(images)

    def _place(self, images: Images) -> None:
        """What is already as the graph takes it: a request that is made anew is given it again."""
        self._request.set_input_tensor(self._ov.Tensor(images, shared_memory=True))

    def _unshare(self) -> None:
        self._images = None
        self._request = self._compiled.create_infer_request()

    def _step(self) -> None:
        self._request.infer()

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        return tuple(np.array(self._request.get_tensor(port).data) for port in self._ports)

    def _precision(self) -> PrecisionTruth:
        self.step()
        macs = _executed_macs(self._compiled.get_runtime_model())
        executed = shares(macs)
        precision = self.manifest.export.precision
        runs_as = next(name for name in executed if name != "int8" or len(executed) == 1)
        note = f"OpenVINO's CPU plugin runs {precision} as {runs_as} on this machine" if runs_as != precision else None
        quantized = sum(name == "int8" for name, _ in macs)
        # Which products Q/DQ pairs make 8-bit is the plugin's choice, and read from what it executes.
        typed = _typed_macs(core().read_model(self._path))
        graph = shares(typed) if self.manifest.export.quantization is None else {}
        return PrecisionTruth(graph=graph, executed=executed, note=note, quantized=quantized)

    def _profile(self, steps: int, warmup: int) -> Profile:
        """From the plugin's own counters, of a model compiled with them: they cannot be switched on later.

        A counter is the mean of every inference so far, so those of the warm-up are taken off again.
        """
        del self._compiled, self._request  # they hold the weights, and so does the next
        self._compile(profile=True)
        for _ in range(warmup):
            self.step()
        before = [c.real_time * warmup for c in self._request.get_profiling_info()]
        start = time.perf_counter_ns()
        for _ in range(steps):
            self.step()
        wall_ms = (time.perf_counter_ns() - start) / 1e6 / steps
        counters = self._request.get_profiling_info()
        layers = tuple(
            _layer(counter, (counter.real_time * (warmup + steps) - past).total_seconds() * 1e3 / steps)
            for counter, past in zip(counters, before, strict=True)
            if counter.real_time
        )
        del self._compiled, self._request
        self._compile()
        note = "the plugin counts the mean of all inferences, so an interrupted one is in it"
        return Profile("OpenVINO's performance counters", ((wall_ms, layers),), note)


def _typed_macs(model: Any) -> list[tuple[str, float]]:
    """(type, multiply-accumulates) of each convolution and matrix product of an IR, whose stored fp16 is widened."""
    macs = []
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        weight = tuple(node.input_value(1).get_partial_shape().get_min_shape())
        type = str(node.get_output_element_type(0).get_type_name())
        op = "MatMul" if kind == "MatMul" else "Conv"
        macs.append((TYPE_NAMES.get(type, type), macs_of(op, weight[kind == "GroupConvolution" :], _extents(node))))
    return macs


def _executed_macs(runtime_model: Any) -> list[tuple[str, float]]:
    """(type, multiply-accumulates) of each convolution and matrix product that the plugin chose a kernel for."""
    macs = []
    for node in runtime_model.get_ops():
        info = node.get_rt_info()
        kind = info["layerType"].astype(str)
        if kind not in ("Convolution", "FullyConnected", "MatMul"):
            continue
        weight = tuple(node.input(1).get_shape())  # depthwise: (C, 1, 1, kH, kW)
        if kind == "Convolution" and len(weight) == 5:
            weight = (weight[0], *weight[2:])
        name = info["runtimePrecision"].astype(str)
        op = "Conv" if kind == "Convolution" else "MatMul"
        macs.append((TYPE_NAMES.get(name, name), macs_of(op, weight, _extents(node))))
    return macs


def _extents(node: Any) -> tuple[int, ...]:
    """Of a node's output. One that may vary counts as its least: unbounded, it would hide what has none that vary."""
    return tuple(max(size, 1) for size in node.get_output_partial_shape(0).get_min_shape())


KINDS: dict[str, LayerKind] = {
    "FullyConnected": "GEMM", "MatMul": "GEMM", "Convolution": "convolution", "GroupConvolution": "depthwise",
    "MVN": "norm", "RMS": "norm", "NormalizeL2": "norm", "ReduceMean": "norm", "ReduceL2": "norm",
    "Subtract": "norm",  # the mean from what LayerNorm normalizes; nothing else in the model subtracts
    "Gelu": "activation", "Swish": "activation", "Erf": "activation", "Tanh": "activation", "Sigmoid": "activation",
    "Transpose": "layout", "Reorder": "layout", "Reshape": "layout", "Unsqueeze": "layout", "Squeeze": "layout",
    "FakeQuantize": "quantize", "Quantize": "quantize", "Dequantize": "quantize",
    "Add": "elementwise", "Multiply": "elementwise", "Divide": "elementwise", "Convert": "elementwise",
    "Sqrt": "elementwise", "Power": "elementwise", "Eltwise": "elementwise", "MulAdd": "elementwise",
}  # fmt: skip


def _layer(counter: Any, ms: float) -> LayerTime:
    """One counter: its `exec_type` names kernel and type, as in `brgconv_avx512_dw_f32`."""
    kind = KINDS.get(counter.node_type, "other")
    if kind == "convolution" and "_dw_" in counter.exec_type:
        kind = "depthwise"
    if kind == "convolution" and "_1x1_" in counter.exec_type:
        kind = "GEMM"  # a linear, see `graph.channels_first`
    if counter.node_type == "Add" and "layer_norm" in counter.node_name:
        kind = "norm"  # LayerNorm is split up, and its last part keeps its name
    ms = max(ms, 0.0)  # the difference of two counts of whole microseconds
    word = counter.exec_type.rpartition("_")[2]
    op = f"{counter.node_type} {counter.exec_type}"
    return LayerTime(name=counter.node_name, op=op, kind=kind, type=TYPE_NAMES.get(word, word), ms=ms)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> OpenVinoSession:
    return OpenVinoSession(folder / FILE, manifest, options)


def refuse(request: ExportRequest, plan: Plan | None) -> None:
    line = saturation.refusal("OpenVINO", plan)
    if line is not None:
        raise UsageError(line)


def read_back(folder: Path) -> Contents:
    """Constants as the operations take them, each operation's at its place.

    A quantizer and what reads its codes back are one FakeQuantize, with limits for a scale and a zero point.
    """
    tensors: list[Tensor] = []
    scalars: list[float] = []
    activations: list[str] = []
    quantizers: list[Quantizer] = []
    constant: dict[str, list[Any]] = {}  # what is made of constants only, and of which
    for node in core().read_model(folder / FILE).get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        given = [node.input_value(index).get_node() for index in range(node.get_input_size())]
        sources = [constant.get(source.get_friendly_name()) for source in given]
        if kind == "Constant" or (sources and all(leaves is not None for leaves in sources)):
            constant[name] = [node] if kind == "Constant" else [leaf for leaves in sources for leaf in leaves or ()]
            continue
        attributes = node.get_attributes()
        if kind == "FakeQuantize" and None not in sources[1:]:
            limits = [float(leaves[0].data.reshape(-1)[0]) for leaves in sources[1:] if leaves]
            # Codes that are read back with other limits than they were made with are two grids: one too many.
            for low, high in dict.fromkeys((tuple(limits[:2]), tuple(limits[2:]))):
                quantizers.append(Quantizer(name, low, high, attributes["levels"]))
            continue
        for leaf in [leaf for leaves in sources for leaf in leaves or ()]:
            type = str(leaf.get_element_type().get_type_name())
            if type not in STORED:
                continue
            tensors.append(Tensor(leaf.get_friendly_name(), STORED[type], leaf.data))
            if leaf.data.size == 1 and type != "i8":
                scalars.append(float(leaf.data.reshape(-1)[0]))
        if kind == "MVN":
            scalars.append(attributes["eps"])
        elif kind == "Gelu":
            activations.append("gelu_tanh" if attributes["approximation_mode"].upper() == "TANH" else "gelu")
        elif kind in ACTIVATIONS:
            activations.append(ACTIVATIONS[kind])
    return Contents(
        tensors=tensors,
        scalars=scalars,
        activations=activations,
        quantizers=quantizers,
    )


ACTIVATIONS = {"Swish": "silu", "Sigmoid": "silu", "Relu": "relu", "ReLU": "relu", "Tanh": "tanh"}
STORED = {"f32": "float32", "f16": "float16", "i8": "int8", "u8": "uint8"}
FILE = "model.xml"
FORMAT = Format(
    name="openvino",
    summary="OpenVINO IR for its CPU plugin",
    suffix=".xml",
    runtime="openvino",
    requires=("openvino",),
    build_requires=("torch", "timm", "safetensors", "onnx", "onnxscript", "onnx_ir"),
    extra="openvino",
    runs_code=False,
    precisions=frozenset({"fp32", "fp16", "bf16"}),
    devices=frozenset({"cpu"}),
    tasks=frozenset({"classify", "embed", "features", "segment", "detect"}),
    builds_in=6.0,
    optimized=frozenset({"cpu"}),
    typed_graph=False,
    build=build,
    load=load,
    refuse=refuse,
    rewrite=rewrite,
    read_back=read_back,
    # Its GELU is part of a convolution, and its tanh form gains nothing.
    eight_bits=EightBits(int8="u8s8", convolutions=True, saturates=True),
    benched=frozenset({"cpu"}),
    bf16_features=frozenset({"avx512_bf16", "amx_bf16"}),
)
