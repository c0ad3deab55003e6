"""Files behind addresses such as s3://bucket/file, opened by fsspec, whose packages know each kind of store.

Nothing is kept on the disk. Credentials, endpoints and regions are the store's own affair: each of its packages finds
them in the environment and in its configuration files, here and in every worker.
"""

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..env import needs
from ..errors import ConvNextDeployError, DataError, MissingPackageError, plain

_ADDRESS = re.compile(r"([a-z][a-z0-9]*)://(.+)", re.DOTALL)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_MEMBERS = 2**20  # bytes read at once of a tar whose members are listed
EXPECTED = "expected a .parquet or .tar file, a folder of them, or a pattern such as s3://bucket/val-*.tar"


def is_address(data: str) -> bool:
    """Whether it names a store, in place of a path."""
    return _ADDRESS.match(data) is not None and not data.startswith("hfds:")


@contextlib.contextmanager
def opened(place: str, *, forwards: bool = False) -> Iterator[IO[bytes]]:
    """A file that can be sought in, at a path or an address.

    Args:
        forwards: it is read from its start to its end.

    Raises:
        DataError: the store refuses, or cannot be reached.
        OSError: of a path.
    """
    if not is_address(place):
        with Path(place).open("rb") as file:
            yield file
        return
    system, path = _system(place)
    with refused(place), system.open(path, "rb", **({"block_size": _MEMBERS} if forwards else {})) as file:
        yield file


def size_of(file: IO[bytes]) -> int:
    """Bytes of a file that `opened` gave."""
    try:
        return os.fstat(file.fileno()).st_size
    except (OSError, io.UnsupportedOperation, AttributeError):  # not one of the system's
        there = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(there)
        return end


def span(place: str, offset: int, size: int) -> bytes:
    """A piece of a file, as far as there is any.

    Raises:
        As `opened`.
    """
    if is_address(place):
        system, path = _system(place)
        with refused(place):
            content: bytes = system.cat_file(path, start=offset, end=offset + size)
            return content
    with Path(place).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def listed(data: str) -> list[str]:
    """The Parquet files and tars at an address, as addresses in the order of their names.

    Raises:
        DataError: there are none, or both.
    """
    scheme = data.partition("://")[0]
    system, path = _system(data)
    with refused(data):
        if any(letter in path for letter in "*?["):
            paths = [str(one) for one in system.glob(path)]
        elif PurePosixPath(path).suffix.lower() in (".parquet", ".tar"):
            system.info(path)  # `exists` takes every refusal for absence
            paths = [path]
        else:
            paths = [str(one) for one in system.ls(path, detail=False)]
    kinds: dict[str, list[str]] = {".parquet": [], ".tar": []}
    for one in sorted(paths):
        kinds.get(PurePosixPath(one).suffix.lower(), []).append(
            f"{scheme}://{one.lstrip('/') if scheme != 'file' else one}"
        )
    parquets, tars = kinds.values()
    if parquets and tars:
        raise DataError(
            f"{data} has both .parquet and .tar files; name one of the two, such as {data.rstrip('/')}/*.tar"
        )
    if not parquets and not tars:
        raise DataError(f"{data} has no .parquet and no .tar file; {EXPECTED}")
    return parquets or tars


def _system(place: str) -> tuple[Any, str]:
    """The file system of an address, one a process, and the path in it."""
    with needs("fsspec"):
        import fsspec
    try:
        _quieten(logging.getLogger("gcsfs"))
        system, path = fsspec.core.url_to_fs(place)
    except ImportError as error:
        scheme = place.partition("://")[0]
        package = _PACKAGES.get(scheme, (error.name or scheme).partition(".")[0])
        raise MissingPackageError(
            f"{package}, which reads {scheme}://, is not installed; run: pip install 'convnext-deploy[remote]'"
        ) from None
    except Exception as error:  # an address that the store's package cannot read
        raise DataError(f"{place} cannot be opened: {plain(error)}; {EXPECTED}") from None
    return system, path


def _quieten(logger: logging.Logger) -> None:
    """It logs a traceback for each attempt, which Python prints where no program has said what becomes of logs."""
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


@contextlib.contextmanager
def refused(place: str) -> Iterator[None]:
    """Turn what a store raises into a line: its packages' errors share no base class."""
    try:
        yield
    except (ConvNextDeployError, EOFError):
        raise
    except FileNotFoundError:
        raise DataError(f"{place} does not exist there; {EXPECTED}") from None
    except TimeoutError:
        raise DataError(f"{place}: the store does not answer; check the network and run it again") from None
    except PermissionError as error:
        raise DataError(f"{place} may not be read with these credentials: {plain(error)}") from None
    except Exception as error:
        cure = "check the network and run it again"
        if type(error).__name__ == "NoCredentialsError":  # of botocore, which may not be installed
            cure = "give credentials as the store's own tools take them, such as AWS_PROFILE, or FSSPEC_S3_ANON=true"
        raise DataError(f"{place} cannot be read: {plain(error)}; {cure}") from None
