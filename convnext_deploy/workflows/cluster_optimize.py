"""`optimize` on nodes of one kind of a Ray cluster: candidates are built on all of them, and timed on one of them.

The race, its folder and its decisions stay where the command was given, so that it goes on as without a cluster. A
timing is of one node that is taken whole, and all nodes have the same processor, cores, GPUs and versions.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from .. import formats
from ..accuracy import canary
from ..accuracy.inference import Runner
from ..arguments import Progress
from ..artifact import manifest
from ..artifact.manifest import MANIFEST_NAME, Artifact
from ..artifact.session import RunOptions, Session
from ..cluster import connection, crew, delivery
from ..cluster import nodes as whole_nodes
from ..cluster.connection import Node
from ..errors import CheckFailed, UsageError, WorkerError, counted
from ..models.mm_config import bases_of
from ..models.source import Source
from ..quantization import counting
from ..records.base import Device, InputKind
from ..records.manifest import BatchRange
from ..records.optimize import Candidate
from ..records.timing import BenchResult
from ..timing.worker import Worker
from . import bench, build, cluster_calibrate, cluster_evaluate, workshop
from .candidates import Goal, Machine, machine_here
from .cluster_bench import kinds, machine_of
from .workshop import Job

Say = Callable[[str], None]
Files = dict[str, bytes]  # of an artifact, by their names


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a cluster that work: all of one kind."""

    address: str
    kind: str
    ids: frozenset[str]
    machine: Machine


def refuse_bases(source: Source) -> None:
    """A configuration goes to the nodes as one file, so that the files that it begins in would be missing there.

    Raises:
        UsageError: it begins in others.
        WeightsError: it cannot be read.
    """
    if source.config is None or source.config.suffix != ".py":
        return
    bases = bases_of(source.config)
    if bases:
        raise UsageError(
            f"--config {source.config} begins in {', '.join(bases)}, and nodes are sent one file; write it out with "
            "mmengine's Config.fromfile(FILE).dump('whole.py'), and give that"
        )


@contextmanager
def nodes_of(ray: str, kind: str | None, goal: Goal, say: Say) -> Iterator[Nodes]:
    """The nodes of a kind, connected.

    Args:
        ray: where the cluster is, as the user writes it.
        kind: a part of its name, which is its processor, cores and GPUs; None: the only one.

    Raises:
        UsageError: there is no cluster, or not one such kind, or nothing that runs there.
    """
    for name in goal.runtimes:
        formats.get(name)
    address = connection.checked(ray)
    with connection.connected(address, say):
        question = functools.partial(_described, goal.runtimes, goal.device)
        answers = whole_nodes.asked(whole_nodes.usable(goal.device), question)
        words, group = of_kind(kinds([(node, facts) for node, (facts, _) in answers]), kind)
        machines = {node.id: machine for node, (_, machine) in answers}
        first, machine = _first(group, machines)
        alike = [node for node in group if _same(machines[node.id], machine)]
        say(f"{counted(len(alike), 'node')} of the kind {words}")
        for node in group:
            if node not in alike:
                answer = machines[node.id]
                other = f"it has other versions or runtimes than {first.address}"
                say(f"node {node.address} takes no part: {answer if isinstance(answer, str) else other}")
        yield Nodes(address=address, kind=words, ids=frozenset(node.id for node in alike), machine=machine)


def of_kind(groups: dict[str, list[Node]], kind: str | None) -> tuple[str, list[Node]]:
    """The kind that is meant, and its nodes.

    Raises:
        UsageError: there is none, or several.
    """
    matches = [words for words in groups if kind is None or kind.lower() in words.lower()]
    if len(matches) == 1 or kind in groups:
        words = kind if kind in groups else matches[0]
        return words, groups[words]
    listing = "; ".join(matches or groups)
    if not matches:
        raise UsageError(f"no node of the cluster is of the kind {kind!r}; it has {listing}")
    asked = "" if kind is None else f" {kind!r}"
    raise UsageError(f"the cluster has several kinds of nodes{asked}: {listing}; name one with --node-kind")


