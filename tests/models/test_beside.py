"""What stands in a checkpoint beside the network, and what of the network itself is built or refused by name."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from reference_models import mmpretrain, torchvision_model
from references import DEPTHS, DIMS, TOLERANCE, Official, State, images, randomize_, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn

from convnext_deploy import api
from convnext_deploy.errors import WeightsError
from convnext_deploy.models.checkpoint import Loaded, load
from convnext_deploy.records.base import Task

WIDTH, CLASSES = DIMS[3], 7


def network(seed: int = 0, **arguments: Any) -> nn.Module:
    options = {"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES} | arguments
    return randomize_(timm.create_model("convnext_atto", **options), seed)


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return network()


def read(content: Any, folder: Path, **arguments: Any) -> Loaded:
    torch.save(content, folder / "model.pth")
    return load(str(folder / "model.pth"), **arguments)


def below(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def assert_equal(loaded: Loaded, expected: Tensor) -> None:
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), expected) <= TOLERANCE


# Wrappers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("blocks.0.", "blocks.0._checkpoint_wrapped_module.", id="checkpointed activations"),
        pytest.param("blocks.0.", "blocks.0._fsdp_wrapped_module.", id="FSDP"),
        pytest.param("stem.", "stem._orig_mod.", id="compiled stem"),
        pytest.param("stages.2.", "stages.2._orig_mod.", id="compiled stage"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module._fsdp_wrapped_module."])
@torch.inference_mode()
def test_wrappers_inside_the_names_are_taken_off(
    old: str, new: str, prefix: str, reference: nn.Module, tmp_path: Path
) -> None:
    state = {prefix + key.replace(old, new): value for key, value in reference.state_dict().items()}
    assert_equal(read(state, tmp_path), reference(images()))


@pytest.mark.parametrize(
    ("average", "plain"), [("ema_model.", "online_model."), ("ema_model.module.", "model."), ("net_ema.", "net.")]
)
@torch.inference_mode()
def test_of_a_network_and_its_average_in_one_dictionary_the_average_is_taken(
    average: str, plain: str, tmp_path: Path
) -> None:
    """As ema_pytorch and Lightning callbacks save them; a teacher and a student are two networks and stay refused."""
    first, second = network(1), network(2)
    state = below(average, first.state_dict()) | below(plain, second.state_dict())
    state |= {"initted": torch.tensor(True), "step": torch.tensor(7)}
    loaded = read(state, tmp_path)
    assert_equal(loaded, first(images()))
    assert f"taking {average} of model.pth, and not {plain} (--weights-key chooses)" in str(loaded.note)
    assert_equal(read(state, tmp_path, weights_key=plain), second(images()))


def test_one_name_with_and_without_a_wrapper_is_refused(reference: nn.Module, tmp_path: Path) -> None:
    state = reference.state_dict()
    state = state | {"stages.0._orig_mod.blocks.0.gamma": state["stages.0.blocks.0.gamma"] + 1}
    with pytest.raises(WeightsError, match=r"stages\.0\.blocks\.0\.gamma a second time, as stages\.0\._orig_mod\."):
        read(state, tmp_path)


# Normalization -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        (("0.mean", "0.std"), 1),
        (("normalize.mean", "normalize.std"), 1),
        (("pixel_mean", "pixel_std"), 255),
        (("data_preprocessor.mean", "data_preprocessor.std"), 255),
        (("norm._mean", "norm._std"), 1),
        (("normalizer.new_mean", "normalizer.new_std"), 1),  # of the package robustness
    ],
)
@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1)])
def test_a_normalization_in_front_of_the_network_becomes_the_preprocessing(
    names: tuple[str, str], scale: float, shape: tuple[int, ...], reference: nn.Module, tmp_path: Path
) -> None:
    mean, std = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.25, 0.3])
    values = {name: scale * value.reshape(shape) for name, value in zip(names, (mean, std), strict=True)}
    loaded = read(values | below("model.", reference.state_dict()), tmp_path)
    assert loaded.preprocessing.mean == pytest.approx((0.3, 0.4, 0.5))
    assert loaded.preprocessing.std == pytest.approx((0.2, 0.25, 0.3))
    assert not {"mean", "std"} & set(loaded.preprocessing.assumed)
    assert f"{names[0]} and {names[1]} are taken for the normalization of the pixels" in str(loaded.note)


def test_a_normalization_that_is_said_twice_is_refused(reference: nn.Module, tmp_path: Path) -> None:
    state = {"mean": torch.tensor([0.3, 0.4, 0.5]), "std": torch.full((3,), 0.2)}
    state |= below("model.", reference.state_dict())
    with pytest.raises(WeightsError, match=r"in front of the network, mean 0\.3,0\.4,0\.5, and mean 0\.5,0\.5,0\.5"):
        read(state, tmp_path, preprocessing={"mean": (0.5, 0.5, 0.5)})
    alone = read(state, tmp_path, weights_key="model.")
    assert alone.preprocessing.assumed[:2] == ("mean", "std")
    assert "mean and std normalize in front of the network, and --weights-key leaves them out" in str(alone.note)


def test_a_mean_of_images_with_blue_first_is_refused(reference: nn.Module, tmp_path: Path) -> None:
    state = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]), "pixel_std": torch.full((3,), 57.0)}
    with pytest.raises(WeightsError, match="pixel_mean is the mean of images with blue first"):
        read(state | below("backbone.", reference.state_dict()), tmp_path)


# A head behind a backbone --------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As people write it around timm's module without a classifier."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.fc = network(num_classes=0), head

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


@pytest.mark.parametrize("prefix", ["", "model.", "module.net."])
@torch.inference_mode()
def test_one_linear_behind_a_backbone_is_its_classifier(prefix: str, tmp_path: Path) -> None:
    model: Any = randomize_(Wrapped(nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, 5))))
    state = below(prefix, model.state_dict())
    loaded = read(state, tmp_path)
    assert_equal(loaded, model(images()))
    assert f"{prefix}fc is taken for the classifier behind {prefix}backbone" in str(loaded.note)
    embedding = read(state, tmp_path, task="embed")
    assert_equal(embedding, model.backbone(images()))
    assert f"left out {prefix}fc.1.weight" in str(embedding.note)


@torch.inference_mode()
def test_one_linear_behind_a_dinov3_of_transformers_is_its_classifier(tmp_path: Path) -> None:
    """Whose last norm stands beside the rest, so that the head is one name further out."""
    config = transformers.DINOv3ConvNextConfig(depths=list(DEPTHS), hidden_sizes=list(DIMS))
    backbone: Any = randomize_(transformers.DINOv3ConvNextModel(config))
    head = randomize_(nn.Linear(WIDTH, 5))
    state = below("net.backbone.", backbone.state_dict()) | below("net.head.", head.state_dict())
    assert_equal(read(state, tmp_path), head(backbone(images()).pooler_output))
    whole = state | {"loss.weight": torch.ones(5)}
    with pytest.raises(WeightsError, match=rf"--weights-key net\.backbone\. \({len(state) - 2} of {len(whole)} keys"):
        read(whole, tmp_path)
    assert_equal(read(whole, tmp_path, task="embed", weights_key="net.backbone."), backbone(images()).pooler_output)


@torch.inference_mode()
def test_an_mlp_behind_a_backbone_is_its_head(tmp_path: Path) -> None:
    model = randomize_(Wrapped(nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, 5))))
    assert_equal(read(model.state_dict(), tmp_path, head_activation="relu"), model(images()))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"fc.weight": torch.ones(5, WIDTH)}, "no bias: an angular loss's weights"),
        ({"fc.weight": torch.ones(5, 2 * WIDTH), "fc.bias": torch.ones(5)}, "another width"),
        ({"a.weight": torch.ones(5, WIDTH), "a.bias": torch.ones(5), "b.weight": torch.ones(3, WIDTH),
          "b.bias": torch.ones(3)}, "two heads"),
        ({"criterion.weight": torch.ones(5)}, "a loss's"),
    ],
)  # fmt: skip
def test_what_may_be_no_head_is_refused_with_the_prefix_that_works(more: State, why: str, tmp_path: Path) -> None:
    state = below("backbone.", network(num_classes=0).state_dict())
    with pytest.raises(
        WeightsError, match=rf"--weights-key backbone\. \({len(state)} of {len(state) + len(more)} keys"
    ):
        read(state | more, tmp_path)


# Facts of training scripts -------------------------------------------------------------------------------------------


def test_what_timms_arguments_say_is_read(reference: nn.Module, tmp_path: Path) -> None:
    args = argparse.Namespace(
        gp="avg", img_size=96, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=0.9, interpolation="bilinear"
    )
    loaded = read({"state_dict": reference.state_dict(), "args": args}, tmp_path)
    assert loaded.model.spec.image_size == (96, 96)
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (loaded.preprocessing.crop_pct, loaded.preprocessing.interpolation) == (0.9, "bilinear")
    assert loaded.preprocessing.assumed == ()


def test_arguments_that_say_nothing_leave_the_assumptions(reference: nn.Module, tmp_path: Path) -> None:
    args = argparse.Namespace(gp=None, img_size=None, mean=None, std=None, crop_pct=None, interpolation="random")
    assumed = read({"state_dict": reference.state_dict(), "args": args}, tmp_path).preprocessing.assumed
    assert set(assumed) == {"mean", "std", "interpolation", "crop_pct", "image_size", "global_pool"}


def test_torchvisions_sizes_give_the_share_of_the_crop(reference: nn.Module, tmp_path: Path) -> None:
    args = argparse.Namespace(val_resize_size=256, val_crop_size=192, interpolation="bilinear")
    loaded = read({"model": reference.state_dict(), "args": args}, tmp_path)
    assert (loaded.model.spec.image_size, loaded.preprocessing.crop_pct) == ((192, 192), 0.75)


def test_arguments_of_another_form_are_refused(reference: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.pth: what stands beside its weights cannot be understood"):
        read({"state_dict": reference.state_dict(), "args": {"img_size": "large"}}, tmp_path)


# Architectures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{"conv_mlp": True}, {"conv_bias": False}, {"kernel_sizes": (3, 5, 7, 9)}], ids=str
)
@torch.inference_mode()
def test_forms_of_the_block_that_timm_has_are_built(arguments: dict[str, Any], tmp_path: Path) -> None:
    reference = network(**arguments)
    assert_equal(read(reference.state_dict(), tmp_path), reference(images()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"patch_size": 2}, r"has patches of 2x2 pixels \(patch_size 2\); expected 4x4"),
        ({"patch_size": 8}, r"has patches of 8x8 pixels \(patch_size 8\); expected 4x4"),
    ],
)
def test_another_patch_is_refused_by_name(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=words):
        read(network(**arguments).state_dict(), tmp_path)


def test_a_head_on_two_poolings_is_refused_by_name(reference: nn.Module, tmp_path: Path) -> None:
    state = reference.state_dict() | {"head.fc.weight": torch.ones(CLASSES, 2 * WIDTH)}
    with pytest.raises(WeightsError, match=r"a pooling that joins average and maximum \(global_pool catavgmax"):
        read(state, tmp_path)


def test_one_bias_that_is_missing_is_damage(reference: nn.Module, tmp_path: Path) -> None:
    state = dict(reference.state_dict())
    del state["stages.1.blocks.0.conv_dw.bias"]
    with pytest.raises(WeightsError, match=r"lacks stages\.1\.0\.dwconv_norm\.conv\.bias"):
        read(state, tmp_path)


# The source's own library ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "judge"),
    [
        ("wrapped", "timm"),
        ("averaged", "timm"),
        ("normalized", "timm"),
        ("head behind", "self"),  # no library has that model
    ],
)
def test_the_judge_reads_the_same_network_of_the_file(
    form: str, judge: str, reference: nn.Module, tmp_path: Path
) -> None:
    state = reference.state_dict()
    content = {
        "wrapped": {f"module.{key.replace('stem.', 'stem._orig_mod.')}": value for key, value in state.items()},
        "averaged": below("model.", network(3).state_dict()) | below("ema.", state),
        "normalized": below("1.", state) | {"0.mean": torch.full((3,), 0.5), "0.std": torch.full((3,), 0.5)},
        "head behind": Wrapped(nn.Linear(WIDTH, 5)).state_dict(),
    }[form]
    torch.save(content, tmp_path / "model.pth")
    made = api.export(tmp_path / "model.pth", format="eager", image_size=64, batch=2, out=tmp_path / "a")
    assert made.manifest.oracle is not None
    assert made.manifest.oracle.name.split()[0] == judge


# open_clip -----------------------------------------------------------------------------------------------------------


def tower(reference: nn.Module) -> State:
    """Its names for timm's module, with a projection."""
    trunk = {key: value for key, value in reference.state_dict().items() if not key.startswith("head.fc.")}
    return below("visual.trunk.", trunk) | {"visual.head.proj.weight": torch.ones(CLASSES, WIDTH)}


