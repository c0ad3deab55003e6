"""`export` and `refit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .options import (
    AnnotationsOption,
    ClassOrderOption,
    Debug,
    ExifOrientation,
    Json,
    LabelsOption,
    MultiLabel,
    ProblemOption,
    Quiet,
    Trust,
    batch_range,
    class_order_of,
    given,
    head_activation_of,
    image_size_of,
    numbers,
    one_of,
    problem_of,
)
from .terminal import Terminal, summary

if TYPE_CHECKING:
    from ..records.manifest import TensorRtSpec


def export(
    variant: Annotated[
        str | None, typer.Option(help="Which ConvNeXt: base, v2-tiny, convnext_base.fb_in1k ...")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="File, folder, timm name, hf-hub:owner/name@REVISION, or random. Default: published."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="See `convnext-deploy list`; trt: TensorRT or TensorRT-RTX, as --trt says.")
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="Artifact folder. Default: build/ARCHITECTURE-FORMAT-PRECISION.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, tf32, fp16 or bf16. Default: fp32, or what --plan says.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan of `quantize` for this checkpoint and format.")] = None,
    input: Annotated[str, typer.Option(help="float32 (normalized NCHW) or uint8 (raw NHWC).")] = "float32",
    batch: Annotated[str, typer.Option(help="Batch sizes: N, or MIN:OPT:MAX.")] = "1:8:256",
    image_size: Annotated[
        str | None, typer.Option(help="Pixels: 224 or HEIGHTxWIDTH. Default: what the checkpoint says, else 224.")
    ] = None,
    dynamic_image_size: Annotated[bool, typer.Option("--dynamic-image-size", help="Take any size from 32x32.")] = False,
    task: Annotated[str, typer.Option(help="classify, embed, features or segment (UPerNet).")] = "classify",
    argmax: Annotated[
        bool, typer.Option("--argmax", help="segment: put out each pixel's class, resized in the graph, not logits.")
    ] = False,
    levels: Annotated[
        str | None,
        typer.Option(
            help="features: which maps, such as 2,3,4 (strides 8,16,32). Default: those with a norm, else all."
        ),
    ] = None,
    patch_tokens: Annotated[
        bool, typer.Option("--patch-tokens", help="embed: a second output with the last map's pixels, as DINOv3.")
    ] = False,
    head_activation: Annotated[
        str | None,
        typer.Option(help="Activation of an MLP head, unknown from tensors: gelu, gelu_tanh, silu, relu, tanh, none."),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Must agree with the checkpoint; shapes random weights.")
    ] = None,
    in_chans: Annotated[int | None, typer.Option(help="Must agree with the checkpoint; shapes random weights.")] = None,
    weights_key: Annotated[str | None, typer.Option(help="Wrapper or key prefix to load from the file.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration of the model, where it is not beside the weights: mm's .py, or JSON."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of the training images in [0, 1]: R,G,B or one number.")
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            help="Standard deviation of the training images. Default, as of --mean: from beside the checkpoint."
        ),
    ] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the resized image that evaluation crops.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos.")] = None,
    exif_orientation: ExifOrientation = False,
    problem: ProblemOption = None,
    multi_label: MultiLabel = False,
    data: Annotated[
        str | None, typer.Option(help="Labelled images that check the assumed size, statistics and crop, as for eval.")
    ] = None,
    labels: LabelsOption = None,
    annotations: AnnotationsOption = None,
    class_order: ClassOrderOption = "torchvision",
    verify_data: Annotated[str | None, typer.Option(help="More images to verify on: folder, tar or Parquet.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cpu, or cuda where the format needs it.")
    ] = None,
    trt: Annotated[str, typer.Option(help="With --format trt: auto, tensorrt or rtx.")] = "auto",
    target: Annotated[
        str | None, typer.Option(help="TensorRT-RTX: GPUs to build for: a100,rtx4090,sm80. Default: Ampere and later.")
    ] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="TensorRT: one more batch range to tune for, MIN:OPT:MAX. Repeatable.")
    ] = None,
    sides: Annotated[
        str | None, typer.Option(help="TensorRT: pixels MIN:OPT:MAX with --dynamic-image-size. Default: 32 to 1024.")
    ] = None,
    optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="TensorRT: 0 to 5; default 3.")] = None,
    workspace_mb: Annotated[int | None, typer.Option(min=1, help="TensorRT: scratch memory; default: all.")] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="TensorRT: run on any GPU from Ampere on.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: run on later versions too.")
    ] = False,
    refit: Annotated[
        str, typer.Option(help="TensorRT: none, refit, or strip (weights come in with `refit`).")
    ] = "none",
    kernels: Annotated[
        str, typer.Option(help="eager, aotinductor on cuda: none, measured (where faster on this GPU) or all.")
    ] = "none",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint into a verified artifact."""
    from ..records.base import Device, InputKind, KernelChoice, Precision, Task

    terminal = Terminal(json, quiet)
    wanted = {
        "precision": None if precision is None else one_of("--precision", precision, Precision),
        "input": one_of("--input", input, InputKind),
        "task": one_of("--task", task, Task),
        "device": None if device is None else one_of("--device", device, Device),
        "tensorrt": _tensorrt(
            format,
            target,
            profile,
            sides,
            optimization_level,
            workspace_mb,
            hardware_compatible,
            version_compatible,
            refit,
        ),
        "trt": trt,
        "kernels": one_of("--kernels", kernels, KernelChoice),
        "batch": batch_range(batch),
        "image_size": image_size_of(image_size),
        "preprocessing": given(
            mean=numbers("--mean", mean),
            std=numbers("--std", std),
            crop_pct=crop_pct,
            interpolation=interpolation,
            exif_orientation=exif_orientation or None,
        ),
        "problem": problem_of(problem, multi_label),
    }
    from .. import formats

    if format != "trt":
        formats.require(formats.get(format), build=True)  # before torch is imported, so that a typo costs nothing
    from .. import api

    artifact = api.export(
        weights,
        variant=variant,
        format=format,
        out=out,
        dynamic_image_size=dynamic_image_size,
        argmax=argmax,
        num_classes=num_classes,
        in_chans=in_chans,
        levels=levels,
        head_activation=head_activation_of(head_activation),
        weights_key=weights_key,
        config=config,
        patch_tokens=patch_tokens,
        data=data,
        labels=labels,
        annotations=annotations,
        class_order=class_order_of(class_order),
        verify_data=verify_data,
        plan=plan,
        force=force,
        say=terminal.say,
        **wanted,
    )
    found = artifact.manifest
    terminal.result({"path": str(artifact.path), "manifest": found}, summary(artifact.path, found, artifact.bytes))


