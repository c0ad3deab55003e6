"""A server in a thread of the tests' own process, and how it is asked."""

import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convnext_deploy.artifact.session import Images
from convnext_deploy.serving import server
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
        """From now on batches wait."""
        for model in self.service.models.values():
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


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)


@contextmanager
def serving(*artifacts: str | Path, say: Callable[[str], None] = print, **options: Any) -> Iterator[Running]:
    """A server until the end of the block, which is a drained end."""
    extra = {name: options.pop(name) for name in ("labels", "gate", "shadow", "trust") if name in options}
    service = Service(named(artifacts), ServeOptions(**options), say=say, **extra)
    running = Running(Server(service, server.bound("127.0.0.1", 0, "port")))
    ready = threading.Event()

    def run() -> None:
        try:
            running.server.run(lambda _: ready.set())
        except BaseException as error:  # a test looks at it
            running.error = error
        finally:
            ready.set()

    thread = threading.Thread(target=run)
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
