"""From a plan to what a runtime computes in 8 bits. References: float64, ONNX's own evaluator, ONNX Runtime on the
standard operators; the simulation is held against them.
"""

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.reference
import onnx_nodes
import pytest
import torch
from onnx_products import needs_exact_products
from torch import nn

from convnext_deploy import api, formats
from convnext_deploy.artifact import verify
from convnext_deploy.artifact.session import run_in_batches
from convnext_deploy.data import preprocess, sources
from convnext_deploy.errors import ParityError, PassError, PrecisionError, UsageError
from convnext_deploy.graph import onnx_fuse, onnx_read, onnx_write
from convnext_deploy.graph.capture import DeployGraph
from convnext_deploy.graph.channels_first import ChannelsFirst
from convnext_deploy.models import passes, registry
from convnext_deploy.models.checkpoint import load
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.parameters import random_model
from convnext_deploy.quantization import apply as applying
from convnext_deploy.quantization import operators
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.calibrate import Calibration, calibrate
from convnext_deploy.quantization.distance import outputs, pixels_of
from convnext_deploy.quantization.plan import LoadedPlan
from convnext_deploy.records.accuracy import EvalResult
from convnext_deploy.records.manifest import BatchRange, ExportSpec
from convnext_deploy.records.plan import OperationPlan, Plan

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "fashion-mnist"
WEIGHTS, IMAGES = EXAMPLE / "model.safetensors", EXAMPLE / "test-2000.parquet"
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "image_size": (64, 64), "num_classes": 7}


@pytest.fixture(scope="module")
def folded() -> tuple[ConvNeXt, str]:
    """The bundled model, folded, and the hash of its weights."""
    loaded = load(str(WEIGHTS))
    example = torch.zeros(2, 1, 64, 64)
    passes.fold(loaded.model, None, lambda m: (m(example),))
    return loaded.model, loaded.weights.tensors_sha256


@pytest.fixture(scope="module")
def calibration(folded: tuple[ConvNeXt, str]) -> Calibration:
    facts = load(str(WEIGHTS)).preprocessing
    paths = tuple(plans.products(folded[0]).values())
    return calibrate(folded[0], paths, sources.open_source(str(IMAGES)), preprocessing=facts, images=64, batch=16)


DRAFTS: dict[str, Plan] = {}  # each takes half a second


def drafted(folded: tuple[ConvNeXt, str], calibration: Calibration, target: Any = "onnx", **options: Any) -> Plan:
    key = repr((target, sorted(options.items())))
    if key not in DRAFTS:
        DRAFTS[key] = _draft(folded, calibration, target, **options)
    return DRAFTS[key]


def _draft(folded: tuple[ConvNeXt, str], calibration: Calibration, target: Any, **options: Any) -> Plan:
    model, sha256 = folded
    how = formats.eight_bits_of(target)
    settings: dict[str, Any] = {"method": "mse", "input": "float32", "rest": "fp32", "type": how.int8}
    names = options.pop("names", tuple(plans.products(model)))
    return plans.draft(
        model, calibration, names, target=target, eight_bits=how, weights_sha256=sha256, **(settings | options)
    )  # fmt: skip


def simulated(folded: tuple[ConvNeXt, str], plan: Plan, **tensors: torch.Tensor) -> ConvNeXt:
    model = copy.deepcopy(folded[0])
    applying.apply(model, LoadedPlan(plan, tensors, eight_bits=formats.eight_bits_of(plan.target)))
    return model


def pictures(count: int = 8) -> torch.Tensor:
    rough = np.random.default_rng(2).standard_normal((count, 1, 16, 16)).astype(np.float32)
    return torch.from_numpy(rough.repeat(4, 2).repeat(4, 3))


