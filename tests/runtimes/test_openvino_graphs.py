"""What OpenVINO reads, with a part of it replaced."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from convnext_deploy.errors import BuildError
from convnext_deploy.models.onnx_blocks import Cut, OnnxConvNeXt
from convnext_deploy.runtimes import openvino_graphs


def graph(path: Path, nodes: list[tuple[str, list[str], str]], outputs: list[str], half: bool = False) -> Any:
    """From `images` (1, 2, 3, 4): each node's operator, inputs and output; `two` and `five` are constants."""
    kind, number = (onnx.TensorProto.FLOAT16, np.float16) if half else (onnx.TensorProto.FLOAT, np.float32)
    made = [
        onnx.helper.make_node(op, given, [name], name=name, **({"perm": [0, 2, 3, 1]} if op == "Transpose" else {}))
        for op, given, name in nodes
    ]
    held = [onnx.numpy_helper.from_array(number(value), name) for name, value in (("two", 2), ("five", 5))]
    images = onnx.helper.make_tensor_value_info("images", kind, [1, 2, 3, 4])
    ends = [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs]
    whole = onnx.helper.make_graph(made, "graph", [images], ends, held)
    onnx.save(onnx.helper.make_model(whole, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return openvino_graphs.read(path)


@pytest.mark.parametrize("half", [pytest.param(False, id="fp32"), pytest.param(True, id="fp16")])
def test_a_part_stands_between_its_cuts_in_the_types_and_axes_of_the_graph(half: bool, tmp_path: Path) -> None:
    """The graph doubles, goes through the old part, and adds 5; its second map is NHWC and put out itself."""
    user = graph(
        tmp_path / "user.onnx",
        [("Mul", ["images", "two"], "before"), ("Sin", ["before"], "old"), ("Relu", ["old"], "first"),
         ("Cos", ["first"], "deep"), ("Transpose", ["deep"], "second"), ("Add", ["first", "five"], "top")],
        ["top", "second"], half,
    )  # fmt: skip
    part = graph(
        tmp_path / "part.onnx",
        [("Mul", ["images", "five"], "stride4"), ("Neg", ["images"], "stride8")], ["stride4", "stride8"],
    )  # fmt: skip
    found = OnnxConvNeXt("before", {"weight": np.zeros(1, np.float16 if half else np.float32)})
    found.cuts = [Cut(1, "first", "NCHW"), Cut(2, "second", "NHWC")]
    result, counts = openvino_graphs.spliced(user, part, found)
    # Taken out are Sin, Relu, Cos and Transpose; put in are Mul, Neg and another Transpose, in halves three Converts.
    assert counts == (4, 6 if half else 3)
    openvino_graphs.save(result, tmp_path / "whole.xml")
    images = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float16 if half else np.float32)
    run = openvino_graphs.OpenVinoRun(openvino_graphs.read(tmp_path / "whole.xml"), ["first", "top", "second"])
    first, top, second = run("images", images)
    exact, limit = images.astype(np.float64), 1e-2 if half else 1e-5  # of halves up to 32: a rounding is 0.008
    assert first == pytest.approx(10 * exact, abs=limit)
    assert top == pytest.approx(10 * exact + 5, abs=limit)
    assert second == pytest.approx(-2 * exact.transpose(0, 2, 3, 1), abs=limit)
    assert {one.dtype for one in (first, top, second)} == {images.dtype}
    with pytest.raises(BuildError, match="OpenVINO cannot run the graph"):
        run("images", images[:, :1])


def test_what_openvino_does_not_take_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"OpenVINO does not take user.onnx: ") as raised:
        graph(tmp_path / "user.onnx", [("Nothing", ["images"], "top")], ["top"])
    assert "\n" not in str(raised.value)
    user = graph(tmp_path / "user.onnx", [("Relu", ["images"], "top")], ["top"])
    with pytest.raises(BuildError, match="OpenVINO's graph has no tensor 'gone' any more"):
        openvino_graphs.spliced(user, graph(tmp_path / "part.onnx", [], []), OnnxConvNeXt("gone"))
    with pytest.raises(BuildError, match="OpenVINO does not take the graph"):
        openvino_graphs.OpenVinoRun(user, ["gone"])
