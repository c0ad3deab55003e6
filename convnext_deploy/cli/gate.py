"""`gate`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..printing import Terminal, progress_bar
from .options import Debug, DeviceOption, Json, Quiet, Threads, Trust, given, one_of

EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


def gate(
    baseline: Annotated[Path, typer.Option(help="OUT.json of `eval --out OUT`, or an artifact folder.")],
    candidate: Annotated[Path, typer.Option(help="Likewise.")],
    max_drop: Annotated[float | None, typer.Option(help="Tolerated drop of top-1, in percentage points.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Chance of passing a drop at the limit; default 0.05.")] = None,
    limits: Annotated[Path | None, typer.Option(help="TOML file of limits; options go before it.")] = None,
    data: Annotated[str | None, typer.Option(help="Images to evaluate artifact folders on, as for `eval`.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split, where the source has several.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that keeps the evaluations; resumes when run again.")] = None,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    trust: Trust = False,
    markdown: Annotated[Path | None, typer.Option(help="Append the verdict to this file, as Markdown.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the verdict to this file, as JUnit XML.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Hold a candidate against its baseline. Exit code 0: PASS, 1: FAIL, 3: INCONCLUSIVE."""
    from .. import types

    for option, file in (("--markdown", markdown), ("--junit", junit)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise UsageError(f"{option} {file}; expected a file in a folder that exists")
    where = one_of("--device", device, types.Device)

    from .. import api, verdict
    from ..gate import limits_from, limits_from_toml
    from ..manifest import write_file

    settings = {}
    if limits is not None:
        try:
            settings = limits_from_toml(limits.read_text("utf-8"), str(limits))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--limits {limits} cannot be read: {error}") from None
    terminal = Terminal(json, quiet)
    with progress_bar(terminal) as progress:
        found = api.gate(
            baseline,
            candidate,
            limits=limits_from(settings | given(max_drop=max_drop, alpha=alpha)),
            data=data,
            split=split,
            out=out,
            device=where,
            threads=threads,
            trust=trust,
            progress=progress,
        )
    if markdown is not None:
        with markdown.open("a", encoding="utf-8") as file_:
            file_.write(verdict.markdown(found))
    if junit is not None:
        write_file(junit, verdict.junit(found))
    terminal.result(found, verdict.text(found))
    return EXIT_CODES[found.decision]