# The operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8])
def test_quantizing_and_back_is_what_onnx_says(kind: torch.dtype) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0, :4] = torch.tensor([0.05, 0.15, -0.05, 1e3])  # ties, and far outside
    scale, zero = torch.tensor(0.1), torch.tensor(7, dtype=kind)
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    back = onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    value = onnx.helper.make_tensor_value_info
    elem = onnx.helper.np_dtype_to_tensor_dtype(zero.numpy().dtype)
    graph = onnx.helper.make_graph(
        [node, back], "g", [value("x", 1, None), value("s", 1, None), value("z", elem, None)],
        [value("q", elem, None), value("y", 1, None)],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    q, y = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy(), "s": scale.numpy(), "z": zero.numpy()})
    codes = operators.quantize(x, scale, zero)
    np.testing.assert_array_equal(codes.numpy(), q)
    np.testing.assert_array_equal(operators.dequantize(codes, scale, zero, 0).numpy(), y)


def test_the_operators_keep_pytorchs_contract() -> None:
    scale, zero = torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.convnext_deploy.quantize.default, (torch.randn(2, 4), scale, zero))
    codes = torch.randint(0, 255, (2, 4), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.convnext_deploy.dequantize.default, (codes, scale, zero, 0))


def test_fp8_saturates_instead_of_becoming_nan() -> None:
    zero = torch.zeros(()).to(torch.float8_e4m3fn)
    codes = operators.quantize(torch.tensor([1e6, -1e6, 3.3]), torch.tensor(1.0), zero)
    np.testing.assert_array_equal(codes.float().numpy(), [448.0, -448.0, 3.25])


# The plan ------------------------------------------------------------------------------------------------------------


def test_every_product_but_the_depthwise_ones_can_be_planned() -> None:
    for name in registry.VARIANTS:
        with torch.device("meta"):
            model = ConvNeXt(registry.spec(name))
        paths = plans.products(model)
        found = {
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        }
        left_out = {path for path in found if path.startswith("stem") and model.spec.stem != "patch"}
        left_out |= {"head.hidden"} & found
        assert set(paths.values()) == found - left_out
        assert set(paths) <= set(plans.operations(model))


def test_a_plan_survives_its_file(folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path: Path) -> None:
    plan = drafted(folded, calibration)
    tensors = {"bias/head": torch.arange(10.0)}
    written = plans.write(tmp_path / "plan.json", plan, tensors)
    read = plans.read(tmp_path / "plan.json")
    assert read.plan == written
    assert written.tensors_sha256 is not None
    torch.testing.assert_close(read.tensors["bias/head"], tensors["bias/head"])
    assert json.loads((tmp_path / "plan.json").read_text())["operations"]["head"]["type"] == "u8s8"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["operations"]["head"].update(scal=1.0), "scal"),
        (lambda d: d["operations"]["head"].update(scale=-1.0), "scale"),
        (lambda d: d["operations"]["head"].update(scale=None), "head has type u8s8 and scale None"),
        (lambda d: d.update(calibration=None), "names no calibration"),
        (lambda d: d.update(tensors_sha256="0" * 64), "plan.safetensors is missing"),
    ],
)
def test_a_plan_with_a_mistake_is_refused_in_one_line(
    damage: Any, message: str, folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plans.write(path, drafted(folded, calibration), {})
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=message) as caught:
        plans.read(path)
    assert "\n" not in str(caught.value)


def test_a_plan_for_a_format_that_does_not_exist_is_refused_before_any_work(
    folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path: Path
) -> None:
    plans.write(tmp_path / "plan.json", msgspec.structs.replace(drafted(folded, calibration), target="coreml"), {})
    with pytest.raises(UsageError, match="unknown format 'coreml'"):
        api.export("absent.safetensors", plan=tmp_path / "plan.json", out=tmp_path / "out")


def test_tensors_of_another_plan_are_refused(
    folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path: Path
) -> None:
    plans.write(tmp_path / "plan.json", drafted(folded, calibration), {"bias/head": torch.zeros(10)})
    plans.write(tmp_path / "other.json", drafted(folded, calibration), {"bias/head": torch.ones(10)})
    (tmp_path / "other.safetensors").replace(tmp_path / "plan.safetensors")
    with pytest.raises(UsageError, match=r"is not the file that plan\.json was written with"):
        plans.read(tmp_path / "plan.json")


