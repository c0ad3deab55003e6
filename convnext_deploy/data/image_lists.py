"""Lists of images with their labels: CSV, TSV, text, JSON and JSON lines, with a header or without.

A list names an image and its label in each entry: a class name, a number, or several. A line of text is `PATH LABEL`.
Kaggle's `LOC_val_solution.csv` of ImageNet is one too. Tables with a column a class hold 0 and 1, or the numbers that
a regression is to give.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..errors import DataError, counted, plain
from ..records.base import content_of
from .class_folders import IMAGE_SUFFIXES
from .image_source import CHOOSE, ClassOrder, ordered

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")
MAX_LIST_BYTES = 2**30

PATHS = (
    "path", "image", "image_path", "file", "filename", "file_name", "filepath", "file_path", "img", "img_path",
    "image_id", "imageid", "image_name", "image_index", "id", "id_code", "name",
)  # fmt: skip
LABELS = (
    "label", "labels", "class", "classes", "class_name", "label_name", "category", "categories", "target", "targets",
    "tags", "finding_labels", "predictionstring", "value", "score",
)  # fmt: skip
SPLITS = ("split", "subset", "partition", "fold", "set", "usage")  # columns that say what an entry is for
_INDICES = {"", "unnamed:_0", "index"}  # of the column in which pandas numbers the rows
_SEVERAL = re.compile(r"[|;]")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})")
_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What a file says of images, an entry each. At most one of `sets` and `values` is there."""

    images: list[str]  # paths, or names without a suffix
    sets: list[tuple[int, ...]] | None = None
    values: list[tuple[float, ...]] | None = None
    class_names: tuple[str, ...] | None = None
    ordered_by: str | None = None  # what numbered the class names, where the file itself does not
    notes: tuple[str, ...] = ()


def read_list(file: Path, order: ClassOrder, split: str | None = None) -> Annotations:
    """The entries of a list.

    Args:
        split: only those with this value in a column such as `split`.

    Raises:
        DataError: it cannot be read, leaves open what is what, or has entries of several splits and none was chosen.
    """
    text = text_of(file)
    try:
        if file.suffix.lower() == ".json":
            return _of_json(json.loads(text), file, order, split)
        if file.suffix.lower() in (".jsonl", ".ndjson"):
            return _of_json([json.loads(line) for line in text.splitlines() if line.strip()], file, order, split)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {plain(error)}") from None
    try:
        rows = _rows(text, file)
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as a table: {plain(error)}") from None
    if not rows:
        raise DataError(f"{file} is empty; expected a line an image, such as PATH,LABEL")
    return _of_rows(rows, file, order, split)


def says_labels(file: Path) -> bool:
    """Whether the first entry of a list with names in it, CSV or JSON lines, has one that means labels."""
    line = text_of(file).partition("\n")[0]
    if file.suffix.lower() == ".jsonl":
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(entry, dict) and any(str(name).lower() in LABELS for name in entry)
    return any(_word(name) in LABELS for name in next(csv.reader([line]), []))


def _word(cell: str) -> str:
    """A column's name in one way of writing it."""
    return re.sub(r"[\s-]+", "_", cell.strip().lower())


