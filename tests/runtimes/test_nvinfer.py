"""TensorRT and TensorRT-RTX, as far as a machine without a GPU goes: required here, never skipped."""

import contextlib
import ctypes
import errno
import io
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nodes import operators

from convnext_deploy import api, cli, env, formats
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.errors import (
    ArtifactError,
    BuildError,
    ConvNextDeployError,
    InputError,
    MissingPackageError,
    UsageError,
)
from convnext_deploy.graph.capture import DeployGraph, input_record, output_records
from convnext_deploy.graph.onnx_read import shares
from convnext_deploy.graph.onnx_write import save_onnx
from convnext_deploy.models import passes, registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import (
    BatchRange,
    EngineRecord,
    ExportSpec,
    Manifest,
    ModelSpec,
    PrecisionTruth,
    Preprocessing,
    TensorRtSpec,
    WeightsRecord,
)
from convnext_deploy.runtimes.tensorrt import build as nvinfer
from convnext_deploy.runtimes.tensorrt import choose, files, inspector, preflight, session

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*")

SMALL = {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "image_size": (64, 64), "num_classes": 10}
BOTH = ("sm80", "sm120")
NAME: choose.Name = "tensorrt_rtx"
FLOAT8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)


def graph_of(spec: ModelSpec, precision: Precision = "fp32", **export: Any) -> DeployGraph:
    torch.manual_seed(0)
    model = ConvNeXt(spec).eval().requires_grad_(False)
    uint8 = export.get("input") == "uint8"
    if uint8:
        passes.fold_preprocessing(model, Preprocessing(mean=(0.5,) * spec.in_chans, std=(0.2,) * spec.in_chans))
    passes.fold_norm_affine(model)
    passes.fold_layer_scale(model)
    passes.cast_parameters(model, precision)
    batch = export.pop("batch", BatchRange(min=1, opt=2, max=4))
    described = ExportSpec(format=NAME, precision=precision, batch=batch, device="cuda", **export)
    h, w = spec.image_size
    shape = (2, h, w, spec.in_chans) if uint8 else (2, spec.in_chans, h, w)
    example = torch.zeros(shape, dtype=torch.uint8 if uint8 else torch.float32)
    return DeployGraph(module=model, export=described, example=example)


def build(path: Path, graph: DeployGraph, folder: Path, *targets: str, **spec: Any) -> EngineRecord:
    return nvinfer.build_engine(
        NAME,
        path,
        folder / "model.engine",
        nvinfer.profiles(graph.model, graph.export),
        TensorRtSpec(targets=targets, **spec),
        tf32=graph.export.precision == "tf32",
    )


def types_of(record: EngineRecord) -> dict[str, float]:
    return shares(record.products.values())


def quantize_linears(source: Path, target: Path, kind: str = "int8") -> int:
    """Symmetric 8-bit Q/DQ pairs on both operands of every MatMul: activations a tensor, weights a channel."""
    model = onnx.load(str(source))
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    nodes, count = [], 0
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            count += 1
            w = numpy_helper.to_array(weights[node.input[1]])  # (in, out)
            largest, dtype = (127, np.dtype(np.int8)) if kind == "int8" else (448, FLOAT8)
            scale = np.maximum(np.abs(w.astype(np.float32)).max(0) / largest, 1e-4).astype(w.dtype)
            q = np.clip(w.astype(np.float32) / scale.astype(np.float32), -largest, largest)
            q = (np.round(q) if kind == "int8" else q).astype(dtype)
            p = f"{node.name}_q"
            graph.initializer.extend([
                numpy_helper.from_array(q, f"{p}_w"),
                numpy_helper.from_array(scale, f"{p}_ws"),
                numpy_helper.from_array(np.zeros(len(scale), dtype), f"{p}_wz"),
                numpy_helper.from_array(np.array(0.05, w.dtype), f"{p}_s"),
                numpy_helper.from_array(np.zeros((), dtype), f"{p}_z"),
            ])  # fmt: skip
            nodes += [
                helper.make_node("QuantizeLinear", [node.input[0], f"{p}_s", f"{p}_z"], [f"{p}_x"]),
                helper.make_node("DequantizeLinear", [f"{p}_x", f"{p}_s", f"{p}_z"], [f"{p}_xd"]),
                helper.make_node("DequantizeLinear", [f"{p}_w", f"{p}_ws", f"{p}_wz"], [f"{p}_wd"], axis=1),
            ]
            node.input[0], node.input[1] = f"{p}_xd", f"{p}_wd"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    onnx.save(model, str(target))
    return count