# The module ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "tensorrt_rtx"])  # matrix products; convolutions
def test_a_quantized_convolution_equals_float64_on_the_codes_it_is_given(
    target: Any, folded: tuple[ConvNeXt, str], calibration: Calibration
) -> None:
    plan = drafted(folded, calibration, target, names=("downsamples.1",))
    conv: Any = folded[0].get_submodule("downsamples.1.conv")
    changed = simulated(folded, plan).get_submodule("downsamples.1.conv")
    x = torch.randn(2, 48, 8, 8, generator=torch.Generator().manual_seed(1))
    operation = plan.operations["downsamples.1"]
    low, high = (0, 255) if operation.type == "u8s8" else (-128, 127)
    assert operation.scale is not None
    assert operation.zero_point is not None
    codes = (x.double() / operation.scale).round().add(operation.zero_point).clamp(low, high)
    exact = (codes - operation.zero_point) * operation.scale
    weight = conv.weight.double()
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = nn.functional.conv2d(exact, (weight / scale).round() * scale, conv.bias.double(), stride=2)
    found = changed(x)
    # A value within float32's rounding of the middle between two codes may fall to the other side.
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


def test_balancing_is_exact_before_rounding(folded: tuple[ConvNeXt, str]) -> None:
    model = copy.deepcopy(folded[0]).double()
    x = pictures().double()
    before = model(x)
    generator = torch.Generator().manual_seed(3)
    for name in ("stages.0.0.expand", "stages.3.1.expand", "downsamples.2"):
        channels = applying.norm_before(model, name).channels
        applying.rebalance(model, name, torch.rand(channels, generator=generator) * 9 + 0.1)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["stages.0.0.project", "stem", "head"])
def test_what_follows_no_norm_cannot_be_balanced(name: str, folded: tuple[ConvNeXt, str]) -> None:
    """Scaling across GELU would change what is computed: GELU(a x) is not a GELU(x)."""
    x = torch.linspace(-3, 3, 7)
    assert not torch.allclose(nn.functional.gelu(2 * x), 2 * nn.functional.gelu(x), atol=0.01)
    with pytest.raises(UsageError, match="does not follow a norm"):
        applying.norm_before(folded[0], name)


def test_a_shift_into_the_bias_is_exact_but_for_rounding(
    folded: tuple[ConvNeXt, str], calibration: Calibration
) -> None:
    name = "stages.2.0.project"
    plan = drafted(folded, calibration, "tensorrt_rtx", names=(name,))
    fine = msgspec.structs.replace(plan.operations[name], scale=1e-3, shift=0.05)  # clips nothing below 0.177
    shifted = msgspec.structs.replace(plan, operations={name: fine})
    changed = simulated(folded, shifted).get_submodule(f"{name}.linear")
    linear: Any = folded[0].get_submodule(f"{name}.linear")
    x = torch.rand(64, linear.in_features, generator=torch.Generator().manual_seed(4)) * 0.2 - 0.05
    assert ((changed(x) - linear(x)).norm() / linear(x).norm()).item() < 0.02


def test_gelus_tanh_form_is_used_only_where_the_quantizer_cannot_tell(
    folded: tuple[ConvNeXt, str], calibration: Calibration
) -> None:
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    worst = (nn.functional.gelu(x) - nn.functional.gelu(x, approximate="tanh")).abs().max().item()
    assert worst < applying.GELU_TANH_ERROR < 1.1 * worst
    plan = drafted(folded, calibration)
    name = "stages.1.0.project"
    for scale, activation in ((16.1 * worst * 1.1, "gelu_tanh"), (15 * worst, "gelu")):
        operations = {name: msgspec.structs.replace(plan.operations[name], scale=scale)}
        changed = simulated(folded, msgspec.structs.replace(plan, operations=operations))
        assert getattr(changed.get_submodule("stages.1.0.expand"), "activation", None) == activation


