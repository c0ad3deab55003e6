"""What a file or a folder is that has no PyTorch weights, and what to do with it: told by its first bytes and names.

People give what they have: a model of another framework, an archive, a pointer of Git LFS, a page that a download gave
in the file's place, a folder as a training script leaves it. Each is refused by its own name and with its own cure.
"""

import os
import re
import zipfile
from pathlib import Path

from ..errors import WeightsError, plain

HEAD = 512  # bytes: a tar has its mark at 257
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")  # of files that may contain weights
_CONFIGURATIONS = (".json", ".yaml", ".yml", ".py", ".xml", ".txt", ".md")
INDEX = ".index.json"  # how the names of indices of parts end
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.(safetensors|bin)")  # of a checkpoint in several files
_FURTHER = re.compile(r"(model|pytorch_model)_\d+\.(safetensors|bin)")  # by accelerate, which calls the first `model`
# What transformers' Trainer and accelerate save beside weights, in files that end as those do.
_OF_TRAINING = re.compile(
    r"(optimizer|scheduler|sampler|scaler|rng_state|random_states|training_args|dl_state_dict)(_\d+)*\.(pt|bin|pth|pkl)"
)
DEPTH = 3  # levels of folders below one that is given
_SHOWN = 4

_ELSEWHERE = "only PyTorch's weights are read; load it with the library that wrote it, and save PyTorch's state dict"
_UNPACK = "unpack it, and give the weights file inside"

# How files begin, what they are, and what to do.
_BEGINS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself", "run `git lfs pull` where it is from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write it", _ELSEWHERE),
    (b"GGUF", "a GGUF file, as llama.cpp and its relatives read it", _ELSEWHERE),
    (b"\x93NUMPY", "one array of numpy", "give a file with all of the model's tensors under their names"),
    (b"ftrt", "a TensorRT engine", "give the checkpoint that it was built from"),
    (b"\x1f\x8b", "compressed with gzip", _UNPACK),
    (b"BZh", "compressed with bzip2", _UNPACK),
    (b"\xfd7zXZ", "compressed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
)
# Formats whose first bytes say too little.
_ENDS: dict[str, tuple[str, str]] = {
    ".msgpack": ("a file of msgpack, as Flax writes it", _ELSEWHERE),
    ".pb": ("a graph of TensorFlow", _ELSEWHERE),
    ".tflite": ("a model of TensorFlow Lite", _ELSEWHERE),
    ".index": ("an index of TensorFlow's checkpoint", _ELSEWHERE),
    ".engine": ("a TensorRT engine", "give the checkpoint that it was built from"),
    ".plan": ("a TensorRT engine", "give the checkpoint that it was built from"),
    ".mlmodel": ("a model of Core ML", "give the checkpoint that it was converted from"),
    ".xml": ("the graph of an OpenVINO model", "give the checkpoint that it was converted from"),
    ".yaml": ("a configuration", "give the weights with --weights"),
    ".yml": ("a configuration", "give the weights with --weights"),
    ".json": ("a configuration", "give the weights with --weights, and this with --config"),
    ".py": ("a Python file", "give the weights with --weights, and a configuration with --config"),
}  # fmt: skip


def head_of(path: Path) -> bytes:
    """A file's first bytes.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {plain(error)}") from None


def is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file is of this form, by its beginning. A damaged one still has the name."""
    return _begins_as_safetensors(head) or path.suffix.lower() == ".safetensors"


def _begins_as_safetensors(head: bytes) -> bool:
    """The length of a header in JSON, and that. Its first bytes may be those of any other form."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30


def refuse_others(path: Path, head: bytes) -> None:
    """Refuse what is known to hold no weights of PyTorch.

    Args:
        head: the file's first bytes.

    Raises:
        WeightsError: with the file's kind and the cure.
    """
    kind = _kind(path, head)
    if kind is not None:
        raise WeightsError(f"{path} is {kind[0]}; {kind[1]}")


def _kind(path: Path, head: bytes) -> tuple[str, str] | None:
    if not head:
        return "empty", "copy or download it again"
    if _begins_as_safetensors(head):
        return None
    for begin, what, cure in _BEGINS:
        if head.startswith(begin):
            return what, cure
    if head[:2] == b"PK":
        return _kind_of_zip(path) or _renamed(path)
    if head[:1] == b"\x80":
        return _renamed(path)
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, which the download gave in the file's place", "download the file itself"
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[4:8] == b"TFL3":
        return _ENDS[".tflite"]
    if path.name.endswith(INDEX):
        return "the index of a checkpoint in several files", "give the folder that it and they are in"
    return _ENDS.get(path.suffix.lower())


def _renamed(path: Path) -> tuple[str, str] | None:
    """PyTorch itself goes by this suffix."""
    if path.suffix.lower() != ".safetensors":
        return None
    return "a file of torch.save under the name of another form", f"rename it to {path.stem}.pth"


def _kind_of_zip(path: Path) -> tuple[str, str] | None:
    """Of an archive that torch.save has not written."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None  # damaged: torch.load says how
    files = {name.rpartition("/")[2] for name in names}
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return (
            "a TorchScript archive, a program and no weights",
            f"save its weights where you trust it, with torch.save(torch.jit.load({path.name!r}).state_dict(), "
            "'weights.pth'), and give that file",
        )
    if "archive_format" in files or any("/models/" in name for name in names):
        return (
            "a program of torch.export and no checkpoint",
            f"save its weights where you trust it, with torch.save(torch.export.load({path.name!r}).state_dict, "
            "'weights.pth'), and give that file",
        )
    if "data.pkl" in files:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of numpy arrays, and JAX's weights are written so", _ELSEWHERE
    if "model.weights.h5" in files:
        return "a model of Keras", _ELSEWHERE
    return f"a zip archive of {_listed(sorted(name for name in names if not name.endswith('/')))}", _UNPACK


