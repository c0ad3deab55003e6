"""The configuration inside a checkpoint of mmpretrain, mmdetection or mmsegmentation: read, and never executed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from references import DEPTHS, DIMS, Official
from torch import Tensor

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import mm_config
from convnext_deploy.models.checkpoint import load
from convnext_deploy.models.mm_config import mm_facts

# As mmengine writes them: `runner.cfg.pretty_text`.
CLASSIFIER = f"""
auto_scale_lr = dict(base_batch_size=4096)
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(backbone=dict(
    arch=dict(channels={list(DIMS)}, depths={list(DEPTHS)}), drop_path_rate=0.1, type='ConvNeXt'),
    type='ImageClassifier')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(backend='pillow', edge='short', interpolation='bilinear', scale=256, type='ResizeEdge'),
    dict(crop_size=192, type='CenterCrop'),
    dict(type='PackInputs'),
]
"""
OLDER = """
img_norm_cfg = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', size=(128, -1), backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=96),
    dict(type='Normalize', **img_norm_cfg),
]
"""
SQUASHED = """
model = dict(type='ImageClassifier', data_preprocessor=dict(mean=[0, 0, 0], std=[255, 255, 255], to_rgb=True))
test_pipeline = [dict(type='Resize', scale=384, backend='pillow', interpolation='bicubic')]
"""
DETECTOR = """
model = dict(data_preprocessor=dict(
    bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], type='DetDataPreprocessor'))
