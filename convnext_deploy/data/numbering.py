"""Which of a model's outputs a source's class names mean.

A column of labels, or the position of a class folder, is a number only among the classes that are there. It is the
model's number where both have the same classes in the same order, and that is checked here as far as names tell.
"""

import importlib.util
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..errors import DataError, UsageError, counted, plain
from ..records.base import content_of
from .image_source import ImageSource
from .image_source import natural as natural_key

IMAGENET_CLASSES = 1000
SYNSETS = "imagenet_synsets.txt"  # timm's, in the order of the outputs
_WORDNET = re.compile(r"n\d{8}")


def class_map(file: Path) -> dict[str, int]:
    """Class names and the outputs that they mean, from a file.

    Taken are text with a name a line in the model's order, and JSON: a list of names, {name: number},
    {number: name} or {number: [name, other name]} as Keras writes it, or a `config.json` with `id2label`. A WordNet id
    at the beginning of a name is a name too.

    Raises:
        UsageError: the file cannot be read, contains none of these, or has a name or a number twice.
    """
    try:
        text = content_of(file).decode()
        document = json.loads(text) if file.suffix.lower() == ".json" else text.splitlines()
    except OSError as error:
        raise UsageError(f"--labels {file} cannot be read: {plain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--labels {file} cannot be read: {plain(error)}") from None
    if isinstance(document, dict) and isinstance(document.get("id2label"), dict):
        document = document["id2label"]
    try:
        pairs = _pairs(document)
    except (ValueError, TypeError, msgspec.ValidationError):
        raise UsageError(
            f"--labels {file} contains no class names; expected a name a line, or JSON: a list of names, "
            "{name: number}, {number: name} or id2label"
        ) from None
    numbers: dict[str, int] = {}
    for name, number in pairs:
        for known in {name.strip(), *_WORDNET.findall(name.partition(" ")[0])}:
            if numbers.setdefault(known, number) != number:
                raise UsageError(f"--labels {file} gives {known!r} the numbers {numbers[known]} and {number}")
    if not numbers:
        raise UsageError(f"--labels {file} is empty; expected a class name a line")
    return numbers


def names_of(file: Path, count: int) -> tuple[str, ...]:
    """The names of all outputs, in their order; of two names of one output the first.

    Raises:
        UsageError: as `class_map`, or names of other outputs than these.
    """
    by_number = {number: name for name, number in reversed(class_map(file).items())}
    if set(by_number) != set(range(count)):
        raise UsageError(
            f"--labels {file} names {counted(len(by_number), 'class')}, up to number {max(by_number)}; the model "
            f"has {count} "
            f"(0..{count - 1})"
        )
    return tuple(by_number[number] for number in range(count))


def _pairs(document: Any) -> list[tuple[str, int]]:
    if isinstance(document, list):
        names = msgspec.convert(document, list[str])
        while names and not names[-1].strip():
            names.pop()
        return [(name, number) for number, name in enumerate(names)]
    if not isinstance(document, dict):
        raise TypeError(type(document))
    if all(re.fullmatch(r"\d{1,9}", key) for key in document):  # {number: name}
        named = msgspec.convert(document, dict[str, str | list[str]])
        return [
            (name, int(key))
            for key, value in named.items()
            for name in ([value] if isinstance(value, str) else value)
        ]  # fmt: skip
    return list(msgspec.convert(document, dict[str, int]).items())


def numbered(
    source: ImageSource, outputs: int, labels: Sequence[str] | None, given: dict[str, int] | None = None
) -> ImageSource:
    """The source with the model's own numbers as its labels; what was assumed for that is among its notes.

    Args:
        source: without labels, or numbered so before, it is returned as it is.
        outputs: of the model.
        labels: the model's names of them, where it has any.
        given: from `class_map`; goes before everything else.

    Raises:
        UsageError: the model has one output.
        DataError: the source's classes are not the model's, or nothing says which ones they are.
    """
    if outputs == 1:
        raise UsageError(
            f"the model has one output, which is the first of all on every image: its top-1 on {source.name} would be "
            "100 % whatever it computes; judge it by its logit (`load` and `run` in Python) and your own threshold"
        )
    if (source.labels is None and source.label_sets is None) or source.labels_from == "map":
        return source
    names = source.class_names
    if given is not None:
        return _mapped(source, given, "--labels", outputs)
    if names is None:  # a column of numbers without names; their range is all that can be checked
        _refuse_outside(source, outputs)
        return _from_one(source)
    own = {name: number for number, name in enumerate(labels or ())}
    if labels and len(own) == len(labels) and set(names) <= set(own):
        return _mapped(source, own, "the model's labels", outputs)
    alike = _written_alike(names, own)
    if alike is not None:
        said = "the model's labels, which are the same but for capitals, spaces and accents"
        return _mapped(source, alike, said, outputs)
    wordnet = _imagenet(outputs, names)
    if wordnet is not None:
        return _mapped(source, wordnet, "the WordNet ids of ImageNet-1k", outputs)
    remedy = "give --labels FILE with the model's classes in their order"
    if len(names) != outputs:
        raise DataError(
            f"{source.name} has {counted(len(names), 'class')} and the model has {counted(outputs, 'output')}, "
            "so that positions say "
            f"nothing; {remedy}"
        )
    for number, name in enumerate(names):
        if own.get(name, number) != number:  # some names are the model's, and have other numbers there
            unknown = [other for other in names if other not in own]
            more = f" and {counted(len(unknown) - 1, 'other name')} are" if unknown[1:] else " is"
            beside = f", while {unknown[0]!r}{more} unknown to it" if unknown else ""
            raise DataError(
                f"label {number} is {name!r} in {source.name}, and in the model {name!r} is {own[name]}{beside}; "
                f"name the classes as the model does, or {remedy}"
            )
    _refuse_outside(source, outputs)
    if source.labels_from == "column":
        return source
    why = "the model has no labels" if not labels else "the model's labels are other words"
    assumed = f"{why}: its outputs are assumed to be {source.ordered_by}, {names[0]!r} first"
    return replace(source, notes=(*source.notes, assumed, *_other_order(source)))


