"""Lists of images with their labels: CSV, TSV, text, JSON and JSON lines, with a header or without.

A list names an image and its label in each entry: a class name, a number, or several. A line of text is `PATH LABEL`.
A column or key that contains paths of images in the place of labels is one of other images, such as masks.
Kaggle's `LOC_val_solution.csv` of ImageNet is one too. Tables with a column a class hold 0 and 1, or the numbers that
a regression is to give.
"""

import ast
import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..errors import DataError, plain
from ..records.base import content_of
from .class_folders import IMAGE_SUFFIXES
from .class_folders import SPLITS as NAMES_OF_SPLITS
from .entries import (
    LABELS,
    NUMBERS,
    PATHS,
    SPLITS,
    WHOLE,
    Annotations,
    beside_of,
    by_labels,
    in_order_of,
    is_number,
    is_of_masks,
    named,
    twice,
    word,
)
from .image_source import CHOOSE, ClassOrder
from .other_tools import refuse_table

_Label = str | bool | int | float
_PICTURES = (*IMAGE_SUFFIXES, ".gif")  # masks may be GIF
LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")
MAX_LIST_BYTES = 2**30

_INDICES = {"", "unnamed:_0", "index"}  # of the column in which pandas numbers the rows
_LIST_OF_NUMBERS = re.compile(r"\[\s*-?\d[\d.\s,-]*\]")
_SEVERAL = re.compile(r"[|;]")
_WORDNET = re.compile(r"n\d{8}")


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
    """Whether the first entry of a list with names in it, CSV or JSON lines, has one of labels or of masks."""
    text = text_of(file)
    line = text.partition("\n")[0]
    if file.suffix.lower() == ".jsonl":
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(entry, dict) and any(_is_of_truth(str(name), value) for name, value in entry.items())
    rows = csv.reader(io.StringIO(text))
    try:
        header, first = next(rows, []), next(rows, [])
    except csv.Error:
        return False
    return any(_is_of_truth(name, cell) for name, cell in itertools.zip_longest(header, first, fillvalue=""))


def _is_of_truth(name: str, value: object) -> bool:
    """Whether a column contains labels or masks; one called `annotation` may have captions."""
    picture = isinstance(value, str) and value.lower().endswith(_PICTURES)
    return word(name) in LABELS or (is_of_masks(name) and picture)


