"""What a server measures of the images that it is sent, beside those of the calibration."""

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from PIL import Image
from server_process import Running, picture, serving, until

from convnext_deploy.accuracy.drift import LEAST
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.records.plan import CalibrationRecord, InputStatistics
from convnext_deploy.serving import drift

SEEN = InputStatistics(
    images=200,
    mean=(0.5, 0.5, 0.5),
    mean_spread=(0.1, 0.1, 0.1),
    std=(0.2, 0.2, 0.2),
    std_spread=(0.05, 0.05, 0.05),
    classes=(20,) * 10,
)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every artifact was calibrated on the same images."""
    record = CalibrationRecord(data="cats", data_sha256="0" * 64, images=200, random=False, method="mse", inputs=SEEN)
    monkeypatch.setattr(drift, "_record", lambda manifest: record)


@pytest.fixture(params=["uint8", "float32"])
def running(
    request: pytest.FixtureRequest, calibrated: None, artifact_of: Callable[..., Artifact]
) -> Iterator[Running]:
    with serving(f"m={artifact_of('onnx', input=request.param).path}") as one:
        yield one


def grey(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_images_that_are_others_are_told_in_metrics(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "PAUSE_S", 0.0)
    for count in range(LEAST - 1):
        assert running.ask("POST", "/classify", grey(204))[0] == 200
        until(lambda count=count: running.service.models["m"].drift._recent._seen == count + 1)  # type: ignore[misc, union-attr]
    assert running.metric('drift_images{model="m"}') == 0  # too few to tell
    running.ask("POST", "/classify", grey(204))
    until(lambda: running.metric('drift_images{model="m"}') == LEAST)
    for channel in range(3):
        # 204 of 255 is 0.8, which is 3 standard deviations off 0.5; one grey has no spread, 0.2 are 4 of 0.05.
        assert running.metric(f'drift_input{{channel="{channel}",model="m",of="mean"}}') == pytest.approx(3, abs=1e-4)
        assert running.metric(f'drift_input{{channel="{channel}",model="m",of="std"}}') == pytest.approx(-4, abs=1e-4)
    assert 0 < running.metric('drift_chance{model="m",of="input"}') < 1
    # All are of one class, which a tenth of the calibration's were.
    assert running.metric('drift_classes{model="m"}') == pytest.approx(0.9)
    assert 0 < running.metric('drift_chance{model="m",of="classes"}') < 0.9
    monkeypatch.setattr(drift, "PAUSE_S", 60.0)
    for _ in range(3):  # the first one is looked at, and then none for a minute
        running.ask("POST", "/classify", grey(204))
    until(lambda: running.metric('drift_images{model="m"}') == LEAST + 1)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (None, "m: no drift is measured: the artifact has no statistics of images to compare with (it was not cal"),
        (
            CalibrationRecord(data="random", data_sha256="0" * 64, images=2, random=True, method="mse"),
            "(it was calibrated on noise)",
        ),
        (
            CalibrationRecord(data="cats", data_sha256="0" * 64, images=2, random=False, method="mse"),
            "(its plan is of a version that kept none)",
        ),
    ],
)  # fmt: skip
def test_without_a_reference_one_line_says_that_nothing_is_measured(
    record: CalibrationRecord | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    artifact_of: Callable[..., Artifact],
) -> None:
    monkeypatch.setattr(drift, "_record", lambda manifest: record)
    lines: list[str] = []
    with serving(f"m={artifact_of('onnx').path}", say=lines.append) as running:
        assert running.ask("POST", "/classify", picture())[0] == 200
        assert b"drift_input{" not in running.service.metrics.text()
    assert sum(line in said for said in lines) == 1


def test_the_reference_is_named_at_the_start(calibrated: None, artifact_of: Callable[..., Artifact]) -> None:
    lines: list[str] = []
    with serving(f"m={artifact_of('onnx').path}", say=lines.append):
        assert "m: drift is measured from the 200 calibration images of cats" in lines
