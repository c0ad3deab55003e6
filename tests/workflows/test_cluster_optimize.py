"""`optimize --ray`: candidates of nodes of one kind, whose workers die, and an artifact that comes home."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray_cluster

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.cluster import delivery
from convnext_deploy.cluster.connection import Node
from convnext_deploy.errors import UsageError
from convnext_deploy.models.source import Source
from convnext_deploy.records.manifest import BatchRange
from convnext_deploy.workflows import candidates, cluster_optimize, optimize, race
from convnext_deploy.workflows.agenda import View

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist"
WEIGHTS, IMAGES = EXAMPLE / "model.safetensors", EXAMPLE / "test-2000.parquet"
NODES = [Node(name, f"10.0.0.{name}", 8, 0) for name in "123"]
GROUPS = {"EPYC 9654, 8 cores": NODES[:2], "EPYC 9654, 8 cores, L4": NODES[2:], "Xeon 8480, 8 cores": NODES[2:]}


def test_a_kind_is_named_by_a_part_and_whole_where_that_is_a_part_of_another() -> None:
    assert cluster_optimize.of_kind(GROUPS, "xeon") == ("Xeon 8480, 8 cores", NODES[2:])
    assert cluster_optimize.of_kind(GROUPS, "EPYC 9654, 8 cores")[1] == NODES[:2]
    assert cluster_optimize.of_kind({"Xeon": NODES}, None) == ("Xeon", NODES)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("M4", "no node of the cluster is of the kind 'M4'; it has EPYC 9654, 8 cores; EPYC 9654, 8 cores, L4; Xeon"),
        (None, "the cluster has several kinds of nodes: EPYC 9654, 8 cores; .*; name one with --node-kind"),
        ("epyc", "several kinds of nodes 'epyc': EPYC 9654, 8 cores; EPYC 9654, 8 cores, L4; name one"),
    ],
)
def test_no_kind_and_several_are_refused_with_those_that_there_are(kind: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cluster_optimize.of_kind(GROUPS, kind)


def of_versions(versions: dict[str, str]) -> candidates.Machine:
    return candidates.Machine(
        facts={}, versions=versions, features=frozenset(), architecture="x86_64", saturates=False, runtimes=("native",),
        left_out={},
    )  # fmt: skip


def test_the_first_node_on_which_anything_runs_decides_and_one_on_which_nothing_runs_takes_no_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[candidates.Machine | str] = ["it has no native", of_versions({"a": "1"}), of_versions({"a": "2"})]
    monkeypatch.setattr(cluster_optimize.connection, "checked", lambda ray: ray)
    monkeypatch.setattr(cluster_optimize.connection, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(cluster_optimize.whole_nodes, "usable", lambda device: NODES)
    monkeypatch.setattr(cluster_optimize, "kinds", lambda found: {"Xeon": [node for node, _ in found]})
    monkeypatch.setattr(
        cluster_optimize.whole_nodes,
        "asked",
        lambda nodes, question: [(node, ({}, answer)) for node, answer in zip(nodes, answers, strict=True)],
    )
    goal: Any = SimpleNamespace(runtimes=(), device="cpu")
    said: list[str] = []
    with cluster_optimize.nodes_of("auto", None, goal, said.append) as nodes:
        assert (nodes.ids, nodes.machine) == (frozenset("2"), answers[1])
    assert said == [
        "1 node of the kind Xeon",
        "node 10.0.0.1 takes no part: it has no native",
        "node 10.0.0.3 takes no part: it has other versions or runtimes than 10.0.0.2",
    ]
    answers[:] = ["it has no native"] * 3
    with (
        pytest.raises(UsageError, match=r"node 10\.0\.0\.1: it has no native"),
        cluster_optimize.nodes_of("auto", None, goal, said.append),
    ):
        pass


def test_other_weights_on_a_node_end_the_call_and_are_no_reason_of_a_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an answer it was kept beside what cannot be built, also after the file was mended."""
    built = SimpleNamespace(manifest=SimpleNamespace(weights=SimpleNamespace(tensors_sha256="1" * 64), files=()))
    monkeypatch.setattr(cluster_optimize.workshop.Workshop, "builds", lambda *_: [(None, built)])
    order: Any = SimpleNamespace(
        source=Source(weights="model.pth"), weights=None, config=None, weights_sha256="0" * 64, input="float32",
        batch=BatchRange(), device="cpu", threads=None, machine=of_versions({}),
    )  # fmt: skip
    row: Any = None
    _, work = cluster_optimize._builder(order, 1)
    with pytest.raises(UsageError, match=r"model\.pth has other weights on a node; put the same checkpoint on every"):
        work((row, {}))


