"""Every rewrite beside the model before it, in float64, where nothing but a mistake can move an output by 1e-10."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from convnext_deploy.artifact.verify import TOLERANCES
from convnext_deploy.errors import PassError
from convnext_deploy.models import passes, registry
from convnext_deploy.models.convnext import ChannelNorm, ConvNeXt, Grn, Head
from convnext_deploy.models.parameters import random_model
from convnext_deploy.records.manifest import ModelSpec, Preprocessing

EXACT = 1e-10  # relative, float64
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SMALL: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 7, "image_size": (64, 64)}


def small(**fields: Any) -> ModelSpec:
    return ModelSpec(architecture="custom", **(SMALL | fields))


SPECS = {
    "V1": small(),
    "V2": small(grn=True, layer_scale=False),
    "GRN and layer scale": small(grn=True),
    "norm before pooling": small(head="norm_pool"),
    "hidden linear in the head": small(head_hidden=20),
    "RMSNorm": small(norm="rmsnorm"),
    "SimpleNorm": small(norm="simplenorm"),
    "overlapping stem": small(stem="overlap"),
    "tiered overlapping stem": small(stem="overlap_tiered", grn=True, layer_scale=False),
    "overlapping stem with activation": small(stem="overlap_act", norm="simplenorm", activation="silu"),
    "three kernel sizes": small(kernel_sizes=(7, 5, 5, 3), activation="gelu_tanh"),
    "embed": small(task="embed"),
    "embed with a hidden linear": small(task="embed", head_hidden=20),
    "features": small(task="features"),
    "one channel": small(in_chans=1),
}
FOLDS: dict[str, Callable[[ConvNeXt], None]] = {
    "fold_norm_affine": passes.fold_norm_affine,
    "fold_layer_scale": passes.fold_layer_scale,
    "fold_grn_bias": passes.fold_grn_bias,
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    found: ModelSpec = request.param
    return found


def images(spec: ModelSpec, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, spec.in_chans, *spec.image_size, generator=generator, dtype=torch.float64)


def pixels(spec: ModelSpec, batch: int = 2, seed: int = 2) -> np.ndarray:
    shape = (batch, *spec.image_size, spec.in_chans)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@torch.inference_mode()
def outputs(model: ConvNeXt, x: Tensor) -> tuple[Tensor, ...]:
    found = model(x)
    return (found,) if isinstance(found, Tensor) else found


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """||a - b|| / ||b||, the worst sample and output; written apart from the package's own."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        rows = zip(a.double().numpy(), b.double().numpy(), strict=True)
        worst = max(worst, *(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in rows))
    return worst


def preprocessing(spec: ModelSpec) -> Preprocessing:
    if spec.in_chans == 3:
        return IMAGENET
    return Preprocessing(mean=(0.4,) * spec.in_chans, std=(0.3,) * spec.in_chans)