def quantized_product(path: Path, kind: int) -> Path:
    """One MatMul between Q/DQ pairs of a type."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"], name="product"),
    ]
    values = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]),
        helper.make_tensor("z", kind, [], [0]),
        helper.make_tensor("w", kind, [16, 32], [1] * 512),
        helper.make_tensor("ws", TensorProto.FLOAT, [32], [0.1] * 32),
        helper.make_tensor("wz", kind, [32], [0] * 32),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 16), ("y", 32))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DeployGraph, Path]]:
    """A ConvNeXt of four blocks as ONNX in each precision."""
    folder = tmp_path_factory.mktemp("small")
    made = {}
    for precision in ("fp32", "fp16", "bf16"):
        graph = graph_of(registry.spec("convnext_atto", **SMALL), precision)
        save_onnx(graph, folder / f"{precision}.onnx")
        made[precision] = graph, folder / f"{precision}.onnx"
    return made


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> manifest.Artifact:
    """`export --format trt --trt-target a100,rtx5090` as a user runs it."""
    return api.export(
        "random",
        variant="test_convnext",
        format="trt",
        precision="fp16",
        batch=BatchRange(min=1, opt=2, max=8),
        out=tmp_path_factory.mktemp("trt") / "engine",
        tensorrt=TensorRtSpec(targets=BOTH),
    )


# The ONNX that goes in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_norms_and_activations_go_in_as_single_nodes(small: Any, precision: str) -> None:
    census = operators(small[precision][1])
    assert census["LayerNormalization"] == 4 + 3 + 2  # blocks, downsamples, stem and head
    assert census["Gelu"] == 4
    assert not {"Erf", "Tanh", "Pow", "Sqrt", "ReduceSum"} & set(census)
    assert census["ReduceMean"] == 1  # the pooling


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_norms_in_half_precision_keep_their_statistics_in_fp32(small: Any, precision: str) -> None:
    for node in ir.load(small[precision][1]).graph:
        if node.op_type == "LayerNormalization":
            stash = node.attributes.get("stash_type")
            assert stash is None or stash.as_int() == TensorProto.FLOAT  # 1 is the default


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_no_pair_of_casts_or_transposes_cancels(small: Any, precision: str) -> None:
    for node in ir.load(small[precision][1]).graph:
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type in ("Cast", "Transpose"):
            assert before is None or before.op_type != node.op_type, f"{before} feeds {node}"


# Building -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_computes_in_the_precision_of_its_graph(small: Any, precision: str, tmp_path: Path) -> None:
    graph, path = small[precision]
    record = build(path, graph, tmp_path, *BOTH)
    assert types_of(record) == {precision: 1.0}
    header = files.read_header(tmp_path / "model.engine")
    assert header.targets == record.targets == BOTH
    assert header.version == record.version
    assert header.bytes == record.engine_bytes == (tmp_path / "model.engine").stat().st_size
    assert sorted(os.listdir(tmp_path)) == ["model.engine"]


def test_products_count_what_the_model_counts(small: Any, tmp_path: Path) -> None:
    from convnext_deploy.models.costs import multiply_accumulates

    graph, path = small["fp32"]
    record = build(path, graph, tmp_path, "sm80")
    counted = sum(count for _, count in record.products.values())
    assert counted == graph.export.batch.opt * sum(multiply_accumulates(graph.model).values())


def test_int8_products_are_counted_as_int8(small: Any, tmp_path: Path) -> None:
    graph, path = small["fp32"]
    linears = quantize_linears(path, tmp_path / "int8.onnx")
    assert linears == 8
    for target in BOTH:
        record = build(tmp_path / "int8.onnx", graph, tmp_path, target)
        kinds = [kind for kind, _ in record.products.values()]
        assert kinds.count("int8") == linears
        assert kinds.count("fp32") == 8 + 1  # convolutions; the classifier, a Gemm, was left alone
    quantize_linears(small["fp16"][1], tmp_path / "fp8.onnx", "fp8")
    record = build(tmp_path / "fp8.onnx", graph, tmp_path, "sm89")
    assert [kind for kind, _ in record.products.values()].count("fp8") == linears


def test_tf32_is_off_unless_asked_for(small: Any, tmp_path: Path) -> None:
    graph, path = small["fp32"]
    asked = DeployGraph(
        module=graph.module, export=msgspec.structs.replace(graph.export, precision="tf32"), example=graph.example
    )
    assert types_of(build(path, asked, tmp_path, "sm80")) == {"tf32": 1.0}
    assert types_of(build(path, graph, tmp_path, "sm80")) == {"fp32": 1.0}


def test_an_engine_without_targets_is_for_every_gpu_from_ampere_on(small: Any, tmp_path: Path) -> None:
    graph, path = small["fp16"]
    assert build(path, graph, tmp_path).targets == ()
    header = files.read_header(tmp_path / "model.engine")
    assert header.ampere_on
    assert "sm75" not in header.targets


def test_further_profiles_and_builder_settings_are_taken(small: Any, tmp_path: Path) -> None:
    graph, path = small["fp16"]
    more = TensorRtSpec(targets=("sm80",), profiles=(BatchRange(min=1, opt=1, max=1),), optimization_level=1)
    ranges = nvinfer.profiles(graph.model, msgspec.structs.replace(graph.export, tensorrt=more))
    record = nvinfer.build_engine(NAME, path, tmp_path / "e", ranges, more)
    assert record.profiles[1] == {"images": ((1, 3, 64, 64),) * 3}
    assert len(record.profiles) == 2


@pytest.mark.parametrize(
    ("spec", "export"),
    [
        (registry.spec("convnext_atto", **SMALL), {"input": "uint8", "dynamic_image_size": True}),
        pytest.param(
            msgspec.structs.replace(registry.spec("convnextv2_atto", **SMALL), task="features"),
            {"dynamic_image_size": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            registry.spec("convnext_zepto_rms_ols", **SMALL),
            {"dynamic_image_size": True, "input": "uint8"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["uint8", "features-v2", "uint8-rms-overlap"],
)
def test_other_inputs_and_outputs_build(spec: ModelSpec, export: dict[str, Any], tmp_path: Path) -> None:
    graph = graph_of(spec, "fp16", **export)
    save_onnx(graph, tmp_path / "model.onnx")
    record = build(tmp_path / "model.onnx", graph, tmp_path, *BOTH)
    assert types_of(record) == {"fp16": 1.0}
    if export.get("dynamic_image_size"):
        low, opt, high = record.profiles[0]["images"]
        assert (32 in low, 64 in opt, 1024 in high) == (True, True, True)


FAMILIES = {
    (s.stem, s.norm, s.activation, s.layer_scale, s.grn, s.head, bool(s.head_hidden), s.kernel_sizes): name
    for name, s in ((name, registry.spec(name)) for name in registry.VARIANTS)
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "task"),
    [(variant, "classify") for variant in sorted(FAMILIES.values())]
    + [(variant, task) for variant in ("convnext_large_mlp", "convnextv2_base") for task in ("embed", "features")],
)
def test_every_architecture_family_builds(variant: str, task: str, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(registry.spec(variant, **SMALL), task=task)
    graph = graph_of(spec, "fp16")
    save_onnx(graph, tmp_path / "model.onnx")
    assert types_of(build(tmp_path / "model.onnx", graph, tmp_path, *BOTH)) == {"fp16": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_tiny_builds_ahead_of_time(precision: Any, tmp_path: Path) -> None:
    base: Precision = "fp16" if precision == "int8" else precision
    graph = graph_of(registry.spec("convnext_tiny"), base, batch=BatchRange(min=1, opt=32, max=256))
    path = tmp_path / "model.onnx"
    save_onnx(graph, path)
    if precision == "int8":
        assert quantize_linears(path, path) == 36
    for target in BOTH:
        types = types_of(build(path, graph, tmp_path, target))
        assert types[precision] > (0.9 if precision == "int8" else 0.9999)
        assert files.read_header(tmp_path / "model.engine").targets == (target,)


# The artifact ---------------------------------------------------------------------------------------------------------


def test_the_manifest_says_that_the_engine_was_not_run(artifact: manifest.Artifact) -> None:
    found = manifest.verified(artifact.path).manifest
    assert found.export.format == NAME
    assert found.export.device == "cuda"
    assert found.export.tensorrt is not None
    assert "no NVIDIA GPU here" in (found.export.tensorrt.chosen or "")
    for parity in found.parity:
        assert parity.stand_in is not None
        assert "ONNX Runtime" in parity.stand_in
        assert "the engine was not run" in parity.stand_in
        assert not parity.failures
        assert parity.relative_error is not None
    assert found.precision.graph == {"fp16": 1.0}
    assert found.precision.executed is None
    assert "not executed" in (found.precision.note or "")
    assert found.versions["tensorrt-rtx-cu13"]
    assert [file.path for file in found.files] == ["build.json", "canary.npz", "model.engine"]
    record = msgspec.json.decode((artifact.path / "build.json").read_bytes(), type=EngineRecord)
    assert record.targets == BOTH
    assert record.build_s > 0
    assert record.engine_bytes == (artifact.path / "model.engine").stat().st_size


@pytest.mark.slow
def test_bf16_is_verified_by_pytorch(tmp_path: Path) -> None:
    made = api.export(
        "random", variant="test_convnext", format="trt", trt="rtx", precision="bf16", out=tmp_path / "bf16"
    )
    assert {parity.reference for parity in made.manifest.parity} == {"source", "type"}
    assert all("PyTorch" in (parity.stand_in or "") for parity in made.manifest.parity)
    assert made.manifest.precision.graph == {"bf16": 1.0}


def test_inspect_says_what_the_engine_needs_before_loading_it(
    artifact: manifest.Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", str(artifact.path)]) == 0
    printed = capsys.readouterr().out
    assert "NOT RUN: ONNX Runtime" in printed
    assert "engine for sm80, sm120" in printed
    assert "cannot run here: no NVIDIA GPU here" in printed
    assert cli.run(["inspect", str(artifact.path / "model.engine")]) == 0
    assert "engine for sm80, sm120" in capsys.readouterr().out


def test_an_engine_is_not_loaded_without_a_gpu(artifact: manifest.Artifact) -> None:
    with pytest.raises(InputError, match="PyTorch finds none here"):
        api.load(artifact.path, device="cuda")


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "8:4:2"], "--batch 8:4:2; expected N or MIN:OPT:MAX"),
        (["--trt-target", "rtx9999"], "--trt-target rtx9999 is not a known GPU"),
        (["--trt-target", "h100"], "cannot build for sm90; it has sm75, sm80, sm86, sm89, sm120, sm121"),
        (["--trt-target", ","], "names no GPU"),
        (["--trt-profile", "1:8:512"], "leaves --batch 1:8:256"),
        (["--trt-sides", "64:128:256"], "--trt-sides is for --dynamic-image-size"),
        (["--trt-sides", "31:100:256", "--dynamic-image-size"], "sides 31:100:256; expected 32 <= min <= opt <= max"),
        (["--trt-refit", "strip"], "--trt-refit strip needs an NVIDIA GPU"),
        (["--trt-refit", "maybe"], "expected none, refit or strip"),
        (["--trt-version-compatible"], "TensorRT-RTX has no --trt-version-compatible"),
        (["--trt-hardware-compatible"], "TensorRT-RTX has no --trt-hardware-compatible"),
        (["--trt", "both"], "expected one of auto, tensorrt, rtx"),
        (["--trt", "tensorrt"], "tensorrt"),  # not installed, or no GPU
        (["--precision", "int4"], "--precision int4"),
        (["--device", "cpu"], "runs on cuda, not on cpu"),
        (["--format", "onnx", "--trt-target", "a100"], "takes no TensorRT options"),
        (["--format", "onnx", "--trt", "rtx"], "--trt rtx is for --format trt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_request_is_one_line_and_leaves_nothing_behind(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--variant", "test_convnext", "--weights", "random", "--format", "trt", "--quiet"]
    assert cli.run([*arguments, "--out", str(tmp_path / "engine"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.replace("\nhint: ", "; ").count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_int8_needs_no_special_target_but_fp8_does(tmp_path: Path) -> None:
    ranges = (((1, 16), (2, 16), (4, 16)),)
    for target in BOTH:
        path = quantized_product(tmp_path / "int8.onnx", TensorProto.INT8)
        record = nvinfer.build_engine(NAME, path, tmp_path / "e", ranges, TensorRtSpec(targets=(target,)))
        assert record.products == {"product": ("int8", 2 * 16 * 32)}
    path = quantized_product(tmp_path / "fp8.onnx", TensorProto.FLOAT8E4M3FN)
    record = nvinfer.build_engine(NAME, path, tmp_path / "e", ranges, TensorRtSpec(targets=("sm120",)))
    assert record.products == {"product": ("fp8", 2 * 16 * 32)}
    with pytest.raises(UsageError, match=r"fp8 needs sm89 .* --trt-target has sm80"):
        nvinfer.build_engine(NAME, path, tmp_path / "no", ranges, TensorRtSpec(targets=("sm80", "sm89")))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:3000], lambda b: b"hello" * 100, lambda b: b""],
    ids=["truncated", "garbage", "empty"],
)
def test_a_corrupt_onnx_is_refused(small: Any, damage: Any, tmp_path: Path) -> None:
    graph, path = small["fp16"]
    (tmp_path / "bad.onnx").write_bytes(damage(path.read_bytes()))
    with pytest.raises(BuildError, match=r"bad\.onnx") as caught:
        build(tmp_path / "bad.onnx", graph, tmp_path, "sm80")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["bad.onnx"]


def test_an_operator_that_is_not_known_is_named(small: Any, tmp_path: Path) -> None:
    graph, path = small["fp32"]
    model = onnx.load(str(path))
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Gelau"
    onnx.save(model, str(tmp_path / "bad.onnx"))
    with pytest.raises(BuildError, match="Gelau node node_"):
        build(tmp_path / "bad.onnx", graph, tmp_path, "sm80")


def test_too_little_workspace_is_said(small: Any, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot build the engine: .*(workspace|Requested size)"):
        build(small["fp32"][1], small["fp32"][0], tmp_path, "sm80", workspace_mb=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Path.open

    def full(self: Path, *arguments: Any, **options: Any) -> Any:
        return Full(self, "w") if self.name == files.ENGINE_FILE else opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    arguments = ["export", "--variant", "test_convnext", "--weights", "random", "--format", "trt", "--quiet"]
    assert cli.run([*arguments, "--out", str(tmp_path / "engine")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is full\nhint: make room" in error
    assert error.replace("\nhint: ", "; ").count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "make room, or choose another --out"),
        (errno.EDQUOT, "make room, or choose another --out"),  # a user's share of a disk
        (errno.EROFS, "choose another --out"),
        (errno.EACCES, "choose another --out"),
    ],
)
def test_an_engine_that_cannot_be_written_says_why_and_what_to_do(number: int, cure: str, tmp_path: Path) -> None:
    error = files.unwritten(tmp_path / files.ENGINE_FILE, OSError(number, os.strerror(number)))
    assert str(error) == f"the engine cannot be written to {tmp_path}: {os.strerror(number)}; {cure}"


def test_ctrl_c_cancels_a_build_and_leaves_nothing_behind(small: Any, tmp_path: Path) -> None:
    graph, path = small["fp32"]
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        nvinfer.build_engine(
            NAME, path, tmp_path / "e", nvinfer.profiles(graph.model, graph.export), TensorRtSpec(), say=interrupt
        )
    assert said
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before
    build(path, graph, tmp_path, "sm80")  # the next one is not cancelled


def test_a_build_in_another_thread_works(small: Any, tmp_path: Path) -> None:
    graph, path = small["fp32"]
    thread = threading.Thread(target=build, args=(path, graph, tmp_path, "sm80"))
    thread.start()
    thread.join()
    assert (tmp_path / "model.engine").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "cut short"),
        (lambda b: b[:10], "not a TensorRT engine"),
        (lambda b: b"x" * 5000, "not a TensorRT engine"),
        (lambda b: b"", "not a TensorRT engine"),
    ],
    ids=["half", "ten bytes", "garbage", "empty"],
)
def test_a_damaged_engine_is_refused_before_it_is_loaded(
    artifact: manifest.Artifact, damage: Any, message: str, tmp_path: Path
) -> None:
    engine = tmp_path / "model.engine"
    engine.write_bytes(damage((artifact.path / "model.engine").read_bytes()))
    with pytest.raises(ArtifactError, match=message):
        preflight.preflight(engine)
    (problem,) = preflight.probe(NAME, engine)  # even if it were loaded
    assert "refuses this engine" in problem


def test_a_crash_while_loading_ends_the_trial_process_only(tmp_path: Path) -> None:
    (problem,) = preflight.probe(NAME, tmp_path / "e", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert "SIGSEGV" in problem
    (problem,) = preflight.probe(NAME, tmp_path / "e", "raise SystemExit('broken')")
    assert "broken" in problem
    (problem,) = preflight.probe(NAME, tmp_path / "e", "import time; time.sleep(60)", limit_s=0.3)
    assert "no answer in 0.3 s" in problem


def test_preflight_names_the_cure_for_another_gpu_or_version(
    artifact: manifest.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = {"name": "NVIDIA L4", "compute_capability": "8.9", "driver": "580.1"}
    monkeypatch.setattr(env, "nvidia_gpu_facts", lambda: [gpu])
    engine = artifact.path / "model.engine"
    assert "export again with --trt-target sm89" in preflight.preflight(engine).problems[0]
    monkeypatch.setattr(preflight, "import_module", lambda name: SimpleNamespace(__version__="1.2.3.4"))
    assert "pip install tensorrt-rtx-cu13==1." in preflight.preflight(engine).problems[0]


def test_refit_says_why_it_cannot(artifact: manifest.Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not exported with --trt-refit"):
        api.refit(artifact.path, "random", out=tmp_path / "new")
    assert not list(tmp_path.iterdir())


# Choosing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "gpus", "absent", "expected"),
    [
        ("auto", ["GPU 0: NVIDIA A100"], (), "tensorrt"),
        ("auto", [], (), "tensorrt_rtx"),
        ("auto", ["GPU 0: NVIDIA A100"], ("tensorrt",), "tensorrt_rtx"),
        ("rtx", ["GPU 0: NVIDIA A100"], (), "tensorrt_rtx"),
        ("auto", [], ("tensorrt", "tensorrt_rtx"), r"pip install 'convnext-deploy\[trt-rtx\]'"),
        ("auto", ["GPU 0: NVIDIA A100"], ("tensorrt", "tensorrt_rtx"), r"pip install 'convnext-deploy\[trt\]'"),
        ("tensorrt", ["GPU 0: NVIDIA A100"], ("tensorrt",), r"pip install 'convnext-deploy\[trt\]'"),
        ("tensorrt", [], (), "there is none here"),
        ("rtx", [], ("tensorrt_rtx",), r"pip install 'convnext-deploy\[trt-rtx\]'"),
    ],
)
def test_trt_takes_tensorrt_beside_a_gpu_and_rtx_elsewhere(
    wanted: str, gpus: list[str], absent: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(env, "missing", lambda modules: tuple(m for m in modules if m in absent))
    if expected.startswith("tensorrt"):
        name, why = choose.choose(wanted)
        assert name == expected
        assert "\n" not in why
    else:
        with pytest.raises((UsageError, MissingPackageError), match=expected):
            choose.choose(wanted)


def test_targets_are_names_or_compute_capabilities() -> None:
    assert choose.targets_of("RTX 4090".replace(" ", "") + ",a100, sm_86") == ("sm80", "sm86", "sm89")
    assert choose.targets_of("rtx-5090,sm80,A100") == ("sm80", "sm120")


def test_torch_tensorrt_is_refused_without_a_gpu(tmp_path: Path) -> None:
    fmt = formats.get("torch_tensorrt")
    with pytest.raises(ConvNextDeployError, match="NVIDIA GPU"):
        fmt.build(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    assert cli.run(["list", "--quiet"]) == 0


# Running, with everything of the GPU replaced -------------------------------------------------------------------------


class FakeStream:
    cuda_stream = 1

    def synchronize(self) -> None: ...

    def wait_stream(self, other: "FakeStream") -> None: ...


class FakeContext:
    """Doubles every image's first ten values, through the addresses it was given."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.profile = 0
        self.runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], 10)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        def view(name: str, shape: tuple[int, ...]) -> np.ndarray:
            size = int(np.prod(shape))
            return np.ctypeslib.as_array((ctypes.c_float * size).from_address(self.addresses[name])).reshape(shape)

        source = view("images", self.shape)
        view("logits", (self.shape[0], 10))[:] = 2 * source.reshape(self.shape[0], -1)[:, :10]
        self.runs += 1
        return True


