"""One piece of work a node, where what counts is the node itself."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import ConvNextDeployError, UsageError
from ..records.base import Device
from . import connection
from .connection import Node, nodes
from .crew import LOOK_S, PATIENCE_S, Place, cause_of, lacks_package, no_package, opening

Given = TypeVar("Given")
Result = TypeVar("Result")

ANSWER_S = 120.0  # that a node may take to answer a question; a process of Python is started first


def usable(device: Device) -> list[Node]:
    """The nodes with CPUs, and for CUDA with GPUs.

    Raises:
        UsageError: there is none.
    """
    able = [node for node in nodes() if node.cpus and (device == "cpu" or node.gpus)]
    if not able:
        raise UsageError(f"no node of the cluster has {'GPUs' if device == 'cuda' else 'CPUs'} that Ray may use")
    return able


def asked(where: Sequence[Node], question: Callable[[None], Result]) -> list[tuple[Node, Result]]:
    """Each node's answer, beside whatever runs there.

    Raises:
        UsageError: a node that cannot answer, such as one without this package, or does not within two minutes.
    """
    ray = connection.library()

    hosts = [opening(Place(node, 0, 0), _opened, (question, None)) for node in where]
    answers = []
    try:
        references = [actor.work.remote(None) for actor, _ in hosts]
        for node, (_, opened), reference in zip(where, hosts, references, strict=True):
            try:
                ray.get(opened, timeout=ANSWER_S)
                answers.append((node, ray.get(reference, timeout=ANSWER_S)))
            except ray.exceptions.GetTimeoutError:
                raise UsageError(
                    f"node {node.address} does not answer within {ANSWER_S:.0f} s; look after it"
                ) from None
            except ray.exceptions.RayError as error:
                raise UsageError(f"node {node.address}: {_reason(error)}") from None
    finally:
        _end(actor for actor, _ in hosts)
    return answers


def each(
    where: Sequence[Node],
    work: Callable[[Given], Result],
    given: Given,
    device: Device,
    say: Callable[[str], None],
) -> Iterator[tuple[Node, Result | str]]:
    """Each node's result, or in words why it has none, in the order in which they come. A node is taken whole.

    Where one is busy, `say` is told what is waited for, less and less often.
    """
    ray = connection.library()

    hosts = {node.id: _whole(node, work, given, device) for node in where}
    waiting = {reference: (node, False) for node in where for _, reference in (hosts[node.id],)}
    began, patience = time.monotonic(), PATIENCE_S
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
            waited = time.monotonic() - began
            busy = [node for node, begun in waiting.values() if not begun]
            if not done and busy and waited > patience:
                patience *= 2
                say(f"waiting for {_taken(busy, device)}, in use by other work, {waited:.0f} s so far")
            for reference in done:
                node, begun = waiting.pop(reference)
                try:
                    answer = ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield node, _reason(error)
                    continue
                if begun:
                    yield node, answer
                else:
                    waiting[hosts[node.id][0].work.remote(None)] = node, True
    finally:
        _end(actor for actor, _ in hosts.values())


def _whole(node: Node, work: Callable[[Given], Result], given: Given, device: Device) -> tuple[Any, Any]:
    return opening(Place(node, node.cpus, node.gpus if device == "cuda" else 0), _opened, (work, given))


def _opened(order: tuple[Callable[[Any], Any], Any], _: int) -> tuple[None, Callable[[Any], Any]]:
    """On a node: what does the one piece of work."""
    work, given = order
    return None, lambda _: work(given)


def _taken(busy: Sequence[Node], device: Device) -> str:
    """What of these nodes has to be free."""
    needs = (
        f"all {node.cpus} CPUs{f' and {node.gpus} GPUs' if device == 'cuda' else ''} of node {node.address}"
        for node in busy
    )
    return " and ".join(needs)


def _end(actors: Iterable[Any]) -> None:
    ray = connection.library()

    for actor in actors:
        with contextlib.suppress(Exception):  # it is dead, or the cluster is; nothing of it is needed any more
            ray.kill(actor)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, ConvNextDeployError):
        return str(cause)
    return no_package() if lacks_package(error) else cause_of(error)
