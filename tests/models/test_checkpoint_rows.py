"""The table of layouts and heads in the documentation is what happens."""

import re
from pathlib import Path

import pytest
from checkpoint_rows import ROWS, Row, cell
from references import TOLERANCE

from convnext_deploy.models.names import LAYOUTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "checkpoints.md"


def written() -> list[list[str]]:
    table = PAGE.read_text("utf-8").split("make_checkpoints.py. -->")[1].split("<!-- End of the rows")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[part.strip().replace("\\|", "|") for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_table_has_every_row_once() -> None:
    assert [row[:3] for row in written()] == [[row.what, row.head, f"`{row.task}`"] for row in ROWS]


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("index", range(len(ROWS)), ids=lambda index: f"{ROWS[index].what}, {ROWS[index].head}")
def test_a_row_is_loaded_as_exactly_or_refused_in_the_same_words(index: int, tmp_path: Path) -> None:
    row: Row = ROWS[index]
    result, said = row.result(tmp_path), written()[index][-1]
    if isinstance(result, str):
        assert said == cell(result)
    else:
        assert re.fullmatch(r"\de-\d\d|0, bit for bit", said), said
        assert max(result, float(said.partition(",")[0])) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_every_layout_has_a_row(tmp_path: Path) -> None:
    """By the layout that loading reports."""
    from convnext_deploy.models.checkpoint import load

    found = set()
    for number, row in enumerate(ROWS):
        folder = tmp_path / str(number)
        folder.mkdir()
        if isinstance(row.result(folder), str):
            continue
        place = folder / "folder" if (folder / "folder").is_dir() else folder / "checkpoint.pth"
        found.add(load(str(place), task=row.task, **row.options or {}).weights.layout)
    assert found == {layout.name for layout in LAYOUTS} - {"onnx"}  # a graph: test_onnx_convnext.py
