"""The configuration inside a checkpoint of mmpretrain, mmdetection or mmsegmentation: read, and never executed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from references import DEPTHS, DIMS, Official
from torch import Tensor

from convnext_deploy.errors import WeightsError
from convnext_deploy.models.checkpoint import load
from convnext_deploy.models.mm_config import mm_facts

# As mmengine writes them: `runner.cfg.pretty_text`.
CLASSIFIER = """
auto_scale_lr = dict(base_batch_size=4096)
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1, type='ConvNeXt'), type='ImageClassifier')
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
