"""The native CPU engine's shared library: the wheel's, or built once by this machine's compiler; used with ctypes."""

import ctypes
import functools
import os
import platform
from pathlib import Path

from ..artifact import private, staging
from ..artifact.manifest import sha256_of
from ..errors import BuildError, MissingPackageError, UsageError, plain
from . import shipped
from .compiler import (
    COMPILERS,
    FLAGS,
    SOURCES,
    compile_library,
    compiler_key,
    find_compiler,
    other_machine,
    source_key,
    units,
)

__all__ = [
    "COMPILERS", "FLAGS", "SOURCES", "build", "c_interface", "cached", "chosen_isa", "clean", "find_compiler",
    "isas", "load", "opened", "refused", "slower", "state", "units",
]  # fmt: skip

BUILD_NAME = "build"  # of the temporary folders in the cache
ISA_VARIABLE = "CONVNEXT_DEPLOY_ISA"


class Info(ctypes.Structure):
    """`cnxt_info`."""

    _fields_ = (
        ("input", ctypes.c_uint32), ("in_chans", ctypes.c_uint32), ("outputs", ctypes.c_uint32),
        ("channels", ctypes.c_uint32 * 4), ("heights", ctypes.c_uint32 * 4), ("widths", ctypes.c_uint32 * 4),
        ("is_map", ctypes.c_uint32), ("operations", ctypes.c_uint32),
        ("products", ctypes.c_uint32 * 3), ("multiply_accumulates", ctypes.c_uint64 * 3),
    )  # fmt: skip


class Options(ctypes.Structure):
    """`cnxt_options`."""

    _fields_ = (
        ("batch", ctypes.c_uint32), ("height", ctypes.c_uint32), ("width", ctypes.c_uint32),
        ("threads", ctypes.c_uint32), ("isa", ctypes.c_char_p),
    )  # fmt: skip


class Resize(ctypes.Structure):
    """`cnxt_resize`."""

    _fields_ = (
        ("source_height", ctypes.c_uint32), ("source_width", ctypes.c_uint32), ("row_bytes", ctypes.c_size_t),
        ("pixel_bytes", ctypes.c_uint32), ("grey", ctypes.c_uint32), ("columns_first", ctypes.c_uint32),
        ("height", ctypes.c_uint32), ("width", ctypes.c_uint32), ("top", ctypes.c_uint32), ("left", ctypes.c_uint32),
        ("rows", ctypes.c_uint32), ("columns", ctypes.c_uint32), ("filter", ctypes.c_uint32),
    )  # fmt: skip


class TimingEntry(ctypes.Structure):
    """`cnxt_timing`."""

    _fields_ = (
        ("operation", ctypes.c_uint32), ("part", ctypes.c_uint32), ("type", ctypes.c_uint32),
        ("executed", ctypes.c_uint32), ("ms", ctypes.c_double),
    )  # fmt: skip


def cache_folder() -> Path:
    """Where built libraries are kept."""
    return private.cache_root() / "native"


def build(folder: Path | None = None, extra_flags: tuple[str, ...] = ()) -> Path:
    """The shared library for these sources, this compiler and these flags; compiled where it is not there yet.

    Of the package's own sources and flags, the library that the wheel brought is taken, whatever compiler is here. Of
    any number of processes one compiles, in a folder of its own that it renames into place, and the others wait.
    Where the compiler is gone, what it built from the same sources with the same flags is taken. A library's name
    ends in its SHA-256, and one that no longer has it is removed and built again: opening a damaged one can kill the
    process. The folder has to be this user's alone, since what is there is run.

    Args:
        folder: None: the wheel's library, else `cache_folder()`.
        extra_flags: for every file, such as those of a sanitizer.

    Raises:
        MissingPackageError: no compiler.
        BuildError: the wheel's library is damaged, the compiler refuses a file or is for another machine, or the folder
            cannot be written.
        UsageError: the folder is not this user's alone.
    """
    if folder is None and not extra_flags:
        brought = shipped.library()
        if brought is not None:
            return brought
    folder = cache_folder() if folder is None else folder
    stem = f"libconvnext_deploy-{source_key(extra_flags)}"
    try:
        compiler = find_compiler()
    except MissingPackageError:
        intact = _intact(folder, stem)
        if intact is None:
            raise
        return intact
    stem = f"{stem}-{compiler_key(compiler)}"
    try:
        private.made(folder)
        intact = _intact(folder, stem)
        if intact is not None:
            return intact
        other = other_machine(compiler)
        if other:
            raise BuildError(
                f"{compiler} makes programs for {other}, and this machine is {platform.machine()}; "
                "name a compiler for this machine in $CXX, or none"
            )
        with staging.one_at_a_time(folder):
            intact = _intact(folder, stem)
            if intact is not None:
                return intact  # which another has compiled meanwhile
            with staging.folder_for(folder / BUILD_NAME) as work:
                built = compile_library(compiler, work, extra_flags)
                path = folder / f"{stem}-{sha256_of(built)}.so"
                os.replace(built, path)
            staging.clear(folder / BUILD_NAME)
    except OSError as error:
        raise BuildError(
            f"the native engine cannot be built into {folder}: {plain(error)}; set XDG_CACHE_HOME to a folder of "
            "your own that can be written"
        ) from None
    return path


def _intact(folder: Path, stem: str) -> Path | None:
    """A library of that name whose content has the hash that its name ends in; the damaged ones are removed.

    Raises:
        UsageError: others could have put it there.
    """
    if not folder.is_dir():
        return None
    private.checked(folder)
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if not path.is_symlink() and path.is_file() and sha256_of(path) == path.stem.rpartition("-")[2]:
            return path
        path.unlink(missing_ok=True)  # another process may have found it damaged too
    return None


