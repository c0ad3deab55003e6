"""Batches of a session whose outputs do not belong to single images."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from convnext_deploy.artifact.session import Session, run_in_batches
from convnext_deploy.errors import UsageError
from convnext_deploy.records.manifest import BatchRange


def giving(*outputs: Any) -> Session:
    """What `run_in_batches` asks a session for."""
    records = tuple(SimpleNamespace(name=f"output{index}") for index in range(len(outputs)))
    export = SimpleNamespace(batch=BatchRange(min=2, opt=2, max=2))
    manifest = SimpleNamespace(export=export, outputs=records)
    return cast("Session", SimpleNamespace(manifest=manifest, run=lambda images: outputs))


def test_the_rows_of_images_that_filled_up_a_batch_are_cut_off() -> None:
    (found,) = run_in_batches(giving(np.array([[1.0], [2.0]])), np.zeros((3, 3, 8, 8), np.float32))
    assert found.tolist() == [[1.0], [2.0], [1.0]]


@pytest.mark.parametrize("output", [np.zeros((100, 4)), np.zeros(()), np.zeros((0, 4))])
def test_outputs_without_a_row_for_each_image_are_not_cut(output: Any) -> None:
    """A detector's boxes after suppression, for one: the first rows alone would look like an answer."""
    with pytest.raises(UsageError, match=r"the output output1 has the shape .* for 2 images, not a row for each"):
        run_in_batches(giving(np.zeros((2, 1)), output), np.zeros((2, 3, 8, 8), np.float32))
