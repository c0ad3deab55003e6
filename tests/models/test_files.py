"""Checkpoint files as training scripts write them, and as damage and malice leave them."""

import argparse
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from convnext_deploy.errors import ConvNextDeployError, WeightsError
from convnext_deploy.models import checkpoint


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value + 1 for key, value in state.items()}


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def load(content: Any, folder: Path, **options: Any) -> checkpoint.Loaded:
    torch.save(content, folder / "file.pth")
    return checkpoint.load(str(folder / "file.pth"), image_size=(32, 32), **options)


def refusal(content: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        load(content, folder, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert "\x1b" not in line
    return line


# Wrappers ------------------------------------------------------------------------------------------------------------

WRAPPED: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda s: {"ema": {"decay": 0.9, "updates": torch.tensor(7)}, "model": s}, "model"),  # counters only
    (lambda s: {"model_ema": below("module.", s) | {"n_averaged": torch.tensor(3)}, "model": other(s)}, "model_ema"),
    (lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "loss": 0.1}, "model_state_dict"),
    (lambda s: {"state_dict": {"model": {"net": s}}}, "state_dict.model.net"),
    (lambda s: {"checkpoint": {"weights": below("_orig_mod.module.", s)}}, "checkpoint.weights"),
    (lambda s: {"student": other(s), "teacher": below("backbone.", s)}, "teacher"),
    (lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1, model="convnext")}, "state_dict"),
    (lambda s: {"state_dict": s, "best": np.float64(0.5), "seen": np.int64(4), "log": np.zeros(3)}, "state_dict"),
    (lambda s: {"state_dict": s, "best": np.float32(0.5), "done": np.bool_(True)}, "state_dict"),
]  # fmt: skip


