"""Damaged tensors of plans, class names, and what interrupted runs have left: one line of our own comes out.

CONVNEXT_DEPLOY_FUZZ=20000 takes so many mutations of each. The other readers are in `test_fuzz.py` (records, limits),
`test_fuzz_data.py` (images, tar, Parquet, evaluations), `test_manifest_fuzz.py`, `test_files.py` (checkpoints) and
`test_native_build.py` (packed networks).
"""

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz
import msgspec
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from convnext_deploy import formats
from convnext_deploy.accuracy import partial
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.data import numbering
from convnext_deploy.data.image_source import ImageSource
from convnext_deploy.errors import UsageError
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.parameters import random_model
from convnext_deploy.quantization import apply as applied
from convnext_deploy.quantization import kept, observers
from convnext_deploy.quantization import plan as plans
from convnext_deploy.records.manifest import Preprocessing
from convnext_deploy.records.plan import CalibrationRecord, OperationPlan, Plan
from convnext_deploy.workflows import drafts

EXPAND, PROJECT, HEAD = "stages.0.0.expand", "stages.1.0.project", "head"
SHA = "0" * 64


@pytest.fixture(scope="module")
def model() -> ConvNeXt:
    spec = registry.spec("test_convnext", image_size=(32, 32), num_classes=4)
    return random_model(msgspec.structs.replace(spec, dims=(8, 12, 16, 24), depths=(1, 1, 1, 1)))


@pytest.fixture(scope="module")
def tensors(model: ConvNeXt) -> dict[str, Tensor]:
    """All four kinds."""
    paths = plans.products(model)
    rows = applied.rows_of(model.get_submodule(paths[PROJECT]))
    head = model.get_submodule(paths[HEAD])
    inputs = model.get_parameter(f"{paths[EXPAND]}.weight").shape[1]
    outputs = len(applied.rows_of(head))
    return {
        f"balance/{EXPAND}": torch.rand(inputs) + 0.5,
        f"bias/{HEAD}": torch.randn(outputs),
        f"weight/{PROJECT}": torch.randint(-127, 128, rows.shape).to(torch.int8),
        f"weight_scale/{PROJECT}": torch.rand(len(rows)) + 0.1,
    }


def plan(**changes: Any) -> Plan:
    eight = OperationPlan(type="u8s8", scale=0.05, zero_point=100)
    return Plan(**{
        "target": "native", "architecture": "test_convnext", "weights_sha256": SHA, "input": "float32",
        "image_size": (32, 32), "rest": "fp32", "operations": dict.fromkeys((EXPAND, PROJECT, HEAD), eight),
        "calibration": CalibrationRecord(data="d", data_sha256=SHA, images=8, random=False, method="mse"), **changes,
    })  # fmt: skip


def used(path: Path, model: ConvNeXt) -> None:
    """Read as `export --plan` reads it, and run."""
    loaded = replace(plans.read(path), eight_bits=formats.eight_bits_of("native"))
    applied.check(loaded, model, SHA, "float32")
    changed = copy.deepcopy(model)
    applied.apply(changed, loaded)
    with torch.inference_mode():
        assert changed(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def shorter(tensor: Tensor) -> Tensor:
    return (tensor[:-1] if tensor.ndim else tensor.flatten()[:-1]).clone()


def misplaced(tensors: dict[str, Tensor], count: int) -> Iterator[bytes]:
    """Half of them damaged bytes; half well-formed files with tensors of other names, shapes, types and values."""
    content, generator = safetensors.torch.save(tensors), random.Random(0)
    bytes_only = fuzz.damaged([content], count)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.double(), lambda t: t.half(), lambda t: t.short(), lambda t: t.bool(), shorter,
        lambda t: t[None].clone(), lambda t: t.flatten()[:0].clone(), lambda t: t.flatten()[0].clone(),
        torch.zeros_like,
        lambda t: -t.float(), lambda t: t.float() * torch.nan, lambda t: t.float() * torch.inf,
        lambda t: t.float() * 1e38,
        lambda t: torch.full_like(t, -128), lambda t: t.to(torch.float8_e4m3fn),
    ]  # fmt: skip
    if torch.complex64 in safetensors.torch._SIZE:  # earlier releases do not write it
        changes.append(lambda t: t.to(torch.complex64))
    names = [*tensors, "weight/stem", "bias/stages.9.0.expand", "balance/head", "x", "", "weight/", f"scale/{HEAD}"]
    for _ in range(count):
        if generator.random() < 0.5:
            yield next(bytes_only)
            continue
        made = dict(tensors)
        for _ in range(generator.choice((1, 1, 2))):
            name = generator.choice([*made])
            tensor = made.pop(name)
            kind = generator.randrange(4)
            if kind == 1:
                made[generator.choice(names)] = tensor
            elif kind > 1:
                made[name] = generator.choice(changes)(tensor)
            if not made:
                break
        yield safetensors.torch.save(made)


