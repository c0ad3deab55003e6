"""The Python interface: one function a verb."""

import datetime
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from . import env, formats, manifest
from .errors import UsageError
from .export import Say, export, silent
from .manifest import Artifact
from .session import RunOptions, Session
from .types import (
    STRIDE,
    BenchResult,
    Device,
    EvalResult,
    Limits,
    Precision,
    ProfileResult,
    RooflineResult,
    Task,
    TensorRtSpec,
    Timing,
    Verdict,
)

if TYPE_CHECKING:
    from .bench import Plan, Progress
    from .quantizing import half, quantize

__all__ = ["bench", "evaluate", "export", "gate", "half", "load", "profile", "quantize", "refit", "report", "roofline"]


def __getattr__(name: str) -> Any:  # quantizing needs torch, and opening an artifact need not wait for it
    if name in ("half", "quantize"):
        from . import quantizing

        return getattr(quantizing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


LATENCY_S = 5.0  # of timing for each side of a gate


def load(
    path: str | Path,
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
    options = RunOptions(device=device, threads=threads, cuda_graph=cuda_graph)
    return _load(manifest.verified(Path(path)), options, trust)


def _load(artifact: Artifact, options: RunOptions, trust: bool = False) -> Session:
    fmt = formats.of(artifact)
    if options.cuda_graph and not (fmt.cuda_graphs and options.device == "cuda"):
        raise UsageError(
            f"format {fmt.name} replays no CUDA graph on {options.device}; TensorRT's, eager and aotinductor do on cuda"
        )
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"threads {options.threads}; expected at least 1")
    return formats.opened(artifact, options, trust)


def refit(
    path: str | Path, weights: str, *, out: str | Path, force: bool = False, say: Say = silent, trust: bool = False
) -> Artifact:
    """A TensorRT engine with other weights of the same architecture, without building it again. Needs the GPU.

    Args:
        trust: as for `load`.

    Raises:
        UsageError: the artifact is no engine, or was not exported with `--refit refit` or `--refit strip`.
        CheckFailed: as `export`.
    """
    from .lower import nvinfer

    artifact = manifest.verified(Path(path))
    spec, model = artifact.manifest.export, artifact.manifest.model
    engine = nvinfer.refittable(artifact)
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


def evaluate(
    path: str | Path,
    data: str,
    *,
    split: str | None = None,
    batch: int | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    cuda_graph: bool = False,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Accuracy of an artifact over labelled images; every prediction is kept when `out` is given.

    Args:
        data: folder of class folders, tar, Parquet, or `hfds:NAME`.
        batch: images at once; None: the size the artifact is tuned for.
        limit: only so many images, evenly spaced over the source.
        out: path without suffix for `<out>.json` and `<out>.parquet`.
        cuda_graph: on a GPU: replay a captured CUDA graph. Not for every format.
        trust: as for `load`.
        progress: told (images done, images in all).
    """
    from . import data as sources
    from .evaluate import evaluate as run

    artifact = manifest.verified(Path(path))
    source = sources.open_source(data, split)
    session = _load(artifact, RunOptions(device=device, threads=threads, cuda_graph=cuda_graph), trust)
    return run(
        session,
        source,
        artifact=artifact,
        batch=artifact.manifest.export.batch.opt if batch is None else batch,
        out=Path(out) if out else None,
        limit=limit,
        progress=progress,
    )


def gate(
    baseline: str | Path,
    candidate: str | Path,
    *,
    limits: Limits,
    data: str | None = None,
    split: str | None = None,
    out: str | Path | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Hold a candidate against its baseline: on accuracy, and where the limits ask for it on latency and size.

    Args:
        baseline: `<out>.json` of an evaluation, with its predictions beside it; or an artifact folder.
        candidate: likewise.
        data: what artifact folders are evaluated on, as for `evaluate`.
        out: folder that keeps their evaluations, `baseline` and `candidate`, which are not run twice.
        trust: as for `load`, of both.
        progress: told (images done, images in all) of one evaluation after the other.

    Raises:
        DataError: the two were not evaluated on the same images.
        UsageError: an artifact without `data`, `data` without an artifact, or a limit that needs artifacts.
    """
    from .evaluate import read_predictions, read_result
    from .gate import Side, judge, refuse_unmeasured

    paths = {"baseline": Path(baseline), "candidate": Path(candidate)}
    artifacts = {name: manifest.verified(path) for name, path in paths.items() if path.is_dir()}
    refuse_unmeasured(limits, sizes=len(artifacts) == 2, timings=len(artifacts) == 2)
    if artifacts and data is None:
        name, artifact = next(iter(artifacts.items()))
        raise UsageError(f"--{name} {artifact.path} is an artifact; give --data, or a result of eval in its place")
    if data is not None and not artifacts:
        raise UsageError(f"--data {data} is for artifacts, and both sides are results of eval; leave it out")

    sides = {}
    with tempfile.TemporaryDirectory(prefix="gate-") as temporary:
        for name, path in paths.items():
            if data is not None and name in artifacts:
                kept = Path(out or temporary) / name
                path = kept.with_name(f"{name}.json")
                if not _is_evaluated(path, artifacts[name], data, split):
                    evaluate(
                        artifacts[name].path,
                        data,
                        split=split,
                        out=kept,
                        device=device,
                        threads=threads,
                        trust=trust,
                        progress=progress,
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


def _is_evaluated(result: Path, artifact: Artifact, data: str, split: str | None) -> bool:
    """Whether an earlier call has finished this evaluation."""
    from . import data as sources
    from .evaluate import read_result

    if not result.exists():
        return False
    found = read_result(result)
    return (found.artifact_sha256, found.data_sha256) == (artifact.sha256, sources.open_source(data, split).sha256)


def _timed_beside_each_other(artifacts: dict[str, Artifact], options: RunOptions, trust: bool) -> dict[str, Timing]:
    """Latency of each artifact on one batch of random pixels, of the size that the baseline is tuned for."""
    from . import measure, preprocess

    batch = artifacts["baseline"].manifest.export.batch.opt
    sessions = {name: _load(artifact, options, trust) for name, artifact in artifacts.items()}
    images = {}
    for name, artifact in artifacts.items():
        model = artifact.manifest.model
        pixels = np.random.default_rng(0).integers(0, 256, (batch, model.in_chans, *model.image_size), np.uint8)
        images[name] = preprocess.as_input(pixels, artifact.manifest.preprocessing, artifact.manifest.export.input)
    return {timing.artifact: timing for timing in measure.interleaved(sessions, images, LATENCY_S)}


def profile(
    path: str | Path,
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
    from . import preprocess
    from .profile import profile as run

    if steps < 1:
        raise UsageError(f"steps {steps}; expected at least 1")
    artifact = manifest.verified(Path(path))
    found = artifact.manifest
    session = _load(artifact, RunOptions(device=device, threads=threads), trust)
    size = found.export.batch.opt if batch is None else batch
    pixels = preprocess.probe_images(found.model.in_chans, found.model.image_size, size)
    return run(session, artifact, preprocess.as_input(pixels, found.preprocessing, found.export.input), steps)


def roofline(
    variant: str,
    *,
    device: str = "this",
    precision: str = "fp32",
    batch: int = 1,
    image_size: tuple[int, int] = (224, 224),
    task: Task = "classify",
    threads: int | None = None,
) -> RooflineResult:
    """The shortest time a device can take for a variant, and what bounds each of its operations.

    Args:
        device: `a100`, `h100` or `h200` by its data sheet; `this` and `this-gpu` are measured now.
        threads: of the measurement on this CPU.

    Raises:
        UsageError: an unknown variant or device, or a precision the device has no ceiling for.
    """
    from . import roofline as model
    from .models import registry

    spec = registry.spec(registry.resolve(variant)[0], image_size=image_size, task=task)
    if batch < 1 or min(image_size) < STRIDE:
        raise UsageError(f"batch {batch}, image size {image_size}; expected at least 1 image of {STRIDE} pixels")
    if device not in model.DATA_SHEETS and device not in model.MEASURED:
        known = ", ".join((*model.MEASURED, *model.DATA_SHEETS))
        raise UsageError(f"unknown device {device!r}; expected one of {known}")
    measured = device in model.MEASURED
    ceilings = model.measure(model.MEASURED[device], threads) if measured else model.DATA_SHEETS[device]
    rows = model.bound(spec, precision, batch, ceilings)
    ms = sum(row.ms for row in rows)
    return RooflineResult(
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=spec.architecture,
        task=task,
        image_size=image_size,
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


def report(results: Sequence[str | Path], *, out: str | Path, title: str = "ConvNeXt benchmarks") -> Path:
    """One self-contained HTML page, or Markdown tables where `out` ends in `.md`, from recorded results.

    Args:
        results: files of JSON Lines.

    Raises:
        DataError: a file cannot be read, or holds no result that a report shows.
    """
    from .report import html, markdown
    from .report import results as recorded

    found = recorded.read([Path(path) for path in results])
    out = Path(out)
    page = markdown.page(found, title) if out.suffix == ".md" else html.page(found, title)
    manifest.write_file(out, page.encode())
    return out


def bench(
    artifacts: Sequence[str | Path] = (),
    plan: "Plan | None" = None,
    *,
    variants: Sequence[str] = (),
    compare: Sequence[str] = (),
    runtimes: Sequence[str] = (),
    precisions: Sequence[Precision] = ("fp32",),
    image_sizes: Sequence[tuple[int, int]] = (),
    task: Task = "classify",
    cuda_graph: bool = False,
    trust: bool = False,
    say: Say = silent,
    progress: "Progress | None" = None,
) -> Iterator[BenchResult]:
    """Measure artifacts, or ConvNeXts with random weights, beside other models; a row as soon as it is finished.

    Without artifacts, each of `variants` is built in each of `runtimes` and takes turns with what it is compared with.

    Args:
        plan: what is measured of each; None: batches 1 and 8, two seconds each.
        variants: ConvNeXts; none: tiny, or with a family to compare with, its every size.
        compare: families ("swin", "deit", "resnet") or timm's names, in the same formats, precisions and sizes.
        runtimes: formats, "torch" or "torch.compile"; none: torch and the installed ones of onnx, openvino and native.
        image_sizes: (height, width) in pixels; none: 224, or what the artifacts have.
        trust: as for `load`, of `artifacts`.
        say: told what is being prepared, a line a step.
        progress: told (steps done, steps in all, what is being done).

    Raises:
        UsageError: anything that can be refused before the work.
    """
    from . import contenders
    from .bench import Plan
    from .bench import bench as run

    plan = (plan or Plan()).checked()
    if artifacts:
        if variants or runtimes or image_sizes:
            raise UsageError("artifacts have their own variant, runtime and image size; give these only without them")
        paths = [Path(path) for path in artifacts]
        groups = [contenders.of_artifacts(paths, compare, plan.device, cuda_graph, say, trust)]
    else:
        sizes = image_sizes or ((224, 224),)
        groups = contenders.of_variants(variants, compare, runtimes, precisions, sizes, task, plan.device, say)
    ceilings = None
    if any(contender.spec for group in groups for contender in group):
        say("measuring what this machine can do at most")
        ceilings = contenders.measured_ceilings(plan.device, plan.threads)
    for number, group in enumerate(groups):
        shifted = progress and _shifted(progress, number, len(groups))
        yield from run(group, plan, ceilings=ceilings, progress=shifted)


def _shifted(progress: "Progress", number: int, parts: int) -> "Progress":
    """Progress of one of several parts that are about as long as each other."""
    return lambda done, total, what: progress(number * total + done, parts * total, what)
