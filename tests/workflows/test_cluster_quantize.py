"""`quantize --ray`: the plan of one process, byte for byte, from workers that die in the middle."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_cluster

from convnext_deploy import api

pytestmark = [pytest.mark.ray, pytest.mark.slow]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist"
IMAGES = 60  # the last batch is smaller, and images are held out


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster.nodes() as cluster:
        yield cluster


def quantized(out: Path, **options: Any) -> dict[str, bytes]:
    """What `quantize` writes, by the ends of the names."""
    arguments: dict[str, Any] = {
        "calibration": EXAMPLE / "test-2000.parquet", "target": "native", "method": "moving_average", "images": IMAGES,
    }  # fmt: skip
    api.quantize(EXAMPLE / "model.safetensors", out=out, **(arguments | options))
    return {path.name.removeprefix(out.stem): path.read_bytes() for path in out.parent.glob(f"{out.stem}.*")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes, and nothing more."""
    found = quantized(tmp_path_factory.mktemp("one") / "plan.json")
    assert {".json", ".calibration.json"} <= found.keys() <= {".json", ".calibration.json", ".safetensors"}
    return found


def test_workers_on_two_nodes_that_are_killed_give_the_plan_of_one_process(
    cluster: Any, expected: dict[str, bytes], tmp_path: Path
) -> None:
    said: list[str] = []
    steps: list[tuple[str, int, int]] = []
    killed: list[int] = []

    def progress(phase: str) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            steps.append((phase, done, total))
            if done and not killed:
                killed.append(sum(ray_cluster.kill_workers(node) for node in cluster.list_all_nodes()))

        return step

    found = quantized(tmp_path / "plan.json", ray=cluster.address, say=said.append, progress=progress)
    assert found == expected
    assert killed[0] >= 1
    assert any("died, others do its work" in line for line in said)
    assert any(line.endswith("workers on 2 nodes") for line in said)
    assert steps[0] == ("calibrating", 0, IMAGES)
    assert ("calibrating", IMAGES, IMAGES) in steps


def test_an_interrupted_calibration_goes_on_in_one_process(
    cluster: Any, expected: dict[str, bytes], tmp_path: Path
) -> None:
    def stop(phase: str) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            if done:
                raise KeyboardInterrupt

        return step

    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "plan.json", ray=cluster.address, progress=stop)
    begun: list[int] = []
    found = quantized(tmp_path / "plan.json", progress=lambda phase: lambda done, total: begun.append(done))
    assert begun[0] > 0
    assert found == expected
    assert not (tmp_path / "plan.partial").exists()
