"""A model rewritten to the fused operations computes what it did; exports keep them; and when they are refused."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from references import randomize_
from torch import Tensor

from convnext_deploy import api, env, formats
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.errors import InputError, UsageError
from convnext_deploy.graph.capture import DeployGraph
from convnext_deploy.kernels import choice
from convnext_deploy.kernels.use import FusedBlock, FusedQuantizedBlock, alternatives, parts, use_kernels
from convnext_deploy.models import passes
from convnext_deploy.models.convnext import Block, ConvNeXt
from convnext_deploy.models.registry import spec
from convnext_deploy.quantization.apply import WEIGHT_SCHEMES, QuantizedLinear, apply, rebalance, rounded, rows_of
from convnext_deploy.quantization.plan import LoadedPlan, read, write
from convnext_deploy.quantization.ranges import weight_scales
from convnext_deploy.records.manifest import BatchRange
from convnext_deploy.records.plan import CalibrationRecord, OperationPlan, Plan
from convnext_deploy.records.timing import KernelMeasurement
from convnext_deploy.runtimes.torch_session import MacCounter

ALL = (
    "stem",
    "stages.0",
    "downsamples.0",
    "stages.1",
    "downsamples.1",
    "stages.2",
    "downsamples.2",
    "stages.3",
    "head",
)


def folded(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> ConvNeXt:
    model = ConvNeXt(spec(name, num_classes=7, image_size=(64, 64), **overrides))
    randomize_(model)
    passes.fold_norm_affine(model)
    passes.fold_layer_scale(model)
    passes.fold_grn_bias(model)
    return model.to(dtype)


def outputs(model: ConvNeXt, images: Tensor) -> tuple[Tensor, ...]:
    found = model(images)
    return (found,) if isinstance(found, Tensor) else found


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("task", ["classify", "embed", "features"])
@pytest.mark.parametrize(
    "name", ["test_convnext", "test_convnext3", "convnextv2_atto", "convnext_zepto_rms", "convnext_atto_rms"]
)
def test_a_rewritten_model_computes_the_same(name: str, task: str) -> None:
    model = folded(name, task=task)
    before = outputs(model, IMAGES)
    use_kernels(model, parts(model))
    assert len(parts(model)) == 0  # nothing is left to rewrite
    for found, expected in zip(outputs(model, IMAGES), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["test_convnext", "test_convnext3", "convnext_zepto_rms", "convnext_atto_rms"])
def test_a_model_with_both_linears_in_one_kernel_computes_the_same(name: str) -> None:
    model = folded(name)
    before = outputs(model, IMAGES)
    others = alternatives(model)
    assert "stages.0.mlp" in others
    use_kernels(model, others)
    counted = torch.export.export(model, (IMAGES,)).graph.nodes
    assert sum("convnext_deploy.mlp" in str(node.target) for node in counted) == sum(
        depth for stage, depth in enumerate(model.spec.depths) if f"stages.{stage}.mlp" in others
    )
    for found, expected in zip(outputs(model, IMAGES), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rewritten_model_in_half_precision_is_as_near_to_float64(dtype: torch.dtype) -> None:
    for name in ("test_convnext", "convnextv2_atto"):
        model = folded(name)
        (exact,) = outputs(model, IMAGES)
        model.to(dtype)
        (eager,) = outputs(model, IMAGES)
        use_kernels(model, parts(model))
        (found,) = outputs(model, IMAGES)
        errors = [((y.double() - exact).norm() / exact.norm()).item() for y in (found, eager)]
        assert errors[0] <= 2 * errors[1]


def test_a_rewritten_model_takes_raw_pixels() -> None:
    from convnext_deploy.records.manifest import Preprocessing

    model = folded("test_convnext")
    passes.fold_preprocessing(model, Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.2)))
    pixels = torch.randint(256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (before,) = outputs(model, pixels)
    use_kernels(model, ("stem",))
    torch.testing.assert_close(outputs(model, pixels)[0], before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "shift"), [("s8s8", 0.0), ("s8s8", 1.5), ("fp8", 0.0)])
@pytest.mark.parametrize("name", ["test_convnext", "convnextv2_atto"])
def test_a_block_in_8_bits_follows_its_plan(name: str, kind: Any, shift: float) -> None:
    """The module that a plan was applied to is the simulation; the operators differ from it by codes that flip."""
    model = folded(name, torch.float32)
    x = torch.randn(2, 4, 4, model.spec.dims[0], generator=torch.Generator().manual_seed(0))
    block = model.get_submodule("stages.0.0")
    assert isinstance(block, Block)
    plain = block(x)
    rebalance(model, "stages.0.0.expand", torch.linspace(0.5, 2, model.spec.dims[0]))
    hidden = block.expand(block.dwconv_norm(x))
    for linear, seen in (
        ("expand", block.dwconv_norm(x)),
        ("project", hidden if block.grn is None else block.grn(hidden)),
    ):
        largest = {"s8s8": 127, "fp8": 448}[kind]
        offset = shift if linear == "project" else 0.0
        operation = OperationPlan(type=kind, scale=(seen - offset).abs().max().item() / largest, shift=offset)
        before = block.get_submodule(f"{linear}.linear")
        rows = rows_of(before)
        scales = weight_scales(rows, WEIGHT_SCHEMES[kind], "minmax")
        bias = before.get_parameter("bias") + rows.sum(1) * offset
        quantized = QuantizedLinear(operation, rounded(rows, scales, operation), scales, bias)
        setattr(block.get_submodule(linear), "linear", quantized)  # noqa: B010 - a module's attribute is a Tensor to mypy
    simulated = block(x)
    unfused = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    module = FusedQuantizedBlock(block)
    fused = module(x)
    step = (simulated - plain).norm()  # what quantization itself moves
    assert (fused - simulated).norm() < 0.1 * step
    after = module.state_dict()
    assert list(after) == list(unfused)
    assert all(torch.equal(after[name], unfused[name]) for name in unfused)


def test_parameters_keep_their_names_shapes_and_values() -> None:
    model = folded("convnextv2_atto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_kernels(model, ALL)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("convnext_atto_ols", {"stem"}),  # overlapping
        ("convnext_tiny_hnf", {"head"}),  # normalized before it is pooled
        ("test_convnext", set()),
    ],
)
def test_parts_are_those_that_kernels_can_run(name: str, left_out: set[str]) -> None:
    assert set(ALL) - set(parts(folded(name, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)))) == left_out


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("convnext_atto", ("stages.0.mlp", "stages.1.mlp")),  # 40 and 80 channels of 40, 80, 160, 320
        ("convnext_base", ("stages.0.mlp",)),  # 128
        ("convnext_large", ()),  # 192
        ("convnextv2_atto", ()),  # GRN needs a sum over the image between the linears
    ],
)
def test_alternatives_are_narrow_stages_without_grn(name: str, found: tuple[str, ...]) -> None:
    assert alternatives(folded(name, depths=(1, 1, 1, 1), task="features")) == found


def test_a_stage_runs_in_one_of_two_ways() -> None:
    model = folded("test_convnext", torch.float32)
    with pytest.raises(UsageError) as error:
        use_kernels(model, ("stem", "stages.0.mlp", "stages.0"))
    assert str(error.value) == "stages.0 and stages.0.mlp are two ways to run the same blocks; name one of them"
    assert parts(model) == ALL  # nothing was rewritten
    for name in ("stem.mlp", "stages.0.mlp.mlp"):
        with pytest.raises(UsageError, match=f"no kernel runs {name} of test_convnext; they run stem, .*stages.3.mlp"):
            use_kernels(model, (name,))


def test_a_model_that_was_not_folded_has_no_blocks_for_kernels() -> None:
    model = ConvNeXt(spec("test_convnext"))
    assert parts(model) == ("stem", "head")
    with pytest.raises(UsageError, match=r"no kernel runs stages.0 of test_convnext; they run stem, head"):
        use_kernels(model, ("stages.0",))


def test_torch_export_keeps_the_operations_and_any_batch() -> None:
    model = folded("convnextv2_atto", torch.float32)
    use_kernels(model, ALL)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (IMAGES.float(),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes if "convnext_deploy" in str(node.target)}
    words = ("dwconv_moments", "expand_squares", "grn_factor", "project", "stem", "downsample", "pool_norm")
    assert targets == {f"convnext_deploy.{word}.default" for word in words}
    assert program.module()(IMAGES[:1].float().expand(5, -1, -1, -1)).shape == (5, 7)


def test_the_multiply_accumulates_of_operations_are_counted() -> None:
    counts = []
    for names in ((), ALL, [name + ".mlp" if "stages" in name else name for name in ALL]):
        model = folded("test_convnext", torch.float32)
        use_kernels(model, names)
        with MacCounter() as counter, torch.inference_mode():
            model(IMAGES.float())
        counts.append(sum(count for _, count in counter.macs))
        assert {name for name, _ in counter.macs} == {"fp32"}
    assert counts[0] == counts[1] == counts[2] > 0


def test_an_eager_artifact_loads_with_the_kernels_that_its_manifest_names(artifact_of: Callable[..., Artifact]) -> None:
    import numpy as np

    from convnext_deploy.formats import eager

    made = artifact_of("eager")
    export = msgspec.structs.replace(made.manifest.export, kernels=("stages.0.mlp", *ALL[2:]))
    found = msgspec.structs.replace(made.manifest, export=export)
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    sessions: list[Any] = [eager.load(made.path, manifest, RunOptions()) for manifest in (found, made.manifest)]
    fused, plain = sessions
    module = fused._call
    assert [type(stage[0]).__name__ for stage in module.stages[:2]] == ["FusedMlpBlock", "FusedBlock"]
    np.testing.assert_allclose(fused.run(images)[0], plain.run(images)[0], rtol=1e-4, atol=1e-4)
    assert fused.precision().graph == {"fp32": 1.0}


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are refused on the CPU, where each operation is its reference; here that is what is wanted."""
    refuse = choice.refuse
    monkeypatch.setattr(
        choice, "refuse", lambda spec, *rest: refuse(msgspec.structs.replace(spec, device="cuda"), *rest)
    )


