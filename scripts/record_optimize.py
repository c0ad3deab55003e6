"""Record a run of `optimize` on the bundled model as the picture that README.md shows.

    python scripts/record_optimize.py [FOLDER]

The run is a real one, on this machine; FOLDER keeps it, and is taken up again where it was interrupted. Written is
`docs/images/optimize.svg`.
"""

import io
import shlex
import sys
from pathlib import Path

from rich.console import Console

import convnext_deploy
from convnext_deploy.cli import optimize as shown
from convnext_deploy.reports.optimized import next_commands

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples/fashion-mnist")
PICTURE = ROOT / "docs" / "images" / "optimize.svg"
WIDTH = 118
OUT, DATA = Path("build/best"), EXAMPLE / "test-2000.parquet"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "recorded"
    command = ["convnext-deploy", "optimize", "--weights", str(EXAMPLE / "model.safetensors"), "--input", "uint8"]
    command += ["--data", str(DATA), "--max-drop", "0.5", "--out", str(OUT)]
    result = convnext_deploy.optimize(
        ROOT / EXAMPLE / "model.safetensors",
        data=ROOT / DATA,
        out=folder / "best",
        input="uint8",
        max_drop=0.5,
        force=True,
        say=lambda line: print(line, file=sys.stderr),
    )
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"[bold]$[/bold] {shlex.join(command)}", highlight=False)
    console.print(shown.table(result.candidates))
    console.print()
    console.print(shown.verdict(OUT, result), highlight=False, markup=False)
    lines = "\n".join(f"  {line}" for line in next_commands(OUT, str(DATA), result))
    console.print(f"next:\n{lines}", highlight=False, markup=False)
    PICTURE.write_text(console.export_svg(title="convnext-deploy optimize", unique_id="optimize"))


if __name__ == "__main__":
    main()
