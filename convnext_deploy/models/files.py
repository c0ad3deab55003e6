"""One checkpoint file to a state dict: read without running code from it, and taken out of what scripts wrap it in."""

import argparse
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..env import needs
from ..errors import WeightsError, plain
from . import blanks, file_kinds, pickles
from .facts import metadata_facts, understood
from .layouts import has_anchor
from .mm_config import mm_facts, text_of
from .provenance import joined, sourced
from .training import held_facts

if TYPE_CHECKING:
    from .onnx_blocks import OnnxConvNeXt

# What training scripts wrap state dicts in. Where several hold a ConvNeXt, the averaged weights come first (as in
# timm), and names that are not here come last.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher",
    "state_dict", "model_state_dict", "model", "module", "net", "network", "student",
)  # fmt: skip
PADDLES = "StructuredToParameterName@@"  # an entry of every state dict that PaddlePaddle saves
DEPTH = 4  # levels of wrappers that are looked into
GROWTH, BESIDE = 10, 2**24  # bytes that tensors may have for each of their file's, and beside them
NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
OTHERS = ("bool", "complex64", "complex128", "U", "S", "M8", "m8", "O")  # of arrays beside the weights
_SAFE_GLOBALS = threading.Lock()  # PyTorch's list of them is the whole process's: one reading may not see another's
# Names of `builtins` are without it in the first form.
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([A-Za-z_][\w.]*\w)|(?:global:?|class) ([A-Za-z_][\w.]*\.[\w.]*\w)")


@dataclass(frozen=True, slots=True)
class Read:
    """A state dict, what stood beside it, the key prefix to take of it, and how to call it."""

    state: Mapping[str, Tensor]
    facts: dict[str, Any]
    prefix: str | None
    label: str
    note: str | None = None


def read_file(path: Path, key: str | None = None) -> Read:
    """Read one checkpoint file.

    Pickles are read with `weights_only=True`, which runs no code of theirs. Beside tensors they may have what training
    scripts keep with them: `argparse.Namespace`, and numpy's numbers and arrays of numbers; other objects are read as
    `blanks`. Those that are not torch.save's are read by `pickles`.

    Args:
        key: the wrapper to take, at any depth, or the prefix of the keys to take.

    Raises:
        WeightsError: not a checkpoint, truncated, or a pickle that contains more than tensors.
    """
    head = file_kinds.head_of(path)
    file_kinds.refuse_others(path, head)
    if file_kinds.is_safetensors(path, head):  # whatever the file is called
        return _safetensors(path, key)
    if path.suffix == ".onnx":
        return _onnx(path, key)
    archive = head[:2] == b"PK"  # torch.save's format since 1.6; the older one cannot be mapped
    if not archive and pickles.is_plain(path):
        return _unwrapped(pickles.read(path), path, key)
    with _SAFE_GLOBALS, torch.serialization.safe_globals(_harmless()):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        except Exception as error:  # torch.load raises many types, down to KeyError, on damaged or hostile files
            refusal = WeightsError(_why(path, error))
            if not archive:
                raise refusal from None
            try:
                content = blanks.read(path, mmap=archive)
            except Exception:  # the same, or an object that no blank can stand for: the first error says which
                raise refusal from None
    return _unwrapped(content, path, key)


def _safetensors(path: Path, key: str | None) -> Read:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Copied, as below. `file` is not a mapping.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except Exception as error:  # beside its own errors, those of PyTorch for types and shapes that it has not
        reason = plain(error)
        raise WeightsError(f"{path} is not a readable safetensors file: {reason}") from None
    cure = "save its tensors again without them: safetensors.torch.save_file(safetensors.torch.load_file(FILE), OTHER)"
    facts = understood(metadata_facts, metadata, f"{path}: its metadata", cure)
    return Read(state, sourced(facts, "the file's header"), key, path.name)


def _onnx(path: Path, key: str | None) -> Read:
    """The ConvNeXt in a graph of any exporter.

    Args:
        key: the tensors at its ends, joined by commas: what the stem reads, and the maps.
    """
    with needs("onnx"):
        from . import onnx_convnext, onnx_graph

        model = onnx_graph.load(path)
    return of_onnx(onnx_convnext.read_model(model, path.name, key.split(",") if key else ()), path.name)


