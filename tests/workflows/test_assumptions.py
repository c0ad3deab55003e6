"""What is known, given or assumed of a checkpoint; and planted models whose preprocessing labelled images tell."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import convnext_deploy
from convnext_deploy.cli.app import app
from convnext_deploy.data import preprocess, sources
from convnext_deploy.errors import CheckFailed, DataError, UsageError
from convnext_deploy.models.checkpoint import load
from convnext_deploy.records.accuracy import EvalResult
from convnext_deploy.records.manifest import Preprocessing, Provenance
from convnext_deploy.workflows import assumptions

CLASSES = 5
IMAGES = 120
RIGHT = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict and images in class folders, which it gets all right at 64 pixels, with 0.5 and uncropped."""
    folder = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    model = timm.create_model("test_convnext2", num_classes=CLASSES).eval()
    torch.nn.init.normal_(model.head.fc.weight, std=1.0)
    pictures = []
    for _ in range(IMAGES):
        coarse = generator.integers(0, 256, (int(generator.integers(3, 24)),) * 2 + (3,), np.uint8)
        pictures.append(Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC))
    read = preprocess.transform(RIGHT, (64, 64), 3)
    batch = torch.from_numpy(preprocess.as_input(np.stack([read(one) for one in pictures]), RIGHT, "float32"))
    with torch.inference_mode():
        logits = model(batch)
        model.head.fc.bias -= logits.mean(0)
        labels = (logits - logits.mean(0)).argmax(1)
    for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        (folder / "val" / f"c{label}").mkdir(parents=True, exist_ok=True)
        picture.save(folder / "val" / f"c{label}" / f"{number:03d}.png")
    assert len(list((folder / "val").iterdir())) == CLASSES
    torch.save(model.state_dict(), folder / "my.pth")
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assumptions, "SIZES", (64, 224))


@pytest.mark.usefixtures("few")
def test_images_tell_the_size_statistics_and_crop_that_a_model_was_made_for(planted: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"data": planted / "val", "format": "eager", "out": tmp_path / "a", "say": said.append}
    told: list[tuple[int, int, str]] = []
    with pytest.raises(CheckFailed, match=r"what is assumed does not fit: 64x64 pixels, mean 0.5,0.5,0.5") as refusal:
        convnext_deploy.export(planted / "my.pth", **options, progress=lambda *step: told.append(step))
    first = [(done, total) for done, total, what in told if what.startswith("trying 6 combinations of size")]
    assert first[:6] == [(done, 6) for done in range(6)]
    assert "--image-size 64 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --crop-pct 1" in str(refusal.value)
    assert not (tmp_path / "a").exists()
    best = next(line for line in said if line.startswith("fits best: "))
    found = re.search(r"top-1 ([\d.]+)% \(([\d.]+)% to ([\d.]+)%, 95 %\)", best)
    assert found is not None
    assert float(found[1]) == 100
    assert float(found[2]) < 100
    assert any(line.startswith("taken: 224x224 pixels, mean 0.485,0.456,0.406") for line in said)

    given: dict[str, Any] = {"image_size": 64, "preprocessing": {"mean": 0.5, "std": 0.5, "crop_pct": 1.0}}
    convnext_deploy.export(planted / "my.pth", **options, **given)
    assert "what is assumed or given is as good as any other, as far as 60 other images show" in said
    result = convnext_deploy.evaluate(tmp_path / "a", planted / "val")
    assert isinstance(result, EvalResult)
    assert result.top1 == 1.0


def test_the_statistics_of_the_images_themselves_are_tried_too(planted: Path) -> None:
    """A model of grey or medical images was often trained with those of its own data."""
    loaded = load(str(planted / "my.pth"), image_size=(64, 64))
    source = sources.open_source(str(planted / "val"))
    mean, std = assumptions._statistics(loaded, source)
    pixels = np.concatenate([np.asarray(source.read(index)).reshape(-1, 3) / 255 for index in range(len(source))])
    np.testing.assert_allclose(mean, pixels.mean(0), atol=0.05)
    np.testing.assert_allclose(std, pixels.std(0), atol=0.05)
    assumed, bases, _ = assumptions._candidates(loaded, {"mean", "std"}, lambda: (mean, std))
    usual = [(assumed.mean, assumed.std), ((0.5,) * 3, (0.5,) * 3)]
    assert {(base.mean, base.std) for base in bases} == {*usual, (mean, std)}


