"""The search by itself, with artifacts and timings made up: what it does with a candidate that cannot be built."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convnext_deploy import api
from convnext_deploy.accuracy import gate
from convnext_deploy.artifact.manifest import check_file
from convnext_deploy.cli.terminal import clock_words
from convnext_deploy.data import sources
from convnext_deploy.errors import DataError, ParityError, UsageError
from convnext_deploy.quantization.calibrate import random_images
from convnext_deploy.quantization.plan import LoadedPlan
from convnext_deploy.records.plan import CalibrationRecord, OperationPlan, Plan
from convnext_deploy.workflows import quantize, search

MODEL = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist" / "model.safetensors"
NAMES = ("stages.0.0.expand", "stages.0.0.project", "stages.1.0.expand", "stages.1.0.project")
CALIBRATION = CalibrationRecord(data="x", data_sha256="0" * 64, images=8, random=False, method="mse")


class Made:
    """A workbench whose `build` refuses the named artifacts, and what was built."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, refused: set[str]) -> None:
        self.built: list[str] = []
        self.said: list[str] = []

        def build(path: Path, plan: Any, precision: Any) -> Any:
            if path.name in refused:
                raise ParityError(f"{path.name} is far from its simulation")
            path.mkdir(parents=True)
            self.built.append(path.name)
            quantized = 0 if plan is None else len(plan.plan.operations)
            return SimpleNamespace(path=path, bytes=100, quantized=quantized)

        def timed(artifacts: Any, batch: int, bench: Any) -> Any:
            return {n: SimpleNamespace(artifact=n, median_ms=10.0 - a.quantized) for n, a in artifacts.items()}

        verdict = SimpleNamespace(
            decision="PASS", agreement=1.0, candidate_top1=0.9, images=10, images_needed=None,
            checks=[SimpleNamespace(name="top1_drop", value=0.0, lower=0.0, upper=0.0)],
        )  # fmt: skip
        monkeypatch.setattr(search, "_sensitivities", lambda *_: {name: 0.1 * i for i, name in enumerate(NAMES, 1)})
        monkeypatch.setattr(search, "_timed", timed)
        monkeypatch.setattr(search, "_side", lambda bench, artifact, *_: artifact)
        monkeypatch.setattr(search, "_worth_trying", lambda candidates, timings, chosen, *_: sorted(chosen))
        monkeypatch.setattr(gate, "judge", lambda *_: verdict)
        monkeypatch.setattr(search, "PlanCandidate", SimpleNamespace)
        monkeypatch.setattr(search.msgspec.structs, "replace", lambda row, **new: SimpleNamespace(**vars(row) | new))
        monkeypatch.setattr(search, "_result", lambda *args: args[-3:])
        monkeypatch.setattr(search.plans, "restricted", lambda loaded, names: LoadedPlan(plan_of(names), {}))
        images = random_images(4, (32, 32))
        bench: Any = SimpleNamespace(
            folder=folder, build=build, simulation=None, preprocessing=None, selection=images, final=images,
            threads=1, say=self.said.append, progress=None,
        )  # fmt: skip
        budget = search.Budget(max_drop=1.0, alpha=0.05, batch=1)
        loaded = LoadedPlan(plan_of(NAMES), {})
        (self.rows, self.chosen, self.why), self.plan = search.search(bench, None, loaded, np.zeros(0), budget, {})  # type: ignore[arg-type, misc]


def plan_of(names: Any) -> Plan:
    return Plan(
        target="native", architecture="test_convnext", weights_sha256="0" * 64, input="float32", image_size=(32, 32),
        rest="fp32", calibration=CALIBRATION,
        operations={name: OperationPlan(type="u8s8", scale=1.0) for name in names},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.env, "cpu_features", lambda: {"avx2"})