def _first(group: Sequence[Node], machines: Mapping[str, Machine | str]) -> tuple[Node, Machine]:
    """The first node of a kind on which anything runs.

    Raises:
        UsageError: there is none; why nothing runs on the first of them.
    """
    for node in group:
        machine = machines[node.id]
        if isinstance(machine, Machine):
            return node, machine
    raise UsageError(f"node {group[0].address}: {machines[group[0].id]}")


def _described(runtimes: Sequence[str], device: Device, _: None) -> tuple[dict[str, Any], Machine | str]:
    """On a node: what it is, and what candidates have to know of it, or why none runs there."""
    try:
        return machine_of(None), machine_here(runtimes, device)
    except UsageError as error:
        return machine_of(None), str(error)


def _same(one: Machine | str, other: Machine) -> bool:
    return isinstance(one, Machine) and (one.versions, one.runtimes) == (other.versions, other.runtimes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What a node needs to build candidates."""

    source: Source
    weights: delivery.Copy | None  # None: the source names what every node finds itself
    config: delivery.Copy | None
    weights_sha256: str
    input: InputKind
    batch: BatchRange
    device: Device
    threads: int | None
    machine: Machine


@dataclass(frozen=True, slots=True)
class _Timing:
    """What one node is to time."""

    rows: tuple[Candidate, ...]
    parcels: tuple[delivery.Parcel, ...]
    plan: bench.Plan


@dataclass(kw_only=True)
class Workshop(workshop.Workshop):
    """Nodes of a cluster in the place of this machine. What they build comes to `folder`."""

    nodes: Nodes
    weights_sha256: str
    say: Say

    def builds(
        self, jobs: Sequence[Job], begin: Callable[[str, int], None]
    ) -> Iterator[tuple[Candidate, Artifact | str]]:
        if not jobs:
            return
        builders: crew.Crew[Job, str, Files | str] = crew.Crew(
            _builder, self._order(), device=self.device, threads=None, only=self.nodes.ids, say=self.say
        )
        places = builders.places()[: len(jobs)]
        left = len(jobs)

        def load(job: Job, _: str) -> tuple[Candidate, Files]:
            row, plan = job
            beside = [] if plan is None else [plan, plan.with_suffix(".safetensors")]
            return row, {path.name: path.read_bytes() for path in beside if path.is_file()}

        def tell() -> None:
            begin(f"building {counted(left, 'candidate')} on {counted(len(places), 'node')}", left)

        tell()
        for (row, _), outcome in builders.results(jobs, load):
            left -= 1
            yield row, outcome if isinstance(outcome, str) else self._home(row, outcome)
            if left:
                tell()

    def _order(self) -> _Bench:
        path = None if self.source.weights is None else Path(self.source.weights).expanduser()
        return _Bench(
            source=self.source,
            weights=delivery.copied(path) if path is not None and path.exists() else None,
            config=None if self.source.config is None else delivery.copied(self.source.config),
            weights_sha256=self.weights_sha256,
            input=self.input,
            batch=self.batch,
            device=self.device,
            threads=self.threads,
            machine=self.machine,
        )

    def _home(self, row: Candidate, files: Files) -> Artifact:
        path = self.path(row)
        with manifest.staged(path) as folder:
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        artifact = manifest.verified(path)
        build.remember(formats.get(row.runtime), path, MANIFEST_NAME, self.say)
        return artifact

    def timings(self, rows: Sequence[Candidate], plan: bench.Plan, progress: Progress) -> Iterator[BenchResult]:
        parcels = tuple(delivery.packed(manifest.verified(self.path(row))) for row in rows)
        order = _Timing(tuple(rows), parcels, plan)
        failures: list[str] = []
        for node in [node for node in connection.nodes() if node.id in self.nodes.ids]:
            progress(0, len(rows), f"timing {counted(len(rows), 'candidate')} on node {node.address}")
            ((_, answer),) = whole_nodes.each([node], timed, order, self.device, self.say)
            if not isinstance(answer, str):
                yield from answer
                return
            failures.append(f"node {node.address}: {answer}")
            self.say(failures[-1])
        raise WorkerError(
            f"no node of the kind {self.nodes.kind} times candidates: {'; '.join(failures) or 'all died'}"
        )

    def opened(self, artifact: Artifact) -> Session | Runner:
        options = RunOptions(device=self.device, threads=self.threads)
        return cluster_evaluate.runner(self.nodes.address, options, trust=True, say=self.say, only=self.nodes.ids)

    def calibrates(self) -> counting.Runner | None:
        return cluster_calibrate.runner(self.nodes.address, say=self.say, only=self.nodes.ids)


def _builder(order: _Bench, cpus: int) -> tuple[str, Callable[[tuple[Candidate, Files]], Files | str]]:
    """In a worker: what builds a candidate, and returns its files or why there are none."""
    shop = workshop.Workshop(
        folder=Path(), source=order.source, input=order.input, batch=order.batch, device=order.device,
        threads=order.threads, machine=order.machine,
    )  # fmt: skip

    def work(item: tuple[Candidate, Files]) -> Files | str:
        row, beside = item
        with tempfile.TemporaryDirectory(prefix="convnext-deploy-") as name:
            folder = Path(name)
            shop.folder, shop.source = folder / "built", _source(order, folder)
            shop.folder.mkdir()
            for file, content in beside.items():
                (folder / file).write_bytes(content)
            plan = next((folder / file for file in beside if file.endswith(".json")), None)
            ((_, outcome),) = shop.builds([(row, plan)], lambda doing, units: None)
            if isinstance(outcome, str):
                return outcome.replace(name, "")
            if outcome.manifest.weights.tensors_sha256 != order.weights_sha256:
                # No answer about the candidate, which would be kept as its reason for ever: it ends the call.
                raise UsageError(
                    f"{order.source.weights} has other weights on a node; put the same checkpoint on every node"
                )
            names = [MANIFEST_NAME, *(file.path for file in outcome.manifest.files)]
            return {file: (outcome.path / file).read_bytes() for file in names}

    return "ready", work


def _source(order: _Bench, folder: Path) -> Source:
    """The checkpoint as this node finds it."""
    source = order.source
    if order.weights is not None:
        source = replace(source, weights=str(delivery.placed(order.weights, folder)))
    if order.config is not None:
        source = replace(source, config=delivery.placed(order.config, folder))
    return source


def timed(order: _Timing) -> list[BenchResult]:
    """On a node: the rows of all candidates, with their paths where the command was given."""
    with ExitStack() as stack:
        places = [stack.enter_context(delivery.unpacked(parcel)).path for parcel in order.parcels]
        here = {row.name: place for row, place in zip(order.rows, places, strict=True)}
        homes = {str(place): parcel.path for place, parcel in zip(places, order.parcels, strict=True)}
        entries = workshop.entries(order.rows, here, order.plan.device)
        results = bench.bench(entries, order.plan)
        return [msgspec.structs.replace(row, artifact=homes.get(str(row.artifact), row.artifact)) for row in results]


def verified_here(path: Path, goal: Goal) -> str:
    """In words: whether the artifact that was chosen computes the right thing on this machine too.

    Raises:
        CheckFailed: it runs here, and its outputs are wrong.
    """
    worker = Worker(str(path), ("convnext_deploy.accuracy.canary",))
    try:
        answer: dict[str, Any] = worker.call(
            "call", function=f"{__name__}:compared", arguments={"path": str(path), "device": goal.device}
        )
    except WorkerError as error:
        return f"not verified on this machine, where it does not run: {workshop.reason_of(error, str(path))}"
    finally:
        worker.close()
    if answer["failures"]:
        raise CheckFailed(f"{path} is wrong on this machine: {'; '.join(answer['failures'])}; it was right on its node")
    return str(answer["words"])


def compared(path: str, device: Device) -> dict[str, Any]:
    """In a worker here: what the artifact's own outputs say."""
    artifact = manifest.verified(Path(path))
    with formats.opened(artifact, RunOptions(device=device), True) as session:
        comparison = canary.compared(session, artifact.manifest, artifact.path)
    if isinstance(comparison, str):
        return {"failures": [], "words": f"opened on this machine; not compared: {comparison}"}
    return {"failures": list(comparison.failures), "words": "verified on this machine too"}
