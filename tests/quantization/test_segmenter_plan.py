"""A segmenter's head in 8 bits: products over patches, or convolutions where a runtime has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from segmenters import saved, upernet
from torch import nn

from convnext_deploy import api
from convnext_deploy.artifact import readback
from convnext_deploy.models.checkpoint import load
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.apply import QuantizedConvolution, QuantizedPatches
from convnext_deploy.records.plan import OperationPlan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(upernet(), tmp_path_factory.mktemp("upernet"))


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("zero_point", [0, 86])
def test_a_padded_convolution_is_a_product_over_patches(side: int, zero_point: int) -> None:
    """In the integers that both compute, so that they agree to the last roundings of float32."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 4, side, padding=side // 2).requires_grad_(False)
    weight = torch.randint(-127, 128, (4, 6 * side**2), generator=generator, dtype=torch.int8)
    scales, bias = torch.rand(4, generator=generator) / 100 + 1e-3, torch.randn(4, generator=generator)
    operation = OperationPlan(type="u8s8", scale=0.05, zero_point=zero_point)
    x = torch.randn(2, 6, 7, 9, generator=generator) * 3
    found = [kind(operation, weight, scales, bias, conv)(x) for kind in (QuantizedPatches, QuantizedConvolution)]
    whole = x.double().div(0.05).round().add(zero_point).clamp(0, 255).sub(zero_point).mul(0.05)
    kernel = (weight.double() * scales.double()[:, None]).reshape(4, side, side, 6).permute(0, 3, 1, 2)
    exact = nn.functional.conv2d(whole, kernel, bias.double(), padding=side // 2)
    for one in found:
        assert (one.double() - exact).norm() / exact.norm() < 1e-6


def test_every_convolution_of_the_head_but_those_of_pooled_maps_can_run_in_8_bits(checkpoint: str) -> None:
    model = load(checkpoint, task="segment").model
    head = [name for name in plans.products(model) if plans.kind_of(name) == plans.SEGMENTER]
    assert head == [
        "segmenter.bottleneck", "segmenter.laterals.0", "segmenter.laterals.1", "segmenter.laterals.2",
        "segmenter.smooths.0", "segmenter.smooths.1", "segmenter.smooths.2", "segmenter.fusion", "segmenter.classifier",
    ]  # fmt: skip
    assert {*head} < {*plans.operations(model)}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_plan_of_a_segmenter_is_built_and_verified(
    checkpoint: str, target: str, tmp_path: Path, need_format: Any
) -> None:
    need_format(target)
    made: Any = {"task": "segment", "calibration": "random", "images": 40, "target": target}
    plan = api.quantize(checkpoint, out=tmp_path / "plan.json", **made)
    found = api.export(
        checkpoint, task="segment", format=target, plan=tmp_path / "plan.json", out=tmp_path / "artifact", batch=2
    ).manifest
    assert found.export.quantization is not None
    assert found.export.quantization.operations == {"u8s8": len(plan.operations)}
    assert found.precision.quantized in (None, len(plan.operations))
    assert any(name.startswith("segmenter.") for name in plan.operations)


def test_a_relu_before_a_quantizer_from_0_on_may_be_left_out() -> None:
    quantizer = readback.Quantizer("a", 0.0, 1.0, 256)
    wanted: Any = {"tensors": (), "groups": (), "epsilons": (), "constants": frozenset(), "checksums": ()}
    expected = readback.Expected(activations=["relu", "relu"], quantizers=[(quantizer, frozenset())], **wanted)

    def failures(activations: list[str]) -> tuple[str, ...]:
        found = readback.Contents(tensors=(), activations=activations, quantizers=[quantizer])
        return readback.differences(found, expected).failures

    assert failures(["relu", "relu"]) == failures(["relu"]) == ()
    assert failures([]) == ("an activation is none, expected relu",)
