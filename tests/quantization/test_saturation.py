"""u8 by s8 on x86 without VNNI: which machines saturate, weights that never do, and what each runtime is told."""

import contextlib
import copy
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from onnx_products import needs_exact_products
from references import randomize_

from convnext_deploy import api, cli, env, formats
from convnext_deploy.artifact import deviation
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.errors import ArtifactError, ParityError, UsageError
from convnext_deploy.formats import native, onnx, openvino
from convnext_deploy.models import passes
from convnext_deploy.models.checkpoint import load
from convnext_deploy.models.source import Source
from convnext_deploy.quantization import apply as applying
from convnext_deploy.quantization import distance, saturation, saturation_loss
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.calibrate import calibrate
from convnext_deploy.quantization.images import random_images
from convnext_deploy.quantization.ranges import weight_scales
from convnext_deploy.records.manifest import BatchRange, ExportRequest, ExportSpec
from convnext_deploy.records.plan import OperationPlan, Plan, QuantizationRecord, SaturationRecord
from convnext_deploy.workflows import quantize


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "HELD_OUT", 8)


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cpu_features", lambda: {"avx2", "fma"})
    monkeypatch.setattr(saturation.platform, "machine", lambda: "x86_64")


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", {"avx2", "avx512f"}, True),  # Skylake-X: wide registers, the same instruction
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, False),
        ("AMD64", set(), True),  # Windows does not tell
        ("aarch64", set(), False),
    ],
)
def test_x86_without_vnni_saturates(
    machine: str, flags: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saturation.platform, "machine", lambda: machine)
    monkeypatch.setattr(env, "cpu_features", lambda: flags)
    assert saturation.saturates() is expected
    assert saturation.bits_for("u8s8", saturation.saturates()) == (7 if expected else 8)
    assert saturation.bits_for("s8s8", saturation.saturates()) == 8
    assert ("saturates" in saturation.words(("openvino",))) is expected


def vpmaddubsw(a: Any, w: Any) -> Any:
    """u8 (..., K) by s8 (..., K), two products a sum, saturated to 16 bits; Intel's manual, volume 2."""
    pairs = (a.astype(np.int64) * w.astype(np.int64)).reshape(*w.shape[:-1], -1, 2).sum(-1)
    return np.clip(pairs, -(2**15), 2**15 - 1)


@pytest.mark.parametrize(("bits", "exact"), [(7, True), (8, False)])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_weights_of_7_bits_never_saturate(bits: Any, exact: bool, method: Any) -> None:
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32))
    rows[:, :2] = rows[:, :2].sign() * rows.abs().amax()  # the largest weights side by side
    limit = saturation.WEIGHT_LIMITS[bits]
    scales = weight_scales(rows, "s8_symmetric", method, limit)
    codes = applying.rounded(rows, scales, OperationPlan(type="u8s8", scale=1.0), bits).numpy()
    assert np.abs(codes.astype(int)).max() == limit
    brightest = np.full(64, 255, np.uint8)
    plain = (brightest.astype(np.int64) * codes).reshape(32, -1, 2).sum(-1)
    assert np.array_equal(vpmaddubsw(brightest, codes), plain) is exact


def test_a_plan_of_an_earlier_version_has_weights_of_8_bits() -> None:
    plan = Plan(
        target="openvino", architecture="test_convnext", weights_sha256="0" * 64, input="float32",
        image_size=(32, 32), rest="fp32", calibration=None, operations={},
    )  # fmt: skip
    old = msgspec.to_builtins(plan)
    del old["weight_bits"]
    assert msgspec.convert(old, Plan, strict=False) == plan
    assert plan.weight_bits == 8


def record(bits: Any = 8, type: str = "u8s8") -> QuantizationRecord:
    return QuantizationRecord(
        plan_sha256="0" * 64, target="openvino", operations={type: 3}, weight_bits=bits, calibration=None
    )


def plan_of(bits: Any = 8, type: Any = "u8s8") -> Plan:
    return Plan(
        target="openvino", architecture="test_convnext", weights_sha256="0" * 64, input="float32",
        image_size=(32, 32), rest="fp32", weight_bits=bits, calibration=None,
        operations={"stem": OperationPlan(type=type, scale=None if type == "fp32" else 1.0)},
    )  # fmt: skip


