"""The table of variants beside timm, which the project takes its names and numbers from."""

import functools
import re
from typing import Any

import msgspec
import pytest
import timm
import torch

from convnext_deploy.errors import UsageError, WeightsError
from convnext_deploy.models import registry
from convnext_deploy.models.architecture import spec_of
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.layouts import convert
from convnext_deploy.records.manifest import ModelSpec

NAMES = sorted(registry.VARIANTS)


@functools.cache
def meta_model(name: str) -> torch.nn.Module:
    """timm's model with shapes and no numbers: the biggest variant costs nothing."""
    with torch.device("meta"):
        return timm.create_model(name)


def meta_state(name: str) -> dict[str, torch.Tensor]:
    return meta_model(name).state_dict()


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def test_the_variants_are_all_that_timm_has() -> None:
    assert sorted(timm.list_models("*convnext*")) == NAMES
    assert len(NAMES) == 31


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_has_the_parameters_of_timm(name: str) -> None:
    theirs = convert(meta_state(name), name).tensors
    with torch.device("meta"):
        ours = ConvNeXt(registry.spec(name)).state_dict()
    assert {key: squeezed(value.shape) for key, value in ours.items()} == {
        key: squeezed(value.shape) for key, value in theirs.items()
    }
    assert sum(value.numel() for value in ours.values()) == sum(p.numel() for p in meta_model(name).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_of_a_variant_name_it(name: str) -> None:
    assert spec_of(convert(meta_state(name), name), None, name) == registry.spec(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_tensors_do_not_show_agrees_with_timm(name: str) -> None:
    reference: Any = meta_model(name)
    spec = registry.spec(name)
    block = reference.stages[0].blocks[0]
    activations = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "SiLU": "silu"}
    norms = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm", "SimpleNorm": "simplenorm"}
    assert activations[type(block.mlp.act).__name__] == spec.activation
    assert norms[type(block.norm).__name__.removesuffix("2d")] == spec.norm
    assert block.norm.eps == reference.stem[-1].eps == reference.stages[3].downsample[0].eps == spec.norm_eps
    last_norm = reference.norm_pre if spec.head == "norm_pool" else reference.head.norm
    assert last_norm.eps == (spec.norm_eps if spec.head == "norm_pool" else spec.head_norm_eps)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_without_its_classifier_or_with_another_is_still_named(name: str) -> None:
    state = meta_state(name)
    width = state["head.fc.weight"].shape[1]
    other = state | {
        "head.fc.weight": torch.empty(7, width, device="meta"),
        "head.fc.bias": torch.empty(7, device="meta"),
        "stem.0.weight": state["stem.0.weight"][:, :1],
    }
    spec = spec_of(convert(other, name), None, name)
    assert (spec.architecture, spec.num_classes, spec.in_chans) == (name, 7, 1)
    headless = {key: value for key, value in state.items() if not key.startswith("head.fc.")}
    spec = spec_of(convert(headless, name), None, name)
    assert (spec.architecture, spec.num_classes, spec.in_chans) == (name, 0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_valid_record(name: str) -> None:
    spec = registry.spec(name)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec) == spec


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        pytest.param("convnext_base", ("convnext_base", None), id="timm's name"),
        pytest.param("convnext_base.fb_in1k", ("convnext_base", "fb_in1k"), id="timm's name with a tag"),
        pytest.param("base", ("convnext_base", None), id="short"),
        pytest.param("base.fb_in1k", ("convnext_base", "fb_in1k"), id="short with a tag"),
        pytest.param("v2-base", ("convnextv2_base", None), id="short V2, hyphen"),
        pytest.param("v2_base", ("convnextv2_base", None), id="short V2, underscore"),
        pytest.param("convnext-v2-base", ("convnextv2_base", None), id="hyphens everywhere"),
        pytest.param("convnextv2-atto", ("convnextv2_atto", None), id="timm's V2 name with a hyphen"),
        pytest.param(" ConvNeXt-Tiny ", ("convnext_tiny", None), id="the papers' spelling, spaces"),
        pytest.param("large-mlp", ("convnext_large_mlp", None), id="two words"),
        pytest.param("atto_ols", ("convnext_atto_ols", None), id="suffix"),
        pytest.param("test_convnext2", ("test_convnext2", None), id="a test model keeps its 2"),
    ],
)
def test_a_word_for_a_variant_is_understood(word: str, expected: tuple[str, str | None]) -> None:
    assert registry.resolve(word) == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_to_itself(name: str) -> None:
    assert registry.resolve(name) == (name, None)
    assert registry.resolve(name.replace("_", "-").upper()) == (name, None)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        pytest.param("convnext_bse", "convnext_base", id="a letter missing"),
        pytest.param("tinny", "convnext_tiny", id="a letter too many in a short form"),
        pytest.param("convnextv2_smal", "convnextv2_small", id="V2"),
    ],
)
def test_an_unknown_variant_gives_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.resolve(word)
    message = str(caught.value)
    assert repr(word) in message
    assert near in message.partition("did you mean")[2]
    assert "convnext-deploy list" in message
    assert "\n" not in message


@pytest.mark.parametrize("word", ["", ".", "resnet50", "vit_base_patch16_224", "v2_", "\0"])
def test_a_name_of_something_else_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(word))):
        registry.resolve(word)


@pytest.mark.parametrize(
    ("name", "asked", "field"),
    [
        pytest.param("convnext_atto", "convnext_femto", "dims", id="other widths"),
        pytest.param("convnext_small", "convnext_tiny", "depths", id="other depths"),
        pytest.param("convnext_tiny", "convnextv2_tiny", "layer_scale", id="V1 as V2"),
        pytest.param("convnext_tiny", "convnext_tiny_hnf", "head", id="another head"),
        pytest.param("convnext_atto", "convnext_atto_ols", "stem", id="another stem"),
        pytest.param("convnext_large", "convnext_large_mlp", "head_hidden", id="no hidden layer in the head"),
        pytest.param("test_convnext2", "test_convnext3", "kernel_sizes", id="other kernels"),
    ],
)
def test_a_variant_that_the_tensors_contradict_is_refused(name: str, asked: str, field: str) -> None:
    with pytest.raises(WeightsError) as caught:
        spec_of(convert(meta_state(name), "a.pth"), asked, "a.pth")
    message = str(caught.value)
    assert message.startswith(f"a.pth is not a {asked}: its {field} is ")
    assert message.endswith(f"it fits {name}")


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        pytest.param("convnext_atto", "convnext_atto_rms", "its norm is with bias, expected rmsnorm", id="has biases"),
        pytest.param("convnext_atto_rms", "convnext_atto", "its norm is without bias, expected layernorm", id="none"),
    ],
)
def test_norms_of_another_kind_are_refused(name: str, asked: str, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        spec_of(convert(meta_state(name), "a.pth"), asked, "a.pth")


def test_deprecated_names_resolve_as_timm_resolves_them() -> None:
    from timm.models import _registry as timms

    old = {name: new for name, new in timms._deprecated_models.items() if name.startswith("convnext")}
    assert len(old) == 15
    for name, new in old.items():
        assert ".".join(filter(None, registry.resolve(name))) == new


@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16_224", "swin_tiny", "efficientnet_b0"])
def test_a_model_of_another_family_is_called_that(name: str) -> None:
    with pytest.raises(UsageError, match=f"^'{name}' is no ConvNeXt; expected one of"):
        registry.resolve(name)