def text_of(file: Path) -> str:
    """A file's text, of at most `MAX_LIST_BYTES`.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        size = file.stat().st_size
        if size > MAX_LIST_BYTES:
            raise DataError(f"{file} has {size:,} bytes; at most {MAX_LIST_BYTES:,} are read as annotations")
        text = content_of(file, MAX_LIST_BYTES).decode("utf-8-sig")  # of a device no size is known
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {plain(error)}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is no UTF-8 text ({error.reason}); expected a list of images, saved as UTF-8"
        ) from None


def by_labels(
    images: list[str],
    labels: Sequence[Sequence[str | int | float]],
    order: ClassOrder,
    where: Path | str,
    known: Sequence[Sequence[str | int | float]] = (),
) -> Annotations:
    """Entries with labels as they are written: whole numbers count as numbers, others as values, words as names.

    An image of several entries has the labels of all of them.

    Args:
        known: the labels of all entries, where these are of one split: a class that only others have has its number.
    """
    together: dict[str, list[str | int | float]] = {}
    for image, own in zip(images, labels, strict=True):
        kept = together.setdefault(image, [])
        kept += [label for label in own if label not in kept]
    notes: tuple[str, ...] = ()
    if len(together) < len(images):
        notes = (
            f"named again: {counted(len(images) - len(together), 'entry')}; an image has the labels of all of "
            "its entries",
        )
    written = [label for own in together.values() for label in own]
    images = list(together)
    if not written:
        return Annotations(images=images, notes=notes)
    bare = next((label for label in written if _is_missing(label)), None)
    if bare is not None and any(_is_number(label) for label in written):
        image = next(image for image, own in together.items() if bare in own)
        raise DataError(
            f"{where} has the label {bare} for {image} among numbers; expected a number, or an empty one where an "
            "image has no label"
        )
    written += [label for own in known for label in own]
    if all(_is_whole(label) for label in written):
        sets = [tuple(sorted(int(label) for label in own)) for own in together.values()]
        return Annotations(images=images, sets=sets, notes=notes)
    if all(_is_number(label) for label in written):
        missing = [image for image, own in together.items() if len(own) != 1]
        if missing:
            raise DataError(f"{where} has {counted(len(together[missing[0]]), 'value')} for {missing[0]}; expected one")
        return Annotations(images=images, values=[(float(own[0]),) for own in together.values()], notes=notes)
    names = [[str(label) for label in own] for own in together.values()]
    return named(images, names, order, notes, [str(label) for label in written])


def named(
    images: list[str],
    names: Sequence[Sequence[str]],
    order: ClassOrder,
    notes: tuple[str, ...] = (),
    known: Sequence[str] = (),
) -> Annotations:
    """Entries with class names, numbered in an order that nobody has said; `known` are names of other entries."""
    classes = ordered(sorted({*known, *(name for label_names in names for name in label_names)}), order)
    number = {name: index for index, name in enumerate(classes)}
    return Annotations(
        images=images,
        sets=[tuple(sorted({number[name] for name in label_names})) for label_names in names],
        class_names=tuple(classes),
        ordered_by=f"the class names sorted {'by name' if order == 'torchvision' else 'as timm does'}",
        notes=notes,
    )


def _is_whole(label: str | int | float) -> bool:
    return isinstance(label, int) or (isinstance(label, str) and _NUMBER.fullmatch(label) is not None)


def _is_missing(label: str | int | float) -> bool:
    """What pandas and JSON write for a number that is not there, and what is too large for one."""
    try:
        return not math.isfinite(float(label))
    except ValueError:
        return False


def _is_number(label: str | int | float) -> bool:
    try:
        return math.isfinite(float(label)) and not (isinstance(label, str) and re.match(r"-?0\d", label))
    except ValueError:
        return False


def _rows(text: str, file: Path) -> list[list[str]]:
    """The lines of a table, by the delimiter that its first line has; of text without one, by the last space."""
    named = re.match(r"sep=(.)\n", text)  # as Excel is told
    text = text if named is None else text[named.end() :]
    lines = [line for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    delimiter = next((sign for sign in ("\t", ",", ";") if sign in first), None)
    if file.suffix.lower() == ".tsv":
        delimiter = "\t"
    if named is not None:
        delimiter = named[1]
    if delimiter is None and any(" " in line.strip() for line in lines):
        return [line.strip().rsplit(None, 1) for line in lines]
    reader = csv.reader(io.StringIO(text), delimiter=delimiter or ",", skipinitialspace=True)
    return [[cell.strip() for cell in row] for row in reader if any(cell.strip() for cell in row)]


def _of_split(said: Sequence[str] | None, split: str | None, file: Path) -> list[int] | None:
    """The entries of a split, by what each says of it; None: all.

    Raises:
        DataError: there are several and none was chosen, or another was.
    """
    names = sorted(set(said or ()))
    if split is None and len(names) > 1:
        listing = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise DataError(f"{file} has entries of the splits {listing}{CHOOSE}")
    if split is not None and split not in names:
        has = f"it has {', '.join(names[:6])}" if names else "no column says one, leave --split out"
        raise DataError(f"{file} has no entries of the split {split!r}; {has}")
    return None if split is None or said is None else [index for index, name in enumerate(said) if name == split]


def _of_rows(rows: list[list[str]], file: Path, order: ClassOrder, split: str | None) -> Annotations:
    header = [_word(cell) for cell in rows[0]]
    if "imageid" in header and "predictionstring" in header:
        return _kaggle(rows[1:], header.index("imageid"), header.index("predictionstring"), file, order)
    paths = [index for index, cell in enumerate(header) if cell in PATHS]
    has_header = bool(paths) and not _is_image(rows[0][paths[0]])
    at, names = (min(paths, key=lambda index: PATHS.index(header[index])), rows[0]) if has_header else (0, [])
    if not has_header and not _is_image(rows[0][0]):
        raise DataError(
            f"{file} begins with {','.join(rows[0])[:60]!r}, which is no image ({', '.join(IMAGE_SUFFIXES)}) and no "
            "header with a column path; expected PATH,LABEL"
        )
    body = rows[1:] if has_header else rows
    width = len(rows[0])
    uneven = next((number for number, row in enumerate(rows, 1) if len(row) != width), None)
    if uneven is not None:
        raise DataError(
            f"{file} has {len(rows[uneven - 1])} columns in entry {uneven} and {width} in the first; "
            "quote what contains the delimiter"
        )
    part = next((index for index in range(width) if has_header and header[index] in SPLITS and index != at), None)
    kept = _of_split(None if part is None else [row[part] for row in body], split, file)
    whole, body = body, body if kept is None else [body[index] for index in kept]
    images = [row[at] for row in body]
    said = [index for index in range(width) if has_header and header[index] in LABELS]
    if len(said) > 1:
        raise DataError(
            f"{file} has the columns {', '.join(names[index] for index in said)}; expected one of labels, remove others"
        )
    others = [index for index in range(width) if index not in (at, part)]
    if has_header and len(others) > 1:
        others = [index for index in others if header[index] not in _INDICES or not _numbers_rows(body, index)]
    if len(said) == 1 or len(others) <= 1:
        column = next(iter(said or others), None)
        labels, known = (
            [[] if column is None else [label for label in _split(row[column]) if label] for row in rows]
            for rows in (body, whole)
        )
        return by_labels(images, labels, order, file, known)
    return _of_columns(images, [[row[index] for index in others] for row in body], [*names] and [
        names[index] for index in others
    ], file)  # fmt: skip


def _numbers_rows(body: list[list[str]], column: int) -> bool:
    """Whether a column counts the rows, in any order; numbers of classes come again."""
    cells = [row[column] for row in body]
    return all(_NUMBER.fullmatch(cell) for cell in cells) and len(set(cells)) == len(cells)


def _split(cell: str) -> list[str]:
    return [part.strip() for part in _SEVERAL.split(cell)]


def _is_image(cell: str) -> bool:
    return cell.lower().endswith(IMAGE_SUFFIXES)


def _of_columns(images: list[str], cells: list[list[str]], names: list[str], file: Path) -> Annotations:
    """A table with a column a class, of 0 and 1, or a column an output, of numbers."""
    try:
        values = [tuple(float(cell) for cell in row) for row in cells]
    except ValueError:
        raise DataError(
            f"{file} has {len(cells[0]) if cells else 0} columns beside the path, and none is called label; expected "
            "the columns path and label, or a column a class with 0 and 1"
        ) from None
    if len(set(images)) < len(images):
        raise DataError(f"{file} names an image twice, {_twice(images)}; expected a line an image")
    classes = tuple(names) if names and len(set(names)) == len(names) else None
    if all(value in (0.0, 1.0) for row in values for value in row):
        sets = [tuple(index for index, value in enumerate(row) if value) for row in values]
        return Annotations(
            images=images, sets=sets, class_names=classes, ordered_by="the columns of the list in their order"
        )
    if not all(math.isfinite(value) for row in values for value in row):
        raise DataError(f"{file} contains a value that is not finite; expected numbers")
    return Annotations(images=images, values=values, class_names=classes)


def _twice(images: Sequence[str]) -> str:
    names: set[str] = set()
    return next(image for image in images if image in names or names.add(image))  # type: ignore[func-returns-value]


def _kaggle(rows: list[list[str]], at: int, boxes_at: int, file: Path, order: ClassOrder) -> Annotations:
    """ImageNet's `LOC_val_solution.csv`: of each image the boxes, `CLASS LEFT TOP RIGHT BOTTOM` one after another."""
    images, names = [], []
    for number, row in enumerate(rows, 2):
        parts = row[boxes_at].split() if len(row) > max(at, boxes_at) else []
        if not parts or len(parts) % 5 or not all(_WORDNET.fullmatch(name) for name in parts[::5]):
            raise DataError(
                f"{file} has no boxes of ImageNet in line {number}; expected n01440764 LEFT TOP RIGHT BOTTOM"
            )
        images.append(row[at])
        names.append(sorted(set(parts[::5])))
    return named(images, names, order)


