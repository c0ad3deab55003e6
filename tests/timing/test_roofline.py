"""The bound against counts taken from real modules: timm's for FLOPs, our own for what its operations move."""

import math
import time
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnext_deploy import api
from convnext_deploy.errors import UsageError
from convnext_deploy.models import convnext, registry
from convnext_deploy.native import library, peak
from convnext_deploy.native.packed import TYPES
from convnext_deploy.timing import roofline

NAMES = [name for name in registry.VARIANTS if not name.startswith("test")]
OPERATIONS = {
    convnext.Stem: "stem", convnext.Downsample: "downsample", convnext.DwconvNorm: "dwconv_norm",
    convnext.Expand: "expand", convnext.Project: "project", convnext.Head: "head",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts_in_timms_module(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert roofline.flop(registry.spec(name)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("convnext_tiny", {}),
        ("convnextv2_atto", {}),  # GRN stands between two operations and moves nothing of its own
        ("convnext_nano_ols", {}),  # a stem of two convolutions
        ("convnext_atto_ols", {"image_size": (64, 96)}),
        ("convnext_large_mlp", {"task": "embed"}),
        ("test_convnext3", {"in_chans": 1, "num_classes": 7}),
    ],
)
def test_elements_and_weights_are_those_that_go_through_our_module(name: str, overrides: Any) -> None:
    spec = registry.spec(name, **overrides)
    with torch.device("meta"):
        model = convnext.ConvNeXt(spec)
        images = torch.empty(1, spec.in_chans, *spec.image_size)
    moved: Counter[str] = Counter()

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        between = module.convs[0](inputs[0]).numel() if getattr(module, "convs", ())[1:] else 0
        moved[OPERATIONS[type(module)]] += sum(i.numel() for i in inputs) + output.numel() + 2 * between

    for module in model.modules():
        if type(module) in OPERATIONS:
            module.register_forward_hook(count)
    model(images)
    operations = list(roofline.operations(spec))
    counted: Counter[str] = Counter()
    for o in operations:
        counted[o.name] += o.count * (o.elements + o.operands)
    assert counted == moved
    weights = [p for n, p in model.named_parameters() if p.ndim > 1 and "grn" not in n]
    assert sum(o.count * o.weights for o in operations) == sum(p.numel() for p in weights)


def test_an_operation_takes_as_long_as_its_slowest_part() -> None:
    ceilings = roofline.DATA_SHEETS["h200"]
    rows = {(r.stage, r.operation): r for r in roofline.bound(registry.spec("convnext_tiny"), "bf16", 256, ceilings)}
    elements = 256 * 56 * 56 * 96
    expand, dwconv = rows["stage 1", "expand"], rows["stage 1", "dwconv_norm"]
    moved = 3 * 2 * (5 * elements + 4 * 96 * 96)  # three blocks, two bytes
    assert (expand.limit, dwconv.limit) == ("memory", "vector")
    assert math.isclose(expand.mb, moved / 1e6)
    assert math.isclose(expand.ms, moved / 4.8e12 * 1e3)
    assert math.isclose(dwconv.ms, 3 * 2 * 49 * elements / 67e12 * 1e3)
    last = rows["stage 4", "project"]
    assert last.limit == "matrix"
    assert math.isclose(last.ms, 3 * 2 * 256 * 49 * 4 * 768 * 768 / 989.5e12 * 1e3)


def test_weights_are_read_once_a_batch() -> None:
    spec, ceilings = registry.spec("convnext_base"), roofline.DATA_SHEETS["a100"]
    one, many = (sum(r.mb for r in roofline.bound(spec, "fp16", n, ceilings)) for n in (1, 64))
    weights = sum(o.count * o.weights for o in roofline.operations(spec)) * 2 / 1e6
    assert math.isclose(many, 64 * (one - weights) + weights)


def test_features_have_no_head() -> None:
    with_head, without = (
        {o.name for o in roofline.operations(registry.spec("convnext_atto", task=task))}
        for task in ("classify", "features")
    )
    assert with_head - without == {"head"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "v100"}, "device v100; expected one of this, this-gpu, a100, h100, h200"),
        ({"device": "a100", "precision": "fp8"}, r"precision fp8; expected one of fp32, tf32, fp16, bf16, int8"),
        ({"device": "a100", "batch": 0}, "batch 0"),
        ({"device": "a100", "image_size": (16, 224)}, "image size 16x224 pixels; expected at least 32"),
    ],
)
def test_what_has_no_bound_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        api.roofline("tiny", **arguments)


