"""The cluster that work goes to: one that runs somewhere, or one of this machine's cores that ends with the work."""

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arguments import shown
from ..env import needs, usable_cores
from ..errors import UsageError, plain

if TYPE_CHECKING:
    from types import ModuleType

LOCAL, AUTO = "local", "auto"
ANSWER_S = 5.0  # that the port of a cluster may take to answer; Ray itself tries for minutes
# Of HTTP/2, which gRPC is spoken in: the client's preface with no settings, a frame's head, and a frame's type.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEAD, _SETTINGS = 9, b"\x04"
_ADDRESS = re.compile(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})")
_EXPECTED = f"expected {LOCAL}, {AUTO} (the cluster that runs on this machine) or HOST:PORT"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster that is alive, and what Ray may use of it."""

    id: str
    address: str
    cpus: int
    gpus: int


def checked(address: str) -> str:
    """An address as `ray.init` takes it.

    Raises:
        UsageError: it is none, or nothing answers there.
        MissingPackageError: Ray is not installed.
    """
    with needs("ray"):
        import ray  # noqa: F401
    if address in (LOCAL, AUTO):
        return address
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[2]) > 65535:
        raise UsageError(f"ray {shown(address)}; {_EXPECTED}")
    try:
        with socket.create_connection((match[1].strip("[]"), int(match[2])), ANSWER_S) as connection:
            is_cluster = _uses_tls() or _speaks_grpc(connection)
    except OSError as error:
        raise UsageError(
            f"ray {address}: nothing answers there ({plain(error)}); {_EXPECTED} of a head node (`ray start --head`)"
        ) from None
    if not is_cluster:
        raise UsageError(
            f"ray {address}: what answers there is no cluster; {_EXPECTED} of a head node, whose port "
            "`ray start --head` prints, and not that of its dashboard"
        )
    return address


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether an HTTP/2 server greets, as RFC 9113 has it: with its settings, whatever the client then says."""
    connection.sendall(_GREETING)
    answer = b""
    while len(answer) < _FRAME_HEAD and (part := connection.recv(_FRAME_HEAD - len(answer))):
        answer += part
    return answer[3:4] == _SETTINGS


@contextmanager
def connected(address: str, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """This process as a driver of the cluster. A program that is one already keeps its connection.

    Several threads share one connection, which ends with the last of them.

    Args:
        address: of `checked`.
        say: told where a connection is made.

    Raises:
        UsageError: there is no cluster, its Ray or Python is of another version, or another thread is at work on
            another cluster.
    """
    ray = library()
    with _lock:
        if _users and _users[0] != address:
            raise UsageError(
                f"ray {address}: another thread of this program is at work on {_users[0]}; wait for its end"
            )
        ours = bool(_users) or not ray.is_initialized()
        if ours:
            if not _users:
                say(f"connecting to the cluster {address}")
                _connect(address)
            _users.append(address)
    try:
        yield
    finally:
        with _lock:
            if ours:
                _users.pop()
                if not _users:
                    ray.shutdown()


_lock = threading.Lock()
_users: list[str] = []  # the address, once for each that uses a connection which was made here


def _connect(address: str) -> None:
    ray = library()
    options: dict[str, Any] = {"address": address}
    if address == LOCAL:
        options |= {"num_cpus": usable_cores(), "include_dashboard": False}
    try:
        with _unreported():
            ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        if address == AUTO and isinstance(error, ConnectionError):
            raise UsageError(
                "ray auto: no cluster runs on this machine; start one with `ray start --head`, or give HOST:PORT"
            ) from None
        raise UsageError(f"ray {address}: {plain(error)}") from None


@contextmanager
def _unreported() -> Iterator[None]:
    """A cluster of one's own would tell Ray's makers of its use, unless the user has said something else."""
    name = "RAY_USAGE_STATS_ENABLED"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def nodes() -> list[Node]:
    """Those that are alive, in the order of their addresses."""
    alive = []
    for node in library().nodes():
        if node["Alive"]:
            has = node["Resources"]
            address = node["NodeManagerAddress"]
            alive.append(Node(node["NodeID"], address, int(has.get("CPU", 0)), int(has.get("GPU", 0))))
    return sorted(alive, key=lambda node: (node.address, node.id))


def library() -> "ModuleType":
    """Ray itself, imported only where a cluster is asked for.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needs("ray"):
        import ray
    return ray
