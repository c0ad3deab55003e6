"""A broken candidate, and class folders that are not the model's: whatever the layout, the gate never says PASS."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from gate_sides import CLASSES as COUNT
from gate_sides import answering
from PIL import Image
from references import randomize_
from safetensors.torch import save_file

from convnext_deploy import api, cli
from convnext_deploy.accuracy import gate, statistics
from convnext_deploy.cli import words
from convnext_deploy.records.accuracy import Limits

CLASSES = 12
SIZE = 32
IMAGES = 12  # of each class


def picture(label: int, number: int) -> np.ndarray:
    """Stripes whose direction and width tell the class."""
    y, x = np.mgrid[:SIZE, :SIZE]
    generator = np.random.default_rng(100 * label + number)
    angle, width = np.pi * (label % 4) / 4, 2 + 2 * (label // 4)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) / width + generator.uniform(0, 6))
    noise = generator.normal(scale=0.2, size=(SIZE, SIZE, 3))
    return np.clip(128 + 90 * (stripes[:, :, None] + noise), 0, 255).astype(np.uint8)


def write(root: Path, names: list[str], suffix: str = ".png") -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(IMAGES):
            Image.fromarray(picture(label, number)).save(root / name / f"{number}{suffix}", lossless=True)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good`: a random network whose last linear is fitted to the classes; `broken`: with another last linear."""
    folder = tmp_path_factory.mktemp("models")
    network: Any = randomize_(timm.create_model("test_convnext", num_classes=CLASSES))
    labels = torch.arange(CLASSES).repeat_interleave(2 * IMAGES)
    pixels = np.stack([picture(label, number) for label in range(CLASSES) for number in range(2 * IMAGES)])
    with torch.inference_mode():
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        wanted = torch.nn.functional.one_hot(labels, CLASSES).float() * 10
        fitted = torch.linalg.solve(features.T @ features + 0.01 * torch.eye(features.shape[1]), features.T @ wanted)
    state = network.state_dict()
    for name, head in (("good", fitted), ("broken", torch.randn(fitted.shape, generator=torch.Generator()))):
        state |= {"head.fc.weight": head[:-1].T.contiguous(), "head.fc.bias": head[-1].contiguous()}
        save_file(state, folder / f"{name}.safetensors")
        api.export(
            str(folder / f"{name}.safetensors"), format="eager", image_size=(SIZE, SIZE), out=folder / name,
            preprocessing={"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"},
        )  # fmt: skip
    return folder


NAMES = [f"c{number:02d}" for number in range(CLASSES)]


def exit_code(models: Path, data: Path, candidate: str, *more: str) -> int:
    sides = ["--baseline", str(models / "good"), "--candidate", str(models / candidate)]
    return cli.run(["gate", *sides, "--data", str(data), "--max-drop", "5", "--threads", "1", *more])


def test_a_good_model_passes_and_a_random_last_linear_fails(models: Path, tmp_path: Path) -> None:
    images = write(tmp_path / "set", NAMES)
    assert exit_code(models, images, "good") == 0
    assert exit_code(models, images, "broken") == 1
    assert exit_code(models, images, "broken", "--max-drop", "100") == 3


def scrambled(root: Path) -> None:
    write(root, [f"{number}" for number in range(CLASSES)])  # as text: 0 1 10 11 2 ..., of which only two are right
    shutil.rmtree(root / "0")
    shutil.rmtree(root / "1")
    for name in ("0", "1"):
        (root / name).mkdir()


def one_missing(root: Path) -> None:
    write(root, NAMES)
    shutil.rmtree(root / NAMES[3])


def wordnet(root: Path) -> None:
    write(root, [f"n0{number}000000" for number in range(10)])


def more_folders(root: Path) -> None:
    write(root, [*NAMES, "z"])