@pytest.mark.filterwarnings("ignore:Casting complex values")  # by the damages themselves
def test_tensors_beside_a_plan_are_its_own_or_refused(
    model: ConvNeXt, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"

    def read(content: bytes) -> None:
        path.with_suffix(".safetensors").write_bytes(content)
        made = plan(tensors_sha256=hashlib.sha256(content).hexdigest())  # the plan was changed with them
        path.write_bytes(msgspec.json.encode(made))
        used(path, model)

    read(safetensors.torch.save(tensors))
    assert fuzz.tracebacks(misplaced(tensors, fuzz.THINNED), read) == {}


def test_a_plan_that_is_read_can_be_carried_out_or_is_refused(model: ConvNeXt, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        used(path, model)

    contents = [msgspec.json.encode(plan())]
    read(contents[0])
    assert fuzz.tracebacks(fuzz.records(contents, fuzz.THINNED), read) == {}


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (f"bias/{HEAD}", lambda t: t * torch.nan, "contains nan; expected finite numbers"),
        (f"weight_scale/{PROJECT}", torch.zeros_like, "contains 0.0; expected finite numbers above 0"),
        (f"balance/{EXPAND}", lambda t: t[1:].clone(), r"of shape \(7,\); expected torch.float32 of shape \(8,\)"),
        (f"weight/{PROJECT}", lambda t: t.float(), "is torch.float32 of shape .*; expected torch.int8"),
        (f"weight/{PROJECT}", None, "contain weight_scale/stages.1.0.project and no weight of it"),
    ],
)
def test_a_tensor_that_no_plan_has_is_named(
    name: str, change: Callable[[Tensor], Tensor] | None, line: str, model: ConvNeXt, tensors: dict[str, Tensor]
) -> None:
    made = {key: tensor for key, tensor in tensors.items() if key != name}
    if change is not None:
        made[name] = change(tensors[name])
    with pytest.raises(UsageError, match=line):
        applied.check(plans.LoadedPlan(plan(), made), model, SHA, "float32")


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_damaged_class_names_are_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"labels{suffix}"
    names = ["ant", "n01440764 tench", "bee", "fly"]
    documents: list[Any] = [names, {name: number for number, name in enumerate(names)}, {"0": ["a", "b"], "1": "c"},
                            {"id2label": {"0": "ant", "1": "bee"}}]  # fmt: skip
    contents = ["\n".join(names).encode()] if suffix == ".txt" else [json.dumps(d).encode() for d in documents]
    source = ImageSource(
        name="images", names=("a.png", "b.png"), labels=np.array([0, 1]), class_names=("ant", "bee"),
        read_bytes=lambda index: b"",
    )  # fmt: skip

    def read(content: bytes) -> None:
        file.write_bytes(content)
        numbering.numbered(source, 4, None, numbering.class_map(file))

    damage = fuzz.damaged if suffix == ".txt" else fuzz.records
    assert fuzz.tracebacks(damage(contents, fuzz.THINNED), read) == {}


def test_what_an_interrupted_run_of_optimize_measured_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "sensitivities.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        assert all(isinstance(value, float) for value in drafts.read_kept(path, dict[str, float]).values())

    contents = [msgspec.json.encode({"stages.0": 0.25, "head": -0.01})]
    assert fuzz.tracebacks(fuzz.records(contents, fuzz.THINNED), read) == {}


def test_an_interrupted_calibration_is_read_or_refused(tmp_path: Path) -> None:
    path, identity = tmp_path / "calibration.safetensors", kept.Identity(
        data_sha256=SHA, images=8, image_size=(32, 32), weights_sha256=SHA, names=("a",), batch=1, bins=8,
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )  # fmt: skip
    arrays: dict[str, Any] = {f"stem/0/{field}": np.zeros(3) for field in observers._TENSORS}
    arrays |= {f"stem/0/{field}": np.zeros((1, observers._SUM_BYTES), np.uint8) for field in observers._SUMS}
    arrays["stem/0/images"] = np.array(4)
    arrays |= {f"images/{field}": np.zeros((4, 1)) for field in ("mean", "std")} | {"images/classes": np.zeros(4)}
    facts = {"identity": msgspec.json.encode(identity).decode(), "done": "[[0, 4]]"}
    content = safetensors.numpy.save(arrays, facts)

    def read(damaged: bytes) -> None:
        path.write_bytes(damaged)
        kept.opened(path, identity, torch.device("cpu"))

    read(content)
    assert fuzz.tracebacks(fuzz.damaged([content], fuzz.THINNED), read) == {}


def test_the_identity_of_an_interrupted_evaluation_is_read_or_refused(
    artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("eager")
    source = ImageSource(name="d", names=("a",), labels=None, class_names=None, read_bytes=lambda index: b"x")
    out = tmp_path / "out"
    partial.opened(out, artifact, source, "single-label", False)
    file = tmp_path / "out.partial" / "identity.json"
    content = file.read_bytes()

    def read(damaged: bytes) -> None:
        file.write_bytes(damaged)
        partial.opened(out, artifact, source, "single-label", False)

    assert fuzz.tracebacks(fuzz.records([content], fuzz.THINNED), read) == {}


@pytest.mark.parametrize(
    "format", ["eager", pytest.param("onnx", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow)]
)
def test_a_damaged_model_in_an_artifact_that_agrees_with_it_is_opened_or_refused(
    format: str, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    """The manifest's hash is of the damaged file: what somebody else can send."""
    artifact = artifact_of(format)
    fmt = formats.get(format)
    for file in artifact.manifest.files:
        (tmp_path / file.path).write_bytes((artifact.path / file.path).read_bytes())
    main = tmp_path / f"model{fmt.suffix}"
    content = main.read_bytes()

    def read(damaged: bytes) -> None:
        main.write_bytes(damaged)
        fmt.load(tmp_path, artifact.manifest, RunOptions(threads=1))

    read(content)
    # The header or the graph, which is at one of the ends: in between are weights, where every bit is a weight.
    ends = [content[:4000] + content[-2000:], content]
    count = fuzz.THINNED if format == "eager" else fuzz.THINNED // 8
    assert fuzz.tracebacks(fuzz.damaged(ends, count), read) == {}