def test_a_folder_of_open_clip_brings_its_preprocessing(reference: nn.Module, tmp_path: Path) -> None:
    save_file(tower(reference), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"embed_dim": CLASSES, "vision_cfg": {"timm_model_name": "convnext_base", "image_size": 96}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    found = load(str(tmp_path))
    facts = found.preprocessing
    assert found.model.spec.image_size == (96, 96)
    assert (facts.mean, facts.std, facts.crop_mode) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")
    assert (facts.crop_pct, facts.interpolation, facts.assumed) == (1.0, "bicubic", ())
    config["preprocess_cfg"]["resize_mode"] = "longest"  # type: ignore[index]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"open_clip_config\.json asks for resize_mode 'longest'"):
        load(str(tmp_path))


def test_a_tower_without_its_configuration_is_assumed_to_have_open_clips_defaults(
    reference: nn.Module, tmp_path: Path
) -> None:
    """Before, they were ImageNet's. timm says the same of its own copies of these weights."""
    found = read(tower(reference), tmp_path).preprocessing
    timms = timm.models.get_pretrained_cfg("convnext_base.clip_laion2b")
    assert timms is not None
    assert (found.mean, found.std) == (tuple(timms.mean), tuple(timms.std))
    assert {"mean", "std"} <= set(found.assumed)


def test_a_header_that_nests_deeper_than_python_reads_is_refused_in_one_line(
    reference: nn.Module, tmp_path: Path
) -> None:
    save_file(reference.state_dict(), tmp_path / "a.safetensors", {"labels": "[" * 100_000})
    with pytest.raises(WeightsError, match="cannot be understood"):
        load(str(tmp_path / "a.safetensors"))


# Other tools' names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("base_model.model.stages.0.blocks.0.mlp.fc1.lora_A.default.weight", "merge_and_unload()"),
        ("stages.0.blocks.0.mlp.fc1.base_layer.weight", "merge_and_unload()"),
        ("stages.0.blocks.0.mlp.fc1.lora_magnitude_vector.default.weight", "merge_and_unload()"),
        ("stages.0.blocks.0.mlp.fc1.weight.absmax", "it is quantized; give the float checkpoint"),
        (
            "stages.0.blocks.0.mlp.fc1.weight.quant_state.bitsandbytes__nf4",
            "it is quantized; give the float checkpoint",
        ),
        ("stages.0.blocks.0.mlp.fc1.SCB", "it is quantized; give the float checkpoint"),
        ("stages.0.blocks.0.mlp.fc1.weight_scale_inv", "it is quantized; give the float checkpoint"),
        ("stages.0.blocks.0.mlp.fc1.weight_fake_quant.scale", "it is quantized; give the float checkpoint"),
        ("head.fc.zero_point", "it is quantized; give the float checkpoint"),
        ("stages.0.blocks.0.mlp.fc1._weight_qdata", "it is quantized; give the float checkpoint"),
        ("stages.0.blocks.0.mlp.fc1.weight:scale", "it is quantized; give the float checkpoint"),
        ("stages.0.blocks.0.mlp.fc1.weight._data", "it is quantized; give the float checkpoint"),
        ("stages.0.blocks.0.mlp.fc1.weight_packed", "it is quantized; give the float checkpoint"),
        ("stages.0.blocks.0.mlp.fc1.scale_weight", "it is quantized; give the float checkpoint"),
        ("base_model.model.head.fc.modules_to_save.default.weight", "merge_and_unload()"),
        ("encoder.stages.0.0.dwconv.kernel", "remap_checkpoint_keys"),
    ],
)
def test_what_other_tools_put_in_the_place_of_weights_is_refused_with_its_cure(
    key: str, words: str, reference: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError) as caught:
        read(reference.state_dict() | {key: torch.ones(3)}, tmp_path)
    assert f"has {key}: " in str(caught.value)
    assert words in str(caught.value)


