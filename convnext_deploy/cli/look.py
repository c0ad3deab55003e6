"""`inspect`, `list` and `doctor`: what is there."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .options import Debug, Json, Quiet, Trust
from .terminal import Terminal, details, fits_words, progress_bar


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What an artifact is, where it came from, whether its files are intact, and whether an engine fits this machine.

    A TensorRT engine file alone is looked at too. Code that others brought is not run without --trust.
    """
    from ..artifact import manifest
    from ..artifact.trust import built_here

    terminal = Terminal(json, quiet)
    if artifact.is_file():
        _refuse_other_files(artifact)
        from ..runtimes.tensorrt import preflight

        fits = preflight.preflight(artifact, trust=trust)
        terminal.result({"facts": fits.facts, "problems": fits.problems}, fits_words(fits.facts, fits.problems))
        return
    checked = manifest.verified(artifact)
    text = details(artifact, checked.manifest, checked.bytes)
    later = manifest.unread((artifact / manifest.MANIFEST_NAME).read_bytes(), checked.manifest)
    if later:
        text += f"\nof a later version, and not read: {', '.join(dict.fromkeys(later))}"
    if checked.manifest.export.format in ("tensorrt", "tensorrt_rtx"):
        from ..runtimes.tensorrt import preflight

        fits = preflight.inspected(artifact, checked.manifest, trust or built_here(checked.sha256))
        text += "\n" + fits_words(fits.facts, fits.problems)
    terminal.result(checked.manifest, text)


def _refuse_other_files(file: Path) -> None:
    """Refuse what `export` and other commands write beside engines, with the command that is for it."""
    from ..artifact.manifest import MANIFEST_NAME

    if file.name == MANIFEST_NAME or (file.suffix != ".engine" and (file.parent / MANIFEST_NAME).is_file()):
        raise UsageError(f"{file} is one file of an artifact; give its folder, {file.parent}")
    if file.suffix in (".json", ".jsonl", ".npz"):
        raise UsageError(
            f"{file} is no artifact; give a folder that `export` made, or see results with "
            f"`convnext-deploy report {file.with_suffix('.json' if file.suffix == '.npz' else file.suffix)} --out "
            "report.html`"
        )