def text_of(file: Path) -> str:
    """A file's text, of at most `MAX_LIST_BYTES`.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        size = file.stat().st_size
        if size > MAX_LIST_BYTES:
            raise DataError(f"{file} has {size:,} bytes; at most {MAX_LIST_BYTES:,} are read as annotations")
        content = content_of(file, MAX_LIST_BYTES)  # of a device no size is known
        # Excel's "Unicode text" begins with a mark of UTF-16.
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {plain(error)}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is no UTF-8 text ({error.reason}); expected a list of images, saved as UTF-8"
        ) from None


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
    header = [word(cell) for cell in rows[0]]
    if "imageid" in header and "predictionstring" in header:
        return _kaggle(rows[1:], header.index("imageid"), header.index("predictionstring"), file, order)
    refuse_table(header, file)
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
    pictures = [index for index in range(width) if index != at and _name_images(row[index] for row in whole)]
    columns = {
        names[index] if has_header else "label" if width == 2 else str(index + 1): [row[index] for row in body]
        for index in pictures
        if not (has_header and header[index] in PATHS)  # the image's own name once more
    }
    said = [index for index in range(width) if has_header and header[index] in LABELS and index not in pictures]
    if len(said) > 1:
        raise DataError(
            f"{file} has the columns {', '.join(names[index] for index in said)}; expected one of labels, remove others"
        )
    others = [index for index in range(width) if index not in (at, part, *pictures)]
    if has_header:  # what an image is called once more, and what counts the rows, is no label
        others = [index for index in others if header[index] not in PATHS or header[index] == "name"]
        others = [index for index in others if header[index] not in _INDICES or not _numbers_rows(whole, index)]
    if len(said) == 1 or len(others) <= 1:
        column = next(iter(said or others), None)
        labels, known = (
            [[] if column is None else [label for label in _split(row[column]) if label] for row in rows]
            for rows in (body, whole)
        )
        entries = by_labels(images, labels, order, file, known)
        number = next((index for index in others if has_header and header[index] in NUMBERS), None)
        if number is not None and number != column:
            entries = in_order_of(entries, known, [row[number] for row in whole], names[number], file)
        return beside_of(entries, images, columns, file)
    cells = [[row[index] for index in others] for row in body]
    if columns and not all(is_number(cell) for row in cells for cell in row):
        return beside_of(by_labels(images, [[]] * len(images), order, file), images, columns, file)
    entries = _of_columns(images, cells, [*names] and [names[index] for index in others], file)
    return beside_of(entries, images, columns, file)


def _name_images(cells: Iterable[str]) -> bool:
    """Whether a column contains paths of images; some may be empty."""
    said = [cell for cell in cells if cell]
    return bool(said) and all(cell.lower().endswith(_PICTURES) for cell in said)


def _numbers_rows(body: list[list[str]], column: int) -> bool:
    """Whether a column counts the rows, in any order; numbers of classes come again."""
    cells = [row[column] for row in body]
    return all(WHOLE.fullmatch(cell) for cell in cells) and len(set(cells)) == len(cells)


def _split(cell: str) -> list[str]:
    """The labels in a cell: `cat|dog`, or a list as pandas, numpy or JSON write one as text."""
    if _LIST_OF_NUMBERS.fullmatch(cell):
        return re.split(r"[\s,]+", cell[1:-1].strip(" ,"))
    if cell.startswith("[") and cell.endswith("]"):
        try:
            return [str(label) for label in ast.literal_eval(cell)]
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass  # a name in brackets
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
        raise DataError(f"{file} names an image twice, {twice(images)}; expected a line an image")
    classes = tuple(names) if names and len(set(names)) == len(names) else None
    said = {value for row in values for value in row}
    if said <= {0.0, 1.0} or said <= {-1.0, 1.0}:
        of_celeba = "columns of -1 and 1, as CelebA's, say of each class whether an image has it"
        return Annotations(
            images=images,
            sets=[tuple(index for index, value in enumerate(row) if value > 0) for row in values],
            class_names=classes,
            ordered_by="the columns of the list in their order",
            notes=(of_celeba,) if -1.0 in said else (),
        )
    if not all(math.isfinite(value) for row in values for value in row):
        raise DataError(f"{file} contains a value that is not finite; expected numbers")
    return Annotations(images=images, values=values, class_names=classes)


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
    """[{"path": ..., "label": ...}, ...], [[path, label], ...], {path: label} or {class: [paths]}."""
    classes: list[str] = []
    if isinstance(document, dict):
        document, classes = _of_keys(document, file)
    if not isinstance(document, list) or not document:
        raise DataError(f'{file} contains no list of images; expected [{{"path": ..., "label": ...}}, ...]')
    entries = [_entry(entry) for entry in document]
    parts = [_part(entry) for entry in entries]
    kept = _of_split([part or "none" for part in parts] if any(parts) else None, split, file)
    pictures = _picture_keys(entries)
    images: list[str] = []
    labels: list[list[str | int | float]] = []
    for number, entry in enumerate(entries, 1):
        keys = {word(key): value for key, value in entry.items() if key not in pictures}
        label = next((keys[name] for name in LABELS if name in keys), None)
        try:
            images.append(msgspec.convert(next((keys[name] for name in PATHS if name in keys), None), str))
            targets = msgspec.convert([] if label is None else label, _Label | list[_Label])
        except msgspec.ValidationError:
            listing = ", ".join(entry) or "none"
            raise DataError(
                f"{file}: entry {number} has no path and label that are text or numbers (its keys: {listing[:80]}); "
                'expected {"path": ..., "label": ...}'
            ) from None
        labels.append(targets if isinstance(targets, list) else [targets])
    known: list[Sequence[str | int | float]] = [*labels, *([name] for name in classes)]
    whole = entries
    if kept is not None:
        entries = [whole[index] for index in kept]
        images, labels = [images[index] for index in kept], [labels[index] for index in kept]
    columns = {key: [entry.get(key) or "" for entry in entries] for key in pictures}
    annotations = by_labels(images, labels, order, file, known)
    counted_by = next((key for key in whole[0] if word(key) in NUMBERS), None)
    if counted_by is not None:
        numbers = [str(entry.get(counted_by, "nothing")) for entry in whole]
        annotations = in_order_of(annotations, known, numbers, counted_by, file)
    return beside_of(annotations, images, columns, file)


def _of_keys(document: dict[str, Any], file: Path) -> tuple[list[Any], list[str]]:
    """The entries of an object, and the names of the classes where its keys are these.

    Raises:
        DataError: it does not say which side names images.
    """
    if isinstance(document.get("data_list"), list):  # of mmpretrain, whose numbers are the model's
        return document["data_list"], []
    if document and document.keys() <= {*filter(_is_split, document)} and _are_lists(document):
        return [_entry(entry) | {"split": name} for name, part in document.items() for entry in part], []
    singular = [word(name).removesuffix("s") for name in document]
    if any(name in PATHS for name in singular):  # a column a key, as pandas writes a table
        columns = [[*column.values()] if isinstance(column, dict) else column for column in document.values()]
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise DataError(f"{file} has the keys {', '.join(document)}; expected lists of one length, one a column")
        names = [one if one in PATHS else name for one, name in zip(singular, document, strict=True)]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)], []
    of_images = [name for name in document if name.lower().endswith(_PICTURES)]
    paths_of = {name: _paths(value) for name, value in document.items()}
    if not any(paths_of.values()) or (of_images and not any(isinstance(value, list) for value in document.values())):
        return [list(pair) for pair in document.items()], []
    if of_images or None in paths_of.values() or not any(isinstance(value, list) for value in document.values()):
        first = of_images[0] if of_images else next(iter(document))
        raise DataError(
            f"{file} does not say which side names images, as in {first!r}: {str(document[first])[:60]}; expected "
            "{path: label} or {path: [labels]}, {class: [paths]}, or for masks a list of objects with image and mask"
        )
    return [[path, [name]] for name, paths in paths_of.items() for path in paths or ()], [*document]


def _is_split(name: str) -> bool:
    return name.lower() in NAMES_OF_SPLITS


def _are_lists(document: dict[str, Any]) -> bool:
    return all(isinstance(part, list) for part in document.values())


def _paths(value: Any) -> list[str] | None:
    """Paths of images, one or a list, which may be empty; None: something else."""
    paths = value if isinstance(value, list) else [value]
    return paths if all(isinstance(path, str) and path.lower().endswith(_PICTURES) for path in paths) else None


def _picture_keys(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Keys beside that of the image whose values are paths of images, in the place of labels."""
    keys = dict.fromkeys(key for entry in entries for key in entry if word(key) not in PATHS)
    cells_of = {key: [entry.get(key) or "" for entry in entries] for key in keys}
    return [
        key for key, cells in cells_of.items() if all(isinstance(cell, str) for cell in cells) and _name_images(cells)
    ]


def _part(entry: dict[str, Any]) -> str | None:
    keys = {word(key): value for key, value in entry.items()}
    return next((str(keys[name]) for name in SPLITS if isinstance(keys.get(name), (str, int))), None)


def _entry(entry: Any) -> dict[str, Any]:
    """By the names of its parts, whatever form it has; without any where it is no entry."""
    if isinstance(entry, dict):
        return {str(key): value for key, value in entry.items()}
    if isinstance(entry, list) and len(entry) == 2:
        return {"path": entry[0], "label": entry[1]}
    return {"path": entry} if isinstance(entry, str) else {}
