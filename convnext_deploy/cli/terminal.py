"""How results reach a terminal: JSON or words on stdout, progress on stderr."""

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import licences
from ..errors import counted, printable

if TYPE_CHECKING:
    from ..records.manifest import Manifest, Parity

WIDE = 200  # columns of a reader that is not a terminal
UNBOUND = 10_000  # columns, to ask what a table would take


@dataclass(frozen=True)
class Terminal:
    """Where a command's words go: results to stdout, progress to stderr."""

    json: bool
    quiet: bool

    def say(self, text: str) -> None:
        if not self.quiet and not self.json:
            print(
                printable(f"{text}\n"), end="", file=sys.stderr, flush=True
            )  # in one piece: builds speak from several threads

    def result(self, document: Any, lines: str = "", next: Sequence[str] = ()) -> None:
        """The one result of a command: `document` with --json, else `lines`.

        Args:
            next: commands to go on with, ready to be copied: the field `next` of the document, or lines on stderr.
        """
        if self.json:
            if next:
                import msgspec

                document = msgspec.to_builtins(document) | {"next": list(next)}
            print_json(document)
        elif not self.quiet:
            if lines:
                print(wrapped(printable(lines)), flush=True)
            for number, command in enumerate(next):
                self.say(f"{'     ' if number else 'next:'} {command}")

    def line(self, text: str) -> None:
        """A line of words between tables."""
        if not self.quiet and not self.json:
            print(printable(text))

    def table(self, title: str, columns: list[str], rows: list[list[str]], whole: bool = False) -> None:
        """A table as wide as the terminal, whose words are broken rather than cut off.

        Where not even its longest words fit beside each other, each row is a paragraph with a line a column.

        Args:
            whole: words of the first column stay whole.
        """
        if self.quiet or self.json:
            return
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        console = Console(width=console_width(), highlight=False)
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, no_wrap=whole and not number, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # a str would be read as markup, and "[openvino]" as a style
        if (
            len(columns) < 3
            or Measurement.get(console, console.options.update(max_width=UNBOUND), table).minimum <= console.width
        ):
            console.print(table)
            return
        console.print(Text(title, "italic"))
        for row in rows:
            console.print(Text(row[0], "bold"))
            for column, cell in zip(columns[1:], row[1:], strict=True):
                if cell:
                    console.print(Text(f"  {column}: {cell}"))


def wrapped(text: str) -> str:
    """Each line broken between words where a terminal is narrower, and its rest indented.

    No word is broken: a path or a command can still be copied. In a file or a pipe a line stays a line.
    """
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns  # COLUMNS, where it is set, else the terminal's
    lines = []
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line, width, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def console_width() -> int | None:
    """In a file or a pipe nothing is cut off, unless COLUMNS asks for it: rich would take such a reader to have 80."""
    return None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal() else WIDE


def print_json(document: Any) -> None:
    """One line on stdout; what its encoding does not have is written as JSON escapes it."""
    import msgspec

    text = msgspec.json.encode(document).decode()
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        import json

        text = json.dumps(json.loads(text), separators=(",", ":"))
    print(text)


