"""`half`."""

from pathlib import Path
from typing import Annotated

import typer

from .groups import Checkpoint, Outputs, grouped
from .hints import export_command
from .options import WRITES, Debug, Force, Json, Quiet, one_of
from .terminal import Terminal, progress_bar


@grouped
def half(
    out: Annotated[
        Path, typer.Option(**WRITES, help="The plan, NAME.json; NAME.half.json says why each operation is kept.")
    ],
    data: Annotated[str, typer.Option(help="Real images: folder, tar or Parquet.")],
    checkpoint: Checkpoint,
    outputs: Outputs,
    precision: Annotated[str, typer.Option(help="fp16 or bf16.", rich_help_panel="Plan")] = "fp16",
    images: Annotated[int, typer.Option(min=1, help="How many to look at.", rich_help_panel="Plan")] = 64,
    split: Annotated[
        str | None, typer.Option(help="Which split, where the source has several.", rich_help_panel="Plan")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Which operations overflow or lose their values in fp16 or bf16, and a plan that keeps these in fp32."""
    from ..records.plan import HalfPrecision

    terminal = Terminal(json, quiet)
    options = {
        **checkpoint.read(),
        **outputs.read(),
        "precision": one_of("--precision", precision, HalfPrecision),
    }
    from .. import api

    with progress_bar(terminal, "preparing") as bar:
        plan, report = api.half(
            checkpoint.weights,
            out=out,
            data=data,
            images=images,
            split=split,
            force=force,
            say=terminal.say,
            progress=lambda done, total: bar(done, total, "looking at images") if bar else None,
            **options,
        )
    kept = [operation for operation in report.operations if operation.reasons]
    lines = [
        f"{out}: {len(kept)} of {len(report.operations)} operations stay in fp32, "
        f"{report.kept_share:.1%} of the multiply-accumulates; the rest in {plan.rest}"
    ]
    lines += [f"{operation.name}: {'; '.join(operation.reasons)}" for operation in kept]
    hint = export_command(out, plan.target, *checkpoint.words(), *outputs.words())
    terminal.result({"path": str(out), "plan": plan, "report": report}, "\n".join(lines), [hint])
