"""The process of `serve`: its words, its signals, its exit codes, and what is left when it is killed."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from server_process import Process, answered_until

from convnext_deploy.artifact.manifest import Artifact

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
