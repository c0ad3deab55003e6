"""A session that many threads use at once: right answers, or an error at once. The reference is one thread."""

import contextlib
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from segmenters import saved, upernet

from convnext_deploy import api
from convnext_deploy.artifact.batches import Images
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions, Session
from convnext_deploy.errors import UsageError
from convnext_deploy.native.engine import Engine, Network
from convnext_deploy.records.manifest import PrecisionTruth
from convnext_deploy.runtimes.torch_session import threads

THREADS = 8
BATCHES = (1, 3, 2, 4)
FORMATS = [
    pytest.param("aotinductor", marks=pytest.mark.slow),
    "eager", "native", "onnx", "openvino", "pt2", "torchscript",
]  # fmt: skip

ArtifactOf = Callable[..., Artifact]


def images(batch: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, 3, 64, 64)).astype(np.float32)


def everywhere(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What `work` gives in each of that many threads, started together."""
    gate = threading.Barrier(count)

    def started(index: int) -> Any:
        gate.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(started, range(count)))


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` gives in another thread, which has ended then."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_eight_threads_with_changing_batches_get_what_one_thread_gets(
    format: str, cores: int, artifact_of: ArtifactOf
) -> None:
    path = artifact_of(format).path
    batches = [images(BATCHES[seed % len(BATCHES)], seed) for seed in range(THREADS)]
    alone = api.load(path, threads=cores)
    expected = [alone.run(batch)[0] for batch in batches]
    session = api.load(path, threads=cores)
    session.bind(batches[0])  # and this stays bound, whatever the others do

    def work(index: int) -> int:
        wrong = 0
        for turn in range(6):
            chosen = (index + turn) % len(batches)
            (found,) = session.run(batches[chosen])
            exact = format == "native"
            same = np.array_equal if exact else lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5)
            wrong += not same(found, expected[chosen])
        return wrong

    assert sum(everywhere(work)) == 0
    session.step()
    assert np.allclose(session.fetch()[0], expected[0], rtol=1e-4, atol=1e-5)
    assert len(session._spares) <= max(session.at_once - 1, 1)  # memory is bounded, whatever the number of threads


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(upernet(), tmp_path_factory.mktemp("upernet"))


@pytest.mark.parametrize(
    "format", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "openvino", "torchscript"))]
)
def test_eight_threads_with_changing_batches_and_sizes_get_the_label_maps_that_one_gets(
    format: str, segmenter: str, tmp_path: Path
) -> None:
    """Maps of a class for each pixel, at the images' own sizes: buffers of another size in every run."""
    options: dict[str, Any] = {"task": "segment", "argmax": True, "dynamic_image_size": True, "batch": (1, 2, 4)}
    path = api.export(segmenter, format=format, out=tmp_path / format, **options).path
    rng = np.random.default_rng(0)
    shapes = [(1, 3, 64, 64), (3, 3, 33, 70), (2, 3, 96, 40), (4, 3, 32, 32), (1, 3, 45, 101)]
    batches = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    alone = api.load(path, threads=1)
    expected = [alone.run(batch)[0] for batch in batches]
    session = api.load(path, threads=1)

    def work(index: int) -> int:
        chosen = [(index + turn) % len(batches) for turn in range(5)]
        return sum(not np.array_equal(session.run(batches[number])[0], expected[number]) for number in chosen)

    assert sum(everywhere(work)) == 0


@pytest.mark.parametrize("format", ["native", "onnx", "openvino", "eager"])
def test_precision_and_profile_may_be_asked_while_others_run(format: str, artifact_of: ArtifactOf) -> None:
    session = api.load(artifact_of(format).path, threads=1)
    batch = images(2, 0)
    (expected,) = session.run(batch)
    truth = session.precision()

    def work(index: int) -> bool:
        if index == 0:
            session.bind(batch)
            return session.precision() == truth and len(session.profile(2, 1).steps) >= 1
        return all(np.allclose(session.run(batch)[0], expected, rtol=1e-4, atol=1e-5) for _ in range(5))

    assert all(everywhere(work, 4))


@pytest.mark.parametrize("format", ["native", "onnx", "openvino", "eager"])
def test_a_step_of_another_thread_is_refused_at_once(format: str, artifact_of: ArtifactOf) -> None:
    session = api.load(artifact_of(format).path)
    batch = images(2, 0)
    session.bind(batch)
    for method in (session.step, session.sync, session.fetch, session.precision, lambda: session.profile(1, 0)):
        with pytest.raises(UsageError, match="no batch bound in this session, thread 'MainThread' bound its own last"):
            elsewhere(method)
    session.step()
    (expected,) = session.fetch()

    def other() -> None:  # takes over, and is still there when the main thread goes on
        session.bind(images(3, 1))
        taken.set()
        done.wait()

    taken, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    taken.wait()
    with pytest.raises(UsageError, match="thread 'MainThread' has no batch bound"):
        session.step()
    assert np.allclose(session.run(batch)[0], expected, rtol=1e-4, atol=1e-5)  # beside what the other has bound
    done.set()
    thread.join()
    session.step()  # who bound it has ended: what is left is for anyone
    assert len(session.fetch()[0]) == 3


def test_native_threads_cannot_close_or_collect_what_another_runs(artifact_of: ArtifactOf) -> None:
    network = Network(artifact_of("native").path / "model.cnxt")
    batch = images(8, 0)
    engine = Engine(network, 8, 64, 64, 1)
    engine.bind(batch)
    engine.run()
    expected = engine.outputs[0].copy()

    def work(index: int) -> bool:
        for _ in range(10):
            own = Engine(network, 8, 64, 64, 1 + index % 2)  # collected by whichever thread collects
            own.bind(batch)
            own.run()
            if not np.array_equal(own.outputs[0], expected):
                return False
            cycle: list[Any] = [own]
            cycle.append(cycle)
            del own, cycle
            gc.collect(0)
            with contextlib.suppress(UsageError):  # whenever another thread is in it
                engine.run()
        return np.array_equal(engine.outputs[0], expected)

    assert all(everywhere(work, 4))
    running = threading.Thread(target=engine.run)
    running.start()
    engine.close()  # waits
    running.join()
    with pytest.raises(UsageError, match="the engine was closed"):
        engine.run()


def test_a_session_dropped_by_its_owner_lives_as_long_as_a_thread_runs_it(artifact_of: ArtifactOf) -> None:
    batch = images(4, 0)
    kept = [api.load(artifact_of("native").path)]
    (expected,) = kept[0].run(batch)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(session.run, batch) for session in kept * 4]
        kept.clear()
        gc.collect()
        assert all(np.array_equal(run.result()[0], expected) for run in runs)


