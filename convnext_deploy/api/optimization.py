"""The whole way in one call: from a checkpoint and labelled images to the fastest artifact that is proven here."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import argument_names, arguments
from ..arguments import Unpack
from ..artifact import manifest
from ..errors import UsageError
from ..models.source import CheckpointOptions, Source
from ..records.base import Device, InputKind
from ..records.optimize import Objective, OptimizeResult
from ..workflows.export import Say, silent
from .images import Images, LabelOptions, images, labelled
from .verbs import part, verb

if TYPE_CHECKING:
    from ..workflows.agenda import View


def unwatched(_: "View") -> None:
    """Default for `watch`."""


class OptimizeOptions(CheckpointOptions, LabelOptions, total=False):
    """What is said about the checkpoint, and how the labels of `data` are read."""


@verb
def optimize(
    weights: arguments.Weights = None,
    *,
    data: Images,
    out: arguments.Location,
    max_drop: float = 0.5,
    maximize: Objective = "latency",
    max_latency_ms: float | None = None,
    batch: int | None = None,
    calibration: Images | None = None,
    runtimes: str | Sequence[str] = (),
    alpha: float = 0.05,
    input: InputKind = "float32",
    device: Device = "cpu",
    threads: int | None = None,
    force: bool = False,
    ray: str | None = None,
    node_kind: str | None = None,
    say: Say = silent,
    watch: "Callable[[View], None]" = unwatched,
    command: Sequence[str] = (),
    **options: Unpack[OptimizeOptions],
) -> OptimizeResult:
    """The fastest artifact on this machine whose accuracy is proven to stay within a budget, written to `out`.

    Every runtime and type that runs here is a candidate; one that cannot be built, is wrong or too slow is a row of the
    result with its reason. `<out>.optimize/` keeps the result, a page about it, and the work of an interrupted call,
    which the same call goes on with.

    Args:
        weights: as for `export`.
        data: labelled images, as for `evaluate`: an eighth to calibrate on, an eighth to select on, the rest to judge.
        out: the chosen artifact's folder.
        max_drop: percentage points of top-1 that may be lost.
        maximize: "latency" seeks the shortest time of a batch, "throughput" the most images a second.
        max_latency_ms: the one that loses least among those that take so long at most, in place of the fastest.
        batch: the batch whose time counts; None: 1, and 32 with `maximize="throughput"`.
        calibration: other images to calibrate on, labels not needed; so that `data` is for judging alone.
        runtimes: formats to choose among; none: all that are installed and made for the device.
        alpha: chance of choosing one that loses more than `max_drop`, over all that are tried.
        input: of the artifact, as for `export`.
        device: where it is to run.
        threads: of the runtime; None: its own default.
        force: replace an artifact that exists.
        ray: build, time and judge on nodes of a Ray cluster, as `evaluate`; the artifact is the fastest there.
        node_kind: which nodes: a part of what `bench` says of them, such as the processor's name; None: there is one
            kind only. Times of different kinds are never compared.
        say: told what is decided, a line a step.
        watch: told the whole table and the time that is left, whenever something changes.
        command: the words that repeat this call, for the page.

    Raises:
        UsageError: what can be refused before the work.
        CheckFailed: nothing could be built, or nothing keeps `max_latency_ms`; the result says why.
    """
    source = Source.of(weights, **part(options, CheckpointOptions))
    judged_on = labelled(data, part(options, LabelOptions))
    out = arguments.path("out", out)
    order = options.get("class_order", "torchvision")
    calibration = None if calibration is None else images("calibration", calibration, order)
    names = arguments.texts("runtimes", runtimes, "a format, or several")
    maximize = arguments.one_of("maximize", maximize, Objective)
    if max_latency_ms is not None:
        expected = "milliseconds above 0"
        max_latency_ms = arguments.number("max_latency_ms", max_latency_ms, 0, 1e9, expected)
        if maximize == "throughput":
            raise UsageError("max_latency_ms is for the latency of a batch; leave it out with --maximize throughput")
    size = arguments.maybe(arguments.batch_size, "batch", batch)
    argument_names.check(
        input=input, alpha=alpha, device=device, threads=threads, force=force, ray=ray, say=say, watch=watch
    )
    node_kind = arguments.maybe(arguments.text, "node_kind", node_kind)
    if node_kind is not None and ray is None:
        raise UsageError(f"node_kind {arguments.shown(node_kind)}; it is for nodes of a cluster, give --ray too")
    words = arguments.texts("command", command, "the words of a command")
    drop = arguments.number("max_drop", max_drop, 0, 100, "percentage points above 0 and at most 100")
    manifest.check_target(out, force)  # before the framework is imported
    from ..workflows import optimize as workflow
    from ..workflows.candidates import Goal

    return workflow.optimize(
        source,
        Goal(
            images=judged_on,
            calibration=calibration,
            max_drop=drop,
            alpha=alpha,
            objective=maximize,
            batch=size or (32 if maximize == "throughput" else 1),
            max_latency_ms=max_latency_ms,
            runtimes=names,
            input=input,
            device=device,
            threads=threads,
        ),
        out=out,
        say=say,
        watch=watch,
        ray=ray,
        node_kind=node_kind,
        command=words or None,
    )
