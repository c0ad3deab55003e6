"""Models of several labels, of one logit and of values: exported, evaluated, gated and asked, end to end."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import convnext_deploy
from convnext_deploy.cli.app import app
from convnext_deploy.data import preprocess
from convnext_deploy.errors import DataError, UsageError, WeightsError
from convnext_deploy.models import facts
from convnext_deploy.records.accuracy import EvalResult, ScoreResult, ScoreVerdict
from convnext_deploy.records.manifest import ModelSpec

SIZE = 32
IMAGES = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def exported(folder: Path, classes: int, **options: Any) -> Path:
    out = folder / f"outputs{classes}"
    convnext_deploy.export(
        "random", variant="test_convnext2", format="eager", image_size=SIZE, num_classes=classes, out=out, **options
    )
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("one"), 1)


def logits_of(artifact: Path, images: Path) -> np.ndarray:
    """Through `run`, without any of the evaluation."""
    session = convnext_deploy.load(artifact)
    known = session.manifest
    read = preprocess.transform(known.preprocessing, known.model.image_size, 3)
    pixels = np.stack([read(Image.open(path)) for path in sorted(images.glob("*.png"))])
    return session.run(preprocess.as_input(pixels, known.preprocessing, "float32"))[0].astype(np.float64)


def planted(artifact: Path, images: Path, file: Path) -> np.ndarray:
    """A list in which most labels are what the model says: (IMAGES, 3) of 0 and 1."""
    logits = logits_of(artifact, images)
    wanted = (logits > np.median(logits, axis=0)).astype(int)
    wanted[::5] = 1 - wanted[::5]
    rows = [f"{number:02d}.png," + ",".join(map(str, row)) for number, row in enumerate(wanted)]
    file.write_text("\n".join(["path,ant,bee,cat", *rows]))
    return wanted


def test_several_labels_are_judged_by_map_and_asked_by_the_logistic_function(
    three: Path, images: Path, tmp_path: Path
) -> None:
    wanted, logits = planted(three, images, tmp_path / "list.csv"), logits_of(three, images)
    data: dict[str, Any] = {"data": images, "annotations": tmp_path / "list.csv", "problem": "multi-label"}
    result = convnext_deploy.evaluate(three, out=tmp_path / "run", **data)
    assert isinstance(result, ScoreResult)
    precisions = []
    for label in range(3):
        hits = wanted[np.argsort(-logits[:, label], kind="stable"), label]
        precisions.append((hits * np.cumsum(hits) / np.arange(1, IMAGES + 1)).sum() / hits.sum())
    assert result.score == pytest.approx(np.mean(precisions), abs=1e-6)
    assert [found.name for found in result.per_output] == ["ant", "bee", "cat"]
    assert [found.positives for found in result.per_output] == wanted.sum(0).tolist()
    assert result.exact == pytest.approx(((logits > 0) == wanted).all(1).mean())
    with np.load(tmp_path / "run.npz") as kept:
        np.testing.assert_allclose(kept["outputs"], logits, rtol=1e-5, atol=1e-6)

    predicted = convnext_deploy.predict(three, images / "00.png", problem="multi-label").predictions[0].classes
    right = torch.from_numpy(logits[0]).sigmoid()
    assert {found.number: pytest.approx(found.probability) for found in predicted} == dict(enumerate(right.tolist()))
    assert [found.probability for found in predicted] == sorted(
        (found.probability for found in predicted), reverse=True
    )

    verdict = convnext_deploy.gate(three, three, limits={"max_drop": 60}, out=tmp_path / "gate", **data)
    assert isinstance(verdict, ScoreVerdict)
    assert (verdict.decision, verdict.checks[0].value) == ("PASS", 0.0)


def test_the_commands_take_multi_label(three: Path, images: Path, tmp_path: Path) -> None:
    planted(three, images, tmp_path / "list.csv")
    options = ["--data", str(images), "--annotations", str(tmp_path / "list.csv"), "--multi-label"]
    shown = CliRunner().invoke(app, ["eval", str(three), *options])
    assert shown.exit_code == 0, shown.output
    assert "mAP " in shown.output
    assert "all labels right" in shown.output
    files = ["--markdown", str(tmp_path / "a.md"), "--junit", str(tmp_path / "a.xml")]
    verdict = ["gate", "--baseline", str(three), "--candidate", str(three), "--max-drop", "1", *options, *files]
    shown = CliRunner().invoke(app, verdict, standalone_mode=False)
    assert shown.return_value == 3, shown.output  # 24 images do not prove a point
    assert "INCONCLUSIVE: mAP drop, points: 0.000" in shown.output
    assert "mAP drop" in (tmp_path / "a.md").read_text()
    shown = CliRunner().invoke(app, ["eval", str(three), *options, "--problem", "regression"])
    assert "contradict each other; give one of them" in f"{shown.exception}"


def test_several_labels_need_to_be_asked_for(three: Path, images: Path, tmp_path: Path) -> None:
    planted(three, images, tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"have several classes, such as .* --problem multi-label"):
        convnext_deploy.evaluate(three, images, annotations=tmp_path / "list.csv")


def test_an_interrupted_evaluation_of_several_labels_goes_on(
    three: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convnext_deploy.accuracy import inference

    planted(three, images, tmp_path / "list.csv")
    monkeypatch.setattr(inference, "CHUNK", 8)
    options: dict[str, Any] = {"annotations": tmp_path / "list.csv", "problem": "multi-label", "batch": 8}

    def stop(done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convnext_deploy.evaluate(three, images, out=tmp_path / "run", progress=stop, **options)
    (tmp_path / "part.csv").write_text("\n".join((tmp_path / "list.csv").read_text().splitlines()[:9]))
    part = options | {"annotations": tmp_path / "part.csv"}
    with pytest.raises(UsageError, match="is of another set of images"):
        convnext_deploy.evaluate(three, images, out=tmp_path / "run", **part)
    said: list[str] = []
    result = convnext_deploy.evaluate(three, images, out=tmp_path / "run", say=said.append, **options)
    assert any("going on: 16 of 24 images are done" in line for line in said)
    whole = convnext_deploy.evaluate(three, images, **options)
    assert isinstance(result, ScoreResult)
    assert isinstance(whole, ScoreResult)
    assert result.score == whole.score


def test_one_logit_is_refused_until_it_is_said_what_it_is(one: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("\n".join(f"{number:02d}.png,{number % 2}" for number in range(IMAGES)))
    options: dict[str, Any] = {"annotations": tmp_path / "list.csv"}
    for ask in (
        lambda: convnext_deploy.evaluate(one, images, **options),
        lambda: convnext_deploy.predict(one, images),
        lambda: convnext_deploy.gate(one, one, limits={"max_drop": 1}, data=images, **options),
    ):
        with pytest.raises(UsageError, match=r"one output.* --problem: binary .* or regression"):
            ask()
    with pytest.raises(UsageError, match="binary is for one output, and random weights has 3"):
        exported(tmp_path, 3, problem="binary")
    with pytest.raises(WeightsError, match="has one output and is said to be multi-label"):
        exported(tmp_path, 1, problem="multi-label")


def test_a_binary_model_says_the_second_class_where_its_logit_is_above_0(
    one: Path, images: Path, tmp_path: Path
) -> None:
    logits = logits_of(one, images)[:, 0]
    wanted = (logits > 0).astype(int)
    wanted[3] = 1 - wanted[3]
    for number, label in enumerate(wanted):
        folder = tmp_path / "val" / ("no", "yes")[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes((images / f"{number:02d}.png").read_bytes())
    if len(set(wanted.tolist())) == 1:
        pytest.fail("the random model is to give both answers")
    result = convnext_deploy.evaluate(one, tmp_path / "val", problem="binary")
    assert isinstance(result, EvalResult)
    assert result.top1 == (IMAGES - 1) / IMAGES
    assert {found.name for found in result.per_class} == {"no", "yes"}
    answers = convnext_deploy.predict(one, images / "00.png", problem="binary").predictions[0].classes
    assert {found.number: found.probability for found in answers}[1] == pytest.approx(1 / (1 + np.exp(-logits[0])))
    verdict = convnext_deploy.gate(one, one, limits={"max_drop": 50}, data=tmp_path / "val", problem="binary")
    assert verdict.decision == "PASS"


def test_a_regression_is_judged_by_r2_and_gives_values(one: Path, images: Path, tmp_path: Path) -> None:
    values = logits_of(one, images)[:, 0]
    wanted = values + np.random.default_rng(1).normal(size=IMAGES) * values.std() * 0.3
    (tmp_path / "list.csv").write_text(
        "\n".join(f"{number:02d}.png,{value!r}" for number, value in enumerate(wanted.tolist()))
    )
    result = convnext_deploy.evaluate(one, images, annotations=tmp_path / "list.csv", problem="regression")
    assert isinstance(result, ScoreResult)
    errors = values - wanted
    assert result.score == pytest.approx(1 - (errors**2).sum() / ((wanted - wanted.mean()) ** 2).sum(), abs=1e-5)
    assert result.mean_absolute_error == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert result.root_mean_square_error == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-4)
    answer = convnext_deploy.predict(one, images / "01.png", problem="regression", out=tmp_path / "a.csv")
    assert answer.predictions[0].values == pytest.approx((values[1],), rel=1e-5)
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "image,rank,number,name,value"
    with pytest.raises(DataError, match=r"has values such as .* --problem regression"):
        convnext_deploy.evaluate(one, images, annotations=tmp_path / "list.csv", problem="binary")


def test_what_an_artifact_says_of_its_outputs_needs_no_option_and_admits_no_other(images: Path, tmp_path: Path) -> None:
    artifact = exported(tmp_path, 3, problem="multi-label")
    planted(artifact, images, tmp_path / "list.csv")
    assert isinstance(convnext_deploy.evaluate(artifact, images, annotations=tmp_path / "list.csv"), ScoreResult)
    with pytest.raises(UsageError, match="--problem single-label: the artifact was exported as multi-label"):
        convnext_deploy.evaluate(artifact, images, annotations=tmp_path / "list.csv", problem="single-label")


def test_transformers_problem_type_is_read_and_a_contradiction_refused() -> None:
    config = {"model_type": "convnext", "problem_type": "multi_label_classification"}
    assert facts.facts_of(config)["problem"] == "multi-label"
    with pytest.raises(WeightsError, match="problem_type 'several'; expected one of single_label"):
        facts.facts_of(config | {"problem_type": "several"})
    spec = ModelSpec(architecture="custom", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=4)
    assert facts.with_problem(spec, "multi-label", None, "a").problem == "multi-label"
    with pytest.raises(WeightsError, match=r"--problem regression, and config.json beside a says multi-label"):
        facts.with_problem(spec, "multi-label", "regression", "a")
    single = msgspec.structs.replace(spec, num_classes=1)
    assert facts.with_problem(single, "multi-label", None, "a").problem == "binary"


def turned(path: Path, orientation: int) -> None:
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_exif_orientation_is_left_as_it_is_unless_asked_for_and_said_in_any_case(
    three: Path, tmp_path: Path, suffix: str
) -> None:
    turned(tmp_path / f"a.{suffix}", 6)
    said: list[str] = []
    result = convnext_deploy.predict(three, tmp_path / f"a.{suffix}", say=said.append)
    assert any("has an EXIF orientation, such as" in line and "--exif-orientation turns them" in line for line in said)
    assert said[-1] in result.notes
    known = convnext_deploy.load(three).manifest.preprocessing
    size = (48, 48)
    left, upright = (
        preprocess.transform(msgspec.structs.replace(known, exif_orientation=flag), size, 3) for flag in (False, True)
    )
    image = Image.open(tmp_path / f"a.{suffix}")
    by_hand = left(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(upright(image), by_hand)
    assert not np.array_equal(left(image), by_hand)


def test_a_class_of_which_no_image_can_be_read_ends_an_evaluation(three: Path, images: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "val" / name).mkdir(parents=True)
        content = b"no image" if name == "bee" else (images / f"{number:02d}.png").read_bytes()
        (tmp_path / "val" / name / "a.png").write_bytes(content)
    with pytest.raises(
        DataError, match=r"not one image of the class 'bee' of .* can be read \(bee/a.png: not an image"
    ):
        convnext_deploy.evaluate(three, tmp_path / "val")


def test_json_holds_the_score(three: Path, images: Path, tmp_path: Path) -> None:
    planted(three, images, tmp_path / "list.csv")
    options = ["--data", str(images), "--annotations", str(tmp_path / "list.csv"), "--multi-label", "--json"]
    shown = CliRunner().invoke(app, ["eval", str(three), *options])
    assert json.loads(shown.stdout)["problem"] == "multi-label"
