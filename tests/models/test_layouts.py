"""Every published key layout beside the code it comes from: transformers, torchvision, open_clip, the official one.

Layouts of backbones, and those of DINOv3, are in `test_backbones`.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import Clip, clip, mmpretrain, torchvision_model, transformers_model
from references import DEPTHS, DIMS, TOLERANCE, Official, State, empty, images, randomize_, relative_error
from torch import Tensor, nn

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import registry
from convnext_deploy.models.architecture import spec_of
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.layouts import convert
from convnext_deploy.models.names import LAYOUTS
from convnext_deploy.models.parameters import filled
from convnext_deploy.records.base import Task


def ours(state: State, task: Task = "classify", prefix: str | None = None) -> ConvNeXt:
    converted = convert(state, "a.pth", prefix)
    return filled(msgspec.structs.replace(spec_of(converted, None, "a.pth"), task=task), converted, "a.pth")


def refusal(state: State, prefix: str | None = None) -> str:
    """The one line that converting and filling ends with, or nothing. Any other exception comes through."""
    message = ""
    try:
        ours(state, prefix=prefix)
    except WeightsError as error:
        message = str(error)
    assert "\n" not in message
    return message


# The official layout -------------------------------------------------------------------------------------------------


def official(v2: bool = False, seed: int = 0, **arguments: int) -> nn.Module:
    return randomize_(empty(lambda: Official(DEPTHS, DIMS, v2, **arguments)), seed)


V1_AND_V2 = pytest.mark.parametrize("v2", [pytest.param(False, id="V1"), pytest.param(True, id="V2")])


@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "convnextv2_atto", "convnextv2_nano", pytest.param("convnext_base", marks=pytest.mark.slow)],
)
@torch.inference_mode()
def test_an_official_checkpoint_equals_the_paper(name: str) -> None:
    spec = registry.spec(name)
    reference: Any = randomize_(empty(lambda: Official(spec.depths, spec.dims, spec.grn)))
    converted = convert(reference.state_dict(), "a.pth")
    assert converted.layout == "official"
    assert spec_of(converted, None, "a.pth") == spec
    assert relative_error(ours(reference.state_dict())(images()), reference(images())) <= TOLERANCE


@V1_AND_V2
@torch.inference_mode()
def test_custom_widths_classes_and_channels_equal_the_paper(v2: bool) -> None:
    reference = official(v2, classes=7, chans=4)
    model = ours(reference.state_dict())
    assert (model.spec.architecture, model.spec.num_classes, model.spec.in_chans) == ("custom", 7, 4)
    x = images(channels=4)
    assert relative_error(model(x), reference(x)) <= TOLERANCE


@V1_AND_V2
def test_the_paper_as_written_here_equals_timm(v2: bool) -> None:
    """The rewrite above is itself held against timm, through timm's own conversion of official checkpoints."""
    from timm.models.convnext import ConvNeXt as TimmConvNeXt
    from timm.models.convnext import checkpoint_filter_fn

    reference = official(v2, classes=9)
    theirs = TimmConvNeXt(
        depths=DEPTHS, dims=DIMS, num_classes=9, use_grn=v2, ls_init_value=None if v2 else 1.0
    ).eval()  # fmt: skip
    theirs.load_state_dict(checkpoint_filter_fn(reference.state_dict(), theirs))
    with torch.inference_mode():
        assert relative_error(reference(images()), theirs(images())) <= TOLERANCE


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param("module.", id="DataParallel"),
        pytest.param("model.", id="Lightning"),
        pytest.param("_orig_mod.", id="torch.compile"),
        pytest.param("backbone.", id="detector"),
        pytest.param("module._orig_mod.", id="compiled and distributed"),
        pytest.param("model.encoder.net.", id="nested"),
    ],
)
@pytest.mark.parametrize("layout", ["official", "timm", "torchvision", "transformers", "open_clip"])
@torch.inference_mode()
def test_a_prefix_is_taken_off(layout: str, prefix: str) -> None:
    reference, state = small_of(layout)
    converted = convert({prefix + key: value for key, value in state.items()}, "a.pth")
    assert converted.layout == layout
    spec = spec_of(converted, None, "a.pth")
    model = filled(spec, converted, "a.pth")
    assert relative_error(model(images()), reference(images())) <= TOLERANCE


