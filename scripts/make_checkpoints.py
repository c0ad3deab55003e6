"""Write the table of layouts and heads into `docs/reference/checkpoints.md`: run each row, and print what came of it.

python scripts/make_checkpoints.py

`tests/test_checkpoint_rows.py` holds the written table against the code.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "checkpoints.md"
BEGIN, END = "<!-- Rows by scripts/make_checkpoints.py. -->\n", "<!-- End of the rows. -->\n"
COLUMNS = "| checkpoint | head | task | compared with | error, or the refusal |\n| --- | --- | --- | --- | --- |\n"

sys.path.insert(0, str(ROOT / "tests"))

from checkpoint_rows import ROWS, cell  # noqa: E402


def table() -> str:
    lines = []
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            said = cell(row.result(Path(folder))).replace("|", "\\|")
        lines.append(f"| {row.what} | {row.head} | `{row.task}` | {row.judge} | {said} |\n")
    return COLUMNS + "".join(lines)


def main() -> None:
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
