"""The tests that need no more than the base installation.

`scripts/check_light` runs them there, with this file as a plugin of pytest. Wherever else they run, `conftest.py` hides
the other packages from them, so that one which comes to need more fails at once and not only in that installation.
"""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from convnext_deploy import env

TESTS = Path(__file__).resolve().parent
# What is installed there: the package's dependencies, and what runs the tests.
THERE = {"numpy", "PIL", "typer", "rich", "msgspec", "tomli", "typing_extensions", "pytest", "hypothesis"}
# What is not, as far as this package or a dependency of it would import it.
HIDDEN = sorted(
    {*env.EXTRAS, "scipy", "transformers", "datasets", "pandas", "sympy", "jinja2", "requests", "triton", "ml_dtypes"}
)
# What needs more inside of its tests: development tools, formats that PyTorch runs, class names of timm, Triton.
NEED_MORE = {
    "test_layers.py", "test_toy_format.py", "test_wheel.py", "test_the_extra_that_is_named_installs_the_package",
    "test_list_fits_80_columns_and_cuts_nothing_off", "test_wordnet_ids_number_a_subset_of_imagenet",
    "test_what_makes_artifacts_says_in_one_line_what_to_install", "test_the_cheap_steps_can_be_rehearsed",
}  # fmt: skip


def _file_of(module: str) -> Path | None:
    """The source of a module of this package, or of one that several test files import."""
    for folder in (TESTS.parent, TESTS):
        path = folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def _imports(file: Path, module: str = "") -> tuple[str, ...]:
    """What is imported whenever a file is: not what a function, a condition or a `try` imports."""
    names: list[str] = []
    statements = list(ast.parse(file.read_text("utf-8")).body)
    while statements:
        node = statements.pop(0)
        if isinstance(node, ast.With):
            statements[:0] = node.body
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = module.split(".")
            home = home[: len(home) - node.level + (file.name == "__init__.py")] if node.level else []
            whole = ".".join([*home, *([node.module] if node.module else [])])
            names += [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
    return tuple(names)


def _lacking(names: tuple[str, ...], seen: set[str]) -> str | None:
    for name in names:
        for end in range(1, name.count(".") + 2):  # a module is imported behind the packages that it is in
            part = ".".join(name.split(".")[:end])
            if part in seen:
                continue
            seen.add(part)
            file = _file_of(part)
            if file is not None:
                package = _lacking(_imports(file, part), seen)
                if package:
                    return package
            elif end == 1 and part not in THERE and part not in sys.stdlib_module_names:
                return part
    return None


@cache
def lacking(file: Path) -> str | None:
    """A package outside the base installation that a file imports at its top, or that what it imports does."""
    return _lacking(_imports(file), set())


@cache
def _lacks(module: str) -> bool:
    return _lacking((module,), set()) is not None


def is_light(item: Any) -> bool:
    """Whether a test is run by `scripts/check_light`: its file lacks nothing, and conftest.py makes nothing for it."""
    if lacking(item.path) or {item.path.name, item.originalname} & NEED_MORE:
        return False
    if item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
        return False
    sources = {name: fixtures[-1].func.__code__ for name, fixtures in item._fixtureinfo.name2fixturedefs.items()}
    others = {name for name, code in sources.items() if Path(code.co_filename).name != "conftest.py"}
    return set(item.fixturenames) <= {*others, "request", "_own_state", "shared_folder"}  # the last two, every test has


@contextmanager
def base_installation() -> Iterator[None]:
    """Imports fail as in the base installation, those of modules that are in memory already too."""
    away = [name for name in sys.modules if name.startswith("convnext_deploy.") and _lacks(name)]
    with pytest.MonkeyPatch.context() as patch:
        for name in away:
            package, _, own = name.rpartition(".")
            if vars(sys.modules[package]).get(own) is sys.modules[name]:  # which `from package import own` would take
                patch.delattr(sys.modules[package], own)
        for name in away:
            patch.delitem(sys.modules, name)
        for name in HIDDEN:
            patch.setitem(sys.modules, name, None)  # an import raises
        yield


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    return True if lacking(collection_path) else None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = [item for item in items if is_light(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
