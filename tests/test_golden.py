"""Files that 0.1.0 wrote, byte for byte: made by the code of 23 November 2026 from a checkpoint of eight channels.

`eager` and `native-int8` are artifacts, the second of `plan.json`; `eager-eval` is the first's evaluation on `images`.
"""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from convnext_deploy import api
from convnext_deploy.accuracy.evaluation import read_result
from convnext_deploy.accuracy.prediction_files import read_predictions
from convnext_deploy.artifact import manifest
from convnext_deploy.cli import app as cli
from convnext_deploy.quantization import plan as plans
from convnext_deploy.records import accuracy, base, optimize, plan, timing
from convnext_deploy.records.accuracy import EvalResult, Verdict
from convnext_deploy.records.manifest import Manifest

GOLDEN = Path(__file__).parent / "golden" / "0.1.0"


@pytest.mark.parametrize("name", ["eager", "native-int8"])
def test_an_artifact_of_0_1_0_opens_and_computes(name: str) -> None:
    session = api.load(GOLDEN / name)
    (logits,) = session.run(np.zeros((2, 3, 32, 32), np.float32))
    assert logits.shape == (2, 3)
    found = manifest.verified(GOLDEN / name).manifest
    assert found.schema_version == 1
    assert (found.oracle, found.read_back) == (None, None)  # which that version did not ask
    assert found.export.eight_bits == ("int8" if name == "native-int8" else None)
    assert session.precision().graph


def test_what_0_1_0_evaluated_is_what_its_artifact_gives_today(tmp_path: Path) -> None:
    before = read_predictions(GOLDEN / "eager-eval.parquet")
    assert read_result(GOLDEN / "eager-eval.json").images == 12
    result = api.evaluate(GOLDEN / "eager", GOLDEN / "images", out=tmp_path / "today")
    assert isinstance(result, EvalResult)
    assert result.top1 == read_result(GOLDEN / "eager-eval.json").top1
    after = read_predictions(tmp_path / "today.npz")
    assert after.names == before.names
    np.testing.assert_array_equal(after.top_classes[:, 0], before.top_classes[:, 0])
    np.testing.assert_allclose(after.label_log_prob, before.label_log_prob, atol=1e-3)
    verdict = api.gate(GOLDEN / "eager-eval.json", tmp_path / "today.json", limits={"max_drop": 50.0})
    assert isinstance(verdict, Verdict)
    assert (verdict.baseline_top1, verdict.candidate_top1, verdict.agreement) == (result.top1, result.top1, 1.0)


def test_a_plan_of_0_1_0_is_read() -> None:
    found = plans.read(GOLDEN / "plan.json").plan
    assert found.eight_bits == "int8"
    assert found.weight_bits == 8
    document = json.loads((GOLDEN / "plan.json").read_text())
    assert "weight_bits" not in document  # which that version did not have


def test_the_record_says_that_a_field_is_of_a_later_version(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "eager", tmp_path / "eager")
    document = json.loads((tmp_path / "eager" / "manifest.json").read_text())
    document["export"]["speed"] = 3
    (tmp_path / "eager" / "manifest.json").write_text(json.dumps(document))
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "eager")])
    assert "of a later version, and not read: export.speed" in " ".join(shown.output.split())


READ_AGAIN = (
    Manifest, plan.Plan, optimize.OptimizeResult, plan.HalfReport, plan.CalibrationReport, accuracy.EvalResult,
    accuracy.Verdict, timing.BenchResult, timing.ProfileResult, timing.RooflineResult,
)  # fmt: skip


@pytest.mark.parametrize("record", READ_AGAIN)
def test_every_file_that_is_read_again_has_a_version_and_this_reader_takes_two(record: type[base.Record]) -> None:
    version = next(field for field in msgspec.structs.fields(record) if field.name == "schema_version")
    assert version.default in (base.SCHEMA, msgspec.NODEFAULT)
    for schema, taken in ((base.SCHEMA, True), (base.SCHEMA - 1, base.SCHEMA > 1), (base.SCHEMA + 1, False)):
        try:
            msgspec.convert(schema, version.type)
        except msgspec.ValidationError:
            assert not taken
        else:
            assert taken


@pytest.mark.parametrize("record", [plan.Plan, plan.OperationPlan, accuracy.Limits])
def test_what_people_write_refuses_a_field_that_is_not_there(record: type[base.Record]) -> None:
    with pytest.raises(msgspec.ValidationError, match="max_top1_drp"):
        msgspec.json.decode(b'{"max_top1_drp": 1}', type=record)
