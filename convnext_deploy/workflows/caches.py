"""What this package keeps to be faster the next time, and emptying it."""

from pathlib import Path

from ..artifact import manifest, private
from ..errors import ConvNextDeployError
from ..native import library
from ..records.base import Record

BENCH = Path("build") / "bench"  # of `bench`: models with random weights, below the working folder
BASELINE_NAME = "baseline.json"  # not manifest.json: a folder with another model than ConvNeXt is not an artifact


class Cache(Record, frozen=True, kw_only=True):
    """One cache: how many entries it has (or had, when it was emptied) and their bytes."""

    what: str
    path: str
    entries: int
    bytes: int
    problem: str | None = None  # why it was not looked into


def found() -> list[Cache]:
    """Every cache, with what it contains."""
    built = _built()
    return [
        _libraries(clean=False),
        _timings(clean=False),
        Cache(what="models of bench", path=str(BENCH), entries=len(built), bytes=sum(map(_bytes, built))),
    ]


def clean() -> list[Cache]:
    """Empty every cache of what is provably this package's.

    Returns:
        What was removed from each.
    """
    built, size = _built(), 0
    for folder in built:
        size += _bytes(folder)
        manifest.remove(folder, _marker(folder))
    return [
        _libraries(clean=True),
        _timings(clean=True),
        Cache(what="models of bench", path=str(BENCH), entries=len(built), bytes=size),
    ]


def _libraries(clean: bool) -> Cache:
    what, path = "the native engine's libraries", str(library.cache_folder())
    try:
        entries = library.clean() if clean else library.cached()
    except ConvNextDeployError as error:
        return Cache(what=what, path=path, entries=0, bytes=0, problem=str(error))
    return Cache(what=what, path=path, entries=len(entries), bytes=sum(size for _, size in entries))


def _timings(clean: bool) -> Cache:
    """TensorRT's measured kernel times; `runtimes.tensorrt.build` names the files."""
    what, folder = "TensorRT's kernel times", private.cache_root()
    try:
        files = sorted(private.checked(folder).glob("tensorrt-*.timing")) if folder.is_dir() else []
    except ConvNextDeployError as error:
        return Cache(what=what, path=str(folder), entries=0, bytes=0, problem=str(error))
    size = sum(file.lstat().st_size for file in files)
    for file in files if clean else ():
        file.unlink(missing_ok=True)
    return Cache(what=what, path=str(folder), entries=len(files), bytes=size)


def _built() -> list[Path]:
    folders = sorted(folder for folder in BENCH.glob("*") if folder.is_dir() and any(folder.iterdir()))
    return [folder for folder in folders if manifest.not_ours(folder, _marker(folder)) is None]


def _marker(folder: Path) -> str:
    names = (BASELINE_NAME, manifest.REJECTED_NAME)
    return next((name for name in names if (folder / name).is_file()), manifest.MANIFEST_NAME)


def _bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
