"""What the system, Python and other libraries raise reaches nobody as it is."""

import ast
import errno
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from convnext_deploy import errors
from convnext_deploy.errors import counted, plain

PACKAGE = Path(errors.__file__).parent
OURS = {name for name, kind in vars(errors).items() if isinstance(kind, type)} | {"UnreadableImage", "_Refused"}
# Where a converter's or runtime's own first line is quoted, and where an error is handed on to a process or a client.
QUOTING = (
    "formats/",
    "graph/",
    "kernels/",
    "runtimes/",
    "timing/",
    "serving/",
    "models/files.py",
    "models/locations.py",
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "x"), "Permission denied"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (KeyError("state_dict"), "it has no 'state_dict'"),
        (EOFError(), "it ends too early"),
        (EOFError("Ran out of input"), "it ends too early"),
        (RecursionError("maximum recursion depth exceeded"), "it nests deeper than Python reads"),
        (MemoryError(), "there is not enough memory for it"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "it is no UTF-8 text"),
        (ValueError("two\n  lines"), "two lines"),
        (ValueError("x" * 1000), "x" * 240),
        (RuntimeError("[Errno -3] Temporary failure in name resolution"), "Temporary failure in name resolution"),
        (StopIteration(), "a StopIteration that says no more"),
    ],
    ids=repr,
)
def test_an_error_of_others_is_said_in_plain_words(error: BaseException, words: str) -> None:
    assert plain(error) == words


def raw(path: Path) -> Iterator[str]:
    """Places in a module where an error that is not ours is put into a text as it is."""
    for handler in ast.walk(ast.parse(path.read_text())):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None or handler.type is None:
            continue
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if all(ast.unparse(kind).rpartition(".")[2] in OURS for kind in caught):
            continue
        name = handler.name
        shown = (name, f"str({name})", f"repr({name})", f"{name}.strerror", f"type({name}).__name__")
        for node in ast.walk(handler):
            if isinstance(node, ast.FormattedValue) and ast.unparse(node.value).startswith(shown[1:]):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.FormattedValue) and ast.unparse(node.value) == name:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_message_shows_an_error_of_others_as_it_is() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if not str(path.relative_to(PACKAGE)).startswith(QUOTING)]
    assert len(files) > 100
    assert [line for path in files for line in raw(path)] == []


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [(1, "image", "1 image"), (0, "image", "0 images"), (2000, "image", "2,000 images"), (3, "class", "3 classes"),
     (2, "entry", "2 entries"), (1, "entry", "1 entry"), (16, "bundled image", "16 bundled images")],
)  # fmt: skip
def test_one_of_something_is_not_several(count: int, noun: str, words: str) -> None:
    assert counted(count, noun) == words


def test_a_class_that_a_message_names_can_be_imported() -> None:
    """Messages named `types.Limits` long after the module was gone."""
    modules = {path.stem for path in PACKAGE.iterdir()} | {"types"}  # what a newcomer would look for
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                classes = re.findall(r"(?<![\w.])([a-z_]+)((?:\.[a-z_]+)*)\.([A-Z]\w+)", node.value)
                names |= {(first + rest, name) for first, rest, name in classes if first in modules}
    assert {name for _, name in names} >= {"Limits", "TensorRtSpec"}
    for module, name in names:
        assert hasattr(importlib.import_module(f"convnext_deploy.{module}"), name), f"{module}.{name}"
