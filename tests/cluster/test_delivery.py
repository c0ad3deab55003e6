"""What is sent to a node that does not see the files: images, and what is right of them."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectors import drawn
from PIL import Image

from convnext_deploy.cluster import delivery
from convnext_deploy.cluster.connection import Node
from convnext_deploy.data import boxes, masks, sources
from convnext_deploy.data.image_source import ImageSource
from convnext_deploy.errors import DataError

NODE = Node(id="one", address="10.0.0.1", cpus=1, gpus=0)


def segmented(folder: Path) -> ImageSource:
    """Four images, each with a mask of its own number."""
    for number in range(4):
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / kind / f"{number}.png")
    opened = sources.open_source(str(folder / "images"))
    return masks.masked(opened, str(folder / "masks"), ignored=255, reduce_labels=False)


def with_objects(folder: Path) -> ImageSource:
    images, file = drawn(folder, 4)
    return boxes.boxed(sources.open_source(str(images)), file, None, 3, masks=True)


@pytest.mark.parametrize("opened", [segmented, with_objects])
def test_what_is_sent_needs_no_file(opened: Callable[[Path], ImageSource], tmp_path: Path) -> None:
    source = opened(tmp_path / "data")
    kept = delivery.part(source, range(1, 3), seen=True)
    pixels, sha256 = [np.asarray(kept.read(index)) for index in range(2)], kept.sha256
    sent: ImageSource = pickle.loads(pickle.dumps(delivery.part(source, range(1, 3), seen=False)))
    shutil.rmtree(tmp_path / "data")
    assert all(np.array_equal(np.asarray(sent.read(index)), pixels[index]) for index in range(2))
    assert sent.sha256 == sha256  # of names, and of every mask or object
    if source.boxes is not None:
        assert source.boxes.masks is not None
        assert sent.boxes is not None
        assert sent.boxes.masks == source.boxes.masks[1:3]


def test_a_mask_that_cannot_be_read_is_named_where_it_was_sent(tmp_path: Path) -> None:
    source = segmented(tmp_path)
    (tmp_path / "masks" / "2.png").unlink()
    sent = delivery.part(source, range(1, 3), seen=False)
    assert sent.masks is not None
    assert sent.masks.encoded(0)
    with pytest.raises(DataError, match=r"the mask .*2\.png cannot be read"):
        sent.masks.encoded(1)


def test_a_node_that_sees_the_images_and_other_masks_is_blind(tmp_path: Path) -> None:
    source = segmented(tmp_path)
    proof = delivery.proof_of(source)
    assert proof is not None
    assert proof.holds()
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "masks" / "2.png")
    assert not proof.holds()
    said: list[str] = []
    told = delivery.told_who_is_blind(source, proof, said.append)
    told(NODE, False)
    told(NODE, False)
    assert said == [f"node 10.0.0.1: it does not see {source.name}, so they are sent with their masks"]