@contextmanager
def stdout_kept() -> Iterator[None]:
    """What libraries print goes to stderr: Ray reports nodes that die on stdout, which is the result's."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress_bar(
    terminal: Terminal, phase: str = "evaluating", *, redraws_per_s: int = 10, transient: bool = False
) -> Iterator[Any]:
    """A bar on stderr, with what is being done and the time that is left; None where nobody watches.

    What it returns is called with (steps done, steps in all) and, from then on, the name of another phase. While the
    steps are not known, it shows the time since the phase began.

    Args:
        phase: what is being done first.
        redraws_per_s: 1 while something is being timed, for drawing takes time.
        transient: it disappears at the end.
    """
    if terminal.quiet or terminal.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    clock = Clock()

    class Steps(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(clock.words(time.monotonic()))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), Steps(), Left())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=redraws_per_s, transient=transient) as bar:
        task = bar.add_task(phase, total=None)
        now = phase

        def update(done: int, total: int | None, what: str | None = None) -> None:
            nonlocal now
            if what is not None and what != now:
                now = what
                if not transient:  # a phase of its own: its speed says nothing of the one before
                    bar.reset(task, total=total)
                    clock.begin(time.monotonic())
            clock.update(done, total, time.monotonic())
            bar.update(task, completed=done, total=total, description=now)

        yield update


class Clock:
    """The time that is left of steps that are as long as those so far; it goes on while a long one takes its time."""

    def __init__(self) -> None:
        self.begin(time.monotonic())

    def begin(self, now_s: float) -> None:
        self._began_s = now_s
        self._first: tuple[int, float] | None = None  # (steps done, when): what an earlier call did took no time here
        self._done = 0
        self._ends_s: float | None = None

    def update(self, done: int, total: int | None, now_s: float) -> None:
        if self._first is None or done < self._done:  # the latter where the same steps begin again
            self._first = (done, now_s)
        self._done = done
        first, since_s = self._first
        known = total is not None and done > first
        self._ends_s = now_s + (now_s - since_s) * (total - done) / (done - first) if known and total else None

    def words(self, now_s: float) -> str:
        left_s = None if self._ends_s is None or self._ends_s < now_s else self._ends_s - now_s
        return clock_words(1, left_s, now_s - self._began_s)


def clock_words(total: float | None, remaining_s: float | None, elapsed_s: float | None) -> str:
    """The time that is left, where it is known; else the time so far, called that."""
    if total is not None and remaining_s is not None:
        return f"{_clock(remaining_s)} left"
    return f"{_clock(elapsed_s or 0)} so far"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def summary(path: Path, record: "Manifest", size: int) -> str:
    type = record.export.eight_bits or record.export.precision
    lines = [f"{path}: {record.model.architecture} as {record.export.format} {type}, {size / 1e6:.1f} MB"]
    if record.weights.licence and licences.words(record.weights.licence) != record.weights.licence:
        lines.append(f"LICENCE of the weights: {licences.words(record.weights.licence)}")
    for parity in record.parity:
        what = "top-1 agreement" if record.model.detection is None else "detections that agree"
        agreement = "" if parity.top1_agreement is None else f", {what} {parity.top1_agreement:.1%}"
        if parity.stand_in is not None:
            lines.append(f"NOT RUN: {parity.stand_in}")
        compared = f"relative error {_known(parity.relative_error, '.2g')}"
        if record.model.detection is None:  # whose detections have none
            compared += f", cosine {_known(parity.cosine, '.7f')}"
        if record.export.argmax:
            compared = "each pixel's class"
        ties = f" ({parity.near_ties} near-ties)" if parity.near_ties else ""
        lines.append(
            f"verified on {_images(record, parity)}{_reference(record, parity.reference)}: {compared}{agreement}{ties}"
        )
    lines += _splice(record)
    lines.append("multiply-accumulates: " + _truth(record))
    lines += _elsewhere(record)
    assumed = record.preprocessing.assumed
    if assumed and not record.weights.random:
        known = {"image_size": "x".join(map(str, record.model.image_size)), "global_pool": "avg"}
        said = ", ".join(
            f"{name} {known.get(name) or getattr(record.preprocessing, name, 'unknown')}" for name in assumed
        )
        lines.append(
            f"assumed, nothing beside the checkpoint says it: {said} "
            "(--image-size, --mean, --std, --crop-pct, --interpolation, or a --config that says them)"
        )
    lines += _preferred(record)
    if record.weights.random:
        lines.append("WEIGHTS ARE RANDOM: for timing and trying out, not for predictions")
    return "\n".join(lines)


def _images(record: "Manifest", parity: "Parity") -> str:
    """How many images, of what source, and where they have a size of their own or were compared inside a graph."""
    name, cuts, _ = parity.images.partition(" at the cuts" if record.splice is not None else "\0")
    size = re.fullmatch(r"(.*), (\d+x\d+)", name) if record.export.dynamic_image_size else None
    name, pixels = (name, "") if size is None else (size[1], f" of {size[2]} pixels")
    return f"{counted(parity.samples, f'{name} image')}{pixels}{cuts}"


def _splice(record: "Manifest") -> list[str]:
    """Of somebody's graph: where the ConvNeXt stands in it, what it puts out, and how fast it is."""
    splice = record.splice
    if splice is None:
        return []
    out, put = splice.nodes
    lines = [
        f"in the place of the ConvNeXt of {splice.graph} (opset {splice.opset}): {counted(put, 'node')} for "
        f"{out}, from "
        f"{splice.input} to {', '.join(splice.cuts)}"
    ]
    if splice.not_run is not None:
        lines.append(f"NOT RUN behind the cuts: {splice.not_run}")
    for end in splice.ends:
        if end.relative_error is not None:
            note = f" ({end.note})" if end.note else ""
            lines.append(f"output {end.output}: relative error {end.relative_error:.2g} from what it was{note}")
        elif end.note is not None:
            lines.append(f"output {end.output}: {end.note}")
    if splice.before_ms:
        lines.append(
            f"one batch through the whole graph, {len(splice.before_ms)} runs of each in turns: "
            f"{_spread(splice.before_ms)} before, {_spread(splice.after_ms)} now"
        )
    return lines


def _elsewhere(record: "Manifest") -> list[str]:
    """Of a file that others may open: what its products are on other CPUs."""
    from ..quantization import saturation

    quantized = record.export.quantization
    line = None if quantized is None else saturation.elsewhere(quantized)
    return [] if line is None else [line]


