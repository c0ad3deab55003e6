"""The files beside an ONNX model that it says its weights are in, read without the package onnx and without loading it.

ONNX Runtime before 1.24 opens whatever a model names, and 1.23 is the last for Python 3.10.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArtifactError

# onnx.proto: the fields of each message that lead to tensors, by number.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
KEY, VALUE = 1, 2  # of an entry
FIXED = {1: 8, 5: 4}  # bytes of the wire types that have a fixed size
DEEPEST = 64  # messages within messages


def refuse_files_outside(model: Path) -> None:
    """Refuse a model whose weights are in another folder than its own: it could read any file of this machine.

    Raises:
        ArtifactError: such a model, or a file that is no model.
    """
    for location in locations(model):
        if location in ("", ".", "..") or {"/", "\\", "\0"} & set(location):
            raise ArtifactError(
                f"{model} says that its weights are in {location!r}; expected a file of its own folder. "
                "Do not use this artifact"
            )


def locations(model: Path) -> Iterator[str]:
    """Each file that a tensor of the model names, as it is written there.

    Raises:
        ArtifactError: the file is no model.
    """
    if not model.stat().st_size:
        return
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            for location in _locations(content, 0, len(content), "model", 0):
                yield location.decode("utf-8", "replace")
        except (IndexError, RecursionError) as error:
            raise ArtifactError(f"{model} is damaged: it is no ONNX model; export the model again") from error


def _locations(content: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[bytes]:
    if depth > DEEPEST:
        raise RecursionError
    entry: dict[int, bytes] = {}
    for number, first, last in _fields(content, start, end):
        if message == "entry":
            entry[number] = content[first:last]
        elif number in MESSAGES[message]:
            yield from _locations(content, first, last, MESSAGES[message][number], depth + 1)
    if entry.get(KEY) == b"location":
        yield entry.get(VALUE, b"")


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, byte after the last) of every field with a length, as messages and texts have one."""
    while start < end:
        tag, start = _varint(content, start)
        kind = tag & 7
        if kind == 0:
            _, start = _varint(content, start)
        elif kind in FIXED:
            start += FIXED[kind]
        elif kind == 2:
            length, start = _varint(content, start)
            yield tag >> 3, start, start + length
            start += length
        else:  # groups, which no version of ONNX has
            raise IndexError
    if start > end:
        raise IndexError


def _varint(content: mmap.mmap, start: int) -> tuple[int, int]:
    """(value, the byte after it)."""
    value = shift = 0
    while True:
        byte = content[start]
        start += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, start
        if shift > 63:
            raise IndexError
