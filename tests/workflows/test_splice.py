"""`export --into`: a detector of the user's with this package's ConvNeXt inside, which puts out what it did."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_detectors import detector, exported, in_functions
from reference_models import OfficialBackbone
from references import randomize_

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli.terminal import summary
from convnext_deploy.errors import ParityError, UsageError, WeightsError
from convnext_deploy.graph import onnx_splice
from convnext_deploy.models.checkpoint import load
from convnext_deploy.runtimes import onnx_graphs
from convnext_deploy.workflows import splice


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(detector(OfficialBackbone()), tmp_path_factory.mktemp("detector") / "detector.onnx", 11)


@pytest.fixture(scope="module")
def artifact(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("spliced") / "artifact"
    return api.export(into=file, image_size=64, batch=(1, 2, 4), out=out)


@pytest.fixture
def ready(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ConvNeXt of `file` is not built again: what stands in the spliced graph is taken for it."""
    spliced = onnx.load(str(artifact.path / "model.onnx"))
    found = artifact.manifest.splice
    assert found is not None
    part = onnx_graphs._putting_out(spliced, found.cuts)

    class Part:
        manifest = msgspec.structs.replace(artifact.manifest, splice=None, parity=())
        path = artifact.path

    monkeypatch.setattr(splice.exports, "export", lambda *_, **__: Part)
    real = splice.onnx_graph.load
    monkeypatch.setattr(splice.onnx_graph, "load", lambda path: part if path.parent == artifact.path else real(path))


def outputs_of(file: Path, images: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: images}))


def test_the_image_size_of_a_graph_is_known_and_not_given(tmp_path: Path) -> None:
    backbone = detector(OfficialBackbone())
    static = exported(backbone, tmp_path / "static.onnx", 11, dynamic=False, shape=(1, 3, 64, 96))
    found = api.export(into=static, out=tmp_path / "out").manifest
    assert found.model.image_size == (64, 96)
    assert (found.provenance["image_size"].how, found.provenance["image_size"].source) == ("known", "the graph")
    alone = load(str(static), task="features")
    assert alone.model.spec.image_size == (64, 96)
    assert "image_size" not in alone.preprocessing.assumed


def test_the_whole_graph_puts_out_what_it_did(artifact: Artifact, file: Path) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 96, 64)).astype(np.float32)
    found = api.load(artifact.path).run(images)
    for one, other in zip(found, outputs_of(file, images), strict=True):
        assert np.linalg.norm(one - other) / np.linalg.norm(other) <= 1e-5


@pytest.mark.slow
def test_openvino_reads_the_whole_graph_with_the_new_convnext(file: Path, tmp_path: Path, need_format: Any) -> None:
    need_format("openvino")
    found = api.export(into=file, format="openvino", image_size=64, batch=(1, 2, 4), out=tmp_path / "out")
    images = np.random.default_rng(0).normal(size=(2, 3, 96, 64)).astype(np.float32)
    for one, other in zip(api.load(found.path).run(images), outputs_of(file, images), strict=True):
        assert np.linalg.norm(one - other) / np.linalg.norm(other) <= 1e-5
    assert found.manifest.splice is not None
    assert all(end.relative_error is not None and end.relative_error <= 1e-5 for end in found.manifest.splice.ends)
    assert len(found.manifest.splice.before_ms) == len(found.manifest.splice.after_ms) > 0


def test_the_manifest_says_what_was_done_and_how_near_it_is(artifact: Artifact, file: Path) -> None:
    found = artifact.manifest
    assert found.splice is not None
    assert (found.splice.graph, found.splice.opset, found.splice.input) == ("detector.onnx", 11, "images")
    assert [end.output for end in found.splice.ends] == ["top", "pooled"]
    assert all(end.relative_error is not None and end.relative_error <= 1e-5 for end in found.splice.ends)
    assert [tensor.name for tensor in (*found.inputs, *found.outputs)] == ["images", "top", "pooled"]
    at_cuts = [parity for parity in found.parity if "at the cuts" in parity.images]
    assert [parity.relative_error is not None and parity.relative_error <= 1e-5 for parity in at_cuts] == [True]
    assert len(found.splice.before_ms) == len(found.splice.after_ms) > 0
    said = summary(artifact.path, found, artifact.bytes)
    assert "in the place of the ConvNeXt of detector.onnx (opset 11)" in said
    assert f"verified on {at_cuts[0].samples} bundled images at the cuts: relative error " in said
    assert "verified on 4 bundled images of 191x255 pixels: relative error " in said
    assert "output top: relative error" in said


def test_the_weights_of_a_checkpoint_have_to_be_those_of_the_graph(file: Path, tmp_path: Path) -> None:
    other: Any = randomize_(OfficialBackbone(), seed=5)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth has other weights than detector.onnx: .* differs"):
        api.export(tmp_path / "other.pth", into=file, image_size=64, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ready")
def test_an_operator_that_no_runtime_has_leaves_the_cuts_compared(file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(file))
    model.graph.node.append(onnx.helper.make_node("BatchedNMS", ["pooled"], ["boxes"], name="nms", domain="mmdeploy"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, None))
    model.opset_import.append(onnx.helper.make_opsetid("mmdeploy", 1))
    onnx.save(model, str(tmp_path / "custom.onnx"))
    found = api.export(into=tmp_path / "custom.onnx", image_size=64, batch=1, out=tmp_path / "out").manifest
    assert found.splice is not None
    assert found.splice.not_run is not None
    assert "BatchedNMS" in found.splice.not_run
    assert {end.relative_error for end in found.splice.ends} == {None}
    assert "NOT RUN behind the cuts" in summary(tmp_path / "out", found, 0)


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_graph_of_functions_puts_out_what_it_did(
    format: str, file: Path, tmp_path: Path, need_format: Any, request: pytest.FixtureRequest
) -> None:
    need_format(format)
    if format == "onnx":  # which runs what was spliced before
        request.getfixturevalue("ready")
    path = tmp_path / "functions.onnx"
    onnx.save(in_functions(onnx.load(str(file)), 7), str(path))
    made = api.export(into=path, format=format, image_size=64, batch=1, out=tmp_path / "out")
    assert made.manifest.splice is not None
    assert all(end.relative_error is not None and end.relative_error <= 1e-5 for end in made.manifest.splice.ends)
    images = np.random.default_rng(0).normal(size=(1, 3, 96, 64)).astype(np.float32)
    for one, other in zip(api.load(made.path).run(images), outputs_of(path, images), strict=True):
        assert np.linalg.norm(one - other) / np.linalg.norm(other) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("format", "opset"), [("openvino", 11), ("openvino", 13), ("onnx", 13)])
