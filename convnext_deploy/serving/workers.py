"""Several processes behind one address, for models so fast that one Python cannot decode and answer for all cores.

Each is a server of its own, with its own sessions; all accept from one socket. This process starts them, takes the
signals, and puts another one in the place of one that died. It serves nothing itself.
"""

import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .. import errors
from ..errors import CheckFailed, ConvNextDeployError
from ..processes import end_with, import_path, python
from .listeners import address, host_port, refuse
from .log import Say, Terminal, unhindered
from .options import ServeOptions
from .server import LEAVE_S, Server
from .service import Service
from .shadow import ShadowOptions
from .siblings import Siblings

AGAIN_S = 5.0  # until another try to replace a worker, where what it opens cannot be opened


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told."""

    paths: dict[str, str]
    options: ServeOptions
    labels: str | None = None
    gate: str | None = None
    shadow: str | None = None
    shadow_share: float = 0.0
    shadow_limit: float = 0.0
    trust: bool = False
    listener: int = -1  # file descriptors
    admin: int | None = None
    grpc_port: int | None = None
    sockets: tuple[str, ...] = ()  # of all workers
    place: int = 0


def order(
    paths: dict[str, Path],
    options: ServeOptions,
    labels: Path | None,
    gate: Path | None,
    shadow: ShadowOptions | None,
    trust: bool,
) -> Order:
    """What every worker is told, without what differs between them."""

    def text(path: Path | None) -> str | None:
        return None if path is None else str(path)

    return Order(
        paths={name: str(path) for name, path in paths.items()},
        options=options,
        labels=text(labels),
        gate=text(gate),
        shadow=None if shadow is None else str(shadow.path),
        shadow_share=0.0 if shadow is None else shadow.share,
        shadow_limit=0.0 if shadow is None else shadow.limit,
        trust=trust,
    )


@dataclass(slots=True)
class _Worker:
    process: "subprocess.Popen[bytes]"
    to_child: int  # its end ends the worker
    ready: bool = False
    reloads: bool = False  # once it is ready: what it opens may be what was there before
    error: ConvNextDeployError | None = None


class Workers:
    """`Server` for several processes: the same `address`, `run` and `stop`.

    Args:
        admin: of `listeners.bound`, or None.
        grpc: of `listeners.bound`, shared, or None. It keeps the port, on which only the workers listen.
    """

    def __init__(
        self,
        template: Order,
        listener: socket.socket,
        admin: socket.socket | None,
        say: Say,
        grpc: socket.socket | None = None,
    ) -> None:
        self.address = address(listener)
        self._grpc_port = None if grpc is None else int(grpc.getsockname()[1])
        self.grpc_address: str | None = None if grpc is None else host_port(*grpc.getsockname()[:2])
        self._template, self._listener, self._admin, self._say = template, listener, admin, unhindered(say)
        self._terminal = Terminal()
        self._workers: list[_Worker] = []
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()  # may be filled by a signal's handler
        self._leaving = False
        self._serving = False  # all have been ready
        self._opened = ""  # the artifacts' hashes, as the latest worker found them
        self._end = threading.Timer(LEAVE_S, self._refuse)  # of listening
        self._end.daemon = True

    def run(self, ready: Callable[["Workers"], None] = lambda workers: None) -> None:
        """Serve until `stop`, SIGTERM or Ctrl-C.

        Args:
            ready: told when all workers take requests.

        Raises:
            ConvNextDeployError: what a worker raised before it was ready.
            CheckFailed: the last one could not be replaced, or requests were given up at the end.
        """
        self._folder = tempfile.mkdtemp(prefix="convnext-deploy-")
        try:
            with self._signals():
                for place in range(self._template.options.workers):
                    self._workers.append(self._started(place))
                self._watch(ready)
        finally:
            self._end.cancel()
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
                os.close(worker.to_child)
            shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """End, from any thread: as SIGTERM. A second time: at once."""
        self._events.put(("stop",))

    def _watch(self, ready: Callable[["Workers"], None]) -> None:
        while any(worker.process.returncode is None for worker in self._workers):
            event, *given = self._events.get()
            if event == "stop" or (event == "hangup" and self._terminal.is_gone()):
                self._leave()
            elif event == "hangup":
                self._reload()
            elif event == "say":
                place, line = given
                if place == 0 or self._serving:  # at the start all say the same
                    self._say(f"worker {place}: {line}" if self._serving else line)
            elif event == "ready":
                self._is_ready(*given)
                if not self._serving and all(worker.ready for worker in self._workers):
                    self._serving = True
                    ready(self)
            elif event == "again" and not self._leaving:
                self._replace(*given)
            elif event == "error":
                given[0].error = given[1]
            elif event == "exit":
                self._ended(*given)
        lost = [worker.error for worker in self._workers if worker.error is not None]
        if lost:
            raise lost[0]

    def _is_ready(self, worker: _Worker, opened: str) -> None:
        worker.ready = True
        if worker.reloads:
            worker.process.send_signal(signal.SIGHUP)
        if self._opened not in ("", opened):  # a folder was written anew since others opened it
            self._say("an artifact is another than before; all workers reload it, so that they answer alike")
            self._reload()
        self._opened = opened

    def _ended(self, place: int, worker: _Worker) -> None:
        code = worker.process.wait()
        if self._leaving or worker is not self._workers[place]:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if worker.ready:
            self._say(f"worker {place} {how}; another one takes its place")
            self._replace(place)
            return
        error = worker.error or CheckFailed(f"worker {place} {how} before it took a request")
        if not (self._serving and any(one.ready and one.process.poll() is None for one in self._workers)):
            raise error
        self._say(f"worker {place} cannot be replaced, and is tried again in {AGAIN_S:g} s: {error}")
        worker.error = None  # the others serve on, and end well without it
        again = threading.Timer(AGAIN_S, self._events.put, [("again", place)])
        again.daemon = True
        again.start()

    def _replace(self, place: int) -> None:
        os.close(self._workers[place].to_child)
        self._workers[place] = self._started(place)

    def _leave(self) -> None:
        if not self._leaving:
            self._say("ending: requests under way are answered; once more to end at once")
            self._leaving = True
            self._end.start()
        self._send(signal.SIGTERM)

    def _refuse(self) -> None:
        """End listening for all; the workers take what is connected already."""
        for one in (self._listener, self._admin):  # held open, it would take connections that nobody accepts
            if one is not None:
                refuse(one)
                one.close()

    def _reload(self) -> None:
        for worker in self._workers:
            if worker.ready:
                worker.process.send_signal(signal.SIGHUP)
            else:  # it has no handler yet: the signal would kill it
                worker.reloads = True

    def _send(self, number: int) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    def _started(self, place: int) -> _Worker:
        orders, to_child = os.pipe()
        answers, from_child = os.pipe()
        listeners = [one.fileno() for one in (self._listener, self._admin) if one is not None]
        code = f"from {__name__} import work; work({orders}, {from_child})"
        process = subprocess.Popen(
            python(code), stdin=subprocess.DEVNULL, pass_fds=(orders, from_child, *listeners),
            env=import_path(), start_new_session=True,
        )  # fmt: skip
        os.close(orders)
        os.close(from_child)
        worker = _Worker(process, to_child)
        told = msgspec.structs.replace(
            self._template,
            place=place,
            listener=self._listener.fileno(),
            admin=None if self._admin is None else self._admin.fileno(),
            grpc_port=self._grpc_port,
            sockets=tuple(f"{self._folder}/{one}" for one in range(self._template.options.workers)),
            shadow=self._template.shadow if place == 0 else None,
        )
        with contextlib.suppress(BrokenPipeError):  # it is gone: its end says so
            os.write(to_child, msgspec.json.encode(told) + b"\n")
        threading.Thread(target=self._listen, args=(place, worker, answers), daemon=True).start()
        return worker

    def _listen(self, place: int, worker: _Worker, answers: int) -> None:
        """What one worker says, in a thread, until it ends."""
        with os.fdopen(answers, "rb") as lines:
            for line in lines:
                kind, text = msgspec.json.decode(line)
                if kind == "say":
                    self._events.put(("say", place, text))
                elif kind == "ready":
                    self._events.put(("ready", worker, text))
                else:
                    self._events.put(("error", worker, getattr(errors, kind)(text)))
        worker.process.wait()
        self._events.put(("exit", place, worker))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        events = {signal.SIGTERM: "stop", signal.SIGINT: "stop", signal.SIGHUP: "hangup"}
        before = {
            number: signal.signal(number, lambda number, _: self._events.put((events[signal.Signals(number)],)))
            for number in events
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def work(orders: int, answers: int) -> None:
    """In a worker: serve what the order says."""
    with os.fdopen(orders, "rb", closefd=False) as lines:
        told = msgspec.json.decode(lines.readline(), type=Order)
    end_with(orders)
    said, guard = os.fdopen(answers, "wb"), threading.Lock()

    def tell(kind: str, text: str = "") -> None:
        with guard, contextlib.suppress(BrokenPipeError):  # the end of the parent ends this process too
            said.write(msgspec.json.encode([kind, text]) + b"\n")
            said.flush()

    try:
        service = Service(
            {name: Path(path) for name, path in told.paths.items()},
            told.options,
            labels=None if told.labels is None else Path(told.labels),
            gate=None if told.gate is None else Path(told.gate),
            shadow=None
            if told.shadow is None
            else ShadowOptions(
                path=Path(told.shadow), share=told.shadow_share, limit=told.shadow_limit, workers=told.options.workers
            ),
            trust=told.trust,
            say=lambda line: tell("say", line),
        )
        siblings = Siblings(service, told.sockets, told.place)
        admin = None if told.admin is None else socket.socket(fileno=told.admin)
        listener = socket.socket(fileno=told.listener)
        opened = " ".join(model.sha256 for model in service.models.values())
        Server(service, listener, admin, siblings, grpc_port=told.grpc_port).run(lambda _: tell("ready", opened))
    except ConvNextDeployError as error:
        tell(type(error).__name__, str(error))
        sys.exit(1)