def clean() -> list[tuple[Path, int]]:
    """Empty the cache of what this package put there, which is built again when it is needed.

    Returns:
        The libraries that were removed, and their bytes.

    Raises:
        UsageError: the folder is not this user's alone.
    """
    libraries = cached()
    for path, _ in libraries:
        path.unlink(missing_ok=True)
    staging.clear(cache_folder() / BUILD_NAME)
    return libraries


def cached() -> list[tuple[Path, int]]:
    """Every library in the cache, of any version, and its bytes.

    Raises:
        UsageError: the folder is not this user's alone.
    """
    folder = cache_folder()
    if not folder.is_dir():
        return []
    private.checked(folder)
    return [(path, path.lstat().st_size) for path in sorted(folder.glob("libconvnext_deploy-*.so"))]


def state() -> str:
    """In a few words: which path this CPU takes, or what will build the engine at its first use. Builds nothing.

    Raises:
        MissingPackageError: it is not built, and there is no compiler.
    """
    built = _here()
    if built is None:
        return f"ready, {find_compiler()} builds it at first use"
    here = opened(built)
    return "; ".join(filter(None, (f"ready, path {isas(here)[0]}", refused(here), slower(here))))


def is_built() -> bool:
    """Whether the engine runs here without being compiled first."""
    return _here() is not None


def there() -> ctypes.CDLL | None:
    """The library of the wheel, or one that was built before by any compiler; None: there is none. Builds nothing.

    Raises:
        BuildError, UsageError: see `build`.
        OSError: the system does not open it.
    """
    built = _here()
    return None if built is None else opened(built)


def _here() -> Path | None:
    """The wheel's library, or the one that was built before."""
    return shipped.library() or _intact(cache_folder(), f"libconvnext_deploy-{source_key(())}")


def c_interface() -> dict[str, Path]:
    """Where C programs find what they are built with: header, library, and from a wheel CMake's file and an example.

    Raises:
        BuildError, UsageError: see `build`.
    """
    built = _here()
    if built is not None and built.parent == shipped.FOLDER:
        header = shipped.FOLDER / "include" / shipped.HEADER
        return {"library": built, "header": header, "CMake": shipped.FOLDER, "example": shipped.EXAMPLE}
    return ({"library": built} if built else {}) | {"header": SOURCES / shipped.HEADER}


def load(isa: str | None = None) -> ctypes.CDLL:
    """The library, built first where it is not.

    Args:
        isa: a path that the caller is about to use; refused where this CPU does not have it.

    Raises:
        MissingPackageError, BuildError: see `build`.
        UsageError: this CPU does not have that path, or see `build`.
    """
    library = opened(_built(cache_folder(), os.environ.get("CXX")))
    available = isas(library)
    if isa is not None and isa not in available:
        lacking = refused(library)
        raise UsageError(
            f"this CPU has no path {isa!r}; it has {', '.join(available)}" + (f"; {lacking}" if lacking else "")
        )
    return library


@functools.cache
def _built(folder: Path, _: str | None) -> Path:
    """`build`, asked once a process for one cache folder and compiler."""
    return build()


@functools.cache
def opened(path: Path) -> ctypes.CDLL:
    """A built library with the types of its functions."""
    library = ctypes.CDLL(str(path))
    void, text, size, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
    signatures = {
        "cnxt_isas": (text, []),
        "cnxt_isas_refused": (text, []),
        "cnxt_isas_slower": (text, []),
        "cnxt_model_open": (number, [void, size, ctypes.POINTER(void), text, size]),
        "cnxt_model_open_file": (number, [text, ctypes.POINTER(void), text, size]),
        "cnxt_model_close": (None, [void]),
        "cnxt_model_info": (None, [void, ctypes.POINTER(Info)]),
        "cnxt_session_open": (number, [void, ctypes.POINTER(Options), ctypes.POINTER(void), text, size]),
        "cnxt_session_close": (None, [void]),
        "cnxt_session_info": (None, [void, ctypes.POINTER(Info)]),
        "cnxt_session_isa": (text, [void]),
        "cnxt_session_run": (number, [void, void, ctypes.POINTER(void)]),
        "cnxt_image_resize": (number, [text, ctypes.POINTER(Resize), void, void, text, size]),
        "cnxt_peak": (
            number,
            [text, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_double, ctypes.POINTER(ctypes.c_double)],
        ),
        "cnxt_session_profile": (
            number,
            [void, void, ctypes.POINTER(void), ctypes.POINTER(TimingEntry), size, ctypes.POINTER(size)],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def isas(library: ctypes.CDLL | None = None) -> tuple[str, ...]:
    """The instruction-set paths of this CPU, best first."""
    library = load() if library is None else library
    return tuple(library.cnxt_isas().decode().split())


def refused(library: ctypes.CDLL | None = None) -> str:
    """One line on a path whose instructions this CPU has and the system does not let it use; empty: none."""
    library = load() if library is None else library
    return str(library.cnxt_isas_refused().decode())


def slower(library: ctypes.CDLL | None = None) -> str:
    """One line on a path with more instructions that is slower here than the first of `isas`; empty: none."""
    library = load() if library is None else library
    return str(library.cnxt_isas_slower().decode())


def chosen_isa(isa: str | None) -> str | None:
    """The path to take: the one named, or the environment's, which serves to try slower ones; None: the best."""
    return isa or os.environ.get(ISA_VARIABLE) or None