def _written_alike(names: Sequence[str], own: Mapping[str, int]) -> dict[str, int] | None:
    """Numbers of names that are the model's but for the way of writing them; None where that leaves one open."""
    loose = {_loose(name): number for name, number in own.items()}
    if len(loose) < len(own) or len({_loose(name) for name in names}) < len(names):
        return None
    numbers = {name: loose.get(_loose(name)) for name in names}
    known = {name: number for name, number in numbers.items() if number is not None}
    return known if len(known) == len(names) else None


def _loose(name: str) -> str:
    """Without capitals, with one kind of space, and accents as one character: macOS writes them as two."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def _other_order(source: ImageSource) -> tuple[str, ...]:
    """Where timm numbers the classes otherwise than torchvision: that it does, and which of the two is done here."""
    names = list(source.class_names or ())
    text, natural = sorted(names), sorted(names, key=natural_key)
    if text == natural or names not in (text, natural):
        return ()
    first = next(one for one, other in zip(text, natural, strict=True) if one != other)
    second = natural[text.index(first)]
    mine, other, word = ("torchvision", "timm", "timm") if names == text else ("timm", "torchvision", "torchvision")
    return (
        f"the order is {mine}'s: {first!r} is {names.index(first)} and {second!r} is {names.index(second)}; {other} "
        f"numbers them the other way (--class-order {word}), and --labels gives any order",
    )


def _mapped(source: ImageSource, numbers: dict[str, int], by: str, outputs: int) -> ImageSource:
    names = source.class_names
    if names is None:
        raise DataError(f"{source.name} has numbers for classes and no names; leave --labels out")
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise DataError(
            f"{by} does not name {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + f" of the {counted(len(names), 'class')} of {source.name}; expected every class folder's or class's name"
        )
    outside = {name: numbers[name] for name in names if not 0 <= numbers[name] < outputs}
    if outside:
        name, number = next(iter(outside.items()))
        raise DataError(
            f"{by} gives {name!r} the number {number}; the model has {counted(outputs, 'output')} (0..{outputs - 1})"
        )
    _refuse_outside(source, len(names))
    table = np.array([numbers[name] for name in names], np.int64)  # a source's number -> the model's
    by_number: dict[int, str] = {numbers[name]: name for name in names}
    said = f"{counted(len(names), 'class')} numbered by {by}"
    same = (table == np.arange(len(names))).all()
    return replace(
        source,
        labels=None if source.labels is None else table[source.labels],
        label_sets=None
        if source.label_sets is None
        else tuple(tuple(int(table[label]) for label in labels) for labels in source.label_sets),
        class_names=tuple(by_number.get(number, str(number)) for number in range(max(by_number) + 1)),
        labels_from="map",
        notes=source.notes if same and by == "the model's labels" else (*source.notes, said),
    )


def _from_one(source: ImageSource) -> ImageSource:
    """With a note where no label is 0: numbers that count from 1 may all be numbers of outputs, those of others."""
    sets = source.label_sets if source.labels is None else ((int(label),) for label in source.labels)
    least = min((label for labels in sets or () for label in labels), default=0)
    note = "no image has the label 0: labels count from 0, as outputs do, and those that count from 1 are others'"
    return source if least != 1 else replace(source, notes=(*source.notes, note))


def _refuse_outside(source: ImageSource, classes: int) -> None:
    sets = source.label_sets if source.labels is None else ((int(label),) for label in source.labels)
    for name, labels in zip(source.names, sets or (), strict=True):
        outside = [label for label in labels if not 0 <= label < classes]
        if outside:
            raise DataError(f"{name} of {source.name} has the label {outside[0]}; expected 0..{classes - 1}")


def _imagenet(outputs: int, names: Sequence[str]) -> dict[str, int] | None:
    """ImageNet-1k's numbers by WordNet id, where these names are such ids; from timm's list."""
    if outputs != IMAGENET_CLASSES or not all(_WORDNET.fullmatch(name) for name in names):
        return None
    synsets = of_timm(SYNSETS)
    if synsets is None:
        return None
    known = {name: number for number, name in enumerate(synsets.split())}
    return known if set(names) <= set(known) else None


def of_timm(name: str) -> str | None:
    """One of timm's lists about ImageNet, without importing timm; None where it is not installed or has no such."""
    timm = importlib.util.find_spec("timm")
    file = Path(timm.origin).parent / "data" / "_info" / name if timm and timm.origin else None
    return None if file is None or not file.is_file() else file.read_text("utf-8")
