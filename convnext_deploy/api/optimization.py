"""The whole way in one call: from a checkpoint and labelled images to the fastest artifact that is proven here."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import arguments, env
from ..errors import UsageError
from ..models.source import Source
from ..records.base import Device, InputKind
from ..records.manifest import HeadActivation
from ..records.optimize import Objective, OptimizeResult
from ..workflows.export import Say, silent
from .images import ClassOrder, Images, images

if TYPE_CHECKING:
    from ..workflows.agenda import View


def unwatched(_: "View") -> None:
    """Default for `watch`."""


@env.missing_named()
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
    split: str | None = None,
    labels: arguments.Location | None = None,
    annotations: arguments.Location | None = None,
    class_order: ClassOrder = "torchvision",
    runtimes: str | Sequence[str] = (),
    alpha: float = 0.05,
    variant: str | None = None,
    input: InputKind = "float32",
    image_size: arguments.ImageSize | None = None,
    head_activation: HeadActivation | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    config: arguments.Location | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    force: bool = False,
    say: Say = silent,
    watch: "Callable[[View], None]" = unwatched,
    command: Sequence[str] = (),
) -> OptimizeResult:
    """The fastest artifact on this machine whose accuracy is proven to stay within a budget, written to `out`.

    Every runtime and type that runs here is a candidate; one that cannot be built, is wrong or too slow is a row of the
    result with its reason. `<out>.optimize/` keeps the result, a page about it, and the work of an interrupted call,
    which the same call goes on with.

    The checkpoint is given as for `export`: weights, variant, input, image_size, head_activation, preprocessing,
    weights_key, config.

    Args:
        data: labelled images, as for `evaluate`: an eighth to calibrate on, an eighth to select on, the rest to judge.
        max_drop: percentage points of top-1 that may be lost.
        maximize: "latency" seeks the shortest time of a batch, "throughput" the most images a second.
        max_latency_ms: the one that loses least among those that take so long at most, in place of the fastest.
        batch: the batch whose time counts; None: 1, and 32 with `maximize="throughput"`.
        calibration: other images to calibrate on, labels not needed; so that `data` is for judging alone.
        labels, annotations, class_order: of `data`, as for `evaluate`.
        runtimes: formats to choose among; none: all that are installed and made for the device.
        alpha: chance of choosing one that loses more than `max_drop`, over all that are tried.
        say: told what is decided, a line a step.
        watch: told the whole table and the time that is left, whenever something changes.
        command: the words that repeat this call, for the page.

    Raises:
        UsageError: what can be refused before the work.
        CheckFailed: nothing could be built, or nothing keeps `max_latency_ms`; the result says why.
    """
    source = Source.of(
        weights,
        variant=variant,
        image_size=image_size,
        weights_key=weights_key,
        preprocessing=preprocessing,
        head_activation=head_activation,
        config=config,
    )
    data = images("data", data, class_order)
    out = arguments.path("out", out)
    calibration = None if calibration is None else images("calibration", calibration, class_order)
    labels = arguments.maybe(arguments.path, "labels", labels)
    annotations = arguments.maybe(arguments.images, "annotations", annotations)
    names = arguments.texts("runtimes", runtimes, "a format, or several")
    maximize = arguments.one_of("maximize", maximize, Objective)
    if max_latency_ms is not None:
        expected = "milliseconds above 0"
        max_latency_ms = arguments.number("max_latency_ms", max_latency_ms, 0, 1e9, expected)
        if maximize == "throughput":
            raise UsageError("max_latency_ms is for the latency of a batch; leave it out with --maximize throughput")
    size = arguments.maybe(arguments.whole, "batch", batch)
    arguments.check(
        split=split, input=input, alpha=alpha, device=device, threads=threads, force=force, say=say, watch=watch,
        class_order=class_order,
    )  # fmt: skip
    words = arguments.texts("command", command, "the words of a command")
    drop = arguments.number("max_drop", max_drop, 0, 100, "percentage points above 0 and at most 100")
    from ..workflows import optimize as workflow
    from ..workflows.candidates import Goal
    from ..workflows.evaluate import Images

    return workflow.optimize(
        source,
        Goal(
            images=Images(data=data, split=split, labels=labels, annotations=annotations, class_order=class_order),
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
        force=force,
        say=say,
        watch=watch,
        command=words or None,
    )