@V1_AND_V2
def test_a_decode_head_beside_the_backbone_is_refused_until_the_backbone_is_chosen(v2: bool) -> None:
    reference = official(v2)
    state = {f"backbone.{key}": value for key, value in reference.state_dict().items()}
    state |= {"decode_head.conv_seg.weight": torch.zeros(19, 8, 1, 1), "decode_head.conv_seg.bias": torch.zeros(19)}
    with pytest.raises(WeightsError) as caught:
        convert(state, "a.pth")
    assert "decode_head.conv_seg.weight, decode_head.conv_seg.bias" in str(caught.value)
    assert "--weights-key" in str(caught.value)
    with torch.inference_mode():
        for key in ("backbone.", "backbone"):
            result = ours(state, prefix=key)(images())
            assert relative_error(result, reference(images())) <= TOLERANCE


@torch.inference_mode()
def test_of_two_models_in_one_file_one_must_be_chosen() -> None:
    teacher, student = official(seed=1), official(seed=2)
    state = {f"teacher.{key}": value for key, value in teacher.state_dict().items()}
    state |= {f"student.{key}": value for key, value in student.state_dict().items()}
    with pytest.raises(
        WeightsError,
        match=r"a\.pth has 2 ConvNeXts, below 'student\.' \(74 of 148 keys\), 'teacher\.' .*--weights-key",
    ):
        convert(state, "a.pth")
    for name, reference in (("teacher.", teacher), ("student.", student)):
        assert relative_error(ours(state, prefix=name)(images()), reference(images())) <= TOLERANCE


def test_two_layouts_in_one_file_are_refused() -> None:
    state = {f"a.{key}": value for key, value in official().state_dict().items()}
    state |= {f"b.{key}": value for key, value in small_of("torchvision")[1].items()}
    with pytest.raises(WeightsError, match=r"keys that ConvNeXt does not: b\.features\.0\.0\.weight"):
        convert(state, "a.pth")


# transformers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto", "convnextv2_nano"])
@torch.inference_mode()
def test_a_transformers_checkpoint_equals_transformers(name: str) -> None:
    spec = registry.spec(name)
    reference: Any = randomize_(transformers_model(spec.grn, spec.depths, spec.dims))
    model = ours(reference.state_dict())
    assert convert(reference.state_dict(), "").layout == "transformers"
    assert model.spec.architecture == name
    assert relative_error(model(images()), reference(images()).logits) <= TOLERANCE


@V1_AND_V2
@torch.inference_mode()
def test_the_last_norm_of_transformers_has_its_own_epsilon(v2: bool) -> None:
    """1e-12 there and 1e-6 elsewhere. Only float64 shows it, and features as small as the epsilon."""
    reference: Any = randomize_(transformers_model(v2)).double()
    assert reference.config.layer_norm_eps == 1e-12
    body = reference.base_model
    for stage in body.encoder.stages:  # all that reaches the last norm, a thousandth as large
        for layer in stage.layers:
            for parameter in layer.pwconv2.parameters():
                parameter.mul_(1e-3)
        for parameter in stage.downsampling_layer.parameters():
            parameter.mul_(1e-3)
    state = reference.state_dict()
    converted = convert(state, "a.pth")
    model = filled(spec_of(converted, None, "a.pth"), converted, "a.pth").double()
    model.load_state_dict({key: converted.tensors[key].reshape(v.shape) for key, v in model.state_dict().items()})
    x = images().double()
    expected = reference(x).logits
    assert relative_error(model(x), expected) <= 1e-9
    body.layernorm.eps = 1e-6
    assert relative_error(reference(x).logits, expected) > 1e-3  # the test would see the wrong one


@V1_AND_V2
@torch.inference_mode()
def test_transformers_without_a_classifier_gives_its_pooled_output(v2: bool) -> None:
    reference: Any = randomize_(transformers_model(v2)).base_model
    assert (
        relative_error(ours(reference.state_dict(), "embed")(images()), reference(images()).pooler_output) <= TOLERANCE
    )