def list_(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """The variants and the formats."""
    from .. import env, formats
    from ..models import registry

    terminal = Terminal(json, quiet)
    described = {name: registry.spec(name) for name in registry.VARIANTS}
    entries = {name: _listed(name) for name in formats.names()}
    if json:
        terminal.result({"variants": described, "formats": list(entries.values())})
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
    terminal.table("Variants", ["name", "depths", "widths", "differs by"], rows, whole=True)
    rows, lacking = [], []
    for name, entry in entries.items():
        if entry["missing"] or entry["missing_to_export"]:
            lacking.append(f"{name}: {env.pip_line(*entry['missing'], *entry['missing_to_export'])}")
        rows.append(
            [
                name,
                entry["summary"],
                " ".join(entry["precisions"]),
                "code" if entry["runs_code"] else "data",
                "missing" if entry["missing"] else "runs" if entry["missing_to_export"] else "installed",
            ]
        )
    terminal.table("Formats", ["name", "what", "precisions", "contains", "state"], rows, whole=True)
    for line in lacking:
        terminal.line(line)
    terminal.line("What contains code runs it when opened: others' artifacts of these need --trust.")


def _looked_for(names: Sequence[str], terminal: Terminal) -> Iterator[str]:
    """The names one by one, with a bar: whether a runtime works is known when it is imported, which takes seconds."""
    with progress_bar(terminal, "looking", transient=True) as progress:
        for number, name in enumerate(names):
            if progress is not None:
                progress(number, len(names), f"looking for {name}")
            yield name


def _listed(name: str) -> dict[str, Any]:
    """What `list` says of a format, whose packages are looked for and not imported."""
    from .. import env, formats

    fmt = formats.get(name)
    return {
        "name": fmt.name, "summary": fmt.summary, "runtime": fmt.runtime, "suffix": fmt.suffix,
        "precisions": sorted(fmt.precisions), "devices": sorted(fmt.devices), "runs_code": fmt.runs_code,
        "extra": fmt.extra, "missing": env.missing(fmt.requires),
        "missing_to_export": env.missing(fmt.build_requires),
    }  # fmt: skip


def doctor(
    clean: Annotated[bool, typer.Option("--clean", help="Empty the caches that are listed.")] = False,
    peaks: Annotated[
        bool,
        typer.Option("--peaks", help="Also measure for a second what this CPU multiplies (builds the native engine)."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What this machine can build and run, what to install for the rest, and what the caches contain."""
    from .. import env, formats
    from ..errors import ConvNextDeployError
    from ..native import library
    from ..quantization import saturation
    from ..workflows import caches

    terminal = Terminal(json, quiet)
    removed = caches.clean() if clean else None
    rates = _peaks(terminal) if peaks else None
    states, saturating = {}, []
    for name in _looked_for(formats.names(), terminal):
        try:
            fmt = formats.get(name)
            if fmt.eight_bits is not None and fmt.eight_bits.saturates:
                saturating.append(name)
            states[name] = formats.run_state(fmt)
        except ConvNextDeployError as error:
            states[name] = str(error).removeprefix(f"format {name}: ")
    try:
        interface = {what: str(path) for what, path in library.c_interface().items()}
    except ConvNextDeployError as error:
        interface = {"library": str(error)}
    gpus, words = env.nvidia_gpus(), saturation.words(saturating)
    kept = caches.found()
    document = {
        "machine": env.machine(), "eight_bits": words, "gpus": gpus, "versions": env.versions(),
        "formats": states, "c_interface": interface, "caches": kept, "removed": removed, "peaks": rates,
    }  # fmt: skip
    if json:
        terminal.result(document, "")
        return
    terminal.table("Machine", ["what", "value"], [*([k, str(v)] for k, v in env.machine().items()), ["8 bits", words]])
    if rates is not None:
        title = f"Products by {rates['path']}, GMAC/s"
        columns = ["type", *(f"{threads} threads" if threads > 1 else "1 thread" for threads in rates["threads"])]
        rows = [
            [type, *(f"{rate:.0f}" for rate in measured_rates)] for type, measured_rates in rates["gmacs_per_s"].items()
        ]
        terminal.table(title, columns, rows)
    terminal.table("NVIDIA GPUs", ["name"], [[gpu] for gpu in gpus] or [["none found"]])
    terminal.table("Versions", ["package", "version"], [[k, v] for k, v in env.versions().items()])
    terminal.table("Formats", ["name", "state"], [[k, v] for k, v in states.items()], whole=True)
    terminal.table("The CPU engine in C", ["what", "where"], [[k, v] for k, v in interface.items()], whole=True)
    rows = [[c.what, c.path, c.problem or f"{c.entries} in {c.bytes / 1e6:.1f} MB"] for c in kept]
    terminal.table("Caches", ["of", "where", "contains"], rows, whole=True)
    if removed is not None:
        terminal.line(f"removed {sum(c.entries for c in removed)} of {sum(c.bytes for c in removed) / 1e6:.1f} MB")


def _peaks(terminal: Terminal) -> dict[str, Any]:
    """What the CPU multiplies, on one core and on all that this process may use: the best of three short bursts.

    With a bar: where the engine is not built yet, a compiler takes half a minute first.
    """
    from .. import env
    from ..native import library, peak
    from ..native.packed import TYPES

    threads = sorted({1, env.usable_cores()})
    rates: dict[str, list[float]] = {type: [] for type in TYPES}
    bursts = [(type, count) for type in TYPES for count in threads]
    with progress_bar(terminal, "preparing the CPU engine", redraws_per_s=1, transient=True) as progress:
        path = library.chosen_isa(None) or library.isas()[0]
        for number, (type, count) in enumerate(bursts):
            if number and progress is not None:
                progress(number, len(bursts), f"multiplying in {type}")
            rates[type].append(max(peak.gmacs_per_s(type, count, 1 / 18, path) for _ in range(3)))
    return {"path": path, "threads": threads, "gmacs_per_s": rates}