@pytest.mark.usefixtures("few")
def test_what_is_assumed_is_judged_beside_what_is_given(planted: Path, tmp_path: Path) -> None:
    said: list[str] = []
    known: dict[str, Any] = {"image_size": 64, "preprocessing": {"mean": 0.5, "std": 0.5}}
    with pytest.raises(CheckFailed, match="export again with --crop-pct 1, or give"):
        convnext_deploy.export(planted / "my.pth", data=planted / "val", out=tmp_path / "a", say=said.append, **known)
    tried = [line for line in said if line.startswith("trying")]
    assert tried[0] == "trying 3 combinations of size, statistics and crop on 24 images"
    known["preprocessing"]["crop_pct"] = 1.0
    del known["image_size"]
    with pytest.raises(CheckFailed, match="export again with --image-size 64, or give"):
        convnext_deploy.export(planted / "my.pth", data=planted / "val", out=tmp_path / "a", **known)


@pytest.mark.usefixtures("few")
def test_a_given_value_is_taken_and_the_user_is_told_which_fits_better(planted: Path, tmp_path: Path) -> None:
    """In the output, the manifest and `inspect`; a value that somebody remembers wrongly is as silent a loss."""
    command = ["export", "--weights", str(planted / "my.pth"), "--data", str(planted / "val"), "--format", "eager"]
    command += ["--out", str(tmp_path / "a"), "--image-size", "224", "--mean", "0.5", "--std", "0.5"]
    run = CliRunner().invoke(app, [*command, "--crop-pct", "1"])
    assert run.exit_code == 0, run.output
    made = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert made["model"]["image_size"] == [224, 224]
    told = made["provenance"]["image_size"]["fits_better"]
    assert re.fullmatch(r"64x64 \(top-1 100.00%, not [\d.]+%, on 60 images\)", told)
    assert {name for name, one in made["provenance"].items() if one["fits_better"]} == {"image_size"}
    assert "to take what fits better: --image-size 64" in run.stderr
    line = f"--image-size gives image_size 224x224, and labelled images prefer {told}: what was given is taken"
    assert line in run.stdout
    assert line in CliRunner().invoke(app, ["inspect", str(tmp_path / "a")]).stdout


def test_an_error_about_what_is_assumed_leaves_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    own = assumptions.Candidate((224, 224), (0.5,), (0.5,), 0.875)
    cropped, smaller = replace(own, crop=1.0), replace(own, size=(64, 64), crop=1.0)
    hits = {own: 200, cropped: 500, smaller: 900}
    monkeypatch.setattr(
        assumptions._Trial,
        "extend",
        lambda trial, candidate, stop: trial.hits.__setitem__(candidate, np.arange(stop) < hits[candidate]),
    )
    trial: Any = assumptions._Trial(cast("Any", None), cast("Any", range(1000)), None)
    given = {"image_size": Provenance(value="224x224", how="given", source="--image-size")}
    said: list[str] = []
    with pytest.raises(CheckFailed, match=r"right on 500 of 1000 .* export again with --crop-pct 1, or give"):
        assumptions._judge(trial, own, [smaller, cropped], given, said.append)
    assert "to take what fits better: --image-size 64 --crop-pct 1" in said[-1]