def test_a_plan_of_other_weights_or_pixels_is_refused(folded: tuple[ConvNeXt, str], calibration: Calibration) -> None:
    plan = drafted(folded, calibration)
    applying.check(LoadedPlan(plan, {}), folded[0], folded[1], "float32")
    with pytest.raises(UsageError, match="made for other weights"):
        applying.check(LoadedPlan(plan, {}), folded[0], "0" * 64, "float32")
    with pytest.raises(UsageError, match="input float32, not uint8"):
        applying.check(LoadedPlan(plan, {}), folded[0], folded[1], "uint8")
    other = msgspec.structs.replace(plan, image_size=(96, 96))
    with pytest.raises(UsageError, match="96x96 pixels, not at 64x64"):
        applying.check(LoadedPlan(other, {}), folded[0], folded[1], "float32")


def test_an_operation_that_no_model_has_is_named(folded: tuple[ConvNeXt, str], calibration: Calibration) -> None:
    plan = drafted(folded, calibration)
    wrong = msgspec.structs.replace(plan, operations={"stages.9.0.expand": OperationPlan(type="u8s8", scale=1.0)})
    with pytest.raises(UsageError, match=r"stages\.9\.0\.expand"):
        simulated(folded, wrong)


def test_scales_too_small_for_half_precision_are_held_where_it_can(
    folded: tuple[ConvNeXt, str], calibration: Calibration
) -> None:
    """A channel with a tiny layer scale has weights below fp16's normal range."""
    scales = torch.tensor([1e-9, 1e-3, 0.3])
    held = plans.representable(scales, formats.eight_bits_of("tensorrt"), "fp16")
    assert held[0] == torch.finfo(torch.float16).smallest_normal
    assert torch.equal(held.half().float(), held)
    assert torch.equal(
        plans.representable(scales, formats.eight_bits_of("openvino"), "bf16"), scales
    )  # its graph is fp32
    model = simulated(folded, drafted(folded, calibration, names=("head",)))
    model.get_buffer("head.classifier.weight_scale")[0] = 1e-9
    with pytest.raises(PassError, match=r"head\.classifier\.weight_scale reaches down to 1e-09"):
        passes.cast_parameters(model, "fp16")


# What the runtimes get -----------------------------------------------------------------------------------------------


def graph_of(model: ConvNeXt) -> DeployGraph:
    spec = ExportSpec(format="onnx", batch=BatchRange(min=1, opt=2, max=4))
    return DeployGraph(module=model, export=spec, example=pictures(2))


@pytest.fixture(scope="module")
def fused(
    folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, int]:
    """The same plan as standard operators and as ONNX Runtime's, and how many operations it has."""
    folder, plan = tmp_path_factory.mktemp("fused"), drafted(folded, calibration)
    graph = graph_of(simulated(folded, plan))
    onnx_write.save_onnx(graph, folder / "standard.onnx")
    onnx_write.save_onnx(graph, folder / "fused.onnx", finish=onnx_fuse.fuse_products)
    return folder / "standard.onnx", folder / "fused.onnx", len(plan.operations)


def run(path: Path, images: torch.Tensor, **settings: Any) -> np.ndarray[Any, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {"images": images.numpy()})[0]
    return found


@needs_exact_products
def test_fused_products_compute_what_the_standard_operators_do(fused: tuple[Path, Path, int]) -> None:
    import onnxruntime as ort

    x = pictures(4)
    plain = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    standard = run(fused[0], x, graph_optimization_level=plain)  # operator by operator, in floats
    error = np.linalg.norm(run(fused[1], x) - standard) / np.linalg.norm(standard)
    assert error < 5e-3  # steps of the 8-bit grids that fell to the other side


def test_every_planned_product_becomes_one_node(fused: tuple[Path, Path, int]) -> None:
    before, after = onnx_nodes.operators(fused[0]), onnx_nodes.operators(fused[1])
    assert before["DequantizeLinear"] == 2 * fused[2]
    assert after["MatMulIntegerToFloat"] == after["QuantizeLinear"] == fused[2]
    assert "DequantizeLinear" not in after
    assert "MatMul" not in after
    nodes = [n for n in onnx.load(str(fused[1])).graph.node if n.op_type == "MatMulIntegerToFloat"]
    assert all(len(node.input) == 7 and node.input[6] for node in nodes)  # with its bias
    for node in (n for n in onnx.load(str(fused[1])).graph.node if n.op_type == "Reshape"):
        for shape in (t for t in onnx.load(str(fused[1])).graph.initializer if t.name == node.input[1]):
            assert onnx.numpy_helper.to_array(shape)[0] == 0  # copies the batch, as a shape that is computed does


