"""What an export has in memory: its peak, in units of the fp32 weights, and what is left of them when it is done."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from convnext_deploy import api, env, formats

LIMIT = 4.0

CHILD = """
import importlib, json, resource, sys, warnings
warnings.simplefilter("ignore")
import onnx, onnxruntime, onnxscript, timm, torch, torch.onnx
from convnext_deploy import api, formats
from convnext_deploy.accuracy import oracle
from convnext_deploy.graph import capture, onnx_write
weights, side, name, out = sys.argv[1:]
for package in formats.get(name).requires:
    importlib.import_module(package)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
api.export(weights, format=name, out=out, image_size=int(side))
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, and 231 MB of weights in four blocks: most of what an export holds, as with base, and it takes seconds."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("checkpoints")
    wide = timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(256, 512, 1024, 2048))
    for name, model in (("base", timm.create_model("convnext_base")), ("wide", wide)):
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return {file.stem: file for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "model", "side"),
    [
        ("native", "base", 224),  # with the maps of images of the usual size, which are the same for every format
        *((name, "wide", 64) for name in ("onnx", "torchscript", "tensorrt_rtx", "openvino", "pt2", "native")),
    ],
)
def test_an_export_needs_at_most_four_times_the_memory_of_the_weights(
    format: str, model: str, side: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    if env.missing(formats.get(format).requires):
        pytest.skip(f"{format} is not installed")
    file = checkpoints[model]
    command = [sys.executable, "-c", CHILD, str(file), str(side), format, str(tmp_path / "artifact")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) <= LIMIT * file.stat().st_size


def on_cpu(tensor: torch.Tensor) -> bool:
    try:
        return tensor.device.type == "cpu"
    except RuntimeError:  # PyTorch 2.9 has some that were never defined
        return False


def held() -> int:
    """Bytes of every tensor that something still refers to."""
    gc.unfreeze()  # those too that outlived a test before
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if on_cpu(tensor) and tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("format", ["onnx", "torchscript", "pt2"])
def test_an_export_leaves_none_of_the_weights_behind(format: str, tmp_path: Path) -> None:
    """PyTorch's ONNX exporter keeps the last graph that its rewriting rules met, with the module's parameters."""
    sizes: dict[str, Any] = {"image_size": 32, "batch": (1, 2, 4)}
    before = held()
    artifact = api.export("random", variant="convnext_zepto_rms", format=format, out=tmp_path / "artifact", **sizes)
    assert held() - before < 0.05 * artifact.bytes