@pytest.fixture
def fake_session(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[session.EngineSession, FakeContext]:
    graph, path = small["fp32"]
    more = TensorRtSpec(targets=("sm80",), profiles=(BatchRange(min=1, opt=1, max=1),))
    export = msgspec.structs.replace(graph.export, tensorrt=more)
    record = nvinfer.build_engine(
        NAME, path, tmp_path / "model.engine", nvinfer.profiles(graph.model, export), more
    )  # fmt: skip
    files.save_record(tmp_path, record)
    context = FakeContext()
    engine = SimpleNamespace(
        create_execution_context=lambda *_: context,
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _: '{"Layers": ["names only"]}'),
    )
    real = choose.import_module(NAME)
    fake = SimpleNamespace(
        __version__=real.__version__, ILogger=real.ILogger, LayerInformationFormat=real.LayerInformationFormat,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda content: engine),
    )  # fmt: skip
    monkeypatch.setattr(session, "import_module", lambda name: fake)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device=None, pin_memory=False: empty(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    described = Manifest(
        schema_version=1, created="", tool="", model=graph.model,
        weights=WeightsRecord(source="random", layout="ours", random=True, tensors_sha256="0" * 64),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3), labels=None, export=export,
        inputs=(input_record(graph.model, export),), outputs=output_records(graph.model, export), passes=(),
        parity=(), precision=PrecisionTruth(graph={}), versions={}, machine={}, files=(),
    )  # fmt: skip
    return session.EngineSession(NAME, tmp_path, described, RunOptions(device="cuda")), context


