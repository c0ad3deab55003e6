"""`evaluate` on the nodes of a Ray cluster: pieces of the source go to workers that have a session each.

The batches are those that one process would form, so that the predictions are the same where the machines are.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

from .. import env, formats
from ..accuracy import inference
from ..accuracy.inference import Piece, Runner, Work
from ..accuracy.predictions import joined
from ..artifact.session import RunOptions
from ..cluster import connection, crew, delivery
from ..data.image_source import ImageSource
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


def runner(
    address: str,
    options: RunOptions,
    *,
    trust: bool,
    say: Callable[[str], None],
    only: Collection[str] | None = None,
) -> Runner:
    """Runs images on a cluster.

    An artifact that brings code runs on its nodes if it would be opened here: what they open has the same hash.

    Args:
        address: of `connection.checked`.
        trust: as for `formats.opened`.
        only: as for `crew.Crew`.
    """

    def ran(work: Work, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        if not ranges:
            return
        formats.refuse_untrusted(formats.of(work.artifact), work.artifact, trust)
        with connection.connected(address, say):
            yield from _on_cluster(work, ranges, options, say, only)

    return ran


def _on_cluster(
    work: Work,
    ranges: Sequence[range],
    options: RunOptions,
    say: Callable[[str], None],
    only: Collection[str] | None,
) -> Generator[Piece, None, None]:
    source = work.source
    order = _Order(
        parcel=delivery.packed(work.artifact),
        proof=delivery.proof_of(source),
        problem=work.problem,
        batch=work.batch,
        options=options,
    )
    told = delivery.told_who_is_blind(source, order.proof, say)
    workers: crew.Crew[range, _Opened, Piece] = crew.Crew(
        _opened,
        order,
        device=options.device,
        threads=options.threads,
        ready=lambda node, opened: told(node, opened.seen),
        only=only,
        say=say,
    )
    places = workers.places()
    say(crew.words(places))
    size = _size(sum(map(len, ranges)), len(places), work.batch)
    yield from delivery.results(workers, source, ranges, size)


def _size(images: int, workers: int, batch: int) -> int:
    """Images of a piece, whole batches."""
    size = min(max(images // (workers * PIECES), inference.CHUNK), LARGEST * inference.CHUNK)
    return batch * max(1, size // batch)


def _opened(order: _Order, cpus: int) -> tuple[_Opened, Callable[[tuple[int, ImageSource]], Piece]]:
    """In a worker: what is told of it, and what does a piece."""
    options = order.options
    if options.device == "cpu":
        options = RunOptions(device="cpu", threads=options.threads or cpus)
    with delivery.unpacked(order.parcel) as artifact:
        session = formats.opened(artifact, options, trust=True)  # who sent it has that hash and trusts it
    computes = env.computing(formats.of(artifact).requires)
    run = inference.here(session, cpus)

    def done(item: tuple[int, ImageSource]) -> Piece:
        start, images = item
        work = Work(artifact=artifact, source=images, problem=order.problem, batch=order.batch)
        pieces = list(run(work, [range(len(images))]))
        chunk = joined([piece.chunk for piece in pieces]).moved(start)
        turned = [start + index for piece in pieces for index in piece.turned]
        return Piece(chunk, turned, computes)

    return _Opened(order.proof is not None and order.proof.holds()), done
