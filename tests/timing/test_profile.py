"""What runtimes' profilers say, against the architecture's own counts and the clock."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from convnext_deploy import api, cli
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions, Session
from convnext_deploy.errors import UsageError
from convnext_deploy.formats import onnx
from convnext_deploy.records.timing import LayerTime, ProfileResult
from convnext_deploy.reports import results
from convnext_deploy.runtimes.tensorrt import profile
from convnext_deploy.timing.profile import typical

BLOCKS = 1 + 2 + 4 + 2  # of test_convnext


def layer(name: str, ms: float) -> LayerTime:
    return LayerTime(name=name, op="op", kind="other", type="fp32", ms=ms)


@pytest.mark.parametrize("format", ["onnx", "openvino", "native", "eager", "torchscript", "pt2"])
def test_layers_add_up_and_fit_into_the_clock(format: str, artifact_of: Callable[..., Artifact]) -> None:
    result = api.profile(artifact_of(format).path, batch=3, steps=8)
    assert (result.format, result.batch, result.steps, result.image_size) == (format, 3, 8, (64, 64))
    assert np.isclose(sum(row.ms for row in result.layers), result.layers_ms)
    assert 0 < result.layers_ms <= 1.02 * result.wall_ms  # OpenVINO counts whole microseconds
    assert [row.ms for row in result.layers] == sorted((row.ms for row in result.layers), reverse=True)
    kinds = {row.kind for row in result.layers}
    assert {"GEMM", "depthwise", "convolution"} <= kinds
    assert ("norm" in kinds) == (format != "native")  # whose norms are part of what they follow
    assert {row.type for row in result.layers if row.kind in ("GEMM", "depthwise")} <= {"fp32", ""}
    assert result.plain_ms > 0


@pytest.mark.parametrize("format", ["onnx", "openvino", "native"])
def test_every_product_and_convolution_is_one_layer(format: str, artifact_of: Callable[..., Artifact]) -> None:
    found = Counter(row.kind for row in api.profile(artifact_of(format).path, batch=2, steps=4).layers)
    assert found["GEMM"] == 2 * BLOCKS + 1
    assert found["depthwise"] == BLOCKS
    assert found["convolution"] == 4  # stem, three downsamples


@pytest.mark.slow  # compiles
def test_aotinductor_says_what_its_profiler_cannot_see(artifact_of: Callable[..., Artifact]) -> None:
    result = api.profile(artifact_of("aotinductor").path, batch=2, steps=4)
    assert result.note is not None
    assert "boxed_run" in result.note
    assert any("boxed_run" in row.op for row in result.layers)


@pytest.mark.parametrize("format", ["onnx", "openvino", "native", "eager"])
def test_a_profiled_session_goes_on_as_before(format: str, artifact_of: Callable[..., Artifact]) -> None:
    session = api.load(artifact_of(format).path)
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    (before,) = session.run(images)
    session.profile(2, 1)
    session.step()
    assert np.array_equal(session.fetch()[0], before)


def test_interrupted_steps_are_not_typical() -> None:
    steps = [(10.0, (layer("a", 6.0), layer("b", 3.0))) for _ in range(6)]
    steps += [(90.0, (layer("a", 80.0), layer("b", 3.0))), (1.0, (layer("a", 0.1), layer("b", 0.1)))]
    wall_ms, layers = typical(steps)
    assert (wall_ms, [(row.name, row.ms) for row in layers]) == (
        10.0,
        [("a", pytest.approx(6)), ("b", pytest.approx(3))],
    )


def test_a_layer_that_runs_twice_counts_twice() -> None:
    _, layers = typical([(10.0, (layer("a", 2.0), layer("a", 3.0)))])
    assert [(row.name, row.ms) for row in layers] == [("a", 5.0)]


def event(name: str, op: str, *inputs: dict[str, list[int]], dur: int = 1000) -> dict[str, Any]:
    return {
        "cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": op, "input_type_shape": inputs},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (event("a_nchwc", "Conv", {"float": [2, 48, 56, 56]}, {"float": [48, 1, 7, 7]}), "depthwise"),
        (event("a_nchwc", "Conv", {"float": [2, 3, 224, 224]}, {"float": [48, 3, 4, 4]}), "convolution"),
        (event("a", "FusedConv", {"float": [2, 1, 8, 8]}, {"float": [1, 1, 3, 3]}), "convolution"),  # one channel
        # ONNX Runtime packs int8 weights away, and appends to the name of the node it replaced.
        (event("node_conv2d_1_token_42", "QLinearConv", {"uint8": [2, 56, 56, 40]}, {"float": []}), "depthwise"),
        (event("node_conv2d_3_token_48", "QLinearConv", {"uint8": [2, 56, 56, 40]}, {"float": []}), "convolution"),
        (event("node_conv2d_13", "QLinearConv", {"uint8": [2, 14, 14, 160]}), "depthwise"),
        (event("reorder", "ReorderInput", {"float": [2, 56, 56, 40]}), "layout"),
        (event("q", "DequantizeLinear", {"int8": [2, 2]}), "quantize"),
        (event("new", "SomethingNew", {"float": [2, 2]}), "other"),
    ],
)
def test_onnx_runtimes_nodes_have_their_kind(found: dict[str, Any], kind: str) -> None:
    groups = {"node_conv2d": 1, "node_conv2d_1": 40, "node_conv2d_3": 1, "node_conv2d_13": 160}
    run = {"cat": "Session", "name": "model_run", "dur": 1500}
    ((wall_ms, (row,)),) = onnx.profiled_steps([found, run], groups)
    assert (wall_ms, row.ms, row.kind) == (1.5, 1.0, kind)


def test_a_session_without_a_profiler_says_so(artifact_of: Callable[..., Artifact]) -> None:
    class Plain(Session):
        _bind = _step = _fetch = _precision = _unshare = None  # type: ignore[assignment]

    Plain.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    session = Plain(artifact_of("eager").manifest, RunOptions())
    with pytest.raises(UsageError, match="Plain has no profiler"):
        session.profile(1, 0)


def test_no_steps_are_refused(artifact_of: Callable[..., Artifact]) -> None:
    with pytest.raises(UsageError, match="steps 0; expected at least 1"):
        api.profile(artifact_of("eager").path, steps=0)


# TensorRT, by its documented interface -------------------------------------------------------------------------------

INSPECTED = {"Layers": [
    {"Name": "conv", "LayerType": "CaskConvolution", "Groups": 96, "Inputs": [{"Format/Datatype": "Half NHWC"}],
     "Metadata": "[ONNX Layer: node_conv2d_1]"},
    {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Int8"}]},
    {"Name": "__myl_Fused_7", "LayerType": "kgen", "Inputs": [{"Datatype": "Float"}],
     "Metadata": "[ONNX Layer: node_layer_norm_2][ONNX Layer: node_add]"},
    "a layer of which only the name is kept",
]}  # fmt: skip


def fake_engine(reports: list[tuple[str, float]]) -> tuple[Any, Any, Any, Any]:
    """(session, module, context, engine) that report these layers at every step."""
    trt = SimpleNamespace(IProfiler=type("IProfiler", (), {}), LayerInformationFormat=SimpleNamespace(JSON=0))
    context = SimpleNamespace(profiler=None)

    def step() -> None:
        for name, ms in reports:
            context.profiler.report_layer_time(name, ms)

    session = SimpleNamespace(step=step, sync=lambda: None, options=RunOptions(device="cuda"))
    inspector = SimpleNamespace(get_engine_information=lambda _: json.dumps(INSPECTED))
    return session, trt, context, SimpleNamespace(create_engine_inspector=lambda: inspector)


def test_an_engines_layers_get_kind_and_type_from_the_inspector() -> None:
    reports = [("conv", 0.5), ("fc", 0.25), ("__myl_Fused_7", 0.125), ("Reformatting CopyNode for Input 0", 0.1)]
    session, trt, context, engine = fake_engine(reports)
    seen = profile.profiled(session, trt, context, engine, 2, 1)
    assert len(seen.steps) == 2
    rows = [(row.name, row.kind, row.type, row.ms) for row in seen.steps[1][1]]
    assert rows == [
        ("conv", "depthwise", "fp16", 0.5), ("fc", "GEMM", "int8", 0.25), ("__myl_Fused_7", "norm", "fp32", 0.125),
        ("Reformatting CopyNode for Input 0", "layout", "", 0.1),
    ]  # fmt: skip
    assert context.profiler is None


def test_a_replayed_graph_cannot_be_profiled() -> None:
    session, trt, context, engine = fake_engine([])
    session.options = RunOptions(device="cuda", cuda_graph=True)
    with pytest.raises(UsageError, match="profile without --cuda-graph"):
        profile.profiled(session, trt, context, engine, 1, 0)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_and_keeps_the_result(
    artifact_of: Callable[..., Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, path = tmp_path / "kept.jsonl", str(artifact_of("onnx").path)
    arguments = ["profile", path, "--batch", "2", "--steps", "4", "--out", str(kept)]
    assert cli.run(arguments) == 0
    words = capsys.readouterr().out
    assert "GEMM" in words
    assert "on the clock" in words
    assert cli.run([*arguments, "--json"]) == 0
    printed = msgspec.json.decode(capsys.readouterr().out, type=ProfileResult)
    read = results.read([kept]).profiles
    assert len(read) == 2
    assert read[1] == printed
