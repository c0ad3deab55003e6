"""Ray clusters of several processes on this machine, whose workers and nodes tests kill."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@contextmanager
def nodes(count: int = 2, cpus: int = 2) -> Iterator[Any]:
    """A cluster of nodes that have so many CPUs each; skips where Ray is not installed."""
    if not os.environ.get("CI"):  # there it has to be
        pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    # Beside other tests a node needs longer to start than the 30 s that Ray gives it.
    with mock.patch.dict(os.environ, {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
        try:
            for _ in range(count - 1):
                cluster.add_node(num_cpus=cpus)
            yield cluster
        finally:
            cluster.shutdown()


def workers(node: Any) -> list[int]:
    """The processes of a node that do our work."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            title = (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if parent == raylet and title.startswith(b"ray::_Host"):
            found.append(int(process.name))
    return found


def kill_workers(node: Any) -> int:
    """How many there were."""
    found = workers(node)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return len(found)