@torch.inference_mode()
def test_of_an_ema_hook_of_mmcv_the_average_has_the_networks_names(tmp_path: Path) -> None:
    """mmcv 1.7, `EMAHook`: it exchanges the weights and their copies before a checkpoint is saved."""
    averaged, trained = (randomize_(Official(DEPTHS, DIMS, False, CLASSES), seed) for seed in (0, 1))
    copies = {f"ema_{key.replace('.', '_')}": value for key, value in mmpretrain(trained.state_dict()).items()}
    for prefix in ("", "module."):
        state = below(prefix, mmpretrain(averaged.state_dict()) | copies)
        loaded = read({"meta": {}, "state_dict": state}, tmp_path)
        assert_equal(loaded, averaged(images()))
        assert f"left out {len(copies)} buffers of an EMAHook, such as {prefix}ema_backbone_" in str(loaded.note)


@torch.inference_mode()
def test_of_a_copy_that_is_not_taken_what_stands_beside_its_prefix_is_left_too(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depths": list(DEPTHS), "hidden_sizes": list(DIMS)}
    config = transformers.DINOv3ConvNextConfig(**sizes)
    trained, averaged = (randomize_(transformers.DINOv3ConvNextModel(config), seed) for seed in (0, 1))
    state = below("net.", trained.state_dict()) | below("ema_model.", averaged.state_dict())
    assert_equal(read(state, tmp_path, task="embed"), averaged(images()).pooler_output)
    classifier = transformers.ConvNextConfig(**sizes, num_labels=3)
    trained, averaged = (randomize_(transformers.ConvNextForImageClassification(classifier), seed) for seed in (0, 1))
    state = below("net.", trained.state_dict()) | below("ema_model.", averaged.state_dict())
    assert_equal(read(state, tmp_path), averaged(images()).logits)


@pytest.mark.parametrize("key", ["_fsdp_wrapped_module._flat_param", "stages.0._fsdp_wrapped_module.flat_param_0"])
def test_flat_parameters_are_refused_with_the_cure(key: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"flat parameters, of which several .* StateDictType\.FULL_STATE_DICT"):
        read({key: torch.ones(100)}, tmp_path)


def test_shards_without_values_are_refused_with_the_cure(reference: nn.Module, tmp_path: Path) -> None:
    content = {"module": {key: torch.zeros(0) for key in reference.state_dict()}}
    with pytest.raises(WeightsError, match=r"tensors without values, as a trainer that shards weights"):
        read(content, tmp_path)


@pytest.mark.parametrize("value", [torch.tensor(3.0), torch.full((1,), 3.0)], ids=["number", "vector"])
@pytest.mark.parametrize("task", ["classify", "embed"])
def test_a_learned_pooling_is_never_taken_for_the_average(
    value: Tensor, task: Task, reference: nn.Module, tmp_path: Path
) -> None:
    body = {f"backbone.{key}": tensor for key, tensor in reference.state_dict().items()}
    with pytest.raises(WeightsError, match=r"has pool\.p: it pools with a learned exponent"):
        read(body | {"pool.p": value}, tmp_path, task=task)
    assert read(body | {"pool.p": torch.tensor(3)}, tmp_path, task="features", weights_key="backbone.")


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_a_single_number_that_may_be_a_weight_is_not_left_out(
    prefix: str, reference: nn.Module, tmp_path: Path
) -> None:
    body = below(prefix, reference.state_dict())
    cure = rf"--weights-key {prefix}" if prefix else "leave out what is not the network's"
    with pytest.raises(WeightsError, match=rf"keys that ConvNeXt does not: scale; .*{cure}"):
        read(body | {"scale": torch.tensor(20.0)}, tmp_path)
    for counter in ({"n_averaged": torch.tensor(3)}, {"ema.decay": torch.tensor(0.9)}, {"seen": torch.tensor(True)}):
        note = read(body | counter, tmp_path).note
        assert note == f"left out {next(iter(counter))}, beside the model"


# Heads beside and in the place of others ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_an_embedding_needs_no_head_however_many_there_are(prefix: str, tmp_path: Path) -> None:
    model = randomize_(timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, num_classes=0))
    state = {prefix + key: value for key, value in model.state_dict().items()}
    for name, classes in (("colour", 5), ("shape", 3)):
        state |= {f"{name}.weight": torch.ones(classes, DIMS[3]), f"{name}.bias": torch.ones(classes)}
    state["arc.weight"] = torch.ones(9, DIMS[3])  # of ArcFace, which has no bias
    loaded = read(state, tmp_path, task="embed")
    assert loaded.note == "left out colour.weight, colour.bias, shape.weight and 2 more, beside the model"
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), model(images())) < TOLERANCE
    with pytest.raises(WeightsError, match=r"keys that ConvNeXt does not: colour\.weight"):
        read(state, tmp_path)


