"""Artifacts: made by `export` and `refit`, opened by `load`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .. import arguments, env, formats
from ..artifact import manifest
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions, Session
from ..errors import UsageError
from ..models.source import Source
from ..records.base import Device, InputKind, KernelChoice, Precision, Problem, Task
from ..records.manifest import BatchRange, ExportRequest, HeadActivation, TensorRtSpec
from ..workflows.export import Say, silent
from .images import ClassOrder, Images, images

if TYPE_CHECKING:
    from ..quantization.plan import LoadedPlan


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
    artifact = opened(path, device=device, threads=threads, cuda_graph=cuda_graph, trust=trust)
    return formats.opened(artifact, RunOptions(device=device, threads=threads, cuda_graph=cuda_graph), trust)


def opened(path: arguments.Location, **given: Any) -> Artifact:
    """The artifact, every file of it checked, after the arguments of a function that runs it."""
    arguments.check(**given)
    return manifest.verified(arguments.path("path", path, "an artifact folder"))


@env.missing_named()
def export(
    weights: arguments.Weights = None,
    *,
    variant: str | None = None,
    format: str = "onnx",
    out: arguments.Location | None = None,
    precision: Precision | None = None,
    input: InputKind = "float32",
    batch: arguments.Batch | None = None,
    image_size: arguments.ImageSize | None = None,
    dynamic_image_size: bool = False,
    argmax: bool = False,
    task: Task = "classify",
    levels: Sequence[int] | str | None = None,
    head_activation: HeadActivation | None = None,
    patch_tokens: bool = False,
    config: arguments.Location | None = None,
    problem: Problem | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights_key: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    verify_data: Images | None = None,
    data: Images | None = None,
    split: str | None = None,
    labels: arguments.Location | None = None,
    annotations: arguments.Location | None = None,
    class_order: ClassOrder = "torchvision",
    device: Device | None = None,
    force: bool = False,
    say: Say = silent,
    tensorrt: TensorRtSpec | None = None,
    trt: str = "auto",
    refit_from: arguments.Location | None = None,
    plan: "arguments.Location | LoadedPlan | None" = None,
    kernels: KernelChoice = "none",
) -> Artifact:
    """Turn a checkpoint into a verified artifact.

    Args:
        weights: file, folder, timm name, `hf-hub:owner/name`, or "random"; or a module of timm, transformers,
            torchvision or your own, or its state dict; None takes `variant`'s published ones.
        variant: which ConvNeXt; None infers it from the tensors.
        format: one of `formats.names()`, or "trt": TensorRT or TensorRT-RTX, as `trt` says.
        out: the artifact's folder; None: `build/<architecture>-<format>-<precision>`.
        precision: None: fp32, or with a plan what it says of the operations that it does not name.
        input: "float32" takes normalized (N, C, H, W); "uint8" raw (N, H, W, C), with the normalization folded in.
        batch: sizes the artifact takes, one, (min, tuned for, max) or a `BatchRange`; None: (1, 8, 256).
        image_size: one number or (height, width), in pixels, at least 32; None: what the checkpoint says, else 224.
        dynamic_image_size: take any size of at least 32x32 pixels.
        argmax: of the task segment: put out the class of each pixel of the image (N, H, W), int32, in the place of the
            logits (N, classes, H / 4, W / 4): resizing and the choice of the class are part of the graph.
        task: classify; embed (the pooled vector); features (the maps); segment (a UPerNet with its head); detect
            (torchvision's RetinaNet or FCOS, whole).
        levels: of the task features: which maps, of 1 to 4 (strides 4 to 32); None: those that have a norm in the
            checkpoint, as a detector's backbone has, else all.
        head_activation: between the two linears of an MLP head: gelu, gelu_tanh, silu, relu, tanh or none. Tensors do
            not tell it.
        patch_tokens: with task embed: the second output holds each pixel of the last map under the norm of the pooled
            vector, as DINOv3 gives its patch tokens.
        config: a file with what stands beside the checkpoint otherwise: a configuration of mmpretrain and its
            relatives, which is read and not executed, or a JSON file of timm, transformers or open_clip; for a
            detector a JSON file of what torchvision's constructor was given.
        problem: what a classifier's outputs mean, where the checkpoint does not say it: single-label, multi-label,
            binary (one logit) or regression.
        preprocessing: fields of `records.manifest.Preprocessing` (mean, std, interpolation, crop_pct, crop_mode,
            exif_orientation) that override what stands beside the checkpoint; a plain state dict says nothing about
            them. One number for `mean` or `std` is for every channel.
        verify_data: more images to verify on (in any form that `evaluate` takes), beside the bundled ones.
        data: labelled images, as for `evaluate`. Likely image sizes, statistics and crops are tried on them in the
            place of what is assumed, and a combination that is better beyond chance is an error that names it.
        labels: file of the model's class names in their order, which go into the artifact and number those of `data`.
        split, annotations, class_order: of `data`, as for `evaluate`.
        device: where the artifact is built for and verified on; None: the CPU, or CUDA where the format needs it.
        force: replace an artifact that exists.
        say: told what is being done, a line a step.
        tensorrt: what only TensorRT and TensorRT-RTX are told.
        trt: with format "trt": "tensorrt", "rtx", or "auto".
        refit_from: an engine that gets these weights, instead of building one (see `refit`).
        plan: a plan of `quantize` for this checkpoint and format.
        kernels: this package's fused CUDA kernels: "measured" takes them where `kernels/measured.json` says that they
            are faster on the GPU here, "all" wherever they can run.

    Raises:
        UsageError: anything that can be refused before the work.
        CheckFailed: the artifact was built and is wrong; it lies in `<out>.rejected`.
    """
    source = Source.of(
        weights,
        variant=variant,
        task=task,
        image_size=image_size,
        num_classes=num_classes,
        in_chans=in_chans,
        weights_key=weights_key,
        preprocessing=preprocessing,
        levels=levels,
        head_activation=head_activation,
        patch_tokens=patch_tokens,
        config=config,
        problem=problem,
    )
    arguments.check(
        format=format,
        precision=precision,
        input=input,
        dynamic_image_size=dynamic_image_size,
        argmax=argmax,
        device=device,
        force=force,
        say=say,
        tensorrt=tensorrt,
        trt=trt,
        kernels=kernels,
        class_order=class_order,
        split=split,
    )
    out = arguments.maybe(arguments.path, "out", out)
    sizes = arguments.maybe(arguments.batch_range, "batch", batch) or BatchRange()
    verify_data = None if verify_data is None else images("verify_data", verify_data)
    data = None if data is None else images("data", data, class_order)
    labels = arguments.maybe(arguments.path, "labels", labels)
    annotations = arguments.maybe(arguments.images, "annotations", annotations)
    for name, value in (("annotations", annotations), ("split", split)):
        if value is not None and data is None:
            raise UsageError(f"{name} {arguments.shown(value)} is of labelled images; give --data too, or leave it out")
    refit_from = arguments.maybe(arguments.path, "refit_from", refit_from)
    from ..workflows import export as workflow
    from ..workflows.evaluate import Images

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
    return workflow.export(
        source,
        request,
        plan=loaded,
        kernels=kernels,
        out=out,
        force=force,
        verify_data=verify_data,
        checked_on=None
        if data is None
        else Images(data=data, split=split, labels=labels, annotations=annotations, class_order=class_order),
        class_names=labels,
        refit_from=refit_from,
        say=say,
    )


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
        UsageError: the artifact is no engine, or was not exported with `--trt-refit refit` or `--trt-refit strip`.
        CheckFailed: as `export`.
    """
    weights = arguments.weights("weights", weights)
    out = arguments.path("out", out)
    artifact = opened(path, force=force, say=say, trust=trust)
    from ..runtimes.tensorrt import refit

    spec, model = artifact.manifest.export, artifact.manifest.model
    engine = refit.refittable(artifact)
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
        levels=model.levels if model.task == "features" else None,
        force=force,
        say=say,
        tensorrt=msgspec.structs.replace(spec.tensorrt or TensorRtSpec(), refit="refit"),  # it has weights now
        refit_from=engine,
    )
