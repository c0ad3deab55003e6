"""Time: of artifacts by `bench` and `profile`, at least by `roofline`, on a page by `report`."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from .. import argument_names, arguments, env, formats
from ..arguments import Unpack
from ..artifact import manifest
from ..errors import MissingPackageError, UsageError
from ..records.base import STRIDE, NetworkTask, Precision, Task
from ..records.timing import BenchResult, ProfileResult, RooflineResult
from ..workflows.export import Say, silent
from .artifacts import OpeningOptions, opened, run_options
from .verbs import verb

if TYPE_CHECKING:
    from ..workflows.bench import Plan
    from ..workflows.contenders import Contender


@verb
def profile(
    path: arguments.Location,
    *,
    batch: int | None = None,
    steps: int = 20,
    progress: arguments.Progress | None = None,
    **options: Unpack[OpeningOptions],
) -> ProfileResult:
    """Where an artifact's time goes, by layer, from its runtime's own profiler; on bundled photographs.

    Args:
        path: the artifact's folder.
        batch: images at once; None: the size the artifact is tuned for.
        steps: inferences without and inferences with the profiler.
        progress: told (inferences done, inferences in all, what is being done).
    """
    batch = arguments.maybe(arguments.batch_size, "batch", batch)
    argument_names.check(steps=steps)
    arguments.progress(progress, arguments.OF_STEPS)
    run_as, trust = run_options(options)
    artifact = opened(path)
    from ..data import preprocess
    from ..timing.profile import profile as run

    facts = artifact.manifest
    session = formats.opened(artifact, run_as, trust)
    size = facts.export.batch.opt if batch is None else batch
    pixels = preprocess.probe_images(facts.model.in_chans, facts.model.image_size, size)
    return run(session, artifact, preprocess.as_input(pixels, facts.preprocessing, facts.export.input), steps, progress)


@verb
def roofline(
    variant: str,
    *,
    device: str = "this",
    precision: str = "fp32",
    batch: int = 1,
    image_size: arguments.ImageSize = 224,
    task: NetworkTask = "classify",
    threads: int | None = None,
    progress: arguments.Progress | None = None,
) -> RooflineResult:
    """The shortest time a device can take for a variant, and what bounds each of its operations.

    Args:
        variant: which ConvNeXt, such as base or v2-tiny.
        device: `a100`, `h100` or `h200` by its data sheet; `this` and `this-gpu` are measured now.
        precision: fp32, tf32, fp16, bf16 or int8.
        batch: images at once.
        image_size: one number or (height, width), in pixels.
        task: classify, embed or features.
        threads: of the measurement on this CPU.
        progress: told (steps done, steps in all, what is being measured).

    Raises:
        UsageError: an unknown variant or device, or a precision the device has no ceiling for.
    """
    variant = arguments.text("variant", variant, "a variant such as base or v2-tiny")
    precision = arguments.one_of("precision", precision, (*get_args(Precision), "int8"))
    batch = arguments.batch_size("batch", batch)
    size = arguments.image_size("image_size", image_size)
    arguments.one_of("task", task, NetworkTask)
    argument_names.check(threads=threads)
    arguments.progress(progress, arguments.OF_STEPS)
    from ..models import registry
    from ..timing import roofline as model

    arguments.one_of("device", device, (*model.MEASURED, *model.DATA_SHEETS))
    if min(size) < STRIDE:
        raise UsageError(f"image size {size[0]}x{size[1]} pixels; expected at least {STRIDE}")
    spec = registry.spec(registry.resolve(variant)[0], image_size=size, task=task)
    measured = device in model.MEASURED
    ceilings = (
        model.measure(model.MEASURED[device], threads, progress=progress) if measured else model.DATA_SHEETS[device]
    )
    rows = model.bound(spec, precision, batch, ceilings)
    ms = sum(row.ms for row in rows)
    return RooflineResult(
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=spec.architecture,
        task=task,
        image_size=size,
        precision=precision,
        batch=batch,
        ceilings=ceilings,
        rows=rows,
        gflop=sum(row.gflop for row in rows),
        mb=sum(row.mb for row in rows),
        ms=ms,
        images_per_s=batch / ms * 1e3,
        machine=env.machine() if measured else None,
        versions=env.versions(),
    )


@verb
def report(
    results: arguments.Location | Sequence[arguments.Location],
    *,
    out: arguments.Location,
    title: str = "ConvNeXt benchmarks",
) -> Path:
    """One self-contained HTML page (`out` ends in `.html`), or Markdown tables (`.md`), from recorded results.

    Args:
        results: a file of JSON Lines, or several.
        out: the page's file.
        title: the page's heading.

    Raises:
        UsageError: `out` ends otherwise, or is in no folder.
        DataError: a file cannot be read, or contains no result that a report shows.
    """
    files = arguments.paths("results", results, "a file of JSON Lines, or several")
    out = arguments.file("out", out)
    argument_names.check(title=title)
    from ..reports import html, markdown
    from ..reports import results as recorded

    if out.suffix not in (".html", ".md"):
        raise UsageError(f"--out {out}; expected a name that ends in .html, or in .md for Markdown tables")
    records = recorded.read(list(files))
    page = markdown.page(records, title) if out.suffix == ".md" else html.page(records, title)
    manifest.write_file(out, page.encode())
    return out


@verb
def bench(
    artifacts: arguments.Location | Sequence[arguments.Location] = (),
    plan: "Plan | None" = None,
    *,
    variants: str | Sequence[str] = (),
    compare: str | Sequence[str] = (),
    runtimes: str | Sequence[str] = (),
    precisions: Precision | Sequence[Precision] = ("fp32",),
    image_sizes: int | Sequence[arguments.ImageSize] = (),
    task: Task = "classify",
    cuda_graph: bool = False,
    trust: bool = False,
    ray: str | None = None,
    say: Say = silent,
    progress: arguments.Progress | None = None,
) -> Iterator[BenchResult]:
    """Measure artifacts, or ConvNeXts with random weights, beside other models; a row as soon as it is finished.

    Without artifacts, each of `variants` is built in each of `runtimes` and takes turns with what it is compared with.

    Args:
        artifacts: folders, or one of them.
        plan: what is measured of each; None: batches 1 and 8, two seconds each.
        variants: ConvNeXts; none: tiny, or with a family to compare with, its every size.
        compare: families ("swin", "deit", "resnet") or timm's names, in the same formats, precisions and sizes.
        runtimes: formats, "torch" or "torch.compile"; none: torch and the installed ones of onnx, openvino and native.
        precisions: types to build in, or one of them.
        image_sizes: in pixels, each one number or (height, width); none: 224, or what the artifacts have.
        task: of the variants: classify, embed, features, segment (whole UPerNets, beside those of
            transformers), or detect (whole Mask R-CNNs on either backbone).
        cuda_graph: of `artifacts`, on a GPU: replay a captured CUDA graph.
        trust: as for `load`, of `artifacts`.
        ray: measure `artifacts` on one node of each kind of a Ray cluster, as for `evaluate`; progress is not told.
        say: told what is being prepared, a line a step.
        progress: told (steps done, steps in all, what is being done).

    Raises:
        UsageError: anything that can be refused before the work.
    """
    folders = arguments.paths("artifacts", artifacts, "an artifact folder, or several")
    names = arguments.texts("variants", variants, "a variant such as base, or several")
    rivals = arguments.texts("compare", compare, "swin, deit, resnet or timm's names")
    where = arguments.texts("runtimes", runtimes, "a format, torch or torch.compile, or several")
    types = [
        arguments.one_of("precisions", word, Precision)
        for word in arguments.texts("precisions", precisions, "fp32 ...")
    ]
    sizes = arguments.image_sizes("image_sizes", image_sizes)
    arguments.one_of("task", task, Task)
    argument_names.check(cuda_graph=cuda_graph, ray=ray, say=say, trust=trust)
    arguments.progress(progress, arguments.OF_STEPS)
    from ..workflows.bench import Plan

    if plan is not None and not isinstance(plan, Plan):
        raise UsageError(
            f"plan {arguments.shown(plan)}; expected a convnext_deploy.workflows.bench.Plan, or to be left out"
        )
    plan = (plan or Plan()).checked()
    if folders and (names or where or sizes):
        raise UsageError("artifacts have their own variant, runtime and image size; give these only without them")

    if ray is not None:
        if not folders:
            raise UsageError(
                f"ray {arguments.shown(ray)} is for artifacts, which the nodes are given; export what is to be timed"
            )
        from ..cluster import connection
        from ..workflows import cluster_bench

        return cluster_bench.bench_on(
            connection.checked(ray), folders, rivals, plan, cuda_graph=cuda_graph, trust=trust, say=say
        )

    def groups() -> list[list["Contender"]]:
        from ..workflows import contenders

        if folders:
            return [contenders.of_artifacts(list(folders), rivals, plan.device, cuda_graph, say, trust)]
        sides = sizes or ((224, 224),)
        return contenders.of_variants(names, rivals, where, types, sides, task, plan.device, say)

    return _rows(groups, plan, say, progress)


def _rows(
    groups_of: Callable[[], "list[list[Contender]]"], plan: "Plan", say: Say, progress: arguments.Progress | None
) -> Iterator[BenchResult]:
    with env.missing_named():
        from ..workflows import contenders
        from ..workflows.bench import bench as run
        from ..workflows.bench import check_batches

        groups = groups_of()
        for group in groups:
            check_batches(group, plan)
        ceilings = None
        rated = [contender for group in groups for contender in group if contender.spec and not contender.eight_bits]
        if rated:
            say("measuring what this machine can do at most")
            try:
                ceilings = contenders.measured_ceilings(plan.device, plan.threads, sorted({c.precision for c in rated}))
            except MissingPackageError as error:
                say(f"rows have no share of the bound: {error}")
        for number, group in enumerate(groups):
            shifted = progress and _shifted(progress, number, len(groups))
            yield from run(group, plan, ceilings=ceilings, progress=shifted)


def _shifted(progress: arguments.Progress, number: int, parts: int) -> arguments.Progress:
    """Progress of one of several parts that are about as long as each other."""
    return lambda done, total, what: progress(number * total + done, parts * total, what)
