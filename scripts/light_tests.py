"""A plugin of pytest for `scripts/check_light`: of the tests, those that need nothing which is not installed."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
# What needs more inside of its tests: development tools, formats that PyTorch runs, class names of timm.
NEED_MORE = {
    "test_layers.py", "test_toy_format.py", "test_wheel.py", "test_the_extra_that_is_named_installs_the_package",
    "test_list_fits_80_columns_and_cuts_nothing_off", "test_wordnet_ids_number_a_subset_of_imagenet",
    "test_what_makes_artifacts_says_in_one_line_what_to_install",
}  # fmt: skip


@cache
def lacking(file: Path) -> str | None:
    """A package that a file imports at its top, or that a file beside the tests which it imports does."""
    for node in ast.parse(file.read_text("utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name}" for name in names)]
        for name in names:
            beside = next(iter(TESTS.rglob(f"{name}.py")), None)
            found = lacking(beside) if beside else None if _is_there(name) else name
            if found:
                return found
    return None


def _is_there(name: str) -> bool:
    """Whether a package is installed; of a module of this package, whether it can be imported."""
    package = name.partition(".")[0]
    if package != "convnext_deploy":
        return importlib.util.find_spec(package) is not None
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return (error.name or "").startswith(package)  # a function, or a class
    return True


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    return True if lacking(collection_path) else None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Without the fixtures of conftest.py, which build artifacts."""
    kept = [
        item
        for item in items
        if set(item.fixturenames) <= {*item._fixtureinfo.name2fixturedefs, "request"}
        and not {item.path.name, item.originalname} & NEED_MORE
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
