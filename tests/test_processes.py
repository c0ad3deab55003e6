"""What a killed process leaves running: nothing. The reference is the system's own list of processes."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import convnext_deploy
from convnext_deploy import processes
from convnext_deploy.errors import WorkerError
from convnext_deploy.processes import Group, import_path, python
from convnext_deploy.runtimes.tensorrt import preflight
from convnext_deploy.timing.worker import Worker

# Each child writes its own number and that of a grandchild, then works for a minute.
COMMAND = """import os, subprocess, sys, time
grandchild = subprocess.Popen(["sleep", "60"])
with open(sys.argv[1], "a") as file: file.write(f"{os.getpid()} {grandchild.pid} ")
time.sleep(60)
"""
COMPILERS = f"""import sys
import convnext_deploy
from convnext_deploy.errors import WorkerError
from convnext_deploy.processes import Group, import_path, python
from convnext_deploy.runtimes.tensorrt import preflight
from convnext_deploy.timing.worker import Worker
with Group() as group:
    for child in [group.start([sys.executable, "-c", {COMMAND!r}, sys.argv[1]]) for _ in range(2)]: child.wait()
"""
WORKER = """import sys
from convnext_deploy.timing.worker import Worker
worker = Worker("builder")
worker.send("prepare", imports=["busy"])
worker.wait()
"""
KERNELS = """from convnext_deploy.kernels.prebuild import Variant, compiled
list(compiled([Variant("busy:kernel", (), ())], (9, 0)))
"""


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("code", "count"),
    [
        pytest.param(COMPILERS, 4, id="compilers"),
        pytest.param(WORKER, 2, id="worker"),
        pytest.param(KERNELS, 2, id="kernels", marks=pytest.mark.slow),  # imports torch twice
    ],
)
def test_a_killed_process_leaves_nothing_running(tmp_path: Path, code: str, count: int, end: signal.Signals) -> None:
    if code == KERNELS:
        pytest.importorskip("triton")
    (tmp_path / "busy.py").write_text(f"import sys; sys.argv[1:] = [{str(tmp_path / 'pids')!r}]\n{COMMAND}")
    (tmp_path / "pids").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "pids")], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        assert until(lambda: len((tmp_path / "pids").read_text().split()) == count)
        started = [int(word) for word in (tmp_path / "pids").read_text().split()]
        assert all(map(runs, started))
    finally:
        parent.send_signal(end)
        parent.wait(30)
    assert until(lambda: not any(map(runs, started)), 10)


def test_a_command_s_end_and_output_are_its_own() -> None:
    with Group() as group:
        child = group.start(["sh", "-c", "cat; echo said >&2; exit 7"], stderr=subprocess.PIPE)
        assert child.communicate()[1] == "said\n"
        assert child.returncode == 7
        assert group.start(["sh", "-c", "kill -SEGV $$"]).wait() == 128 + signal.SIGSEGV


class Queue:
    """What macOS' kqueue does with one pipe, by poll of Linux: told once of each change, and of the end with a flag."""

    def __init__(self) -> None:
        self.answers = 0

    def control(self, changes: list[Any] | None, most: int) -> list[Any]:
        assert most == 1
        if changes is not None:
            ((self.pipe, filter, flags),) = changes
            assert (filter, flags) == ("read", 1 | 32)
        ready = select.poll()
        ready.register(self.pipe, select.POLLIN if self.answers == 0 else 0)
        ((_, events),) = ready.poll()
        self.answers += 1
        return [SimpleNamespace(flags=0x8000 if events & select.POLLHUP else 0)]

    def close(self) -> None:
        pass


def test_on_macos_the_end_of_a_pipe_is_told_by_kqueue_and_no_request_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its poll never reports an end to who asks for nothing. The queue is made up: no Mac was at hand."""
    names = {"KQ_FILTER_READ": "read", "KQ_EV_ADD": 1, "KQ_EV_CLEAR": 32, "KQ_EV_EOF": 0x8000, "KQ_EV_ERROR": 0x4000}
    for name, value in names.items():
        monkeypatch.setattr(select, name, value, raising=False)
    queue = Queue()
    monkeypatch.setattr(select, "kqueue", lambda: queue, raising=False)
    monkeypatch.setattr(select, "kevent", lambda *given: given, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    ours, theirs = os.pipe()
    ended = threading.Event()

    def wait() -> None:
        processes._wait_for_the_end(ours)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    os.write(theirs, b"a request")
    assert until(lambda: queue.answers == 1)
    assert not ended.wait(0.1)
    os.close(theirs)
    assert ended.wait(30)
    assert os.read(ours, 100) == b"a request"
    os.close(ours)


# Children and the working folder -------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is somebody else's, with modules by the names of ours and of what we import."""
    folder = tmp_path / "checkout"
    (folder / "convnext_deploy").mkdir(parents=True)
    for name in ("convnext_deploy/__init__.py", "json.py", "msgspec.py", "numpy.py", "sitecustomize.py", "torch.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(folder)
    return tmp_path / "ran"


def test_what_times_imports_nothing_from_the_working_folder(hostile: Path) -> None:
    worker = Worker("builder", imports=["json", "numpy"])
    with pytest.raises(WorkerError, match="no_such_method"):  # it answers: it has imported what it needs
        worker.call("no_such_method")
    worker.close()
    assert not hostile.exists()


def test_what_opens_an_engine_imports_nothing_from_the_working_folder(hostile: Path, tmp_path: Path) -> None:
    code = 'import json, msgspec, sys; print(json.dumps({"loaded": False, "errors": sys.argv[1:]}))'
    (problem,) = preflight.probe("tensorrt_rtx", tmp_path / "e", code)
    assert "refuses this engine: tensorrt_rtx;" in problem
    assert not hostile.exists()


def test_every_command_for_this_interpreter_leaves_the_working_folder_out() -> None:
    package = Path(convnext_deploy.__file__).parent
    places = [
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if "sys.executable" in path.read_text()
    ]
    assert places == ["processes.py"]


def test_a_child_imports_from_where_its_parent_does_even_from_its_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text("")
    monkeypatch.chdir(tmp_path)
    command = python("import beside, sys; print(*sys.argv[1:])", "a", "b")
    refused = subprocess.run(command, env=import_path(), capture_output=True, text=True)
    assert "No module named 'beside'" in refused.stderr
    monkeypatch.syspath_prepend("")  # as in `python -c`, and at Python's prompt
    assert subprocess.run(command, env=import_path(), capture_output=True, text=True).stdout == "a b\n"
