"""`inspect`, `list` and `doctor`: what is there, without changing it."""

from pathlib import Path
from typing import Annotated

import typer

from ..printing import Terminal, details, fits_words
from .options import Debug, Json, Quiet


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What an artifact is, where it came from, whether its files are intact, and whether an engine fits this machine.

    A TensorRT engine file alone is looked at too.
    """
    from .. import manifest

    terminal = Terminal(json, quiet)
    if artifact.is_file():
        from ..lower import nvinfer_run

        fits = nvinfer_run.preflight(artifact)
        terminal.result({"facts": fits.facts, "problems": fits.problems}, fits_words(fits.facts, fits.problems))
        return
    opened = manifest.verified(artifact)
    text = details(artifact, opened.manifest, opened.bytes)
    if opened.manifest.export.format in ("tensorrt", "tensorrt_rtx"):
        from ..lower import nvinfer_run

        fits = nvinfer_run.inspected(artifact, opened.manifest)
        text += "\n" + fits_words(fits.facts, fits.problems)
    terminal.result(opened.manifest, text)


def list_(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """The variants and the formats."""
    from .. import env, formats
    from ..models import registry

    terminal = Terminal(json, quiet)
    described = {name: registry.spec(name) for name in registry.VARIANTS}
    known = [formats.get(name) for name in formats.names()]
    if json:
        listed = [
            {
                "name": fmt.name, "summary": fmt.summary, "runtime": fmt.runtime, "suffix": fmt.suffix,
                "precisions": sorted(fmt.precisions), "devices": sorted(fmt.devices),
                "extra": fmt.extra, "missing": env.missing(fmt.requires),
            }
            for fmt in known
        ]  # fmt: skip
        terminal.result({"variants": described, "formats": listed}, "")
        return
    rows = [
        [
            name,
            "-".join(map(str, spec.depths)),
            "-".join(map(str, spec.dims)),
            ", ".join(registry.peculiarities(name)),
        ]
        for name, spec in described.items()
    ]
    terminal.table("Variants", ["name", "depths", "widths", "differs by"], rows)
    rows = []
    for fmt in known:
        absent = env.missing(fmt.requires)
        state = env.missing_line(absent[0], fmt.extra or "dev") if absent else "installed"
        rows.append([fmt.name, fmt.summary, " ".join(sorted(fmt.precisions)), fmt.runtime, state])
    terminal.table("Formats", ["name", "what", "precisions", "runtime", "state"], rows)


def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """What this machine can build and run, and what to install for the rest."""
    from .. import env, formats, saturation
    from ..errors import MissingPackageError

    terminal = Terminal(json, quiet)
    states = {}
    for name in formats.names():
        try:
            states[name] = formats.state(formats.get(name))
        except MissingPackageError as error:
            states[name] = str(error)
    gpus = env.nvidia_gpus()
    document = {
        "machine": env.machine(), "eight_bits": saturation.words(), "gpus": gpus, "versions": env.versions(),
        "formats": states,
    }  # fmt: skip
    if json:
        terminal.result(document, "")
        return
    terminal.table(
        "Machine", ["what", "value"], [*([k, str(v)] for k, v in env.machine().items()), ["8 bits", saturation.words()]]
    )
    terminal.table("NVIDIA GPUs", ["name"], [[gpu] for gpu in gpus] or [["none found"]])
    terminal.table("Versions", ["package", "version"], [[k, v] for k, v in env.versions().items()])
    terminal.table("Formats", ["name", "state"], [[k, v] for k, v in states.items()])
