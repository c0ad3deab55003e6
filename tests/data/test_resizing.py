"""Pixels are the same with the native library and without, and Pillow's own where it resizes in another way."""

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from convnext_deploy.data import preprocess, resizing
from convnext_deploy.errors import BuildError, UsageError
from convnext_deploy.native import library, resize
from convnext_deploy.records.manifest import Preprocessing

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="the native engine needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    library.build()
    resizing.rule.cache_clear()
    yield
    resizing.rule.cache_clear()


def test_this_pillow_resizes_in_one_of_the_known_ways() -> None:
    assert resizing.rule() is not None


def test_a_pillow_that_resizes_in_another_way_is_used_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "_since_13", lambda sides, resized: sides[0] == 30)
    monkeypatch.setattr(resizing, "_before_13", lambda sides, resized: True)
    assert resizing.rule() is None


def test_without_the_library_pillow_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "there", lambda: None)
    assert resizing.rule() is None


@pytest.mark.parametrize(
    "error", [OSError("failed to map segment"), UsageError("others may write"), BuildError("hash")]
)
def test_a_library_that_cannot_be_opened_costs_nothing_that_pillow_can_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise error

    monkeypatch.setattr(library, "there", refused)
    assert resizing.rule() is None


def test_resizing_builds_no_library_for_another_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build", lambda *_: pytest.fail("it was built"))
    resize._library.cache_clear()
    assert resizing.rule() is not None


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(90, 61), (31, 200), (64, 64), (300, 20)])
def test_pixels_are_the_same_with_the_library_and_without(
    mode: str, in_chans: int, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    assert resizing.rule() is not None
    mean = (0.5, 0.4, 0.3)[:in_chans]
    for crop in ("center", "squash", "border"):
        facts = Preprocessing(mean=mean, std=mean, crop_mode=crop, crop_pct=0.9, interpolation="bicubic")  # type: ignore[arg-type]
        to_pixels = preprocess.transform(facts, (64, 48), in_chans)
        with monkeypatch.context() as without:
            without.setattr(resizing, "rule", lambda: None)
            expected = to_pixels(image)
        with monkeypatch.context() as only:
            only.setattr(Image.Image, "resize", lambda *_: pytest.fail("Pillow resized"))
            np.testing.assert_array_equal(to_pixels(image), expected)
