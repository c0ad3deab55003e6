"""Several processes behind one address: they answer as one, measure as one, and end as one."""

import contextlib
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from server_process import Process, answered_until, until

import convnext_deploy
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.env import usable_cores
from convnext_deploy.errors import ArtifactError, UsageError
from convnext_deploy.serving import listeners
from convnext_deploy.serving.siblings import merged

needs_cores = pytest.mark.skipif(usable_cores() < 2, reason="workers are at most as many as cores")


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("onnx", input="uint8")


@pytest.fixture
def two(artifact: Artifact, tmp_path: Path) -> Iterator[tuple[Process, int]]:
    """Two workers, and the port of their admin address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        admin = free.getsockname()[1]
    one = Process(
        f"m={artifact.path}", "--port", "0", "--workers", "2", "--admin", f"127.0.0.1:{admin}",
        "--shadow", str(artifact.path), environment={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert one.port, one.lines
    yield one, admin
    if one.process.poll() is None:
        one.end(signal.SIGTERM)


def children(one: Process) -> list[int]:
    return [
        int(pid)
        for file in Path(f"/proc/{one.process.pid}/task").glob("*/children")
        for pid in file.read_text().split()
    ]


@needs_cores
def test_they_answer_measure_and_reload_as_one(two: tuple[Process, int], tmp_path: Path) -> None:
    one, admin = two
    assert sum(line.startswith("m: 16 outputs compared") for line in one.lines) == 1  # not once for each
    for _ in range(20):
        assert one.ask()[0] == 200
    counts = [
        float(count) for count in re.findall(r'requests_total{path="/classify".* (.*)', one.ask("GET", "/metrics")[1])
    ]
    assert sum(counts) == 20
    status, answer = one.ask("POST", "/reload", admin)
    assert status == 200
    assert [line[:12] for line in answer["reloaded"]] == ["worker 0: m:", "worker 1: m:"]
    state = one.ask("GET", "/shadow", admin)[1]
    # One of two compares; it takes twice its share of its half of the requests.
    assert state["more_requests"] == 10 * state["more_images"]
    assert one.end(signal.SIGTERM) == 0
    assert list(tmp_path.glob("convnext*")) == []  # nothing is left of the sockets between them


@needs_cores
def test_a_worker_that_is_killed_is_replaced(two: tuple[Process, int]) -> None:
    one, _ = two
    before = children(one)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    until(lambda: one.ask()[0] == 200)
    until(lambda: 'worker="0"' in one.ask("GET", "/metrics")[1] and 'worker="1"' in one.ask("GET", "/metrics")[1], 30)
    assert before[0] not in children(one)
    assert one.end(signal.SIGTERM) == 0
    assert any("was killed by SIGKILL; another one takes its place" in line for line in one.lines)


@needs_cores
def test_a_reload_reaches_a_worker_that_is_being_replaced(two: tuple[Process, int]) -> None:
    one, _ = two
    os.kill(children(one)[1], signal.SIGKILL)
    until(lambda: any("takes its place" in line for line in one.lines), 30)
    one.process.send_signal(signal.SIGHUP)  # the new one has no handler for it yet
    until(
        lambda: (
            all(any(f"worker {place}: reloaded m: " in line for line in one.lines) for place in (0, 1))
            or one.process.poll() is not None
        ),
        60,
    )
    assert one.end(signal.SIGTERM) == 0, one.lines


@needs_cores
def test_a_worker_that_cannot_be_replaced_yet_does_not_end_the_others(artifact: Artifact, tmp_path: Path) -> None:
    """A worker that died while its folder was being written ended the whole server."""
    folder = tmp_path / "m"
    shutil.copytree(artifact.path, folder)
    one = Process(f"m={folder}", "--port", "0", "--workers", "2")
    folder.rename(tmp_path / "away")
    os.kill(children(one)[1], signal.SIGKILL)
    until(lambda: any("cannot be replaced, and is tried again in 5 s: " in line for line in one.lines), 60)
    assert one.ask()[0] == 200
    (tmp_path / "away").rename(folder)
    until(lambda: 'worker="1"' in one.ask("GET", "/metrics")[1], 60)
    assert one.end(signal.SIGTERM) == 0, one.lines


@needs_cores
def test_a_worker_that_opens_another_artifact_makes_all_reload(
    artifact: Artifact, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    """The one that took a dead one's place answered with the new artifact, and the other one with the old."""
    other = artifact_of("native", input="uint8")
    folder = tmp_path / "m"
    shutil.copytree(artifact.path, folder)
    one = Process(f"m={folder}", "--port", "0", "--workers", "2")
    folder.rename(tmp_path / "away")
    shutil.copytree(other.path, folder)
    os.kill(children(one)[1], signal.SIGKILL)
    until(lambda: any(f"worker 0: reloaded m: {artifact.sha256[:12]} -> " in line for line in one.lines), 60)
    answers = [one.ask()[1] for _ in range(20)]
    assert {answer["artifact_sha256"] for answer in answers} == {other.sha256}
    assert one.end(signal.SIGTERM) == 0, one.lines