def test_a_configuration_that_begins_in_others_is_refused_before_anything_is_connected(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("_base_ = 'base.py'\nmodel = dict()\n")
    goal: Any = None
    source = Source(weights="model.pth", config=tmp_path / "own.py")
    with pytest.raises(UsageError, match=r"own\.py begins in base\.py, and nodes are sent one file; write it out"):
        optimize.optimize(source, goal, out=tmp_path, say=print, watch=print, ray="auto")
    (tmp_path / "own.json").write_text("{}")
    cluster_optimize.refuse_bases(Source(weights="model.pth", config=tmp_path / "own.json"))


def test_a_kind_of_node_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="node_kind 'EPYC'; it is for nodes of a cluster, give --ray too"):
        api.optimize(WEIGHTS, data=IMAGES, out=tmp_path / "best", node_kind="EPYC")


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_a_checkpoint_that_a_node_has_not_or_has_otherwise_is_written_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "shared", lambda value: type("Shared", (), {"value": lambda self: value})())
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "checkpoints").mkdir()  # folders in it stay where they are
    (path / "model.safetensors" if path.is_dir() else path).write_bytes(b"one")
    copy = delivery.copied(path)
    assert delivery.placed(copy, tmp_path) == path
    (path / "model.safetensors" if path.is_dir() else path).write_bytes(b"two")
    elsewhere = tmp_path / "node"
    elsewhere.mkdir()
    there = delivery.placed(copy, elsewhere)
    assert there == elsewhere / name
    assert (there / "model.safetensors" if there.is_dir() else there).read_bytes() == b"one"
    assert there.is_file() or (there / "config.json").read_text() == "{}"


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_and_ctrl_c_cost_no_candidate_and_the_artifact_comes_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "FIRST_S", 0.2)
    monkeypatch.setattr(race, "LAST_S", 0.2)
    monkeypatch.setattr(candidates, "HALVES", ())
    monkeypatch.setattr(race.Race, "_try_plans", lambda self, baseline: None)
    out, said = tmp_path / "best", list[str]()
    options: dict[str, Any] = {"data": IMAGES, "out": out, "max_drop": 2, "runtimes": "native", "input": "uint8"}
    with ray_cluster.nodes() as cluster:
        killed: list[int] = []
        killers: list[threading.Thread] = []

        def there() -> set[int]:
            return {pid for node in cluster.list_all_nodes() for pid in ray_cluster.workers(node)}

        def kill(before: set[int]) -> None:
            for _ in range(30_000):
                for pid in there() - before:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                if killed:
                    return
                time.sleep(0.01)

        def watch(view: View) -> None:
            # How often a building is reported depends on how many candidates this machine has: one without bf16. So
            # what comes after the first report is killed; the workers that said what the nodes are may still be there.
            if view.doing.startswith("building") and not killers:
                killers.append(threading.Thread(target=kill, args=(there(),), daemon=True))
                killers[0].start()
            if any(row.state == "timed" for row in view.rows):
                raise KeyboardInterrupt

        def search(**more: Any) -> Any:
            return api.optimize(WEIGHTS, ray=cluster.address, say=said.append, **options, **more)

        with pytest.raises(UsageError, match="no node of the cluster is of the kind 'abacus'"):
            search(node_kind="abacus")
        with pytest.raises(KeyboardInterrupt):
            search(watch=watch)
        assert not out.exists()
        killers[0].join()
        assert killed
        assert any("died, others do its work" in line for line in said)
        views: list[View] = []
        result = search(watch=views.append)
    building = [view for view in views if view.doing.startswith("building")]
    assert {row.name for view in building for row in view.rows if row.state == "waiting"} == {"native-int8"}
    assert any(line.startswith("2 nodes of the kind ") for line in said)
    assert "verified on this machine too" in said
    row = next(row for row in result.candidates if row.name == result.chosen)
    assert row.exact or (row.verdict is not None and row.verdict.decision == "PASS")
    assert convnext_deploy.load(out).manifest.export.format == "native"
