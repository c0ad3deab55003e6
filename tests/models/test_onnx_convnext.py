"""A ConvNeXt that is read from an ONNX graph is the one that was exported, whoever exported it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import transformers
from onnx_detectors import detector, exported, in_functions
from reference_models import OfficialBackbone, torchvision_model
from references import DEPTHS, DIMS, TOLERANCE, images, randomize_, relative_error
from torch import nn

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import onnx_convnext, onnx_graph
from convnext_deploy.models.checkpoint import load


def of_timm(name: str, levels: tuple[int, ...], **arguments: Any) -> nn.Module:
    made = timm.create_model(
        name,
        features_only=True,
        out_indices=tuple(level - 1 for level in levels),
        depths=DEPTHS,
        dims=DIMS,
        **arguments,
    )
    assert isinstance(made, nn.Module)
    return made


def of_transformers(levels: tuple[int, ...]) -> nn.Module:
    return transformers.ConvNextBackbone(
        transformers.ConvNextConfig(
            depths=list(DEPTHS), hidden_sizes=list(DIMS), out_features=[f"stage{level}" for level in levels]
        )
    )


class Torchvision(nn.Module):
    """The maps of torchvision's classifier, without norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision_model(DEPTHS, DIMS).get_submodule("features")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps: list[torch.Tensor] = []
        for index, part in enumerate(self.features.children()):
            x = part(x)
            maps += [x] if index % 2 else []
        return tuple(maps)


BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    # backbone, levels, opset, the exporter with dynamo
    "timm, traced, LayerNorm and GELU in parts": (lambda: of_timm("convnext_atto", (2, 3, 4)), (2, 3, 4), 11, False),
    "timm, 1x1 convolutions": (lambda: of_timm("convnext_atto", (2, 4), conv_mlp=True), (2, 4), 17, False),
    "timm V2, dynamo": (lambda: of_timm("convnextv2_atto", (1, 2, 3, 4)), (1, 2, 3, 4), 18, True),
    "timm V2, traced": (lambda: of_timm("convnextv2_atto", (4,)), (4,), 13, False),
    "detection code, a norm a level": (OfficialBackbone, (1, 2, 3, 4), 11, False),
    "detection code V2, dynamo": (lambda: OfficialBackbone(v2=True, levels=(2, 3, 4)), (2, 3, 4), 20, True),
    "transformers": (lambda: of_transformers((2, 3, 4)), (2, 3, 4), 14, False),
    "transformers, dynamo": (lambda: of_transformers((3, 4)), (3, 4), 20, True),
    "torchvision": (Torchvision, (1, 2, 3, 4), 17, False),
}


@pytest.mark.parametrize("row", BACKBONES.values(), ids=BACKBONES)
def test_what_is_read_computes_the_maps_of_the_backbone(row: Any, tmp_path: Path) -> None:
    make, levels, opset, dynamo = row
    backbone = make()
    module = detector(backbone, [DIMS[level - 1] for level in levels])
    loaded = load(str(exported(module, tmp_path / "model.onnx", opset, dynamo=dynamo)), task="features")
    assert loaded.model.spec.levels == levels
    with torch.inference_mode():
        maps = backbone(images())
        maps = getattr(maps, "feature_maps", maps)
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        found = loaded.model(images())
    assert max(relative_error(a, b) for a, b in zip(found, maps, strict=True)) <= TOLERANCE


