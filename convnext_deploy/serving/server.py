"""The process that answers: slow clients, signals, and an end that loses nothing."""

import asyncio
import contextlib
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..errors import CheckFailed, ConvNextDeployError, counted
from . import application, log, requests
from .listeners import BACKLOG, address, host_port, listen, refuse
from .service import Service
from .siblings import Siblings

if TYPE_CHECKING:
    from .rpc import Rpc

KEEP_ALIVE_S = 75  # of a connection without a request
LEAVE_S = 1.0  # between "not ready" and the end of listening: connections close behind their answers meanwhile
HANDSHAKE_S = 0.1  # of a connection whose first packet came before the end
OWN_FILES = 200  # that the process may have open beside its connections


class _Connection(HttpToolsProtocol):
    """A connection whose client has to send a whole request head in time, and that is one of not too many."""

    idle_s = 15.0
    most = 2**20
    _timer: asyncio.TimerHandle | None = None
    _asked = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._unset()
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unset()
        self._asked = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.scope["state"][requests.COMPLETE] = time.perf_counter()
        super().on_message_complete()

    def shutdown(self) -> None:
        """At the end of the server: a new connection, whose request may be on its way, has a moment to send it."""
        if not self._asked and not self.transport.is_closing():
            self._unset()
            self._timer = self.loop.call_later(LEAVE_S, self.transport.close)
        else:
            super().shutdown()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.idle_s, self.transport.close)

    def _unset(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    shared = False  # whether other processes listen on its sockets too

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `run`'s: it has one server or two, and ends with an exit code instead of the signal."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What was connected before the end of listening is served: closing a listener resets what waits in it."""
        loop = asyncio.get_running_loop()
        rest = [one.dup() for one in sockets or ()]
        if not self.shared:
            for one in rest:
                refuse(one)
        await asyncio.sleep(HANDSHAKE_S)
        for server in self.servers:
            server.close()
        for one in rest:
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    connected, _ = one.accept()
                    await loop.connect_accepted_socket(self._connection, connected)
            one.close()
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made


class Server:
    """A service on its addresses. `run` blocks; `stop` is for other threads.

    Args:
        listener: of `listeners.bound`.
        admin: likewise, for whoever runs the server; None: there is no such address.
        siblings: the other processes of this server; None: there are none.
        grpc_port: for gRPC, on the listener's host; 0 takes a free one, None: there is none.
    """

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        admin: socket.socket | None = None,
        siblings: Siblings | None = None,
        grpc_port: int | None = None,
    ) -> None:
        self._terminal = log.Terminal()
        self.service, self._sockets = service, [listener] if admin is None else [listener, admin]
        self.address = address(listener)
        self._loop = uvloop.new_event_loop()
        connection = type(
            "Connection", (_Connection,), {"idle_s": service.options.idle_s, "most": _open_files() - OWN_FILES}
        )
        self._siblings, self._grpc_port = siblings, grpc_port
        self.grpc_address: str | None = None  # where it runs and there is one
        apps = [application.application(service, siblings), application.admin(service, siblings)]
        self._servers = [_configured(app, service, connection) for app, _ in zip(apps, self._sockets, strict=False)]
        for one in self._servers:
            one.shared = siblings is not None
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, ready: Callable[["Server"], None] = lambda server: None) -> None:
        """Serve until `stop`, SIGTERM or Ctrl-C; what was asked until then is answered. SIGHUP reloads.

        Signals are handled where this is the main thread.

        Args:
            ready: told when requests are taken.

        Raises:
            CheckFailed: requests took longer than the time to end, and were given up.
        """
        try:
            with _seldom_collected():
                self._loop.run_until_complete(self._run(ready))
        finally:
            self.service.close()
            self._loop.close()

    def stop(self) -> None:
        """End, from any thread: as SIGTERM. A second time: at once."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stop)

    def connections(self) -> int:
        """How many are open."""
        return sum(len(one.server_state.connections) for one in self._servers)

    async def _run(self, ready: Callable[["Server"], None]) -> None:
        self.service.metrics.connections.set_function(self.connections)
        with self._signals():
            rpc = await self._rpc()
            for one in self._sockets:
                listen(one)
            tasks = [
                asyncio.ensure_future(one.serve(sockets=[where]))
                for one, where in zip(self._servers, self._sockets, strict=True)
            ]
            while not all(one.started for one in self._servers) and not any(task.done() for task in tasks):
                await asyncio.sleep(0.005)
            between = None if self._siblings is None else await self._siblings.listen()
            ready(self)
            await asyncio.gather(*tasks)
            if between is not None:
                between.close()
            if rpc is not None:
                forced = any(one.force_exit for one in self._servers)
                await rpc.stop(0 if forced else self.service.options.drain_s)
            await asyncio.sleep(0)  # what was cancelled ends
        left = sum(not task.done() for one in self._servers for task in one.server_state.tasks)
        lost = self.service.abandoned + left
        if lost:
            raise CheckFailed(
                f"{counted(lost, 'request')} had no answer when the server ended; --drain-s gives them more time"
            )

    async def _rpc(self) -> "Rpc | None":
        if self._grpc_port is None:
            return None
        from .rpc import Rpc

        host = self._sockets[0].getsockname()[0]
        rpc = Rpc(self.service, host_port(host, self._grpc_port), shared=self._siblings is not None)
        await rpc.start()
        self.grpc_address = host_port(host, rpc.port)
        return rpc

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGHUP: self._hangup}
        for number, act in handled.items():
            self._loop.add_signal_handler(number, act)
        try:
            yield
        finally:
            for number in handled:
                self._loop.remove_signal_handler(number)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self) -> None:
        if self.service.draining:
            for one in self._servers:
                one.should_exit = one.force_exit = True
        else:
            self._start(self._leave())

    async def _leave(self) -> None:
        self.service.say("ending: requests under way are answered; once more to end at once")
        self.service.drain()
        await asyncio.sleep(LEAVE_S)
        for one in self._servers:
            one.should_exit = True

    def _hangup(self) -> None:
        if self._siblings is None and self._terminal.is_gone():  # of several, the first process decides
            self._stop()
        else:
            self._start(self._reloaded())

    async def _reloaded(self) -> None:
        try:
            lines = await self._loop.run_in_executor(None, self.service.reload)
        except ConvNextDeployError as error:
            self.service.say(f"reload refused: {error}")
        else:
            for line in lines:
                self.service.say(f"reloaded {line}")


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """What was made before is left alone by the garbage collector, which takes a twelfth of the time otherwise."""
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:  # it knows of no part: what the program froze itself stays so
            gc.unfreeze()


def _configured(app: Any, service: Service, connection: type[_Connection]) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="critical",
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(service.options.drain_s)),
        )
    )


def _open_files() -> int:
    """How many files the process may have open, after asking for as many as it may ask for."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):  # a system that allows fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**20)