REQUEST = ExportRequest(format="openvino")


def spec_of(format: str, quantization: QuantizationRecord | None) -> ExportSpec:
    return ExportSpec(format=format, precision="fp32", input="float32", batch=BatchRange(), quantization=quantization)


def test_openvino_refuses_a_plan_that_would_saturate_here_before_any_work(without_vnni: None) -> None:
    with pytest.raises(UsageError, match=r"saturation.*--weight-bits 7.*--target native"):
        openvino.refuse(REQUEST, plan_of())
    for harmless in (None, plan_of(7), plan_of(type="fp32")):
        openvino.refuse(REQUEST, harmless)


def test_openvino_does_not_load_what_was_built_where_nothing_saturates(without_vnni: None) -> None:
    manifest: Any = SimpleNamespace(export=spec_of("openvino", record()))
    with pytest.raises(ArtifactError, match=r"model\.xml: OpenVINO multiplies 8 bits with 16-bit saturation"):
        openvino.OpenVinoSession(Path("model.xml"), manifest, RunOptions())


@pytest.mark.parametrize(
    ("version", "feature", "types", "refused"),
    [
        ("1.24.4", "amx_int8", "u8s8", True),
        ("1.9.0", "amx_int8", "s8s8", True),
        ("1.25.0", "amx_int8", "u8s8", False),
        ("1.24.4", "avx512_vnni", "u8s8", False),
        ("1.24.4", "amx_int8", "fp32", False),
    ],
)
def test_onnxruntime_is_refused_where_its_products_on_tiles_are_wrong(
    version: str, feature: str, types: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(env, "cpu_features", lambda: {"avx2", feature})
    message = rf"onnxruntime {re.escape(version)} computes 8-bit products wrongly on CPUs with AMX.*install"
    expected = pytest.raises(UsageError, match=message) if refused else contextlib.nullcontext()
    with expected:
        onnx.refuse(ExportRequest(format="onnx"), plan_of(type=types))
    manifest: Any = SimpleNamespace(export=spec_of("onnx", record(type=types)))
    with expected if refused else pytest.raises(FileNotFoundError):
        onnx.OnnxSession(Path("absent/model.onnx"), manifest, RunOptions())
    cuda = ExportRequest(format="onnx", device="cuda")
    onnx.refuse(cuda, plan_of(type=types))


def test_a_failed_verification_names_saturation_where_the_cpu_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cpu_features", set)
    monkeypatch.setattr(saturation.platform, "machine", lambda: "x86_64")
    openvino.refuse(REQUEST, plan_of())  # it may be exact
    assert "--weight-bits 7" in str(saturation.cause(formats.eight_bits_of("openvino"), record()))
    assert saturation.cause(formats.eight_bits_of("onnx"), record()) is None


# What outputs tell, where no flag of the CPU does --------------------------------------------------------------------


def saturating(layer: applying.QuantizedLinear, codes: torch.Tensor) -> torch.Tensor:
    """The product as `vpmaddubsw` adds it up."""
    rows, weight = codes.reshape(-1, codes.shape[-1]).int(), layer.weight.int()
    total = torch.zeros(len(rows), weight.shape[1], dtype=torch.int32)
    for k in range(0, len(weight), 2):
        total += (rows[:, k, None] * weight[k] + rows[:, k + 1, None] * weight[k + 1]).clamp(-(2**15), 2**15 - 1)
    total -= int(layer.zero_point) * weight.sum(0)
    return (total * (layer.scale * layer.weight_scale)).reshape(*codes.shape[:-1], -1) + layer.bias


@pytest.mark.parametrize(
    ("grn", "seed", "kinds"),
    [
        # Of each, one that a limit of the worst sample lets pass: the simulation itself is off by half as much there.
        (False, 0, ("stem", "downsample", "expand", "project", "head")),
        (True, 2, ("expand", "project")),
    ],
    ids=["v1", "v2"],
)
def test_an_artifact_whose_products_saturate_is_refused(
    grn: bool,
    seed: int,
    kinds: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replaced_format: Any,
    need_format: Any,
) -> None:
    need_format("native")
    size: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "num_classes": 100}
    made = randomize_(timm.models.convnext.ConvNeXt(**size, use_grn=grn, ls_init_value=None if grn else 1e-6), seed)
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(made.state_dict(), weights)
    loaded = load(str(weights), image_size=(32, 32))
    example = torch.zeros(2, 3, 32, 32)
    passes.fold(loaded.model, None, lambda m: (m(example),))
    names = [name for name in plans.products(loaded.model) if plans.kind_of(name) in kinds]
    paths = tuple(plans.products(loaded.model)[name] for name in names)
    images = random_images(32, (32, 32))
    found = calibrate(loaded.model, paths, images, preprocessing=loaded.preprocessing, images=32, batch=16)
    options: dict[str, Any] = {"method": "mse", "input": "float32", "rest": "fp32", "type": "u8s8"}
    options["eight_bits"] = formats.eight_bits_of("native")
    sha256 = loaded.weights.tensors_sha256
    plan = plans.draft(loaded.model, found, names, target="native", weights_sha256=sha256, **options)
    plans.write(tmp_path / "plan.json", plan, {})

    class Saturating(native.NativeSession):
        """The engine on a CPU that adds in 16 bits."""

        def _bind(self, images: Any) -> None:
            super()._bind(images)
            self._images = torch.from_numpy(images)

        def _fetch(self) -> Any:
            with monkeypatch.context() as patch, torch.inference_mode():
                patch.setattr(applying.QuantizedLinear, "product", saturating)
                return (modules[0](self._images).numpy(),)

    modules: list[Any] = []

    def build(graph: Any, folder: Path) -> None:
        modules.append(copy.deepcopy(graph.module))  # the build gives its weights back
        native.build(graph, folder)

    settings: dict[str, Any] = {
        "format": "native", "plan": tmp_path / "plan.json", "image_size": (32, 32),
        "batch": BatchRange(min=1, opt=4, max=16),
    }  # fmt: skip
    api.export(str(weights), out=tmp_path / "exact", **settings)
    load_saturating = lambda folder, record, options: Saturating(folder / native.FILE, record, options)  # noqa: E731
    replaced_format("native", build=build, load=load_saturating)
    with pytest.raises(
        ParityError, match=r"root mean square of the relative errors 0\.\d+ from the simulation"
    ) as caught:
        api.export(str(weights), out=tmp_path / "wrong", **settings)
    assert "relative error 0." not in str(caught.value)  # which is what the worst sample says


