"""The images that `quantize` calibrates on, and what it refuses before any work."""

from pathlib import Path
from typing import Any

import pytest

from convnext_deploy import api
from convnext_deploy.artifact.manifest import check_file
from convnext_deploy.cli.terminal import clock_words
from convnext_deploy.data import sources
from convnext_deploy.errors import DataError, UsageError
from convnext_deploy.quantization.images import random_images
from convnext_deploy.workflows import quantize


def source_of(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> sources.ImageSource:
        return random_images(count, (32, 32))

    monkeypatch.setattr(quantize, "open_images", opened)


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
    first, held = quantize._sets("folder", None, asked, (32, 32))
    assert (len(first), len(held)) == (calibrated, held_out)
    assert not set(first.names) & set(held.names)


@pytest.mark.parametrize(
    ("there", "asked", "message"), [(31, None, "31 images; at least 32"), (500, 500, "500, and 8")]
)
def test_too_few_images_are_refused_with_the_number_that_is_needed(
    there: int, asked: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_of(there, monkeypatch)
    with pytest.raises(DataError, match=message):
        quantize._sets("folder", None, asked, (32, 32))


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
