"""The Python interface: one function a verb."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import formats, manifest
from .errors import ArtifactError, UsageError
from .export import Say, export, silent
from .manifest import Artifact
from .session import RunOptions, Session
from .types import BenchResult, Device, EvalResult, Precision, Task, TensorRtSpec

if TYPE_CHECKING:
    from .bench import Plan, Progress

__all__ = ["bench", "evaluate", "export", "load", "refit"]


def load(path: str | Path, *, device: Device = "cpu", threads: int | None = None, cuda_graph: bool = False) -> Session:
    """Open an artifact, check every file of it, and make it ready to run.

    Args:
        cuda_graph: TensorRT only: replay a captured CUDA graph.

    Raises:
        ArtifactError: naming the file that is missing, changed or unreadable.
        MissingPackageError: the runtime is not installed.
    """
    return _load(manifest.verified(Path(path)), RunOptions(device=device, threads=threads, cuda_graph=cuda_graph))


def _load(artifact: Artifact, options: RunOptions) -> Session:
    try:
        fmt = formats.get(artifact.manifest.export.format)
    except UsageError as error:
        raise ArtifactError(f"{artifact.path}: {error}") from None
    formats.require(fmt)
    formats.refuse_device(fmt, options.device)
    if options.cuda_graph and not fmt.ahead_of_time:
        raise UsageError(f"format {fmt.name} replays no CUDA graphs; only TensorRT's do")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"threads {options.threads}; expected at least 1")
    return fmt.load(artifact.path, artifact.manifest, options)


def refit(path: str | Path, weights: str, *, out: str | Path, force: bool = False, say: Say = silent) -> Artifact:
    """A TensorRT engine with other weights of the same architecture, without building it again. Needs the GPU.

    Raises:
        UsageError: the artifact is no engine, or was not exported with `--refit refit` or `--refit strip`.
        CheckFailed: as `export`.
    """
    from .lower import nvinfer

    artifact = manifest.verified(Path(path))
    spec, model = artifact.manifest.export, artifact.manifest.model
    engine = nvinfer.refittable(artifact)
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
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Accuracy of an artifact over labelled images; every prediction is kept when `out` is given.

    Args:
        data: folder of class folders, tar, Parquet, or `hfds:NAME`.
        batch: images at once; None: the size the artifact is tuned for.
        limit: only so many images, evenly spaced over the source.
        out: path without suffix for `<out>.json` and `<out>.parquet`.
        cuda_graph: TensorRT only: replay a captured CUDA graph.
        progress: told (images done, images in all).
    """
    from . import data as sources
    from .evaluate import evaluate as run

    artifact = manifest.verified(Path(path))
    source = sources.open_source(data, split)
    session = _load(artifact, RunOptions(device=device, threads=threads, cuda_graph=cuda_graph))
    return run(
        session,
        source,
        artifact=artifact,
        batch=artifact.manifest.export.batch.opt if batch is None else batch,
        out=Path(out) if out else None,
        limit=limit,
        progress=progress,
    )


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
    say: Say = silent,
    progress: "Progress | None" = None,
) -> Iterator[BenchResult]:
    """Measure artifacts, or ConvNeXts with random weights, beside other models; a row as soon as it is finished.

    Without artifacts, each of `variants` is built in each of `runtimes` and takes turns with what it is compared with.

    Args:
        plan: what is measured of each; None: batches 1 and 8, two seconds each.
        variants: ConvNeXts; none: tiny, or with a family to compare with, its every size.
        compare: families ("swin", "deit", "resnet") or timm's names, in the same formats, precisions and sizes.
        runtimes: formats, "torch" or "torch.compile"; none: torch and the installed ones of onnx and openvino.
        image_sizes: (height, width) in pixels; none: 224, or what the artifacts have.
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
        groups = [contenders.of_artifacts([Path(path) for path in artifacts], compare, plan.device, cuda_graph, say)]
    else:
        sizes = image_sizes or ((224, 224),)
        groups = contenders.of_variants(variants, compare, runtimes, precisions, sizes, task, plan.device, say)
    for number, group in enumerate(groups):
        yield from run(group, plan, progress=progress and _shifted(progress, number, len(groups)))


def _shifted(progress: "Progress", number: int, parts: int) -> "Progress":
    """Progress of one of several parts that are about as long as each other."""
    return lambda done, total, what: progress(number * total + done, parts * total, what)
