"""Half precision: the analysis beside numpy's float16, and checkpoints that are made to overflow beside their source.

The checkpoints are re-parametrizations of the bundled model that leave its function as it is:

    scaled    a stage's residual stream times a power of two: what writes it is multiplied, the depthwise convolutions
              that read it are divided, and the norm behind the stage does not see it
    shifted   a constant added to all channels by a stage's last block: the norm behind the stage takes it away
"""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convnext_deploy import api
from convnext_deploy.artifact import deviation
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.verify import precision_failures
from convnext_deploy.data import preprocess, sources
from convnext_deploy.errors import CheckFailed, DataError, ParityError, UsageError
from convnext_deploy.models import checkpoint, parameters, passes
from convnext_deploy.models.convnext import ConvNeXt, Grn
from convnext_deploy.models.costs import multiply_accumulates
from convnext_deploy.quantization.half import BAR, MARGIN, analyse, bar, decide, half_plan, kept
from convnext_deploy.quantization.images import random_images
from convnext_deploy.quantization.plan import LoadedPlan, operations
from convnext_deploy.records.manifest import ModelSpec, PrecisionTruth, Preprocessing
from convnext_deploy.records.plan import (
    HalfPrecision,
    HalfReport,
    HalfTensor,
    OperationPlan,
    Plan,
    QuantizationRecord,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist"
MODEL = EXAMPLE / "model.safetensors"
IMAGES = 16
U = 2.0**-11  # one rounding to fp16
LARGEST = 65504.0
GREY = Preprocessing(mean=(0.5,), std=(0.25,))
SMALL = ModelSpec(
    architecture="custom", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=10, in_chans=1, image_size=(64, 64)
)
V2 = msgspec.structs.replace(SMALL, grn=True, layer_scale=False)


@pytest.fixture(scope="module")
def source() -> sources.ImageSource:
    return sources.open_source(str(EXAMPLE / "test-2000.parquet"))


@pytest.fixture(scope="module")
def pixels(source: sources.ImageSource) -> NDArray[np.uint8]:
    """The images that are analysed, (N, C, H, W)."""
    loaded = checkpoint.load(str(MODEL))
    to_pixels = preprocess.transform(loaded.preprocessing, loaded.model.spec.image_size, 1)
    return np.stack([to_pixels(source.read(index)) for index in range(0, 2000, 2000 // IMAGES)])


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[dict[str, Tensor]], object]], Path]:
    """The bundled checkpoint with some of its tensors changed, as a file."""

    def write(change: Callable[[dict[str, Tensor]], object]) -> Path:
        with safe_open(MODEL, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata()
        change(tensors)
        path = tmp_path_factory.mktemp("changed") / "model.safetensors"
        save_file(tensors, path, facts)
        return path

    return write


def scaled(stage: int, factor: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        prefix = f"stages.{stage}."
        for name in tensors:
            if name.startswith(f"{prefix}downsample.1.") or (name.startswith(prefix) and name.endswith("gamma")):
                tensors[name] = tensors[name] * factor
            elif name.startswith(prefix) and name.endswith("conv_dw.weight"):
                tensors[name] = tensors[name] / factor

    return change


def shifted(stage: int, block: int, by: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        prefix = f"stages.{stage}.blocks.{block}"
        tensors[f"{prefix}.mlp.fc2.bias"] = tensors[f"{prefix}.mlp.fc2.bias"] + by / tensors[f"{prefix}.gamma"]

    return change


def folded(model: ConvNeXt) -> ConvNeXt:
    passes.fold_norm_affine(model)
    if model.spec.layer_scale:
        passes.fold_layer_scale(model)
    if model.spec.grn:
        passes.fold_grn_bias(model)
    return model


def report_of(path: Path, source: sources.ImageSource, precision: HalfPrecision = "fp16") -> HalfReport:
    loaded = checkpoint.load(str(path))
    return analyse(folded(loaded.model), source, preprocessing=loaded.preprocessing, images=IMAGES, precision=precision)


def plan_of(path: Path, source: sources.ImageSource, rest: HalfPrecision = "fp16") -> Plan:
    loaded = checkpoint.load(str(path))
    plan, _ = half_plan(
        folded(loaded.model), source, preprocessing=loaded.preprocessing, images=IMAGES, rest=rest,
        weights_sha256=loaded.weights.tensors_sha256,
    )  # fmt: skip
    return plan


def noise_report(model: ConvNeXt, images: int = 4) -> HalfReport:
    return analyse(model, random_images(images, model.spec.image_size), preprocessing=GREY, images=images, batch=images)


def noise(images: int = 4) -> Tensor:
    return torch.rand((images, 1, 64, 64), generator=torch.Generator().manual_seed(0)) * 4 - 2


def tensor_of(report: HalfReport, name: str) -> HalfTensor:
    (found,) = (t for operation in report.operations for t in operation.tensors if t.name == name)
    return found


def half(x: NDArray[np.floating]) -> NDArray[np.float64]:
    return x.astype(np.float16).astype(np.float64)


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(source: sources.ImageSource, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    """ "<module> in" and "<module> out" of the bundled model on the analysed images, by torch's hooks on one batch."""
    loaded = checkpoint.load(str(MODEL))
    model = folded(loaded.model)
    found: dict[str, NDArray[np.float64]] = {}

    def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def observe(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[f"{name} in"], found[f"{name} out"] = inputs[0].double().numpy(), output.double().numpy()

        return observe

    for name, module in model.named_modules():
        module.register_forward_hook(observer(name))
        for parameter, value in module.named_parameters(recurse=False):
            found[f"{name}.{parameter}"] = value.double().numpy()
    with torch.no_grad():
        model(torch.from_numpy(preprocess.as_input(pixels, loaded.preprocessing, "float32")))
    return found


@pytest.fixture(scope="module")
def healthy(source: sources.ImageSource) -> HalfReport:
    return report_of(MODEL, source)


def test_magnitudes_and_lost_values_are_those_of_numpy(
    healthy: HalfReport, seen: dict[str, NDArray[np.float64]]
) -> None:
    for name, key in (
        ("stem.convs.0 input", "stem.convs.0 in"),
        ("stages.2.1.dwconv_norm.conv output", "stages.2.1.dwconv_norm.conv out"),
        ("stages.1.0.expand output", "stages.1.0.expand out"),
        ("stages.0.0.project.linear.weight", "stages.0.0.project.linear.weight"),
        ("stages.3.1.project output", "stages.3.1.project out"),
    ):
        found, values = tensor_of(healthy, name), seen[key]
        assert found.largest == pytest.approx(np.abs(values).max(), rel=1e-5)
        assert found.headroom == pytest.approx(LARGEST / np.abs(values).max(), rel=1e-5)
        assert found.lost == pytest.approx(np.mean((values != 0) & (half(values) == 0)), abs=2 / values.size)


def test_rounding_is_what_numpys_float16_does_to_each_product(
    healthy: HalfReport, seen: dict[str, NDArray[np.float64]]
) -> None:
    def product(path: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(error of the rounded product, the product)."""
        x, weight, bias = seen[f"{path} in"], seen[f"{path}.weight"], seen[f"{path}.bias"]
        exact = x @ weight.T + bias
        return half(half(x) @ half(weight).T + half(bias)) - exact, exact

    def centred(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x - x.mean(-1, keepdims=True)

    error, exact = product("stages.1.0.expand.linear")
    expected = np.linalg.norm(error) / np.linalg.norm(exact)
    assert tensor_of(healthy, "stages.1.0.expand.linear output").rounding == pytest.approx(expected, rel=1e-2)

    error, _ = product("stages.2.3.project.linear")
    stream = seen["stages.2.3.project out"]
    expected = np.linalg.norm(error) / np.linalg.norm(centred(stream))
    assert tensor_of(healthy, "stages.2.3.project.linear output").rounding == pytest.approx(expected, rel=1e-2)

    expected = np.linalg.norm(half(stream) - stream) / np.linalg.norm(centred(stream))
    assert tensor_of(healthy, "stages.2.3.project output").rounding == pytest.approx(expected, rel=1e-2)

    path = "stages.3.0.dwconv_norm.conv"  # by hand: 7x7 windows of the padded map (N, C, H, W)
    x, weight, bias = (half(seen[f"{path}{end}"]) for end in (" in", ".weight", ".bias"))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (3, 3), (3, 3))), (7, 7), (2, 3))
    rounded = half(np.einsum("nchwij,cij->nchw", windows, weight[:, 0]) + bias[:, None, None])
    exact = seen[f"{path} out"]
    expected = np.linalg.norm(rounded - exact) / np.linalg.norm(centred(np.moveaxis(exact, 1, -1)))
    assert tensor_of(healthy, f"{path} output").rounding == pytest.approx(expected, rel=1e-2)


def test_grns_input_factor_and_output_are_those_of_numpy() -> None:
    model = folded(parameters.random_model(V2))
    report = noise_report(model)
    taken: list[Tensor] = []
    handle = model.get_submodule("stages.2.1.grn").register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    noise_report(model)
    handle.remove()
    x, weight = taken[0].double().numpy(), model.get_parameter("stages.2.1.grn.weight").double().numpy()
    norm = np.sqrt((x**2).sum((1, 2), keepdims=True))
    factor = 1 + weight * norm / norm.mean(-1, keepdims=True)
    for what, expected in (("input", x), ("factor", factor), ("output", x * factor)):
        found = tensor_of(report, f"stages.2.1.grn {what}")
        assert found.largest == pytest.approx(np.abs(expected).max(), rel=1e-4)
    error = np.linalg.norm(half(half(x) * half(factor)) - x * factor) / np.linalg.norm(x * factor)
    assert tensor_of(report, "stages.2.1.grn output").rounding == pytest.approx(error, rel=1e-2)


def test_a_healthy_models_roundings_are_those_that_the_bar_is_derived_from(healthy: HalfReport) -> None:
    """Three roundings in a product, one in the stream: 0.7 u and 0.4 u."""
    for operation in healthy.operations:
        for tensor in operation.tensors:
            if tensor.rounding is not None:
                assert tensor.rounding < 1.0 * U, tensor.name
            if tensor.name.endswith("project output"):
                assert tensor.rounding == pytest.approx(0.42 * U, rel=0.1)
    assert bar("fp16") == BAR * U


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_healthy_model_keeps_nothing(source: sources.ImageSource, precision: HalfPrecision) -> None:
    found = report_of(MODEL, source, precision)
    assert kept(found) == ()
    assert found.kept_share == 0
    assert [operation.name for operation in found.operations] == list(operations(checkpoint.load(str(MODEL)).model))


def test_the_batch_changes_nothing(source: sources.ImageSource) -> None:
    loaded = checkpoint.load(str(MODEL))
    model = folded(loaded.model)
    one, other = (analyse(model, source, preprocessing=loaded.preprocessing, images=5, batch=batch) for batch in (1, 5))
    for a, b in zip(one.operations, other.operations, strict=True):
        for left, right in zip(a.tensors, b.tensors, strict=True):
            assert left.name == right.name
            assert left.largest == pytest.approx(right.largest, rel=1e-4)
            assert left.rounding == (right.rounding and pytest.approx(right.rounding, rel=2e-2))


def test_the_model_is_left_without_hooks_and_unchanged(source: sources.ImageSource) -> None:
    loaded = checkpoint.load(str(MODEL))
    model = folded(loaded.model)
    before = parameters.tensors_sha256(model.state_dict())
    analyse(model, source, preprocessing=loaded.preprocessing, images=1)
    assert not any(module._forward_hooks for module in model.modules())
    assert parameters.tensors_sha256(model.state_dict()) == before


def test_the_report_survives_its_json(healthy: HalfReport) -> None:
    assert msgspec.json.decode(msgspec.json.encode(healthy), type=HalfReport) == healthy


# What is decided ------------------------------------------------------------------------------------------------------


def tensor(name: str, largest: float = 1.0, rounding: float | None = None, margin: float = MARGIN) -> HalfTensor:
    return HalfTensor(
        name=name, largest=largest, headroom=LARGEST / largest, margin=margin, overflow=0.0, lost=0.0,
        rounding=rounding,
    )  # fmt: skip


def decided(largest: dict[str, float], model: ConvNeXt) -> set[str]:
    """The operations kept where the outputs (or, by full name, other tensors) named reach so far."""
    seen = {
        name: (
            *(tensor(key, value) for key, value in largest.items() if key.startswith(f"{name}.") or key == name),
            tensor(f"{name} output", largest.get(f"{name} output", 1.0)),
        )
        for name in operations(model)
    }
    return {operation.name for operation in decide(seen, "fp16") if operation.reasons}


TOO_LARGE = 1e5


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        (["stages.2.0.project", "stages.2.1.project"], {"stages.2.0.project"}),  # wide from there to the stage's end
        (["stages.2.1.project"], {"stages.2.1.project"}),
        (["stages.1.0.project", "stages.2.1.project"], {"stages.1.0.project", "stages.2.1.project"}),  # two streams
        (["downsamples.1", "stages.2.0.project", "stages.2.1.project"], {"downsamples.1"}),
        (["stem", "stages.0.0.project"], {"stem"}),
        (["stages.3.0.project"], {"stages.3.0.project"}),  # the head reads the stream in fp32
    ],
)
@pytest.mark.parametrize("spec", [SMALL, V2], ids=["V1", "V2"])
def test_a_stream_that_overflows_keeps_the_operation_that_writes_it_first(
    spec: ModelSpec, streams: list[str], expected: set[str]
) -> None:
    with torch.device("meta"):
        model = ConvNeXt(spec)
    assert decided({f"{name} output": TOO_LARGE for name in streams}, model) == expected


def test_every_operation_that_reads_too_large_values_is_kept() -> None:
    with torch.device("meta"):
        model = ConvNeXt(V2)
    names = {f"stages.2.0.{part}" for part in ("dwconv_norm", "expand", "grn", "project")}
    assert decided({f"{name}.anything": TOO_LARGE for name in names}, model) == names


def test_a_kept_project_makes_the_stream_wide_whatever_it_is_kept_for() -> None:
    with torch.device("meta"):
        model = ConvNeXt(SMALL)
    found = decided({"stages.2.0.project.linear input": TOO_LARGE, "stages.2.1.project output": TOO_LARGE}, model)
    assert found == {"stages.2.0.project"}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (tensor("a input", LARGEST / MARGIN), None),
        (tensor("a input", LARGEST / MARGIN * 1.01), "a input reaches 1.65e+04, within a factor of 4 of fp16's"),
        (tensor("a.weight", LARGEST, margin=1.0), None),  # all weights are known
        (tensor("a.weight", LARGEST * 1.01, margin=1.0), "a.weight reaches 6.62e+04, above fp16's 6.55e+04"),
        (tensor("a output", rounding=BAR * U), None),
        (tensor("a output", rounding=BAR * U * 1.01), "a output is off by 0.002 of what is left of it, above 0.002"),
    ],
)
def test_the_limits_are_where_they_are_said_to_be(found: HalfTensor, reason: str | None) -> None:
    (operation,) = decide({"a": (found,)}, "fp16")
    assert len(operation.reasons) == (reason is not None)
    assert reason is None or operation.reasons[0].startswith(reason)


# Checkpoints made to break --------------------------------------------------------------------------------------------

SCALED = (  # what touches the stream of stage 2, times 2^14: 6 becomes 1e5
    "downsamples.1",
    *(f"stages.2.{block}.{part}" for block in range(4) for part in ("dwconv_norm", "project")),
)


@pytest.fixture(scope="module")
def broken(changed: Callable[[Callable[[dict[str, Tensor]], object]], Path]) -> dict[str, Path]:
    return {
        "scaled": changed(scaled(2, 2.0**14)),
        # Scaled before by what leaves it in range: in fp32 too, a shift takes bits from what it is added to.
        "shifted": changed(lambda tensors: (scaled(2, 2.0**10)(tensors), shifted(2, 3, 64_000.0)(tensors))),
        "hidden": changed(shifted(2, 3, 400.0)),  # 0.25 apart in fp16: nothing overflows, little is left
    }


@pytest.mark.parametrize("how", ["scaled", "shifted", "hidden"])
def test_the_checkpoints_compute_what_the_bundled_one_computes(
    broken: dict[str, Path], how: str, pixels: NDArray[np.uint8]
) -> None:
    loaded, other = checkpoint.load(str(MODEL)), checkpoint.load(str(broken[how]))
    images = torch.from_numpy(preprocess.as_input(pixels, loaded.preprocessing, "float32")).double()
    with torch.no_grad():
        expected, found = loaded.model.double()(images), other.model.double()(images)
    # The norms' epsilon, and fp32 in the checkpoint.
    assert deviation.relative_errors(found.numpy(), expected.numpy()).max() < 3e-5


def test_the_plan_names_exactly_what_overflows(broken: dict[str, Path], source: sources.ImageSource) -> None:
    report = report_of(broken["scaled"], source)
    assert kept(report) == SCALED
    roundings = [t.rounding for operation in report.operations for t in operation.tensors if t.rounding is not None]
    assert np.isfinite(roundings).all()  # what overflows is not infinite in what is computed from it
    (reason, *_) = next(found.reasons for found in report.operations if found.name == "stages.2.3.dwconv_norm")
    assert re.fullmatch(
        r"stages\.2\.3\.dwconv_norm\.conv input reaches 1\.\d+e\+05, above fp16's 6\.55e\+04, 0\.0\d+ of the values",
        reason,
    )
    macs = multiply_accumulates(checkpoint.load(str(MODEL)).model.spec)
    inside = sum(count for path, count in macs.items() if path.startswith(SCALED))
    assert report.kept_share == pytest.approx(inside / sum(macs.values()))
    assert kept(report_of(broken["shifted"], source)) == ("stages.2.3.project",)
    assert kept(report_of(broken["hidden"], source)) == ("stages.2.3.project",)


def test_bf16_has_the_range_and_not_the_bits(broken: dict[str, Path], source: sources.ImageSource) -> None:
    assert kept(report_of(broken["scaled"], source, "bf16")) == ()
    assert kept(report_of(broken["hidden"], source, "bf16")) == ("stages.2.3.project",)


@pytest.mark.parametrize("how", ["scaled", "shifted", "hidden"])
def test_without_a_plan_the_export_is_refused(broken: dict[str, Path], how: str, tmp_path: Path) -> None:
    """In `eager`, which computes in fp16 on the CPU too; ONNX Runtime computes most of an fp16 graph in fp32 there."""
    with pytest.raises(ParityError, match="NaN or infinite" if how != "hidden" else "relative error"):
        api.export(str(broken[how]), format="eager", precision="fp16", out=tmp_path / "plain")


@pytest.mark.parametrize(
    ("how", "format"), [("scaled", "eager"), ("scaled", "onnx"), ("shifted", "eager"), ("hidden", "eager")]
)
def test_with_the_plan_the_export_is_verified_and_its_top_1_is_fp32s(
    broken: dict[str, Path],
    how: str,
    format: str,
    source: sources.ImageSource,
    pixels: NDArray[np.uint8],
    tmp_path: Path,
) -> None:
    loaded = checkpoint.load(str(broken[how]))
    images = preprocess.as_input(pixels, loaded.preprocessing, "float32")
    expected = loaded.model(torch.from_numpy(images)).argmax(1).numpy()
    plan = LoadedPlan(plan_of(broken[how], source), {})
    artifact = api.export(str(broken[how]), format=format, plan=plan, out=tmp_path / "out")
    (parity,) = artifact.manifest.parity
    assert parity.failures == ()
    assert parity.top1_agreement == 1.0
    quantization = artifact.manifest.export.quantization
    assert quantization is not None
    assert artifact.manifest.precision.graph["fp32"] == pytest.approx(quantization.kept_share, abs=1e-6)
    assert 0 < quantization.kept_share < 0.5
    (logits,) = api.load(artifact.path).run(images)
    assert np.array_equal(logits.argmax(1), expected)


def half_module(model: ConvNeXt, names: tuple[str, ...]) -> ConvNeXt:
    passes.cast_parameters(model, "fp16", names)
    return model


def test_a_branch_that_vanishes_beside_the_stream_is_left_in_half() -> None:
    """A layer scale of 1e-8, as training starts with 1e-6: every weight of the folded project becomes zero."""
    model = parameters.random_model(SMALL)
    for block in passes.blocks(model):
        assert block.project.layer_scale is not None
        block.project.layer_scale.mul_(1e-8)
    report = noise_report(folded(model))
    assert tensor_of(report, "stages.2.0.project.linear.weight").lost > 0.9
    assert kept(report) == ()


def test_a_tiny_tensor_that_a_norm_brings_back_is_kept() -> None:
    """Depthwise weights of 1e-7 become zero in fp16; the norm behind them makes up for any factor."""
    spec = msgspec.structs.replace(SMALL, norm_eps=1e-20)
    model = parameters.random_model(spec)
    (_, block, *_) = passes.blocks(model)
    block.dwconv_norm.conv.weight.mul_(1e-7)
    assert block.dwconv_norm.conv.bias is not None
    block.dwconv_norm.conv.bias.mul_(1e-7)
    report = noise_report(folded(model))
    assert kept(report) == ("stages.1.0.dwconv_norm",)


def test_in_v2_the_hidden_tensor_is_followed_through_grn() -> None:
    """Expand's outputs beyond 65504: so are what GRN and project read, and the norm of the head undoes it."""

    def model() -> ConvNeXt:
        made = parameters.random_model(V2)
        tuple(passes.blocks(made))[-1].expand.linear.weight.mul_(2.0**14)
        return folded(made)

    expected = model()(noise())
    report = noise_report(model())
    assert kept(report) == tuple(f"stages.3.0.{part}" for part in ("expand", "grn", "project"))
    assert not half_module(model(), ())(noise()).isfinite().all()
    found = half_module(model(), kept(report))(noise())
    assert deviation.relative_errors(found.numpy(), expected.numpy()).max() < 1e-2


def test_grn_of_a_large_map_in_half_precision_is_grn_in_double() -> None:
    """200x304 positions of up to 400 have a sum of squares of 6e8: 9,000 times what fp16 can hold."""
    generator = torch.Generator().manual_seed(0)
    grn = Grn(32)
    grn.weight.data.normal_(generator=generator)
    assert grn.bias is not None
    grn.bias.data.normal_(generator=generator)
    grn = grn.half()
    x = (torch.randn((1, 200, 304, 32), generator=generator) * 100).half()
    with torch.no_grad():
        found = grn(x)
    assert grn.bias is not None
    wide, weight, bias = (t.double().numpy() for t in (x, grn.weight.detach(), grn.bias.detach()))
    norm = np.sqrt((wide**2).sum((1, 2), keepdims=True))
    assert (wide**2).sum((1, 2)).max() > 9e3 * LARGEST
    expected = wide * (1 + weight * norm / norm.mean(-1, keepdims=True)) + bias
    # The factor, the product and the sum are rounded once each.
    error = np.abs(found.double().numpy() - expected) / (np.abs(expected) + np.abs(bias))
    assert error.max() < 3 * U


# Any plan runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        V2,
        msgspec.structs.replace(SMALL, norm="rmsnorm"),
        msgspec.structs.replace(SMALL, task="embed", head="norm_pool"),  # a norm with weights reads the stream
        msgspec.structs.replace(SMALL, task="features"),
        msgspec.structs.replace(SMALL, stem="overlap_act"),
    ],
    ids=["V1", "V2", "RMSNorm", "norm before pooling, embed", "features", "overlapping stem"],
)
def test_any_one_operation_can_stay_in_fp32(spec: ModelSpec) -> None:
    exact = folded(parameters.random_model(spec))
    with torch.no_grad():
        reference = exact(noise(2))
    for name in operations(exact):
        model = half_module(folded(parameters.random_model(spec)), (name,))
        with torch.no_grad():
            outputs = model(noise(2))
        pairs = [(outputs, reference)] if isinstance(outputs, Tensor) else zip(outputs, reference, strict=True)
        for found, expected in pairs:
            assert found.dtype == torch.float32
            assert deviation.relative_errors(found.numpy(), expected.numpy()).max() < 1e-2, name


@pytest.mark.parametrize(
    ("graph", "failure"),
    [
        ({"fp16": 0.7, "fp32": 0.3}, None),
        ({"fp32": 1.0}, "fp16 was asked for, but the built graph has 30% fp16, 70% fp32"),
        ({"fp16": 1.0}, "the plan keeps 30% of the multiply-accumulates in fp32, but the built graph has 0%"),
    ],
    ids=["as planned", "all in fp32", "nothing kept"],
)
def test_the_built_graph_has_to_keep_as_much_as_the_plan(
    artifact_of: Callable[..., Artifact], graph: dict[str, float], failure: str | None
) -> None:
    manifest = artifact_of("eager").manifest
    record = QuantizationRecord(
        plan_sha256="0" * 64, target="onnx", operations={"fp32": 3}, kept_share=0.3, calibration=None
    )
    export = msgspec.structs.replace(manifest.export, precision="fp16", quantization=record)
    found = precision_failures(
        PrecisionTruth(graph=graph), msgspec.structs.replace(manifest, export=export), typed_graph=True
    )
    assert len(found) == (failure is not None)
    assert failure is None or found[0].startswith(failure)


# What is refused ------------------------------------------------------------------------------------------------------


def test_more_images_than_there_are_are_refused(source: sources.ImageSource) -> None:
    loaded = checkpoint.load(str(MODEL))
    with pytest.raises(DataError, match="has 2,000 images; 2001 were asked for"):
        analyse(loaded.model, source, preprocessing=loaded.preprocessing, images=2001)


def test_a_precision_that_is_not_half_is_refused(source: sources.ImageSource) -> None:
    loaded = checkpoint.load(str(MODEL))
    with pytest.raises(UsageError, match="precision fp32; expected fp16 or bf16"):
        analyse(loaded.model, source, preprocessing=loaded.preprocessing, precision="fp32")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_in_fp32_is_refused(value: float) -> None:
    model = folded(parameters.random_model(SMALL))
    tuple(passes.blocks(model))[1].expand.linear.weight[0, 0] = value
    with pytest.raises(CheckFailed, match=r"stages\.1\.0\.expand\.linear output contains NaN or infinite values"):
        noise_report(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_is_called_noise() -> None:
    assert noise_report(folded(parameters.random_model(SMALL)), images=1).random


def plan_keeping(name: str) -> LoadedPlan:
    loaded = checkpoint.load(str(MODEL))
    plan = Plan(
        target="onnx", architecture="custom", weights_sha256=loaded.weights.tensors_sha256, input="float32",
        image_size=(64, 64), rest="fp16", calibration=None, operations={name: OperationPlan(type="fp32")},
    )  # fmt: skip
    return LoadedPlan(plan, {})


def test_a_plan_that_keeps_an_operation_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the plan keeps stages\.9\.0\.project in fp32; expected one of stem, "):
        api.export(str(MODEL), plan=plan_keeping("stages.9.0.project"), out=tmp_path / "out")


def test_a_format_that_has_one_type_for_the_whole_model_refuses_a_plan_that_keeps_operations(
    need_format: Callable[[str], None], tmp_path: Path
) -> None:
    need_format("openvino")
    with pytest.raises(UsageError, match="format openvino chooses one float type for the whole model"):
        api.export(str(MODEL), format="openvino", plan=plan_keeping("head"), out=tmp_path / "out")