# What a plan does elsewhere ------------------------------------------------------------------------------------------


def drafted(target: Any, bits: Any = 8, type: Any = "u8s8") -> tuple[Any, plans.LoadedPlan, Any]:
    """A small folded model, a plan of all its products, and 24 images of noise."""
    size: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "num_classes": 100}
    made = randomize_(timm.models.convnext.ConvNeXt(**size), 0)
    loaded = Source.of(made, image_size=(32, 32)).load()
    example = torch.zeros(2, 3, 32, 32)
    passes.fold(loaded.model, None, lambda m: (m(example),))
    paths = plans.products(loaded.model)
    images = random_images(24, (32, 32))
    found = calibrate(loaded.model, tuple(paths.values()), images, preprocessing=loaded.preprocessing, images=24)
    how = formats.eight_bits_of(target)
    plan = plans.draft(
        loaded.model, found, list(paths), target=target, weights_sha256="0" * 64, method="mse", input="float32",
        rest="fp32", type=type, eight_bits=how, weight_bits=bits,
    )  # fmt: skip
    return (
        loaded,
        plans.LoadedPlan(plan, {}, found, how),
        distance.pixels_of(images, loaded.preprocessing, loaded.model),
    )


@pytest.fixture(scope="module")
def onnx_plan() -> tuple[Any, plans.LoadedPlan, Any]:
    return drafted("onnx")


