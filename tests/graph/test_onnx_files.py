"""Which files an ONNX model names, beside what the package onnx writes; and that none outside its folder is opened."""

import random
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from convnext_deploy.errors import ArtifactError
from convnext_deploy.graph.onnx_files import locations, refuse_files_outside


def tensor(location: str) -> onnx.TensorProto:
    made = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    made.data_location = onnx.TensorProto.EXTERNAL
    made.external_data.add(key="offset", value="0")
    made.external_data.add(key="location", value=location)
    return made


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor(location))


def graph(**parts: list[object]) -> onnx.GraphProto:
    made = onnx.GraphProto(name="g")
    for name, values in parts.items():
        getattr(made, name).extend(values)
    return made


def sparse(location: str) -> onnx.SparseTensorProto:
    made = onnx.SparseTensorProto(dims=[4])
    made.values.CopyFrom(tensor(location))
    return made


def of_graph(made: onnx.GraphProto) -> onnx.ModelProto:
    return onnx.ModelProto(ir_version=8, graph=made)


def in_a_function(location: str) -> onnx.ModelProto:
    made = of_graph(graph())
    made.functions.add(name="f").node.append(constant(location))
    return made


def in_training(location: str) -> onnx.ModelProto:
    made = of_graph(graph())
    made.training_info.add().algorithm.initializer.append(tensor(location))
    return made


PLACES: dict[str, Callable[[str], onnx.ModelProto]] = {
    "initializer": lambda name: of_graph(graph(initializer=[tensor(name)])),
    "constant": lambda name: of_graph(graph(node=[constant(name)])),
    "list of tensors": lambda name: of_graph(graph(node=[helper.make_node("N", [], ["y"], values=[tensor(name)])])),
    "branch": lambda name: of_graph(
        graph(node=[helper.make_node("If", ["c"], ["y"], then_branch=graph(initializer=[tensor(name)]))])
    ),
    "loop in a branch": lambda name: of_graph(
        graph(node=[helper.make_node("If", ["c"], ["y"], graphs=[graph(node=[constant(name)])])])
    ),
    "sparse initializer": lambda name: of_graph(graph(sparse_initializer=[sparse(name)])),
    "sparse constant": lambda name: of_graph(graph(node=[helper.make_node("N", [], ["y"], value=sparse(name))])),
    "function": in_a_function,
    "training": in_training,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_file_outside_is_found_wherever_a_tensor_may_be(place: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES[place]("../secret").SerializeToString())
    assert list(locations(path)) == ["../secret"]
    with pytest.raises(ArtifactError, match=r"its weights are in '\.\./secret'; expected a file of its own folder"):
        refuse_files_outside(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "a/b", "..", ".", "", "a\\b", "*/_ORT_MEM_ADDR_/*", "a\0b"])
def test_only_a_plain_name_is_a_file_of_the_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES["initializer"](name).SerializeToString())
    with pytest.raises(ArtifactError, match="expected a file of its own folder"):
        refuse_files_outside(path)
    path.write_bytes(PLACES["initializer"]("weights.bin").SerializeToString())
    refuse_files_outside(path)


def test_a_model_whose_weights_are_inside_names_no_file(tmp_path: Path) -> None:
    weights = helper.make_tensor("w", onnx.TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    path = tmp_path / "model.onnx"
    path.write_bytes(of_graph(graph(initializer=[weights])).SerializeToString())
    assert list(locations(path)) == []


def test_a_damaged_model_is_refused_in_one_line_or_read(tmp_path: Path) -> None:
    right = b"".join(make("weights.bin").SerializeToString() for make in PLACES.values())
    chance, path = random.Random(0), tmp_path / "model.onnx"
    refused = list[str]()
    for _ in range(1000):
        content = bytearray(right[: chance.randrange(len(right)) if chance.random() < 0.2 else None])
        for _ in range(chance.randrange(4)):
            if content:
                content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            refuse_files_outside(path)
        except ArtifactError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not any("\n" in line for line in refused)


def test_messages_within_messages_have_a_limit(tmp_path: Path) -> None:
    made = graph(initializer=[tensor("weights.bin")])
    for _ in range(25):
        made = graph(node=[helper.make_node("If", ["c"], ["y"], then_branch=made)])
    path = tmp_path / "model.onnx"
    path.write_bytes(of_graph(made).SerializeToString())
    with pytest.raises(ArtifactError, match="is damaged"):
        list(locations(path))
