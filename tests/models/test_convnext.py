"""Our module beside timm's, with the same random parameters, for every published architecture.

The parameters are drawn so that each of them matters (`test_every_parameter_of_the_reference_matters`): timm's own
initialisation leaves layer scale at 1e-6 and norms and GRN at identity, where a wrong conversion would not show.
"""

import math
import re
from typing import Any

import msgspec
import pytest
import timm
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from references import TOLERANCE, randomize_, relative_error
from timm.layers import make_divisible
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_deploy.models import registry
from convnext_deploy.models.architecture import spec_of
from convnext_deploy.models.convnext import ConvNeXt, tiered_width
from convnext_deploy.models.costs import multiply_accumulates
from convnext_deploy.models.layouts import convert
from convnext_deploy.models.parameters import filled
from convnext_deploy.records.base import Task

TOLERANCE_FP64 = 1e-11  # tight enough to see an epsilon of 1e-6 where the reference has 1e-5 or 1e-12

HUGE = {
    "convnext_large",
    "convnext_large_mlp",
    "convnext_xlarge",
    "convnext_xxlarge",
    "convnextv2_large",
    "convnextv2_huge",
}
ARCHITECTURES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in HUGE else [], id=name) for name in sorted(registry.VARIANTS)
]
FAMILIES = [
    pytest.param("test_convnext", id="V1, tanh GELU, eps 1e-5"),
    pytest.param("test_convnext3", id="three kernel sizes, SiLU"),
    pytest.param("convnext_atto", id="V1, 1x1 convolutions"),
    pytest.param("convnext_atto_ols", id="tiered overlapping stem"),
    pytest.param("convnext_nano_ols", id="overlapping stem"),
    pytest.param("convnext_zepto_rms_ols", id="SimpleNorm, stem with activation"),
    pytest.param("convnext_atto_rms", id="RMSNorm"),
    pytest.param("convnext_tiny_hnf", id="norm before pooling"),
    pytest.param("convnextv2_atto", id="V2, GRN"),
]

# Of the families whose smallest published variant is not small, a member of ours.
SMALL = {
    "convnext_tiny_hnf": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 64)},
    "convnext_nano_ols": {"depths": (1, 1, 2, 1), "dims": (24, 32, 40, 64)},
}


def timm_model(name: str, seed: int = 0, **arguments: Any) -> Any:
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    return randomize_(model.to_empty(device="cpu"), seed)


def small_model(name: str, **arguments: Any) -> Any:
    return timm_model(name, **{**SMALL.get(name, {}), **arguments})


def ours(reference: nn.Module, task: Task = "classify", variant: str | None = None) -> ConvNeXt:
    converted = convert(reference.state_dict(), "timm")
    spec = spec_of(converted, variant, "timm")
    return filled(msgspec.structs.replace(spec, task=task), converted, "timm")


