"""What training scripts keep beside the weights: settings, names of classes, and whose weights are which."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from references import DEPTHS, DIMS, TOLERANCE, images, randomize_, relative_error
from torch import Tensor, nn

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import checkpoint

State = dict[str, Tensor]
NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def state() -> State:
    model: nn.Module = timm.create_model("test_convnext2", num_classes=3)
    return model.state_dict()


def load(content: Any, folder: Path, **options: Any) -> checkpoint.Loaded:
    torch.save(content, folder / "file.pth")
    return checkpoint.load(str(folder / "file.pth"), **options)


@pytest.mark.parametrize(
    "beside",
    [
        {"classes": list(NAMES)},
        {"class_names": NAMES},
        {"class_to_idx": {"bee": 1, "ant": 0, "cat": 2}},
        {"idx_to_class": {0: "ant", 1: "bee", 2: "cat"}},
        {"names": {"2": "cat", "1": "bee", "0": "ant"}},
        {"meta": {"CLASSES": NAMES}},
        {"meta": {"dataset_meta": {"classes": NAMES, "palette": None}}},
        {"hyper_parameters": {"class_names": list(NAMES), "lr": 0.1}},
        {"labels": [0, 1, 0, 2], "classes": list(NAMES)},
        {"classes": np.array(NAMES)},  # scikit-learn's LabelEncoder.classes_
    ],
    ids=str,
)
def test_the_names_of_the_classes_are_found_beside_the_weights(
    beside: dict[str, Any], state: State, tmp_path: Path
) -> None:
    found = load({"state_dict": state, **beside}, tmp_path)
    assert found.labels == NAMES
    source = found.provenance["labels"].source
    assert source is not None
    assert source.removeprefix("the checkpoint's ") in str(beside)


@pytest.mark.parametrize(
    "beside",
    [
        {"labels": [0, 1, 2]},  # of images
        {"classes": ["ant", "bee"]},  # of another number
        {"classes": ["ant", "ant", "cat"]},
        {"names": {"a": "x", "b": "y", "c": "z"}},
        {"class_to_idx": {"ant": 1, "bee": 2, "cat": 3}},
        {"meta": {"CLASSES": None}},
    ],
    ids=str,
)
def test_lists_that_cannot_be_the_outputs_names_are_not_taken(
    beside: dict[str, Any], state: State, tmp_path: Path
) -> None:
    found = load({"state_dict": state, **beside}, tmp_path)
    assert found.labels is None
    assert found.provenance["labels"].how == "assumed"


@pytest.mark.parametrize("place", ["hyper_parameters", "hparams", "config", "cfg"])
def test_settings_under_other_names_than_args_are_read(place: str, state: State, tmp_path: Path) -> None:
    settings = {"img_size": 96, "mean": [0.5] * 3, "std": (0.25,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
    found = load({"state_dict": state, place: settings}, tmp_path)
    assert found.model.spec.image_size == (96, 96)
    prepared = found.preprocessing
    assert (prepared.mean, prepared.std, prepared.interpolation) == ((0.5,) * 3, (0.25,) * 3, "bilinear")
    assert found.provenance["image_size"].source == f"the checkpoint's {place}"


@pytest.mark.parametrize(
    "given",
    [{"img_size": 96}, {"input_size": [3, 64, 96]}, {"img_size": 128, "input_size": [3, 64, 96]}],
    ids=["one side", "three numbers", "both"],
)
def test_the_size_is_what_timms_script_makes_of_its_arguments(
    given: dict[str, Any], state: State, tmp_path: Path
) -> None:
    loaded = load({"state_dict": state, "args": argparse.Namespace(**given)}, tmp_path)
    assert loaded.model.spec.image_size == timm.data.resolve_data_config(given)["input_size"][1:]


def test_words_of_other_settings_that_mean_something_else_stay_assumed(state: State, tmp_path: Path) -> None:
    settings = {"img_size": {"train": 96}, "mean": "imagenet", "std": None, "crop_pct": "auto", "gp": 3}
    found = load({"state_dict": state, "config": settings}, tmp_path)
    assert {"image_size", "mean", "std", "crop_pct"} <= set(found.preprocessing.assumed)


@pytest.mark.parametrize(
    ("place", "settings", "words"),
    [
        ("args", {"model_kwargs": {"global_pool": "max"}}, "args.model_kwargs asks for global_pool 'max'"),
        ("args", {"model_kwargs": {"act_layer": "relu"}}, "args.model_kwargs asks for act_layer 'relu'"),
        ("args", {"model_kwargs": {"output_stride": 16}}, "args.model_kwargs asks for output_stride 16"),
        ("hyper_parameters", {"global_pool": "catavgmax"}, "hyper_parameters asks for global_pool 'catavgmax'"),
        ("hyper_parameters", {"encoder_output_stride": 8}, "hyper_parameters.encoder_output_stride asks for"),
    ],
)
def test_settings_of_another_network_are_refused(
    place: str, settings: dict[str, Any], words: str, state: State, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=f"the checkpoint's {words}"):
        load({"state_dict": state, place: settings}, tmp_path)


def test_what_timms_script_gave_the_constructor_is_the_network(tmp_path: Path) -> None:
    """`--model-kwargs act_layer=silu norm_eps=0.001`, which no tensor shows."""
    given = {"act_layer": "silu", "norm_eps": 1e-3}
    model: Any = randomize_(timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, **given))
    arguments = argparse.Namespace(model="convnext_atto", gp=None, model_kwargs=given)
    loaded = load({"state_dict": model.state_dict(), "args": arguments}, tmp_path)
    assert loaded.provenance["activation"].source == "the checkpoint's args"
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), model(images())) <= TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 9}, "says num_classes 9, and its tensors 3"),  # timm's
        ({"nb_classes": 1000}, "says num_classes 1000, and its tensors 3"),  # the papers'
        ({"in_chans": 1}, "says in_chans 1, and its tensors 3"),
    ],
    ids=str,
)
def test_arguments_that_contradict_the_tensors_are_refused(
    arguments: dict[str, Any], words: str, state: State, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=words):
        load({"state_dict": state, "args": argparse.Namespace(**arguments)}, tmp_path)
    agreeing = argparse.Namespace(num_classes=3, nb_classes=3, in_chans=None)
    assert load({"state_dict": state, "args": agreeing}, tmp_path).model.spec.num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"input_size": 224, "crop_pct": None}, ((0.485, 0.456, 0.406), 0.875, "center")),
        ({"input_size": 288, "crop_pct": 0.95}, ((0.485, 0.456, 0.406), 0.95, "center")),
        ({"input_size": 384, "crop_pct": None}, ((0.485, 0.456, 0.406), 1.0, "squash")),  # whole images, warped
        ({"input_size": 224, "imagenet_default_mean_and_std": False}, ((0.5, 0.5, 0.5), 0.875, "center")),
    ],
    ids=str,
)
def test_images_are_prepared_as_the_papers_scripts_do_it(
    arguments: dict[str, Any], expected: tuple[Any, ...], state: State, tmp_path: Path
) -> None:
    """`build_transform` of `datasets.py` in facebookresearch/ConvNeXt and ConvNeXt-V2."""
    script = {"model": "convnext_tiny", "imagenet_default_mean_and_std": True, "train_interpolation": "bicubic"}
    loaded = load({"model": state, "args": argparse.Namespace(**script | arguments)}, tmp_path)
    found = loaded.preprocessing
    assert (found.mean, found.crop_pct, found.crop_mode) == expected
    assert found.interpolation == "bicubic"
    assert not {"mean", "std", "crop_pct", "interpolation", "image_size"} & {*found.assumed}


def test_lists_of_the_same_classes_in_another_order_are_refused(state: State, tmp_path: Path) -> None:
    beside = {"classes": ["ant", "bee", "cat"], "class_to_idx": {"cat": 0, "bee": 1, "ant": 2}}
    with pytest.raises(
        WeightsError, match="has the class 'ant' at number 0 in classes and 'cat' there in class_to_idx"
    ):
        load({"state_dict": state, **beside}, tmp_path)


def test_words_of_settings_that_are_of_something_else_refuse_nothing(state: State, tmp_path: Path) -> None:
    settings = {"global_pool": True, "output_stride": "32x", "model_kwargs": ["depth=3"]}
    assert load({"state_dict": state, "hyper_parameters": settings}, tmp_path, image_size=(32, 32))


# Averaged weights ----------------------------------------------------------------------------------------------------


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize("sign", [{"message_hub": {}}, {"meta": {"mmengine_version": "0.10.7"}}], ids=["hub", "meta"])
def test_of_mmengines_files_the_averaged_weights_are_those_that_it_calls_state_dict(
    sign: dict[str, Any], state: State, tmp_path: Path
) -> None:
    # Its EMAHook exchanges the two while it saves (mmengine 0.10.7, `EMAHook._swap_ema_state_dict`).
    trained = {f"module.{key}": value for key, value in other(state).items()} | {"steps": torch.tensor(3)}
    found = load({"state_dict": state, "ema_state_dict": trained, **sign}, tmp_path, image_size=(32, 32))
    assert torch.equal(found.model.get_parameter("head.classifier.bias"), state["head.fc.bias"])
    assert found.note is not None
    assert "not ema_state_dict, because mmengine puts the averaged weights there" in found.note


def test_of_others_files_the_averaged_weights_have_their_name(state: State, tmp_path: Path) -> None:
    found = load({"state_dict": other(state), "ema_state_dict": state}, tmp_path, image_size=(32, 32))
    assert torch.equal(found.model.get_parameter("head.classifier.bias"), state["head.fc.bias"])