def test_a_layer_that_was_added_to_torchvisions_classifier_is_the_classifier(tmp_path: Path) -> None:
    model: Any = torchvision_model(DEPTHS, DIMS)
    model.classifier = nn.Sequential(*model.classifier[:2], nn.Dropout(), nn.Linear(DIMS[3], 5))
    randomize_(model)
    with torch.inference_mode():
        assert relative_error(read(model.state_dict(), tmp_path).model(images()), model(images())) < TOLERANCE


@pytest.mark.parametrize("layout", ["timm", "torchvision"])
def test_a_head_without_the_norm_of_published_ones_is_refused_by_that(layout: str, tmp_path: Path) -> None:
    parts = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(DIMS[3], 5))
    model: Any
    if layout == "timm":
        model = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS)
        model.head = nn.Sequential(*parts)
    else:
        model = torchvision_model(DEPTHS, DIMS)
        model.classifier = nn.Sequential(*parts[1:])
    with pytest.raises(WeightsError, match=r"lacks head\.norm\.bias, head\.norm\.weight"):
        read(model.state_dict(), tmp_path)


def test_a_classifier_without_a_bias_is_refused_with_both_that_it_may_be(reference: nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in reference.state_dict().items() if key != "head.fc.bias"}
    with pytest.raises(WeightsError, match=r"without a bias, and so have heads that norm .*head\.fc\.bias of 7 zeros"):
        read(state, tmp_path)


def test_an_isotropic_convnext_is_refused_by_that_name(tmp_path: Path) -> None:
    state = {"downsample_layers.0.weight": torch.ones(8, 3, 16, 16), "blocks.0.dwconv.weight": torch.ones(8, 1, 7, 7)}
    with pytest.raises(WeightsError, match="is an isotropic ConvNeXt"):
        read(state, tmp_path)