@pytest.mark.parametrize("refused", ["plan1", "all", "without-stages.0", "bf16"])
def test_a_search_goes_on_without_a_candidate_that_is_rejected(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.env, "cpu_features", lambda: {"avx512_bf16"})
    found = Made(tmp_path, monkeypatch, {refused})
    assert found.chosen in found.built
    assert found.chosen != refused
    assert found.plan is not None
    (row,) = (row for row in found.rows if getattr(row, "rejected", None))
    assert (row.name, row.rejected) == (refused, f"{refused} is far from its simulation")
    assert any(refused in line and "rejected" in line for line in found.said)


def test_where_every_candidate_is_rejected_the_search_ends_with_the_cause_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Made(tmp_path, monkeypatch, {f"plan{i}" for i in range(1, 6)})
    assert found.chosen is None
    assert found.plan is None
    assert "plan1: plan1 is far from its simulation; cure that, or use a float precision" in found.why
    assert len(found.rows) > 1


def source_of(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> sources.ImageSource:
        return random_images(count, (32, 32))

    monkeypatch.setattr(quantize, "open_images", opened)
    monkeypatch.setattr(quantize.sources, "open_source", opened)


@pytest.mark.parametrize(
    ("there", "asked", "calibrated", "held_out"),
    [
        (5000, None, 512, 128),
        (500, None, 400, 100),  # was refused: 640 were asked for
        (32, None, 26, 6),
        (500, 490, 490, 10),
    ],
)
def test_a_calibration_uses_the_images_that_are_there(
    there: int, asked: int | None, calibrated: int, held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_of(there, monkeypatch)
    first, held, _, _ = quantize._sets("folder", None, asked, None, None, (32, 32))
    assert (len(first), len(held)) == (calibrated, held_out)
    assert not set(first.names) & set(held.names)


def test_few_labelled_images_serve_for_all_three_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    source_of(500, monkeypatch)
    first, _, selection, final = quantize._sets("folder", None, None, "folder", sources.open_source("folder"), (32, 32))
    assert selection is not None
    assert final is not None
    assert len(first) + len(selection) + len(final) == 500


def test_a_search_judges_by_the_models_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are numbered by name; the model has its classes in another order, which `labels` says."""
    names = [f"class {number}" for number in reversed(range(10))]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (32, 32), number).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "labels.txt").write_text("\n".join(names))

    def seen(*arguments: Any, **_: Any) -> None:
        raise KeyboardInterrupt

    sets: list[Any] = []
    right = quantize._sets
    monkeypatch.setattr(quantize, "_sets", lambda *given: sets.append(right(*given)) or sets[-1])
    monkeypatch.setattr(quantize, "prepare", seen)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(
            MODEL, out=tmp_path / "plan.json", calibration=tmp_path / "data", data=tmp_path / "data", target="onnx",
            max_drop=1.0, images=32, labels=tmp_path / "labels.txt",
        )  # fmt: skip
    _, _, selection, final = sets[0]
    for source in (selection, final):
        assert [names[label] for label in source.labels] == [name.split("/")[-2] for name in source.names]


@pytest.mark.parametrize(
    ("there", "asked", "message"), [(31, None, "31 images; at least 32"), (500, 500, "500, and 8")]
)
def test_too_few_images_are_refused_with_the_number_that_is_needed(
    there: int, asked: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_of(there, monkeypatch)
    with pytest.raises(DataError, match=message):
        quantize._sets("folder", None, asked, None, None, (32, 32))


@pytest.mark.parametrize("name", ["/proc/plan.json", "/nowhere/plan.json"])
def test_a_plan_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be written"):
        api.quantize("absent.safetensors", out=name, calibration="random", target="onnx")
    with pytest.raises(UsageError, match="cannot be written"):
        check_file(Path(name).with_suffix(".jsonl"))


def test_time_is_called_left_only_where_it_is_known() -> None:
    assert clock_words(None, None, 121.2) == "0:02:01 so far"
    assert clock_words(10, None, 3.0) == "0:00:03 so far"
    assert clock_words(10, 3725.0, 3.0) == "1:02:05 left"
