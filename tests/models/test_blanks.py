"""Checkpoints with objects beside their tensors: the weights are read, and of the objects nothing runs."""

import collections
import dataclasses
import datetime
import enum
import functools
import os
import subprocess
import sys
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import checkpoint

State = dict[str, Tensor]
Point = collections.namedtuple("Point", "x y")  # as people write it


class Items(dict[str, Any]):
    """As Lightning's AttributeDict and mmengine's ConfigDict."""


class Several(list[Any]): ...


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


@dataclasses.dataclass(slots=True)
class Slotted:
    lr: float = 0.1


class Evil:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def load(content: Any, folder: Path) -> checkpoint.Loaded:
    torch.save(content, folder / "file.pth")
    return checkpoint.load(str(folder / "file.pth"), image_size=(32, 32))


def logs() -> Any:
    found = collections.defaultdict(list)
    found["loss"].append(0.5)
    return found


OBJECTS = {
    "a path": Path("/data"),
    "a path as key": {Path("/data"): 1},
    "a default dictionary": logs(),
    "a dictionary of a class": Items(lr=1, root=Path("/data")),
    "a list of a class": Several([1, 2]),
    "a deque": collections.deque([1, 2], maxlen=3),
    "an enumeration": Colour.RED,
    "a data class": Settings(),
    "a data class with slots": Slotted(),
    "a named tuple": Point(1, 2),
    "a date": datetime.datetime(2026, 1, 1),
    "a partial function": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "a range": range(3),
    "a frozen set": frozenset([1]),
    "numpy's generator": np.random.default_rng(1),
    "numpy's older generator": np.random.RandomState(1),
    "words in an array": np.array(["a", "b"]),
    "objects in an array": np.array([1, "a"], dtype=object),
    "an optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1),
    "a module": nn.Linear(2, 2),
    "a function": len,
    "an attack": Evil(exec, "raise SystemExit(3)"),
}


@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)
def test_weights_are_read_beside_any_object(value: Any, state: State, tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    for content in ({"state_dict": state, "extra": value}, {"state_dict": state, "hparams": {"deep": [value]}}):
        found = load(content, tmp_path)
        assert torch.equal(found.model.get_parameter("head.classifier.bias"), state["head.fc.bias"])
    assert set(torch.serialization.get_safe_globals()) == before  # allowed while reading, not for good


def test_objects_that_contain_themselves_or_one_another_often_are_looked_into_once(
    state: State, tmp_path: Path
) -> None:
    inside: list[Any] = [Path("/data")]
    inside.append(inside)
    many: list[Any] = [inside]
    for _ in range(64):  # 2**64 ways to the innermost
        many = [many, many]
    found = load({"state_dict": state, "log": many}, tmp_path)
    assert found.note is not None
    assert found.note.startswith("left out the objects beside the weights (pathlib.")


def test_a_file_cannot_pass_anything_off_as_the_name_of_a_class(state: State, tmp_path: Path) -> None:
    extra: collections.OrderedDict[str, int] = collections.OrderedDict(a=1)
    for name, said in (([1], None), ("\x1b[2Jgone", r"'\x1b[2Jgone'")):
        vars(extra)["blank of"] = name
        note = load({"state_dict": state, "extra": extra}, tmp_path).note
        assert note is None if said is None else said in str(note)


def test_an_attack_that_no_blank_can_stand_for_is_refused(state: State, tmp_path: Path) -> None:
    marker = tmp_path / "never made"
    for attack in (Evil(Path.touch, marker), Evil(os.system, f"touch '{marker}'")):
        with pytest.raises(WeightsError, match="and reading that would run code"):
            load({"state_dict": state, "hook": attack}, tmp_path)
    assert not marker.exists()


def test_what_is_left_out_is_named(state: State, tmp_path: Path) -> None:
    found = load({"state_dict": state, "root": Path("/data"), "log": logs()}, tmp_path)
    path = f"{PosixPath.__module__}.PosixPath"  # pathlib._local in Python 3.13 alone
    assert found.note == (
        f"left out the objects beside the weights ({path}, collections.defaultdict), and ran none of them"
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_whole_model_stays_refused_by_its_class(wrapped: bool, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"it contains a timm\.models\.convnext\.ConvNeXt, and reading that"):
        load({"model": model, "ema": model, "root": Path("/data")} if wrapped else model, tmp_path)


def test_a_parameter_that_is_an_object_is_refused_and_not_left_out(state: State, tmp_path: Path) -> None:
    content = state | {"stages.0.blocks.0.mlp.fc1.weight": Settings()}
    with pytest.raises(
        WeightsError, match=r"has stages\.0\.blocks\.0\.mlp\.fc1\.weight as a .*\.Settings, which is no"
    ):
        load({"state_dict": content}, tmp_path)


def test_a_tensor_of_another_class_is_refused(state: State, tmp_path: Path) -> None:
    from torchvision.tv_tensors import Mask

    with (
        torch.serialization.safe_globals([Mask]),  # as importing torchao does for its own
        pytest.raises(WeightsError, match=r"has head\.fc\.bias as a torchvision\.tv_tensors\._mask\.Mask"),
    ):
        load(state | {"head.fc.bias": Mask(torch.zeros(3))}, tmp_path)


def test_nothing_is_imported_for_an_object(state: State, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("class Config:\n    pass\n")
    writes = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import theirs\n"
        "state = torch.load(sys.argv[2]); torch.save({'state_dict': state, 'config': theirs.Config()}, sys.argv[2])"
    )
    path = tmp_path / "file.pth"
    torch.save(state, path)
    subprocess.run([sys.executable, "-c", writes, str(tmp_path), str(path)], check=True, timeout=120)
    found = checkpoint.load(str(path), image_size=(32, 32))
    assert found.note is not None
    assert "theirs.Config" in found.note
    assert "theirs" not in sys.modules
