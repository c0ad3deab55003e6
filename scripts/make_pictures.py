"""Draw the pages' pictures from the committed results, or check that the drawn ones are current.

python scripts/make_pictures.py [--check]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from convnext_deploy.timing import compare

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "benchmarks" / "results" / "2026-11-23-native.jsonl"
FOLDER = ROOT / "docs" / "images"

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 760, 262, 70, 58, 20, 8  # pixels; a gap and a half is between the groups
# Colours of light and of dark pages; a reader's page says which it is.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 15px; }
.note { fill: #57606a; font-size: 12px; }
.other { fill: #8c959f; }
.ours { fill: #0969da; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .note { fill: #9198a1; }
  .other { fill: #6e7681; }
  .ours { fill: #4493f8; }
}
"""


def cpu() -> str:
    """Milliseconds of ConvNeXt-T, batch 1, a bar an engine, in groups by the type of its products."""
    rows = [row for row in compare.read_results(CPU) if (row.model, row.batch) == ("convnext_tiny", 1)]
    bars: dict[str, list[tuple[str, float, bool]]] = {"fp32": [], "bf16": [], "int8": []}
    for row in rows:
        if row.status != "valid" or row.median_ms is None:
            continue
        label = row.subject.split()[-1]
        kind = "int8" if "nncf" in label or label.endswith("int8") else row.precision
        if label == "nncf-transformer":
            continue  # the other of NNCF's presets is as fast and closer to fp32
        name = "OpenVINO with NNCF's int8" if "nncf" in label else NAMES[row.runtime]
        if kind == "int8" and "nncf" not in label and row.runtime != "native":
            name += ", the same plan"
        bars[kind].append((name, row.median_ms, row.runtime == "native"))
    groups = {kind: sorted(group, key=lambda bar: -bar[1]) for kind, group in bars.items()}
    title = "ConvNeXt-T at 224 pixels, one image: milliseconds on two CPU cores"
    note = "AMD EPYC (Zen 4, AVX-512 with VNNI and BF16), 2026-11-23, medians of one interleaved run; less is better"
    return _bars(title, note, groups)


NAMES = {
    "native": "native engine (this project)",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch.compile": "torch.compile (timm)",
}


def _bars(title: str, note: str, groups: dict[str, list[tuple[str, float, bool]]]) -> str:
    scale = (WIDTH - LEFT - RIGHT) / max(value for group in groups.values() for _, value, _ in group)
    y, drawn = TOP, []
    for kind, group in groups.items():
        drawn.append(f'<text class="title" x="12" y="{y + BAR * 0.75:g}">{escape(kind)}</text>')
        for name, value, ours in group:
            style = "ours" if ours else "other"
            middle = f"{y + BAR * 0.75:g}"
            drawn += [
                f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>',
                f'<rect class="{style}" x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" rx="2"/>',
                f'<text x="{LEFT + value * scale + 6:.1f}" y="{middle}">{value:.1f}</text>',
            ]
            y += BAR + GAP
        y += GAP // 2 + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{WIDTH}" height="{y}"',
            f'  viewBox="0 0 {WIDTH} {y}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<text class="title" x="12" y="22">{escape(title)}</text>',
            f'<text class="note" x="12" y="41">{escape(note)}</text>',
            *drawn,
            "</svg>\n",
        ]
    )


PICTURES: dict[str, Callable[[], str]] = {"cpu.svg": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a picture is stale")
    args = parser.parse_args()
    for name, draw in PICTURES.items():
        path, picture = FOLDER / name, draw()
        if not args.check:
            path.write_text(picture)
        elif not path.is_file() or path.read_text() != picture:
            sys.exit(f"{path} is stale; run: make tables")


if __name__ == "__main__":
    main()
