"""Checkpoints that hold objects beside their tensors: a blank is read in the place of each object of an unknown class.

Training scripts save what they have at hand: a path, a configuration, a scheduler, a log. The weights are plain all
the same. Of such objects nothing is imported and nothing runs: PyTorch's reader for `weights_only=True` gets a class
of this module for each class and function that it does not know.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

# How a class's objects are filled. PyTorch's reader puts items into dictionaries and lists alone, and says so.
Filled = Literal["state", "items", "list"]

_OF_DICTIONARY = "blank of"  # an attribute's name that no source code can write
# PyTorch before 2.10 sets items on any object, so that Python's own error says it.
_NO_ITEMS = re.compile(
    r"Can only SETITEM.*\bBlank(\d+)\b|'Blank(\d+)' object does not support item assignment", re.DOTALL
)
_NO_LIST = re.compile(r"Can only (?:append|extend).*\bBlank(\d+)\b", re.DOTALL)


class Blank:
    """An object of the class `name` with nothing in it."""

    name = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read(path: Path, mmap: bool) -> Any:
    """A file of torch.save with blanks in it.

    Raises:
        Exception: of many types, as torch.load: damaged, or of a form in which even blanks cannot be filled.
    """
    unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    filled: dict[int, Filled] = {}
    while True:
        classes = [_class(number, name, filled.get(number, "state")) for number, name in enumerate(unknown)]
        with torch.serialization.safe_globals(list(zip(classes, unknown, strict=True))):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            except Exception as error:  # also for another reason than that a blank is filled in another way
                items, list_of = (pattern.search(str(error)) for pattern in (_NO_ITEMS, _NO_LIST))
                match = items or list_of
                if match is None or (number := int(match[match.lastindex or 1])) in filled:
                    raise
                filled[number] = "items" if items else "list"


def class_of(value: Any) -> str | None:
    """The full name of the class that a blank stands for; None of what is no blank."""
    name = value.name if isinstance(value, Blank) else None
    if type(value) is OrderedDict:
        name = vars(value).get(_OF_DICTIONARY)
    if not isinstance(name, str):  # a file can set an attribute of its dictionaries to anything
        return None
    return name if name.isprintable() else repr(name)


def classes_in(content: Any) -> Iterator[str]:
    """The classes of the blanks in dictionaries and lists, the outermost first.

    Each object is looked into once: a file can contain one that is in itself, or in many others.
    """
    visited: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        name = class_of(value)
        if name is not None:
            yield name
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in visited:
            visited.add(id(value))
            waiting += reversed(list(value.values()) if isinstance(value, Mapping) else value)


def _class(number: int, name: str, filled: Filled) -> Callable[..., Any]:
    def dictionary(_: type, *__: Any, **___: Any) -> Any:
        content: OrderedDict[Any, Any] = OrderedDict()
        vars(content)[_OF_DICTIONARY] = name
        return content

    def listed(_: type, *__: Any, **___: Any) -> Any:
        return []

    own: dict[str, Any] = {"name": name}
    if filled != "state":
        own["__new__"] = dictionary if filled == "items" else listed
    return type(f"Blank{number}", (Blank,), own)
