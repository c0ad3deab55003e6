"""`profile`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import AppendTo, Debug, DeviceOption, Json, Quiet, Threads, Trust, one_of
from .terminal import Terminal, progress_bar


def profile(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    batch: Annotated[int | None, typer.Option(help="Images at once; Default: what the artifact is tuned for.")] = None,
    steps: Annotated[int, typer.Option(help="Inferences to average over.")] = 20,
    layers: Annotated[int, typer.Option(min=1, help="How many of the slowest layers to print.")] = 10,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    trust: Trust = False,
    out: AppendTo = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Where the time goes: by layer and by kind of layer, from the runtime's own profiler."""
    from .. import api
    from ..artifact import manifest
    from ..records.base import Device
    from ..reports.results import by_kind

    if out is not None:
        manifest.check_file(out)
    terminal = Terminal(json, quiet)
    with progress_bar(terminal, "opening", redraws_per_s=1, transient=True) as progress:
        result = api.profile(
            artifact,
            batch=batch,
            steps=steps,
            device=one_of("--device", device, Device),
            threads=threads,
            trust=trust,
            progress=progress,
        )
    if out is not None:
        manifest.append_line(out, result)
    total = result.layers_ms
    kinds = [
        [kind, f"{ms:.3f}", f"{ms / total:.1%}", str(sum(layer.kind == kind for layer in result.layers))]
        for kind, ms in sorted(by_kind(result).items(), key=lambda item: -item[1])
    ]
    terminal.table(f"By kind: {result.format} {result.precision}, batch {result.batch}",
                   ["kind", "ms", "share", "layers"], kinds)  # fmt: skip
    slowest = [
        [layer.name, layer.op, layer.kind, layer.type, f"{layer.ms:.3f}", f"{layer.ms / total:.1%}"]
        for layer in result.layers[:layers]
    ]
    terminal.table(f"The {len(slowest)} slowest of {len(result.layers)} layers",
                   ["layer", "operation", "kind", "type", "ms", "share"], slowest)  # fmt: skip
    gap = result.wall_ms - total
    lines = [
        f"layers {total:.2f} ms of {result.wall_ms:.2f} ms on the clock: {gap:.2f} ms ({gap / result.wall_ms:.1%}) "
        f"outside every layer; {result.plain_ms:.2f} ms without {result.profiler}"
    ]
    if result.note is not None:
        lines.append(result.note)
    terminal.result(result, "\n".join(lines))
