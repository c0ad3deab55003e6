"""Uses of the public functions as people write them, for type checkers: `tests/api/test_typing.py`."""

# pyright: strict

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import convnext_deploy


def made(module: Any, dataset: Any, loader: Any) -> None:
    artifact = convnext_deploy.export("my.pth", format="onnx", image_size=64, batch=8, out="build/a")
    convnext_deploy.export(module, variant="tiny", batch=(1, 8, 32), image_size=(64, 96), out=Path("build/b"))
    convnext_deploy.export("my.pth", preprocessing={"mean": 0.5, "std": (0.5, 0.5, 0.5)}, data=[("a.png", 1)])
    print(artifact.path, artifact.manifest.model.num_classes)
    session = convnext_deploy.load(artifact.path, threads=2)
    (logits,) = session.run(np.zeros((1, 3, 64, 64), np.float32))
    print(logits.argmax())
    result = convnext_deploy.predict(session, [Image.new("RGB", (64, 64)), "cat.jpg"], top=3)
    print(result.predictions[0].classes[0].name)
    convnext_deploy.quantize("my.pth", calibration=["a.png", "b.png"], target="native", out="plan.json")
    convnext_deploy.quantize("my.pth", calibration="a/", target="onnx", out="p.json", image_size=64, levels=[2, 3])
    convnext_deploy.half("my.pth", data=dataset, out="half.json")


def judged(pairs: list[tuple[str, int]], images: list[tuple[Image.Image, str]], dataset: Any, loader: Any) -> None:
    for data in ("val/", Path("val"), pairs, images, dataset, loader):
        found = convnext_deploy.evaluate("build/a", data)
        print(found.images)
    convnext_deploy.evaluate("build/a", pairs, class_order="timm", problem="binary", threads=2, device="cpu")
    verdict = convnext_deploy.gate("build/a", Path("build/b"), data=pairs, limits={"max_drop": 0.5})
    print(verdict.decision, verdict.checks[0].value)
    chosen = convnext_deploy.optimize("my.pth", data=images, out="build/best", runtimes=["native", "onnx"])
    print(chosen.chosen)
    for row in convnext_deploy.bench(["build/a", Path("build/b")]):
        print(row.status, row.images_per_s)
    print(convnext_deploy.roofline("tiny", device="a100", precision="fp16").ms, convnext_deploy.__version__)
    convnext_deploy.optimize("my.pth", data="val/", out="build/c", variant="tiny", labels="names.txt")
    convnext_deploy.serve({"a": "build/a"}, port=0, slo_ms=20, token="secret", workers=2)
    print(convnext_deploy.report("rows.jsonl", out="page.html"))