test_pipeline = [dict(keep_ratio=True, scale=(1333, 800), type='Resize')]
"""


def state() -> dict[str, Tensor]:
    names = {"dwconv": "depthwise_conv", "pwconv1": "pointwise_conv1", "pwconv2": "pointwise_conv2"}
    found = {}
    for key, value in Official(DEPTHS, DIMS, v2=False, classes=7).state_dict().items():
        key = ".".join(names.get(part, part) for part in key.split("."))
        key = f"norm3.{key[5:]}" if key.startswith("norm.") else key
        found[key.replace("head.", "head.fc.") if key.startswith("head.") else f"backbone.{key}"] = value
    return found


@pytest.mark.parametrize("name", ["cfg", "config"])
def test_the_configuration_of_a_checkpoint_gives_its_preprocessing(name: str, tmp_path: Path) -> None:
    torch.save({"meta": {name: CLASSIFIER, "epoch": 3}, "state_dict": state()}, tmp_path / "model.pth")
    loaded = load(str(tmp_path / "model.pth"))
    found = loaded.preprocessing
    assert loaded.model.spec.image_size == (192, 192)
    assert found.mean == pytest.approx((0.485, 0.456, 0.406))
    assert found.std == pytest.approx((0.229, 0.224, 0.225))
    assert (found.crop_pct, found.interpolation, found.assumed) == (0.75, "bilinear", ())


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (OLDER, {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "input_size": [96, 96],
                 "crop_pct": 0.75}),
        (SQUASHED, {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic", "input_size": [384, 384],
                    "crop_pct": 1.0, "crop_mode": "squash"}),
        (DETECTOR, {"mean": [123.675 / 255, 116.28 / 255, 103.53 / 255],
                    "std": [58.395 / 255, 57.12 / 255, 57.375 / 255]}),
        ("not python at all {", {}),
        ("mean = [1, 2, 3]\nimport os\nmodel = os.system('true')", {}),
        ("test_pipeline = [3, dict(type='Resize')]\nmodel = 3", {}),
    ],
)  # fmt: skip
def test_of_every_form_what_is_plain_is_read(text: str, facts: dict[str, Any]) -> None:
    assert mm_facts(text, "a.pth") == facts


@pytest.mark.parametrize("said", ["to_rgb=False", "num_classes=1000"])
def test_images_with_blue_first_are_refused(said: str) -> None:
    """Which is what its preprocessors do where nothing is said."""
    with pytest.raises(WeightsError, match=r"normalizes images with blue first \(to_rgb=False\)"):
        mm_facts(CLASSIFIER.replace("to_rgb=True", said), "a.pth")


def test_nothing_of_a_configuration_runs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    text = f"img_norm_cfg = dict(mean=[open({str(marker)!r}, 'w').write('x')], std=[1])\n__import__('os').mkdir('x')"
    assert mm_facts(text, "a.pth") == {}
    assert not marker.exists()


BASES = {
    "base/models.py": "model = dict(type='ImageClassifier', backbone=dict(type='ConvNeXt', arch='tiny',\n"
    "    drop_path_rate=0.1), neck=None, head=dict(type='LinearClsHead', num_classes=1000, topk=(1, 5)))\n",
    "base/data.py": "normal = dict(mean=[127.5] * 3)\nmean = [127.5, 127.5, 127.5]\n"
    "data_preprocessor = dict(num_classes=1000, mean=mean, std=[51, 51, 51], to_rgb=True)\n"
    "test_pipeline = [dict(type='ResizeEdge', scale=80, edge='short', interpolation='bicubic'),\n"
    "    dict(type='CenterCrop', crop_size=64)]\nlr = 4e-3 * 2\n",
    "own.py": "_base_ = ['base/models.py', 'base/data.py']\n"
    f"model = dict(backbone=dict(arch=dict(_delete_=True, depths={list(DEPTHS)}, channels={list(DIMS)})),\n"
    "    head=dict(num_classes=7))\n"
    "data_preprocessor = dict(std=[102, 102, 102], mean=_base_.mean)\n"
    "import os\nos.remove('nothing')\n",
}


def written(folder: Path, **changed: str) -> Path:
    for name, text in (BASES | {"own.py": BASES["own.py"] + changed.get("more", "")}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "own.py"


def test_a_configuration_that_the_user_names_begins_in_others_and_is_not_executed(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "model.pth")
    loaded = load(str(tmp_path / "model.pth"), config=written(tmp_path))
    found = loaded.preprocessing
    assert loaded.model.spec.image_size == (64, 64)
    assert (found.mean, found.std) == ((0.5,) * 3, (0.4,) * 3)
    assert (found.crop_pct, found.interpolation, found.assumed) == (0.8, "bicubic", ())
    assert mm_config.read_config(tmp_path / "own.py")["model"]["neck"] is None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            "model['x'] = 1\nmodel = dict(backbone=dict(arch='small'), head=dict(num_classes=7))",
            r"arch 'small', and its tensors have depths",
        ),
        ("model = dict(head=dict(num_classes=8))", "says num_classes 8, and its tensors 7"),
        ("model = dict(backbone=dict(in_channels=1))", "says in_chans 1, and its tensors 3"),
        ("model = dict(backbone=dict(use_grn=True))", "says grn True, and its tensors False"),
        ("model = dict(backbone=dict(stem_patch_size=8))", "asks for stem_patch_size 8; expected 4"),
        ("model = dict(backbone=dict(act_cfg=dict(type='ReLU')))", "asks for act_cfg 'ReLU'; expected one of gelu"),
        ("model = dict(backbone=dict(type='ResNet'))", "describes a backbone 'ResNet'; expected ConvNeXt"),
        (
            "model = dict(neck=dict(type='GeneralizedMeanPooling'))",
            "the neck 'GeneralizedMeanPooling'; expected Global",
        ),
        ("data_preprocessor = dict(to_rgb=False)", "blue first"),
        ("_base_ = 'own.py'", "begins in own.py, which begins in it again"),
        ("_base_ = 'gone.py'", "gone.py cannot be read: No such file"),
        ("with read_base():\n    from .x import *", r"imports its bases \(with read_base\(\)\), which would run them"),
        ("model = dict(", "is no Python"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_or_cannot_be_followed_is_refused(
    tmp_path: Path, more: str, why: str
) -> None:
    torch.save(state(), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=why) as refusal:
        load(str(tmp_path / "model.pth"), config=written(tmp_path, more=more))
    assert "\n" not in str(refusal.value)


def test_a_configuration_against_the_users_own_options_or_the_checkpoints_is_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "plain.pth")
    torch.save({"meta": {"cfg": CLASSIFIER}, "state_dict": state()}, tmp_path / "with.pth")
    with pytest.raises(WeightsError, match=r"mean is 0.5,0.5,0.5 in --config own.py and 0.1,0.1,0.1 given"):
        load(str(tmp_path / "plain.pth"), config=written(tmp_path), preprocessing={"mean": (0.1,) * 3})
    with pytest.raises(WeightsError, match=r"in --config own.py and .* beside"):
        load(str(tmp_path / "with.pth"), config=written(tmp_path))
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(WeightsError, match=r"ends in '.yaml'; expected .py .* or .json"):
        load(str(tmp_path / "plain.pth"), config=tmp_path / "a.yaml")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "do_normalize": true}')
    found = load(str(tmp_path / "plain.pth"), config=tmp_path / "preprocessor_config.json").preprocessing
    assert found.mean == (0.1, 0.2, 0.3)


def test_a_backbones_configuration_says_its_epsilon_activation_levels_and_the_order_of_norm_and_pooling() -> None:
    text = (
        "model = dict(backbone=dict(type='mmpretrain.ConvNeXt', arch='tiny', out_indices=[1, 2, 3],"
        " act_cfg=dict(type='SiLU'), norm_cfg=dict(type='LN2d', eps=1e-5), gap_before_final_norm=False))"
    )
    assert mm_facts(text, "a") == {
        "arch": "tiny", "activation": "silu", "norm_eps": 1e-5, "head_norm_eps": 1e-5, "levels": (2, 3, 4),
    }  # fmt: skip
    head = (
        text[:-1]
        + ", neck=dict(type='GlobalAveragePooling'), head=dict(type='MultiLabelLinearClsHead', num_classes=4))"
    )
    assert mm_facts(head, "a").items() >= {"head": "norm_pool", "problem": "multi-label", "num_classes": 4}.items()