def test_pytorch_s_number_of_threads_is_the_same_afterwards_in_every_thread() -> None:
    before = torch.get_num_threads()

    def work(index: int) -> list[int]:
        found = []
        for turn in range(50):
            with threads(1 + (index + turn) % 3):
                found.append(torch.get_num_threads() - (1 + (index + turn) % 3))
        return [*found, torch.get_num_threads() - before]

    assert not any(map(any, everywhere(work)))
    assert torch.get_num_threads() == before
    assert elsewhere(torch.get_num_threads) == before


class Counted(Session):
    """Counts how many of it run at once."""

    running, most, made = 0, 0, 0
    lock = threading.Lock()

    def _bind(self, images: Images) -> None: ...

    def _step(self) -> None:
        with Counted.lock:
            Counted.running += 1
            Counted.most = max(Counted.most, Counted.running)
        threading.Event().wait(0.002)
        with Counted.lock:
            Counted.running -= 1

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        return ()

    def _precision(self) -> PrecisionTruth:
        return PrecisionTruth(graph={"fp32": 1.0})

    def _unshare(self) -> None:
        Counted.made += 1


@pytest.mark.parametrize(
    ("device", "each", "cores", "expected"),
    [
        ("cpu", None, 4, 1),  # a run takes every core
        ("cpu", 1, 4, 4),
        ("cpu", 2, 4, 2),
        ("cpu", 3, 4, 1),
        ("cuda", 1, 4, 1),
    ],
)
def test_as_many_run_at_once_as_there_are_cores_for(
    device: Any, each: int | None, cores: int, expected: int, artifact_of: ArtifactOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convnext_deploy.artifact import session as module

    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    Counted.running = Counted.most = Counted.made = 0
    session = Counted(artifact_of("eager").manifest, RunOptions(device=device, threads=each))
    assert session.at_once == expected
    everywhere(lambda index: [session.run(images(1, 0)) for _ in range(10)])
    assert Counted.most == expected
    assert Counted.made <= expected - 1


@pytest.fixture
def tiny(artifact_of: ArtifactOf) -> tuple[Path, list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    path = artifact_of("native").path
    batches = [images(batch, batch) for batch in (1, 2, 3)]
    alone = api.load(path, threads=1)
    return path, batches, [alone.run(batch)[0] for batch in batches]


@pytest.mark.slow
def test_twenty_thousand_native_calls_from_eight_threads_are_right_and_keep_no_memory(tiny: Any) -> None:
    path, batches, expected = tiny
    session = api.load(path, threads=1)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    everywhere(lambda index: [session.run(batch) for batch in batches * 20])
    before = resident()

    def work(index: int) -> int:
        chosen = [(index + turn) % 3 for turn in range(20_000 // THREADS)]
        return sum(not np.array_equal(session.run(batches[number])[0], expected[number]) for number in chosen)

    assert sum(everywhere(work)) == 0
    assert resident() - before < 16 << 20