@pytest.mark.parametrize("layout", ["transformers", "torchvision", "official"])
@torch.inference_mode()
def test_widths_of_a_timm_test_model_do_not_bring_its_activation(layout: str) -> None:
    """test_convnext2 has tanh GELU and 1e-5; code that knows neither cannot have made such a checkpoint."""
    depths, dims = (1, 1, 1, 1), (32, 64, 96, 128)
    reference, state = small_of(layout, depths, dims)
    model = ours(state)
    assert (model.spec.architecture, model.spec.activation, model.spec.norm_eps) == ("custom", "gelu", 1e-6)
    assert relative_error(model(images()), reference(images())) <= TOLERANCE
    with pytest.raises(WeightsError, match="is not a test_convnext2: its activation is gelu, expected gelu_tanh"):
        spec_of(convert(state, "a.pth"), "test_convnext2", "a.pth")


# torchvision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    ["tiny", "small", pytest.param("base", marks=pytest.mark.slow), pytest.param("large", marks=pytest.mark.slow)],
)
@torch.inference_mode()
def test_a_torchvision_checkpoint_equals_torchvision(size: str) -> None:
    reference: Any = randomize_(empty(lambda: getattr(torchvision.models, f"convnext_{size}")()))
    model = ours(reference.state_dict())
    assert convert(reference.state_dict(), "").layout == "torchvision"
    assert model.spec == registry.spec(f"convnext_{size}")
    assert relative_error(model(images()), reference(images())) <= TOLERANCE


# open_clip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", [pytest.param(None, id="linear"), pytest.param(48, id="mlp")])
@torch.inference_mode()
def test_an_open_clip_image_tower_gives_its_projection(mlp: int | None) -> None:
    reference = clip(mlp)
    converted = convert(reference.state_dict(), "a.pth")
    assert converted.layout == "open_clip"
    model = ours(reference.state_dict())
    assert model.spec.num_classes == 24
    assert model.spec.head_hidden == mlp
    assert relative_error(model(images()), reference(images())) <= TOLERANCE
    if mlp is None:
        embedded = ours(reference.state_dict(), "embed")(images())
        assert relative_error(embedded, reference.visual.trunk(images())) <= TOLERANCE


def test_an_open_clip_tower_has_the_variant_of_its_trunk() -> None:
    with torch.device("meta"):
        assert spec_of(convert(Clip("convnext_base", None, 1024, 640).state_dict(), ""), None, "") == registry.spec(
            "convnext_base", num_classes=640
        )
        assert spec_of(convert(Clip("convnext_large", 1536, 1536, 768).state_dict(), ""), None, "") == registry.spec(
            "convnext_large_mlp", num_classes=768
        )
        assert spec_of(convert(Clip("convnext_xxlarge", None, 3072, 1024).state_dict(), ""), None, "") == registry.spec(
            "convnext_xxlarge", num_classes=1024
        )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_key_of_the_image_tower_that_nothing_reads_is_refused(prefix: str) -> None:
    state = {prefix + key: value for key, value in clip().state_dict().items()}
    state[prefix + "visual.head.proj.bias"] = torch.ones(24)
    with pytest.raises(WeightsError, match=rf"does not: {prefix}visual\.head\.proj\.bias;"):
        convert(state, "a.pth")


# All layouts ---------------------------------------------------------------------------------------------------------


def small_of(
    layout: str, depths: tuple[int, ...] = DEPTHS, dims: tuple[int, ...] = DIMS
) -> tuple[Callable[[Tensor], Tensor], State]:
    """A small model of each layout as (images to logits, state dict)."""
    if layout == "transformers":
        model = randomize_(transformers_model(False, depths, dims))
        return lambda x: model(x).logits, model.state_dict()
    if layout == "open_clip":
        model = clip(depths=depths, dims=dims)
    elif layout == "timm":
        model = randomize_(timm.create_model("convnext_atto", depths=depths, dims=dims, num_classes=11))
    elif layout == "torchvision":
        model = randomize_(torchvision_model(depths, dims))
    else:
        model = randomize_(Official(depths, dims, False, 11))
    return model, mmpretrain(model.state_dict()) if layout == "mmpretrain" else model.state_dict()


