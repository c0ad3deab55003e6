"""Pickles of numpy arrays, as detectron2's model zoo has them, read without running code of theirs or of numpy's.

Of the classes and functions that such a file names only those in `STAND_INS` are known, and each is answered by one of
this module's own, which takes the few forms that numpy writes and refuses the others.
"""

import os
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError, plain

TORCHS = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how files of torch.save begin that are no archives
KINDS = "fiub"  # of numpy's types: numbers
DEPTH = 8  # levels of dictionaries and lists


def is_plain(path: Path) -> bool:
    """Whether a file is one pickle, and not what torch.save writes."""
    with path.open("rb") as file:
        begin = file.read(len(TORCHS))
    return begin[:1] == b"\x80" and begin != TORCHS


def read(path: Path) -> Any:
    """The file's content, arrays as numpy's.

    Raises:
        WeightsError: damaged, or more than numbers, texts and arrays; then the class is named.
    """
    try:
        with path.open("rb") as file:
            _refuse_large_places(file)
            # Texts of Python 2 are bytes, and those of its arrays are read back as such.
            content = _Reader(file, encoding="latin1").load()
        return _plain(content)
    except _Refused as refused:
        raise WeightsError(
            f"{path} is a pickle that contains a {refused}, and reading that would run code; where you trust it, save "
            "its weights with torch.save(model.state_dict(), 'weights.pth'), and give that file"
        ) from None
    except Exception as error:  # the unpickler raises many types, down to IndexError, on damaged or hostile files
        reason = plain(error)
        raise WeightsError(
            f"{path} cannot be read as a checkpoint of plain arrays ({reason}); "
            "convert it to safetensors where it was made"
        ) from None


def _refuse_large_places(file: BinaryIO) -> None:
    """Go through a pickle's instructions, and back to its beginning.

    Python's unpickler makes room at once for what one of them counts: values up to the largest place that one is kept
    in, or bytes that do not follow. So a file of 200 bytes could take gigabytes, and seconds.

    Raises:
        ValueError: such a count, or no instructions.
    """
    size = os.fstat(file.fileno()).st_size
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > size:
            raise ValueError(f"it keeps a value in place {argument:,} and has {size:,} bytes")
    file.seek(0)


class _Refused(Exception):
    """The full name of what is not known."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in STAND_INS:
            raise _Refused(full if full.isprintable() else repr(full))
        return STAND_INS[full]


class _Type:
    """A numpy type of numbers, with its byte order."""

    def __init__(self, name: str, *_: object) -> None:
        self.type = np.dtype(str(name))
        if self.type.kind not in KINDS:
            raise ValueError(f"an array of type {name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.type = self.type.newbyteorder(">")


class _Array:
    """An array that gets its shape, type and bytes from `__setstate__`, as numpy writes them."""

    values: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, type, by_columns, content = state
        self.values = np.frombuffer(_bytes(content), type.type).reshape(shape, order="F" if by_columns else "C")


def _array(*_: object) -> _Array:
    return _Array()


def _from_buffer(content: Any, type: _Type, shape: tuple[int, ...], order: str) -> _Array:
    """What protocol 5 has in the place of the two above."""
    array = _Array()
    array.__setstate__((1, shape, type, order == "F", content))
    return array


def _scalar(type: _Type, content: Any) -> Any:
    return np.frombuffer(_bytes(content), type.type)[0].item()


def _encoded(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def _bytes(content: Any) -> bytes:
    return content.encode("latin1") if isinstance(content, str) else bytes(content)


def _plain(content: Any, depth: int = 0) -> Any:
    if depth > DEPTH:
        raise ValueError(f"more than {DEPTH} levels of dictionaries and lists")
    if isinstance(content, _Array):
        return content.values
    if isinstance(content, Mapping):
        return {name: _plain(value, depth + 1) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value, depth + 1) for value in content]
    return content


STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "numpy.ndarray": _array,  # named as the class to make, never called by what numpy writes
    "numpy.dtype": _Type,
    "_codecs.encode": _encoded,
    **{f"{package}.multiarray._reconstruct": _array for package in ("numpy.core", "numpy._core")},
    **{f"{package}.numeric._frombuffer": _from_buffer for package in ("numpy.core", "numpy._core")},
    **{f"{package}.multiarray.scalar": _scalar for package in ("numpy.core", "numpy._core")},
}