def refuse_part(path: Path) -> None:
    """Refuse one of the files that a checkpoint is in, which the library that wrote it numbers.

    Raises:
        WeightsError: with what to give.
    """
    match = _PART.search(path.name)
    if match is not None and int(match[2]) > 1:
        raise WeightsError(
            f"{path} is part {int(match[1])} of {int(match[2])} of a checkpoint; give the folder with all of its parts "
            f"and their index, which ends in {INDEX}"
        )


def refuse_folder(folder: Path) -> None:
    """Refuse a folder without weights under the usual names, by what it is or with the weights files in it.

    Raises:
        WeightsError: always.
    """
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise WeightsError(f"{folder} cannot be listed: {plain(error)}") from None
    if "manifest.json" in names and any(name.startswith("model.") for name in names):
        raise WeightsError(f"{folder} is an artifact, made by `export`; give the checkpoint that it was made from")
    if "adapter_config.json" in names:
        raise WeightsError(
            f"{folder} has an adapter (LoRA or a relative) without its base model; merge it where both are loaded, "
            "with model = model.merge_and_unload(), save that, and give its weights"
        )
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        raise WeightsError(
            f"{folder} is a sharded checkpoint of torch.distributed; join it with python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth, and give weights.pth"
        )
    if "zero_to_fp32.py" in names or ("latest" in names and any(name.startswith("global_step") for name in names)):
        raise WeightsError(
            f"{folder} is a checkpoint of DeepSpeed; join it with DeepSpeed's own script, python zero_to_fp32.py . "
            "weights, and give the file that this writes"
        )
    if {"data.pkl", "data", "version"} <= names:
        raise WeightsError(
            f"{folder} is a file of torch.save that was unpacked; pack it again, with python -m zipfile -c weights.pth "
            f"{folder}, and give weights.pth"
        )
    if "saved_model.pb" in names:
        raise WeightsError(f"{folder} is a SavedModel of TensorFlow; {_ELSEWHERE}")
    if any(name.endswith(".ocdbt") for name in names) or {"_METADATA", "_CHECKPOINT_METADATA"} & names:
        raise WeightsError(f"{folder} is a checkpoint of Orbax, as Flax and JAX write it; {_ELSEWHERE}")
    if folder.suffix.lower() == ".mlpackage":
        raise WeightsError(f"{folder} is a model of Core ML; give the checkpoint that it was converted from")
    graphs = sorted(name for name in names if name.endswith(".xml") and f"{name[:-4]}.bin" in names)
    if graphs:
        raise WeightsError(
            f"{folder} is an OpenVINO model ({graphs[0]} and its .bin); give the checkpoint that it was converted from"
        )
    weights = weights_in(folder)
    parts = [name for name in weights if _PART.search(name)]
    if parts and len(parts) == len(weights):
        raise WeightsError(
            f"{folder} has {_listed(parts)}, parts of a checkpoint, and not their index; put the file beside them that "
            f"ends in {INDEX}"
        )
    if weights:
        which = "it" if len(weights) == 1 else "one of them"
        raise WeightsError(f"{folder} has the weights {_listed(weights)}; give {which} with --weights")
    for path in sorted(folder / name for name in names):
        if path.is_file() and path.suffix.lower() not in _CONFIGURATIONS:
            refuse_others(path, head_of(path))
    listing = _listed(sorted(names)) if names else "nothing"
    raise WeightsError(f"{folder} has no weights (in it: {listing}); name the file itself with --weights")


def further_models(folder: Path) -> list[str]:
    """Files of the second model and those after it, as accelerate's `save_state` numbers them."""
    return sorted(file.name for file in folder.iterdir() if _FURTHER.fullmatch(file.name))


def weights_in(folder: Path) -> list[str]:
    """Files below a folder that may contain weights, as paths relative to it and the nearest first."""
    by_depth: list[tuple[int, str]] = []
    for below, folders, files in os.walk(folder):
        depth = len(Path(below).relative_to(folder).parts)
        if depth == DEPTH:
            folders.clear()
        names = [name for name in files if name.lower().endswith(SUFFIXES) and not _OF_TRAINING.fullmatch(name)]
        by_depth += [(depth, str(Path(below, name).relative_to(folder))) for name in names]
    return [name for _, name in sorted(by_depth)]


def _listed(names: list[str]) -> str:
    listing = ", ".join(name if name.isprintable() else repr(name) for name in names[:_SHOWN])
    return listing + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
