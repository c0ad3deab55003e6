"""The Python interface: one function a verb."""

import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import numpy as np

from . import arguments, env, formats
from .artifact import manifest
from .artifact.manifest import Artifact
from .artifact.session import RunOptions, Session
from .errors import UsageError
from .records.accuracy import EvalResult, Limits, Verdict
from .records.base import STRIDE, Device, Precision, Task
from .records.manifest import TensorRtSpec
from .records.timing import BenchResult, ProfileResult, RooflineResult, Timing
from .workflows.export import Say, export, silent

if TYPE_CHECKING:
    from .workflows.bench import Plan, Progress
    from .workflows.contenders import Contender
    from .workflows.quantize import half, quantize

__all__ = ["bench", "evaluate", "export", "gate", "half", "load", "profile", "quantize", "refit", "report", "roofline"]


def __getattr__(name: str) -> Any:  # quantizing needs torch, and opening an artifact need not wait for it
    if name in ("half", "quantize"):
        with env.missing_named():
            from .workflows import quantize

        return getattr(quantize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


LATENCY_S = 5.0  # of timing for each side of a gate


@env.missing_named()
def load(
    path: arguments.Location,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    cuda_graph: bool = False,
    trust: bool = False,
) -> Session:
    """Open an artifact, check every file of it, and make it ready to run.

    Args:
        cuda_graph: on a GPU: replay a captured CUDA graph. Not for every format.
        trust: run the code that an artifact brings although somebody else built it (see SECURITY.md).

    Raises:
        ArtifactError: naming the file that is missing, changed or unreadable, or code that is not trusted.
        MissingPackageError: the runtime is not installed.
    """
    artifact = _opened(path, device=device, threads=threads, cuda_graph=cuda_graph, trust=trust)
    return _load(artifact, RunOptions(device=device, threads=threads, cuda_graph=cuda_graph), trust)


def _opened(path: arguments.Location, **given: Any) -> Artifact:
    """The artifact, every file of it checked, after the arguments of a function that runs it."""
    arguments.check(**given)
    return manifest.verified(arguments.path("path", path, "an artifact folder"))


def _load(artifact: Artifact, options: RunOptions, trust: bool = False) -> Session:
    fmt = formats.of(artifact)
    if options.cuda_graph and not (fmt.cuda_graphs and options.device == "cuda"):
        raise UsageError(
            f"format {fmt.name} replays no CUDA graph on {options.device}; TensorRT's, eager and aotinductor do on cuda"
        )
    return formats.opened(artifact, options, trust)


@env.missing_named()
def refit(
    path: arguments.Location,
    weights: arguments.Location,
    *,
    out: arguments.Location,
    force: bool = False,
    say: Say = silent,
    trust: bool = False,
) -> Artifact:
    """A TensorRT engine with other weights of the same architecture, without building it again. Needs the GPU.

    Args:
        trust: as for `load`.

    Raises:
        UsageError: the artifact is no engine, or was not exported with `--refit refit` or `--refit strip`.
        CheckFailed: as `export`.
    """
    weights = arguments.weights("weights", weights)
    out = arguments.path("out", out)
    artifact = _opened(path, force=force, say=say, trust=trust)
    from .runtimes.tensorrt import build

    spec, model = artifact.manifest.export, artifact.manifest.model
    engine = build.refittable(artifact)
    formats.refuse_untrusted(formats.get(spec.format), artifact, trust)
    return export(
        weights,
        variant=model.architecture,
        format=spec.format,
        out=out,
        precision=spec.precision,
        input=spec.input,
        batch=spec.batch,
        image_size=model.image_size,
        dynamic_image_size=spec.dynamic_image_size,
        task=model.task,
        force=force,
        say=say,
        tensorrt=msgspec.structs.replace(spec.tensorrt or TensorRtSpec(), refit="refit"),  # it has weights now
        refit_from=engine,
    )


@env.missing_named()
def evaluate(
    path: arguments.Location,
    data: arguments.Location,
    *,
    split: str | None = None,
    batch: int | None = None,
    limit: int | None = None,
    labels: arguments.Location | None = None,
    out: arguments.Location | None = None,
    force: bool = False,
    device: Device = "cpu",
    threads: int | None = None,
    cuda_graph: bool = False,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
) -> EvalResult:
    """Accuracy of an artifact over labelled images; every prediction is kept when `out` is given.

    The labels must be the model's. Class names are looked up among the artifact's labels, in `labels`, or as WordNet
    ids; without any of these there must be as many classes as the model has outputs, and their order is assumed.

    Args:
        data: folder of class folders, tar, Parquet, or `hfds:NAME`.
        batch: images at once; None: the size the artifact is tuned for.
        limit: only so many images, evenly spaced over the source.
        labels: file of the model's class names in their order: a name a line, or JSON (`data.numbering.class_map`).
        out: path without suffix for `<out>.json` and `<out>.parquet`.
        force: replace what an earlier call wrote there.
        cuda_graph: on a GPU: replay a captured CUDA graph. Not for every format.
        trust: as for `load`.
        progress: told (images done, images in all).
        say: told what is assumed about the images, and where an interrupted call goes on.
    """
    data = arguments.images("data", data)
    labels = arguments.maybe(arguments.path, "labels", labels)
    out = arguments.maybe(arguments.path, "out", out)
    batch = arguments.maybe(arguments.whole, "batch", batch)
    given = {
        "split": split,
        "limit": limit,
        "device": device,
        "threads": threads,
        "cuda_graph": cuda_graph,
        "trust": trust,
    }
    artifact = _opened(path, progress=progress, say=say, force=force, **given)
    from .accuracy.evaluation import evaluate as run
    from .data import numbering, sources

    classes = numbering.class_map(labels) if labels is not None else None
    source = sources.open_source(data, split)
    session = _load(artifact, RunOptions(device=device, threads=threads, cuda_graph=cuda_graph), trust)
    return run(
        session,
        source,
        artifact=artifact,
        batch=artifact.manifest.export.batch.opt if batch is None else batch,
        out=out,
        limit=limit,
        classes=classes,
        force=force,
        progress=progress,
        say=say,
    )


@env.missing_named()
def gate(
    baseline: arguments.Location,
    candidate: arguments.Location,
    *,
    limits: Limits | Mapping[str, Any] | arguments.Location,
    data: arguments.Location | None = None,
    split: str | None = None,
    labels: arguments.Location | None = None,
    out: arguments.Location | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
) -> Verdict:
    """Hold a candidate against its baseline: on accuracy, and where the limits ask for it on latency and size.

    Args:
        baseline: `<out>.json` of an evaluation, with its predictions beside it; or an artifact folder.
        candidate: likewise.
        limits: `records.accuracy.Limits`, a dictionary of its fields, or a TOML file of them.
        data: what artifact folders are evaluated on, as for `evaluate`.
        labels: the model's class names, as for `evaluate`.
        out: folder that keeps their evaluations, `baseline` and `candidate`, which are not run twice.
        trust: as for `load`, of both.
        progress: told (images done, images in all) of one evaluation after the other.

    Raises:
        DataError: the two were not evaluated on the same images.
        UsageError: a side that does not exist, an artifact without `data`, `data` without an artifact, or a limit that
            needs artifacts.
    """
    paths = {
        name: arguments.path(name, given, "an artifact folder, or OUT.json of an evaluation")
        for name, given in (("baseline", baseline), ("candidate", candidate))
    }
    data = arguments.maybe(arguments.images, "data", data)
    labels = arguments.maybe(arguments.path, "labels", labels)
    out = arguments.maybe(arguments.path, "out", out)
    arguments.check(split=split, device=device, threads=threads, progress=progress, say=say, trust=trust)
    from .accuracy.evaluation import read_predictions, read_result
    from .accuracy.gate import Side, judge, refuse_unmeasured

    limits = _limits(limits)
    for name, path in paths.items():
        if not path.exists():
            raise UsageError(
                f"--{name} {path} does not exist; expected an artifact folder, or OUT.json of eval --out OUT"
            )
    artifacts = {name: manifest.verified(path) for name, path in paths.items() if path.is_dir()}
    refuse_unmeasured(limits, sizes=len(artifacts) == 2, timings=len(artifacts) == 2)
    if artifacts and data is None:
        name, artifact = next(iter(artifacts.items()))
        raise UsageError(f"--{name} {artifact.path} is an artifact; give --data, or a result of eval in its place")
    if labels is not None and not artifacts:
        raise UsageError(f"--labels {labels} is for artifacts, and both sides are results of eval; leave it out")
    if data is not None and not artifacts:
        raise UsageError(f"--data {data} is for artifacts, and both sides are results of eval; leave it out")

    sides = {}
    with tempfile.TemporaryDirectory(prefix="gate-") as temporary:
        for name, path in paths.items():
            if data is not None and name in artifacts:
                kept = Path(out or temporary) / name
                path = kept.with_name(f"{name}.json")
                if not _is_evaluated(path, artifacts[name], data, split, labels):
                    evaluate(
                        artifacts[name].path,
                        data,
                        split=split,
                        labels=labels,
                        out=kept,
                        device=device,
                        threads=threads,
                        trust=trust,
                        progress=progress,
                        say=say,
                    )
            result = read_result(path)
            if result.predictions is None:
                raise UsageError(f"{path} has no predictions beside it; evaluate again with --out")
            size = artifacts[name].bytes if name in artifacts else None
            sides[name] = Side(
                result=result, predictions=read_predictions(path.with_name(result.predictions)), bytes=size
            )
    if limits.max_latency_ratio is not None:
        timings = _timed_beside_each_other(artifacts, RunOptions(device=device, threads=threads), trust)
        sides = {name: replace(side, timing=timings[name]) for name, side in sides.items()}
    return judge(sides["baseline"], sides["candidate"], limits)


def _limits(given: Any) -> Limits:
    from .accuracy.gate import limits_from, limits_from_toml

    if isinstance(given, Limits):
        return limits_from(msgspec.structs.asdict(given))
    if isinstance(given, Mapping):
        return limits_from(given)
    file = arguments.path("limits", given, "a dictionary of limits, types.Limits, or a TOML file of them")
    try:
        return limits_from(limits_from_toml(file.read_text("utf-8"), str(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"limits {file} cannot be read: {error}") from None


def _is_evaluated(result: Path, artifact: Artifact, data: str, split: str | None, labels: Path | None) -> bool:
    """Whether an earlier call has finished this evaluation."""
    from .accuracy.evaluation import labelled, read_result
    from .data import numbering, sources

    if not result.exists():
        return False
    found = read_result(result)
    classes = numbering.class_map(Path(labels)) if labels is not None else None
    source = labelled(sources.open_source(data, split), artifact, classes)
    return (found.artifact_sha256, found.data_sha256) == (artifact.sha256, source.sha256)


def _timed_beside_each_other(artifacts: dict[str, Artifact], options: RunOptions, trust: bool) -> dict[str, Timing]:
    """Latency of each artifact on one batch of random pixels, of the size that the baseline is tuned for."""
    from .data import preprocess
    from .timing import measure

    batch = artifacts["baseline"].manifest.export.batch.opt
    sessions = {name: _load(artifact, options, trust) for name, artifact in artifacts.items()}
    images = {}
    for name, artifact in artifacts.items():
        model = artifact.manifest.model
        pixels = np.random.default_rng(0).integers(0, 256, (batch, model.in_chans, *model.image_size), np.uint8)
        images[name] = preprocess.as_input(pixels, artifact.manifest.preprocessing, artifact.manifest.export.input)
    return {timing.artifact: timing for timing in measure.interleaved(sessions, images, LATENCY_S)}


@env.missing_named()
def profile(
    path: arguments.Location,
    *,
    batch: int | None = None,
    steps: int = 20,
    device: Device = "cpu",
    threads: int | None = None,
    trust: bool = False,
) -> ProfileResult:
    """Where an artifact's time goes, by layer, from its runtime's own profiler; on bundled photographs.

    Args:
        batch: images at once; None: the size the artifact is tuned for.
        steps: inferences without and inferences with the profiler.
        trust: as for `load`.
    """
    batch = arguments.maybe(arguments.whole, "batch", batch)
    artifact = _opened(path, steps=steps, device=device, threads=threads, trust=trust)
    from .data import preprocess
    from .timing.profile import profile as run

    found = artifact.manifest
    session = _load(artifact, RunOptions(device=device, threads=threads), trust)
    size = found.export.batch.opt if batch is None else batch
    pixels = preprocess.probe_images(found.model.in_chans, found.model.image_size, size)
    return run(session, artifact, preprocess.as_input(pixels, found.preprocessing, found.export.input), steps)


@env.missing_named()
def roofline(
    variant: str,
    *,
    device: str = "this",
    precision: str = "fp32",
    batch: int = 1,
    image_size: arguments.ImageSize = 224,
    task: Task = "classify",
    threads: int | None = None,
    progress: "Progress | None" = None,
) -> RooflineResult:
    """The shortest time a device can take for a variant, and what bounds each of its operations.

    Args:
        device: `a100`, `h100` or `h200` by its data sheet; `this` and `this-gpu` are measured now.
        threads: of the measurement on this CPU.
        progress: told (steps done, steps in all, what is being measured).

    Raises:
        UsageError: an unknown variant or device, or a precision the device has no ceiling for.
    """
    variant = arguments.text("variant", variant, "a variant such as base or v2-tiny")
    precision = arguments.one_of("precision", precision, (*get_args(Precision), "int8"))
    batch = arguments.whole("batch", batch)
    size = arguments.image_size("image_size", image_size)
    arguments.check(task=task, threads=threads, progress=progress)
    from .models import registry
    from .timing import roofline as model

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


@env.missing_named()
def report(
    results: arguments.Location | Sequence[arguments.Location],
    *,
    out: arguments.Location,
    title: str = "ConvNeXt benchmarks",
) -> Path:
    """One self-contained HTML page (`out` ends in `.html`), or Markdown tables (`.md`), from recorded results.

    Args:
        results: a file of JSON Lines, or several.

    Raises:
        UsageError: `out` ends otherwise, or lies in no folder.
        DataError: a file cannot be read, or holds no result that a report shows.
    """
    files = arguments.paths("results", results, "a file of JSON Lines, or several")
    out = arguments.path("out", out)
    arguments.check(title=title)
    from .reports import html, markdown
    from .reports import results as recorded

    if out.suffix not in (".html", ".md"):
        raise UsageError(f"--out {out}; expected a name that ends in .html, or in .md for Markdown tables")
    found = recorded.read(list(files))
    page = markdown.page(found, title) if out.suffix == ".md" else html.page(found, title)
    manifest.write_file(out, page.encode())
    return out


@env.missing_named()
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
    say: Say = silent,
    progress: "Progress | None" = None,
) -> Iterator[BenchResult]:
    """Measure artifacts, or ConvNeXts with random weights, beside other models; a row as soon as it is finished.

    Without artifacts, each of `variants` is built in each of `runtimes` and takes turns with what it is compared with.

    Args:
        artifacts: folders, or one of them.
        plan: what is measured of each; None: batches 1 and 8, two seconds each.
        variants: ConvNeXts; none: tiny, or with a family to compare with, its every size.
        compare: families ("swin", "deit", "resnet") or timm's names, in the same formats, precisions and sizes.
        runtimes: formats, "torch" or "torch.compile"; none: torch and the installed ones of onnx, openvino and native.
        image_sizes: in pixels, each one number or (height, width); none: 224, or what the artifacts have.
        trust: as for `load`, of `artifacts`.
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
    arguments.check(task=task, cuda_graph=cuda_graph, say=say, progress=progress, trust=trust)
    from .workflows.bench import Plan

    if plan is not None and not isinstance(plan, Plan):
        raise UsageError(
            f"plan {arguments.shown(plan)}; expected a convnext_deploy.workflows.bench.Plan, or to be left out"
        )
    plan = (plan or Plan()).checked()
    if folders and (names or where or sizes):
        raise UsageError("artifacts have their own variant, runtime and image size; give these only without them")

    def groups() -> list[list["Contender"]]:
        from .workflows import contenders

        if folders:
            return [contenders.of_artifacts(list(folders), rivals, plan.device, cuda_graph, say, trust)]
        chosen = sizes or ((224, 224),)
        return contenders.of_variants(names, rivals, where, types, chosen, task, plan.device, say)

    return _rows(groups, plan, say, progress)


def _rows(
    groups_of: Callable[[], "list[list[Contender]]"], plan: "Plan", say: Say, progress: "Progress | None"
) -> Iterator[BenchResult]:
    with env.missing_named():
        from .workflows import contenders
        from .workflows.bench import bench as run

        groups = groups_of()
        ceilings = None
        rated = [contender for group in groups for contender in group if contender.spec and not contender.eight_bits]
        if rated:
            say("measuring what this machine can do at most")
            ceilings = contenders.measured_ceilings(plan.device, plan.threads, sorted({c.precision for c in rated}))
        for number, group in enumerate(groups):
            shifted = progress and _shifted(progress, number, len(groups))
            yield from run(group, plan, ceilings=ceilings, progress=shifted)


def _shifted(progress: "Progress", number: int, parts: int) -> "Progress":
    """Progress of one of several parts that are about as long as each other."""
    return lambda done, total, what: progress(number * total + done, parts * total, what)
