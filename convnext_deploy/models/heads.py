"""Classifiers as people put them in the place of the published one: dropout, BatchNorm, one linear or two.

What computes nothing at inference has no tensors, and an activation has none either. So of a head only its linears and
norms are seen, and where a module without tensors stands: an `nn.Sequential` numbers its parts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import WeightsError
from ..records.manifest import HeadActivation

BATCH_NORM_EPS = 1e-5  # PyTorch's own; the tensors do not say it
ACTIVATIONS = "gelu, gelu_tanh, silu, relu, tanh or none"

Affine = tuple[Tensor, Tensor]  # (out, in) or (C,), and (out,) or (C,), in float64


@dataclass(frozen=True, slots=True)
class Classifier:
    """Under this project's names. Two linears have an activation between them, and `hidden` is the first's width."""

    tensors: dict[str, Tensor]
    activation: HeadActivation | None = None
    hidden: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Part:
    """One module of a head, by what stands before its parameters' names."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def number(self) -> int | None:
        last = self.path.rpartition(".")[2]
        return int(last) if last.isdecimal() and len(last) < 4 else None

    @property
    def is_linear(self) -> bool:
        weight = self.tensors.get("weight")
        return weight is not None and weight.ndim in (2, 4) and self.tensors.keys() <= {"weight", "bias"}

    @property
    def is_batch_norm(self) -> bool:
        return {"running_mean", "running_var"} <= self.tensors.keys()

    def scale_and_shift(self) -> Affine:
        """What a BatchNorm does at inference, for each channel."""
        mean, variance = (self.tensors[name].double() for name in ("running_mean", "running_var"))
        scale = self.tensors.get("weight", torch.ones_like(mean)).double() / (variance + BATCH_NORM_EPS).sqrt()
        return scale, self.tensors.get("bias", torch.zeros_like(mean)).double() - scale * mean


def is_affine(name: str) -> bool:
    """Whether a parameter's name is of a linear or a norm."""
    last = name.rpartition(".")[2]
    return last in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def classifier_of(
    entries: Mapping[str, Tensor], root: str, where: str, activation: HeadActivation | None = None
) -> Classifier:
    """The one or two linears that a head's tensors are.

    Args:
        entries: their names below `root`, in the file's order.
        root: what stands before these names.
        activation: between two linears, as the user says it.

    Raises:
        WeightsError: more than these, or two linears with an activation between them that nobody said.
    """
    if set(entries) <= {"weight", "bias"}:  # the published form
        if activation not in (None, "none"):
            raise WeightsError(
                f"--head-activation {activation}: the head of {where} is one linear; leave the option out"
            )
        return Classifier({f"head.classifier.{name}": value for name, value in entries.items()})
    parts = _parts(entries)
    for part in parts:
        if not (part.is_linear or part.is_batch_norm):
            raise WeightsError(
                f"{where}: {root}{part.path} is no linear and no BatchNorm ({', '.join(part.tensors)}); expected a "
                "head of dropout, BatchNorm and one or two linears; use --task embed and compute the head yourself"
            )
    linears = [part for part in parts if part.is_linear]
    if len(linears) not in (1, 2):
        raise WeightsError(
            f"{where} has {len(linears)} linears in its head ({', '.join(root + part.path for part in linears)}); "
            "expected one or two; use --task embed and compute the head yourself"
        )
    if len(linears) == 2:
        one, other = (linear.tensors["weight"] for linear in linears)
        by_name = len(parts) == 2 and None in (parts[0].number, parts[1].number)
        if by_name and one.shape[1] == other.shape[0] and other.shape[1] != one.shape[0]:
            parts, linears = parts[::-1], linears[::-1]  # a file with sorted names has them so
        return _two(parts, linears, root, where, activation)
    before = [part for part in parts[: parts.index(linears[0])] if part.is_batch_norm]
    after = [part for part in parts[parts.index(linears[0]) + 1 :] if part.is_batch_norm]
    note = (
        f"{root}{linears[0].path}.weight is taken as the classifier: what stands before it has no weights, as dropout"
    )
    notes = [f"{note} has none"] if linears[0].number != 0 else []
    if before or after:
        notes.append(f"BatchNorm in the head is folded, with an epsilon of {BATCH_NORM_EPS:g}")
        return Classifier(_named("classifier", _folded(before, linears[0], after)), notes=tuple(notes))
    return Classifier({f"head.classifier.{name}": v for name, v in linears[0].tensors.items()}, notes=tuple(notes))


def _parts(entries: Mapping[str, Tensor]) -> list[_Part]:
    parts: dict[str, _Part] = {}
    for name, value in entries.items():
        path, _, parameter = name.rpartition(".")
        parts.setdefault(path, _Part(path)).tensors[parameter] = value
    layers = list(parts.values())
    numbers = [part.number for part in layers]
    if None not in numbers and len({part.path.rpartition(".")[0] for part in layers}) == 1:
        layers.sort(key=lambda part: part.number or 0)
    return layers


