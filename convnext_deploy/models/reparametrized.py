"""Weights that a checkpoint contains in parts: pruned, or normed by weight norm or spectral norm.

PyTorch computes such a weight from its parts whenever the module is called. At inference the parts are constant, and so
is the weight: what PyTorch would compute is put in their place, in float64.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import WeightsError

_OLD = re.compile(r"(?P<root>.*?)(?P<name>[^.]+)_(?P<part>orig|mask|g|v|u)")
_NEW = re.compile(r"(?P<root>.*?)parametrizations\.(?P<name>[^.]+)\.(?P<part>original[01]?|0\._[uv])")
_ANY = re.compile(r"(?P<root>.*?)parametrizations\.(?P<name>[^.]+)\..*")
_PRUNED, _WEIGHT_NORMS = {"orig", "mask"}, ({"g", "v"}, {"original0", "original1"})
_SPECTRAL_NORMS = ({"orig", "u", "v"}, {"original", "0._u", "0._v"})


def whole_name(key: str) -> str:
    """The name of the weight that a key may be a part of."""
    match = _NEW.fullmatch(key) or _OLD.fullmatch(key)
    return key if match is None else match["root"] + match["name"]


def joined(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], str | None]:
    """The state dict with whole weights, and what was joined, in words.

    Raises:
        WeightsError: parts of another parametrization, whose formula the checkpoint does not tell.
    """
    parts: dict[str, dict[str, str]] = {}  # the whole weight's key to its parts, and these parts' keys
    for key in state:
        match = _NEW.fullmatch(key) or _OLD.fullmatch(key)
        if match is not None:
            parts.setdefault(match["root"] + match["name"], {})[match["part"]] = key
    whole: dict[str, Tensor] = {}
    kinds: set[str] = set()
    used: dict[str, str] = {}
    for name, keys in parts.items():
        if any(state[key].is_meta or not state[key].is_floating_point() for key in keys.values()):
            continue
        weight = _whole({part: state[key].double() for part, key in keys.items()})
        if weight is not None and name not in state:
            whole[name], kind = weight[0].float(), weight[1]
            kinds.add(kind)
            used |= dict.fromkeys(keys.values(), name)
    for key in state:
        match = _ANY.fullmatch(key)
        if match is not None and key not in used:
            raise WeightsError(
                f"{where} has the weight {match['root']}{match['name']} in a parametrization that its tensors do not "
                f"tell ({key}); compute it where the model is defined, with torch.nn.utils.parametrize."
                f"remove_parametrizations(module, {match['name']!r}), and save the checkpoint again"
            )
    if not whole:
        return dict(state), None
    joined: dict[str, Tensor] = {}
    for key, value in state.items():  # a whole weight stands where its first part stood
        name = used.get(key, key)
        joined.setdefault(name, whole.get(name, value))
    weights = "1 weight is" if len(whole) == 1 else f"{len(whole)} weights are"
    return joined, f"{weights} computed from parts ({', '.join(sorted(kinds))})"


def _whole(parts: Mapping[str, Tensor]) -> tuple[Tensor, str] | None:
    """What PyTorch computes from the parts of one weight, and how that is called."""
    names = set(parts)
    if names == _PRUNED and parts["orig"].shape == parts["mask"].shape:
        return parts["orig"] * parts["mask"], "pruned"
    if names in _WEIGHT_NORMS:
        length, direction = ("g", "v") if "g" in names else ("original0", "original1")
        return _weight_norm(parts[length], parts[direction])
    if names in _SPECTRAL_NORMS:
        weight, u, v = ("orig", "u", "v") if "u" in names else ("original", "0._u", "0._v")
        return _spectral_norm(parts[weight], parts[u], parts[v])
    return None


def _weight_norm(length: Tensor, direction: Tensor) -> tuple[Tensor, str] | None:
    """`length` has one entry for each index of the dimension that was kept, or one in all."""
    if length.ndim not in (0, direction.ndim):
        return None
    others = [axis for axis in range(direction.ndim) if length.ndim == 0 or length.shape[axis] == 1]
    kept = [axis for axis in range(direction.ndim) if axis not in others]
    if any(length.shape[axis] != direction.shape[axis] for axis in kept):
        return None
    return direction * (length / torch.linalg.vector_norm(direction, dim=others, keepdim=True)), "weight norm"


def _spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, str] | None:
    """`u` and `v` are the vectors of the largest singular value of the weight as (out, everything else)."""
    matrix = weight.flatten(1) if weight.ndim > 1 else None
    if matrix is None or (u.numel(), v.numel()) != matrix.shape:
        return None
    return weight / (u @ matrix @ v), "spectral norm"