NAMES = ["open_clip", "timm", "official", "mmpretrain", "transformers", "torchvision"]  # those that have classifiers


@pytest.mark.parametrize("layout", NAMES)
@torch.inference_mode()
def test_every_parameter_of_the_reference_reaches_our_module(layout: str) -> None:
    """Half as much again of any one tensor of the source moves our logits exactly as it moves the source's."""
    x = images(size=32)
    reference, state = small_of(layout)
    before = reference(x)
    for key in [key for key in state if layout != "open_clip" or key.startswith("visual.")]:
        original = state[key].clone()
        state[key].mul_(1.5)
        after, result = reference(x), ours(state)(x)
        state[key].copy_(original)
        assert relative_error(after, before) > 100 * TOLERANCE, key
        assert relative_error(result, after) <= TOLERANCE, key


@pytest.mark.parametrize("layout", NAMES)
def test_converting_changes_nothing_of_the_source(layout: str) -> None:
    _, state = small_of(layout)
    keys, copies = list(state), {key: value.clone() for key, value in state.items()}
    ours(state)
    assert list(state) == keys
    assert all(torch.equal(state[key], copies[key]) for key in keys)


CLASSIFIERS = ("head.fc.", "head.weight", "head.bias", "classifier.weight", "classifier.bias", "classifier.2.")


@pytest.mark.parametrize("layout", NAMES)
def test_any_one_missing_key_is_refused(layout: str) -> None:
    _, state = small_of(layout)
    needed = [key for key in state if layout != "open_clip" or key.startswith("visual.trunk.")]
    for key in [key for key in needed if not key.startswith(CLASSIFIERS)]:
        message = refusal({name: value for name, value in state.items() if name != key})
        assert re.search(r" lacks | is incomplete: | is not a ConvNeXt checkpoint ", message), key


@pytest.mark.parametrize("layout", [name for name in NAMES if name != "open_clip"])
def test_a_classifier_without_its_bias_or_weight_is_refused(layout: str) -> None:
    """Only open_clip publishes projections without a bias; elsewhere zeros would hide a damaged file."""
    _, state = small_of(layout)
    bias = next(key for key in state if key.startswith(CLASSIFIERS) and key.endswith("bias"))
    assert "weight without a bias" in refusal({key: value for key, value in state.items() if key != bias})
    weight = bias.replace("bias", "weight")
    assert "head.classifier.bias" in refusal({key: value for key, value in state.items() if key != weight})


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize(
    "key",
    [
        pytest.param("extra.weight", id="beside"),
        pytest.param("stages.0.0.norm2.weight", id="in a block"),
        pytest.param("fc_norm.weight", id="a head of something else"),
    ],
)
def test_an_extra_key_is_named(layout: str, key: str) -> None:
    _, state = small_of(layout)
    key = f"visual.{key}" if layout == "open_clip" else key
    with pytest.raises(WeightsError) as caught:
        convert(state | {key: torch.zeros(3)}, "a.pth")
    assert f"a.pth ({layout} layout)" in str(caught.value)
    assert key in str(caught.value)


@pytest.mark.parametrize("layout", NAMES)
def test_a_block_that_is_missing_is_no_shallower_model(layout: str) -> None:
    """And one that is far out is no deeper one: a module of 10**12 blocks would be built for it."""
    _, state = small_of(layout)
    first = next(key for key in state if re.search(r"(stages\.1|features\.3)\.(layers\.|blocks\.)?0\.", key))
    matched = re.match(r".*(stages\.1|features\.3)\.(layers\.|blocks\.)?", first)
    assert matched
    block = matched[0]
    gap = {key: value for key, value in state.items() if not key.startswith(block + "0.")}
    with pytest.raises(WeightsError, match="incomplete: stage 1 has no block 0"):
        convert(gap, "a.pth")
    far = {key.replace(block + "1.", block + "999999999999."): value for key, value in state.items()}
    with pytest.raises(WeightsError, match="incomplete: stage 1 has no block 1"):
        convert(far, "a.pth")