def test_a_session_binds_steps_and_fetches(fake_session: tuple[session.EngineSession, FakeContext]) -> None:
    session, context = fake_session
    for batch, profile in ((1, 1), (3, 0), (1, 1)):  # the profile tuned for the nearest batch
        images = np.random.default_rng(batch).normal(size=(batch, 3, 64, 64)).astype(np.float32)
        (logits,) = session.run(images)
        assert np.array_equal(logits, 2 * images.reshape(batch, -1)[:, :10])
        assert context.profile == profile
    bound = dict(context.addresses)
    (again,) = session.run(2 * images)
    assert bound == context.addresses  # the same shape keeps its buffers
    assert np.array_equal(again, 2 * logits)  # and what was fetched before is the caller's own
    runs = context.runs
    session.step()
    session.step()
    session.sync()
    assert context.runs == runs + 2
    truth = session.precision()
    assert truth.graph == {"fp32": 1.0}
    assert truth.executed is None


def test_a_shape_outside_every_profile_is_refused() -> None:
    ranges = [((1, 3, 32, 32), (2, 3, 64, 64), (4, 3, 128, 128)), ((1, 3, 32, 32),) * 3]
    assert session.choose_profile(ranges, (1, 3, 32, 32)) == 1
    assert session.choose_profile(ranges, (3, 3, 96, 64)) == 0
    with pytest.raises(InputError, match="5x3x64x64; this engine takes 1x3x32x32 to 4x3x128x128"):
        session.choose_profile(ranges, (5, 3, 64, 64))