def test_a_function_behind_the_convnext_is_kept_or_refused_by_name(
    format: str, opset: int, file: Path, tmp_path: Path, need_format: Any
) -> None:
    """Of the graph's own opset it is written out; another stays a function, which OpenVINO does not take."""
    need_format(format)
    model, path = onnx.load(str(file)), tmp_path / "tail.onnx"
    relu = onnx.helper.make_node("Relu", ["x"], ["y"])
    imports = [onnx.helper.make_opsetid("", opset)]
    model.functions.append(onnx.helper.make_function("own", "tail", ["x"], ["y"], [relu], imports))
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    model.graph.node.append(onnx.helper.make_node("tail", ["pooled"], ["active"], "tail", domain="own"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("active", onnx.TensorProto.FLOAT, None))
    onnx.save(model, str(path))
    options: dict[str, Any] = {"format": format, "image_size": 64, "batch": 1, "out": tmp_path / "out"}
    if (format, opset) == ("openvino", 13):
        with pytest.raises(
            UsageError, match=r"tail\.onnx has the function own\.tail of another opset .* --format onnx"
        ):
            api.export(into=path, **options)
        return
    made = api.export(into=path, **options)
    images = np.random.default_rng(0).normal(size=(1, 3, 96, 64)).astype(np.float32)
    for one, other in zip(api.load(made.path).run(images), outputs_of(path, images), strict=True):
        assert np.linalg.norm(one - other) / np.linalg.norm(other) <= 1e-5


@pytest.mark.usefixtures("ready")
def test_an_output_that_is_empty_is_not_said_to_be_equal(file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(file))
    for name, value in (("first", [0]), ("none", [0]), ("axis", [1])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    model.graph.node.append(onnx.helper.make_node("Slice", ["pooled", "first", "none", "axis"], ["boxes"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, None))
    onnx.save(model, str(tmp_path / "empty.onnx"))
    found = api.export(into=tmp_path / "empty.onnx", image_size=64, batch=1, out=tmp_path / "out").manifest
    assert found.splice is not None
    assert found.splice.ends[2].relative_error is None
    assert "empty on every image" in (found.splice.ends[2].note or "")


@pytest.mark.usefixtures("ready")
def test_a_wrong_map_is_found_at_the_cut(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnx_splice.spliced

    def wrong(user: Any, part: Any, found: Any) -> Any:
        for tensor in part.graph.initializer:
            if tensor.name.endswith("stages.2.0.expand.linear.bias"):
                values = onnx.numpy_helper.to_array(tensor) + np.float32(1e-2)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return real(user, part, found)

    monkeypatch.setattr(onnx_splice, "spliced", wrong)
    with pytest.raises(ParityError, match=r"computes something else with the ConvNeXt that was read from it: .*cuts"):
        api.export(into=file, image_size=64, batch=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "native"}, "--into makes a graph of ONNX or OpenVINO, not --format native"),
        ({"format": "openvino", "precision": "bf16"}, "--precision bf16 would be OpenVINO's type for all of the graph"),
        ({"input": "uint8"}, "--input uint8 changes what the graph takes"),
        ({"task": "embed"}, "--task has no meaning with --into"),
        ({"into": None, "at": "images,map"}, "--at 'images,map' is where the graph of --into is cut"),
        ({"into": "absent.onnx"}, "--into absent.onnx: no such file"),
        ({"at": "images,nothing"}, "no tensor 'nothing'; found --at images,"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_any_work(
    file: Path, tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as error:
        convnext_deploy.export(**{"into": file, "out": tmp_path / "out", **arguments})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_graph_with_two_inputs_is_refused(file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(file))
    model.graph.input.append(onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, [1, 4]))
    onnx.save(model, str(tmp_path / "two.onnx"))
    with pytest.raises(UsageError, match=r"two.onnx takes images float32 \(batch, 3, height, width\); scale float32"):
        api.export(into=tmp_path / "two.onnx", out=tmp_path / "out")


@pytest.mark.slow
def test_one_image_of_a_fixed_size_without_a_batch_is_taken(tmp_path: Path) -> None:
    class Single(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = detector(OfficialBackbone(levels=(3, 4)), (32, 40))

        def forward(self, image: torch.Tensor) -> Any:
            return self.whole(image[None])

    single = tmp_path / "single.onnx"
    exported(Single().eval(), single, 17, dynamic=False, shape=(3, 64, 96))
    found = api.export(into=single, out=tmp_path / "out")
    assert found.manifest.model.image_size == (64, 96)
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    top, _ = api.load(found.path).run(images)
    assert np.linalg.norm(top - outputs_of(single, images[0])[0]) <= 1e-4 * np.linalg.norm(top)