def test_a_graph_in_half_precision_is_read_exactly(tmp_path: Path) -> None:
    file = exported(detector(OfficialBackbone()), tmp_path / "model.onnx", 17)
    model = onnx.load(str(file))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            half = onnx.numpy_helper.to_array(tensor).astype("float16")
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    found = onnx_convnext.read_model(model, "half")
    assert found.half
    assert {values.dtype.name for values in found.state.values()} == {"float16"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return onnx.load(str(exported(detector(OfficialBackbone()), tmp_path_factory.mktemp("graph") / "model.onnx", 17)))


@pytest.mark.parametrize("size", [1, 7, 60])  # an exporter's functions are norms, blocks or stages
def test_a_convnext_in_functions_is_read_as_it_is_without(graph: onnx.ModelProto, size: int, tmp_path: Path) -> None:
    onnx.save(in_functions(graph, size), str(tmp_path / "functions.onnx"))
    assert onnx_graph.has_functions(tmp_path / "functions.onnx")
    written_out = onnx_graph.load(tmp_path / "functions.onnx")
    assert [node.op_type for node in written_out.graph.node] == [node.op_type for node in graph.graph.node]
    expected, state = (onnx_convnext.read_model(model, "model.onnx").state for model in (graph, written_out))
    assert expected.keys() == state.keys()
    assert all(np.array_equal(expected[name], state[name]) for name in expected)


def test_a_convnext_in_functions_of_another_opset_is_refused_by_name(graph: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(in_functions(graph, 7, opset=16), str(tmp_path / "functions.onnx"))
    with pytest.raises(
        WeightsError, match=r"nothing is read of its function functions\.inner0, which has another opset"
    ):
        ends(onnx_graph.load(tmp_path / "functions.onnx"))


def calling(*bodies: tuple[str, ...]) -> onnx.ModelProto:
    """A model whose functions f0, f1 ... call those of the given names, one after another; its graph calls the last."""
    imports = [onnx.helper.make_opsetid(name, 1) for name in ("", "own")]
    functions = []
    for number, names in enumerate(bodies):
        values = ["x", *(f"x{place}" for place in range(1, len(names))), "y"]
        nodes = [
            onnx.helper.make_node(name, [one], [other], domain="" if name == "Relu" else "own")
            for name, (one, other) in zip(names, itertools.pairwise(values), strict=True)
        ]
        functions.append(onnx.helper.make_function("own", f"f{number}", ["x"], ["y"], nodes, imports))
    images, maps = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y"))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(f"f{len(bodies) - 1}", ["x"], ["y"], domain="own")], "graph", [images], [maps]
    )
    return onnx.helper.make_model(graph, functions=functions, opset_imports=imports)


@pytest.mark.parametrize(
    ("bodies", "words"),
    [
        ([("f0",)], "a function 'f0' that calls itself"),
        ([("f1",), ("f0",)], "a function 'f1' that calls itself"),
        # 40 lines that would be 2**39 nodes
        ([("Relu",), *((f"f{number}", f"f{number}") for number in range(39))], "functions of 549,755,813,888 nodes"),
        ([("Relu",), *((f"f{number}",) for number in range(500))], "is within 64 others"),
    ],
)
def test_functions_without_an_end_are_refused(bodies: list[tuple[str, ...]], words: str, tmp_path: Path) -> None:
    onnx.save(calling(*bodies), str(tmp_path / "functions.onnx"))
    with pytest.raises(WeightsError, match=words) as error:
        onnx_graph.load(tmp_path / "functions.onnx")
    assert "\n" not in str(error.value)


def ends(model: onnx.ModelProto, names: tuple[str, ...] = ()) -> tuple[str, ...]:
    found = onnx_convnext.read_model(model, "model.onnx", names)
    return found.input, *(cut.tensor for cut in found.cuts)


def test_named_ends_are_taken(graph: onnx.ModelProto) -> None:
    whole = ends(graph)
    assert ends(graph, (whole[0], whole[2], whole[3])) == (whole[0], whole[2], whole[3])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("images", "no such tensor"), "no tensor 'no such tensor'; found --at images,"),
        (("images", "FIRST", "LAST", "SECOND"), "the map of stage 2, named behind that of stage 4"),
        (("images", "top"), "'top' is no map of the ConvNeXt"),
        (("SECOND", "LAST"), "no stem of a ConvNeXt reads"),
    ],
)  # fmt: skip
def test_wrong_names_are_refused_with_the_right_ones(
    graph: onnx.ModelProto, names: tuple[str, ...], words: str
) -> None:
    _, first, second, _, last = ends(graph)
    places = {"FIRST": first, "SECOND": second, "LAST": last}
    with pytest.raises(WeightsError, match=words) as error:
        ends(graph, tuple(places.get(name, name) for name in names))
    assert "\n" not in str(error.value)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x.mean((2, 3))


def test_a_graph_that_makes_a_tensor_twice_is_refused(graph: onnx.ModelProto) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    changed.graph.node[5].output[0] = changed.graph.node[2].output[0]
    with pytest.raises(WeightsError, match=r"makes .* twice"):
        ends(changed)


def test_a_graph_without_a_convnext_says_what_was_looked_for(tmp_path: Path) -> None:
    layers = randomize_(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), Twice()))
    file = exported(layers, tmp_path / "other.onnx", 17)
    with pytest.raises(WeightsError, match=r"has no ConvNeXt: .* it has 1 depthwise convolutions"):
        load(str(file), task="features")


