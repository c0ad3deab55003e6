"""A server in a thread of the tests' own process, or in one of its own, and how it is asked."""

import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from convnext_deploy.artifact.batches import Images
from convnext_deploy.serving import listeners, server
from convnext_deploy.serving.names import named
from convnext_deploy.serving.options import ServeOptions
from convnext_deploy.serving.server import Server
from convnext_deploy.serving.service import Service


class Running:
    """A server that answers; `held` keeps its sessions from ending a batch until `release`."""

    def __init__(self, one: Server) -> None:
        self.server, self.service, self.address = one, one.service, one.address
        self.host, _, port = one.address.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self.batches = 0
        self._go = threading.Event()
        self.error: BaseException | None = None

    def connection(self, timeout_s: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (parsed where it is JSON), headers."""
        connection = self.connection()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            content: Any = answer.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        if found.get("content-type") == "application/json":
            content = json.loads(content)
        return answer.status, content, found

    def hold(self) -> None:
        """From now on batches wait, and nothing is computed where it comes in."""
        for model in self.service.models.values():
            model.is_short = lambda content: False  # type: ignore[method-assign]
            model.are_short = lambda images: False  # type: ignore[method-assign]
            queue, run = model.queue, model.queue._run

            def held(images: Images, run: Callable[[Images], Any] = run) -> tuple[np.ndarray, ...]:
                self.batches += 1
                self._go.wait(20)
                return run(images)

            queue._run = held

    def release(self) -> None:
        self._go.set()

    def metric(self, line: str) -> float:
        """The value of a metric, by its name and labels."""
        for found in self.service.metrics.text().decode().splitlines():
            if found.startswith(f"convnext_deploy_{line} "):
                return float(found.rpartition(" ")[2])
        return 0.0


class Process:
    """A server process that takes requests."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "convnext_deploy", "serve", *arguments],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )  # fmt: skip
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self.port = 0
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith("serving "):
                self.port = int(line.partition(" on http://127.0.0.1:")[2].partition(" ")[0])
                break
        self._rest = threading.Thread(target=lambda: self.lines.extend(map(str.rstrip, self.process.stderr or ())))
        self._rest.start()

    def ask(self, method: str = "POST", path: str = "/classify", port: int | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=20)
        try:
            connection.request(method, path, picture() if path == "/classify" else None)
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, content.decode() if path == "/metrics" else json.loads(content)
        finally:
            connection.close()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(20)
        self._rest.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)


def answered_until(one: Process, number: int) -> list[object]:
    """What four clients are answered, one request after the other, by a process that a signal ends amid them."""
    answered: list[object] = []
    refused = threading.Event()

    def client() -> None:
        while not refused.is_set():
            try:
                answered.append(one.ask()[0])
            except ConnectionRefusedError:
                refused.set()
            except OSError as error:
                answered.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(answered) >= 20, 30)
    assert one.end(number) == 0
    for thread in threads:
        thread.join(20)
    return answered


@contextmanager
def serving(*artifacts: str | Path, say: Callable[[str], None] = print, **options: Any) -> Iterator[Running]:
    """A server until the end of the block, which is a drained end, without the second that it gives connections."""
    extra = {name: options.pop(name) for name in ("labels", "gate", "shadow", "trust") if name in options}
    grpc_port = options.pop("grpc_port", None)
    service = Service(named(artifacts), ServeOptions(**options), say=say, **extra)
    running = Running(Server(service, listeners.bound("127.0.0.1", 0, "port"), grpc_port=grpc_port))
    ready = threading.Event()

    def run() -> None:
        try:
            running.server.run(lambda _: ready.set())
        except BaseException as error:  # a test looks at it
            running.error = error
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    with mock.patch.multiple(server, LEAVE_S=0.02, HANDSHAKE_S=0.005):
        thread.start()
        assert ready.wait(20)
        try:
            yield running
        finally:
            running.release()
            running.server.stop()
            thread.join(20)
            assert not thread.is_alive()


def picture(format: str = "JPEG", seed: int = 0, size: tuple[int, int] = (90, 70), mode: str = "RGB") -> bytes:
    """An image file of smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, format)
    return file.getvalue()
