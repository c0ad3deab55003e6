"""`eval --ray` of a segmenter: masks reach the nodes, and the result is that of one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import ray_cluster
from PIL import Image
from segmenters import CLASSES, saved, upernet

from convnext_deploy import api
from convnext_deploy.accuracy import inference, partial
from convnext_deploy.cluster import delivery
from convnext_deploy.records.accuracy import ScoreResult

pytestmark = [pytest.mark.ray, pytest.mark.slow]
IMAGES = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster.nodes(cpus=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upernet")
    made = api.export(
        saved(upernet(), folder / "weights"), task="segment", format="onnx", batch=(1, 2, 4), out=folder / "made"
    )
    return made.path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of several sizes with masks of the same, which have places that do not count."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for number in range(IMAGES):
        sides = (60 + number, 80 - number)
        mask = generator.integers(0, CLASSES, sides, np.uint8)
        mask[:3] = 255
        Image.fromarray(generator.integers(0, 256, (*sides, 3), np.uint8)).save(folder / f"images/{number:02d}.png")
        Image.fromarray(mask).save(folder / f"masks/{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def expected(artifact: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("one") / "out"
    api.evaluate(artifact, data / "images", annotations=data / "masks", out=out, batch=2)
    return out


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "CHUNK", 4)


def result_of(out: Path) -> tuple[Any, bytes]:
    """Without what differs between two runs: the speed, and where the counts are."""
    result = partial.read_any(out.with_name(f"{out.name}.json"))
    counts = out.with_name(f"{out.name}.npz").read_bytes()
    return msgspec.structs.replace(result, images_per_s=0.0, predictions=None), counts


@pytest.mark.parametrize("sent", [False, True], ids=["nodes read the masks", "the masks are sent"])
def test_a_cluster_counts_the_pixels_of_one_process(
    sent: bool,
    cluster: Any,
    artifact: Path,
    data: Path,
    expected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sent:
        monkeypatch.setattr(delivery, "_hashes", lambda images: ("another",))  # here, and not in the workers
    said: list[str] = []
    found = api.evaluate(
        artifact, data / "images", annotations=data / "masks", out=tmp_path / "out", batch=2, threads=1,
        ray=cluster.address, say=said.append,
    )  # fmt: skip
    assert isinstance(found, ScoreResult)
    assert found.images == IMAGES
    assert 0 < found.score < 1
    assert result_of(tmp_path / "out") == result_of(expected)
    assert any(line.endswith("workers on 2 nodes") for line in said)
    assert any(line.endswith("so they are sent with their masks") for line in said) is sent
