"""Every number of every record and configuration, one at a time far too large or too small: no reader pays for it.

A reader has 2 s of processor time and 256 MB (`fuzz.bounded`); what it takes, its next user takes too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import msgspec
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from detectors import detector, saved
from fuzz_readers import readers
from PIL import Image
from references import DEPTHS, DIMS, randomize_
from segmenters import upernet

from convnext_deploy import api
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.data import preprocess
from convnext_deploy.errors import WeightsError
from convnext_deploy.models import checkpoint
from convnext_deploy.records.manifest import ModelSpec

NETWORK = {"model_type": "convnext", "hidden_sizes": list(DIMS), "depths": list(DEPTHS), "num_channels": 3}
DETECTOR = {
    "anchor_sizes": [[x, 1.25 * x, 1.5 * x] for x in (8.0, 16.0, 32.0, 64.0, 128.0)],
    "aspect_ratios": [[0.5, 1.0, 2.0]] * 5,
    "score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 30, "topk_candidates": 100, "min_size": 64,
    "max_size": 96, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2],
}  # fmt: skip
MMPRETRAIN = """model = dict(
    backbone=dict(type='ConvNeXt', arch=dict(depths=[1, 2, 2, 1], channels=[16, 24, 32, 40]), in_channels=3,
                  norm_cfg=dict(type='LN2d', eps=1e-6), out_indices=-1),
    head=dict(type='LinearClsHead', num_classes=3))
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [dict(type='ResizeEdge', scale=36, edge='short'), dict(type='CenterCrop', crop_size=32)]
"""


@pytest.mark.parametrize("name", readers(Path()))
def test_no_number_of_a_record_costs_more_than_it_is_worth(name: str, tmp_path: Path) -> None:
    contents, _, reader = readers(tmp_path)[name]
    assert fuzz.tracebacks(fuzz.numbers(contents), reader) == {}


def of_transformers(folder: Path) -> dict[str, bytes]:
    config = transformers.ConvNextConfig(hidden_sizes=list(DIMS), depths=list(DEPTHS), num_labels=3)
    model: Any = transformers.ConvNextForImageClassification(config)
    randomize_(model)
    model.save_pretrained(folder)
    facts = {**NETWORK, "image_size": 32, "layer_norm_eps": 1e-12, "id2label": {"0": "a", "1": "b", "2": "c"}}
    ours = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875,
            "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3, "rescale_factor": 0.0039, "resample": 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(ours))
    return {"config.json": json.dumps(facts).encode(), "preprocessor_config.json": json.dumps(ours).encode()}


def of_another_processor(folder: Path) -> dict[str, bytes]:
    of_transformers(folder)
    facts = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, "do_resize": True,
             "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}  # fmt: skip
    return {"preprocessor_config.json": json.dumps(facts).encode()}


def of_timm(folder: Path) -> dict[str, bytes]:
    model = randomize_(timm.create_model("convnext_atto", num_classes=3, depths=DEPTHS, dims=DIMS))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    said = {"input_size": [3, 32, 32], "test_input_size": [3, 64, 64], "test_crop_pct": 1.0, "crop_pct": 0.9,
            "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}  # fmt: skip
    arguments = {"depths": list(DEPTHS), "dims": list(DIMS), "kernel_sizes": 7, "norm_eps": 1e-6}
    facts = {"architecture": "convnext_atto", "num_classes": 3, "model_args": arguments, "pretrained_cfg": said}
    return {"config.json": json.dumps(facts).encode()}


def of_open_clip(folder: Path) -> dict[str, bytes]:
    of_timm(folder)
    vision = {"timm_model_name": "convnext_atto", "image_size": 32}
    facts = {"open_clip": {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"size": [32, 32], "mean": [0.5]}}}
    return {"config.json": json.dumps(facts).encode()}


def of_a_segmenter(folder: Path) -> dict[str, bytes]:
    upernet().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SegformerImageProcessor", "size": size, "do_resize": True})
    )
    facts = {"model_type": "upernet", "backbone_config": NETWORK, "pool_scales": [1, 2, 3, 6], "loss_ignore_index": 255}
    return {"config.json": json.dumps(facts).encode()}


def of_a_detector(folder: Path) -> dict[str, bytes]:
    saved(detector(), folder / "weights.pth")
    return {"detector.json": json.dumps(DETECTOR).encode()}


def of_mmpretrain(folder: Path) -> dict[str, bytes]:
    of_timm(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    return {"config.py": MMPRETRAIN.encode()}


@pytest.mark.parametrize(
    "make",
    [of_transformers, of_another_processor, of_timm, of_open_clip, of_a_segmenter, of_a_detector, of_mmpretrain],
)
def test_no_number_of_a_configuration_costs_more_than_it_is_worth(
    make: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    image = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    task: Any = {"of_a_segmenter": "segment", "of_a_detector": "detect"}.get(make.__name__, "classify")
    for name, content in make(tmp_path).items():
        file = tmp_path / name
        beside = name.endswith(".py") or name == "detector.json"
        weights = next(tmp_path.glob("weights.*")) if beside else tmp_path

        def read(text: bytes, file: Path = file, weights: Path = weights, beside: bool = beside) -> None:
            file.write_bytes(text)
            found = checkpoint.load(str(weights), task=task, config=file if beside else None)
            spec = found.model.spec
            assert msgspec.convert(msgspec.to_builtins(spec), ModelSpec) == spec
            preprocess.transform(found.preprocessing, spec.image_size, spec.in_chans)(image)

        read(content)  # before, it is taken
        assert fuzz.tracebacks(fuzz.numbers([content]), read) == {}
        file.write_bytes(content)


@pytest.mark.parametrize("format", ["eager", pytest.param("onnx", marks=pytest.mark.slow)])
def test_no_number_of_an_artifact_costs_more_than_it_is_worth(
    format: str, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    """Opened, and an image classified: somebody else's artifact is used so."""
    artifact = artifact_of(format)
    for file in artifact.manifest.files:
        (tmp_path / file.path).write_bytes((artifact.path / file.path).read_bytes())
    image = Image.fromarray(np.zeros((30, 40, 3), np.uint8))

    def read(content: bytes) -> None:
        (tmp_path / manifest.MANIFEST_NAME).write_bytes(content)
        with api.load(tmp_path, threads=1) as session:
            session.predict([image])

    content = (artifact.path / manifest.MANIFEST_NAME).read_bytes()
    read(content)
    assert fuzz.tracebacks(fuzz.numbers([content]), read) == {}


@pytest.mark.parametrize("how", ["one number", "one tensor"])
def test_a_file_that_repeats_itself_is_refused_before_it_is_copied(how: str, tmp_path: Path) -> None:
    state = {"head.fc.weight": torch.zeros(1).expand(10_000, 1000)}
    if how == "one tensor":
        whole = torch.zeros(1000, 1000)
        state = {f"{number}.weight": whole for number in range(16)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="which repeat what is in it; save each tensor as"):
        checkpoint.load(str(tmp_path / "w.pth"))