def test_shares_are_read_from_both_spellings(fused: tuple[Path, Path, int]) -> None:
    shape = (2, 1, 64, 64)
    standard, ours = (onnx_read.precision_of_onnx(path, shape) for path in fused[:2])
    assert standard.keys() == ours.keys() == {"int8", "fp32"}
    assert standard["int8"] == pytest.approx(ours["int8"])
    assert 0.9 < ours["int8"] < 0.99  # all but the depthwise convolutions


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grn": True, "layer_scale": False},
        {"stem": "overlap_act", "norm": "rmsnorm"},
        {"norm": "simplenorm", "head": "norm_pool"},
        {"task": "features"},
        {"task": "embed"},
    ],
    ids=["v1", "v2", "overlap-rms", "simple-norm-pool", "features", "embed"],
)
def test_channels_first_computes_the_same_in_float64(changes: dict[str, Any]) -> None:
    spec = msgspec.structs.replace(registry.spec("convnext_atto"), **(SMALL | changes))
    model = random_model(spec, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 64, 96, generator=generator, dtype=torch.float64)
    expected, found = model(x), ChannelsFirst(model)(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def float_top1(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Of the bundled model, which is the same in every format's fp32 (tests/test_demo.py)."""
    artifact = api.export(str(WEIGHTS), format="eager", out=tmp_path_factory.mktemp("float") / "model")
    found = api.evaluate(artifact.path, str(IMAGES), limit=500)
    assert isinstance(found, EvalResult)
    return found.top1


@pytest.mark.parametrize("target", [pytest.param("onnx", marks=needs_exact_products), "openvino", "native"])
def test_an_artifact_runs_every_planned_product_in_8_bits(
    target: Any, folded: tuple[ConvNeXt, str], calibration: Calibration, float_top1: float, tmp_path: Path
) -> None:
    plan = drafted(folded, calibration, target)
    plans.write(tmp_path / "plan.json", plan, {})
    artifact = api.export(str(WEIGHTS), format=target, plan=tmp_path / "plan.json", out=tmp_path / "model")
    found = artifact.manifest
    assert found.precision.quantized == len(plan.operations)
    assert found.export.quantization is not None
    assert found.export.quantization.operations == {"u8s8": len(plan.operations)}
    assert {parity.reference for parity in found.parity} == {"source", "simulation"}
    facts, source = artifact.manifest.preprocessing, sources.subset(sources.open_source(str(IMAGES)), 1000)
    pixels = pixels_of(source, facts, folded[0])
    (expected,) = outputs(simulated(folded, plan), pixels, facts)
    (logits,) = run_in_batches(api.load(artifact.path), preprocess.as_input(pixels, facts, "float32"), 4)
    assert (logits.argmax(1) == expected.argmax(1).numpy()).mean() >= 0.998  # 99.9 to 99.95 % of all 2,000
    result = api.evaluate(artifact.path, str(IMAGES), limit=500)
    assert isinstance(result, EvalResult)
    assert abs(result.top1 - float_top1) <= 0.006


@pytest.mark.parametrize(
    ("target", "size", "dynamic"),
    [
        # Every stride leaves rows and columns over. Of any size: verified at 32x32 and 191x255 too.
        ("native", (45, 67), False), pytest.param("onnx", (45, 67), True, marks=needs_exact_products),
        pytest.param("onnx", (45, 67), False, marks=[pytest.mark.slow, needs_exact_products]),
        pytest.param("openvino", (64, 64), True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_8_bits_at_sizes_that_no_stride_divides_compute_their_simulation(
    target: Any, size: tuple[int, int], dynamic: bool, folded: tuple[ConvNeXt, str], calibration: Calibration,
    tmp_path: Path,
) -> None:  # fmt: skip
    plan = msgspec.structs.replace(drafted(folded, calibration, target), image_size=size)
    artifact = api.export(
        str(WEIGHTS), format=target, plan=LoadedPlan(plan, {}), out=tmp_path / "model", batch=2, image_size=size,
        dynamic_image_size=dynamic,
    )  # fmt: skip
    assert artifact.manifest.precision.quantized == len(plan.operations)
    assert all(parity.failures == () for parity in artifact.manifest.parity)


@needs_exact_products
def test_int8_from_raw_pixels_has_no_rounding_before_the_stem(
    folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path: Path
) -> None:
    loaded = load(str(WEIGHTS))
    for fold in (passes.fold_norm_affine, passes.fold_layer_scale):
        fold(loaded.model)
    passes.fold_preprocessing(loaded.model, loaded.preprocessing)
    plan = _draft((loaded.model, folded[1]), calibration, "onnx", input="uint8")
    assert plan.operations["stem"] == OperationPlan(type="u8s8", scale=1.0, zero_point=0)
    plans.write(tmp_path / "plan.json", plan, {})
    artifact = api.export(
        str(WEIGHTS), format="onnx", input="uint8", plan=tmp_path / "plan.json", out=tmp_path / "model"
    )
    assert artifact.manifest.precision.quantized == len(plan.operations)


def test_a_plan_for_another_format_or_precision_is_refused(
    folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plans.write(path, drafted(folded, calibration), {})
    with pytest.raises(UsageError, match="the plan is for onnx, not for openvino"):
        api.export(str(WEIGHTS), format="openvino", plan=path, out=tmp_path / "model")
    with pytest.raises(UsageError, match="--precision bf16, but the plan leaves the rest in fp32"):
        api.export(str(WEIGHTS), format="onnx", precision="bf16", plan=path, out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Checks that have to fail --------------------------------------------------------------------------------------------


@needs_exact_products
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda linear: linear.weight_scale.mul_(1.1), id="weight scale"),
        # The same check. Its reading of the file finds these as well: tests/artifact/test_readback.py.
        pytest.param(
            lambda linear: linear.weight.copy_(linear.weight.roll(1, 1)), id="channels", marks=pytest.mark.slow
        ),
        pytest.param(lambda linear: linear.bias.data.add_(0.1), id="bias", marks=pytest.mark.slow),
    ],
)
def test_an_artifact_that_differs_from_its_simulation_is_refused(
    spoil: Any,
    folded: tuple[ConvNeXt, str],
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from convnext_deploy.graph import onnx_write as graph

    right = graph.onnx_from_graph

    def spoilt(given: DeployGraph) -> Any:
        for name in ("stages.2.0.expand.linear", "stages.2.1.expand.linear"):
            spoil(given.module.get_submodule(name))
        return right(given)

    monkeypatch.setattr(graph, "onnx_from_graph", spoilt)
    path = tmp_path / "plan.json"
    names = tuple(name for name in plans.products(folded[0]) if plans.kind_of(name) in ("expand", "project"))
    plans.write(path, drafted(folded, calibration, names=names), {})
    with pytest.raises(ParityError, match="from the simulation"):
        api.export(str(WEIGHTS), format="onnx", plan=path, out=tmp_path / "model")


@needs_exact_products
def test_products_that_stayed_in_floats_are_refused(
    folded: tuple[ConvNeXt, str], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime does with the Q/DQ graph of a fixed batch: it fuses a float Gemm and keeps DequantizeLinear."""
    monkeypatch.setattr(onnx_fuse, "fuse_products", None)
    path = tmp_path / "plan.json"
    plans.write(path, drafted(folded, calibration), {})
    with pytest.raises(PrecisionError, match=r"products run in 8 bits where the plan has"):
        api.export(
            str(WEIGHTS), format="onnx", plan=path, batch=BatchRange(min=4, opt=4, max=4), out=tmp_path / "model"
        )
    assert not (tmp_path / "model").exists()


def test_a_quantized_output_far_from_its_source_is_no_approximation() -> None:
    expected = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    tiers = verify.compare((expected * 1.6,), (expected,), verify.QUANTIZED, "probe", classify=True)
    assert "relative error 0.6" in tiers.failures[0]
