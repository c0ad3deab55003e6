"""The command `quantize`: drafting and corrections, on the bundled model."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from convnext_deploy import api, cli, formats
from convnext_deploy.data import sources
from convnext_deploy.errors import DataError, UsageError
from convnext_deploy.models import passes, registry
from convnext_deploy.models.checkpoint import load
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.parameters import random_model
from convnext_deploy.quantization import apply as applying
from convnext_deploy.quantization import corrections, distance
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.calibrate import Calibration, calibrate
from convnext_deploy.quantization.distance import pixels_of
from convnext_deploy.quantization.plan import LoadedPlan
from convnext_deploy.records.plan import OperationPlan

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "fashion-mnist"
WEIGHTS, IMAGES = EXAMPLE / "model.safetensors", EXAMPLE / "test-2000.parquet"


@pytest.fixture(scope="module")
def model() -> ConvNeXt:
    loaded = load(str(WEIGHTS))
    example = torch.zeros(2, 1, 64, 64)
    passes.fold(loaded.model, None, lambda m: (m(example),))
    return loaded.model


@pytest.fixture(scope="module")
def sha256() -> str:
    return load(str(WEIGHTS)).weights.tensors_sha256


@pytest.fixture(scope="module")
def pixels(model: ConvNeXt) -> distance.Pixels:
    return pixels_of(sources.subset(sources.open_source(str(IMAGES)), 48), load(str(WEIGHTS)).preprocessing, model)


@pytest.fixture(scope="module")
def calibration(model: ConvNeXt) -> Calibration:
    facts = load(str(WEIGHTS)).preprocessing
    paths = tuple(plans.products(model).values())
    return calibrate(model, paths, sources.open_source(str(IMAGES)), preprocessing=facts, images=48, batch=16)


def drafted(model: ConvNeXt, calibration: Calibration, sha256: str, target: Any = "onnx") -> LoadedPlan:
    how = formats.eight_bits_of(target)
    plan = plans.draft(
        model, calibration, tuple(plans.products(model)), type=how.int8, target=target, eight_bits=how,
        method="mse", input="float32", rest="fp32", weights_sha256=sha256,
    )  # fmt: skip
    return LoadedPlan(plan, {}, calibration, how)


# Distances -----------------------------------------------------------------------------------------------------------


def test_the_distance_of_classes_is_the_divergence_of_their_probabilities() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (b, a))
    expected = (p * np.log(p / q)).sum(1)
    found = distance.distances([torch.from_numpy(a)], [torch.from_numpy(b)], classify=True)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert distance.distances([torch.from_numpy(a)], [torch.from_numpy(a)], classify=True).max() == 0


def test_the_distance_of_features_is_their_squared_relative_error() -> None:
    maps = [torch.ones(2, 3, 4, 4), torch.ones(2, 6, 2, 2)]
    moved = [maps[0] * 1.1, maps[1] * 0.8]
    np.testing.assert_allclose(distance.distances(moved, maps, classify=False), (0.1**2 + 0.2**2) / 2, rtol=1e-5)


def test_one_class_has_a_distance_though_its_probability_is_always_1() -> None:
    """The divergence of one class is 0 whatever the logit does."""
    model = random_model(msgspec.structs.replace(registry.spec("test_convnext"), num_classes=1))
    assert not distance.classifies(model)
    logits = torch.tensor([[1.0], [-1.0], [0.0]])
    found = distance.distances([logits * 1.1 + 0.1], [logits], classify=distance.classifies(model))
    np.testing.assert_allclose(found, [0.04, 0, 0.01 / (2 / 3)], rtol=1e-5, atol=1e-9)
    zero = torch.zeros(3, 1)
    assert distance.distances([zero], [zero], classify=False).max() == 0


def test_a_coarser_quantizer_makes_an_operation_more_sensitive(
    model: ConvNeXt, calibration: Calibration, sha256: str, pixels: distance.Pixels
) -> None:
    loaded = drafted(model, calibration, sha256)
    facts = load(str(WEIGHTS)).preprocessing
    names = ("stages.1.0.expand", "stages.2.0.project")
    fine = plans.restricted(loaded, names)
    coarse = {
        name: msgspec.structs.replace(operation, scale=20 * operation.scale, zero_point=operation.zero_point // 20)
        for name, operation in fine.plan.operations.items()
        if operation.scale is not None
    }
    rough = replace(fine, plan=msgspec.structs.replace(fine.plan, operations=coarse))
    found = [dict(distance.sensitivities(model, plan, pixels, facts, {})) for plan in (fine, rough)]
    for name in names:
        assert found[1][name] > 20 * found[0][name] > 0
    assert dict(distance.sensitivities(model, fine, pixels[:4], facts, {names[0]: 1.0})).keys() == {names[1]}


# Corrections ---------------------------------------------------------------------------------------------------------


def test_balance_makes_channels_reach_equally_far(
    model: ConvNeXt, calibration: Calibration, sha256: str, pixels: distance.Pixels
) -> None:
    name = "stages.2.1.expand"
    factors = corrections.balance_factors(model, calibration, (name, "stages.2.1.project"))
    assert factors.keys() == {f"balance/{name}"}  # nothing scales across GELU
    values = factors[f"balance/{name}"].double()
    statistics = calibration.whole(plans.products(model)[name])
    activations = torch.maximum(statistics.low.abs(), statistics.high.abs())
    weights = model.get_parameter(f"{name}.linear.weight").double().abs().amax(0)
    reach = (activations / values) / (weights * values)
    torch.testing.assert_close(reach / reach.mean(), torch.ones_like(reach), rtol=1e-5, atol=1e-5)
    assert values.log().mean().abs() < 1e-6


def test_bias_correction_takes_the_mean_error_away(
    model: ConvNeXt, calibration: Calibration, sha256: str, pixels: distance.Pixels
) -> None:
    facts = load(str(WEIGHTS)).preprocessing
    name = "stages.0.1.project"
    loaded = plans.restricted(drafted(model, calibration, sha256), (name,))
    coarse = msgspec.structs.replace(loaded.plan.operations[name], scale=0.2, zero_point=1)
    loaded = replace(loaded, plan=msgspec.structs.replace(loaded.plan, operations={name: coarse}))
    told: list[tuple[int, int]] = []
    found = corrections.bias_corrections(model, loaded, pixels, facts, lambda *step: told.append(step))
    assert told[0] == (0, len(pixels))
    corrected = replace(loaded, tensors=found)
    errors = []
    for plan in (loaded, corrected):
        changed = copy.deepcopy(model)
        applying.apply(changed, plan)
        seen: list[torch.Tensor] = []
        linear, replaced = model.get_submodule(f"{name}.linear"), changed.get_submodule(f"{name}.linear")
        handle = linear.register_forward_hook(lambda m, a, y: seen.append((y - replaced(a[0])).flatten(0, -2)))  # noqa: B023
        with torch.no_grad():
            for batch in distance.inputs(model, pixels, facts):
                model(batch)
        handle.remove()
        errors.append(torch.cat(seen).mean(0).abs().max().item())
    assert errors[1] < 1e-3 * errors[0]


def test_gptq_lowers_the_error_of_the_product_and_nothing_of_its_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator)
    x = torch.randn(512, 48, generator=generator) @ mixing  # correlated inputs, which is what it lives on
    rows = torch.randn(16, 48, generator=generator)
    scales = rows.abs().amax(1) / 7  # coarse, so that rounding matters
    operation = OperationPlan(type="u8s8", scale=1.0)
    nearest = applying.rounded(rows, scales, operation)
    found = corrections.gptq(rows, scales, x.T @ x, operation)
    assert found.dtype == torch.int8

    def error(codes: torch.Tensor) -> float:
        return ((codes.float() * scales[:, None] - rows) @ x.T).norm().item()

    assert error(found) < 0.8 * error(nearest)
    assert found.abs().max() <= 127


def test_a_centred_tensor_uses_the_codes_that_a_symmetric_range_leaves_empty(
    model: ConvNeXt, calibration: Calibration, sha256: str
) -> None:
    loaded = drafted(model, calibration, sha256, "tensorrt_rtx")
    shifted = corrections.shifted(loaded, calibration, model)
    for name, operation in shifted.operations.items():
        before = loaded.plan.operations[name]
        if plans.kind_of(name) != "project":
            assert operation == before
            continue
        assert operation.scale is not None
        assert before.scale is not None
        assert operation.scale < 0.6 * before.scale
        low = calibration.whole(plans.products(model)[name]).low.min().item()
        assert -128 * operation.scale + operation.shift == pytest.approx(low, abs=1e-6)  # its floor is the first code


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "plan.yaml"}, "ends in .json"),
        ({"type": "fp8"}, "--type fp8 is for NVIDIA GPUs"),
        ({"calibration": "nowhere"}, "nowhere"),
        ({"images": 5000}, "2000"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_one_line(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"out": "plan.json", "calibration": str(IMAGES), "target": "onnx"} | options
    settings["out"] = tmp_path / settings["out"]
    with pytest.raises((UsageError, DataError)) as caught:
        api.quantize(str(WEIGHTS), **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_noise_is_calibrated_on_only_by_name_and_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    code = cli.run(
        ["quantize", "--weights", str(WEIGHTS), "--calibration", "random", "--images", "16", "--out", str(out)]
    )
    assert code == 0
    assert "CALIBRATED ON NOISE" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["calibration"]["random"] is True
    kinds = {name.rpartition(".")[2] for name in document["operations"]}
    assert kinds == {"expand", "project"}
    assert {c["name"] for c in document["corrections"]} == {"balance", "bias"}


@pytest.mark.slow
def test_a_calibration_that_was_interrupted_goes_on_says_so_and_ends_in_the_same_plan(tmp_path: Path) -> None:
    images: dict[str, Any] = {"calibration": str(IMAGES), "images": 96, "target": "onnx"}
    api.quantize(str(WEIGHTS), out=tmp_path / "whole.json", **images)
    looked_at = 0

    def interrupt(what: str) -> Any:
        def told(done: int, _: int) -> None:
            nonlocal looked_at
            looked_at = done
            if done >= 64:
                raise KeyboardInterrupt

        return told

    with pytest.raises(KeyboardInterrupt):
        api.quantize(str(WEIGHTS), out=tmp_path / "plan.json", progress=interrupt, **images)
    assert looked_at >= 64
    said: list[str] = []
    api.quantize(str(WEIGHTS), out=tmp_path / "plan.json", say=said.append, **images)
    assert f"going on with what was counted in {tmp_path / 'plan.partial'}" in said
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "plan.partial").exists()


def test_a_model_without_linears_in_8_bits_is_left_as_it_is(model: ConvNeXt) -> None:
    assert all(not isinstance(module, applying.QuantizedLinear) for module in model.modules())
    assert isinstance(model.get_submodule("head.classifier"), nn.Linear)


def test_half_says_what_it_keeps_and_export_takes_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "half.json"
    code = cli.run(["half", "--weights", str(WEIGHTS), "--data", str(IMAGES), "--images", "8", "--out", str(out)])
    assert code == 0
    assert "0 of " in capsys.readouterr().out  # a healthy model
    assert json.loads(out.with_suffix(".half.json").read_text())["kept_share"] == 0
    artifact = api.export(str(WEIGHTS), format="eager", plan=out, out=tmp_path / "model")
    assert artifact.manifest.export.precision == "fp16"
    with pytest.raises(UsageError, match="exists"):
        api.half(str(WEIGHTS), out=out, data=str(IMAGES))
