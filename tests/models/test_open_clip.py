"""An image tower of open_clip beside open_clip's own code: its outputs, and what its transform makes of an image."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from convnext_deploy.data import preprocess
from convnext_deploy.errors import WeightsError
from convnext_deploy.models.checkpoint import load

pytest.importorskip("open_clip")
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2

SIZE = 64
TOWER: dict[str, Any] = {
    "timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "", "timm_drop": 0.0,
    "image_size": SIZE,
}  # fmt: skip
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def written(folder: Path, projection: str, settings: PreprocessCfg) -> CLIP:
    vision = {**TOWER, "timm_proj": projection}
    model = CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.visual.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT},
        "preprocess_cfg": asdict(settings),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@torch.inference_mode()
def test_an_image_is_encoded_as_open_clip_encodes_it(projection: str, tmp_path: Path) -> None:
    reference = written(tmp_path, projection, PreprocessCfg(size=SIZE))
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    expected = reference.encode_image(images)
    found = load(str(tmp_path)).model(images)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_a_classifier_behind_the_tower_is_not_left_out_for_its_projection(tmp_path: Path) -> None:
    """As fine-tunes of CLIP are saved: the projection's numbers would pass for the classes'."""
    state = written(tmp_path, "linear", PreprocessCfg(size=SIZE)).state_dict()
    tuned = {f"encoder.model.{key}": value for key, value in state.items()}
    tuned |= {"classification_head.weight": torch.ones(5, 24), "classification_head.bias": torch.ones(5)}
    torch.save(tuned, tmp_path / "tuned.pth")
    hint = r"does not: classification_head\.weight, .*--weights-key encoder\.model\. "
    with pytest.raises(WeightsError, match=hint):
        load(str(tmp_path / "tuned.pth"))
    tower = load(str(tmp_path / "tuned.pth"), weights_key="encoder.model.")
    assert tower.model.spec.num_classes == 24


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"},
        {"resize_mode": "squash"},
    ],
)
@pytest.mark.parametrize("shape", [(90, 130, 3), (64, 50, 3), (31, 400, 3)])
def test_an_image_is_prepared_as_open_clip_prepares_it(
    settings: dict[str, Any], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    config = PreprocessCfg(size=SIZE, **settings)
    written(tmp_path, "linear", config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    expected = image_transform_v2(config, is_train=False)(image).numpy()
    facts = load(str(tmp_path)).preprocessing
    pixels = preprocess.transform(facts, (SIZE, SIZE), 3)(image)
    found = preprocess.as_input(pixels[None], facts, "float32")[0]
    assert np.abs(np.asarray(found) - expected).max() < 1e-6  # pixels are equal: less than a fortieth of one of 255