@pytest.mark.parametrize("layout", NAMES)
def test_a_tensor_of_another_shape_is_named(layout: str) -> None:
    _, state = small_of(layout)
    key = next(
        key
        for key, value in state.items()
        if ("conv1.weight" in key and value.ndim == 2) or "fc1.weight" in key or "block.3.w" in key
    )
    with pytest.raises(WeightsError, match=r"expand\.linear\.weight has shape \(5, 16\), expected \(64, 16\)"):
        ours(state | {key: torch.zeros(5, 16)})


@pytest.mark.parametrize("layout", NAMES)
def test_a_transposed_linear_is_refused(layout: str) -> None:
    _, state = small_of(layout)
    key = next(key for key, value in state.items() if value.squeeze().shape == (64, 16))
    with pytest.raises(WeightsError, match=r"has shape \(16, 64.*\), expected \(64, 16\)"):
        ours(state | {key: state[key].transpose(0, 1)})


def test_two_keys_for_one_parameter_are_refused() -> None:
    """timm's `norm_pre` and `head.norm` are the same parameter of two architectures; one of them would be ignored."""
    _, state = small_of("timm")
    with pytest.raises(WeightsError, match=r"head\.norm\.weight and norm_pre\.weight, which mean the same"):
        convert(state | {"norm_pre.weight": torch.ones(40)}, "a.pth")


def test_a_second_norm_in_the_stem_is_refused() -> None:
    _, state = small_of("timm")
    with pytest.raises(WeightsError, match="more than one norm in its stem"):
        convert(state | {"stem.2.weight": torch.ones(16)}, "a.pth")


def test_widths_of_no_variant_are_custom() -> None:
    _, state = small_of("timm")
    spec = spec_of(convert(state, "a.pth"), None, "a.pth")
    assert spec.architecture == "custom"
    assert (spec.depths, spec.dims, spec.norm, spec.activation) == (DEPTHS, DIMS, "layernorm", "gelu")


