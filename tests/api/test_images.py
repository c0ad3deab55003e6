"""Labelled data that a program holds, through every function that takes labelled data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_deploy import api
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.data.sources import ImageSource
from convnext_deploy.errors import ConvNextDeployError, UsageError
from convnext_deploy.records.accuracy import EvalResult

CLASSES = 10  # of the artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(CLASSES):
        (root / f"class{number}").mkdir()
        for index in range(5):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{number}" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[tuple[Path, int]]:
    return [(path, int(path.parent.name.removeprefix("class"))) for path in sorted(folder.glob("*/*.png"))]


def test_an_evaluation_is_the_same_on_a_folder_and_on_what_a_program_holds(
    artifact_of: Callable[..., Artifact], folder: Path, pairs: list[tuple[Path, int]], tmp_path: Path
) -> None:
    path = artifact_of("eager").path
    of_folder = api.evaluate(path, folder)
    of_pairs = api.evaluate(path, pairs, out=tmp_path / "kept")
    assert isinstance(of_folder, EvalResult)
    assert isinstance(of_pairs, EvalResult)
    assert (of_pairs.top1, of_pairs.top5, of_pairs.images) == (of_folder.top1, of_folder.top5, of_folder.images)
    assert of_pairs.data == "a list of 50 images"
    again = api.gate(tmp_path / "kept.json", path, data=pairs, limits={"max_drop": 5})
    assert again.images == 50
    assert again.checks[0].value == 0


def test_plans_are_calibrated_on_what_a_program_holds(
    checkpoint: Path, pairs: list[tuple[Path, int]], tmp_path: Path
) -> None:
    given = {"image_size": 64, "images": 32}
    images = [path for path, _ in pairs]
    one = api.quantize(checkpoint, calibration=images, out=tmp_path / "a.json", target="onnx", **given)  # type: ignore[arg-type]
    assert one.calibration is not None
    assert one.calibration.data == "a list of 50 images"
    assert api.half(checkpoint, data=images, out=tmp_path / "b.json", images=2, image_size=64)[1].images == 2


def test_an_export_is_checked_on_what_a_program_holds(
    checkpoint: Path, pairs: list[tuple[Path, int]], tmp_path: Path
) -> None:
    said: list[str] = []
    artifact = api.export(
        checkpoint, format="eager", image_size=64, batch=2, out=tmp_path / "m", data=pairs, say=said.append,
        verify_data=[path for path, _ in pairs[::5]],
    )  # fmt: skip
    assert artifact.manifest.parity[-1].images == "a list of 10 images"
    assert any("combinations of size, statistics and crop" in line for line in said)


@pytest.mark.parametrize("verb", ["evaluate", "gate", "export", "optimize"])
def test_options_of_a_path_are_refused_with_what_a_program_holds(
    verb: str, artifact_of: Callable[..., Artifact], checkpoint: Path, pairs: list[tuple[Path, int]], tmp_path: Path
) -> None:
    path = artifact_of("eager").path
    calls = {
        "evaluate": lambda: api.evaluate(path, pairs, split="test"),
        "gate": lambda: api.gate(path, path, data=pairs, split="test", limits={"max_drop": 1}),
        "export": lambda: api.export(
            checkpoint, format="eager", image_size=64, data=pairs, split="test", out=tmp_path / "m"
        ),
        "optimize": lambda: api.optimize(checkpoint, data=pairs, split="test", out=tmp_path / "m"),
    }
    with pytest.raises(ConvNextDeployError, match="split test is for a path, and a list of 50 images is in memory"):
        calls[verb]()
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_taken_as_it_is(artifact_of: Callable[..., Artifact], folder: Path) -> None:
    from convnext_deploy.data.sources import open_source

    source = open_source(str(folder))
    assert isinstance(source, ImageSource)
    result = api.evaluate(artifact_of("eager").path, source)
    assert isinstance(result, EvalResult)
    assert result.images == 50


def test_an_item_that_is_no_image_is_named(artifact_of: Callable[..., Artifact]) -> None:
    with pytest.raises(UsageError, match=r"^data: item 1 is 5; expected a path, an image of Pillow's"):
        api.evaluate(artifact_of("eager").path, [("a.png", 0), (5, 1)])
