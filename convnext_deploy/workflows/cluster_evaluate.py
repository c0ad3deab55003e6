"""`evaluate` on the nodes of a Ray cluster: pieces of the source go to workers that have a session each.

The batches are those that one process would form, so that the predictions are the same where the machines are.
"""

import importlib.metadata
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from .. import env, formats
from ..accuracy import inference
from ..accuracy.inference import Piece, Runner, Work
from ..accuracy.predictions import joined
from ..artifact.session import RunOptions
from ..cluster import connection, crew, delivery
from ..cluster.connection import Node
from ..data.image_source import ImageSource
from ..errors import DataError, counted
from ..formats.base import Format
from ..records.base import Goal

PIECES = 8  # for each worker, where a piece has neither fewer than `inference.CHUNK` images nor 4 times as many
LARGEST = 4  # what is sent of 1,024 photographs takes 100 MB, twice for each worker


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What each worker opens."""

    parcel: delivery.Parcel
    proof: delivery.Proof | None
    problem: Goal
    batch: int
    options: RunOptions


@dataclass(frozen=True, slots=True)
class _Opened:
    seen: bool  # the images, as they are seen where the source was opened


def runner(address: str, options: RunOptions, *, trust: bool, say: Callable[[str], None]) -> Runner:
    """Runs images on a cluster.

    An artifact that brings code runs on its nodes if it would be opened here: what they open has the same hash.

    Args:
        address: of `connection.checked`.
        trust: as for `formats.opened`.
    """

    def ran(work: Work, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        if not ranges:
            return
        formats.refuse_untrusted(formats.of(work.artifact), work.artifact, trust)
        say(f"connecting to the cluster {address}")
        with connection.connected(address):
            yield from _on_cluster(work, ranges, options, say)

    return ran


def _on_cluster(
    work: Work, ranges: Sequence[range], options: RunOptions, say: Callable[[str], None]
) -> Generator[Piece, None, None]:
    source = work.source
    blind: set[str] = set()

    def ready(node: Node, opened: _Opened) -> None:
        if not opened.seen and node.id not in blind:
            blind.add(node.id)
            if source.masks is not None:
                raise DataError(
                    f"node {node.address} does not see the images of {source.name}, and a segmenter's masks are not "
                    "sent; put both where every node has them under the same paths"
                )
            why = "its images are in memory here" if order.proof is None else f"it does not see {source.name}"
            say(f"node {node.address}: {why}, so they are sent")

    order = _Order(
        parcel=delivery.packed(work.artifact),
        proof=delivery.proof_of(source),
        problem=work.problem,
        batch=work.batch,
        options=options,
    )
    workers: crew.Crew[range, _Opened, Piece] = crew.Crew(
        _opened, order, device=options.device, threads=options.threads, ready=ready, say=say
    )
    places = workers.places()
    say(f"{counted(len(places), 'worker')} on {counted(len({place.node.id for place in places}), 'node')}")
    items = crew.pieces(ranges, _size(sum(map(len, ranges)), len(places), work.batch))

    def load(indices: range, opened: _Opened) -> tuple[int, ImageSource]:
        return indices.start, delivery.part(source, indices, opened.seen)

    for _, piece in workers.results(items, load):
        yield piece


def _size(images: int, workers: int, batch: int) -> int:
    """Images of a piece, whole batches."""
    wanted = min(max(images // (workers * PIECES), inference.CHUNK), LARGEST * inference.CHUNK)
    return batch * max(1, wanted // batch)


def _opened(order: _Order, cpus: int) -> tuple[_Opened, Callable[[tuple[int, ImageSource]], Piece]]:
    """In a worker: what is told of it, and what does a piece."""
    options = order.options
    if options.device == "cpu":
        options = RunOptions(device="cpu", threads=options.threads or cpus)
    with delivery.unpacked(order.parcel) as artifact:
        session = formats.opened(artifact, options, trust=True)  # who sent it has that hash and trusts it
    computes = _kind(formats.of(artifact))
    run = inference.here(session, cpus)

    def done(item: tuple[int, ImageSource]) -> Piece:
        start, images = item
        work = Work(artifact=artifact, source=images, problem=order.problem, batch=order.batch)
        found = list(run(work, [range(len(images))]))
        chunk = joined([piece.chunk for piece in found]).moved(start)
        turned = [start + index for piece in found for index in piece.turned]
        return Piece(chunk, turned, computes)

    return _Opened(order.proof is not None and order.proof.holds()), done


def _kind(fmt: Format) -> str:
    """The machine's kind, and the versions that its outputs may depend on."""
    facts = [str(env.machine()["cpu"]), *sorted(set(env.nvidia_gpus()))]
    for package in ("numpy", "pillow", *fmt.requires):
        try:
            facts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # its module has another name
            continue
    return ", ".join(facts)
