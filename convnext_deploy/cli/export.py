"""`export` and `refit`."""

from pathlib import Path
from typing import Annotated

import typer

from . import hints
from .groups import AllOutputs, ExportedCheckpoint, Labelled, Meaning, TensorRt, grouped
from .interruption import interruptible
from .options import DATA, OUTPUT, RUNTIME, Debug, Force, Json, Quiet, Trust, batch_range, one_of
from .terminal import Terminal, progress_bar, summary


@grouped
def export(
    *,
    checkpoint: ExportedCheckpoint,
    outputs: AllOutputs,
    format: Annotated[
        str,
        typer.Option(
            help="See `convnext-deploy list`; trt: TensorRT or TensorRT-RTX, as --trt says.", rich_help_panel=OUTPUT
        ),
    ] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, tf32, fp16 or bf16. Default: fp32, or what --plan says.", rich_help_panel=OUTPUT),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of `quantize` for this checkpoint and format.", rich_help_panel=OUTPUT)
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: N, or MIN:OPT:MAX.", rich_help_panel=OUTPUT)] = "1:8:256",
    dynamic_image_size: Annotated[
        bool, typer.Option("--dynamic-image-size", help="Take any size from 32x32.", rich_help_panel=OUTPUT)
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Artifact folder. Default: build/ARCHITECTURE-FORMAT-PRECISION.", rich_help_panel=OUTPUT),
    ] = None,
    force: Force = False,
    into: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file whose ConvNeXt is replaced; its weights are read from it.", rich_help_panel="Splice"
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Tensors at its ends: what the stem reads, then the maps. Default: found.",
            rich_help_panel="Splice",
            metavar="IN,OUT,...",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled images that check the assumed or given size, statistics and crop.",
            rich_help_panel=DATA,
        ),
    ] = None,
    labelled: Labelled,
    meaning: Meaning,
    verify_data: Annotated[
        str | None,
        typer.Option(
            help="More images to verify on: folder, tar or Parquet; labels not needed.",
            rich_help_panel=DATA,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: cpu, or cuda where the format needs it.", rich_help_panel=RUNTIME),
    ] = None,
    kernels: Annotated[
        str,
        typer.Option(
            help="eager, aotinductor on cuda: none, measured (where faster on this GPU) or all.",
            rich_help_panel="Kernels",
        ),
    ] = "none",
    tensorrt: TensorRt,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint into a verified artifact."""
    from ..records.base import Device, KernelChoice, Precision

    terminal = Terminal(json, quiet)
    options = {
        **checkpoint.read(),
        **outputs.read(),
        **labelled.read(),
        "problem": meaning.read(),
        "precision": None if precision is None else one_of("--precision", precision, Precision),
        "device": None if device is None else one_of("--device", device, Device),
        "tensorrt": tensorrt.read(format),
        "kernels": one_of("--kernels", kernels, KernelChoice),
        "batch": batch_range(batch),
    }
    from .. import formats

    if format != "trt":
        formats.require(formats.get(format), build=True)  # before torch is imported, so that a typo costs nothing
    from .. import api

    with (
        progress_bar(terminal, "preparing", redraws_per_s=1, transient=True) as progress,
        interruptible(terminal.say) as say,
    ):
        artifact = api.export(
            checkpoint.weights,
            format=format,
            out=out,
            dynamic_image_size=dynamic_image_size,
            data=data,
            verify_data=verify_data,
            plan=plan,
            trt=tensorrt.trt,
            into=into,
            at=at or (),
            force=force,
            say=say,
            progress=progress,
            **options,
        )
    facts = artifact.manifest
    terminal.result(
        {"path": str(artifact.path), "manifest": facts},
        summary(artifact.path, facts, artifact.bytes),
        hints.after_export(artifact.path, facts, () if data is None else labelled.images(data).words()),
    )


def refit(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder of a refittable TensorRT engine.")],
    weights: Annotated[str, typer.Option(help="The new weights, of the same architecture.")],
    out: Annotated[Path, typer.Option(help="Folder of the new artifact.")],
    force: Force = False,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put other weights into a TensorRT engine, without building it again. Needs the GPU."""
    from .. import api

    terminal = Terminal(json, quiet)
    with progress_bar(terminal, "preparing", redraws_per_s=1, transient=True) as progress:
        output = api.refit(artifact, weights, out=out, force=force, say=terminal.say, progress=progress, trust=trust)
    facts = output.manifest
    terminal.result(
        {"path": str(output.path), "manifest": facts},
        summary(output.path, facts, output.bytes),
        hints.after_export(output.path, facts, ()),
    )
