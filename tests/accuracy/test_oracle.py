"""The source's own library as the judge: faults planted in loading and converting, which nothing after them can see."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from convnext_deploy import api
from convnext_deploy.accuracy import oracle
from convnext_deploy.data import preprocess
from convnext_deploy.errors import ParityError
from convnext_deploy.models import checkpoint as weights
from convnext_deploy.models import parameters
from convnext_deploy.records.manifest import ModelSpec, OracleRecord, Preprocessing


def exported(source: Path, out: Path, **options: Any) -> OracleRecord:
    made = api.export(str(source), format="eager", out=out / "artifact", **({"image_size": (64, 64)} | options))
    assert made.manifest.oracle is not None
    return made.manifest.oracle


@pytest.fixture
def folder(tmp_path: Path, timm_reference: Callable[..., nn.Module]) -> Path:
    """As timm saves to the hub: weights, and a config.json with the preprocessing."""
    made = tmp_path / "hub"
    made.mkdir()
    save_file(timm_reference().state_dict(), made / "model.safetensors")
    facts = {
        "input_size": [3, 64, 64], "mean": [0.4, 0.45, 0.5], "std": [0.2, 0.21, 0.22], "interpolation": "bicubic",
        "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip
    config = {"architecture": "test_convnext", "num_classes": 10, "pretrained_cfg": facts}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("task", ["classify", "embed", "features"])
def test_timm_judges_its_own_folder_with_its_own_preprocessing(folder: Path, tmp_path: Path, task: str) -> None:
    record = exported(folder, tmp_path, task=task)
    assert record.name.startswith("timm 1.")
    assert record.preprocessing == "timm"
    assert record.relative_error is not None
    assert record.relative_error < 1e-5


def test_timm_judges_its_backbones_also_where_their_mlps_are_linears(tmp_path: Path) -> None:
    backbone: nn.Module = timm.create_model("test_convnext2", features_only=True)
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    record = exported(tmp_path / "model.safetensors", tmp_path, task="features")
    assert record.name.startswith("timm 1.")


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers before 5.0 takes it")
def test_a_configuration_that_its_own_library_does_not_take_is_not_compared_with(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32])
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}, "crop_pct": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    record = exported(tmp_path, tmp_path)
    assert record.name.startswith("transformers 5.")
    assert record.preprocessing is None


def test_a_processor_of_the_fast_kind_is_asked_without_a_warning_of_its_library(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4 wrote such names, and 5 says on stderr that they are old."""
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda _, record: told.append(record))
    spec = weights.load(str(checkpoint), image_size=(64, 64)).model.spec
    processor = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 64, "width": 64}}
    prepared = oracle._preparation({"preprocessor": processor}, spec, "transformers")
    assert prepared is not None
    assert prepared(Image.new("RGB", (80, 70))).shape == (3, 64, 64)
    assert [record.getMessage() for record in told] == []


def test_timm_judges_a_file_without_a_configuration(checkpoint: Path, tmp_path: Path) -> None:
    record = exported(checkpoint, tmp_path)
    assert (record.name.split()[0], record.preprocessing) == ("timm", None)


def official(reference: nn.Module) -> dict[str, Tensor]:
    """timm's names as the papers' repository has them."""
    names = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2", "mlp.grn": "grn"}
    state = {}
    for key, value in reference.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        key = key.replace(".blocks.", ".").replace("stem.", "downsample_layers.0.")
        for stage in range(1, 4):
            key = key.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        state[key.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value
        if value.ndim == 4 and value.shape[-1] == 1 and "dwconv" not in key:  # the papers' code has linears
            state[key.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value[:, :, 0, 0]
    return state


def test_timms_filter_judges_the_official_layout(tmp_path: Path) -> None:
    import timm

    reference = timm.create_model("convnext_atto", num_classes=7, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    torch.save({"model": official(reference)}, tmp_path / "official.pth")
    assert exported(tmp_path / "official.pth", tmp_path).name.startswith("timm")


def test_torchvision_judges_its_own(tmp_path: Path) -> None:
    from torchvision.models.convnext import CNBlockConfig

    widths = (8, 16, 24, 32, None)
    stages = [CNBlockConfig(widths[i], widths[i + 1], 1) for i in range(4)]
    save_file(torchvision.models.ConvNeXt(stages, num_classes=7).state_dict(), tmp_path / "tv.safetensors")
    assert exported(tmp_path / "tv.safetensors", tmp_path).name.startswith("torchvision")


@pytest.mark.parametrize("second", [False, True])
def test_transformers_judges_its_own(second: bool, tmp_path: Path) -> None:
    kind = "ConvNextV2" if second else "ConvNext"
    config = getattr(transformers, f"{kind}Config")(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], num_labels=7, image_size=64
    )
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    model.save_pretrained(tmp_path / "hub")
    assert exported(tmp_path / "hub", tmp_path).name.startswith("transformers")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("BitImageProcessor", {"size": {"shortest_edge": 96}, "crop_size": {"height": 64, "width": 64}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.875}),
    ],
)
def test_the_processor_that_the_folder_names_judges_the_preprocessing(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config = transformers.ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], num_labels=5)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "hub")
    own = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": kind, **sizes}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(own))
    assert exported(tmp_path / "hub", tmp_path).preprocessing == "transformers"


