"""The bundled model and its test images: what the model card says, and what a new user sees first."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from convnext_deploy import api
from convnext_deploy.accuracy.prediction_files import read_predictions
from convnext_deploy.data import preprocess, sources
from convnext_deploy.records.accuracy import EvalResult

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "fashion-mnist"
MODEL, IMAGES = EXAMPLE / "model.safetensors", EXAMPLE / "test-2000.parquet"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    for name in ("onnx", "openvino"):
        api.export(str(MODEL), format=name, input="uint8", out=folder / name)
    return {name: folder / name for name in ("onnx", "openvino")}


def test_the_bundled_files_are_small() -> None:
    assert MODEL.stat().st_size <= 3e6
    assert IMAGES.stat().st_size <= 1.5e6


def test_the_model_says_what_it_is(artifacts: dict[str, Path]) -> None:
    found = api.load(artifacts["onnx"]).manifest
    assert found.labels is not None
    assert found.labels[9] == "Ankle boot"
    assert found.preprocessing.assumed == ()
    assert (found.model.num_classes, found.model.in_chans, found.model.image_size) == (10, 1, (64, 64))
    assert found.weights.licence == "mit"


def test_both_artifacts_score_what_timms_own_model_scores(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """The reference is timm's ConvNeXt with the raw checkpoint, fed with float images."""
    found = api.load(artifacts["onnx"]).manifest
    source = sources.open_source(str(IMAGES))
    to_pixels = preprocess.transform(found.preprocessing, found.model.image_size, 1)
    pixels = np.stack([to_pixels(source.read(index)) for index in range(len(source))])
    model = timm.models.convnext.ConvNeXt(
        in_chans=1, num_classes=10, depths=found.model.depths, dims=found.model.dims, ls_init_value=1.0
    ).eval()
    model.load_state_dict(load_file(MODEL))
    mean, std = found.preprocessing.mean[0], found.preprocessing.std[0]
    with torch.inference_mode():
        images = (torch.from_numpy(pixels).double() / 255 - mean) / std
        logits = torch.cat([model(chunk.float()) for chunk in images.split(250)])
    expected = logits.argmax(1).numpy()
    for name, path in artifacts.items():
        result = api.evaluate(path, str(IMAGES), out=tmp_path / name)
        predicted = read_predictions(tmp_path / f"{name}.npz").top_classes[:, 0]
        assert np.mean(predicted == expected) >= 0.999
        assert isinstance(result, EvalResult)
        assert result.top1 == pytest.approx(float(np.mean(expected == source.labels)), abs=1e-3)


def test_the_model_card_states_the_measured_score() -> None:
    training = json.loads((EXAMPLE / "training.json").read_text())
    assert f"{training['test']['top1']:.2%}" in (EXAMPLE / "MODEL_CARD.md").read_text()
