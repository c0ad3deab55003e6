"""The names of a classifier's outputs, in the forms in which files have them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import WeightsError, counted
from ..records.manifest import ModelSpec

# Names under which training scripts keep the classes beside the weights, as a list, {number: name} or {name: number}.
NAMES = (
    "CLASSES", "classes", "class_names", "label_names", "labels", "id2label", "idx_to_class", "idx2label",
    "class_to_idx", "label2id", "names", "categories", "vocab",
)  # fmt: skip


def label_list(labels: Any) -> list[str]:
    """Class names in the order of the outputs, from a list, {number: name} or {name: number}.

    Raises:
        WeightsError: numbers that are not 0, 1 ... each once, or something else than these.
    """
    if isinstance(labels, Mapping):
        numbered = all(str(key).isdecimal() for key in labels)
        pairs = [(int(key), value) if numbered else (int(value), key) for key, value in labels.items()]
        pairs.sort(key=lambda pair: pair[0])
        if [number for number, _ in pairs] != list(range(len(pairs))):
            raise WeightsError(f"labels are numbered {', '.join(str(n) for n, _ in pairs[:4])} ...; expected 0, 1 ...")
        labels = [name for _, name in pairs]
    if not isinstance(labels, (list, tuple)):
        raise WeightsError(f"labels are a {type(labels).__name__}; expected a list of names, or {{number: name}}")
    return [str(label) for label in labels]


def refuse_contradiction(by_number: Any, by_name: Any) -> None:
    """Refuse transformers' two maps where they give one name two numbers; a map of other names is an older one's rest.

    A name of several classes, as ImageNet's two of "crane", has one of their numbers in the second map.

    Raises:
        WeightsError: with the name and both numbers.
    """
    if not isinstance(by_number, Mapping) or not isinstance(by_name, Mapping):
        return
    numbers: dict[str, list[str]] = {}
    for number, name in by_number.items():
        if isinstance(name, str):
            numbers.setdefault(name, []).append(str(number))
    for number, name in by_number.items():
        if isinstance(name, str) and name in by_name and str(by_name[name]) not in numbers[name]:
            raise WeightsError(
                f"config.json gives {name!r} the number {number} in id2label and {by_name[name]} in label2id; remove "
                "the one that is wrong"
            )


def held(places: Sequence[Mapping[Any, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Lists of class names that a checkpoint has beside its weights, with the names that people give them."""
    for place in places:
        for name in NAMES:
            entry: Any = place.get(name)
            if hasattr(entry, "tolist"):  # an array, as scikit-learn's LabelEncoder has its classes
                entry = entry.tolist()
            if isinstance(entry, Mapping) and not all(
                isinstance(value, (str, int)) for pair in entry.items() for value in pair
            ):
                continue
            if isinstance(entry, (list, tuple)) and not all(isinstance(value, str) for value in entry):
                continue
            try:
                labels = label_list(entry)
            except (WeightsError, ValueError):
                continue  # something else that is called so, such as the labels of images
            if labels and len(set(labels)) == len(labels):
                yield name, labels


def labels_of(facts: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...] | None:
    """The labels that facts have for the outputs of `spec`.

    Raises:
        WeightsError: there are more or fewer of them than outputs.
    """
    labels = facts.get("labels")
    if spec.task not in ("classify", "segment", "detect") or not labels:
        return None
    if len(labels) != spec.num_classes and not (spec.problem == "binary" and len(labels) == 2):
        raise WeightsError(
            f"{counted(len(labels), 'label')} for {counted(spec.num_classes, 'class')} beside the checkpoint; "
            "mend its config"
        )
    return tuple(str(label) for label in labels)
