"""`bench` on a Ray cluster: the same contenders on one node of each kind, whose rows carry its machine.

A node is taken whole while it is timed. Ratios are of rows of one run, which is of one node; nothing is compared over
kinds of machines.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from .. import env, formats
from ..artifact import manifest
from ..cluster import connection, delivery, nodes
from ..cluster.connection import Node
from ..errors import MissingPackageError, WorkerError
from ..records.base import Device
from ..records.timing import BenchResult, Ceilings
from . import bench, contenders
from .bench import Plan
from .contenders import Contender

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What each node is to time."""

    parcels: tuple[delivery.Parcel, ...]
    compare: tuple[str, ...]
    plan: Plan
    cuda_graph: bool


def bench_on(
    address: str,
    paths: Sequence[Path],
    compare: Sequence[str],
    plan: Plan,
    *,
    cuda_graph: bool,
    trust: bool,
    say: Say,
) -> Iterator[BenchResult]:
    """Rows of one node of each kind; a node's all at once, when it has done.

    Args:
        address: of `connection.checked`.
        paths: artifacts; those that bring code have to be such that would be opened here.

    Raises:
        WorkerError: a node died or its benchmark failed; raised after the rows of the others.
        UsageError: no node has what the plan needs.
    """
    artifacts = [manifest.verified(path) for path in paths]
    for artifact in artifacts:
        formats.refuse_untrusted(formats.of(artifact), artifact, trust)
    with connection.connected(address, say):
        order = _Order(
            parcels=tuple(delivery.packed(artifact) for artifact in artifacts),
            compare=tuple(compare),
            plan=plan,
            cuda_graph=cuda_graph,
        )
        alike = kinds(nodes.asked(nodes.usable(plan.device), machine_of))
        firsts = [nodes_of[0] for nodes_of in alike.values()]
        for words, (node, *_) in alike.items():
            say(f"node {node.address}: {words}")
        failures: list[str] = []
        for node, answer in nodes.each(firsts, timed, order, plan.device, say):
            if isinstance(answer, str):
                failures.append(f"node {node.address}: {answer}")
                say(failures[-1])
                continue
            yield from answer
    if failures:
        raise WorkerError("; ".join(failures))


def kinds(machines: Sequence[tuple[Node, dict[str, Any]]]) -> dict[str, list[Node]]:
    """The nodes of each kind: the same processor, cores and GPUs."""
    groups: dict[str, list[Node]] = {}
    for node, machine in machines:
        gpus = f", {machine['gpus']}" if machine["gpus"] else ""
        groups.setdefault(f"{machine['cpu']}, {machine['cores']} cores{gpus}", []).append(node)
    return groups


def machine_of(_: None) -> dict[str, Any]:
    """On a node: what it is."""
    return env.machine() | {"gpus": ", ".join(sorted(env.nvidia_gpus()))}


def timed(order: _Order) -> list[BenchResult]:
    """On a node: the rows of all contenders, named as where the command was given."""
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(delivery.unpacked(parcel)).path for parcel in order.parcels]
        group = contenders.of_artifacts(
            places, order.compare, order.plan.device, order.cuda_graph, lambda line: None, trust=True
        )
        bench.check_batches(group, order.plan)
        names = {str(place): parcel.path for place, parcel in zip(places, order.parcels, strict=True)}
        ceilings = _ceilings(group, order.plan.device, order.plan.threads)
        return [_named(row, names) for row in bench.bench(group, order.plan, ceilings=ceilings)]


def _ceilings(group: Sequence[Contender], device: Device, threads: int | None) -> Ceilings | None:
    precisions = sorted({one.precision for one in group if one.spec and not one.eight_bits})
    if not precisions:
        return None
    try:
        return contenders.measured_ceilings(device, threads, precisions)
    except MissingPackageError:  # rows have no share of the bound then, as they have none without Ray
        return None


def _named(row: BenchResult, names: dict[str, str]) -> BenchResult:
    if row.artifact not in names:
        return row
    subject = row.subject.replace(str(row.artifact), names[str(row.artifact)])
    return msgspec.structs.replace(row, artifact=names[str(row.artifact)], subject=subject)