@pytest.mark.parametrize("norm", ["rmsnorm", "simplenorm"])
def test_custom_widths_with_norms_without_bias_are_refused(norm: str) -> None:
    """RMSNorm and SimpleNorm have the same tensors and other numbers."""
    reference = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, norm_layer=norm)
    with pytest.raises(WeightsError) as caught:
        ours(reference.state_dict())
    assert "RMSNorm or SimpleNorm cannot be told" in str(caught.value)
    assert str(DIMS) in str(caught.value)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        pytest.param("test_vit", "is not a ConvNeXt checkpoint", id="a transformer"),
        pytest.param("test_resnet", "is not a ConvNeXt checkpoint", id="a ResNet"),
        pytest.param("swin_tiny_patch4_window7_224", "is not a ConvNeXt checkpoint", id="Swin"),
        pytest.param("convformer_s18", "is not a ConvNeXt checkpoint", id="a cousin"),
        pytest.param("efficientvit_m0", "is not a ConvNeXt checkpoint", id="another"),
        pytest.param("convmixer_768_32", "is not a ConvNeXt checkpoint", id="one with a stem and no stages"),
    ],
)
def test_another_architecture_is_refused(model: str, why: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(model).state_dict()
    with pytest.raises(WeightsError, match=why):
        ours(state)


@pytest.mark.parametrize("name", ["inception_next_atto", "edgenext_xx_small"])
def test_a_network_whose_names_begin_alike_is_called_another(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    words = r"no ConvNeXt has .*: it is another network of similar names, or a ConvNeXt with layers added"
    with pytest.raises(WeightsError, match=words):
        ours(state)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("dwconv.", "gnconv.dwconv.", id="HorNet"),
        pytest.param("dwconv.", "large_kernel.LoRA1.conv.", id="SLaK"),
        pytest.param("dwconv.", "dwconv.lk_origin.", id="UniRepLKNet"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_network_made_from_the_official_code_is_called_another(old: str, new: str, prefix: str) -> None:
    state = {prefix + key.replace(old, new): value for key, value in official().state_dict().items()}
    with pytest.raises(WeightsError, match=r"no ConvNeXt has \S+0\.0\.\w+conv|no ConvNeXt has \S+large_kernel"):
        ours(state)


@pytest.mark.parametrize(("dimensions", "what"), [(3, "sequences"), (5, "volumes")])
def test_a_convnext_of_what_are_no_images_is_called_that(dimensions: int, what: str) -> None:
    state = official().state_dict()
    for key, value in state.items():
        if value.ndim == 4 and "grn" not in key:
            state[key] = value[..., 0] if dimensions == 3 else value[..., None].expand(*value.shape, value.shape[-1])
    with pytest.raises(WeightsError, match=f"is a ConvNeXt of {what}: its first weight has shape"):
        ours(state)


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"a\.pth is not a ConvNeXt checkpoint \(keys: no tensors\)"):
        convert({}, "a.pth")
    with pytest.raises(WeightsError, match="keys: no tensors"):
        convert(official().state_dict(), "a.pth", prefix="teacher.")


@pytest.mark.parametrize(
    "size",
    [pytest.param(4, id="even"), pytest.param(0, id="empty")],
)
def test_a_depthwise_kernel_that_no_padding_centres_is_refused(size: int) -> None:
    _, state = small_of("official")
    with pytest.raises(WeightsError, match="odd k"):
        convert(state | {"stages.0.0.dwconv.weight": torch.zeros(16, 1, size, size)}, "a.pth")


# Fuzzing -------------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 16, 40]), max_size=5).map(tuple)
PIECES = [
    "stem", "stages", "blocks", "downsample", "downsample_layers", "features", "block", "visual", "trunk", "head",
    "proj", "mlp", "fc1", "fc2", "fc", "grn", "gamma", "beta", "norm", "norm_pre", "layernorm", "classifier", "dwconv",
    "conv_dw", "pwconv1", "pwconv2", "embeddings", "patch_embeddings", "encoder", "layers", "downsampling_layer",
    "convnext", "module", "weight", "bias", "layer_scale", "layer_scale_parameter", "pre_logits", "0", "1", "2", "3",
    "00", "-1", "9", "99999999999999999999", "٣", "", "\0", "\n", "é", "😀",
]  # fmt: skip
KEYS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=7).map(".".join),
    st.text(max_size=20),
    st.sampled_from([layout.anchor for layout in LAYOUTS]),
)
BASES = {name: {key: tuple(value.shape) for key, value in small_of(name)[1].items()} for name in NAMES}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(shapes=st.dictionaries(KEYS, SHAPES, max_size=12))
def test_no_keys_and_shapes_raise_anything_but_a_weights_error(shapes: dict[str, tuple[int, ...]]) -> None:
    assert refusal({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(NAMES),
    removed=st.lists(st.integers(0, 200), max_size=3),
    reshaped=st.lists(st.tuples(st.integers(0, 200), SHAPES), max_size=3),
    renamed=st.lists(st.tuples(st.integers(0, 200), KEYS), max_size=2),
    added=st.dictionaries(KEYS, SHAPES, max_size=2),
)
def test_no_damage_to_a_checkpoint_raises_anything_but_a_weights_error(
    layout: str,
    removed: list[int],
    reshaped: list[tuple[int, tuple[int, ...]]],
    renamed: list[tuple[int, str]],
    added: dict[str, tuple[int, ...]],
) -> None:
    items = list(BASES[layout].items())
    for index, shape in reshaped:
        items[index % len(items)] = (items[index % len(items)][0], shape)
    for index, key in renamed:
        items[index % len(items)] = (key, items[index % len(items)][1])
    dropped = {index % len(items) for index in removed}
    shapes = {key: shape for index, (key, shape) in enumerate(items) if index not in dropped} | added
    refusal({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


@pytest.mark.parametrize("layout", NAMES)
def test_the_undamaged_checkpoint_of_the_fuzzing_is_taken(layout: str) -> None:
    assert refusal({key: torch.empty(shape, device="meta") for key, shape in BASES[layout].items()}) == ""
