"""The notebook in `examples/` runs from its first cell to its last."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "first-steps.ipynb"


def cells(kind: str) -> list[str]:
    return [cell["source"] for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def value_of(cell: str, names: dict[str, Any]) -> Any:
    """What a cell shows: the value of its last line."""
    *statements, last = ast.parse(cell).body
    assert isinstance(last, ast.Expr)
    exec(compile(ast.Module(statements, []), str(NOTEBOOK), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@pytest.mark.slow  # exports a model
def test_the_notebook_runs_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(NOTEBOOK.parent)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = [value_of(cell, names) for cell in cells("code")]
    assert shown[1] < 1e-4
    assert shown[2].startswith("top-1 9")
    assert len(shown[3]) == 3
    assert (tmp_path / "build" / "notebook" / "fp32" / "manifest.json").is_file()


def test_the_notebook_holds_no_output_and_no_path_of_a_machine() -> None:
    document = json.loads(NOTEBOOK.read_text("utf-8"))
    assert not any(cell.get("outputs") for cell in document["cells"])
    assert "/home/" not in NOTEBOOK.read_text("utf-8")
