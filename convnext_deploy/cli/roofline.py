"""`roofline`."""

from typing import Annotated

import typer

from .options import AppendTo, Debug, Json, Quiet, Threads, image_size_of, one_of
from .terminal import Terminal, progress_bar


def roofline(
    variant: Annotated[str, typer.Option(help="Which ConvNeXt: base, v2-tiny, convnext_large ...")],
    device: Annotated[
        str, typer.Option(help="this, this-gpu: measured now; a100, h100, h200: by the data sheet.")
    ] = "this",
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16, bf16 or int8.")] = "fp32",
    batch: Annotated[int, typer.Option(help="Images at once.")] = 1,
    image_size: Annotated[str, typer.Option(help="Pixels: 224, or HEIGHTxWIDTH.")] = "224",
    task: Annotated[str, typer.Option(help="classify, embed or features.")] = "classify",
    threads: Threads = None,
    out: AppendTo = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The shortest time a device can take for a model, and what bounds each operation."""
    from .. import api
    from ..artifact import manifest
    from ..records.base import NetworkTask
    from ..reports.tables import rate

    terminal = Terminal(json, quiet)
    if out is not None:
        manifest.check_file(out)
    size = image_size_of(image_size)
    assert size is not None
    with progress_bar(terminal, "measuring", transient=True) as progress:
        result = api.roofline(
            variant,
            device=device,
            precision=precision,
            batch=batch,
            image_size=size,
            task=one_of("--task", task, NetworkTask),
            threads=threads,
            progress=progress,
        )
    if out is not None:
        manifest.append_line(out, result)
    rows = [
        [f"{row.stage} {row.operation}".removeprefix("stem ").removeprefix("head "), str(row.count), f"{row.gflop:.2f}",
         f"{row.mb:.1f}", f"{row.gflop * 1e3 / row.mb:.0f}", f"{row.ms:.4f}", f"{row.ms / result.ms:.1%}", row.limit]
        for row in result.rows
    ]  # fmt: skip
    columns = ["operation", "count", "GFLOP", "MB", "FLOP/B", "ms", "share", "bound by"]
    terminal.table(f"{result.model} {result.precision}, batch {batch}, on {result.ceilings.name}", columns, rows)
    ceilings = result.ceilings
    rates = ", ".join(f"{name} {rate(tflops)}" for name, tflops in ceilings.matrix_tflops.items())
    terminal.result(
        result,
        f"at least {result.ms:.3f} ms a batch, at most {result.images_per_s:.1f} images/s "
        f"({result.gflop:.2f} GFLOP, {result.mb:.1f} MB)\n"
        f"ceilings: {rates} TFLOP/s in matrix products, {rate(ceilings.vector_tflops)} outside them, "
        f"copy {ceilings.copy_gb_s:.0f} GB/s ({ceilings.source})",
    )