def normalized(raw: np.ndarray, facts: Preprocessing) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float64, by the definition."""
    x = (raw.astype(np.float64) / 255 - np.array(facts.mean)) / np.array(facts.std)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


# Folding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS.keys())
def test_a_fold_alone_does_not_move_the_outputs(fold: Callable[[ConvNeXt], None], spec: ModelSpec) -> None:
    model, x = random_model(spec).double(), images(spec)
    before = outputs(model, x)
    fold(model)
    assert difference(outputs(model, x), before) <= EXACT


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_all_folds_in_any_order_do_not_move_the_outputs(order: tuple[int, ...], spec: ModelSpec) -> None:
    model, x = random_model(spec).double(), images(spec)
    before = outputs(model, x)
    for index in order:
        list(FOLDS.values())[index](model)
    assert difference(outputs(model, x), before) <= EXACT


def test_folding_twice_is_folding_once(spec: ModelSpec) -> None:
    model = random_model(spec).double()
    for fold in FOLDS.values():
        fold(model)
    once = {name: value.clone() for name, value in model.state_dict().items()}
    for fold in FOLDS.values():
        fold(model)
    twice = model.state_dict()
    assert twice.keys() == once.keys()
    assert all(torch.equal(twice[name], value) for name, value in once.items())


def test_folded_parameters_are_gone(spec: ModelSpec) -> None:
    model = random_model(spec).double()
    for fold in FOLDS.values():
        fold(model)
    left = set(model.state_dict())
    assert not [name for name in left if name.endswith("layer_scale") or name.endswith("grn.bias")]
    norms = {name for name in left if ".norm." in name}
    kept = {"stem.norm.weight", "stem.norm.bias"}
    if spec.task == "embed" and spec.head_hidden is None:
        kept |= {"head.norm.weight", "head.norm.bias"}  # nothing follows it
    if spec.norm != "layernorm":
        kept = {name for name in kept if not name.endswith("bias")}
    assert norms == kept
    assert any(name.endswith("grn.weight") for name in left) == spec.grn  # not linear in anything: stays


# Preprocessing -------------------------------------------------------------------------------------------------------


def test_raw_pixels_give_what_normalized_pixels_gave(spec: ModelSpec) -> None:
    model, raw, facts = random_model(spec).double(), pixels(spec), preprocessing(spec)
    expected = outputs(model, normalized(raw, facts))
    passes.fold_preprocessing(model, facts)
    assert difference(outputs(model, torch.from_numpy(raw)), expected) <= EXACT


@pytest.mark.parametrize("stem", ["patch", "overlap", "overlap_tiered", "overlap_act"])
def test_border_pixels_are_padded_with_the_average_image(stem: str) -> None:
    """A mean that is folded into the bias would be wrong there and only there: zero padding means "average"."""
    spec = small(stem=stem, task="features")
    model, raw = random_model(spec).double(), pixels(spec)
    expected = outputs(model, normalized(raw, IMAGENET))[0].numpy()  # (N, C, H/4, W/4)
    passes.fold_preprocessing(model, IMAGENET)
    found = outputs(model, torch.from_numpy(raw))[0].numpy()
    for edge in (np.s_[:, :, 0], np.s_[:, :, -1], np.s_[:, :, :, 0], np.s_[:, :, :, -1]):
        assert np.abs(found[edge] - expected[edge]).max() <= EXACT * np.abs(expected).max()


def test_a_patch_stem_takes_the_mean_into_its_bias() -> None:
    model = random_model(SPECS["V1"])
    passes.fold_preprocessing(model, IMAGENET)
    assert model.stem.input_mean is None
    assert "stem.input_mean" not in model.state_dict()


kinds = st.fixed_dictionaries(
    {
        "depths": st.tuples(*[st.integers(1, 2)] * 4),
        "dims": st.tuples(*[st.sampled_from((4, 8, 12, 20))] * 4),
        "kernel_sizes": st.tuples(*[st.sampled_from((3, 5, 7))] * 4),
        "stem": st.sampled_from(("patch", "overlap", "overlap_tiered", "overlap_act")),
        "norm": st.sampled_from(("layernorm", "rmsnorm", "simplenorm")),
        "activation": st.sampled_from(("gelu", "gelu_tanh", "silu")),
        "layer_scale": st.booleans(),
        "grn": st.booleans(),
        "head": st.sampled_from(("pool_norm", "norm_pool")),
        "head_hidden": st.sampled_from((None, 6)),
        "num_classes": st.integers(2, 5),
        "in_chans": st.integers(1, 4),
        "task": st.sampled_from(("classify", "embed", "features")),
        "image_size": st.tuples(*[st.sampled_from((32, 64, 96))] * 2),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fields=kinds, seed=st.integers(0, 2**31), data=st.data())
def test_every_member_of_the_family_folds_exactly(fields: dict[str, Any], seed: int, data: st.DataObject) -> None:
    spec = small(**fields)
    channels = st.tuples(*[st.floats(0.05, 0.95)] * spec.in_chans)
    facts = Preprocessing(mean=data.draw(channels), std=data.draw(channels))
    model, raw = random_model(spec, seed).double(), pixels(spec, 1, seed)
    expected = outputs(model, normalized(raw, facts))
    for fold in FOLDS.values():
        fold(model)
    passes.fold_preprocessing(model, facts)
    assert difference(outputs(model, torch.from_numpy(raw)), expected) <= EXACT


# fold: all of them, checked ------------------------------------------------------------------------------------------


def run_fold(model: ConvNeXt, uint8: Preprocessing | None = None) -> tuple[Any, ...]:
    raw = pixels(model.spec)
    floats = normalized(raw, IMAGENET).float()
    return passes.fold(model, uint8, lambda m: outputs(m, torch.from_numpy(raw) if m.takes_uint8 else floats))


@pytest.mark.parametrize(
    ("kind", "uint8", "names"),
    [
        ("V1", None, ["fold_norm_affine", "fold_layer_scale"]),
        ("V2", None, ["fold_norm_affine", "fold_grn_bias"]),
        ("V2", IMAGENET, ["fold_norm_affine", "fold_grn_bias", "fold_preprocessing"]),
    ],
)
def test_fold_records_each_pass_that_applies(kind: str, uint8: Preprocessing | None, names: list[str]) -> None:
    records = run_fold(random_model(SPECS[kind]), uint8)
    assert [record.name for record in records] == names
    assert all(0 < record.relative_change < 1e-5 for record in records)  # fp32 rounding, and not nothing


@pytest.mark.parametrize("name", ["fold_norm_affine", "fold_layer_scale", "fold_grn_bias", "fold_preprocessing"])
def test_a_wrong_pass_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(passes, name)

    def wrong(model: ConvNeXt, *arguments: Any) -> None:
        right(model, *arguments)
        model.get_parameter("stages.1.1.project.linear.bias").mul_(1.05)

    monkeypatch.setattr(passes, name, wrong)
    with pytest.raises(PassError, match=rf"^{name} moved the outputs by [\d.e-]+ \(relative\), above 0\.0001"):
        run_fold(random_model(SPECS["GRN and layer scale"]), IMAGENET)


def test_a_pass_that_makes_outputs_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ConvNeXt) -> None:
        model.get_parameter("head.classifier.bias")[0] = float("nan")

    monkeypatch.setattr(passes, "fold_layer_scale", wrong)
    with pytest.raises(PassError, match="the outputs are NaN or infinite after fold_layer_scale"):
        run_fold(random_model(SPECS["V1"]))


@pytest.mark.parametrize(
    ("missing", "present"),
    [("bias", "weight"), ("weight", "bias")],  # each half of the affine map has its own line in the fold
)
def test_dropping_half_of_an_affine_norm_is_noticed(missing: str, present: str, monkeypatch: Any) -> None:
    right = passes._fold_affine

    def wrong(norm: ChannelNorm, follower: Any) -> None:
        with torch.no_grad():
            getattr(norm, missing).fill_(0.0 if missing == "bias" else 1.0)
        right(norm, follower)

    monkeypatch.setattr(passes, "_fold_affine", wrong)
    with pytest.raises(PassError, match="fold_norm_affine"):
        run_fold(random_model(SPECS["V1"]))


# Half precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_casting_keeps_the_norm_of_the_pooled_vector_in_fp32(precision: str, spec: ModelSpec) -> None:
    model = random_model(spec)
    passes.cast_parameters(model, precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for name, parameter in model.named_parameters():
        pooled = name.startswith("head.norm.") and spec.head == "pool_norm"
        assert parameter.dtype == (torch.float32 if pooled else dtype), name


def test_casting_casts_the_mean_of_an_overlapping_stem_too() -> None:
    model = random_model(SPECS["overlapping stem"])
    passes.fold_preprocessing(model, IMAGENET)
    passes.cast_parameters(model, "fp16")
    assert model.stem.input_mean is not None
    assert model.stem.input_mean.dtype == torch.float16


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf"), float("nan")])
def test_a_weight_that_fp16_cannot_hold_is_refused_by_name(value: float) -> None:
    model = random_model(SPECS["V1"])
    name = "stages.1.1.expand.linear.weight"
    model.get_parameter(name).view(-1)[5] = value
    with pytest.raises(PassError, match=rf"^{name} reaches .*above fp16's 6\.55e\+04; use bf16 or fp32$"):
        passes.cast_parameters(model, "fp16")


def test_the_largest_fp16_number_is_accepted() -> None:
    model = random_model(SPECS["V1"])
    model.get_parameter("stages.1.1.expand.linear.weight").view(-1)[5] = 65504.0
    passes.cast_parameters(model, "fp16")
    assert model.get_parameter("stages.1.1.expand.linear.weight").view(-1)[5].item() == 65504.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["test_convnext", "test_convnext3", "convnext_atto", "convnextv2_atto"])
def test_half_precision_stays_within_its_tolerance_of_float64(name: str, precision: str) -> None:
    spec = registry.spec(name, num_classes=10, image_size=(64, 64))
    x = images(spec, 4)
    expected = outputs(random_model(spec).double(), x)
    model = random_model(spec)
    for fold in FOLDS.values():
        fold(model)
    passes.cast_parameters(model, precision)
    found = outputs(model, x.float())
    assert found[0].dtype == torch.float32
    error = difference(found, expected)
    assert 1e-5 < error <= TOLERANCES[precision].relative_error  # it is half precision, and no worse


def test_grn_sums_squares_beyond_the_range_of_fp16() -> None:
    """60 x 80 positions of about 200: each sum of squares is 2e8, and fp16 ends at 65504."""
    generator = torch.Generator().manual_seed(0)
    x = 200 * torch.randn(1, 60, 80, 32, generator=generator, dtype=torch.float64)
    grn = Grn(32)
    torch.nn.init.normal_(grn.weight, generator=generator)
    torch.nn.init.normal_(grn.bias, generator=generator)
    norm = np.sqrt((x.numpy() ** 2).sum((1, 2), keepdims=True))
    weight, bias = (p.detach().half().double().numpy() for p in (grn.weight, grn.bias))
    expected = x.half().double().numpy() * (1 + weight * norm / (norm.mean(-1, keepdims=True) + 1e-6)) + bias
    assert not torch.isfinite(x.half().square().sum((1, 2))).all()  # what it would be without the care
    found = grn.half().requires_grad_(False)(x.half())
    assert torch.isfinite(found).all()
    assert np.linalg.norm(found.double().numpy() - expected) <= 2e-3 * np.linalg.norm(expected)


def test_a_v2_model_with_large_activations_stays_finite_in_fp16() -> None:
    spec = small(grn=True, layer_scale=False, image_size=(192, 320))
    model = random_model(spec)
    with torch.no_grad():
        for block in passes.blocks(model):
            block.expand.linear.weight.mul_(200)
            block.project.linear.weight.div_(200)
    x = images(spec, 1)
    expected = outputs(copy.deepcopy(model).double(), x)
    passes.cast_parameters(model, "fp16")
    largest: list[float] = []
    model.stages[0][0].expand.register_forward_hook(lambda m, i, o: largest.append(float(o.float().square().sum())))
    found = outputs(model, x.float())
    assert largest[0] / (4 * spec.dims[0]) > 65504  # the mean channel's sum of squares: the case is the one meant
    assert torch.isfinite(found[0]).all()
    assert difference(found, expected) <= TOLERANCES["fp16"].relative_error


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "simplenorm"])
def test_a_norm_of_values_around_1000_is_right_in_fp16(kind: Any) -> None:
    """Squares are 1e6 there, so that their sum and even one of them overflow fp16."""
    generator = torch.Generator().manual_seed(3)
    x = (1000 + 100 * torch.randn(4, 64, generator=generator)).half()
    norm = ChannelNorm(kind, 64, 1e-6).half().requires_grad_(False)
    wide = x.double().numpy()
    centred = wide - wide.mean(-1, keepdims=True)
    if kind == "layernorm":
        expected = centred / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    elif kind == "rmsnorm":
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    else:
        expected = wide / np.sqrt(wide.var(-1, ddof=1, keepdims=True) + 1e-6)
    found = norm(x).double().numpy()
    assert np.abs(found - expected).max() <= 2**-10 * np.abs(expected).max()


@pytest.mark.parametrize("head", ["pool_norm", "norm_pool"])
def test_pooling_large_values_does_not_overflow_fp16(head: Any) -> None:
    """16 x 16 positions of 30000 add up to 7.7e6."""
    spec = small(head=head, task="embed")
    pool = Head(spec).half().requires_grad_(False)
    if head == "pool_norm":
        pool.norm.float()
    generator = torch.Generator().manual_seed(4)
    x = (30000 + 500 * torch.randn(2, 16, 16, 32, generator=generator)).half()
    x[..., ::2] /= 2
    wide = x.double().numpy()

    def norm(v: np.ndarray) -> np.ndarray:
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    expected = norm(wide.mean((1, 2))) if head == "pool_norm" else norm(wide).mean((1, 2))
    found = pool(x)
    assert found.dtype == torch.float32
    assert np.abs(found.double().numpy() - expected).max() <= 2e-3
