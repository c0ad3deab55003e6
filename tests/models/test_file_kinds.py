"""Files and folders that hold no PyTorch weights: each is refused by what it is, with what to do."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import checkpoint

State = dict[str, Tensor]


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        checkpoint.load(str(path), image_size=(32, 32))
    line = str(caught.value)
    assert "\n" not in line
    return line


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"), io.BytesIO())
    return content.getvalue()


def arrays() -> bytes:
    content = io.BytesIO()
    np.savez(content, kernel=np.ones(3))
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "what", "cure"),
    [
        ("m.pth", b"", "is empty", "download it again"),
        (
            "m.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a pointer of Git LFS",
            "git lfs pull",
        ),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS", "git lfs pull"),
        ("m.pth", b"\n<!DOCTYPE html><html></html>", "is a web page", "download the file itself"),
        ("m.h5", b"\x89HDF\r\n\x1a\nxxx", "an HDF5 file", "save PyTorch's state dict"),
        ("m.keras", zipped("metadata.json", "config.json", "model.weights.h5"), "a model of Keras", "state dict"),
        ("flax_model.msgpack", b"\x81\xa1a\x01", "msgpack, as Flax writes it", "state dict"),
        ("m.npz", arrays(), "an archive of numpy arrays", "state dict"),
        ("m.gguf", b"GGUF\x03\x00\x00\x00", "a GGUF file", "state dict"),
        ("m.tflite", b"\x1c\x00\x00\x00TFL3", "TensorFlow Lite", "state dict"),
        ("m.xml", b"<?xml version='1.0'?><net/>", "of an OpenVINO model", "the checkpoint"),
        ("m.engine", b"\x00" * 64, "a TensorRT engine", "the checkpoint"),
        ("config.json", b"{}", "a configuration", "--config"),
        ("m.pth.tar", tarred(), "a tar archive", "unpack it"),
        ("m.tar.gz", gzip.compress(tarred()), "compressed with gzip", "unpack it"),
        ("m.zip", zipped("a/model.pth"), "a zip archive of a/model.pth", "unpack it"),
        ("m.pt2", zipped("m/archive_format", "m/models/model.json"), "a program of torch.export", "torch.export.load"),
        ("m.bin", b"\x12\x34" * 99, "it is no file of torch.save and no safetensors file", "convert it"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_a_file_of_another_kind_is_refused_by_its_name(
    name: str, content: bytes, what: str, cure: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    line = refusal(tmp_path / name)
    assert what in line
    assert cure in line


@pytest.mark.parametrize("name", ["m.pth", "m.bin", "m.onnx", "weights"])
def test_safetensors_are_told_by_their_content_and_not_by_their_name(name: str, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / name)
    assert checkpoint.load(str(tmp_path / name), image_size=(32, 32)).weights.layout == "timm"


@pytest.mark.parametrize("begin", [b"\x80", b"\x1f\x8b", b"PK", b"BZh"], ids=["pickle", "gzip", "zip", "bzip2"])
def test_a_header_whose_length_is_how_another_form_begins_is_still_read(
    begin: bytes, state: State, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + length], content[8 + length :]
    wanted = int.from_bytes(begin, "little")
    wanted += -(-max(length - wanted, 0) // 256) * 256 if len(begin) == 1 else 0  # its low byte stays
    padded = header + b" " * (wanted - length)  # as the format allows
    (tmp_path / "m.pth").write_bytes(len(padded).to_bytes(8, "little") + padded + tensors)
    assert (tmp_path / "m.pth").read_bytes().startswith(begin)
    assert checkpoint.load(str(tmp_path / "m.pth"), image_size=(32, 32)).weights.layout == "timm"


def test_a_file_of_torch_save_under_the_other_forms_name_says_so(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "m.safetensors")
    assert refusal(tmp_path / "m.safetensors").endswith("rename it to m.pth")


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "has no weights (in it: nothing)"),
        (("readme.md",), "has no weights (in it: readme.md)"),
        (("last.pth.tar", "model_best.pth.tar", "args.yaml"), "has the weights last.pth.tar, model_best.pth.tar"),
        (("checkpoints/epoch=1.ckpt", "hparams.yaml"), "has the weights checkpoints/epoch=1.ckpt; give it with"),
        (("adapter_config.json", "adapter_model.safetensors"), "model.merge_and_unload()"),
        ((".metadata", "__0_0.distcp"), "torch.distributed.checkpoint.format_utils dcp_to_torch"),
        (("latest", "zero_to_fp32.py", "global_step1/mp_rank_00_model_states.pt"), "python zero_to_fp32.py"),
        (("saved_model.pb", "variables/x"), "a SavedModel of TensorFlow"),
        (("_METADATA", "manifest.ocdbt", "d/0"), "a checkpoint of Orbax, as Flax and JAX write it; only PyTorch's"),
        (("model.xml", "model.bin"), "an OpenVINO model (model.xml and its .bin); give the checkpoint that it was"),
        (("data.pkl", "version", "data/0"), "a file of torch.save that was unpacked; pack it again"),
        (
            ("run-1/model.safetensors", "run-1/optimizer.pt", "run-1/rng_state_0.pth", "run-1/training_args.bin"),
            "has the weights run-1/model.safetensors; give it with",
        ),
        (("config.json", "flax_model.msgpack"), "flax_model.msgpack is a file of msgpack"),
        (("config.json", "tf_model.h5"), "tf_model.h5 is an HDF5 file"),
        (("manifest.json", "model.onnx"), "is an artifact, made by `export`"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_a_folder_without_the_usual_files_is_refused_with_what_is_in_it(
    names: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n" if name.endswith(".h5") else b"x")
    assert words in refusal(tmp_path)


def test_a_package_of_core_ml_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "x.mlpackage").mkdir()
    assert "is a model of Core ML; give the checkpoint that it was" in refusal(tmp_path / "x.mlpackage")


def test_the_only_weights_beside_a_configuration_are_taken_and_said(model: nn.Module, tmp_path: Path) -> None:
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    found = checkpoint.load(str(tmp_path), image_size=(32, 32))
    assert found.note == f"taking model.fp16.safetensors, the only weights in {tmp_path}"
    assert found.provenance["mean"].source == "config.json"


def test_of_two_weights_files_in_a_folder_the_choice_is_said(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "pytorch_model.bin")
    found = checkpoint.load(str(tmp_path), image_size=(32, 32))
    assert found.note == f"taking model.safetensors of {tmp_path}, and not pytorch_model.bin"
    assert torch.equal(found.model.get_parameter("head.classifier.bias"), state["head.fc.bias"])


def test_the_second_model_of_accelerate_is_said(state: State, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file(state, tmp_path / name)
    found = checkpoint.load(str(tmp_path), image_size=(32, 32))
    assert found.note == f"taking model.safetensors of {tmp_path}, and not model_1.safetensors"


def test_a_file_that_is_taken_alone_says_what_beside_it_is_not_read(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnext"}))
    found = checkpoint.load(str(tmp_path / "model.safetensors"), image_size=(32, 32))
    assert found.note is not None
    assert found.note.startswith("config.json beside model.safetensors is not read")


def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.pth").write_bytes(b"x")

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)  # root, as which tests may run, can open everything
    monkeypatch.setattr(Path, "iterdir", closed)
    assert refusal(tmp_path / "m.pth") == f"{tmp_path}/m.pth cannot be read: Permission denied"
    assert refusal(tmp_path) == f"{tmp_path} cannot be listed: Permission denied"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_part_of_a_checkpoint_its_index_and_parts_without_it_say_what_to_give(
    suffix: str, state: State, tmp_path: Path
) -> None:
    """The first alone lacked stages, the second was a configuration, and of the third one part was to be given."""
    parts = [tmp_path / f"model-{number:05}-of-00002.{suffix}" for number in (1, 2)]
    names = list(state)
    for path, keys in zip(parts, (names[::2], names[1::2]), strict=True):
        held = {key: state[key] for key in keys}
        save_file(held, path) if suffix == "safetensors" else torch.save(held, path)
    line = refusal(parts[0])
    assert "is part 1 of 2 of a checkpoint; give the folder with all of its parts and their index" in line
    assert "parts of a checkpoint, and not their index; put the file beside them that ends in .index.json" in refusal(
        tmp_path
    )
    index = tmp_path / f"{'model' if suffix == 'safetensors' else 'pytorch_model'}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {key: parts[i % 2].name for i, key in enumerate(names)}}))
    assert "is the index of a checkpoint in several files; give the folder that it and they are in" in refusal(index)
    assert checkpoint.load(str(tmp_path), image_size=(32, 32)).model.spec.num_classes > 0


def test_a_checkpoint_in_one_part_is_read(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model-00001-of-00001.safetensors")
    assert checkpoint.load(str(tmp_path / "model-00001-of-00001.safetensors"), image_size=(32, 32))