@pytest.mark.parametrize("format", ["eager", "aotinductor"])
def test_a_format_captures_and_builds_the_module_with_the_kernels_in_it(
    format: str, checkpoint: Path, tmp_path: Path, without_a_gpu: None, replaced_format: Callable[..., None]
) -> None:
    """They are put in before the graph is frozen: no format rewrites what it was given."""
    seen: list[DeployGraph] = []

    def build(graph: DeployGraph, folder: Path) -> None:
        seen.append(graph)
        raise KeyboardInterrupt

    replaced_format(format, build=build)
    with pytest.raises(KeyboardInterrupt):
        api.export(
            str(checkpoint), format=format, kernels="all", image_size=64, batch=2, out=tmp_path / "o", device="cpu"
        )
    (graph,) = seen
    assert graph.export.kernels == ALL
    called = {str(node.target) for node in graph.program.graph.nodes if node.op == "call_function"}
    assert {name for name in called if name.startswith("convnext_deploy.")}
    assert any(isinstance(module, FusedBlock) for module in graph.module.modules())


@pytest.mark.parametrize("type", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_plan_is_exported_verified_and_loaded_in_kernels(type: Any, tmp_path: Path, without_a_gpu: None) -> None:
    """The whole way: quantize, export, read back. The bundled model and images, so that agreement means something."""
    import numpy as np

    example = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist"
    weights, images = str(example / "model.safetensors"), str(example / "test-2000.parquet")
    plan = api.quantize(
        weights, out=tmp_path / "plan.json", calibration=images, target="eager", type=type, images=64, rest="fp32"
    )
    if type == "int8":  # a shift and a balance, whether or not they were found to help
        name, wide = "stages.1.0.project", plan.operations["stages.1.0.project"]
        shifted = msgspec.structs.replace(wide, shift=0.25)
        plan = msgspec.structs.replace(plan, operations={**plan.operations, name: shifted})
        factors = {"balance/stages.2.0.expand": torch.linspace(0.8, 1.2, 96)}
        write(tmp_path / "plan.json", plan, {**read(tmp_path / "plan.json").tensors, **factors})
    made = api.export(
        weights, format="eager", plan=tmp_path / "plan.json", kernels="all", verify_data=images, out=tmp_path / "out"
    )
    assert made.manifest.precision.quantized == len(plan.operations) == 20
    assert set(made.manifest.precision.graph) == {type, "fp32"}
    assert made.manifest.precision.graph[type] > 0.8
    simulation = next(
        parity for parity in made.manifest.parity if parity.reference == "simulation" and parity.images == images
    )
    assert simulation.top1_agreement == 1.0
    session = api.load(made.path)
    tensors = session._call.state_dict()  # type: ignore[attr-defined]
    assert {str(value.dtype) for name, value in tensors.items() if name.endswith("expand.linear.weight")} == {
        {"int8": "torch.int8", "fp8": "torch.float8_e4m3fn"}[type]
    }
    found = {module.shift for module in session._call.modules() if isinstance(module, QuantizedLinear)}  # type: ignore[attr-defined]
    assert found == {operation.shift for operation in plan.operations.values()}
    pixels = np.zeros((1, *map(int, made.manifest.inputs[0].shape[1:])), dtype=np.float32)
    assert np.isfinite(session.run(pixels)[0]).all()


@pytest.mark.parametrize(
    ("kernels", "batch", "traced"),
    [
        ("all", BatchRange(min=1, opt=6, max=8), 6),
        ("all", BatchRange(min=1, opt=1, max=8), 2),  # a batch of 1 would be taken for a constant
        ("all", BatchRange(min=3, opt=3, max=3), 3),
        ("none", BatchRange(min=1, opt=6, max=8), 2),
    ],
)
def test_a_graph_with_kernels_is_traced_with_the_batch_that_it_is_tuned_for(
    kernels: Any, batch: BatchRange, traced: int, checkpoint: Path, tmp_path: Path, without_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its kernels get the tiles for it."""
    from convnext_deploy.graph import capture

    seen = []
    made = capture.DeployGraph

    def graph(**fields: Any) -> capture.DeployGraph:
        seen.append(len(fields["example"]))
        return made(**fields)

    monkeypatch.setattr(capture, "DeployGraph", graph)
    api.export(str(checkpoint), format="eager", kernels=kernels, batch=batch, out=tmp_path / "out")
    assert seen == [traced]


def test_an_fp8_artifact_is_refused_on_a_gpu_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from convnext_deploy.runtimes import torch_weights

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    tensors = {"weight": torch.zeros(2).to(torch.float8_e4m3fn)}
    with pytest.raises(InputError, match=r"fp8, and NVIDIA A100 has compute capability 8\.0; E4M3 needs 8\.9"):
        torch_weights._refuse_gpu(tensors, RunOptions(device="cuda"))
    torch_weights._refuse_gpu(tensors, RunOptions(device="cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    torch_weights._refuse_gpu(tensors, RunOptions(device="cuda"))


@pytest.mark.parametrize(
    ("operation", "changes", "message"),
    [
        (
            "expand",
            {"zero_point": 3},
            "'stages.0.0.expand' has type s8s8 and zero point 3; expected 0",
        ),
        (
            "expand",
            {"shift": 0.5},
            "stages.0.0.expand in s8s8 with zero point 0 and shift 0.5; the fused kernels have no",
        ),
        (
            "both",
            {"type": "u8s8"},
            "stages.0.0.expand in u8s8 with zero point 0 and shift 0; the fused kernels have no",
        ),
    ],
)
def test_what_kernels_would_leave_out_is_refused(
    operation: str, changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path, without_a_gpu: None
) -> None:
    changed = msgspec.structs.replace(OPERATION, **changes)
    operations = {
        "stages.0.0.expand": changed, "stages.0.0.project": changed if operation == "both" else OPERATION,
    }  # fmt: skip
    with pytest.raises(UsageError, match=re.escape(message)):
        api.export(
            str(checkpoint), format="eager", plan=planned(tmp_path, operations), kernels="all", out=tmp_path / "o"
        )


def test_stages_that_a_plan_quantizes_are_named_beside_the_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "nvidia_gpu_facts", lambda: [{"name": "a GPU", "compute_capability": "9.0"}])
    monkeypatch.setattr(choice, "table", lambda: {"a GPU": [measurement(part="stem")]})
    model = folded("test_convnext", torch.float32)
    operations = {f"stages.1.0.{kind}": OPERATION for kind in ("expand", "project")}
    plan = Plan(
        target="eager", architecture="test_convnext", weights_sha256="0" * 64, input="float32", image_size=(64, 64),
        rest="fp16", operations=operations, calibration=None,
    )  # fmt: skip
    apply(model, LoadedPlan(plan, {}, eight_bits=formats.eight_bits_of("eager")))
    passes.cast_parameters(model, "fp16")
    said: list[str] = []
    export = msgspec.structs.replace(artifact_spec(), precision="fp16")
    assert choice.chosen(model, export, "measured", said.append) == ("stem", "stages.1")
    assert said == ["kernels: measured faster on a GPU at batch 8: stem; because the plan quantizes them: stages.1"]


def test_a_plan_for_kernels_needs_them(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path, {"stages.0.0.expand": OPERATION, "stages.0.0.project": OPERATION})
    with pytest.raises(
        UsageError, match="format eager computes in 8 bits in the fused kernels only; add --kernels all"
    ):
        api.export(str(checkpoint), format="eager", plan=plan, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (("stages.0.0.expand",), "the plan has stages.0.0.expand in s8s8; the fused kernels run expand and project"),
        (("downsamples.0",), "the plan has downsamples.0 in s8s8; the fused kernels run expand and project"),
    ],
)
def test_a_plan_that_kernels_cannot_run_is_refused(
    operations: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path, without_a_gpu: None
) -> None:
    plan = planned(tmp_path, dict.fromkeys(operations, OPERATION))
    with pytest.raises(UsageError, match=message):
        api.export(str(checkpoint), format="eager", plan=plan, kernels="all", out=tmp_path / "out")


def test_a_plan_that_keeps_fp32_is_refused(checkpoint: Path, tmp_path: Path, without_a_gpu: None) -> None:
    plan = planned(tmp_path, {"stages.0.0.project": OperationPlan(type="fp32")}, rest="bf16")
    with pytest.raises(
        UsageError, match=r"keeps stages.0.0.project in fp32, and the fused kernels have one float type"
    ):
        api.export(str(checkpoint), format="eager", plan=plan, kernels="all", out=tmp_path / "out")


def test_fp8_is_refused_where_the_gpu_has_none(
    checkpoint: Path, tmp_path: Path, without_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "nvidia_gpu_facts", lambda: [{"name": "NVIDIA A100", "compute_capability": "8.0"}])
    operation = msgspec.structs.replace(OPERATION, type="fp8")
    plan = planned(tmp_path, {"stages.0.0.expand": operation, "stages.0.0.project": operation})
    with pytest.raises(UsageError, match=r"fp8, and NVIDIA A100 has compute capability 8\.0; E4M3 needs 8\.9"):
        api.export(str(checkpoint), format="eager", plan=plan, kernels="all", out=tmp_path / "out")


OPERATION = OperationPlan(type="s8s8", scale=0.01)


def planned(folder: Path, operations: dict[str, OperationPlan], rest: Any = "fp32") -> Path:
    plan = Plan(
        target="eager", architecture="test_convnext", weights_sha256="0" * 64, input="float32", image_size=(64, 64),
        rest=rest, operations=operations,
        calibration=CalibrationRecord(data="random", data_sha256="0" * 64, images=2, random=True, method="mse"),
    )  # fmt: skip
    write(folder / "plan.json", plan, {})
    return folder / "plan.json"


def test_formats_that_can_run_kernels_import_none_before_one_is_asked_for() -> None:
    """The import looks for triton, which PyTorch's builds for the CPU warn that they lack."""
    code = """
import sys, convnext_deploy.runtimes.torch_weights, convnext_deploy.runtimes.torch_compiled
print([name for name in sys.modules if name == "triton" or name.startswith("convnext_deploy.kernels")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class PretendedGraph:
    """Of CUDA, without one: a replay computes from the tensor that was captured, into those that were given out."""

    captures = 0
    session: Any = None

    def replay(self) -> None:
        with torch.inference_mode():
            (kept,) = self.session._outputs
            kept.copy_(self.session._call(self.session._images))


def test_a_replayed_session_reads_each_new_batch(
    artifact_of: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    session = api.load(artifact_of("eager").path)
    plain = api.load(artifact_of("eager").path)
    session.options = RunOptions(cuda_graph=True)  # on the CPU, where it is refused otherwise
    monkeypatch.setattr(PretendedGraph, "session", session)

    @contextlib.contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        PretendedGraph.captures += 1
        yield

    for name, stand_in in {
        "Stream": mock.MagicMock, "current_stream": mock.MagicMock, "stream": mock.MagicMock(), "graph": graph,
        "CUDAGraph": PretendedGraph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    generator = np.random.default_rng(0)
    for batch in (2, 2, 3, 3):
        images = generator.normal(size=(batch, 3, 64, 64)).astype(np.float32)
        expected = plain.run(images)[0]
        for _ in range(2):
            np.testing.assert_allclose(session.run(images)[0], expected, rtol=1e-5, atol=1e-5)
    assert PretendedGraph.captures == 2  # one for each shape


def test_a_graph_is_replayed_on_a_gpu_only(artifact_of: Callable[..., Artifact]) -> None:
    with pytest.raises(
        UsageError, match="format eager replays no CUDA graph on cpu; aotinductor, eager, tensorrt, tensorrt_rtx do"
    ):
        api.load(artifact_of("eager").path, cuda_graph=True)


# Refusals and choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format onnx cannot run the fused kernels; these can: aotinductor, eager"),
        ({"format": "eager"}, "--kernels all is for NVIDIA GPUs, not for cpu; use --device cuda"),
    ],
)
def test_kernels_are_refused_in_one_line(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        api.export(str(checkpoint), kernels="all", out=tmp_path / "out", **options)
    assert str(error.value) == message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_are_refused_without_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="PyTorch finds no NVIDIA GPU here"):
        api.export(str(checkpoint), format="eager", device="cuda", kernels="all", out=tmp_path / "out")


def measurement(**fields: Any) -> KernelMeasurement:
    return KernelMeasurement(
        **{"part": "stages", "channels": 24, "precision": "fp16", "batch": 32, "speedup": 1.2, **fields}
    )


def test_kernels_are_chosen_where_the_nearest_batch_was_faster() -> None:
    rows = [
        measurement(),
        measurement(batch=1, speedup=0.8),
        measurement(part="stem"),
        measurement(part="downsamples", channels=32, speedup=0.9),
        measurement(part="head", channels=64, precision="fp32"),
    ]
    found = {batch: choice.faster(spec("test_convnext"), "fp16", batch, ALL, rows) for batch in (1, 8, 20, 256)}
    assert found == {1: ("stem",), 8: ("stem",), 20: ("stem", "stages.0"), 256: ("stem", "stages.0")}


def test_of_two_ways_to_run_a_stage_the_faster_is_chosen() -> None:
    rows = [
        measurement(),
        measurement(part="mlp", speedup=1.5),
        measurement(channels=32, speedup=1.4),
        measurement(part="mlp", channels=32, speedup=1.3),
        measurement(channels=48, speedup=0.9),
        measurement(part="mlp", channels=48, speedup=1.1),
        measurement(part="mlp", channels=64, speedup=1.0),  # no faster than compiled PyTorch
    ]
    possible = (*ALL, *alternatives(folded("test_convnext")))
    assert choice.faster(spec("test_convnext"), "fp16", 32, possible, rows) == (
        "stages.0.mlp", "stages.1", "stages.2.mlp",
    )  # fmt: skip


def test_measured_kernels_may_be_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "nvidia_gpu_facts", lambda: [{"name": "a GPU"}])
    monkeypatch.setattr(choice, "table", lambda: {"a GPU": [measurement(), measurement(part="mlp", speedup=1.5)]})
    export = msgspec.structs.replace(artifact_spec(), precision="fp16")
    said: list[str] = []
    assert choice.chosen(folded("test_convnext"), export, "measured", said.append) == ("stages.0.mlp",)
    assert said == ["kernels: measured faster on a GPU at batch 8: stages.0.mlp"]


def test_a_gpu_that_nobody_measured_runs_no_kernel_and_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "nvidia_gpu_facts", lambda: [{"name": "NVIDIA Unknown"}])
    said: list[str] = []
    export = msgspec.structs.replace(artifact_spec(), precision="fp16")
    assert choice.chosen(folded("test_convnext"), export, "measured", said.append) == ()
    assert said == ["kernels: none was measured on NVIDIA Unknown, so none is used; --kernels all uses every one"]
    model = folded("test_convnext")
    narrow = tuple(f"{name}.mlp" if name.startswith("stages") else name for name in ALL)
    assert choice.chosen(model, export, "all", said.append) == narrow
    alone = msgspec.structs.replace(export, batch=BatchRange(min=1, opt=1, max=1))
    assert choice.chosen(model, alone, "all", said.append) == ALL


def artifact_spec() -> Any:
    from convnext_deploy.records.manifest import ExportSpec

    return ExportSpec(format="eager", device="cuda")


def test_the_committed_table_can_be_read() -> None:
    assert isinstance(choice.table(), dict)
