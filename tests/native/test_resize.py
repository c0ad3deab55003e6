"""Resizing in C++ gives Pillow's pixels on every path, whatever the sizes, the filter and the window."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convnext_deploy.native import library, resize

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="the native engine needs a C++ compiler"
)
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS
}  # fmt: skip


def by_pillow(
    pixels: np.ndarray, window: resize.Window, filter: str, grey: bool = False, columns_first: bool = False
) -> np.ndarray:
    """(C, rows, columns), one direction after the other."""
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3] if pixels.ndim == 3 else pixels))
    if grey:
        image = image.convert("L")
    half = (image.width, window.height) if columns_first else (window.width, image.height)
    for size in (half, (window.width, window.height)):
        if image.size != size:
            image = image.resize(size, FILTERS[filter])
    corner = window.left, window.top
    cropped = image.crop((*corner, corner[0] + window.columns, corner[1] + window.rows))
    return np.atleast_3d(np.asarray(cropped)).transpose(2, 0, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_window_of_every_resize_has_pillows_pixels(draw: st.DataObject) -> None:
    side = st.one_of(st.integers(1, 40), st.integers(1, 400))
    height, width, rows, columns = (draw.draw(side) for _ in range(4))
    if draw.draw(st.booleans()):  # one direction, or none, is left as it is
        rows = height
    top, left = draw.draw(st.integers(0, rows - 1)), draw.draw(st.integers(0, columns - 1))
    window = resize.Window(
        rows, columns, top, left, draw.draw(st.integers(1, rows - top)), draw.draw(st.integers(1, columns - left))
    )
    shape = draw.draw(st.sampled_from([(), (3,), (4,)]))
    random = np.random.default_rng(height * width)
    # Black and white beside each other: sums beyond what a byte has.
    values = random.integers(0, 2, (height, width + 3, *shape)) * 255
    pixels = np.where(random.random(values.shape) < 0.5, values, random.integers(0, 256, values.shape)).astype(np.uint8)
    if draw.draw(st.booleans()):  # rows are beside each other
        pixels = np.ascontiguousarray(pixels[:, :width])
    pixels = pixels[:, :width]
    filter = draw.draw(st.sampled_from(resize.FILTERS))
    grey = shape != () and draw.draw(st.booleans())
    first = draw.draw(st.booleans())
    expected = by_pillow(pixels, window, filter, grey, first)
    for isa in library.isas():
        found = resize.resized(pixels, window, filter, grey=grey, columns_first=first, isa=isa)
        np.testing.assert_array_equal(found, expected, err_msg=isa)


@pytest.mark.parametrize("filter", resize.FILTERS)
def test_a_long_strip_becomes_a_point_and_a_point_a_long_strip(filter: resize.Filter) -> None:
    strip = np.random.default_rng(0).integers(0, 256, (3, 50_000, 3), np.uint8)
    for pixels, sides in ((strip, (2, 1)), (strip[:1, :1], (3, 20_000))):
        window = resize.Window(*sides, 0, 0, *sides)
        np.testing.assert_array_equal(resize.resized(pixels, window, filter), by_pillow(pixels, window, filter))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pixel_bytes": 2}, "pixel_bytes is none of 1, 3 and 4"),
        ({"row_bytes": 29}, "row_bytes is less than a row has"),
        ({"source_width": 0}, "a side is none of 1 to 2^28 pixels"),
        ({"height": 2**31}, "a side is none of 1 to 2^28 pixels"),
        ({"top": 5, "rows": 4}, "the window is not within the resized image"),
        ({"left": 2**32 - 1, "columns": 2}, "the window is not within the resized image"),
        ({"columns": 0}, "the window is not within the resized image"),
        ({"filter": 3}, "filter is none of 0, 1 and 2"),
    ],
)
def test_the_library_refuses_what_reaches_out_of_an_image(changes: dict[str, int], line: str) -> None:
    import ctypes

    given = {
        "source_height": 10, "source_width": 10, "row_bytes": 30, "pixel_bytes": 3, "height": 8, "width": 8, "rows": 8,
        "columns": 8,
    }  # fmt: skip
    pixels, out, message = np.zeros(300, np.uint8), np.zeros(192, np.uint8), ctypes.create_string_buffer(200)
    code = library.load().cnxt_image_resize(
        None, library.Resize(**{**given, **changes}), pixels.ctypes.data, out.ctypes.data, message, len(message)
    )
    assert (code, message.value.decode()) == (2, line)
