"""The tests that need no more than the base installation.

`scripts/check_light` runs them there, with this file as a plugin of pytest. Wherever else they run, `conftest.py` hides
the other packages from them, so that one which comes to need more fails at once and not only in that installation.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from convnext_deploy import env

TESTS = Path(__file__).resolve().parent
# What is installed there: the package's dependencies, and what runs the tests.
THERE = {"numpy", "PIL", "typer", "rich", "msgspec", "tomli", "typing_extensions", "pytest", "hypothesis"}
# What is not, as far as this package or a dependency of it would import it.
HIDDEN = (
    *env.EXTRAS, "scipy", "transformers", "pandas", "sympy", "jinja2", "requests", "triton", "ml_dtypes",
)  # fmt: skip
# What needs more inside of its tests: development tools, formats that PyTorch runs, class names of timm, Triton.
NEED_MORE = {
    "test_layers.py", "test_toy_format.py", "test_wheel.py", "test_the_extra_that_is_named_installs_the_package",
    "test_list_fits_80_columns_and_cuts_nothing_off", "test_wordnet_ids_number_a_subset_of_imagenet",
    "test_what_makes_artifacts_says_in_one_line_what_to_install", "test_the_cheap_steps_can_be_rehearsed",
    "test_pixels_are_pillows", "test_another_decoder_than_pillows_is_not_used",
    "test_a_class_that_a_message_names_can_be_imported",
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


def _is_absent(package: str) -> bool:
    return package not in THERE and package not in sys.stdlib_module_names


def _lacking(names: tuple[str, ...], seen: set[str], is_absent: Callable[[str], bool] = _is_absent) -> str | None:
    for name in names:
        for end in range(1, name.count(".") + 2):  # a module is imported behind the packages that it is in
            part = ".".join(name.split(".")[:end])
            if part in seen:
                continue
            seen.add(part)
            file = _file_of(part)
            if file is not None:
                package = _lacking(_imports(file, part), seen, is_absent)
                if package:
                    return package
            elif end == 1 and is_absent(part):
                return part
    return None


@cache
def lacking(file: Path) -> str | None:
    """A package outside the base installation that a file imports at its top, or that what it imports does."""
    return _lacking(_imports(file), set())


def is_light(item: Any) -> bool:
    """Whether a test is run by `scripts/check_light`: its file lacks nothing, and conftest.py makes nothing for it."""
    if lacking(item.path) or {item.path.name, item.originalname} & NEED_MORE:
        return False
    if item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
        return False
    sources = {name: fixtures[-1].func.__code__ for name, fixtures in item._fixtureinfo.name2fixturedefs.items()}
    others = {name for name, code in sources.items() if Path(code.co_filename).name != "conftest.py"}
    return set(item.fixturenames) <= {*others, "request", "_own_state", "shared_folder"}  # the last two, every test has


@cache
def _needs(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is of one of the packages, or one of ours that is imported with one."""
    package = module.partition(".")[0]
    if package != "convnext_deploy":
        return package in packages
    return _lacking((module,), set(), packages.__contains__) is not None


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Imports of these packages fail, and so do those of our modules that need one: also of what is in memory already.

    A process of its own, in which they were never imported, is nearer to an installation without them, in seconds.
    """
    modules = {name: module for name, module in sys.modules.items() if _needs(name, packages)}
    attributes = []  # of ours, which `from package import module` would take
    for name in modules:
        package, _, own = name.rpartition(".")
        if package.startswith("convnext_deploy") and vars(sys.modules[package]).get(own) is modules[name]:
            attributes.append((sys.modules[package], own))
    for parent, own in attributes:
        delattr(parent, own)
    for name in modules:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]  # for None, an import raises
    try:
        yield
    finally:
        for name in packages:
            sys.modules.pop(name, None)
        sys.modules.update(modules)
        for parent, own in attributes:
            setattr(parent, own, modules[f"{parent.__name__}.{own}"])


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    return True if lacking(collection_path) else None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = [item for item in items if is_light(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
