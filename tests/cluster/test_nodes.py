"""Work on whole nodes and what is said of them; with a stand-in for Ray, which need not be installed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from convnext_deploy.cluster import connection, crew, nodes
from convnext_deploy.cluster.connection import Node
from convnext_deploy.errors import DataError, UsageError, WorkerError

NODE = Node("a", "10.0.0.1", 4, 1)


class RayError(Exception):
    """Ray's own, as a task's error comes home."""

    def __init__(self, cause: BaseException | None, traceback_str: str = "") -> None:
        super().__init__("ray::_Host.work() (pid=1)\n  File ...")
        self.cause, self.traceback_str = cause, traceback_str


class LateError(RayError):
    pass


class TaskError(RayError):
    """Of work that raised; every other RayError is of a worker that died."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the references "open" and "work" become; "looks" in vain come before each of them."""
    found: dict[str, Any] = {"open": "opened", "work": 42, "looks": 0}
    looks: list[int] = []

    def wait(waiting: list[str], **options: Any) -> tuple[list[str], list[str]]:
        looks.append(0)
        return ([], waiting) if len(looks) <= found["looks"] else (waiting[:1], waiting[1:])

    def get(reference: str, timeout: float | None = None) -> Any:
        if isinstance(found[reference], Exception):
            raise found[reference]
        return found[reference]

    errors = SimpleNamespace(RayError=RayError, RayTaskError=RayError, GetTimeoutError=LateError)
    stand_in = SimpleNamespace(wait=wait, get=get, kill=lambda actor: None, exceptions=errors)
    monkeypatch.setattr(connection, "library", lambda: stand_in)
    actor = SimpleNamespace(work=SimpleNamespace(remote=lambda *given: "work"))
    for module in (crew, nodes):
        monkeypatch.setattr(module, "opening", lambda place, opener, order: (actor, "open"))
    monkeypatch.setattr(crew, "nodes", lambda: [NODE])
    return found


def each(device: Any = "cpu", say: Callable[[str], None] = lambda line: None) -> list[tuple[Node, Any]]:
    return list(nodes.each([NODE], lambda given: given, 1, device, say))


def test_what_a_busy_node_is_waited_for_is_said(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "PATIENCE_S", 0.0)
    said: list[str] = []
    answers["looks"] = 1
    assert each("cuda", said.append) == [(NODE, 42)]
    assert said == ["waiting for all 4 CPUs and 1 GPUs of node 10.0.0.1, in use by other work, 0 s so far"]


def test_a_node_that_answers_no_question_is_named(answers: dict[str, Any]) -> None:
    assert nodes.asked([NODE], lambda _: 0) == [(NODE, 42)]
    answers["open"] = LateError(None)
    with pytest.raises(UsageError, match=r"node 10\.0\.0\.1 does not answer within 120 s"):
        nodes.asked([NODE], lambda _: 0)


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (RayError(DataError("no image")), DataError, "no image"),
        (RayError(ValueError("one\ntwo")), WorkerError, "ValueError: one"),
        # Ray could not send the error itself.
        (RayError(None, "Traceback:\n  File x\nlib.Odd: it broke\n"), WorkerError, "lib.Odd: it broke"),
    ],
)
def test_what_the_work_raises_is_one_line_with_the_node(
    answers: dict[str, Any], error: RayError, kind: type[Exception], line: str
) -> None:
    answers["work"] = error
    assert each() == [(NODE, line)]
    workers: crew.Crew[int, None, int] = crew.Crew(
        lambda order, cpus: (None, int), None, device="cpu", threads=None, say=print
    )
    with pytest.raises(kind, match=line) as refused:
        list(workers.results([1], lambda item, opened: item))
    assert "node 10.0.0.1" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_more_workers_begin_than_there_is_work(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[crew.Place] = []
    opening = crew.opening

    def counting(place: crew.Place, opener: Any, order: Any) -> tuple[Any, Any]:
        places.append(place)
        return opening(place, opener, order)

    monkeypatch.setattr(crew, "opening", counting)
    monkeypatch.setattr(crew, "nodes", lambda: [NODE, Node("b", "10.0.0.2", 4, 0), Node("c", "10.0.0.3", 4, 0)])
    workers: crew.Crew[int, str, int] = crew.Crew(
        lambda order, cpus: ("", int), None, device="cpu", threads=None, say=print
    )
    assert list(workers.results([1], lambda item, opened: item)) == [(1, 42)]
    assert [place.node.id for place in places] == ["a"]


def test_a_crew_stays_on_the_nodes_that_it_may_use(answers: dict[str, Any]) -> None:
    def crew_on(*ids: str) -> crew.Crew[int, None, int]:
        return crew.Crew(lambda order, cpus: (None, int), None, device="cpu", threads=2, only=ids, say=print)

    assert [place.cpus for place in crew_on("a", "b").places()] == [2, 2]
    with pytest.raises(UsageError, match="no node of the cluster has 2 CPUs"):
        crew_on("b").places()


def test_where_the_only_worker_dies_a_node_that_has_not_begun_takes_its_place(
    answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []

    def opening(place: crew.Place, opener: Any, order: Any) -> tuple[Any, Any]:
        began.append(place.node.id)
        actor = SimpleNamespace(work=SimpleNamespace(remote=lambda *given: f"work {place.node.id}"))
        return actor, f"open {place.node.id}"

    monkeypatch.setattr(crew, "opening", opening)
    monkeypatch.setattr(crew, "nodes", lambda: [NODE, Node("b", "10.0.0.2", 4, 0)])
    monkeypatch.setattr(connection.library().exceptions, "RayTaskError", TaskError)
    answers |= {"open a": RayError(None), "open b": "opened", "work b": 42}
    workers: crew.Crew[int, str, int] = crew.Crew(
        lambda order, cpus: ("", int), None, device="cpu", threads=None, say=print
    )
    assert list(workers.results([1], lambda item, opened: item)) == [(1, 42)]
    assert began[-1] == "b"