def _spread(samples: tuple[float, ...]) -> str:
    ordered = sorted(samples)
    return f"{ordered[len(ordered) // 2]:.3g} ms ({ordered[0]:.3g} to {ordered[-1]:.3g})"


def _known(value: float | None, form: str) -> str:
    """None: the outputs could not be compared."""
    return "unknown" if value is None else format(value, form)


def _reference(record: "Manifest", reference: str) -> str:
    """What the outputs were compared with, where there are two references."""
    if reference == "type":
        return f" against {record.export.precision} in PyTorch"
    if record.export.quantization is None:
        return ""
    return " against the plan's simulation" if reference == "simulation" else " against the fp32 source"


def _truth(record: "Manifest") -> str:
    def words(shares: dict[str, float]) -> str:
        return ", ".join(f"{share:.0%} {name}" for name, share in shares.items())

    parts = [f"{words(record.precision.graph)} in the graph"] if record.precision.graph else []
    if record.precision.executed is not None:
        parts.append(f"{words(record.precision.executed)} as executed here")
    if record.precision.quantized:
        parts.append(f"{counted(record.precision.quantized, 'product')} in 8 bits")
    text = ", ".join(parts)
    return text + (f" ({record.precision.note})" if record.precision.note else "")


def fits_words(facts: tuple[str, ...], problems: tuple[str, ...]) -> str:
    ends = [f"cannot run here: {problem}" for problem in problems] or ["runs here: it was loaded in a trial process"]
    return "\n".join((*facts, *ends))


def details(path: Path, manifest: "Manifest", size: int) -> str:
    weights, model, export = manifest.weights, manifest.model, manifest.export
    origin = "random" if weights.random else f"{weights.source} ({weights.layout} layout)"
    if weights.revision is not None:
        origin += f" at revision {weights.revision}"
    preprocessing = manifest.preprocessing
    lines = [
        summary(path, manifest, size),
        f"weights: {origin}, licence {weights.licence or 'unknown'}, tensors sha256 {weights.tensors_sha256[:16]}",
        f"task: {model.task}, {counted(model.num_classes, 'class')}, {'x'.join(map(str, model.image_size))} pixels",
        f"preprocessing: mean {preprocessing.mean} std {preprocessing.std} {preprocessing.interpolation} "
        f"crop {preprocessing.crop_pct} {preprocessing.crop_mode}"
        + (", turned as EXIF says" if preprocessing.exif_orientation else ""),
        *_provenance(manifest),
        f"batch: {export.batch.min} to {export.batch.max}, tuned for {export.batch.opt}; built for {export.device}",
    ]
    for kind, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        lines += [f"{kind}: {t.name} {t.dtype} ({', '.join(map(str, t.shape))})" for t in tensors]
    lines += [f"pass: {record.name} moved the outputs by {record.relative_change:.1e}" for record in manifest.passes]
    lines += [_oracle(manifest)] if manifest.oracle else []
    lines += [_read_back(manifest)] if manifest.read_back else []
    lines += [f"file: {file.path} {file.bytes} bytes sha256 {file.sha256[:16]} intact" for file in manifest.files]
    lines.append(f"made {manifest.created} by {manifest.tool}")
    return "\n".join(lines)


def _preferred(record: "Manifest") -> list[str]:
    """What labelled images prefer to what the user gave."""
    from ..models import provenance

    return provenance.better(record.provenance)


def _provenance(record: "Manifest") -> list[str]:
    """Who said each fact that tensors do not show."""
    from ..models import provenance

    return [f"  {line}" for line in provenance.lines(record.provenance)]


def _oracle(record: "Manifest") -> str:
    """Who else said that the checkpoint was read as what it is."""
    oracle = record.oracle
    assert oracle is not None
    if oracle.name == "self":
        return "oracle: nobody but this package" + (f" ({oracle.why})" if oracle.why else "")
    error = "" if oracle.relative_error is None else f", outputs within {oracle.relative_error:.1e}"
    pixels = f", preprocessing as {oracle.preprocessing}'s" if oracle.preprocessing else ""
    return f"oracle: {oracle.name}{error}{pixels}"


def _read_back(record: "Manifest") -> str:
    """What of the files was compared with the module that they were built from."""
    tensors = record.read_back
    assert tensors is not None
    counts = [(tensors.tensors, "tensor"), (tensors.epsilons, "epsilon"), (tensors.activations, "activation")]
    parts = [counted(count, what) for count, what in counts if count]
    read = f"{', '.join(parts)} as the module had them" if parts else "nothing"
    return f"read back: {read}" + (f"; not compared: {tensors.unread}" if tensors.unread else "")
