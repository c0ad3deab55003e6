"""What is put into a user's graph, and that nothing else of it changes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_detectors import detector, exported
from reference_models import OfficialBackbone

from convnext_deploy.errors import UsageError
from convnext_deploy.graph import onnx_splice
from convnext_deploy.models import onnx_blocks, onnx_convnext


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A detector of opset 11, with a node of a domain that no runtime here knows, and one that nothing reads."""
    model = onnx.load(str(exported(detector(OfficialBackbone()), tmp_path_factory.mktemp("user") / "model.onnx", 11)))
    model.graph.node.append(
        onnx.helper.make_node("BatchedNMS", ["pooled"], ["boxes"], name="nms", domain="mmdeploy", score=0.5)
    )
    model.graph.node.append(onnx.helper.make_node("Neg", ["pooled"], ["unread"], name="unread"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, None))
    model.opset_import.append(onnx.helper.make_opsetid("mmdeploy", 1))
    return model


def identity_of(found: onnx_blocks.OnnxConvNeXt, scale: float = 1.0) -> onnx.ModelProto:
    """In the place of a ConvNeXt: each map is the pooled image, so that outputs tell whether it is there."""
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["images"], ["pool"], name="pool")]
    tensors = []
    for cut in found.cuts:
        channels = 1 << (cut.level + 2)
        held = np.full((channels, 3, 1, 1), scale, np.float32)
        tensors.append(onnx.numpy_helper.from_array(held, f"weight{cut.level}"))
        nodes.append(onnx.helper.make_node("Conv", ["pool", f"weight{cut.level}"], [f"map{cut.level}"], name="conv"))
    image = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, None)
    maps = [onnx.helper.make_tensor_value_info(f"map{c.level}", onnx.TensorProto.FLOAT, None) for c in found.cuts]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "part", [image], maps, tensors), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )


def test_everything_outside_of_the_cuts_is_byte_for_byte_what_it_was(user: onnx.ModelProto) -> None:
    before = user.SerializeToString(deterministic=True)
    found = onnx_convnext.read_model(user, "model.onnx")
    result = onnx_splice.spliced(user, identity_of(found), found)
    assert user.SerializeToString(deterministic=True) == before
    kept = [node for node in result.graph.node if not node.name.startswith(onnx_splice.NAME)]
    whole = [node for index, node in enumerate(user.graph.node) if index not in found.nodes]
    outside = [node for node in whole if any(node == other for other in kept)]
    assert kept == outside
    assert {"nms", "unread"} <= {node.name for node in kept}
    assert len(user.graph.node) - len(kept) >= len(found.nodes)
    held = {tensor.name: tensor for tensor in user.graph.initializer}
    assert all(held[t.name] == t for t in result.graph.initializer if not t.name.startswith(onnx_splice.NAME))
    assert list(result.graph.input) == list(user.graph.input)
    assert list(result.graph.output) == list(user.graph.output)
    assert list(result.opset_import) == list(user.opset_import)
    assert result.ir_version == user.ir_version
    assert onnx_splice.exchanged(user, result) == (len(user.graph.node) - len(kept), 1 + len(found.cuts))


def test_the_old_convnext_and_its_weights_are_gone(user: onnx.ModelProto) -> None:
    found = onnx_convnext.read_model(user, "model.onnx")
    result = onnx_splice.spliced(user, identity_of(found), found)
    assert result.ByteSize() < user.ByteSize() / 5
    assert not any(onnx_blocks.PREFIX in tensor.name for tensor in result.graph.initializer)


def test_a_graph_is_spliced_a_second_time_under_other_names(user: onnx.ModelProto) -> None:
    found = onnx_convnext.read_model(user, "model.onnx")
    once = onnx_splice.spliced(user, identity_of(found), found)
    assert onnx_splice._unused(once) != onnx_splice._unused(user)


