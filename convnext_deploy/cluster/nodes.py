"""One task a node, where what counts is the node itself."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from .. import env
from ..errors import ConvNextDeployError, UsageError
from ..records.base import Device
from .connection import Node, nodes
from .crew import lacks_package, line_of, no_package, refuse_other_version

Given = TypeVar("Given")
Result = TypeVar("Result")


def usable(device: Device) -> list[Node]:
    """The nodes with CPUs, and for CUDA with GPUs.

    Raises:
        UsageError: there is none.
    """
    found = [node for node in nodes() if node.cpus and (device == "cpu" or node.gpus)]
    if not found:
        raise UsageError(f"no node of the cluster has {'GPUs' if device == 'cuda' else 'CPUs'} that Ray may use")
    return found


def asked(where: Sequence[Node], question: Callable[[None], Result]) -> list[tuple[Node, Result]]:
    """Each node's answer, beside whatever runs there.

    Raises:
        UsageError: a node that cannot answer, such as one without this package.
    """
    import ray

    references = [_task(node, question, None, cpus=0, gpus=0) for node in where]
    found = []
    for node, reference in zip(where, references, strict=True):
        try:
            found.append((node, ray.get(reference)))
        except ray.exceptions.RayError as error:
            raise UsageError(f"node {node.address}: {_reason(error)}") from None
    return found


def each(
    where: Sequence[Node], work: Callable[[Given], Result], given: Given, device: Device
) -> Iterator[tuple[Node, Result | str]]:
    """Each node's result, or in words why it has none, in the order in which they come. A node is taken whole."""
    import ray

    waiting = {
        _task(node, work, given, cpus=node.cpus, gpus=node.gpus if device == "cuda" else 0): node for node in where
    }
    try:
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            node = waiting.pop(done)
            try:
                yield node, ray.get(done)
            except ray.exceptions.RayError as error:
                yield node, _reason(error)
    finally:
        for reference in waiting:
            with contextlib.suppress(Exception):  # the cluster is gone; another error than that says why
                ray.cancel(reference, force=True)


def _task(node: Node, work: Callable[[Any], Any], given: Any, *, cpus: int, gpus: int) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    version = env.version()

    def checked(version: str, given: Any) -> Any:
        refuse_other_version(version)
        return work(given)

    task = ray.remote(checked).options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
    )
    return task.remote(version, given)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, ConvNextDeployError):
        return str(cause)
    if lacks_package(error):
        return no_package()
    return f"{type(cause or error).__name__}: {line_of(cause or error)}"