def test_two_convnexts_are_told_apart_by_the_name_of_their_input(graph: onnx.ModelProto) -> None:
    second = onnx.compose.add_prefix(graph, "second/")
    both = onnx.compose.merge_models(graph, second, io_map=[])
    with pytest.raises(WeightsError, match=r"has 2 ConvNeXts, whose stems read images, second/images; .*--at"):
        ends(both)
    assert ends(both, ("second/images",))[0] == "second/images"


def test_a_dilated_convnext_is_refused_by_its_node(graph: onnx.ModelProto) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    node = [node for node in changed.graph.node if any(a.name == "group" and a.i > 1 for a in node.attribute)][-1]
    for attribute in node.attribute:
        if attribute.name in ("dilations", "pads"):
            attribute.ints[:] = [2, 2] if attribute.name == "dilations" else [6, 6, 6, 6]
    with pytest.raises(WeightsError, match=f"Conv {node.name} has a weight .* dilation"):
        ends(changed)


def test_a_sigmoid_with_a_factor_is_no_silu(tmp_path: Path) -> None:
    class QuickGELU(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(1.702 * x)

    for act, reason in ((nn.SiLU, None), (QuickGELU, r"a factor of 1\.702 \(a quick GELU\)")):
        module = detector(of_timm("convnext_atto", (4,), act_layer=act), DIMS[-1:])
        model = onnx.load(str(exported(module, tmp_path / "model.onnx", 17)))
        if reason is None:
            assert onnx_convnext.read_model(model, "model.onnx").activations == {"silu"}
            continue
        with pytest.raises(WeightsError, match=reason):
            ends(model)


def hostile(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A stem and a depthwise convolution with the constant that the nodes make."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ones = {"one": np.ones(1, np.float32), "sides": np.array([1 << 20, 1 << 20], np.int64)}
    values = [onnx.numpy_helper.from_array(value, name) for name, value in ones.items()]
    stem = onnx.numpy_helper.from_array(np.zeros((8, 3, 4, 4), np.float32), "stem")
    convolutions = [
        helper.make_node("Conv", ["images", "stem"], ["first"], strides=[4, 4]),
        helper.make_node("Conv", ["first", "made"], ["second"], group=8),
    ]
    images = helper.make_tensor_value_info("images", kind, [1, 3, 32, 32])
    out = helper.make_tensor_value_info("second", kind, None)
    return helper.make_model(
        helper.make_graph([*nodes, *convolutions], "hostile", [images], [out], initializer=[*values, stem])
    )


def doubling() -> list[onnx.NodeProto]:
    names = ["one", *(f"twice{number}" for number in range(50)), "made"]
    return [onnx.helper.make_node("Concat", [a, a], [b], axis=0) for a, b in itertools.pairwise(names)]


def sparse() -> onnx.NodeProto:
    """One number, among 2^60 that are not written."""
    values = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [1.0])
    places = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [0])
    tensor = onnx.helper.make_sparse_tensor(values, places, [1 << 30, 1 << 30])
    return onnx.helper.make_node("Constant", [], ["made"], sparse_value=tensor)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([("Expand", ["one", "sides"], ["made"])], "Expand made makes far more numbers"),
        (doubling(), r"Concat twice\d+ makes far more numbers"),
        ([("Identity", ["made"], ["other"]), ("Identity", ["other"], ["made"])], "reads the tensor 'made' before"),
        ([("Identity", [], ["made"])], "a Identity with 0 inputs"),
        ([("Reshape", ["one", "sides"], ["made"])], "the constant 'made' cannot be read or computed"),
        ([sparse()], "the constant 'made' cannot be read or computed"),
    ],
)
def test_a_graph_that_would_take_all_memory_or_time_is_refused(nodes: list[Any], reason: str) -> None:
    made = [one if isinstance(one, onnx.NodeProto) else onnx.helper.make_node(*one) for one in nodes]
    with pytest.raises(WeightsError, match=reason) as raised:
        ends(hostile(*made))
    assert "\n" not in str(raised.value)


def test_constants_that_stand_behind_one_another_without_an_end_are_refused() -> None:
    names = ["one", *(f"again{number}" for number in range(5000)), "made"]
    nodes = [onnx.helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names)]
    with pytest.raises(WeightsError, match="nests deeper than Python reads"):
        ends(hostile(*nodes))


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "damaged.onnx"
    file.write_bytes(b"not a model")
    with pytest.raises(WeightsError, match="is not a readable ONNX model"):
        load(str(file), task="features")


def test_a_classifier_is_asked_for_its_maps(tmp_path: Path) -> None:
    file = exported(detector(OfficialBackbone()), tmp_path / "model.onnx", 17)
    with pytest.raises(WeightsError, match="use --task features"):
        load(str(file))