def test_a_product_that_is_naive_here_costs_a_moment_and_is_no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's int8 on x86 without VNNI: 0.15 s for a side of 512 and 9 s for one of 2048, four times over."""
    called = []

    def naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        called.append(len(a))
        time.sleep(0.15 * (len(a) / 128) ** 3)
        return a

    monkeypatch.setattr(torch, "_int_mm", naive)
    assert roofline._product_tflops("int8", "cpu") == 0
    assert set(called) == {roofline.TRIAL_SIDE}

    monkeypatch.setattr(roofline, "_native", lambda device, compile: False)
    monkeypatch.setattr(roofline, "SIDES", {"cpu": (256,)})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 20})
    said = []
    found = roofline.measure("cpu", 1, ["int8"], lambda done, total, what: said.append((done, total, what)))
    assert found.matrix_tflops.keys() == {"fp32"}
    assert [done for done, _, _ in said] == [0, 1, 2]
    assert {total for _, total, _ in said} == {3}


def test_no_ceiling_of_a_gpu_is_left_out_because_a_launch_takes_as_long_as_a_small_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "_product", lambda precision, side, device: side)
    monkeypatch.setattr(roofline, "_best_s", lambda side, device, seconds: 25e-6 + 2 * side**3 / 700e12)
    assert roofline._product_tflops("fp16", "cuda") > 600


def test_the_engines_own_products_are_a_ceiling_of_8_bits() -> None:
    rates = {type: peak.gmacs_per_s(type, 1, 0.05) for type in TYPES}
    assert all(0.25 < rate < 50_000 for rate in rates.values())
    with pytest.raises(UsageError, match="0 threads"):
        peak.gmacs_per_s("int8", 0, 0.1)
    with pytest.raises(UsageError, match="no path 'sse9'"):
        peak.gmacs_per_s("int8", 1, 0.1, "sse9")


@pytest.mark.parametrize(("built", "ceiling"), [(True, 2.0), (False, 1.0)])
def test_the_ceiling_of_fp32_is_the_engines_where_that_is_faster_and_built(
    built: bool, ceiling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Zen 5 PyTorch's product reaches less than half of it, and the engine's rows had 195 % of the bound."""
    monkeypatch.setattr(library, "is_built", lambda: built)
    monkeypatch.setattr(roofline, "_product_tflops", lambda name, device: 1.0)
    monkeypatch.setattr(roofline, "_native_tflops", lambda name, threads: 2.0)
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 20})
    found = roofline.measure("cpu", 1, ["fp32"])
    assert found.matrix_tflops == {"fp32": ceiling}
    assert ("engine" in found.source) == built


def test_this_machine_is_measured_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIDES", {"cpu": (64, 128)})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    before = torch.get_num_threads()
    result = api.roofline("atto", device="this", precision="int8", batch=2, threads=1)
    assert torch.get_num_threads() == before
    assert set(result.ceilings.matrix_tflops) == {"fp32", "bf16", "int8"}
    assert min(result.ceilings.matrix_tflops.values()) > 1e-4
    assert result.ceilings.vector_tflops == result.ceilings.matrix_tflops["fp32"]
    assert result.ceilings.copy_gb_s > 0.1
    assert result.machine is not None
    assert math.isclose(result.ms, sum(row.ms for row in result.rows))
    assert math.isclose(result.images_per_s, 2e3 / result.ms)