def test_the_inspector_s_layers_are_counted_by_type() -> None:
    """The shape of this JSON is a guess, made without a GPU: no engine's own was seen."""
    text = msgspec.json.encode({"Layers": [
        {"Name": "__myl_Fc_1", "Metadata": "[ONNX Layer: node_MatMul_4]\u001e[ONNX Layer: node_gelu]",
         "Inputs": [{"Name": "x", "Format/Datatype": "Half"}]},
        {"Name": "node_conv2d", "Inputs": [{"Name": "y", "Format/Datatype": "Float NHWC"}]},
        {"Name": "reformat", "Inputs": [{"Name": "z", "Format/Datatype": "Int8"}]},
        "a layer of which only the name is kept",
    ]}).decode()  # fmt: skip
    products = {"node_MatMul_4": ("fp16", 6.0), "node_conv2d": ("fp16", 3.0), "node_MatMul": ("fp16", 1.0)}
    assert inspector.precision_of_layers(text, products) == {"fp16": 0.6, "fp32": 0.3, "unknown": 0.1}
    assert inspector.precision_of_layers('{"Layers": ["a"]}', products) == {}


# With a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not env.nvidia_gpus(), reason="there is no NVIDIA GPU here")
@pytest.mark.parametrize("trt", ["tensorrt", "rtx"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_an_engine_runs_and_replays(trt: str, precision: Any, tmp_path: Path) -> None:
    if env.missing(({"rtx": "tensorrt_rtx"}.get(trt, trt),)):
        pytest.skip(f"{trt} is not installed")
    made = api.export(
        "random", variant="test_convnext", format="trt", trt=trt, precision=precision, out=tmp_path / "engine",
        tensorrt=TensorRtSpec(profiles=(BatchRange(min=1, opt=1, max=1),)),
    )  # fmt: skip
    assert all(parity.stand_in is None for parity in made.manifest.parity)  # the engine itself was verified
    plain = api.load(made.path, device="cuda")
    replayed = api.load(made.path, device="cuda", cuda_graph=True)
    for batch in (1, 5, 1):
        images = np.random.default_rng(batch).normal(size=(batch, 3, 224, 224)).astype(np.float32)
        (expected,) = plain.run(images)
        for _ in range(3):  # the first runs plainly, the second captures, the third replays
            (found,) = replayed.run(images)
            assert np.allclose(found, expected, rtol=1e-2, atol=1e-3)
