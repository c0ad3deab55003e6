"""What a built file contains beside what the module held; and whole exports with one fault between build and check."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import timm
import torch
from faults import FAULTS, Fault
from inject import _patched, caught, subject, trials
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from convnext_deploy import api
from convnext_deploy.artifact import readback
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import CheckFailed
from convnext_deploy.formats import eager
from convnext_deploy.graph.capture import DeployGraph
from convnext_deploy.graph.module_contents import expected_of
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.parameters import random_model
from convnext_deploy.quantization.apply import QuantizedLinear
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import BatchRange, ExportSpec, OracleRecord, ReadBack
from convnext_deploy.records.plan import OperationPlan
from convnext_deploy.runtimes import torch_weights

READ: list[tuple[str, Precision]] = [
    ("eager", "fp32"), ("native", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("pt2", "fp32"),
    ("torchscript", "fp32"),
]  # fmt: skip


@pytest.mark.parametrize("format", [name for name, _ in READ])
def test_every_tensor_of_the_module_is_found_in_the_built_file(
    format: str, artifact_of: Callable[..., Artifact]
) -> None:
    found = artifact_of(format).manifest.read_back
    assert found is not None
    assert (found.tensors, found.failures) == (66, ())
    assert (found.epsilons, found.activations) == ((None, None) if format == "eager" else (14, 9))


# In half precision outputs alone let most of these pass.
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize(
    ("format", "precision"),
    [
        ("native", "bf16"),
        ("torchscript", "bf16"),
        pytest.param("onnx", "fp16", marks=pytest.mark.slow),  # torch's exporter takes seconds
    ],
)
def test_a_fault_between_build_and_check_is_caught(
    format: str, precision: Precision, fault: Fault, tmp_path: Path, need_format: Callable[[str], None]
) -> None:
    need_format(format)
    assert caught(format, precision, fault, random.Random(1), tmp_path)


@pytest.mark.slow
def test_no_fault_in_8_bits_passes(need_format: Callable[[str], None]) -> None:
    """Of all kinds, in V1 and V2: codes, scales and zero points too. `python tests/inject.py` makes more."""
    need_format("native")
    found = trials("native", "fp32", eight_bits=True, count=28)
    assert {trial.fault for trial in found if not trial.caught} == set()
    assert min(trial.moved for trial in found) < 1e-2  # less than 8 bits themselves move outputs by


@pytest.mark.parametrize("format", ["eager", "torchscript"])
def test_a_patched_file_holds_the_faulty_module(format: str, tmp_path: Path) -> None:
    """The injector saves a build where it can put the changed bytes in their place."""
    given = subject(format, "fp32", tmp_path)
    wrong = copy.deepcopy(given.right)
    wrong.get_parameter("stages.2.1.expand.linear.weight").data[3, 5] += 1e-6
    held = expected_of(wrong)
    files = _patched(given, held)
    assert files is not None
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert given.fmt.read_back is not None
    found = given.fmt.read_back(tmp_path)
    assert readback.differences(found, held).failures == ()
    assert "stages.2.1.expand.linear.weight" in readback.differences(found, given.held).failures[0]


def module() -> ConvNeXt:
    return random_model(registry.spec("test_convnext", num_classes=10))


def held(model: ConvNeXt) -> list[readback.Tensor]:
    return list(expected_of(model).tensors)


def judged(tensors: list[readback.Tensor], expected: readback.Expected, **fields: Any) -> tuple[str, ...]:
    given = {"scalars": expected.epsilons, "activations": expected.activations} | fields
    return readback.differences(readback.Contents(tensors=tensors, **given), expected).failures


def test_transposed_and_reshaped_tensors_are_the_same() -> None:
    model = module()
    moved = [
        readback.Tensor(t.name, t.type, t.values.T if t.values.ndim == 2 else t.values.reshape(1, -1))
        for t in held(model)
    ]
    assert judged(moved, expected_of(model)) == ()


def test_tensors_in_another_order_are_refused() -> None:
    model = module()
    tensors = held(model)
    tensors[4], tensors[20] = tensors[20], tensors[4]
    assert judged(tensors, expected_of(model)) == ("the built file uses the module's tensors in another order",)


def test_a_tensor_too_many_is_refused_unless_it_changes_nothing() -> None:
    model = module()
    more = [*held(model), readback.Tensor("ones", "float32", np.ones(24, np.float32))]
    assert judged(more, expected_of(model)) == ()
    more.append(readback.Tensor("gain", "float32", np.full(24, 1.001, np.float32)))
    assert judged(more, expected_of(model)) == ("the built file has 1 tensor that the module had not: gain",)


def test_another_epsilon_a_constant_too_many_and_another_gelu_are_refused() -> None:
    model = module()
    expected = expected_of(model)
    (failure,) = judged(held(model), expected, scalars=[1e-6, *expected.epsilons[1:]])
    assert "the constant 1e-06, which the module has not, expected the epsilon 1e-05" in failure
    (failure,) = judged(held(model), expected, activations=["gelu", *expected.activations[1:]])
    assert failure == "an activation is gelu, expected gelu_tanh"
    (failure,) = judged(held(model), expected, activations=expected.activations[1:])
    assert failure == "an activation is none, expected gelu_tanh"


def test_a_module_that_the_build_changes_is_refused() -> None:
    model = module()
    expected = expected_of(model)
    with torch.no_grad():
        model.get_parameter("head.classifier.bias")[0] += 1
    assert judged(held(model), expected) == ("the build changed 1 of the module's tensors: head.classifier.bias",)


def test_taps_that_only_larger_images_meet_are_judged_where_the_size_is_dynamic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced_format: Callable[..., None]
) -> None:
    """At 32 pixels the last stage sees the middle tap only. Neither file nor module is asked: outputs tell it."""
    from convnext_deploy.formats import torchscript

    def build(graph: Any, folder: Path) -> None:
        with torch.no_grad():
            weight = graph.module.stages[3][0].dwconv_norm.conv.weight
            middle = weight[:, :, 1:6, 1:6].clone()
            weight *= -3
            weight[:, :, 1:6, 1:6] = middle
        torchscript.build(graph, folder)

    replaced_format("torchscript", build=build, read_back=None)
    options: dict[str, Any] = {
        "variant": "test_convnext", "format": "torchscript", "image_size": (64, 64),
        "batch": BatchRange(min=1, opt=4, max=4),
    }  # fmt: skip
    api.export("random", **options, out=tmp_path / "fixed")  # at 64 pixels nothing is wrong
    with pytest.raises(CheckFailed, match="on bundled, 191x255: relative error"):
        api.export("random", **options, dynamic_image_size=True, out=tmp_path / "any")


def test_the_manifest_says_which_sizes_and_batches_were_verified(tmp_path: Path) -> None:
    made = api.export(
        "random", variant="test_convnext", format="eager", image_size=(64, 64), dynamic_image_size=True,
        batch=BatchRange(min=1, opt=8, max=256), out=tmp_path / "a",
    )  # fmt: skip
    assert [(parity.image_size, parity.batches) for parity in made.manifest.parity] == [
        ((64, 64), (1, 8, 16)), ((32, 32), (8,)), ((191, 255), (8,)),
    ]  # fmt: skip


def quantized(zero_point: int = 117, shift: float = 0.0) -> ConvNeXt:
    """One product in 8 bits, in the module that an exporter gets."""
    model = module()
    linear = model.get_submodule("stages.0.0.expand.linear")
    assert isinstance(linear, torch.nn.Linear)
    operation = OperationPlan(type="u8s8", scale=0.03, zero_point=zero_point, shift=shift)
    weight = torch.randint(-127, 128, linear.weight.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = torch.full((len(weight),), 0.004)
    model.get_submodule("stages.0.0.expand").linear = QuantizedLinear(operation, weight, scales, linear.bias.detach())
    return model


def test_a_quantizer_is_read_by_its_limits_where_the_file_has_no_scale() -> None:
    expected = expected_of(quantized())
    own = {"stages.0.0.expand.linear.scale", "stages.0.0.expand.linear.zero_point"}
    rest = [tensor for tensor in expected.tensors if tensor.name not in own]
    assert len(rest) == len(expected.tensors) - 2
    low, high = float(np.float32(-117 * 0.03)), float(np.float32(138 * 0.03))
    grid = readback.Quantizer("a node", low, high, 256)
    assert judged(rest, expected, quantizers=[grid]) == ()
    assert judged(rest, expected, quantizers=[]) == ("the built file has 0 quantizers, expected 1",)
    for wrong in (
        readback.Quantizer("a node", low, high * 1.001, 256),
        readback.Quantizer("a node", low + 0.03, high + 0.03, 256),  # another zero point
        readback.Quantizer("a node", low, high, 255),
    ):
        (failure,) = judged(rest, expected, quantizers=[wrong])
        assert "the built file quantizes stages.0.0.expand.linear's input to" in failure
    (failure,) = judged(rest, expected)
    assert failure.startswith("2 of ")
    assert "stages.0.0.expand.linear.scale, stages.0.0.expand.linear.zero_point" in failure


def test_a_changed_code_or_scale_of_a_weight_is_seen() -> None:
    for ending in ("weight", "weight_scale"):
        model = quantized()
        changed = model.get_buffer(f"stages.0.0.expand.linear.{ending}").reshape(-1)
        expected = expected_of(model)
        tensors = [readback.Tensor(t.name, t.type, t.values.copy()) for t in expected.tensors]
        assert judged(tensors, expected) == ()
        stored = next(t for t in tensors if t.name == f"stages.0.0.expand.linear.{ending}").values.reshape(-1)
        stored[3] = np.nextafter(stored[3], np.float32(1)) if changed.is_floating_point() else stored[3] ^ 1
        (*_, missing, strange) = judged(tensors, expected)
        assert f"stages.0.0.expand.linear.{ending}" in missing
        assert "the built file has 1 tensor that the module had not" in strange


@pytest.mark.parametrize("ending", ["zero_point", "weight_zero_point", "shift"])
def test_a_grid_that_begins_elsewhere_is_seen_though_the_module_has_none_of_it(ending: str, tmp_path: Path) -> None:
    """A zero point of zero is one that files leave out: so nothing was expected in its place, and anything passed."""
    model = quantized(zero_point=0)
    expected = expected_of(model)
    spec = ExportSpec(format="eager", precision="fp32", batch=BatchRange())
    eager.build(DeployGraph(module=model, export=spec, example=torch.zeros(2, 3, 32, 32)), tmp_path)
    assert readback.differences(eager.read_back(tmp_path), expected).failures == ()
    held = load_file(tmp_path / torch_weights.FILE)
    held[f"stages.0.0.expand.linear.{ending}"] += 1
    save_file(held, tmp_path / torch_weights.FILE)
    (failure,) = readback.differences(eager.read_back(tmp_path), expected).failures
    assert "stages.0.0.expand.linear" in failure


def test_a_shift_is_compared_with_the_modules(tmp_path: Path) -> None:
    model = quantized(shift=0.25)
    expected = expected_of(model)
    found = {"stages.0.0.expand.linear": 0.25}
    assert judged(list(expected.tensors), expected, shifts=found) == ()
    assert judged(list(expected.tensors), expected, shifts={}) != ()


# Each rule by itself, with one tensor of a module -------------------------------------------------------------------


def of_one(values: NDArray[Any], type: str = "float32", **fields: Any) -> readback.Expected:
    given = {"groups": [0], "epsilons": [], "activations": [], "constants": frozenset[float]()} | fields
    tensor = readback.Tensor("weight", type, values)
    return readback.Expected(tensors=[tensor], checksums=[readback.checksum(values)], **given)


def found_in(values: NDArray[Any], expected: readback.Expected, type: str = "float32", **fields: Any) -> bool:
    return judged([readback.Tensor("stored", type, values)], expected, **fields) == ()


MATRIX = np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 3


def test_half_floats_may_be_stored_as_float32_and_float32_as_half_floats_where_a_format_compresses() -> None:
    half = MATRIX.astype(np.float16)
    bits = (MATRIX.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16's
    whole = (bits.astype(np.uint32) << 16).view(np.float32)
    assert found_in(half.astype(np.float32), of_one(half, "float16"))
    assert found_in(whole, of_one(bits, "bfloat16"))
    assert not found_in(MATRIX, of_one(half, "float16"))  # which has digits that the module had lost
    assert not found_in(MATRIX, of_one(bits, "bfloat16"))
    assert not found_in(half, of_one(MATRIX), "float16")
    assert found_in(half, of_one(MATRIX, halved=True), "float16")
    assert not found_in(half.astype(np.float32), of_one(MATRIX, halved=True))


def test_nan_is_nan_and_zero_has_a_sign() -> None:
    odd = np.array([np.nan, 0.0, 1.0], np.float32)
    assert found_in(odd.copy(), of_one(odd))
    assert not found_in(np.array([np.nan, -0.0, 1.0], np.float32), of_one(odd))


def test_a_convolution_s_input_channels_may_be_last_and_no_other_axes_change_places() -> None:
    kernel = np.arange(1, 2 * 3 * 4 * 5 + 1, dtype=np.float32).reshape(2, 3, 4, 5)
    assert found_in(kernel.transpose(0, 2, 3, 1), of_one(kernel))
    assert not found_in(kernel.transpose(1, 2, 3, 0), of_one(kernel))
    assert not found_in(kernel.transpose(0, 1, 3, 2), of_one(kernel))


def test_only_what_is_subtracted_may_be_stored_as_its_negative() -> None:
    expected = of_one(MATRIX[0])
    assert not found_in(-MATRIX[0], expected)
    tensor = readback.Tensor("mean", "float32", MATRIX[0], subtracted=True)
    assert found_in(-MATRIX[0], replace(expected, tensors=[tensor]))
    assert found_in(MATRIX[0], replace(expected, tensors=[tensor]))


@pytest.mark.parametrize(
    ("values", "type", "neutral"),
    [
        (np.ones(4, np.float32), "float32", True),
        (np.zeros(4, np.float32), "float32", True),
        (np.array([1, 0, 1, 1], np.float32), "float32", False),  # neither all ones nor all zeros
        (np.full(4, 0x3F80, np.uint16), "bfloat16", True),
        (np.ones(4, np.uint16), "bfloat16", False),  # the smallest number of the type, not 1
        (np.zeros(4, np.uint8), "uint8", True),
        (np.ones(4, np.uint8), "uint8", False),  # codes of weights
        (np.array([7], np.uint8), "uint8", False),  # one zero point
        (np.array([0.7], np.float32), "float32", True),  # one number is among the scalars
    ],
)
def test_more_than_the_module_has_is_allowed_only_where_it_changes_nothing(
    values: NDArray[Any], type: str, neutral: bool
) -> None:
    stored = [readback.Tensor("weight", "float32", MATRIX), readback.Tensor("more", type, values)]
    more = () if neutral else ("the built file has 1 tensor that the module had not: more",)
    assert judged(stored, of_one(MATRIX)) == more


def test_a_table_that_a_converter_keeps_ready_is_known_by_its_numbers() -> None:
    table = np.linspace(0.1, 0.9, 6).reshape(2, 3)
    expected = of_one(MATRIX, tables=[table])

    def beside(values: NDArray[Any]) -> tuple[str, ...]:
        tensors = [readback.Tensor("weight", "float32", MATRIX), readback.Tensor("more", str(values.dtype), values)]
        return judged(tensors, expected)

    assert beside(table.astype(np.float32)) == ()
    assert beside(table.T.astype(np.float32)) == ()
    for wrong in (table * 1.001, table[:, ::-1], table[:, :2], np.arange(6)):
        assert beside(wrong.astype(wrong.dtype)) == ("the built file has 1 tensor that the module had not: more",)


@pytest.mark.parametrize("width", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("halved", "room"), [(False, 1e-6), (True, 2.0**-10)])
def test_a_quantizers_limits_may_be_off_by_a_share_of_its_range(width: float, halved: bool, room: float) -> None:
    grid = readback.Quantizer("product", -width / 4, width * 3 / 4, 256)
    expected = of_one(MATRIX, halved=halved, quantizers=[(grid, frozenset())])
    for low, high in ((0.9, 0.9), (-0.9, 0.9)):
        near = readback.Quantizer("n", grid.low + low * room * width, grid.high + high * room * width, 256)
        assert found_in(MATRIX, expected, quantizers=[near])
    for low, high in ((1.1, 0), (0, 1.1), (-1.1, 0), (0, -1.1)):
        far = readback.Quantizer("n", grid.low + low * room * width, grid.high + high * room * width, 256)
        assert not found_in(MATRIX, expected, quantizers=[far])


def test_epsilons_are_compared_to_one_part_in_a_million_or_to_a_half_float() -> None:
    expected, halved = (of_one(MATRIX, epsilons=[1e-6], halved=value) for value in (False, True))
    assert found_in(MATRIX, expected, scalars=[1e-6 * (1 + 0.9e-6)])
    assert found_in(MATRIX, expected, scalars=[float(np.float32(1e-6))])
    assert not found_in(MATRIX, expected, scalars=[1e-6 * (1 + 1.1e-6)])
    assert not found_in(MATRIX, expected, scalars=[1e-6 * (1 - 1.1e-6)])
    half = float(np.float16(1e-6))
    assert found_in(MATRIX, halved, scalars=[half])
    assert not found_in(MATRIX, expected, scalars=[half])
    assert not found_in(MATRIX, expected, scalars=[])
    assert not found_in(MATRIX, expected, scalars=[1e-6, 1e-6])  # one too many
    assert found_in(MATRIX, expected, scalars=None)  # what the file does not have is in the manifest


def test_three_names_are_shown_and_the_others_counted() -> None:
    assert readback._few(["a", "b", "c"]) == "a, b, c"
    assert readback._few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_inspect_says_who_judged_and_what_was_read_back(artifact_of: Callable[..., Artifact]) -> None:
    from convnext_deploy.cli.terminal import details

    found = artifact_of("torchscript")
    lines = details(found.path, found.manifest, found.bytes).splitlines()
    assert [line for line in lines if line.startswith("read back: ")] == [
        "read back: 66 tensors, 14 epsilons, 9 activations as the module had them"
    ]
    (oracle,) = [line for line in lines if line.startswith("oracle: ")]
    assert oracle.startswith("oracle: timm ")
    assert ", outputs within " in oracle
    without = msgspec.structs.replace(
        found.manifest,
        oracle=OracleRecord(name="self", why="random weights have no other source"),
        read_back=ReadBack(tensors=0, epsilons=None, activations=None, unread="its files cannot be read back"),
    )
    lines = details(found.path, without, found.bytes).splitlines()
    assert "oracle: nobody but this package (random weights have no other source)" in lines
    assert "read back: nothing; not compared: its files cannot be read back" in lines


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), "native", "torchscript"])
def test_a_model_that_was_never_trained_is_exported(format: str, tmp_path: Path) -> None:
    """All its biases are zeros, of which ONNX keeps one of each size."""
    model = timm.create_model("test_convnext", num_classes=10)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "new.safetensors")
    made = api.export(tmp_path / "new.safetensors", format=format, image_size=64, out=tmp_path / "out")
    assert made.manifest.read_back is not None
    assert made.manifest.read_back.failures == ()
