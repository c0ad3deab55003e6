"""The graph that a ConvNeXt was read from judges what was read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
from onnx import numpy_helper
from onnx_detectors import detector, exported
from references import DEPTHS, DIMS, randomize_

from convnext_deploy import api
from convnext_deploy.errors import ParityError
from convnext_deploy.runtimes import onnx_graphs


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    body: Any = timm.models.convnext.ConvNeXt(depths=DEPTHS, dims=DIMS, num_classes=0)
    backbone: Any = timm.models.FeatureListNet(randomize_(body), out_indices=(1, 2, 3), flatten_sequential=True)
    return exported(detector(backbone, DIMS[1:]), tmp_path_factory.mktemp("graph") / "detector.onnx", 17)


def with_another_gelu(graph: Path, path: Path) -> Path:
    """GELU divides by the root of 2; here one block divides by 1.3."""
    model = onnx.load(graph)
    for node in model.graph.node:
        value = node.attribute[0].t if node.op_type == "Constant" else None
        if value is not None and numpy_helper.to_array(value).size == 1:
            number = numpy_helper.to_array(value)
            if number.dtype == np.float32 and abs(float(number) - 2**0.5) < 1e-5:
                value.CopyFrom(numpy_helper.from_array(np.full_like(number, 1.3)))
                onnx.save(model, path)
                return path
    raise AssertionError("no GELU was found")


def test_a_graph_and_what_was_read_of_it_compute_the_same_maps(graph: Path, tmp_path: Path) -> None:
    made = api.export(str(graph), task="features", format="eager", image_size=(64, 64), out=tmp_path / "maps")
    judge = made.manifest.oracle
    assert judge is not None
    assert judge.name.startswith("onnxruntime ")
    assert judge.relative_error is not None
    assert judge.relative_error < 1e-5
    assert made.manifest.model.levels == (2, 3, 4)


def test_a_graph_that_computes_something_else_is_refused(graph: Path, tmp_path: Path) -> None:
    other = with_another_gelu(graph, tmp_path / "other.onnx")
    with pytest.raises(ParityError, match="differs from what the graph computes in onnxruntime"):
        api.export(str(other), task="features", format="eager", image_size=(64, 64), out=tmp_path / "maps")


def test_a_graph_too_large_for_one_message_is_given_as_files(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graphs, "LARGEST", 1000)
    assert onnx_graphs.weight_bytes(onnx.load(graph)) > 10_000
    made = api.export(str(graph), task="features", format="eager", image_size=(64, 64), out=tmp_path / "maps")
    assert made.manifest.oracle is not None
    assert made.manifest.oracle.name.startswith("onnxruntime ")


def test_half_floats_are_judged_by_their_own_limit(tmp_path: Path) -> None:
    body: Any = timm.models.convnext.ConvNeXt(depths=DEPTHS, dims=DIMS, num_classes=0)
    backbone: Any = timm.models.FeatureListNet(randomize_(body), out_indices=(1, 2, 3), flatten_sequential=True)
    file = exported(detector(backbone, DIMS[1:]), tmp_path / "half.onnx", 17, dynamic=False)
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(file)), file)
    made = api.export(str(file), task="features", format="eager", image_size=(64, 64), out=tmp_path / "maps")
    assert made.manifest.oracle is not None
    assert made.manifest.oracle.name.startswith("onnxruntime ")
