"""The engine's library that a wheel brings, with its header and what CMake's `find_package` reads.

A wheel contains them in `lib`, where `ship` puts them. A checkout has no such folder, and compiles the library at its
first use. Like the modules beside it, the library there is trusted because it was installed.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from ..errors import BuildError, plain
from . import compiler

FOLDER = Path(__file__).parent / "lib"
HEADER, LIBRARY, RECORD = "convnext_deploy.h", "libconvnext_deploy.so", "built.json"
CMAKE = Path(__file__).parent / "cmake" / "convnext_deploy-config.cmake"
EXAMPLE = Path(__file__).parent / "example"
# The name that programs which are linked with the library look for. The C++ runtime is the system's, as numpy's is: a
# static one would need a newer glibc (2.35 and not 2.33, with g++ 12 on Debian 12).
LINK_FLAGS = (f"-Wl,-soname,{LIBRARY}",)


def ship(folder: Path) -> str:
    """Compile the library into `folder`, with a record of its SHA-256 and sources, its header and CMake's file.

    Returns:
        The machine that it is for, as `platform.machine()` names it; "": this one.

    Raises:
        MissingPackageError: no compiler.
        BuildError: the compiler refuses a file.
    """
    compiler_path = compiler.find_compiler()
    machine = compiler.other_machine(compiler_path)
    with tempfile.TemporaryDirectory() as work:
        built = compiler.compile_library(compiler_path, Path(work), (), LINK_FLAGS, machine)
        (folder / "include").mkdir(parents=True, exist_ok=True)
        shutil.copy(built, folder / LIBRARY)
    shutil.copy(compiler.SOURCES / HEADER, folder / "include")
    shutil.copy(CMAKE, folder)
    record = {"sha256": _sha256(folder / LIBRARY), "sources": compiler.source_key((), machine)}
    (folder / RECORD).write_text(json.dumps(record) + "\n")
    return machine


def library() -> Path | None:
    """The wheel's library; None where there is none, or sources of another version are beside it.

    Raises:
        BuildError: it is not the one that was installed. Opening a damaged one can kill the process.
    """
    try:
        record = json.loads((FOLDER / RECORD).read_text())
        if record["sources"] != compiler.source_key(()):
            return None
        intact = _sha256(FOLDER / LIBRARY) == record["sha256"]
    except FileNotFoundError as error:
        if not FOLDER.is_dir():
            return None
        raise BuildError(f"{error.filename} is missing; {_REMEDY}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BuildError(f"{FOLDER} cannot be read: {plain(error)}; {_REMEDY}") from None
    if not intact:
        raise BuildError(f"{FOLDER / LIBRARY} is not what was installed: its SHA-256 differs from {RECORD}; {_REMEDY}")
    return FOLDER / LIBRARY


_REMEDY = "run pip install --force-reinstall --no-deps convnext-deploy"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