def test_too_few_images_and_other_models_are_refused(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text(
        "\n".join(
            f"{path.parent.name}/{path.name},{path.parent.name}"
            for path in sorted((planted / "val").rglob("*.png"))[::4]
        )
    )
    options: dict[str, Any] = {"data": planted / "val", "annotations": tmp_path / "few.csv", "out": tmp_path / "a"}
    with pytest.raises(DataError, match="has 30 images; at least 48 are needed"):
        convnext_deploy.export(planted / "my.pth", **options)
    with pytest.raises(UsageError, match="which only a classifier of one label an image has"):
        convnext_deploy.export(planted / "my.pth", task="embed", **options)


def test_each_fact_is_known_given_or_assumed_in_the_first_lines_the_manifest_and_inspect(
    planted: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("\n".join("abcde"))
    command = ["export", "--weights", str(planted / "my.pth"), "--format", "eager", "--out", str(tmp_path / "a")]
    shown = CliRunner().invoke(app, [*command, "--image-size", "64", "--labels", str(tmp_path / "names.txt")])
    assert shown.exit_code == 0, shown.output
    lines = shown.stderr.splitlines()
    assert "given: image_size 64x64 (--image-size); labels 5 names (--labels)" in lines[:4]
    assumed = next(line for line in lines[:4] if line.startswith("assumed: "))
    for fact in ("crop_pct 0.875", "activation gelu_tanh", "norm_eps 1e-05", "global_pool avg", "output_stride 32"):
        assert fact in assumed
    found = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert found["labels"] == list("abcde")
    assert found["provenance"]["image_size"] == {
        "value": "64x64", "how": "given", "source": "--image-size", "contradicts": None, "fits_better": None,
    }  # fmt: skip
    assert found["provenance"]["crop_pct"]["how"] == "assumed"
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")])
    assert "given: image_size 64x64 (--image-size)" in shown.output
    assert "assumed: mean" in shown.output


def test_a_known_fact_names_the_file_that_says_it(tmp_path: Path) -> None:
    import transformers
    from references import DEPTHS, DIMS

    config = transformers.ConvNextConfig(depths=DEPTHS, hidden_sizes=DIMS, num_labels=3, image_size=64)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "crop_pct": 0.9, "resample": 3})
    )
    found = load(str(tmp_path)).provenance
    assert {name: one.source for name, one in found.items()} == {
        "image_size": "config.json",
        "mean": "the image processor's config",
        "std": "the image processor's config",
        "interpolation": "the image processor's config",
        "crop_pct": "the image processor's config",
        "activation": "config.json",
        "norm_eps": "config.json",
        "global_pool": "config.json",
        "output_stride": "the code of the layout transformers",
        "labels": "config.json",
    }
    assert {one.how for one in found.values()} == {"known"}
    (tmp_path / "config.json").unlink()
    bare = load(str(tmp_path / "model.safetensors"), variant=None).provenance
    assert bare["activation"].how == bare["labels"].how == "assumed"


def test_only_those_given_values_are_doubted_that_make_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    own = assumptions.Candidate((224, 224), (0.29,), (0.35,), 1.0)
    size = assumptions.Candidate((64, 64), (0.29,), (0.35,), 1.0)
    best = assumptions.Candidate((64, 64), (0.3,), (0.35,), 1.0)
    right = {own: 200, size: 900, best: 901}

    def extend(self: Any, candidate: assumptions.Candidate, stop: int) -> None:
        self.hits[candidate] = np.arange(stop) < right[candidate]

    monkeypatch.setattr(assumptions._Trial, "extend", extend)
    given = {name: Provenance(value="", how="given", source=f"--{name}") for name in assumptions.TRIED}
    trial = assumptions._Trial(None, range(1000))  # type: ignore[arg-type]
    doubted = assumptions._judge(trial, own, [best, size], given, lambda _: None)
    assert {name: one.fits_better for name, one in doubted.items()} == {
        "image_size": "64x64 (top-1 90.00%, not 20.00%, on 1000 images)"
    }


def test_what_is_advised_is_the_best_of_what_was_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice was made on other images, where two crops may have been a few images apart."""
    sides, norm = (64, 64), ((0.5,), (0.5,))
    first, second, assumed = (assumptions.Candidate(sides, *norm, crop) for crop in (0.95, 1.0, 0.875))
    right = {first: 870, second: 890, assumed: 700}

    def extend(self: Any, candidate: assumptions.Candidate, stop: int) -> None:
        self.hits[candidate] = np.arange(stop) < right[candidate]

    monkeypatch.setattr(assumptions._Trial, "extend", extend)
    said: list[str] = []
    trial = assumptions._Trial(None, range(1000))  # type: ignore[arg-type]
    with pytest.raises(CheckFailed, match=r"crop 1(\.0)?\b.* is right on 890 of 1000"):
        assumptions._judge(trial, assumed, [first, second], {}, said.append)
    assert said[0].startswith("fits best: ")
    assert "89.00%" in said[0]
