"""`eval --ray`: the predictions of one process, from workers and nodes that die in the middle."""

import contextlib
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray_cluster
from PIL import Image
from server_process import until

from convnext_deploy import api
from convnext_deploy.accuracy import inference
from convnext_deploy.accuracy.evaluation import read_result
from convnext_deploy.cluster import delivery
from convnext_deploy.errors import ArtifactError, UsageError

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ARTIFACT = Path(__file__).parents[1] / "golden" / "0.1.0" / "native-int8"
IMAGES = 300
CLASSES = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster.nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in Parquet, two images of which cannot be read."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(IMAGES):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(file, "PNG")
        content = b"" if number == 17 else file.getvalue()[: 60 if number == 280 else None]
        rows.append({"image": {"bytes": content, "path": f"{number:03d}.png"}, "label": number % CLASSES})
    path = tmp_path_factory.mktemp("data") / "noise.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=32)
    return path


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("one") / "out"
    api.evaluate(ARTIFACT, data, out=out, batch=4)
    return out


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "CHUNK", 8)


def same(out: Path, expected: Path) -> bool:
    """The same predictions, bit for bit, and the same result but for the speed."""
    one, other = (read_result(path.with_name(f"{path.name}.json")) for path in (out, expected))
    unlike = {"images_per_s": 0.0, "predictions": None}
    assert msgspec.structs.replace(one, **unlike) == msgspec.structs.replace(other, **unlike)
    return out.with_name(f"{out.name}.npz").read_bytes() == expected.with_name(f"{expected.name}.npz").read_bytes()


def test_four_workers_on_two_nodes_give_the_predictions_of_one_process(
    cluster: Any, data: Path, expected: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    calls: list[tuple[int, int]] = []
    found = api.evaluate(
        ARTIFACT, data, out=tmp_path / "out", batch=4, threads=1, ray=cluster.address, say=said.append,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert same(tmp_path / "out", expected)
    assert "4 workers on 2 nodes" in said
    assert calls[0] == (0, IMAGES)
    assert calls[-1] == (IMAGES, IMAGES)
    assert len(found.corrupt) == 2
    assert not (tmp_path / "out.partial").exists()


def test_killed_workers_lose_no_image_and_others_take_their_place(
    cluster: Any, data: Path, expected: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    said: list[str] = []

    def progress(done: int, total: int) -> None:
        if done and not killed:
            killed.append(sum(ray_cluster.kill_workers(node) for node in cluster.list_all_nodes()))

    api.evaluate(
        ARTIFACT, data, out=tmp_path / "out", batch=4, threads=1, ray=cluster.address, say=said.append,
        progress=progress,
    )  # fmt: skip
    assert killed[0] >= 1
    assert sum("died, others do its work" in line for line in said) >= 1
    assert same(tmp_path / "out", expected)


def test_an_interrupted_evaluation_goes_on_on_another_cluster_or_in_one_process(
    cluster: Any, data: Path, expected: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.evaluate(ARTIFACT, data, out=tmp_path / "out", batch=4, threads=1, ray=cluster.address, progress=stop)
    said: list[str] = []
    api.evaluate(ARTIFACT, data, out=tmp_path / "out", batch=4, say=said.append)
    assert any(line.startswith("going on: ") for line in said)
    assert same(tmp_path / "out", expected)


def test_images_in_memory_and_an_artifact_that_no_node_has_are_sent(
    cluster: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pq.read_table(data).to_pylist()[:16]
    pictures = [(Image.open(io.BytesIO(row["image"]["bytes"])), row["label"]) for row in rows]
    one = api.evaluate(ARTIFACT, pictures, batch=4)
    packed = delivery.packed
    monkeypatch.setattr(delivery, "packed", lambda artifact: replace(packed(artifact), path="/nowhere"))
    said: list[str] = []
    other = api.evaluate(ARTIFACT, pictures, batch=4, threads=1, ray=cluster.address, say=said.append)
    assert msgspec.structs.replace(one, images_per_s=0.0) == msgspec.structs.replace(other, images_per_s=0.0)
    assert any("its images are in memory here, so they are sent" in line for line in said)


def test_images_are_sent_to_nodes_that_see_others_under_the_same_path(
    cluster: Any, data: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_hashes", lambda images: ("another",))  # here, and not in the workers
    said: list[str] = []
    api.evaluate(ARTIFACT, data, out=tmp_path / "out", batch=4, threads=1, ray=cluster.address, say=said.append)
    assert any(f"it does not see {data}, so they are sent" in line for line in said)
    assert same(tmp_path / "out", expected)


def test_an_error_of_a_worker_is_one_line_with_its_node(cluster: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no node of the cluster has a GPU for a worker; it has .* with 2 CPUs"):
        api.evaluate(ARTIFACT, data, ray=cluster.address, device="cuda")
    with pytest.raises(UsageError, match=r"no node of the cluster has 99 CPUs for a worker"):
        api.evaluate(ARTIFACT, data, ray=cluster.address, threads=99)


def test_code_of_others_is_refused_before_any_worker_opens_it(
    cluster: Any, data: Path, artifact_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = artifact_of("torchscript")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # where nothing is recorded as built here
    with pytest.raises(ArtifactError, match="runs code that the artifact brings"):
        api.evaluate(artifact.path, data, ray=cluster.address)


def test_a_node_that_dies_in_the_middle_loses_no_image(data: Path, expected: Path, tmp_path: Path) -> None:
    with ray_cluster.nodes(cpus=1) as cluster:
        second = cluster.list_all_nodes()[1]
        calls: list[int] = []
        said: list[str] = []

        def progress(done: int, total: int) -> None:
            calls.append(done)
            if len(calls) == 2:  # until the second worker is there too
                until(lambda: bool(ray_cluster.workers(second)), 30)
                time.sleep(5)
            if len(calls) == 3:  # there is work for it still; alone, its worker would outlive the node by a second
                running = ray_cluster.workers(second)
                cluster.remove_node(second, allow_graceful=False)
                for process in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)

        api.evaluate(
            ARTIFACT, data, out=tmp_path / "out", batch=4, ray=cluster.address, say=said.append, progress=progress
        )
        assert "2 workers on 2 nodes" in said
        assert any("died, others do its work" in line for line in said)
        assert same(tmp_path / "out", expected)