def _of_json(document: Any, file: Path, order: ClassOrder, split: str | None) -> Annotations:
    """[{"path": ..., "label": ...}, ...], [[path, label], ...] or {path: label}."""
    if isinstance(document, dict):
        document = [list(pair) for pair in document.items()]
    if not isinstance(document, list) or not document:
        raise DataError(f'{file} contains no list of images; expected [{{"path": ..., "label": ...}}, ...]')
    parts = [_part(entry) for entry in document]
    kept = _of_split([part or "none" for part in parts] if any(parts) else None, split, file)
    images: list[str] = []
    labels: list[list[str | int | float]] = []
    for number, entry in enumerate(document, 1):
        path, label = _entry(entry)
        try:
            images.append(msgspec.convert(path, str))
            targets = msgspec.convert([] if label is None else label, str | int | float | list[str | int | float])
        except msgspec.ValidationError:
            raise DataError(
                f'{file}: entry {number} has no path and label; expected {{"path": ..., "label": ...}}'
            ) from None
        labels.append(targets if isinstance(targets, list) else [targets])
    known = labels
    if kept is not None:
        images, labels = [images[index] for index in kept], [labels[index] for index in kept]
    lengths = {len(targets) for targets in labels}
    if (
        lengths == {max(lengths)}
        and max(lengths) > 1
        and any(isinstance(v, float) for targets in labels for v in targets)
    ):
        if len(set(images)) < len(images):
            raise DataError(f"{file} names an image twice, {_twice(images)}; expected an entry an image")
        return Annotations(images=images, values=[tuple(float(value) for value in targets) for targets in labels])
    return by_labels(images, labels, order, file, known)


def _part(entry: Any) -> str | None:
    keys = {str(key).lower(): value for key, value in entry.items()} if isinstance(entry, dict) else {}
    return next((str(keys[name]) for name in SPLITS if isinstance(keys.get(name), (str, int))), None)


def _entry(entry: Any) -> tuple[Any, Any]:
    if isinstance(entry, dict):
        keys = {str(key).lower(): value for key, value in entry.items()}
        path = next((keys[name] for name in PATHS if name in keys), None)
        return path, next((keys[name] for name in LABELS if name in keys), None)
    if isinstance(entry, list) and len(entry) == 2:
        return entry[0], entry[1]
    return (entry, None) if isinstance(entry, str) else (None, None)
