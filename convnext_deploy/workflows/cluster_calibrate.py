"""Calibration on the nodes of a Ray cluster: pieces of the images go to workers that have the model each.

The batches are those that one process would form, with as many threads. What comes of the pieces is merged exactly, in
whichever order they come. So the statistics are the same, bit for bit, where the machines are.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

import torch

from .. import env
from ..cluster import connection, crew, delivery
from ..data.image_source import ImageSource
from ..models.convnext import ConvNeXt
from ..quantization.counting import Piece, Runner, Work, here, joined
from ..records.manifest import Preprocessing

PIECES = 4  # for each worker; each brings home two histograms of 64 kB for each tensor
COMPUTES = ("torch",)  # beside what reads images


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What each worker opens."""

    model: delivery.Shared
    names: tuple[str, ...]
    preprocessing: Preprocessing
    batch: int
    threads: int
    proof: delivery.Proof | None


@dataclass(frozen=True, slots=True)
class _Opened:
    seen: bool  # the images, as they are seen where the source was opened
    computing: str  # the machine's kind, and the versions that count


def runner(address: str, *, say: Callable[[str], None], only: Collection[str] | None = None) -> Runner:
    """Runs images on a cluster.

    Args:
        address: of `connection.checked`.
        only: as for `crew.Crew`.
    """

    def ran(work: Work, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        if not ranges:
            return
        with connection.connected(address, say):
            yield from _on_cluster(work, ranges, say, only)

    return ran


def _on_cluster(
    work: Work, ranges: Sequence[range], say: Callable[[str], None], only: Collection[str] | None
) -> Generator[Piece, None, None]:
    ours = torch.get_num_threads()
    cores = [node.cpus for node in connection.nodes() if node.cpus and (only is None or node.id in only)]
    threads = min(ours, *cores) if cores else ours
    order = _Order(
        model=delivery.shared(work.model),
        names=work.names,
        preprocessing=work.preprocessing,
        batch=work.batch,
        threads=threads,
        proof=delivery.proof_of(work.source),
    )
    told = delivery.told_who_is_blind(work.source, order.proof, say)
    kinds = {env.computing(COMPUTES)}

    def ready(node: connection.Node, opened: _Opened) -> None:
        told(node, opened.seen)
        kinds.add(opened.computing)

    workers: crew.Crew[range, _Opened, Piece] = crew.Crew(
        _opened, order, device="cpu", threads=threads, ready=ready, only=only, say=say
    )
    places = workers.places()
    say(crew.words(places))
    if threads < ours:
        say(f"a node has {threads} cores, so workers compute with as many threads; with {ours} last bits may differ")
    size = _size(sum(map(len, ranges)), len(places), work.batch)
    yield from delivery.results(workers, work.source, ranges, size)
    if len(kinds) > 1:
        say(
            f"computed by other kinds of machines than this one, whose last bits may differ: {'; '.join(sorted(kinds))}"
        )


def _size(images: int, workers: int, batch: int) -> int:
    """Images of a piece, whole batches."""
    return batch * max(1, images // (workers * PIECES * batch))


def _opened(order: _Order, cpus: int) -> tuple[_Opened, Callable[[tuple[int, ImageSource]], Piece]]:
    """In a worker: what is told of it, and what does a piece."""
    torch.set_num_threads(order.threads)  # of this process, which does nothing else
    model: ConvNeXt = order.model.value()
    run = here(cpus)

    def done(item: tuple[int, ImageSource]) -> Piece:
        first, images = item
        work = Work(
            model=model,
            names=order.names,
            source=images,
            preprocessing=order.preprocessing,
            batch=order.batch,
            first=first,
        )
        return joined(list(run(work, [range(len(images))])))

    seen = order.proof is not None and order.proof.holds()
    return _Opened(seen, env.computing(COMPUTES)), done
