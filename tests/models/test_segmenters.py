"""Whole segmenters: what is read of UPerNet's checkpoints, beside transformers' own model of the same file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import TOLERANCE, images, relative_error
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from segmenters import CLASSES, logits_of, saved, upernet
from torch.nn import functional as F

from convnext_deploy.artifact.label_maps import classes_of, resized
from convnext_deploy.errors import WeightsError
from convnext_deploy.models import passes
from convnext_deploy.models import upernet as head
from convnext_deploy.models.checkpoint import load


@pytest.mark.parametrize("v2", [pytest.param(False, id="V1"), pytest.param(True, id="V2")])
@torch.inference_mode()
def test_a_segmenter_gives_its_heads_logits_and_what_stands_beside_it(v2: bool, tmp_path: Path) -> None:
    model = upernet(v2)
    loaded = load(saved(model, tmp_path), task="segment")
    assert relative_error(loaded.model(images()), logits_of(model, images())) <= TOLERANCE
    assert loaded.model.spec.num_classes == CLASSES
    assert loaded.labels == tuple(f"LABEL_{number}" for number in range(CLASSES))
    assert (loaded.preprocessing.crop_mode, loaded.preprocessing.crop_pct) == ("squash", 1.0)
    assert loaded.model.spec.image_size == (64, 64)
    assert loaded.preprocessing.assumed == ()
    assert "auxiliary_head" in (loaded.note or "")


@torch.inference_mode()
def test_resizing_without_a_framework_gives_transformers_logits_and_classes(tmp_path: Path) -> None:
    model = upernet()
    loaded = load(saved(model, tmp_path), task="segment")
    x = F.interpolate(images(), size=(96, 40))  # no multiple of the stride
    whole = model(x).logits
    ours = loaded.model(x).numpy()
    assert np.abs(resized(ours, (96, 40)) - whole.numpy()).max() <= 1e-4 * whole.abs().max()
    passes.put_out_classes(loaded.model)
    classes = loaded.model(x)
    assert classes.dtype == torch.int32
    assert (classes == whole.argmax(1)).float().mean() > 0.999
    assert (classes_of(ours[0], (96, 40)) == classes[0].numpy()).mean() > 0.999


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 5), (13, 40), (16, 16)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_by_products_is_adaptive_average_pooling(height: int, width: int, bins: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(head.pool(x, bins), F.adaptive_avg_pool2d(x, bins), rtol=0, atol=1e-14)


@torch.inference_mode()
def test_folding_batch_norms_keeps_the_logits(tmp_path: Path) -> None:
    loaded = load(saved(upernet(), tmp_path), task="segment")
    model, x = loaded.model.double(), images().double()
    before = model(x)
    passes.fold_batch_norm(model)
    assert relative_error(model(x), before) <= 1e-12
    assert not [name for name in model.state_dict() if ".norm.mean" in name]


@torch.inference_mode()
def test_mmsegmentations_names_and_any_prefix_are_read(tmp_path: Path) -> None:
    model = upernet()
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("batch_norm", "bn").replace("decode_head.classifier", "decode_head.conv_seg")
        state[f"model.{name}"] = value
    torch.save({"state_dict": state}, tmp_path / "iter_160000.pth")
    loaded = load(str(tmp_path / "iter_160000.pth"), task="segment", image_size=(64, 64))
    assert relative_error(loaded.model(images()), logits_of(model, images())) <= TOLERANCE
    assert loaded.provenance["pool_scales"].how == "assumed"  # nothing beside it says them


def test_facts_of_the_masks_come_from_the_configuration_and_the_processor(tmp_path: Path) -> None:
    folder = saved(upernet(pool_scales=[1, 4], loss_ignore_index=254), tmp_path, do_reduce_labels=True)
    found = load(folder, task="segment").model.spec.segmentation
    assert found is not None
    assert (found.pool_scales, found.ignored, found.reduce_labels) == ((1, 4), 254, True)


def refused(folder: Path, message: str, **arguments: Any) -> None:
    with pytest.raises(WeightsError, match=message) as raised:
        load(str(folder), task="segment", **arguments)
    assert "\n" not in str(raised.value)


def test_what_is_no_segmenter_or_another_is_refused_by_name(tmp_path: Path) -> None:
    folder = Path(saved(upernet(), tmp_path))
    refused(folder, "expected whole images", preprocessing={"crop_pct": 0.875})
    refused(folder, "levels 4 are for --task features", levels=(4,))
    file = folder / "model.safetensors"
    state = load_tensors(file.read_bytes())  # not mapped: the file is written over
    save_file(state | {"decode_head.extra.weight": torch.ones(3)}, file, {"format": "pt"})
    refused(folder, "decode_head that UPerNet's head does not: decode_head.extra.weight")
    save_file({k: v for k, v in state.items() if "psp_modules.3" not in k}, file, {"format": "pt"})
    refused(folder, "pools at 3 scales")
    save_file({k: v for k, v in state.items() if "fpn_convs.1.batch_norm" not in k}, file, {"format": "pt"})
    refused(folder, "lacks segmenter.smooths.1.norm")
    save_file({k: v for k, v in state.items() if not k.startswith("decode_head")}, file, {"format": "pt"})
    refused(folder, "no decode_head.classifier.weight")
    config = json.loads((folder / "config.json").read_text())
    save_file(state, file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a"}}))
    refused(folder, "1 label for 5 classes")


def test_a_segmenter_asked_for_classes_is_told_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--task segment"):
        load(saved(upernet(), tmp_path))