@pytest.mark.parametrize("layout", [scrambled, one_missing, wordnet, more_folders])
@pytest.mark.parametrize("candidate", ["good", "broken"])
def test_classes_that_are_not_the_models_never_pass(
    models: Path, tmp_path: Path, layout: object, candidate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layout(tmp_path / "set")  # type: ignore[operator]
    code = exit_code(models, tmp_path / "set", candidate, "--max-drop", "100")
    captured = capsys.readouterr()
    if layout is scrambled:
        assert code == 3
        assert captured.out.startswith("INCONCLUSIVE: ")
        assert "the baseline's top-1" in captured.out
        assert "is not clearly above chance" in captured.out
    else:
        assert code == 2
        assert "give --labels FILE with the model's classes in their order" in captured.err


def test_a_class_map_makes_a_subset_right(models: Path, tmp_path: Path) -> None:
    one_missing(tmp_path / "set")
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    assert exit_code(models, tmp_path / "set", "good", "--labels", str(tmp_path / "labels.txt")) == 0
    assert exit_code(models, tmp_path / "set", "broken", "--labels", str(tmp_path / "labels.txt")) == 1


def test_a_class_in_another_file_format_that_is_read_shifts_no_other(models: Path, tmp_path: Path) -> None:
    images = write(tmp_path / "set", NAMES)
    for file in (images / NAMES[0]).iterdir():
        Image.open(file).save(file.with_suffix(".webp"), lossless=True)
        file.unlink()
    assert exit_code(models, images, "good") == 0
    assert exit_code(models, images, "broken") == 1


def test_a_class_in_a_file_format_that_is_not_read_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write(tmp_path / "set", NAMES)
    for file in (images / NAMES[0]).iterdir():
        file.rename(file.with_suffix(".heic"))
    assert exit_code(models, images, "good") == 2
    assert f"the class folder {NAMES[0]} of {images} has 12 files and not one image" in capsys.readouterr().err


# The doubts alone ----------------------------------------------------------------------------------------------------


def test_candidates_that_agree_by_chance_only_are_doubted() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(2400) % COUNT
    sides = []
    for _ in range(2):  # each right on the same fifth and with answers of its own on the rest
        answers = np.where(np.arange(2400) % 5 == 0, labels, (labels + generator.integers(1, COUNT, 2400)) % COUNT)
        sides.append(answering(answers, labels))
    found = gate.judge(sides[0], sides[1], Limits(max_drop=1))
    assert (found.checks[0].decision, found.decision) == ("PASS", "INCONCLUSIVE")
    (doubt,) = found.doubts
    assert "on images both get wrong the two give the same first class to " in doubt
    assert doubt in words.text(found)
    assert b'name="doubt 1"' in words.junit(found)
    assert f"**{doubt}**" in words.markdown(found)


def test_a_healthy_candidate_of_a_weak_model_is_not_doubted() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(3000) % COUNT
    answers = np.where(generator.random(3000) < 0.3, labels, generator.integers(0, COUNT, 3000))
    after = answers.copy()
    after[:30] = generator.integers(0, COUNT, 30)
    assert gate.judge(answering(answers, labels), answering(after, labels), Limits(max_drop=2)).decision == "PASS"


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_model_that_guesses_is_called_better_than_chance_once_in_a_thousand(classes: int) -> None:
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, (3000, 500))
    answers = generator.integers(0, classes, (3000, 500))
    above = [
        statistics.is_above_chance(int((a == b).sum()), 500, statistics.expected_agreement(a, b))
        for a, b in zip(labels, answers, strict=True)
    ]
    assert sum(above) <= 12  # of 3000; 3 are expected, and 12 come by chance once in 10,000 times


def test_one_answer_for_all_images_is_never_above_chance() -> None:
    labels = np.r_[np.zeros(950, int), np.ones(50, int)]
    assert statistics.expected_agreement(np.zeros(1000, int), labels) == pytest.approx(0.95)
    assert not statistics.is_above_chance(950, 1000, 0.95)