def of_onnx(region: "OnnxConvNeXt", name: str) -> Read:
    """What was found in a graph, as a checkpoint: in fp32, which represents half floats exactly."""
    from .onnx_convnext import facts_of

    state = {key: torch.from_numpy(np.array(values, np.float32)) for key, values in region.state.items()}
    return Read(state, sourced(facts_of(region), "the graph"), None, name)


def _harmless() -> list[Any]:
    """Classes and functions that only hold, or put together, plain values."""
    multiarray: Any = getattr(np, "_core", None) or np.core  # before numpy 2
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace, np.ndarray, np.dtype]
    for package in ("numpy.core", "numpy._core"):  # as numpy 1 and numpy 2 write them
        names = ("scalar", "_reconstruct")
        allowed += [(getattr(multiarray.multiarray, name), f"{package}.multiarray.{name}") for name in names]
    return allowed + [type(np.dtype(name)) for name in (*NUMBERS, *OTHERS)]


def _refused(error: Exception) -> str | None:
    """The class or function that torch.load does not know."""
    words = str(error)
    match = _REFUSED_GLOBAL.search(words) if "weights_only" in words or "Unsupported" in words else None
    return None if match is None else match[1] or match[2]


def _why(path: Path, error: Exception) -> str:
    """One line of what torch.load says in ten."""
    refused = _refused(error)
    if refused is not None:
        return _holds(path, refused)
    is_pickle = not str(error).startswith("Weights only load failed")
    reason = plain(error) if is_pickle else "it is no file of torch.save and no safetensors file, or damaged"
    return (
        f"{path} cannot be read as a checkpoint of plain tensors ({reason}); "
        "convert it to safetensors where it was made"
    )


def _holds(path: Path, name: str) -> str:
    return (
        f"{path} is no plain state dict: it contains a {name}, and reading that would run code. If it is a "
        f"whole model that you trust, run: model = torch.load({path.name!r}, weights_only=False); "
        "torch.save(model.state_dict(), 'weights.pth'); and give weights.pth. If it is a dictionary with weights "
        "in it, save those in the same way: model['state_dict']"
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    names: tuple[str, ...]  # of the wrappers around it, outermost first
    state: dict[str, Tensor]
    others: dict[str, str]  # parameters that are no tensors, with their classes

    @property
    def called(self) -> str:
        return ".".join(self.names)

    @property
    def rank(self) -> int:
        """By the best of its wrappers' names; a file without wrappers stands where "state_dict" does."""
        known = [WRAPPERS.index(name) for name in self.names or ("state_dict",) if name in WRAPPERS]
        return min(known, default=len(WRAPPERS))


def _unwrapped(content: object, path: Path, key: str | None) -> Read:
    unread = list(dict.fromkeys(blanks.classes_in(content)))
    if unread and not isinstance(content, Mapping):
        raise WeightsError(_holds(path, unread[0]))
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} contains a {type(content).__name__}; expected a dictionary of tensors, as model.state_dict() is"
        )
    if PADDLES in content:
        raise WeightsError(
            f"{path} is of PaddlePaddle ({PADDLES}), whose linears have their weights the other way round; transpose "
            "every weight of two dimensions, save PyTorch tensors under the same names, and give that file"
        )
    strange = [name for name, value in content.items() if isinstance(value, Tensor) and not isinstance(name, str)]
    if strange:
        raise WeightsError(f"{path} has a tensor under the key {strange[0]!r}; expected names")
    candidates = list(_candidates(content))
    wrapper = [c for c in candidates if key is not None and c.names and (key in c.names or key == c.called)]
    if key is not None and wrapper:
        models, prefix = wrapper, None
    elif key is not None:
        models, prefix = [c for c in candidates if any(name.startswith(key) for name in c.state)], key
    else:
        models, prefix = [c for c in candidates if has_anchor(c.state)], None
    if not models:
        if unread:
            raise WeightsError(_holds(path, unread[0]))
        return _nothing(content, candidates, path, key)
    swapped = _is_of_mmengine(content)
    models.sort(key=lambda c: (not (swapped and c.called == "state_dict"), c.rank))  # stable: the outer comes first
    best = models[0]
    if best.others:
        name, kind = next(iter(best.others.items()))
        raise WeightsError(
            f"{path} has {name} as a {kind}, which is no plain tensor; save the checkpoint with plain float tensors"
        )
    same = [c.called for c in models if c.rank == best.rank]
    if len(same) > 1 and best.rank == len(WRAPPERS):
        raise WeightsError(f"{path} has {len(same)} models, {', '.join(same)}; choose one with --weights-key")
    notes = []
    if len(models) > 1:
        others = ", ".join(c.called or "the file itself" for c in models[1:5])
        why = ", because mmengine puts the averaged weights there" if swapped and len(same) == 1 else ""
        notes.append(
            f"taking {best.called or 'the file itself'} of {path.name}, and not {others}{why} (--weights-key chooses)"
        )
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        notes.append(f"left out the objects beside the weights ({', '.join(unread[:3])}{more}), and ran none of them")
    _refuse_repeated(best.state, path)
    # Copied out of the mapped file, which may be written over while the model is in use.
    state = {name: value.clone() for name, value in best.state.items()}
    facts = understood(held_facts, content, f"{path}: what stands beside its weights")
    configuration = text_of(content.get("meta"))
    if configuration is not None:
        facts = joined(sourced(mm_facts(configuration, str(path)), "the configuration in the checkpoint"), facts)
    return Read(
        state, facts, prefix, f"{path.name}[{best.called}]" if best.names else path.name, "; ".join(notes) or None
    )


