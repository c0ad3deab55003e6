"""Artifacts: made by `export` and `refit`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import msgspec

from .. import argument_names, arguments, formats
from ..arguments import Unpack
from ..artifact import manifest
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions
from ..errors import UsageError
from ..models.source import Source, SourceOptions
from ..records.base import Device, InputKind, KernelChoice, Precision, Task
from ..records.manifest import BatchRange, ExportRequest, TensorRtSpec
from ..workflows.export import Say, silent
from .images import Images, LabelOptions, images, labelled_or_none
from .verbs import defaults_of, part, verb

if TYPE_CHECKING:
    from ..quantization.plan import LoadedPlan


Trust = Annotated[bool, "run the code that an artifact brings although somebody else built it (see SECURITY.md)."]


class OpeningOptions(TypedDict, total=False):
    """Where an artifact runs, and whether it may; of every function that runs one."""

    device: Annotated[Device, "cpu, or cuda for a GPU."]
    threads: Annotated[int | None, "threads of the runtime; None: its own default, which is every core."]
    trust: Trust


class SessionOptions(OpeningOptions, total=False):
    """How one artifact runs; of the functions that open it."""

    cuda_graph: Annotated[bool, "on a GPU: replay a captured CUDA graph. Not for every format."]


# With `into`: what is said of the graph's images, and of a checkpoint beside it.
OF_GRAPHS = ("image_size", "preprocessing", "variant", "weights_key", "config")
NOTHING_SAID = {"task": "classify", "data": None, "device": None, "kernels": "none"}


class ExportOptions(SourceOptions, LabelOptions, total=False):
    """What is said about the checkpoint, and how the labels of `data` are read."""


def run_options(options: Mapping[str, Any]) -> tuple[RunOptions, bool]:
    """`OpeningOptions` or `SessionOptions` as the record that sessions take, and `trust`."""
    argument_names.check(**options)
    read = dict(options)
    trust: bool = read.pop("trust", False)
    return RunOptions(**read), trust


def opened(path: arguments.Location) -> Artifact:
    """The artifact in a folder, every file of it checked."""
    return manifest.verified(arguments.path("path", path, "an artifact folder"))


@verb
def export(
    weights: arguments.Weights = None,
    *,
    format: str = "onnx",
    out: arguments.Location | None = None,
    precision: Precision | None = None,
    input: InputKind = "float32",
    batch: arguments.Batch | None = None,
    dynamic_image_size: bool = False,
    task: Task = "classify",
    argmax: bool = False,
    plan: "arguments.Location | LoadedPlan | None" = None,
    data: Images | None = None,
    verify_data: Images | None = None,
    device: Device | None = None,
    kernels: KernelChoice = "none",
    trt: str = "auto",
    tensorrt: TensorRtSpec | None = None,
    force: bool = False,
    say: Say = silent,
    into: arguments.Location | None = None,
    at: Sequence[str] | str = (),
    progress: arguments.Progress | None = None,
    **options: Unpack[ExportOptions],
) -> Artifact:
    """Turn a checkpoint into a verified artifact.

    Args:
        weights: file, folder, timm name, `hf-hub:owner/name`, or "random"; or a module of timm, transformers,
            torchvision or your own, or its state dict; None takes `variant`'s published ones.
        format: one of `formats.names()`, or "trt": TensorRT or TensorRT-RTX, as `trt` says.
        out: the artifact's folder; None: `build/<architecture>-<format>-<precision>`.
        precision: None: fp32, or with a plan what it says of the operations that it does not name.
        input: "float32" takes normalized (N, C, H, W); "uint8" raw (N, H, W, C), with the normalization folded in.
        batch: sizes the artifact takes, one, (min, tuned for, max) or a `BatchRange`; None: (1, 8, 256).
        dynamic_image_size: take any size of at least 32x32 pixels.
        task: classify; embed (the pooled vector); features (the maps); segment (a UPerNet with its head);
            detect (torchvision's RetinaNet, FCOS, Faster or Mask R-CNN, whole).
        argmax: of the task segment: put out the class of each pixel of the image (N, H, W), int32, in the place of the
            logits (N, classes, H / 4, W / 4): resizing and the choice of the class are part of the graph.
        plan: a plan of `quantize` for this checkpoint and format.
        data: labelled images, as for `evaluate`. Likely image sizes, statistics and crops are tried on them in the
            place of what is assumed, and a combination that is better beyond chance is an error that names it. What
            is given is taken; what fits better is `fits_better` of that fact in the manifest's `provenance`.
        verify_data: more images to verify on (in any form that `evaluate` takes), beside the bundled ones.
        device: where the artifact is built for and verified on; None: the CPU, or CUDA where the format needs it.
        kernels: this package's fused CUDA kernels: "measured" takes them where `kernels/measured.json` says that they
            are faster on the GPU here, "all" wherever they can run.
        into: an ONNX file of any exporter, such as a detector, whose ConvNeXt is replaced by this package's. The
            weights are the graph's own; `weights`, where given, have to be the same.
        at: with `into`, the names of tensors: what the ConvNeXt's stem reads, and its maps, the first stage's first.
            None are needed where the graph contains one ConvNeXt.
        trt: with format "trt": "tensorrt", "rtx", or "auto".
        tensorrt: what only TensorRT and TensorRT-RTX are told.
        force: replace an artifact that exists.
        say: told what is being done, a line a step.
        progress: told (percent done, 100, what is being done); how long each step takes is a guess.

    Raises:
        UsageError: anything that can be refused before the work.
        CheckFailed: the artifact was built and is wrong; it is in `<out>.rejected`.
    """
    source = Source.of(weights, task=task, **part(options, SourceOptions))
    argument_names.check(
        format=format, precision=precision, input=input, dynamic_image_size=dynamic_image_size, argmax=argmax,
        device=device, force=force, say=say, tensorrt=tensorrt, trt=trt, kernels=kernels,
    )  # fmt: skip
    arguments.progress(progress, arguments.OF_STEPS)
    names = arguments.names("at", at)
    into = arguments.maybe(arguments.path, "into", into)
    if into is None and names:
        raise UsageError(f"--at {arguments.shown(at)} is where the graph of --into is cut; give that too")
    out = arguments.maybe(arguments.path, "out", out)
    sizes = arguments.maybe(arguments.batch_range, "batch", batch) or BatchRange()
    verify_data = None if verify_data is None else images("verify_data", verify_data)
    checked_on = labelled_or_none(data, part(options, LabelOptions))
    class_names = arguments.maybe(arguments.path, "labels", options.get("labels"))
    from ..workflows import export as workflow

    if format == "trt":
        from ..runtimes.tensorrt import choose

        format, why = choose.choose(trt)
        say(why)
        tensorrt = msgspec.structs.replace(tensorrt or TensorRtSpec(), chosen=why)
    elif trt != "auto":
        raise UsageError(f"--trt {trt} is for --format trt, not for --format {format}")
    fmt = formats.get(format)
    loaded = workflow.plan_for(fmt, plan, precision)
    request = ExportRequest(
        format=format,
        precision=loaded.plan.rest if loaded else precision or "fp32",
        input=input,
        batch=sizes,
        dynamic_image_size=dynamic_image_size,
        argmax=argmax,
        device=device or ("cpu" if "cpu" in fmt.devices else "cuda"),
        tensorrt=tensorrt,
    )
    if into is not None:
        from ..workflows.splice import splice

        given = {**options, "task": task, "data": data, "device": device, "kernels": kernels}
        for name, default in {**defaults_of(ExportOptions), **NOTHING_SAID}.items():
            if name not in OF_GRAPHS and given.get(name, default) != default:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} has no meaning with --into, which takes the graph as it is; leave it out")
        return splice(
            into,
            request,
            at=names,
            source=source,
            plan=loaded,
            out=out,
            force=force,
            verify_data=verify_data,
            say=say,
            progress=progress,
        )
    return workflow.export(
        source,
        request,
        plan=loaded,
        kernels=kernels,
        out=out,
        force=force,
        verify_data=verify_data,
        checked_on=checked_on,
        class_names=class_names,
        say=say,
        progress=progress,
    )


@verb
def refit(
    path: arguments.Location,
    weights: arguments.Location,
    *,
    out: arguments.Location,
    force: bool = False,
    say: Say = silent,
    progress: arguments.Progress | None = None,
    trust: bool = False,
) -> Artifact:
    """A TensorRT engine with other weights of the same architecture, without building it again. Needs the GPU.

    Args:
        path: folder of the engine's artifact.
        weights: as for `export`, but for modules and state dicts.
        out: folder of the new artifact.
        force: replace an artifact that exists.
        say: told what is being done, a line a step.
        progress: as for `export`.
        trust: as for `load`.

    Raises:
        UsageError: the artifact is no engine, or was not exported with `--trt-refit refit` or `--trt-refit strip`.
        CheckFailed: as `export`.
    """
    weights = arguments.weights("weights", weights)
    out = arguments.path("out", out)
    argument_names.check(force=force, say=say, trust=trust)
    arguments.progress(progress, arguments.OF_STEPS)
    artifact = opened(path)
    from ..runtimes.tensorrt import refit
    from ..workflows import export as workflow

    spec, model = artifact.manifest.export, artifact.manifest.model
    engine = refit.refittable(artifact)
    formats.refuse_untrusted(formats.get(spec.format), artifact, trust)
    source = Source.of(
        weights,
        variant=model.architecture,
        task=model.task,
        image_size=model.image_size,
        levels=model.levels if model.task == "features" else None,
    )
    request = ExportRequest(
        format=spec.format,
        precision=spec.precision,
        input=spec.input,
        batch=spec.batch,
        dynamic_image_size=spec.dynamic_image_size,
        device=spec.device,
        argmax=spec.argmax,
        tensorrt=msgspec.structs.replace(spec.tensorrt or TensorRtSpec(), refit="refit"),  # it has weights now
    )
    return workflow.export(source, request, out=out, force=force, refit_from=engine, say=say, progress=progress)
