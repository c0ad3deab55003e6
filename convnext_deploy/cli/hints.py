"""What to type next, ready to be copied. Words in capitals stand for what only the user knows."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from ..records.accuracy import ScoreVerdict, Verdict
    from ..records.manifest import Manifest

OTHER = "CANDIDATE"  # the artifact that is held against the one at hand
LIMIT = ("--max-drop", "0.5")  # percentage points


def command(verb: str, *words: object) -> str:
    """One command, quoted for a shell."""
    return shlex.join(["convnext-deploy", verb, *map(str, words)])


def typed(context: "typer.Context") -> list[str]:
    """The arguments behind the command's name as they were typed, but for how its results are printed.

    None are known where another program than ours calls the commands.
    """
    return [word for word in (context.obj or [])[1:] if word not in ("--json", "--quiet", "-q", "--debug")]


def export_command(plan: Path, format: str, *words: str) -> str:
    """The command that builds what a plan says.

    Args:
        words: the options that have to be repeated.
    """
    return command("export", "--plan", plan, "--format", format, *words)


def after_export(path: Path, record: "Manifest", data: Sequence[str]) -> tuple[str, ...]:
    """Use it and judge it; what has random weights, cannot run here, or is somebody else's graph is not asked.

    Args:
        data: the words that name labelled images, where the export was given some.
    """
    export = record.export
    where = _on(export.device)
    if record.splice is not None or any(parity.stand_in is not None for parity in record.parity):
        return (command("inspect", path),)
    sizes = () if export.batch.min <= 1 and export.batch.max >= 8 else ("--batch", export.batch.opt)
    bench = command("bench", path, *sizes, *where)
    if record.weights.random:
        return (bench,)
    if record.model.task in ("embed", "features"):
        return (command("predict", path, "IMAGE", "--out", f"{path}.npz", *where), bench)
    beside = () if record.model.task == "classify" else ("--annotations", "ANNOTATIONS")  # masks, or boxes
    labelled = data or ("--data", "IMAGES", *beside)
    return (
        command("predict", path, "IMAGE", *where),
        command("eval", path, *labelled, "--out", f"{path}-eval", *where),
    )


def after_eval(artifact: Path, out: Path | None, data: Sequence[str], device: str, trust: bool) -> tuple[str, ...]:
    """Hold another artifact against this one, on the same images.

    Args:
        out: with the result over all images, where it was kept.
        data: the words that name the images.
    """
    baseline = artifact if out is None else out.with_name(f"{out.name}.json")
    where = (*_on(device), *(("--trust",) if trust else ()))
    return (command("gate", "--baseline", baseline, "--candidate", OTHER, *data, *LIMIT, *where),)


def after_gate(
    verdict: "Verdict | ScoreVerdict", candidate: Path, words: Sequence[str], reported: bool, trust: bool
) -> tuple[str, ...]:
    """What passed is served, and asked again for every change.

    Args:
        words: the options of the gate, to be typed again.
        reported: they name a file that a build server shows.
    """
    if verdict.decision != "PASS":
        return ()
    in_ci = () if reported or not words else (f"{command('gate', *words, '--junit', 'gate.xml')}  # the same in CI",)
    served = (command("serve", candidate, *(("--trust",) if trust else ())),) if candidate.is_dir() else ()
    return (*served, *in_ci)


def after_bench(words: Sequence[str], save: Path | None) -> tuple[str, ...]:
    """A page of what was measured, and the same run held against it.

    Args:
        words: the arguments of the run, to be typed again.
        save: where its results are.
    """
    if save is None:
        return (command("bench", *words, "--save", "bench.jsonl"),)
    page = save.with_name(f"{save.stem}.html")
    again = [
        word
        for before, word in zip(("", *words), words, strict=False)
        if "--save" not in (before, word.partition("=")[0])
    ]
    return (command("report", save, "--out", page), command("bench", *again, "--against", save))


def request(address: str, token: bool, tensors: str | None = None) -> str:
    """The request that tries a server.

    Args:
        tensors: the model, where its outputs are no classes: what goes in and comes out is asked for.
    """
    asks = ["-H", "Authorization: Bearer TOKEN"] if token else []
    if tensors is not None:
        return shlex.join(["curl", *asks, f"{address}/v2/models/{tensors}"])
    return shlex.join(["curl", *asks, "--data-binary", "@IMAGE", f"{address}/classify"])


def _on(device: str) -> tuple[str, ...]:
    return () if device == "cpu" else ("--device", device)