@pytest.mark.parametrize(("wrapped", "name"), WRAPPED, ids=[name for _, name in WRAPPED])
def test_the_one_model_in_a_file_is_found_in_any_wrappers(
    wrapped: Callable[[dict[str, Tensor]], Any], name: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    found = load(wrapped(state), tmp_path)
    assert found.weights.source == f"file.pth[{name}]"
    assert torch.equal(found.model.get_parameter("head.classifier.bias"), state["head.fc.bias"])


def test_of_several_models_the_choice_is_said_and_the_key_wins(state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"state_dict": state, "state_dict_ema": other(state)}
    found = load(content, tmp_path)
    assert found.note == "taking state_dict_ema of file.pth, and not state_dict (--weights-key chooses)"
    chosen = load(content, tmp_path, weights_key="state_dict")
    assert (chosen.weights.source, chosen.note) == ("file.pth[state_dict]", None)
    assert torch.equal(chosen.model.get_parameter("head.classifier.bias"), state["head.fc.bias"])


def test_of_several_models_under_unknown_names_none_is_guessed(state: dict[str, Tensor], tmp_path: Path) -> None:
    line = refusal({"first": state, "second": state}, tmp_path)
    assert line.endswith("has 2 models, first, second; choose one with --weights-key")


def test_a_prefix_that_would_work_is_named_with_its_keys(state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"state_dict": below("backbone.encoder.", state) | {"criterion.weight": torch.ones(3)}}
    size = len(state)
    assert f"--weights-key backbone.encoder. ({size} of {size + 1} keys)" in refusal(content, tmp_path)
    assert load(content, tmp_path, weights_key="backbone.encoder.").model.spec.num_classes == 3


def test_a_key_that_is_not_there_shows_those_that_are(state: dict[str, Tensor], tmp_path: Path) -> None:
    line = refusal({"model": state, "epoch": 3}, tmp_path, weights_key="modle")
    assert line.endswith("has no wrapper and no key prefix 'modle' (its keys: 'model', 'epoch'; with tensors: model)")


def test_a_key_within_a_longer_prefix_names_that(state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"state_dict": below("module.encoder_q.", state)}
    line = refusal(content, tmp_path, weights_key="encoder_q.")
    assert line.endswith("; give the whole prefix, module.encoder_q.")
    assert load(content, tmp_path, weights_key="module.encoder_q.").model.spec.num_classes == 3


def test_a_linear_behind_dropout_is_the_classifier_and_said(state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {key.replace("head.fc.", "head.fc.1."): value for key, value in state.items()}
    found = load(content, tmp_path)
    assert torch.equal(found.model.get_parameter("head.classifier.weight"), state["head.fc.weight"])
    assert found.note is not None
    assert found.note.startswith("head.fc.1.weight is taken as the classifier")


def test_a_head_of_several_layers_is_no_matter_where_it_is_not_used(state: dict[str, Tensor], tmp_path: Path) -> None:
    content = state | {"head.fc.0.weight": torch.ones(8, 128), "head.fc.3.weight": torch.ones(3, 8)}
    del content["head.fc.weight"], content["head.fc.bias"]
    refusal(content, tmp_path)
    for task in ("embed", "features"):
        assert load(content, tmp_path, task=task).note is None


def test_sharded_pickles_are_read_by_their_index(state: dict[str, Tensor], tmp_path: Path) -> None:
    names = sorted(state)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, keys in parts.items():
        torch.save({key: state[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = checkpoint.load(str(tmp_path), image_size=(32, 32))
    assert torch.equal(found.model.get_parameter("head.classifier.bias"), state["head.fc.bias"])


def test_a_tensor_of_two_values_in_two_parts_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    bias = state["head.fc.bias"]
    torch.save(state, tmp_path / "a.bin")
    index = {"weight_map": dict.fromkeys(state, "a.bin") | {"head.fc.bias": "b.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"head.fc.bias": bias.clone()}, tmp_path / "b.bin")
    assert checkpoint.load(str(tmp_path), image_size=(32, 32)).model.spec.num_classes == 3
    torch.save({"head.fc.bias": bias + 1}, tmp_path / "b.bin")
    with pytest.raises(WeightsError, match=r"has head\.fc\.bias in two of its parts, the second of them b\.bin"):
        checkpoint.load(str(tmp_path), image_size=(32, 32))


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_whole_model_is_refused_with_the_two_lines_that_cure_it(model: nn.Module, tmp_path: Path) -> None:
    line = refusal(model, tmp_path)
    assert "it contains a timm.models.convnext.ConvNeXt" in line
    assert "torch.load('file.pth', weights_only=False); torch.save(model.state_dict()" in line


def test_torchscript_is_refused_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "file.pt"))
    with pytest.raises(WeightsError, match="is a TorchScript archive"):
        checkpoint.load(str(tmp_path / "file.pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, state: dict[str, Tensor], tmp_path: Path) -> None:
    name = "stages.1.blocks.0.mlp.fc1.weight"
    content = {key: tensor.clone() for key, tensor in state.items()}
    content[name][3, 4] = content["head.fc.bias"][1] = value
    line = refusal(content, tmp_path)
    assert f"NaN or infinite values in 2 of {len(state)} tensors: " in line
    assert name in line
    assert "head.fc.bias" in line
    assert load(content | {name: state[name]}, tmp_path, task="embed")  # which does not use the classifier


def test_numbers_beyond_float32_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    assert "NaN or infinite" in refusal(
        state | {"head.fc.bias": torch.full((3,), 1e300, dtype=torch.float64)}, tmp_path
    )


def test_tensors_without_values_are_refused_by_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    line = refusal({key: value.to("meta") for key, value in state.items()}, tmp_path)
    assert "is on the meta device and has no values" in line


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/never-made-by-a-checkpoint"),)


def test_allowing_numpy_and_namespaces_allows_nothing_else(state: dict[str, Tensor], tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    for content in (Evil(), argparse.Namespace(evil=Evil()), np.array([Evil()], dtype=object)):
        refusal({"state_dict": state, "args": content}, tmp_path)
    assert not Path("/tmp/never-made-by-a-checkpoint").exists()
    assert set(torch.serialization.get_safe_globals()) == before  # allowed while reading, not for good


# Fuzzed --------------------------------------------------------------------------------------------------------------


def mutated(content: bytes, generator: random.Random, head: int) -> bytes:
    """Some bytes changed, cut, repeated or put in, mostly near the beginning, where headers are."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(min(head, len(found)) if generator.random() < 0.8 else len(found))
        match generator.randrange(5):
            case 0:
                found[at] = generator.randrange(256)
            case 1:
                found[at] ^= 1 << generator.randrange(8)
            case 2:
                del found[at : at + generator.randint(1, 40)]
            case 3:
                found[at:at] = found[at : at + generator.randint(1, 40)]
            case _:
                word = generator.choice(
                    [b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"\xff\xff\xff\xff", b"F8_E8M0"]
                )
                found[at : at + len(word)] = word
        if not found:
            return b""
    return bytes(found)


def sources(folder: Path, state: dict[str, Tensor], kind: str) -> tuple[Path, bytes, Callable[[Any], bytes]]:
    """(the file that is damaged, its content, how a mutation of it is made)."""
    source = folder / "model.safetensors"
    if kind == "safetensors":
        save_file(state, source, metadata={"image_size": "32", "mean": "[0.5, 0.5, 0.5]", "labels": '["a", "b", "c"]'})
        content = source.read_bytes()
        head = int.from_bytes(content[:8], "little") + 8
        return source, content, lambda generator: mutated(content, generator, head)
    if kind == "config":
        save_file(state, source)
        cfg = {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "input_size": [3, 32, 32],
            "crop_pct": 0.9,
            "interpolation": "bicubic",
        }
        arguments = {"act_layer": "gelu_tanh", "norm_eps": 1e-5}
        config = json.dumps({"pretrained_cfg": cfg, "label_names": ["a", "b", "c"], "model_args": arguments}).encode()
        return folder / "config.json", config, lambda generator: mutated(config, generator, len(config))
    source = folder / "model.pth"
    torch.save({"state_dict": state, "epoch": 3}, source, _use_new_zipfile_serialization=kind != "legacy")
    content = source.read_bytes()
    if kind == "legacy":
        return source, content, lambda generator: mutated(content, generator, len(content))
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))

    def archived(generator: random.Random) -> bytes:
        # Mostly the pickle inside a sound archive, where random bytes of the archive only break its checksums.
        if generator.random() < 0.2:
            return mutated(content, generator, len(content))
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for part, data in parts.items():
                archive.writestr(part, mutated(data, generator, len(data)) if part == pickled else data)
        return made.getvalue()

    return source, content, archived


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "config"])
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about what it finds in damaged pickles
def test_damaged_checkpoints_end_in_our_errors_only(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    file, content, damage = sources(tmp_path, state, kind)
    refused = 0

    def read(damaged: bytes) -> None:
        nonlocal refused
        file.write_bytes(damaged)
        try:
            checkpoint.load(str(tmp_path if kind == "config" else file), image_size=(32, 32))
        except ConvNextDeployError:
            refused += 1
            raise

    read(content)
    generator, count = random.Random(0), fuzz.THINNED // (20 if kind == "legacy" else 4)  # the old format is slow
    assert fuzz.tracebacks((damage(generator) for _ in range(count)), read) == {}
    assert refused > count // 5