def test_random_weights_are_judged_by_nobody_else(tmp_path: Path) -> None:
    made = api.export("random", variant="test_convnext", format="eager", image_size=(64, 64), out=tmp_path / "a")
    assert made.manifest.oracle == OracleRecord(name="self", why="random weights have no other source")


# Faults --------------------------------------------------------------------------------------------------------------

Spoil = Callable[[dict[str, Tensor]], None]


def in_tensors(spoil: Spoil) -> Callable[[pytest.MonkeyPatch], None]:
    """Between the converter and the module."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = parameters.filled

        def wrong(spec: ModelSpec, converted: Any, where: str) -> nn.Module:
            model = right(spec, converted, where)
            with torch.no_grad():
                spoil(model.state_dict())
            return model

        patch.setattr(weights, "filled", wrong)

    return plant


def in_spec(**fields: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = weights.with_facts
        patch.setattr(weights, "with_facts", lambda *given: msgspec.structs.replace(right(*given), **fields))

    return plant


def in_facts(**fields: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = weights.preprocessing_of

        def wrong(*given: Any) -> Preprocessing:
            return msgspec.structs.replace(right(*given), **fields)

        patch.setattr(weights, "preprocessing_of", wrong)

    return plant


def bgr(state: dict[str, Tensor]) -> None:
    state["stem.convs.0.weight"].copy_(state["stem.convs.0.weight"].flip(1))


def blocks_swapped(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.startswith("stages.2.0.")]:
        other = name.replace("stages.2.0.", "stages.2.1.")
        first = state[name].clone()
        state[name].copy_(state[other])
        state[other].copy_(first)


def layer_scale_dropped(state: dict[str, Tensor]) -> None:
    for name, value in state.items():
        if name.endswith("layer_scale"):
            value.fill_(1)


def classes_shifted(state: dict[str, Tensor]) -> None:
    for name in ("head.classifier.weight", "head.classifier.bias"):
        state[name].copy_(state[name].roll(1, 0))


def sides_exchanged(state: dict[str, Tensor]) -> None:
    for value in state.values():
        if value.ndim == 4:
            value.copy_(value.transpose(2, 3).contiguous())


def norm_forgotten(state: dict[str, Tensor]) -> None:
    state["downsamples.1.norm.bias"].zero_()


def image_in_bgr(patch: pytest.MonkeyPatch) -> None:
    right = preprocess.transform

    def wrong(*given: Any) -> Callable[[Image.Image], Any]:
        pixels = right(*given)
        return lambda image: pixels(image)[::-1].copy()

    patch.setattr(preprocess, "transform", wrong)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "BGR for RGB in the stem": in_tensors(bgr),
    "BGR for RGB in the images": image_in_bgr,
    "two blocks swapped": in_tensors(blocks_swapped),
    "layer scale dropped": in_tensors(layer_scale_dropped),
    "classes shifted by one": in_tensors(classes_shifted),
    "height and width exchanged": in_tensors(sides_exchanged),
    "a norm's bias forgotten": in_tensors(norm_forgotten),
    "another epsilon": in_spec(norm_eps=1e-3),
    "another activation": in_spec(activation="gelu"),
    "another mean": in_facts(mean=(0.485, 0.456, 0.406)),
    "another std": in_facts(std=(0.229, 0.224, 0.225)),
    "another interpolation": in_facts(interpolation="bilinear"),
    "another crop": in_facts(crop_pct=1.0),
}


@pytest.mark.parametrize("plant", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_in_loading_or_converting_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(ParityError):
        exported(folder, tmp_path)
    assert not (tmp_path / "artifact").exists()
