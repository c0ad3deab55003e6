"""Configurations of timm in each form, held against timm's own files, and what contradicts the tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from checkpoint_rows import detr_around_timm
from references import DEPTHS, DIMS, TOLERANCE, images, randomize_, relative_error
from safetensors.torch import save_file
from torch import nn

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import checkpoint

SIZES: dict[str, Any] = {"depths": DEPTHS, "dims": DIMS}


def small(**arguments: Any) -> Any:
    return randomize_(timm.create_model("convnext_atto", num_classes=7, **SIZES, **arguments))


def load(folder: Path, change: Callable[[dict[str, Any]], object] | None = None, **options: Any) -> checkpoint.Loaded:
    if change is not None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return checkpoint.load(str(folder), image_size=(64, 64), **options)


def assert_equal(loaded: checkpoint.Loaded, expected: Callable[[torch.Tensor], Any]) -> None:
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), expected(images())) < TOLERANCE


@pytest.mark.parametrize("name", ["swish", "silu", "gelu_tanh", "gelu"])
def test_activations_are_known_by_all_names_of_timm(name: str, tmp_path: Path) -> None:
    model = small(act_layer=name)
    timm.models.save_for_hf(model, str(tmp_path), model_args={"act_layer": name, **SIZES}, safe_serialization=True)
    assert_equal(load(tmp_path), model)


def test_a_random_interpolation_is_of_training_and_leaves_it_assumed(tmp_path: Path) -> None:
    model = small()
    model.pretrained_cfg["interpolation"] = "random"
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert load(tmp_path).preprocessing.assumed == ("interpolation",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(num_classes=1000), "says num_classes 1000, and its tensors 7"),
        (lambda c: c.update(architecture="resnet50"), "describes a 'resnet50'; expected a ConvNeXt"),
        (lambda c: c["model_args"].update(dims=[8, 16, 24, 32]), "says dims (8, 16, 24, 32), and its tensors (16, 24"),
        (lambda c: c["model_args"].update(kernel_sizes=5), "says kernel_sizes (5, 5, 5, 5), and its tensors (7, 7"),
        (lambda c: c["model_args"].update(use_grn=True), "says grn True, and its tensors False"),
        (lambda c: c.update(model_args={}), "says depths (2, 2, 6, 2), and its tensors (1, 2, 2, 1)"),
    ],
    ids=["classes", "another family", "widths", "kernels", "V2", "the name alone"],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    timm.models.save_for_hf(small(), str(tmp_path), model_args=dict(SIZES), safe_serialization=True)
    with pytest.raises(WeightsError) as caught:
        load(tmp_path, change)
    assert words in str(caught.value)


def test_a_classifier_that_does_not_pool_is_refused_and_its_maps_are_not(tmp_path: Path) -> None:
    model: Any = randomize_(timm.create_model("convnext_atto", num_classes=7, global_pool="", **SIZES))
    assert model(images()).shape == (2, 7, 2, 2)  # logits for each place
    timm.models.save_for_hf(model, str(tmp_path), model_args=dict(SIZES), safe_serialization=True)
    with pytest.raises(WeightsError, match="has global_pool '', with which it gives logits for every place"):
        load(tmp_path)
    with torch.inference_mode():
        (*_, last) = load(tmp_path, task="features").model(images())
        assert relative_error(last, model.stages(model.stem(images()))) < TOLERANCE


def test_the_number_of_classes_does_not_matter_where_there_is_no_classifier(tmp_path: Path) -> None:
    model = randomize_(timm.create_model("convnext_atto", num_classes=0, **SIZES))
    timm.models.save_for_hf(model, str(tmp_path), model_args=dict(SIZES), safe_serialization=True)
    assert_equal(load(tmp_path, lambda c: c.update(num_classes=1000), task="embed"), model)


def test_an_older_flat_configuration_is_read(tmp_path: Path) -> None:
    model = small()
    timm.models.save_for_hf(model, str(tmp_path), model_args=dict(SIZES), safe_serialization=True)
    flat = {
        "architecture": "convnext_atto", "num_classes": 7, "model_args": SIZES, "input_size": [3, 96, 96],
        "crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3,
        "label_names": list("abcdefg"),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(flat))
    found = checkpoint.load(str(tmp_path))
    assert (found.model.spec.image_size, found.preprocessing.crop_pct) == ((96, 96), 0.9)
    assert (found.preprocessing.assumed, found.labels) == ((), tuple("abcdefg"))


def test_transformers_wrapper_of_timms_classifiers_is_read(tmp_path: Path) -> None:
    config = transformers.TimmWrapperConfig(architecture="convnext_atto", model_args=dict(SIZES), num_labels=7)
    model: Any = randomize_(transformers.TimmWrapperForImageClassification(config))
    model.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert_equal(found, lambda x: model(x).logits)
    assert found.labels == tuple(f"LABEL_{number}" for number in range(7))


def test_the_image_processor_of_that_wrapper_says_the_preprocessing_and_no_network(tmp_path: Path) -> None:
    saved(tmp_path)
    said = {
        "input_size": [3, 96, 96],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "mean": [0.4] * 3,
        "std": [0.2] * 3,
    }
    processor = {
        "image_processor_type": "TimmWrapperImageProcessor", "architecture": "convnext_base", "pretrained_cfg": said,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = checkpoint.load(str(tmp_path))
    assert found.model.spec.image_size == (96, 96)
    assert (found.preprocessing.crop_pct, found.preprocessing.mean) == (0.9, (0.4,) * 3)
    assert found.preprocessing.assumed == ()


@pytest.mark.parametrize(
    ("indices", "levels"),
    [((0, 1, 2, 3), (1, 2, 3, 4)), ((1, 3), (2, 4)), ([-1], (4,))],
    ids=["all", "two", "the last"],
)
def test_transformers_wrapper_of_timms_backbones_is_read(indices: Any, levels: tuple[int, ...], tmp_path: Path) -> None:
    config = transformers.TimmBackboneConfig(
        backbone="test_convnext2", use_pretrained_backbone=False, out_indices=indices
    )
    model: Any = randomize_(transformers.TimmBackbone(config))
    model.save_pretrained(tmp_path)
    found = load(tmp_path, task="features")
    assert found.model.spec.levels == levels
    with torch.inference_mode():
        pairs = list(zip(found.model(images()), model(images()).feature_maps, strict=True))
    assert len(pairs) == len(levels)
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < TOLERANCE


def test_timms_backbone_in_a_detector_of_transformers_is_read(tmp_path: Path) -> None:
    folder, expected = detr_around_timm(tmp_path)
    found = load(Path(str(folder)), task="features")
    assert found.model.spec.activation == "gelu_tanh"  # which the architecture's name says, and no tensor
    with torch.inference_mode():
        pairs = list(zip(found.model(images()), expected(), strict=True))
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < TOLERANCE


def test_a_convnext_in_a_model_of_several_is_read_with_its_configuration(tmp_path: Path) -> None:
    """Such as a captioner's: `encoder` and `decoder` in config.json and in the names of the tensors."""
    encoder: Any = saved(tmp_path, layer_norm_eps=1e-2)
    held = {f"encoder.{key.removeprefix('convnext.')}": value for key, value in encoder.state_dict().items()}
    held = {key: value for key, value in held.items() if "classifier" not in key}
    save_file(held | {"decoder.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    nested = {"model_type": "vision-encoder-decoder", "encoder": encoder.config.to_dict(), "decoder": {}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    found = checkpoint.load(str(tmp_path), task="embed", weights_key="encoder.")
    with torch.inference_mode():
        assert relative_error(found.model(images()), encoder.convnext(images()).pooler_output) < TOLERANCE


# Of transformers' own ConvNeXt ----------------------------------------------------------------------------------------


def saved(folder: Path, **settings: Any) -> nn.Module:
    config = transformers.ConvNextConfig(depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=3, **settings)
    model: Any = randomize_(transformers.ConvNextForImageClassification(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["silu", "swish", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python"])
def test_activations_are_known_by_the_names_of_transformers(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, hidden_act=name)
    assert_equal(load(tmp_path), lambda x: model(x).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(hidden_act="relu"), "hidden_act 'relu'; expected one of"),
        (lambda c: c.update(hidden_sizes=[96, 192, 384, 768]), "says dims (96, 192, 384, 768), and its tensors"),
        (lambda c: c.update(depths=[3, 3, 9, 3]), "says depths (3, 3, 9, 3), and its tensors (1, 2, 2, 1)"),
        (lambda c: c.update(num_channels=1), "says in_chans 1, and its tensors 3"),
        (
            lambda c: c.update(id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 2, "b": 1, "c": 0}),
            "gives 'a' the number 0 in id2label and 2 in label2id",
        ),
        (lambda c: c.update(model_type="convnextv2"), "says grn True, and its tensors False"),
    ],
    ids=["activation", "widths", "depths", "channels", "labels", "V2"],
)
def test_what_transformers_configuration_says_otherwise_is_refused(
    change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    with pytest.raises(WeightsError) as caught:
        load(tmp_path, change)
    assert words in str(caught.value)


def test_a_name_of_two_classes_has_one_of_their_numbers_in_the_other_map(tmp_path: Path) -> None:
    """ImageNet has two of "crane", and transformers' maps of it are {134: crane, 517: crane} and {crane: 517}."""
    saved(tmp_path)
    names, numbers = {"0": "crane", "1": "ant", "2": "crane"}, {"crane": 2, "ant": 1}
    found = load(tmp_path, lambda c: c.update(id2label=names, label2id=numbers))
    assert found.labels == ("crane", "ant", "crane")


def test_an_older_map_of_other_names_does_not_contradict(tmp_path: Path) -> None:
    saved(tmp_path)
    names = {"0": "a", "1": "b", "2": "c"}
    stale = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert load(tmp_path, lambda c: c.update(id2label=names, label2id=stale)).labels == ("a", "b", "c")