def _two(
    parts: list[_Part], linears: list[_Part], root: str, where: str, activation: HeadActivation | None
) -> Classifier:
    first, last = (parts.index(linear) for linear in linears)
    between = parts[first + 1 : last]
    given, taken = linears[0].tensors["weight"], linears[1].tensors["weight"]
    if taken.shape[1] != given.shape[0] and taken.shape[1] == given.shape[1]:
        names = " and ".join(f"{root}{linear.path}" for linear in linears)
        raise WeightsError(
            f"{where} has two classifiers, {names}, which both take {taken.shape[1]} channels; expected one: save its "
            f"tensors as {root}weight and {root}bias without the other's, or use --task embed and compute both yourself"
        )
    numbers = [part.number for part in parts]
    if given.shape[0] == given.shape[1] == taken.shape[1] and not _are_in_sequence(parts[first : last + 1]):
        names = " and ".join(f"{root}{linear.path}" for linear in linears)
        raise WeightsError(
            f"{where} has the linears {names}, which both take {taken.shape[1]} channels, so that they may stand one "
            f"after the other or side by side; save them as an nn.Sequential has them ({root}0 and {root}2 with an "
            "activation between), or use --task embed and compute the head yourself"
        )
    # A part without tensors leaves a number out; the first such place after the first linear is the activation's.
    gaps = [
        index
        for index in range(first, last)
        if None in numbers[index : index + 2] or numbers[index + 1] != (numbers[index] or 0) + 1
    ]
    if not gaps and activation is None and given.shape[0] != given.shape[1]:
        activation = "none"  # of one width they may be two classifiers as well
    if activation is None:
        names = " and ".join(f"{root}{linear.path}" for linear in linears)
        raise WeightsError(
            f"{where} has an MLP head, {names}, and its tensors do not tell the activation between them; "
            f"give --head-activation ({ACTIVATIONS}) as the model's code has it"
        )
    at = (gaps or [first])[0]
    hidden = _folded(parts[:first], linears[0], [part for part in parts[first + 1 : at + 1] if part.is_batch_norm])
    output = _folded([part for part in parts[at + 1 : last] if part.is_batch_norm], linears[1], parts[last + 1 :])
    notes = [f"two linears in the head with the activation {activation} between them"]
    if len(between) or first or last + 1 < len(parts):
        notes.append(f"BatchNorm in the head is folded, with an epsilon of {BATCH_NORM_EPS:g}")
    if output[0].shape[1] != len(hidden[0]):
        raise WeightsError(
            f"{where}: {root}{linears[1].path} takes {output[0].shape[1]} channels and {root}{linears[0].path} gives "
            f"{len(hidden[0])}; expected a head of two linears in a row"
        )
    if activation == "none":
        weight, bias = output[0] @ hidden[0], output[0] @ hidden[1] + output[1]
        return Classifier(_named("classifier", (weight, bias)), notes=tuple(notes))
    tensors = _named("hidden", hidden) | _named("classifier", output)
    return Classifier(tensors, activation, len(hidden[1]), tuple(notes))


def _are_in_sequence(parts: list[_Part]) -> bool:
    """Whether an `nn.Sequential` has these parts, with something between the first and the last, or `fc1` and `fc2`.

    Two linears beside one another are in a list or have other names, as two classifiers are.
    """
    names = [re.fullmatch(r"(fc|linear|dense)_?(\d)", parts[end].path.rpartition(".")[2]) for end in (0, -1)]
    if names[0] is not None and names[1] is not None:
        return names[0][1] == names[1][1] and int(names[0][2]) + 1 == int(names[1][2])
    numbers = [part.number for part in parts if part.number is not None]
    if len({part.path.rpartition(".")[0] for part in parts}) > 1 or len(numbers) < len(parts):
        return False
    return numbers[-1] - numbers[0] > 1


def _folded(before: list[_Part], linear: _Part, after: list[_Part]) -> Affine:
    """A linear with the norms on both of its sides, in float64."""
    weight = linear.tensors["weight"].double().flatten(1)
    bias = linear.tensors.get("bias", torch.zeros(len(weight))).double()
    widths = [(weight.shape[1], norm) for norm in before] + [(len(weight), norm) for norm in after]
    if bias.shape != weight.shape[:1] or any(
        value.shape != (width,) and name != "num_batches_tracked"
        for width, norm in widths
        for name, value in norm.tensors.items()
    ):
        raise WeightsError(f"{linear.path} in the head and the norms beside it have sizes that do not fit each other")
    for norm in reversed(before):
        scale, shift = norm.scale_and_shift()
        bias = bias + weight @ shift
        weight = weight * scale
    for norm in after:
        scale, shift = norm.scale_and_shift()
        weight, bias = scale[:, None] * weight, scale * bias + shift
    return weight, bias


def _named(name: str, values: Affine) -> dict[str, Tensor]:
    return {f"head.{name}.weight": values[0].float(), f"head.{name}.bias": values[1].float()}
