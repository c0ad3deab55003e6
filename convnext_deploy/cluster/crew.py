"""Workers on the nodes of a cluster, each a process that opens something once and then does items of work with it.

An item whose worker or node dies is done by another. A worker that dies is replaced where its node lives on, and a node
that joins gets workers. An error that the work itself raises ends it all.
"""

import contextlib
import itertools
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .. import env
from ..errors import ConvNextDeployError, UsageError, WorkerError, counted
from ..records.base import Device
from . import connection
from .connection import Node, nodes

Item = TypeVar("Item")
Opened = TypeVar("Opened")
Result = TypeVar("Result")

ATTEMPTS = 3  # workers that may die over one item, or while they open, before the work is given up
AHEAD = 2  # items that a worker has: the second one is there when the first is done
LOOK_S = 5.0  # between two looks at which nodes there are
PATIENCE_S = 30.0  # without any worker, after which it is said what is waited for


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs, and what of its node it has."""

    node: Node
    cpus: int
    gpus: int


def places_on(node: Node, device: Device, threads: int | None) -> list[Place]:
    """On a CPU one worker with all cores of the node, or as many as have `threads` each; else one for each GPU."""
    if device == "cuda":
        cpus = max(1, node.cpus // max(1, node.gpus))
        return [Place(node, cpus, 1)] * (node.gpus if node.cpus else 0)
    each = threads or node.cpus
    return [Place(node, each, 0)] * (node.cpus // each if each else 0)


class _Host:
    """The worker's own end, in a process on its node."""

    def __init__(self) -> None:
        self._work: Callable[[Any], Any] | None = None

    def open(self, version: str, opener: Callable[..., tuple[Any, Callable[[Any], Any]]], order: Any, cpus: int) -> Any:
        refuse_other_version(version)
        opened, self._work = opener(order, cpus)
        return opened

    def work(self, item: Any) -> Any:
        assert self._work is not None
        return self._work(item)


@dataclass(eq=False)
class _Member(Generic[Opened]):
    place: Place
    actor: Any
    opened: Opened | None = None
    items: deque[int] = field(default_factory=deque)  # in the order of their submission


class Crew(Generic[Item, Opened, Result]):
    """Workers wherever the cluster has places for them.

    Args:
        opener: called once in each worker with `order` and the worker's cores; returns what is told of the worker here,
            and what does an item.
        ready: told of each worker that has opened.
        only: the nodes that work, by their ids; None: all, and those that join later.
    """

    def __init__(
        self,
        opener: Callable[[Any, int], tuple[Opened, Callable[[Any], Result]]],
        order: Any,
        *,
        device: Device,
        threads: int | None,
        ready: Callable[[Node, Opened], None] = lambda node, opened: None,
        only: Collection[str] | None = None,
        say: Callable[[str], None],
    ) -> None:
        self._opener, self._order, self._device, self._threads = opener, order, device, threads
        self._ready, self._only, self._say = ready, only, say
        self._members: list[_Member[Opened]] = []
        self._pending: dict[Any, tuple[_Member[Opened], int | None]] = {}  # by reference; None: it opens
        self._known: set[str] = set()  # nodes
        self._deaths: Counter[str] = Counter()  # of workers of a node, one after another, that had not opened
        self._lost: Counter[int] = Counter()  # workers that died over an item
        self._reason = ""

    def places(self) -> list[Place]:
        """Of the nodes that there are.

        Raises:
            UsageError: none has what a worker needs.
        """
        there = self._nodes()
        places = [place for node in there for place in places_on(node, self._device, self._threads)]
        if not places:
            need = "a GPU" if self._device == "cuda" else f"{self._threads or 1} CPUs"
            has = ", ".join(f"{node.address} with {node.cpus} CPUs and {node.gpus} GPUs" for node in there) or "nothing"
            raise UsageError(f"no node of the cluster has {need} for a worker; it has {has}")
        return places

    def results(
        self, items: Sequence[Item], load: Callable[[Item, Opened], Any]
    ) -> Generator[tuple[Item, Result], None, None]:
        """Every item with its result, in the order in which they are done.

        Args:
            load: what a worker is given for an item; called when its turn has come.

        Raises:
            WorkerError: an item, or opening, ended several workers.
            ConvNextDeployError: what the work raised.
        """
        ray = connection.library()

        waiting = deque(range(len(items)))
        missing = len(items)
        number: int | None
        looked = began = -float("inf")
        told = False
        try:
            while missing:
                now = time.monotonic()
                if now - looked >= LOOK_S:
                    first, looked = looked < 0, now
                    began = now if first else began
                    self._join(missing, all_count=first)
                for member in self._members:
                    while member.opened is not None and waiting and len(member.items) < AHEAD:
                        number = waiting.popleft()
                        member.items.append(number)
                        reference = member.actor.work.remote(load(items[number], member.opened))
                        self._pending[reference] = member, number
                if not self._members:  # the next look would come too late
                    self._join(missing, all_count=False)
                if not self._members:
                    raise WorkerError(f"the cluster has no worker left: {self._reason or 'every node is gone'}")
                if not told and now - began > PATIENCE_S and not any(member.opened for member in self._members):
                    self._say(f"waiting for {self._members[0].place.cpus} free CPUs on a node of the cluster")
                    told = True
                done, _ = ray.wait(list(self._pending), num_returns=1, timeout=LOOK_S)
                for reference in done:
                    if reference not in self._pending:
                        continue  # of a worker that another reference has shown to be dead
                    member, number = self._pending.pop(reference)
                    value = self._value(reference, member, number, waiting)
                    if number is not None and value is not None:
                        missing -= 1
                        yield items[number], value
        finally:
            for member in self._members:
                with contextlib.suppress(Exception):  # it is dead, or the cluster is; nothing of it is needed any more
                    ray.kill(member.actor)

    def _value(self, reference: Any, member: _Member[Opened], number: int | None, waiting: deque[int]) -> Any:
        """What a worker answered; None where it opened, or died."""
        ray = connection.library()

        try:
            value = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._refuse(error, member.place.node)
        except ray.exceptions.RayError as error:
            self._lose(member, error, waiting)
            return None
        if number is None:
            member.opened = value
            self._deaths[member.place.node.id] = 0
            self._ready(member.place.node, value)
            return None
        member.items.remove(number)
        return value

    def _refuse(self, error: Exception, node: Node) -> None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ConvNextDeployError):
            raise type(cause)(f"{cause} (node {node.address})") from None
        raise WorkerError(f"node {node.address}: {cause_of(error)}") from cause

    def _lose(self, member: _Member[Opened], error: Exception, waiting: deque[int]) -> None:
        """Give the items of a worker that is dead to others, and put another in its place where its node lives."""
        node, reason = member.place.node, line_of(error)
        if lacks_package(error):
            raise UsageError(f"node {node.address}: {no_package()}") from None
        self._reason = f"that of node {node.address} died: {reason}"
        self._members.remove(member)
        self._pending = {ref: (one, item) for ref, (one, item) in self._pending.items() if one is not member}
        waiting.extendleft(reversed(member.items))
        if member.items:
            first = member.items[0]
            self._lost[first] += 1
            if self._lost[first] >= ATTEMPTS:
                raise WorkerError(f"{ATTEMPTS} workers died over the same piece of work, the last one: {self._reason}")
        elif member.opened is None:
            self._deaths[node.id] += 1
        self._say(f"a worker of node {node.address} died, others do its work: {reason}")
        lives = any(one.id == node.id for one in nodes())
        if lives and self._deaths[node.id] < ATTEMPTS:
            self._start(member.place)
        elif not lives:
            self._known.discard(node.id)

    def _nodes(self) -> list[Node]:
        return [node for node in nodes() if self._only is None or node.id in self._only]

    def _join(self, missing: int, *, all_count: bool) -> None:
        """Workers for the nodes that are new, and no more than there are items.

        Args:
            all_count: also workers that have not opened; later, a node that is busy does not keep others waiting.
        """
        for node in self._nodes():
            begun = sum(all_count or member.opened is not None for member in self._members)
            if node.id not in self._known and begun < missing:
                self._known.add(node.id)
                for place in places_on(node, self._device, self._threads):
                    self._start(place)

    def _start(self, place: Place) -> None:
        actor, reference = opening(place, self._opener, self._order)
        member: _Member[Opened] = _Member(place, actor)
        self._members.append(member)
        self._pending[reference] = member, None


