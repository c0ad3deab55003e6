"""Where a cluster is, and who is connected to it; with a stand-in for Ray, which need not be installed."""

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from false_servers import answering

from convnext_deploy import env
from convnext_deploy.cluster import connection
from convnext_deploy.cluster.connection import Node
from convnext_deploy.cluster.crew import pieces, places_on
from convnext_deploy.errors import MissingPackageError, UsageError


class StandIn:
    """Counts connections."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.there = False
        self.error: Exception | None = None

    def is_initialized(self) -> bool:
        return self.there

    def init(self, address: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        self.calls.append(address)
        self.there = True

    def shutdown(self) -> None:
        self.calls.append("end")
        self.there = False


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    made = StandIn()
    monkeypatch.setattr(connection, "library", lambda: made)
    yield made
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def test_two_at_once_share_a_connection_that_ends_with_the_last(ray: StandIn) -> None:
    first, second = connection.connected("local"), connection.connected("local")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ray.calls == ["local"]
    with (
        pytest.raises(UsageError, match="another thread of this program is at work on local"),
        connection.connected("a:1"),
    ):
        pass
    second.__exit__(None, None, None)
    assert ray.calls == ["local", "end"]


def test_a_program_that_is_connected_already_stays_so(ray: StandIn) -> None:
    ray.there = True
    with connection.connected("auto"):
        pass
    assert (ray.calls, ray.there) == ([], True)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("auto", ConnectionError("many\nlines"), "no cluster runs on this machine; start one with `ray start --head`"),
        ("a:1", RuntimeError("Version mismatch:\n Ray: 2.40"), "ray a:1: Version mismatch: Ray: 2.40"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_one_line(
    ray: StandIn, address: str, error: Exception, message: str
) -> None:
    ray.error = error
    with pytest.raises(UsageError, match=message), connection.connected(address):
        pass
    ray.error = None
    with connection.connected("local"):  # and nothing of it is left
        pass


@pytest.mark.parametrize("address", ["nonsense", "", "a:b", "a:99999", "http://a:1", "a b:1"])
def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with pytest.raises(
        UsageError, match=r"expected local, auto \(the cluster that runs on this machine\) or HOST:PORT"
    ):
        connection.checked(address)


def test_a_port_where_nothing_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setattr(connection, "ANSWER_S", 0.2)
    with answering(None) as address, pytest.raises(UsageError, match=f"ray {address}: nothing answers there"):
        connection.checked(address)
    with pytest.raises(UsageError, match=f"ray {address}: nothing answers there"):
        connection.checked(address)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_what_speaks_no_grpc_is_no_cluster(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself tries for minutes, at its own dashboard too."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with answering(answer) as address:
        with pytest.raises(UsageError, match=f"ray {address}: what answers there is no cluster"):
            connection.checked(address)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        assert connection.checked(address) == address  # it cannot be told without the certificates


def test_a_server_of_grpc_is_taken_for_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    settings = bytes.fromhex("000006040000000000000400010000000008060000000000")  # as grpcio begins
    with answering(settings) as address:
        assert connection.checked(address) == address
        assert connection.checked(f"ray://{address}") == f"ray://{address}"


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"ray is not installed; run: pip install 'convnext-deploy\[ray\]'"):
        connection.checked("local")
    assert env.EXTRAS["ray"] == "ray"


def test_workers_take_a_node_whole_or_by_threads_and_one_for_each_gpu() -> None:
    node = Node("a", "10.0.0.1", 16, 4)
    assert [place.cpus for place in places_on(node, "cpu", None)] == [16]
    assert [place.cpus for place in places_on(node, "cpu", 5)] == [5, 5, 5]
    assert places_on(node, "cpu", 17) == []
    assert [(place.cpus, place.gpus) for place in places_on(node, "cuda", None)] == [(4, 1)] * 4
    assert places_on(Node("b", "10.0.0.2", 0, 0), "cpu", None) == []


def test_pieces_begin_at_the_start_of_each_range() -> None:
    assert pieces([range(10), range(12, 17)], 4) == [range(4), range(4, 8), range(8, 10), range(12, 16), range(16, 17)]