def refit(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder of a refittable TensorRT engine.")],
    weights: Annotated[str, typer.Option(help="The new weights, of the same architecture.")],
    out: Annotated[Path, typer.Option(help="Folder of the new artifact.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists.")] = False,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put other weights into a TensorRT engine, without building it again. Needs the GPU."""
    from .. import api

    terminal = Terminal(json, quiet)
    made = api.refit(artifact, weights, out=out, force=force, say=terminal.say, trust=trust)
    found = made.manifest
    terminal.result({"path": str(made.path), "manifest": found}, summary(made.path, found, made.bytes))


def _tensorrt(
    format: str,
    target: str | None,
    profile: list[str] | None,
    sides: str | None,
    optimization_level: int | None,
    workspace_mb: int | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refit: str,
) -> "TensorRtSpec | None":
    """The TensorRT options as one record; None where none was given and the format is another."""
    from .. import formats
    from ..records.manifest import TensorRtSpec

    targets: tuple[str, ...] = ()
    if target is not None:
        from ..runtimes.tensorrt import choose

        targets = choose.targets_of(target)
    if refit not in ("none", "refit", "strip"):
        raise UsageError(f"--refit {refit}; expected none, refit or strip")
    range_of_sides = None
    if sides is not None:
        r = batch_range(sides, "--sides")
        range_of_sides = (r.min, r.opt, r.max)
    spec = TensorRtSpec(
        targets=targets,
        profiles=tuple(batch_range(text, "--profile") for text in profile or ()),
        sides=range_of_sides,
        optimization_level=optimization_level,
        workspace_mb=workspace_mb,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        refit=refit,  # type: ignore[arg-type]  # checked above
    )
    return spec if spec != TensorRtSpec() or format == "trt" or formats.get(format).ahead_of_time else None