def opening(place: Place, opener: Callable[..., tuple[Any, Callable[[Any], Any]]], order: Any) -> tuple[Any, Any]:
    """A worker that begins as soon as its place is free; itself, and the reference to what it opens."""
    ray = connection.library()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = (
        ray.remote(_Host)
        .options(
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node.id, soft=False),
        )
        .remote()
    )
    return actor, actor.open.remote(env.version(), opener, order, place.cpus)


def words(places: Sequence[Place]) -> str:
    """How many workers there are, and on how many nodes."""
    return f"{counted(len(places), 'worker')} on {counted(len({place.node.id for place in places}), 'node')}"


def pieces(ranges: Sequence[range], size: int) -> list[range]:
    """The ranges cut into such of that size, each from its own start on."""
    return list(
        itertools.chain.from_iterable(
            (range(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))
            for whole in ranges
        )
    )


def refuse_other_version(version: str) -> None:
    """On a node: refuse work from a machine with another version of this package.

    Raises:
        UsageError: with both.
    """
    if env.version() != version:
        raise UsageError(
            f"convnext-deploy is {env.version()} there and {version} here; install one version on every node"
        )


def lacks_package(error: BaseException) -> bool:
    """Whether a node could not begin because this package is not installed there."""
    return "No module named 'convnext_deploy'" in str(error)


def no_package() -> str:
    return f"it has no convnext-deploy; install version {env.version()} on every node"


def cause_of(error: Exception) -> str:
    """What the work on a node raised: its kind and its first line, or where Ray could not send it, the last it said."""
    cause = getattr(error, "cause", None)
    return line_of(error) if cause is None else f"{type(cause).__name__}: {line_of(cause)}"


def line_of(error: BaseException) -> str:
    """What Ray says of a death, without its addresses and advice, or another's error in one line."""
    traceback = str(getattr(error, "traceback_str", "")).strip()
    text = traceback.splitlines()[-1] if traceback else str(error)
    said = re.search(r"The actor died because (.+?)(?:\n|$)", text) or re.search(r"(.+?)(?:\n|$)", text)
    return " ".join((said[1] if said else type(error).__name__).split())[:200]
