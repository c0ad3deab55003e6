"""Pickles of arrays, as detectron2 publishes them: what is read of them, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from references import DEPTHS, DIMS, Official, randomize_

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import pickles
from convnext_deploy.models.checkpoint import load


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray[Any, Any]]:
    model = randomize_(Official(DEPTHS, DIMS, v2=False))
    return {key: value.numpy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_pickle_of_detectron2_is_loaded(protocol: int, suffix: str, state: Any, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    bottom_up = {f"backbone.bottom_up.{key}": value for key, value in state.items() if not key.startswith("head.")}
    content = {"model": bottom_up, "__author__": "somebody", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load(str(path), task="features")
    assert loaded.weights.source == f"model{suffix}[model]"
    stem = loaded.model.state_dict()["stem.convs.0.weight"]
    assert torch.equal(stem, torch.from_numpy(state["downsample_layers.0.0.weight"]))


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_arrays_of_other_float_types_and_byte_orders_are_read(dtype: str, state: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    cast = {key: np.asfortranarray(value.astype(dtype)) for key, value in state.items()}
    path.write_bytes(pickle.dumps(cast))
    stem = load(str(path)).model.state_dict()["stem.convs.0.weight"]
    assert torch.equal(stem, torch.from_numpy(cast["downsample_layers.0.0.weight"].astype(np.float32).copy()))


def test_arrays_in_a_file_of_torch_save_are_read_too(state: Any, tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "model.pth")
    assert load(str(tmp_path / "model.pth")).model.spec.dims == DIMS


class Ordinary:
    pass


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "the code ran")


def test_code_in_a_pickle_of_arrays_does_not_run(state: Any, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": state, "hook": Hostile(marker)}))
    with pytest.raises(
        WeightsError, match=r"model\.pkl is a pickle that contains a pathlib\.\S+, and reading that would run"
    ):
        load(str(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Ordinary(), r"contains a \S*test_pickles\.Ordinary"),
        ({"a": torch.zeros(3)}, r"contains a torch\._utils\._rebuild_tensor_v2"),
        ({"a": np.array(["text"], object)}, "an array of type O8"),
        ([1, 2], "contains a list"),
        (
            {"a": np.ones((2, 3), np.float32), "StructuredToParameterName@@": {"a": "linear_0.w_0"}},
            r"is of PaddlePaddle .* transpose every weight of two dimensions",
        ),
    ],
)
def test_what_is_no_dictionary_of_arrays_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match=words) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_an_array_that_claims_more_than_its_bytes_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps({"a.weight": np.zeros((2, 3), np.float32)}, protocol=2)
    (tmp_path / "model.pkl").write_bytes(content.replace(b"K\x02K\x03\x86", b"K\xffK\x03\x86"))
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint of plain arrays"):
        load(str(tmp_path / "model.pkl"))


BASE = pickle.dumps({"model": {"stem.0.weight": np.ones((2, 3), np.float32)}, "best": np.float64(0.5)}, protocol=2)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x80\x02K\x01r\xff\xff\xff\x1f.", r"it keeps a value in place 536,870,911 and has 10 bytes"),
        (b"\x80\x02K\x01p536870911\n.", r"it keeps a value in place 536,870,911 and has 16 bytes"),
        (
            b"\x80\x05\x96" + (2**29).to_bytes(8, "little") + b".",
            "expected 536870912 bytes in a bytearray8, but only 1",
        ),
    ],
)
def test_what_a_file_counts_and_does_not_contain_takes_no_memory(content: bytes, why: str, tmp_path: Path) -> None:
    """Eight gigabytes and three seconds, for a file of ten bytes."""
    path = tmp_path / "small.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=why):
        fuzz.bounded(lambda _: pickles.read(path))(content)


def test_no_damage_raises_anything_but_a_weights_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pkl"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        pickles.read(path)

    read(BASE)
    assert fuzz.tracebacks(fuzz.damaged([BASE], fuzz.THINNED), read) == {}
