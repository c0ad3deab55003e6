"""`gate`."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, plain
from . import hints
from .groups import Labelled, Meaning, ReduceLabels, grouped
from .options import DATA, OUTPUT, WRITES, Debug, DeviceOption, Json, Quiet, Threads, Trust, given, one_of, resumable
from .terminal import Terminal, progress_bar

EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


@grouped
def gate(
    *,
    context: typer.Context,
    baseline: Annotated[
        Path, typer.Option(help="The model to keep up with: OUT.json of `eval --out OUT`, or an artifact folder.")
    ],
    candidate: Annotated[Path, typer.Option(help="The same of the model that is judged.")],
    max_drop: Annotated[
        float | None,
        typer.Option(help="Tolerated drop of top-1, mAP, R2 or mIoU, in percentage points.", rich_help_panel="Limits"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Chance of passing a drop at the limit. Default: 0.05.", rich_help_panel="Limits"),
    ] = None,
    limits: Annotated[
        Path | None, typer.Option(help="TOML file of limits; options go before it.", rich_help_panel="Limits")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images to evaluate artifact folders on, as for `eval`.", rich_help_panel=DATA),
    ] = None,
    labelled: Labelled,
    meaning: Meaning,
    reduce_labels: ReduceLabels = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the evaluations; resumes when run again.", rich_help_panel=OUTPUT),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(**WRITES, help="Append the verdict to this file, as Markdown.", rich_help_panel=OUTPUT),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(**WRITES, help="Write the verdict to this file, as JUnit XML.", rich_help_panel=OUTPUT),
    ] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(
            **WRITES,
            help="Append decision, drop and images-needed to this file, as NAME=VALUE lines.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Hold a candidate against its baseline. Exit code 0: PASS, 1: FAIL, 3: INCONCLUSIVE."""
    from ..records.base import Device, content_of

    for option, file in (("--markdown", markdown), ("--junit", junit), ("--outputs", outputs)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise UsageError(f"{option} {file}; expected a file in a folder that exists")
    where = one_of("--device", device, Device)

    from .. import api
    from ..accuracy.gate import limits_from, limits_from_toml
    from ..artifact.manifest import write_file
    from . import words

    settings = {}
    if limits is not None:
        try:
            settings = limits_from_toml(content_of(limits).decode(), str(limits))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--limits {limits} cannot be read: {plain(error)}") from None
    terminal = Terminal(json, quiet)
    with progress_bar(terminal) as progress, resumable(terminal, out is not None):
        verdict = api.gate(
            baseline,
            candidate,
            limits=limits_from(settings | given(max_drop=max_drop, alpha=alpha)),
            data=data,
            problem=meaning.read(),
            reduce_labels=reduce_labels,
            out=out,
            device=where,
            threads=threads,
            trust=trust,
            progress=progress,
            say=terminal.say,
            **labelled.read(),
        )
    names = (baseline, candidate)
    if markdown is not None:
        _append(markdown, words.markdown(verdict, names))
    if junit is not None:
        write_file(junit, words.junit(verdict, names))
    if outputs is not None:
        _append(outputs, words.outputs(verdict))
    reported = markdown is not None or junit is not None or outputs is not None
    next_ = hints.after_gate(verdict, candidate, hints.typed(context), reported, trust)
    terminal.result(verdict, words.text(verdict, names), next_)
    return EXIT_CODES[verdict.decision]


def record_error(arguments: Sequence[str], message: str) -> None:
    """Write why there is no verdict to the files that would have held it: a build server shows nothing else.

    The files are looked for in the arguments themselves, because these may be what is wrong.
    """
    from ..artifact.manifest import write_file
    from . import words

    with contextlib.suppress(OSError, UsageError):  # a file that cannot be written is what the message is about
        for path in _values(arguments, "--markdown"):
            _append(path, words.error_markdown(message))
        for path in _values(arguments, "--outputs"):
            _append(path, words.ERROR_OUTPUTS)
        for path in _values(arguments, "--junit"):
            write_file(path, words.error_junit(message))


def _values(arguments: Sequence[str], option: str) -> list[Path]:
    values = [text.partition("=")[2] for text in arguments if text.startswith(f"{option}=")]
    values += [value for name, value in itertools.pairwise(arguments) if name == option]
    return [Path(text) for text in values[-1:] if not text.endswith("/")]  # which names a folder


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
