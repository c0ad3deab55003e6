"""Draw a finished run of `optimize` on the bundled model as the picture that README.md shows.

    convnext-deploy optimize --weights examples/fashion-mnist/model.safetensors --input uint8 \\
        --data examples/fashion-mnist/test-2000.parquet --runtime native,onnx,openvino --out build/best
    python scripts/record_optimize.py build/best.optimize/result.json

Written is `docs/images/optimize.svg`: the command, and what it printed at its end.
"""

import io
import shlex
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from convnext_deploy.cli import optimize as shown
from convnext_deploy.records.optimize import OptimizeResult
from convnext_deploy.reports.optimized import next_commands

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples/fashion-mnist")
PICTURE = ROOT / "docs" / "images" / "optimize.svg"
WIDTH = 118
OUT, DATA = Path("build/best"), EXAMPLE / "test-2000.parquet"


def main() -> None:
    result = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=OptimizeResult)
    runtimes = ",".join(dict.fromkeys(row.runtime for row in result.candidates))
    command = ["convnext-deploy", "optimize", "--weights", str(EXAMPLE / "model.safetensors"), "--input", result.input]
    command += ["--data", str(DATA), "--max-drop", f"{result.max_drop:g}", "--runtime", runtimes, "--out", str(OUT)]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"[bold]$[/bold] {shlex.join(command)}", highlight=False)
    console.print(shown.table(result.candidates))
    console.print()
    console.print(shown.verdict(OUT, result), highlight=False, markup=False)
    for number, line in enumerate(next_commands(OUT, ("--data", str(DATA)), result)):
        console.print(f"{'     ' if number else 'next:'} {line}", highlight=False, markup=False)
    PICTURE.write_text(console.export_svg(title="convnext-deploy optimize", unique_id="optimize"))


if __name__ == "__main__":
    main()
