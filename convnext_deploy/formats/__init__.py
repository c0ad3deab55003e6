"""One file a deployable format; the file's name is the format's name, and nothing here changes when one is added."""

import difflib
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..arguments import shown
from ..artifact import trust as trusted
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions, Session
from ..env import PACKAGES, broken_line, import_failure, import_line, missing, missing_line, pip_line
from ..errors import ArtifactError, MissingPackageError, UsageError, plain
from ..quantization.eight_bits import EightBits
from ..records.base import Device
from .base import Format

_NOT_FORMATS = {"__init__", "base"}


@cache
def names() -> tuple[str, ...]:
    """All format names, found by looking into this folder; nothing is imported."""
    files = (file for folder in __path__ for file in Path(folder).glob("*.py"))
    return tuple(sorted(file.stem for file in files if file.stem not in _NOT_FORMATS))


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: unknown, with the list and the nearest match.
        MissingPackageError: a package that it is written with is not installed, or cannot be imported.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown format {shown(name)}{hint} (formats: {', '.join(names())})")
    try:
        fmt = importlib.import_module(f"{__name__}.{name}").FORMAT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise MissingPackageError(f"format {name}: {import_line(error)}") from None
    except OSError as error:  # a shared library of such a package lacks one of its own
        reason = plain(error)
        raise MissingPackageError(f"format {name}: a package it needs cannot be imported: {reason}") from None
    assert isinstance(fmt, Format)
    assert fmt.name == name
    return fmt


def having(fact: Callable[[Format], bool]) -> str:
    """The names of the formats of which a fact is true, in words, of those that can be imported here."""
    able = []
    for name in names():
        try:
            able += [name] if fact(get(name)) else []
        except MissingPackageError:
            continue
    return ", ".join(able)


def eight_bits_of(name: str) -> EightBits:
    """How the format of that name computes in 8 bits.

    Raises:
        UsageError: it does not, or there is none of that name.
    """
    how = get(name).eight_bits
    if how is None:
        able = having(lambda fmt: fmt.eight_bits is not None)
        raise UsageError(f"format {name} takes no plan in 8 bits; expected one of {able}")
    return how


def require(fmt: Format, build: bool = False) -> None:
    """Refuse a format whose packages are not installed.

    Args:
        build: also those that only building an artifact needs.

    Raises:
        MissingPackageError: the `pip install` to run.
    """
    absent = missing(fmt.build_requires + fmt.requires if build else fmt.requires)
    if absent:
        raise MissingPackageError(f"format {fmt.name}: {missing_line(*absent)}")


def state(fmt: Format) -> str:
    """Whether it can be built here, in a few words.

    Raises:
        MissingPackageError: what to install.
    """
    absent = missing(fmt.build_requires + fmt.requires)
    if absent:
        raise MissingPackageError(missing_line(*absent))
    return fmt.ready()


def run_state(fmt: Format) -> str:
    """Whether artifacts of it run here, and whether they can be built, in a few words. Its packages are imported.

    Raises:
        MissingPackageError: what to install or to mend, so that they run.
    """
    absent = missing(fmt.requires)
    if absent:
        raise MissingPackageError(missing_line(*absent))
    broken = _broken(fmt.requires)
    if broken:
        raise MissingPackageError(broken)
    lacking = missing(fmt.build_requires)
    to_build = pip_line(*lacking) if lacking else _broken(fmt.build_requires)
    return f"{fmt.ready()}, to run; to export: {to_build}" if to_build else fmt.ready()


def _broken(modules: tuple[str, ...]) -> str | None:
    """Which of the modules that are installed cannot be imported, and what to do; None where all can."""
    for module in modules:
        reason = import_failure(module)
        if reason is not None:
            return broken_line(module, reason)
    return None


def of(artifact: Artifact) -> Format:
    """The format of an artifact.

    Raises:
        ArtifactError: there is none of the name in its manifest.
    """
    name = artifact.manifest.export.format
    if name not in names():
        raise ArtifactError(f"{artifact.path} is of format {name!r}, which is none of {', '.join(names())}")
    return get(name)


def opened(artifact: Artifact, options: RunOptions, trust: bool = False) -> Session:
    """A session of a verified artifact.

    Args:
        trust: run the code that it brings, whoever made it.

    Raises:
        ArtifactError: it is of a format that is not known, lacks the format's file, or brings code that is not trusted.
        MissingPackageError: the runtime is not installed.
        UsageError: it does not run on the device, or replays no CUDA graph there.
    """
    fmt = of(artifact)
    if options.cuda_graph and not (fmt.cuda_graphs and options.device == "cuda"):
        able = having(lambda other: other.cuda_graphs)
        raise UsageError(f"format {fmt.name} replays no CUDA graph on {options.device}; {able} do on cuda")
    require(fmt)
    refuse_device(fmt, options.device)
    main = f"model{fmt.suffix}"
    if not any(file.path == main for file in artifact.manifest.files):
        raise ArtifactError(f"{artifact.path} lists no {main}, which format {fmt.name} opens; export the model again")
    refuse_untrusted(fmt, artifact, trust)
    return fmt.load(artifact.path, artifact.manifest, options)


def refuse_untrusted(fmt: Format, artifact: Artifact, trust: bool = False) -> None:
    """Refuse an artifact that brings code, unless this user built it or trusts who did.

    Raises:
        ArtifactError: with what to do.
    """
    if fmt.runs_code and not trust and not trusted.built_here(artifact.sha256):
        raise ArtifactError(
            f"{artifact.path}: format {fmt.name} runs code that the artifact brings, and you did not build it here; "
            "if you trust who did, give --trust (in Python trust=True), else take a format that contains data only"
        )


def refuse_device(fmt: Format, device: Device) -> None:
    """Refuse a device that the format does not run on."""
    if device not in fmt.devices:
        raise UsageError(f"format {fmt.name} runs on {', '.join(sorted(fmt.devices))}, not on {device}")
