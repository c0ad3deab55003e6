"""What OpenVINO's files and plugin say of the types that they compute in, on graphs made here."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.formats import openvino
from convnext_deploy.processes import import_path, python
from convnext_deploy.records.manifest import Splice
from convnext_deploy.runtimes.openvino_core import core

ov = pytest.importorskip("openvino")
ops = pytest.importorskip("openvino.opset13")


def product(images: Any, columns: int, type: Any = np.float32) -> Any:
    return ops.matmul(images, ops.constant(np.ones((8, columns), type)), False, False)


def test_the_type_of_an_ir_is_read_from_its_products(artifact_of: Any, tmp_path: Path) -> None:
    """One with a product in fp16, whatever the manifest says."""
    images = ops.parameter([1, 8, 1, 1], np.float32)
    rows = ops.reshape(ops.convert(images, np.float16), ops.constant(np.array([1, 8])), False)
    logits = ops.convert(product(rows, 10, np.float16), np.float32)
    logits.output(0).set_names({"logits"})
    ov.save_model(ov.Model([logits], [images]), tmp_path / "model.xml", compress_to_fp16=False)
    artifact: Artifact = artifact_of("eager")
    session = openvino.load(tmp_path, artifact.manifest, RunOptions())
    session._bind(np.zeros((1, 8, 1, 1), np.float32))
    assert session._precision().graph == {"fp16": 1.0}


def test_a_graph_of_one_image_alone_is_profiled_with_the_image_that_is_bound(artifact_of: Any, tmp_path: Path) -> None:
    """A profile compiles the graph anew, and gave it the image's first channel."""
    image = ops.parameter([8, 1, 1], np.float32)
    logits = product(ops.reshape(image, ops.constant(np.array([1, 8])), False), 10)
    logits.output(0).set_names({"logits"})
    ov.save_model(ov.Model([logits], [image]), tmp_path / "model.xml", compress_to_fp16=False)
    whole: Artifact = artifact_of("eager")
    facts = msgspec.structs.replace(
        whole.manifest,
        inputs=(msgspec.structs.replace(whole.manifest.inputs[0], shape=(8, 1, 1)),),
        splice=Splice(
            graph="g.onnx", graph_sha256="0" * 64, input="images", cuts=("logits",), opset=17, nodes=(1, 1), ends=()
        ),
    )
    session = openvino.load(tmp_path, facts, RunOptions())
    session._bind(np.full((1, 8, 1, 1), 2, np.float32))
    assert session._profile(steps=1, warmup=0).steps
    session._step()
    assert session._fetch()[0] == pytest.approx(np.full((1, 10), 16.0))


def test_products_and_convolutions_count_by_their_work() -> None:
    images = ops.parameter([2, 4, 8, 8], np.float32)
    grouped = ops.group_convolution(
        images, ops.constant(np.ones((4, 1, 1, 3, 3), np.float32)), [1, 1], [1, 1], [1, 1], [1, 1]
    )
    mixed = ops.convolution(
        grouped, ops.constant(np.ones((6, 4, 2, 2), np.float32)), [2, 2], [0, 0], [0, 0], [1, 1]
    )  # (2, 6, 4, 4)
    rows = ops.reshape(mixed, ops.constant(np.array([24, 8])), False)
    model = ov.Model([product(rows, 5)], [images])
    assert sorted(openvino._typed_macs(model), reverse=True) == [
        ("fp32", 2 * 4 * 8 * 8 * 9),  # 4608
        ("fp32", 2 * 6 * 4 * 4 * 4 * 2 * 2),  # 3072
        ("fp32", 24 * 8 * 5),
    ]


def test_a_product_of_one_position_counts_beside_those_of_an_image_of_any_size() -> None:
    """A head in another type would have had a share of 1e-38."""
    images = ops.parameter([-1, 8, -1, -1], np.float32)
    mixed = ops.convolution(images, ops.constant(np.ones((8, 8, 1, 1), np.float32)), [1, 1], [0, 0], [0, 0], [1, 1])
    pooled = ops.reduce_mean(mixed, ops.constant(np.array([2, 3])), False)
    model = ov.Model([product(pooled, 8)], [images])
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert openvino._executed_macs(compiled.get_runtime_model()) == [("fp32", 64), ("fp32", 64)]
    assert openvino._typed_macs(model) == [("fp32", 64), ("fp32", 64)]


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from convnext_deploy import api
from convnext_deploy.runtimes import openvino_graphs

def run():
    return openvino_graphs.OpenVinoRun(openvino_graphs.read(Path(sys.argv[1], "model.xml")), ["logits"])

for first, second in ((api.load, api.load), (lambda path: run(), api.load)):
    one, other = first(sys.argv[1]), second(sys.argv[1])
    del one
    del other
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_ctrl_c_after_models_have_gone_is_no_segmentation_fault(artifact_of: Callable[..., Artifact]) -> None:
    """Each core has a stack for signals: see `openvino_core`."""
    command = python(INTERRUPTED, str(artifact_of("openvino").path))
    done = subprocess.run(command, capture_output=True, text=True, env=import_path(), check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted"] * 2), done.stderr
