"""The main job on real data, offline: export the bundled ConvNeXt, verify, evaluate and time every artifact.

    python scripts/demo.py        (or: make demo)

The model is a small ConvNeXt trained on Fashion-MNIST (`examples/fashion-mnist/MODEL_CARD.md`), the images are
2,000 of that set's test images. Artifacts go to `build/demo/`.
"""

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from convnext_deploy import api
from convnext_deploy.data import preprocess, sources
from convnext_deploy.env import usable_cores
from convnext_deploy.records.accuracy import EvalResult
from convnext_deploy.timing import measure

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "fashion-mnist"
FORMATS = ("eager", "onnx", "openvino")
BATCHES = (1, 8)
SECONDS = 2.0  # of timing for each artifact and batch


def main() -> None:
    console = Console()
    artifacts = {}
    for name in FORMATS:
        print(f"exporting {name}", file=sys.stderr)
        artifacts[name] = api.export(
            str(EXAMPLE / "model.safetensors"),
            format=name,
            input="uint8",
            out=ROOT / "build" / "demo" / name,
            verify_data=str(EXAMPLE / "test-2000.parquet"),
            force=True,
        )
    results = {}
    for name in FORMATS:
        print(f"evaluating {name}", file=sys.stderr)
        results[name] = api.evaluate(artifacts[name].path, str(EXAMPLE / "test-2000.parquet"))

    print("timing", file=sys.stderr)
    found = artifacts["eager"].manifest
    source = sources.open_source(str(EXAMPLE / "test-2000.parquet"))
    to_pixels = preprocess.transform(found.preprocessing, found.model.image_size, found.model.in_chans)
    pixels = np.stack([to_pixels(source.read(index)) for index in range(max(BATCHES))])
    images = preprocess.as_input(pixels, found.preprocessing, found.export.input)
    sessions = {name: api.load(artifact.path) for name, artifact in artifacts.items()}
    timings = {}
    for batch in BATCHES:
        batches = dict.fromkeys(sessions, images[:batch])
        timings[batch] = {t.artifact: t for t in measure.interleaved(sessions, batches, SECONDS)}

    table = Table(
        title=f"Fashion-MNIST ConvNeXt, 2,000 test images, {usable_cores()} cores, uint8 in, fp32",
        title_justify="left",
    )
    for column in ("artifact", "MB", "relative error", "top-1", "top-5"):
        table.add_column(column, justify="left" if column == "artifact" else "right")
    for batch in BATCHES:
        table.add_column(f"img/s, batch {batch}", justify="right")
    for name, artifact in artifacts.items():
        worst = max(parity.relative_error or 0.0 for parity in artifact.manifest.parity)
        result = results[name]
        assert isinstance(result, EvalResult)  # of single labels
        speeds = [f"{timings[batch][name].images_per_s:.0f}" for batch in BATCHES]
        size = f"{artifact.bytes / 1e6:.1f}"
        table.add_row(name, size, f"{worst:.1e}", f"{result.top1:.2%}", f"{result.top5:.2%}", *speeds)
    console.print(table)
    print("artifacts in build/demo; look at one with: .venv/bin/convnext-deploy inspect build/demo/onnx")


if __name__ == "__main__":
    main()