def test_a_map_that_is_read_and_was_not_named_is_an_error_that_names_it(user: onnx.ModelProto) -> None:
    whole = onnx_convnext.read_model(user, "model.onnx")
    names = [whole.input, *(cut.tensor for cut in whole.cuts[1:])]
    found = onnx_convnext.read_model(user, "model.onnx", names)
    for splice in (
        lambda: onnx_splice.spliced(user, identity_of(found), found),
        lambda: onnx_splice.taken_out(user, found),
    ):
        with pytest.raises(UsageError, match=r"reads '.*', which is inside of the ConvNeXt; name it in --at"):
            splice()


def test_what_chooses_on_the_way_to_an_output_is_told(user: onnx.ModelProto) -> None:
    found = onnx_convnext.read_model(user, "model.onnx")
    behind = onnx_splice.behind(user, [cut.tensor for cut in found.cuts], frozenset({"Resize"}))
    assert behind == {"top": ["Resize"], "pooled": ["Resize"], "boxes": ["BatchedNMS", "Resize"]}


def operations(opset: int, half: bool) -> onnx.ModelProto:
    """Every operation that older opsets have not, as this package's graphs have them."""
    kind, number = (onnx.TensorProto.FLOAT16, np.float16) if half else (onnx.TensorProto.FLOAT, np.float32)
    make = onnx.helper.make_node
    rng = np.random.default_rng(0)
    nodes = [
        make("LayerNormalization", ["x", "weight", "bias"], ["normed"], axis=-1, epsilon=1e-6),
        make("LayerNormalization", ["normed", "weight"], ["again"], axis=-1, epsilon=1e-3),
        make("Gelu", ["again"], ["gelu"]),
        make("Gelu", ["gelu"], ["tanh"], approximate="tanh"),
        make("ReduceL2", ["tanh", "axes"], ["size"], keepdims=1, noop_with_empty_axes=0),
        make("ReduceMean", ["size", "last"], ["mean"], keepdims=1),
        make("Add", ["tanh", "mean"], ["y"]),
    ]
    held = {
        "weight": rng.normal(size=6).astype(number), "bias": rng.normal(size=6).astype(number),
        "axes": np.array([1, 2]), "last": np.array([-1]),
    }  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in held.items()]
    shape = [1, 4, 5, 6]
    graph = onnx.helper.make_graph(
        nodes, "part", [onnx.helper.make_tensor_value_info("x", kind, shape)],
        [onnx.helper.make_tensor_value_info("y", kind, shape)], tensors,
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("half", [pytest.param(False, id="fp32"), pytest.param(True, id="fp16")])
@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20])
def test_an_older_opset_computes_the_same(opset: int, half: bool) -> None:
    model = operations(20, half)
    lowered = onnx_splice.Lowered(model, opset)
    older = operations(opset, half)
    del older.graph.node[:]
    older.graph.node.extend(lowered.nodes)
    older.graph.initializer.extend(lowered.constants)
    read = {name for node in lowered.nodes for name in node.input}
    kept = [tensor for tensor in older.graph.initializer if tensor.name in read]
    del older.graph.initializer[:]
    older.graph.initializer.extend(kept)
    onnx.checker.check_model(older, full_check=True)
    images = np.random.default_rng(1).normal(size=(1, 4, 5, 6)).astype(np.float16 if half else np.float32)

    def run(one: onnx.ModelProto) -> Any:
        session = onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": images})[0].astype(np.float64)

    assert np.linalg.norm(run(older) - run(model)) / np.linalg.norm(run(model)) <= (4e-3 if half else 1e-6)


def test_an_opset_that_is_too_old_is_refused() -> None:
    with pytest.raises(UsageError, match="the graph has opset 9; expected at least 11"):
        onnx_splice.Lowered(operations(20, half=False), 9)


def test_a_file_beside_the_graph_may_hold_its_weights(user: onnx.ModelProto, tmp_path: Path) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(user)
    onnx.save(copy, str(tmp_path / "model.onnx"), save_as_external_data=True, location="weights", size_threshold=0)
    found = onnx_convnext.read_model(onnx.load(str(tmp_path / "model.onnx")), "model.onnx")
    whole = onnx_convnext.read_model(user, "model.onnx")
    assert all(np.array_equal(found.state[key], value) for key, value in whole.state.items())