def test_what_saturation_takes_is_what_the_instruction_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (33, 64), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (64, 17), generator=generator, dtype=torch.int8)
    exact = codes.int() @ weight.int()
    expected = vpmaddubsw(codes.numpy()[:, None], weight.numpy().T[None].repeat(33, 0)).sum(-1)
    found = exact + saturation_loss.loss(codes, weight, saturation_loss._pairs(weight))
    assert np.array_equal(found.numpy(), expected)
    assert not np.array_equal(exact.numpy(), expected)


@pytest.mark.parametrize("at_once", [saturation_loss.AT_ONCE, 1])
def test_a_plan_is_told_what_it_does_where_its_products_saturate(
    at_once: int, onnx_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, plan, pixels = onnx_plan
    monkeypatch.setattr(saturation_loss, "AT_ONCE", at_once)
    record = saturation_loss.measure(loaded.model, plan, pixels, loaded.preprocessing)
    assert record is not None

    def error() -> tuple[float, int]:
        changed = copy.deepcopy(loaded.model)
        applying.apply(changed, plan)
        (found,) = distance.outputs(changed, pixels, loaded.preprocessing)
        (expected,) = distance.outputs(loaded.model, pixels, loaded.preprocessing)
        errors = deviation.relative_errors(found.numpy(), expected.numpy())
        return float(np.sqrt((errors**2).mean())), int((found.argmax(1) != expected.argmax(1)).sum())

    assert (record.relative_error_without, record.changed_without) == error()
    monkeypatch.setattr(applying.QuantizedLinear, "product", saturating)
    assert (record.relative_error, record.changed) == (pytest.approx(error()[0], rel=1e-3), error()[1])
    assert record.relative_error > 1.2 * record.relative_error_without


def test_convolutions_saturate_as_the_products_that_they_are(onnx_plan: Any) -> None:
    loaded, plan, pixels = onnx_plan
    openvino = replace(plan, eight_bits=formats.eight_bits_of("openvino"))
    assert openvino.eight_bits is not None
    assert openvino.eight_bits.convolutions
    one, other = (saturation_loss.measure(loaded.model, p, pixels, loaded.preprocessing) for p in (plan, openvino))
    assert one is not None
    assert other is not None
    assert other.relative_error == pytest.approx(one.relative_error, rel=0.05)  # its GELU is another


@pytest.mark.parametrize(("target", "bits", "type"), [("onnx", 7, "u8s8"), ("eager", 8, "s8s8")])
def test_what_cannot_saturate_has_no_such_record(target: str, bits: Any, type: Any) -> None:
    loaded, plan, pixels = drafted(target, bits, type)
    assert saturation_loss.measure(loaded.model, plan, pixels, loaded.preprocessing) is None


def test_a_part_of_a_plan_is_not_said_to_do_what_the_whole_does() -> None:
    plan = msgspec.structs.replace(
        plan_of(), operations={name: OperationPlan(type="u8s8", scale=1.0) for name in "ab"}, saturation=SATURATED
    )
    assert plans.restricted(plans.LoadedPlan(plan, {}), ("a", "b")).plan.saturation == SATURATED
    assert plans.restricted(plans.LoadedPlan(plan, {}), ("a",)).plan.saturation is None


SATURATED = SaturationRecord(
    images=32, relative_error=0.0443, relative_error_without=0.0193, changed=5, changed_without=1
)


def test_inspect_says_what_a_file_loses_on_other_cpus() -> None:
    line = saturation.elsewhere(msgspec.structs.replace(record(), saturation=SATURATED))
    assert line == (
        "where a runtime of others adds 8-bit products in 16 bits (x86 without VNNI): relative error 0.044 in the "
        "place of 0.019, about 12 points of agreement lost on 32 images; `quantize --weight-bits 7` prevents it"
    )
    assert saturation.elsewhere(record()) is None


FIVE = "0.5,0.5,0.5,0.5,0.5"


def quantized(checkpoint: Path, target: Any, folder: Path, **options: Any) -> Plan:
    return api.quantize(
        str(checkpoint), out=folder / f"{target}.json", calibration="random", target=target, images=8,
        image_size=(32, 32), **options,
    )  # fmt: skip


@needs_exact_products
def test_onnxruntime_is_told_to_multiply_exactly_and_the_manifest_says_so(
    checkpoint: Path, tmp_path: Path, without_vnni: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    entries = []

    class Recorded(ort.SessionOptions):  # type: ignore[misc]  # its package has no types
        def add_session_config_entry(self, key: str, value: str) -> None:
            entries.append((key, value))
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(ort, "SessionOptions", Recorded)
    assert quantized(checkpoint, "onnx", tmp_path, weight_bits=8).weight_bits == 8
    settings: dict[str, Any] = {"format": "onnx", "image_size": (32, 32), "batch": BatchRange(min=1, opt=2, max=4)}
    made = api.export(str(checkpoint), plan=tmp_path / "onnx.json", out=tmp_path / "int8", **settings)
    assert ("session.x64quantprecision", "1") in entries
    assert "session.x64quantprecision=1" in (made.manifest.precision.note or "")
    entries.clear()
    api.export(str(checkpoint), out=tmp_path / "fp32", **settings)
    assert ("session.x64quantprecision", "1") not in entries


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "onnx", "native"])
def test_every_runtime_gets_weights_of_7_bits_where_8_would_saturate(
    format: Any, checkpoint: Path, tmp_path: Path, without_vnni: None, need_format: Any
) -> None:
    need_format(format)
    plan = quantized(checkpoint, format, tmp_path)
    assert plan.weight_bits == 7
    made = api.export(
        str(checkpoint), format=format, plan=tmp_path / f"{format}.json", out=tmp_path / "model",
        image_size=(32, 32), batch=BatchRange(min=1, opt=2, max=4),
    )  # fmt: skip
    assert made.manifest.export.quantization is not None
    assert made.manifest.export.quantization.weight_bits == 7
    assert "x64quantprecision" not in (made.manifest.precision.note or "")