@needs_cores
def test_a_signal_ends_all_without_losing_a_request(two: tuple[Process, int]) -> None:
    one, _ = two
    assert set(answered_until(one, signal.SIGTERM)) == {200}


@needs_cores
def test_the_end_of_the_first_process_is_the_end_of_all(two: tuple[Process, int]) -> None:
    one, _ = two
    workers = children(one)
    one.end(signal.SIGKILL)

    def ended(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"

    until(lambda: all(map(ended, workers)))


@needs_cores
def test_what_a_worker_refuses_is_the_servers_own_error() -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        convnext_deploy.serve("nowhere", port=0, workers=2)


def test_more_workers_than_cores_and_an_application_of_several_are_refused(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"workers 9999; there are \d+ cores here, and one each is the most"):
        convnext_deploy.serve(artifact.path, port=0, workers=9999)
    with pytest.raises(UsageError, match="workers 0; expected a whole number of at least 1"):
        convnext_deploy.serve(artifact.path, port=0, workers=0)
    with pytest.raises(UsageError, match="asgi has no parameter workers"):
        convnext_deploy.asgi(artifact.path, workers=2)  # type: ignore[call-arg]


def test_measurements_of_several_are_told_apart_and_one_that_is_gone_is_left_out() -> None:
    text = b'# HELP a_total A.\n# TYPE a_total counter\na_total{path="/x"} 2.0\n'
    assert merged([text, None, text]).decode().splitlines() == [
        "# HELP a_total A.",
        "# TYPE a_total counter",
        'a_total{path="/x",worker="0"} 2.0',
        'a_total{path="/x",worker="2"} 2.0',
    ]


@needs_cores
def test_clients_of_grpc_come_to_all_workers_and_those_of_a_killed_one_to_another(artifact: Artifact) -> None:
    triton = pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed")
    one = Process(f"m={artifact.path}", "--port", "0", "--workers", "2", "--grpc-port", "0")
    address = re.search(r"gRPC on (127\.0\.0\.1:\d+)$", "\n".join(one.lines), re.MULTILINE)
    assert address, one.lines
    shape = (1, *artifact.manifest.model.image_size, 3)
    images = triton.InferInput("images", shape, "UINT8")
    images.set_data_from_numpy(np.zeros(shape, np.uint8))
    answered: list[list[str]] = [[] for _ in range(20)]  # all of them at one worker: once in 524,288 times
    ending = threading.Event()

    def client(answers: list[str]) -> None:
        # Clients of one process share connections to one address, unless they are told not to.
        with triton.InferenceServerClient(address[1], channel_args=[("grpc.use_local_subchannel_pool", 1)]) as asking:
            while not (ending.is_set() and answers[-1] != "OK"):
                try:
                    asking.infer("m", [images], client_timeout=20)
                    answers.append("OK")
                except triton.InferenceServerException as error:
                    answers.append(error.status().removeprefix("StatusCode."))
                    time.sleep(0.05)

    def counts() -> dict[str, float]:
        lines = one.ask("GET", "/metrics")[1]
        return dict(re.findall(r'requests_total{path="grpc ModelInfer",status="OK",worker="(.)"} (.*)', lines))

    threads = [threading.Thread(target=client, args=(answers,)) for answers in answered]
    try:
        for thread in threads:
            thread.start()
        until(lambda: all(len(answers) > 3 for answers in answered), 30)
        assert set(counts()) == {"0", "1"}
        assert {status for answers in answered for status in answers} == {"OK"}
        os.kill(children(one)[0], signal.SIGKILL)
        until(lambda: any("takes its place" in line for line in one.lines), 30)
        before = [len(answers) for answers in answered]
        # All go on. Only a client that waited for an answer hears of it; gRPC itself connects the others anew.
        until(lambda: all("OK" in answers[done:] for answers, done in zip(answered, before, strict=True)), 30)
        assert any("UNAVAILABLE" not in answers for answers in answered)  # those of the other worker notice nothing
        assert {status for answers in answered for status in answers} <= {"OK", "UNAVAILABLE"}
    finally:
        ending.set()
        assert one.end(signal.SIGTERM) == 0
        for thread in threads:
            thread.join(20)
    # In the last moment, before a client hears of the end, gRPC itself says CANCELLED.
    assert {status for answers in answered for status in answers} <= {"OK", "UNAVAILABLE", "CANCELLED"}


@needs_cores
def test_a_reload_of_all_workers_loses_no_request_of_grpc(
    artifact: Artifact, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    triton = pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed")
    other = artifact_of("native", input="uint8")
    folder = tmp_path / "m"
    shutil.copytree(artifact.path, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        admin = free.getsockname()[1]
    one = Process(
        f"m={folder}", "--port", "0", "--workers", "2", "--grpc-port", "0", "--admin", f"127.0.0.1:{admin}"
    )  # fmt: skip
    address = re.search(r"gRPC on (127\.0\.0\.1:\d+)$", "\n".join(one.lines), re.MULTILINE)
    assert address, one.lines
    shape = (1, *artifact.manifest.model.image_size, 3)
    images = triton.InferInput("images", shape, "UINT8")
    images.set_data_from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    answered: list[list[str]] = [[] for _ in range(8)]
    ending = threading.Event()

    def client(answers: list[str]) -> None:
        with triton.InferenceServerClient(address[1], channel_args=[("grpc.use_local_subchannel_pool", 1)]) as asking:
            while not ending.is_set():
                try:
                    answers.append(asking.infer("m", [images], client_timeout=20).as_numpy("logits").tobytes().hex())
                except triton.InferenceServerException as error:
                    answers.append(str(error))

    def exchanged(by: Artifact) -> None:
        folder.rename(tmp_path / "old")
        shutil.copytree(by.path, folder)
        shutil.rmtree(tmp_path / "old")

    def hashes() -> set[str]:
        return set(re.findall(r'model_info{.*sha256="(\w+)"', one.ask("GET", "/metrics")[1]))

    threads = [threading.Thread(target=client, args=(answers,)) for answers in answered]
    try:
        for thread in threads:
            thread.start()
        until(lambda: all(len(answers) > 3 for answers in answered), 30)
        exchanged(other)
        status, said = one.ask("POST", "/reload", admin)
        assert (status, len(said["reloaded"])) == (200, 2)
        assert hashes() == {other.sha256}
        middle = [len(answers) for answers in answered]
        until(lambda: all(len(answers) > count + 3 for answers, count in zip(answered, middle, strict=True)), 30)
        exchanged(artifact)
        one.process.send_signal(signal.SIGHUP)
        until(lambda: hashes() == {artifact.sha256}, 30)
        after = [len(answers) for answers in answered]
        until(lambda: all(len(answers) > count + 3 for answers, count in zip(answered, after, strict=True)), 30)
    finally:
        ending.set()
        for thread in threads:
            thread.join(20)
        assert one.end(signal.SIGTERM) == 0
    # Every request was answered, by one of the two, and from the reload on by the one that is there then.
    old, new = answered[0][0], answered[0][middle[0] + 1]
    assert old != new
    assert {answer for answers in answered for answer in answers} == {old, new}
    assert {answers[count + 1] for answers, count in zip(answered, middle, strict=True)} == {new}
    assert {answers[count + 1] for answers, count in zip(answered, after, strict=True)} == {old}


def test_a_port_for_grpc_that_somebody_has_is_refused_before_anything_is_opened(artifact: Artifact) -> None:
    pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed")
    said: list[str] = []
    for workers in range(1, min(2, usable_cores()) + 1):
        with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:  # even where it would be shared
            port = taken.getsockname()[1]
            with pytest.raises(UsageError, match=f"--grpc-port 127.0.0.1:{port} cannot be listened on: Address"):
                convnext_deploy.serve(artifact.path, port=0, grpc_port=port, workers=workers, say=said.append)
    assert said == []


def test_two_servers_cannot_share_a_port_for_grpc() -> None:
    """Not even while the workers of the first still open their artifacts; these listen on sockets of their own."""
    with listeners.bound("127.0.0.1", 0, "--grpc-port", shared=True) as first:
        port = first.getsockname()[1]
        for shared in (False, True):
            with pytest.raises(UsageError, match=f"--grpc-port 127.0.0.1:{port} cannot be listened on"):
                listeners.bound("127.0.0.1", port, "--grpc-port", shared=shared)
        with contextlib.ExitStack() as sockets:
            for _ in range(2):
                worker = sockets.enter_context(socket.create_server(("127.0.0.1", port), reuse_port=True))
            for shared in (False, True):
                with pytest.raises(UsageError, match=f"--grpc-port 127.0.0.1:{port} cannot be listened on"):
                    listeners.bound("127.0.0.1", port, "--grpc-port", shared=shared)
            worker.close()
            socket.create_connection(("127.0.0.1", port)).close()


def test_one_port_for_http_and_grpc_is_refused(artifact: Artifact) -> None:
    pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match=f"--grpc-port {port} is a port of HTTP too; choose another"):
        convnext_deploy.serve(artifact.path, port=port, grpc_port=port)
