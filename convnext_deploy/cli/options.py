"""What several commands share: their common options, and how an option's text becomes a value."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .terminal import Terminal

if TYPE_CHECKING:
    from ..data.sources import ClassOrder
    from ..records.manifest import BatchRange, HeadActivation

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json's document).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DATA, RUNTIME, OUTPUT = "Data and labels", "Runtime", "Output"  # panels of --help
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.", rich_help_panel=RUNTIME)]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Run code that an artifact of others brings; see SECURITY.md.", rich_help_panel=RUNTIME
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", help="CPU threads of the runtime. Default: the cores it may use.", rich_help_panel=RUNTIME
    ),
]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="On a GPU: replay a captured CUDA graph.", rich_help_panel=RUNTIME)
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", help="On a Ray cluster: HOST:PORT, auto, or local for this machine's cores.", rich_help_panel=RUNTIME
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a result that exists.", rich_help_panel=OUTPUT)]
LabelsOption = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="The model's class names in their order: a name a line, or JSON.", rich_help_panel=DATA
    ),
]


def _file(text: str) -> Path:
    from .. import arguments

    return arguments.file("file", text)


def _file_or_folder(text: str) -> Path:
    return _file(text) if Path(text).suffix else Path(text)


WRITES: dict[str, Any] = {"parser": _file, "metavar": "<path>"}  # of an option that names a file to write
WRITES_EITHER = WRITES | {"parser": _file_or_folder}  # or a folder, whose name has no suffix
AppendTo = Annotated[
    Path | None,
    typer.Option("--out", **WRITES, help="Append the result to this file, as one JSON line.", rich_help_panel=OUTPUT),
]


@contextmanager
def resumable(terminal: Terminal, kept: bool) -> Iterator[None]:
    """Says on Ctrl-C whether the same command goes on where it stopped."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.say(
            "the same command goes on where this one stopped" if kept else "nothing was kept; --out OUT would keep it"
        )
        raise


def one_of(option: str, value: str, words: Any) -> Any:
    from .. import arguments

    return arguments.one_of(option, value, words)


def batch_range(text: str, option: str = "--batch") -> "BatchRange":
    from .. import arguments

    return arguments.batch_range(option, text)


def image_size_of(text: str | None) -> tuple[int, int] | None:
    from .. import arguments

    return None if text is None else arguments.image_size("--image-size", text)


def head_activation_of(text: str | None) -> "HeadActivation | None":
    from ..records.manifest import HeadActivation

    return None if text is None else one_of("--head-activation", text, HeadActivation)


def class_order_of(text: str) -> "ClassOrder":
    order: ClassOrder = one_of("--class-order", text, ("torchvision", "timm"))
    return order


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}; expected numbers such as 0.485,0.456,0.406") from None


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