def test_weights_of_7_bits_are_for_u8_by_s8_only(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--weight-bits 7.*eager multiplies s8s8"):
        quantized(checkpoint, "eager", tmp_path, weight_bits=7)


@pytest.mark.slow
def test_a_models_weights_keep_the_range_that_its_plan_says(checkpoint: Path, tmp_path: Path) -> None:
    """Also those that GPTQ rounded, which are beside the plan."""
    quantized(checkpoint, "native", tmp_path, weight_bits=7, rounding=True)
    loaded = load(str(checkpoint), image_size=(32, 32))
    example = torch.zeros(2, loaded.model.spec.in_chans, 32, 32)
    passes.fold(loaded.model, None, lambda m: (m(example),))
    plan = replace(plans.read(tmp_path / "native.json"), eight_bits=formats.eight_bits_of("native"))
    applying.apply(loaded.model, plan)
    found = [
        m.weight.short().abs().max().item() for m in loaded.model.modules() if isinstance(m, applying.QuantizedLinear)
    ]
    assert found
    assert max(found) <= 64


@needs_exact_products
def test_the_line_after_quantize_builds_the_plan_as_it_is_and_noise_has_as_many_channels_as_the_model(
    checkpoint_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option that `export` needs again is in it, quoted: this checkpoint's name has a space."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "my model's.safetensors"
    shutil.copy(checkpoint_of(in_chans=5), weights)
    code = cli.run(
        ["quantize", "--weights", str(weights), "--image-size", "64", "--crop-pct", "1.0", "--calibration", "random",
         "--images", "8", "--mean", FIVE, "--std", FIVE, "--target", "onnx", "--out", "fast.json"]
    )  # fmt: skip
    assert code == 0
    line = capsys.readouterr().err.strip().splitlines()[-1]
    words = shlex.split(line.removeprefix("next: "))
    assert words[:2] == ["convnext-deploy", "export"]
    assert "--crop-pct" in words
    assert cli.run([*words[1:], "--out", "built"]) == 0
    assert cli.run([*words[1:], "--image-size", "96", "--out", "other"]) == 2
    assert "add --image-size 64, or run quantize" in capsys.readouterr().err
