"""`half`."""

from pathlib import Path
from typing import Annotated

import typer

from .hints import export_command
from .options import Debug, Json, Quiet, given, head_activation_of, image_size_of, numbers, one_of
from .terminal import Terminal, progress_bar


def half(
    out: Annotated[Path, typer.Option(help="The plan, NAME.json; NAME.half.json says why each operation is kept.")],
    data: Annotated[str, typer.Option(help="Real images: folder, tar or Parquet.")],
    variant: Annotated[str | None, typer.Option(help="As for export.")] = None,
    weights: Annotated[str | None, typer.Option(help="As for export.")] = None,
    precision: Annotated[str, typer.Option(help="fp16 or bf16.")] = "fp16",
    images: Annotated[int, typer.Option(min=1, help="How many to look at.")] = 64,
    split: Annotated[str | None, typer.Option(help="Which split, where the source has several.")] = None,
    input: Annotated[str, typer.Option(help="float32 or uint8, as for export.")] = "float32",
    image_size: Annotated[str | None, typer.Option(help="Pixels, as for export.")] = None,
    task: Annotated[str, typer.Option(help="classify, embed or features.")] = "classify",
    levels: Annotated[str | None, typer.Option(help="As for export.")] = None,
    head_activation: Annotated[str | None, typer.Option(help="As for export.")] = None,
    weights_key: Annotated[str | None, typer.Option(help="As for export.")] = None,
    config: Annotated[Path | None, typer.Option(help="As for export.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for export.")] = None,
    std: Annotated[str | None, typer.Option(help="As for export.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a plan that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Which operations overflow or lose their values in fp16 or bf16, and a plan that keeps these in fp32."""
    from ..records.base import InputKind, NetworkTask
    from ..records.plan import HalfPrecision

    terminal = Terminal(json, quiet)
    wanted = {
        "precision": one_of("--precision", precision, HalfPrecision),
        "input": one_of("--input", input, InputKind),
        "task": one_of("--task", task, NetworkTask),
        "image_size": image_size_of(image_size),
        "preprocessing": given(mean=numbers("--mean", mean), std=numbers("--std", std)),
    }
    from .. import api

    with progress_bar(terminal, "looking at images") as progress:
        plan, report = api.half(
            weights,
            out=out,
            data=data,
            variant=variant,
            images=images,
            split=split,
            levels=levels,
            head_activation=head_activation_of(head_activation),
            weights_key=weights_key,
            config=config,
            force=force,
            say=terminal.say,
            progress=progress,
            **wanted,
        )
    kept = [operation for operation in report.operations if operation.reasons]
    lines = [
        f"{out}: {len(kept)} of {len(report.operations)} operations stay in fp32, "
        f"{report.kept_share:.1%} of the multiply-accumulates; the rest in {plan.rest}"
    ]
    lines += [f"{operation.name}: {'; '.join(operation.reasons)}" for operation in kept]
    repeated = {
        "weights": weights, "variant": variant, "input": None if input == "float32" else input,
        "image_size": image_size, "task": None if task == "classify" else task, "levels": levels,
        "head_activation": head_activation,
        "weights_key": weights_key, "config": config,
        "mean": mean, "std": std,
    }  # fmt: skip
    lines.append(f"build it with: {export_command(out, plan.target, repeated)}")
    terminal.result({"path": str(out), "plan": plan, "report": report}, "\n".join(lines))
