"""A format is one file: this one is written to a folder of its own, and everything that exists takes it as its own."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import convnext_deploy
from convnext_deploy import api, formats
from convnext_deploy.cli import app as cli
from convnext_deploy.errors import UsageError
from convnext_deploy.workflows import contenders

TOY = '''
"""torch.export's program, which computes in 8 bits as a plan says, and is the one that knows it."""

import torch

from convnext_deploy.formats.base import Format
from convnext_deploy.quantization.eight_bits import EightBits
from convnext_deploy.records.manifest import PrecisionTruth
from convnext_deploy.runtimes.torch_session import TorchSession


def build(graph, folder):
    torch.export.save(graph.program, folder / "model.toy")


class ToySession(TorchSession):
    def _precision(self):
        plan = self.manifest.export.quantization
        return PrecisionTruth(graph={"fp32": 1.0}, quantized=plan and sum(plan.operations.values()))


def load(folder, manifest, options):
    return ToySession(torch.export.load(folder / "model.toy").module(check_guards=False), manifest, options)


FORMAT = Format(
    name="toy", summary="a toy", suffix=".toy", runtime="torch", requires=("torch",), build_requires=(), extra=None,
    runs_code=False, precisions=frozenset({"fp32"}), devices=frozenset({"cpu"}), typed_graph=True, build=build,
    load=load, benched=frozenset({"cpu"}),
    eight_bits=EightBits(int8="u8s8", convolutions=True, gelu_tanh=True, saturates=True),
)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "toy.py").write_text(TOY)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "formats")])
    formats.names.cache_clear()
    yield
    monkeypatch.undo()
    formats.names.cache_clear()
    sys.modules.pop("convnext_deploy.formats.toy", None)


def test_a_new_format_quantizes_exports_and_loads_from_its_one_file(
    toy: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs convolutions as such, takes GELU's tanh form, and gets 7 bits where the CPU saturates: all as it says."""
    monkeypatch.setattr("convnext_deploy.quantization.saturation.saturates", lambda: True)
    plan = api.quantize(
        checkpoint, out=tmp_path / "plan.json", calibration="random", target="toy", images=24, image_size=32
    )
    assert (plan.target, plan.weight_bits, plan.rest) == ("toy", 7, "fp32")
    assert plan.types == ("u8s8",)
    made = api.export(
        checkpoint, format="toy", plan=tmp_path / "plan.json", out=tmp_path / "toy", image_size=32, batch=(1, 2, 4)
    )
    assert made.manifest.export.eight_bits == "int8"
    assert made.manifest.precision.quantized == len(plan.operations)
    assert {parity.reference for parity in made.manifest.parity} == {"source", "simulation"}
    with pytest.raises(UsageError, match="the plan is for toy, not for onnx"):
        api.export(checkpoint, format="onnx", plan=tmp_path / "plan.json", out=tmp_path / "onnx", image_size=32)


def test_a_new_format_is_in_every_list(toy: None) -> None:
    assert "toy" in formats.names()
    assert "toy" in contenders.installed_runtimes("cpu")[0]
    assert '"toy"' in CliRunner().invoke(cli.app, ["list", "--json"]).output


def test_a_format_without_8_bits_is_refused_as_a_target_with_those_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"torchscript takes no plan in 8 bits; expected one of .*onnx, openvino"):
        api.quantize("random", out=tmp_path / "plan.json", calibration="random", target="torchscript")


def test_no_module_outside_of_its_own_compares_with_a_formats_name() -> None:
    """What a format can do is asked of its record, so that a new one edits nothing."""
    package = Path(convnext_deploy.__file__).parent
    allowed = {
        "formats",  # its own
        "runtimes/tensorrt",  # what the two TensorRT formats share
        "workflows/onnx_oracle.py",  # of a checkpoint's layout, which is called so too
        "workflows/splice.py",  # what goes into a graph of ONNX is ONNX
        "workflows/contenders.py",  # timm's own modules have the record of an eager session
        "cli/look.py",  # looks into an engine without importing a framework
        "env.py",  # packages, some of which are called as formats are
        "serving/packages",  # what other servers call these formats
        "native/library.py", "reports/tables.py", "arguments.py",
    }  # fmt: skip
    names = "|".join(formats.names())
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if _mentions(line, names)
    }
    assert sorted(name for name in found if not name.startswith(tuple(allowed))) == []


def _mentions(line: str, names: str) -> bool:
    return bool(re.search(rf"(==|!=|\bin) *\(?\"({names})\"", line)) or bool(
        re.search(rf"[(\[{{] *\"({names})\"(, \"({names})\")+", line)
    )