def _refuse_repeated(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of far more bytes than their file: one number that a view repeats, or one tensor under many names.

    Raises:
        WeightsError: with both numbers of bytes.
    """
    dense = [value for value in state.values() if value.layout is torch.strided and not value.is_meta]
    total, size = sum(value.numel() * value.element_size() for value in dense), path.stat().st_size
    if total > BESIDE + GROWTH * size:
        raise WeightsError(
            f"{path} has {size:,} bytes and tensors of {total:,}, which repeat what is in it; save each tensor as "
            "tensor.clone()"
        )


def _is_of_mmengine(content: Mapping[Any, Any]) -> bool:
    """Whether mmengine wrote it, whose `EMAHook` exchanges the values of `state_dict` and `ema_state_dict`."""
    meta = content.get("meta")
    return "ema_state_dict" in content and (
        "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)
    )


def _candidates(content: Mapping[Any, Any], names: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    """Every dictionary that contains tensors under names, from the outside in."""
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    state = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not state:  # detectron2's files hold arrays
        arrays = {name: value for name, value in named.items() if isinstance(value, np.ndarray)}
        state = {name: _tensor(value) for name, value in arrays.items() if value.dtype.kind == "f"}
    if state:
        kinds = {name: _strange(value) for name, value in named.items() if "." in name}
        yield _Candidate(names, state, {name: kind for name, kind in kinds.items() if kind is not None})
    if len(names) < DEPTH:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                yield from _candidates(value, (*names, name))


def _strange(value: Any) -> str | None:
    """The class of a parameter that is no plain tensor: of another library, which computes its values."""
    if isinstance(value, Tensor):
        return (
            None if type(value) in (Tensor, torch.nn.Parameter) else f"{type(value).__module__}.{type(value).__name__}"
        )
    return blanks.class_of(value)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _nothing(content: Mapping[Any, Any], candidates: list[_Candidate], path: Path, key: str | None) -> Read:
    """Of a file in which nothing is a ConvNeXt: the tensors that it has, or what it contains in place of any."""
    listing = ", ".join(repr(name) for name in list(content)[:6])
    if key is not None:
        inside = ", ".join(dict.fromkeys(c.called for c in candidates if c.names))
        longer = next((name for c in candidates for name in c.state if f".{key}" in name), None)
        raise WeightsError(
            f"{path} has no wrapper and no key prefix {key!r} (its keys: {listing}"
            + (f"; with tensors: {inside})" if inside else ")")
            + ("" if longer is None else f"; give the whole prefix, {longer[: longer.index(f'.{key}') + 1]}{key}")
        )
    if not candidates:
        raise WeightsError(f"{path} has no tensors under names (its keys: {listing or 'none'}); give another file")
    best = min(candidates, key=lambda c: (c.rank, -len(c.state)))
    _refuse_repeated(best.state, path)
    state = {name: value.clone() for name, value in best.state.items()}
    return Read(state, {}, None, f"{path.name}[{best.called}]" if best.names else path.name)
