"""The process of `serve`: its words, its signals, its exit codes, and what is left when it is killed."""

import contextlib
import http.client
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from server_process import Process, answered_until, serving, until

import convnext_deploy
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.env import usable_cores
from convnext_deploy.errors import UsageError
from convnext_deploy.serving import listeners

Start = Callable[..., Process]


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("onnx", input="uint8")


@pytest.fixture
def start(artifact: Artifact) -> Iterator[Start]:
    started: list[Process] = []

    def run(*arguments: str, **options: object) -> Process:
        started.append(Process(f"m={artifact.path}", "--port", "0", *arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield run
    for one in started:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_without_losing_a_request(start: Start, number: int) -> None:
    one = start("--sessions", "1")
    assert one.lines[0].startswith("m: 16 outputs compared with the export's source")
    answered = answered_until(one, number)
    assert len(answered) > 20
    assert set(answered) == {200}
    assert one.lines[-1].startswith("ending: requests under way are answered")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can refuse connections before the end of listening")
def test_who_connects_just_before_the_end_of_listening_is_refused_and_not_reset(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody_waits, accept = threading.Event(), socket.socket.accept

    def slow(self: socket.socket) -> tuple[socket.socket, object]:
        try:
            return accept(self)
        except BlockingIOError:
            nobody_waits.set()
            time.sleep(0.3)  # the process is not given a core
            raise

    monkeypatch.setattr(socket.socket, "accept", slow)
    with serving(f"m={artifact.path}") as running:
        assert running.ask("GET", "/healthz")[0] == 200
        running.server.stop()
        assert nobody_waits.wait(20)
        with pytest.raises(ConnectionRefusedError):
            running.ask("GET", "/healthz")


def test_a_killed_one_can_be_started_again_on_the_same_port(start: Start) -> None:
    one = start()
    assert one.ask()[0] == 200
    assert one.end(signal.SIGKILL) == -signal.SIGKILL
    again = start("--port", str(one.port))
    assert again.port == one.port
    assert again.ask()[0] == 200


def test_the_admin_address_is_a_second_one_and_hangup_reloads(start: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = start("--admin", f"127.0.0.1:{port}")
    assert one.ask("POST", "/reload")[0] == 404
    assert one.ask("POST", "/classify", port)[0] == 404
    status, answer = one.ask("POST", "/reload", port)
    assert (status, str(answer)) == (200, str(answer))
    assert "has not changed" in str(answer)
    one.process.send_signal(signal.SIGHUP)
    assert one.ask()[0] == 200
    assert one.end(signal.SIGTERM) == 0
    assert sum("reloaded m: " in line for line in one.lines) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::]", "localhost"])
def test_the_admin_address_is_no_part_of_the_address_of_requests(artifact: Artifact, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match=rf"admin .*:{port} is where requests are answered already; choose another"):
        convnext_deploy.serve(artifact.path, port=port, admin=f"{host}:{port}")


def test_two_servers_that_begin_at_once_cannot_have_one_address() -> None:
    """While they open their artifacts, neither listens: SO_REUSEADDR alone would let both bind."""
    with listeners.bound("127.0.0.1", 0, "--port") as first:
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port 127.0.0.1:{port} cannot be listened on: Address already in use"):
            listeners.bound("127.0.0.1", port, "--port")


def left_behind() -> int:
    """A port with a connection that its server has closed first: it is left there for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as ended:
        with socket.create_connection(ended.getsockname()) as client:
            ended.accept()[0].close()
            assert client.recv(1) == b""
        return int(ended.getsockname()[1])


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_with_connections_of_a_server_that_has_ended_is_had_by_one(shared: bool) -> None:
    port = left_behind()
    with socket.socket() as plain, pytest.raises(OSError, match="Address already in use"):
        plain.bind(("127.0.0.1", port))
    with listeners.bound("127.0.0.1", port, "--port", shared=shared) as first:
        with pytest.raises(ConnectionRefusedError):  # it does not listen yet
            socket.create_connection(("127.0.0.1", port))
        with pytest.raises(UsageError, match="cannot be listened on"):
            listeners.bound("127.0.0.1", port, "--port", shared=shared)
        listeners.listen(first)
        socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("workers", range(1, min(2, usable_cores()) + 1))
def test_a_log_on_a_full_disk_ends_nothing(artifact: Artifact, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "convnext_deploy", "serve", f"m={artifact.path}", "--port", str(port)]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen([*command, "--workers", str(workers)], stderr=full)

    def answer(path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", path)
            return connection.getresponse().read()
        return b""

    def reloads() -> float:
        lines = answer("/metrics").decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if 'reloads_total{outcome="done"' in line)

    try:
        until(lambda: bool(answer("/readyz")) or process.poll() is not None, 60)
        for count in range(1, 3):  # the first line that was not written is no reason for the second to fail
            process.send_signal(signal.SIGHUP)
            until(lambda: reloads() >= count * workers or process.poll() is not None, 30)  # noqa: B023
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("workers", range(1, min(2, usable_cores()) + 1))
def test_a_terminal_that_is_closed_ends_it(artifact: Artifact, workers: int) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "convnext_deploy", "serve", f"m={artifact.path}", "--port", "0",
            "--workers", str(workers),
        ],
        stdin=its, stdout=its, stderr=its, start_new_session=True,
    )  # fmt: skip
    os.close(its)
    try:
        shown = b""
        while b"next:" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGHUP)  # of somebody who wants a reload: the terminal is there
        while b"has not changed" not in shown:
            shown += os.read(ours, 4096)
        os.close(ours)
        process.send_signal(signal.SIGHUP)  # the shell's, whose window has been closed
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_token_comes_from_a_file_or_the_environment(start: Start, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    by_file, by_name = start("--token-file", str(tmp_path / "token")), start(environment={"CONVNEXT_DEPLOY_TOKEN": "x"})
    for one in (by_file, by_name):
        assert one.ask()[0] == 401
        assert one.end(signal.SIGTERM) == 0


def test_no_framework_is_imported_for_it(artifact: Artifact, artifact_of: Callable[..., Artifact]) -> None:
    native = artifact_of("native", input="uint8")
    code = (
        "import sys, convnext_deploy\n"
        f"convnext_deploy.serve({str(native.path)!r}, port=0, ready=lambda server: server.stop())\n"
        "print(sorted({'torch', 'timm', 'pyarrow', 'onnx', 'onnxruntime', 'scipy', 'torchvision'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