def images(batch: int, channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_logits_equal_timm(name: str) -> None:
    reference = timm_model(name)
    batch = 1 if name in HUGE else 2
    x = images(batch, 3, 64, 64)
    expected = reference(x)
    assert relative_error(ours(reference)(x), expected) <= TOLERANCE
    assert expected.std() > 0.05  # the comparison is of numbers, not of zeros


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_the_reference_matters(name: str) -> None:
    """A parameter that does not move the logits could be converted wrongly without any test seeing it."""
    reference = small_model(name).double().requires_grad_(True)
    logits = reference(images(2, 3, 64, 64).double())
    torch.manual_seed(0)
    (logits * torch.randn_like(logits)).sum().backward()
    sensitivity = {
        key: float((p.grad * p.detach()).norm()) for key, p in reference.named_parameters() if p.grad is not None
    }
    assert sensitivity.keys() == dict(reference.named_parameters()).keys()
    least = min(sensitivity, key=sensitivity.__getitem__)
    assert sensitivity[least] > 1e-3 * math.sqrt(logits.shape[1]), least


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_float64_logits_equal_timm_to_rounding(name: str) -> None:
    reference = small_model(name).double()
    model = ours(reference).double()
    model.load_state_dict(convert_names(reference, model))
    x = images(2, 3, 64, 96).double()
    logits = model(x)
    assert logits.dtype == torch.float64
    assert relative_error(logits, reference(x)) <= TOLERANCE_FP64


def convert_names(reference: nn.Module, model: ConvNeXt) -> dict[str, Tensor]:
    """The reference's float64 tensors under our names; `filled` would round them to float32."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return {key: value.reshape(shapes[key]) for key, value in convert(reference.state_dict(), "timm").tensors.items()}


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_float32_is_as_near_to_float64_as_timm_is(name: str) -> None:
    reference = small_model(name)
    model = ours(reference)
    x = images(2, 3, 64, 64)
    result, theirs = model(x), reference(x)
    truth = reference.double()(x.double())
    assert result.dtype == torch.float32
    assert relative_error(result, truth) <= max(4 * relative_error(theirs, truth), 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_images_need_not_be_square(name: str) -> None:
    reference = small_model(name)
    x = images(2, 3, 96, 160)
    assert relative_error(ours(reference)(x), reference(x)) <= TOLERANCE


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(0, id="no image"),
        pytest.param(1, id="one image"),
        pytest.param(5, id="odd number of images"),
    ],
)
@torch.inference_mode()
def test_any_batch_size_gives_the_logits_of_timm(batch: int) -> None:
    reference = timm_model("convnextv2_atto", num_classes=7)
    x = images(batch, 3, 64, 32)
    result = ours(reference)(x)
    assert result.shape == (batch, 7)
    if batch:
        assert relative_error(result, reference(x)) <= TOLERANCE


@torch.inference_mode()
def test_the_memory_layout_of_images_does_not_matter() -> None:
    reference = timm_model("convnext_atto")
    x = images(2, 3, 64, 64)
    expected = reference(x)
    model = ours(reference)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    for variant in (x.contiguous(memory_format=torch.channels_last), strided):
        assert not variant.is_contiguous()
        before = variant.clone()
        assert relative_error(model(variant), expected) <= TOLERANCE
        assert torch.equal(variant, before)


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("convnext_large_mlp", marks=pytest.mark.slow, id="mlp")])
@torch.inference_mode()
def test_embeddings_equal_timm_before_the_classifier(name: str) -> None:
    reference = small_model(name)
    x = images(2, 3, 64, 64)
    expected = reference.forward_head(reference.forward_features(x), pre_logits=True)
    result = ours(reference, "embed")(x)
    assert result.shape == (2, reference.head_hidden_size)
    assert relative_error(result, expected) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_feature_maps_equal_timm(name: str) -> None:
    reference = small_model(name)
    backbone = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3), **SMALL.get(name, {})).eval()
    state = {re.sub(r"^(stem|stages)\.", r"\1_", key): value for key, value in reference.state_dict().items()}
    backbone.load_state_dict({key: value for key, value in state.items() if not key.startswith(("head.", "norm_pre."))})
    x = images(2, 3, 64, 96)
    expected = backbone(x)
    result = ours(reference, "features")(x)
    assert isinstance(result, tuple)
    assert [tuple(m.shape[2:]) for m in result] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for ours_map, their_map in zip(result, expected, strict=True):
        assert relative_error(ours_map, their_map) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("num_classes", "in_chans"),
    [
        pytest.param(7, 3, id="seven classes"),
        pytest.param(1, 3, id="one class"),
        pytest.param(1000, 1, id="grey images"),
        pytest.param(10, 4, id="four channels"),
    ],
)
@torch.inference_mode()
def test_other_classes_and_channels_equal_timm(name: str, num_classes: int, in_chans: int) -> None:
    reference = small_model(name, num_classes=num_classes, in_chans=in_chans)
    x = images(2, in_chans, 32, 64)
    result = ours(reference)(x)
    assert result.shape == (2, num_classes)
    expected = reference(x)
    if num_classes == 1:  # one number a sample, which may be near zero: the norm is taken over the batch
        result, expected = result.flatten()[None], expected.flatten()[None]
    assert relative_error(result, expected) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_model_without_classifier_gives_the_embedding(name: str) -> None:
    reference = small_model(name, num_classes=0)
    x = images(2, 3, 64, 64)
    assert relative_error(ours(reference, "embed")(x), reference(x)) <= TOLERANCE


def test_the_width_between_tiered_convolutions_is_that_of_timm() -> None:
    assert [tiered_width(width) for width in range(8, 1025)] == [make_divisible(w // 2) for w in range(8, 1025)]


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("convnext_large_mlp", id="hidden layer in the head")])
@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
def test_the_count_of_operations_is_that_of_torchs_counter(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        reference = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            reference(torch.empty(1, 3, *size))
    counts = multiply_accumulates(registry.spec(name, image_size=size))
    assert 2 * sum(counts.values()) == counter.get_total_flops()
    with torch.device("meta"):
        assert counts.keys() <= dict(ConvNeXt(registry.spec(name)).named_parameters()).keys()


WIDTHS = st.sampled_from([8, 16, 24, 40, 48])


@st.composite
def timm_settings(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of timm's ConvNeXt within what a file of its tensors alone can tell: LayerNorm, exact GELU."""
    first = draw(WIDTHS)
    grn, norm_first = draw(st.booleans()), draw(st.booleans())
    return {
        "depths": tuple(draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))),
        # timm leaves a downsampling out of no stage but the first, so that widths may repeat
        "dims": (first, *draw(st.lists(WIDTHS, min_size=3, max_size=3))),
        "kernel_sizes": tuple(draw(st.lists(st.sampled_from([1, 3, 5, 7, 9]), min_size=4, max_size=4))),
        "stem_type": draw(st.sampled_from(["patch", "overlap", "overlap_tiered", "overlap_act"])),
        "use_grn": grn,
        "ls_init_value": 1e-6 if draw(st.booleans()) else None,
        "conv_mlp": draw(st.booleans()),
        "head_norm_first": norm_first,
        "head_hidden_size": None if norm_first else draw(st.none() | st.integers(1, 40)),
        "num_classes": draw(st.integers(2, 9)),
        "in_chans": draw(st.integers(1, 5)),
    }


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=timm_settings(), seed=st.integers(0, 2**31), height=st.sampled_from([32, 64]))
def test_any_small_architecture_equals_timm(arguments: dict[str, object], seed: int, height: int) -> None:
    with torch.device("meta"):
        reference = TimmConvNeXt(**arguments)
    reference = randomize_(reference.to_empty(device="cpu"), seed)
    converted = convert(reference.state_dict(), "timm")
    assume(not registry.recognise(converted.visible, norm_bias=True))
    spec = spec_of(converted, None, "timm")
    assert spec.architecture == "custom"
    assert spec.depths == arguments["depths"]
    assert spec.dims == arguments["dims"]
    assert spec.kernel_sizes == arguments["kernel_sizes"]
    assert spec.head_hidden == arguments["head_hidden_size"]
    assert (spec.grn, spec.layer_scale) == (arguments["use_grn"], arguments["ls_init_value"] is not None)
    x = images(2, spec.in_chans, height, 64, seed=seed ^ 1)
    with torch.inference_mode():
        assert relative_error(filled(spec, converted, "timm")(x), reference(x)) <= TOLERANCE


NORMS = {"layernorm": "convnext_atto", "rmsnorm": "convnext_atto_rms", "simplenorm": "convnext_zepto_rms"}


@pytest.mark.parametrize("norm", sorted(NORMS))
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_any_parameters_of_any_norm_equal_timm(norm: str, seed: int, scale: float) -> None:
    """Images of every contrast: at 1e-3 the epsilons count, at 30 they do not."""
    reference = timm_model(NORMS[norm], seed, num_classes=10)
    assert registry.spec(NORMS[norm]).norm == norm
    x = scale * images(2, 3, 32, 32, seed=seed)
    with torch.inference_mode():
        assert relative_error(ours(reference)(x), reference(x)) <= TOLERANCE
