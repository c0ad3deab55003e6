"""Arguments of the public functions: the forms that people pass, as the one form that is computed with.

Each function here takes the argument's name and value, returns the value in its one form, or refuses it in a line that
says what was given and what is expected. They look at nothing but the value: no file is opened and no package is
imported, so that whatever is wrong with a request is said before any work.
"""

import difflib
import inspect
import math
import operator
import os
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import msgspec

from .errors import UsageError, counted, plain
from .records.base import MAX_BATCH, MAX_SIDE
from .records.manifest import BatchRange, Preprocessing

if sys.version_info >= (3, 11):  # for the groups of options that public functions take
    from typing import Unpack as Unpack
else:
    from typing_extensions import Unpack as Unpack

Location = str | os.PathLike[str]
Weights = Any  # a `Location`, a module of PyTorch, or a state dict: `Location | nn.Module | Mapping[str, Tensor]`
ImageSize = int | Sequence[int] | str  # pixels: one number, (height, width), "224" or "800x1280"
Batch = int | Sequence[int] | str | BatchRange  # one size, (min, opt, max), "8" or "1:8:32"
Progress = Callable[[int, int, str], None]  # told steps done, steps in all, and what is being done

T = TypeVar("T")
WEIGHTS = "a file, a folder, a timm name, hf-hub:owner/name, random, or in Python a module or a state dict"
IMAGES = "a folder, tar, Parquet file or list of images, or hfds:NAME"
OF_IMAGES = ("images done", "images in all")  # what `progress` is told
OF_STEPS = ("steps done", "steps in all", "what is being done")  # likewise, where no images are counted
NAME_BYTES = 255  # what file systems take as one name
PATH_BYTES = 1000 if sys.platform == "darwin" else 4000  # likewise as a whole path, less the names of files below it

# What people write for a word of a closed set, where no difference of letters finds it.
SYNONYMS = {
    "half": "fp16", "float16": "fp16", "float": "fp32", "float32": "fp32", "bfloat16": "bf16", "f32": "fp32",
    "u8": "uint8", "gpu": "cuda", "pooled": "embed", "backbone": "features", "feature_maps": "features",
    "segmentation": "segment", "semantic": "segment", "detection": "detect", "boxes": "detect",
}  # fmt: skip
EIGHT_BITS = "8 bits come from a plan: `convnext-deploy quantize` writes it, and export takes it with --plan"
HINTS = {
    ("precision", word): EIGHT_BITS for word in ("int8", "uint8", "i8", "u8", "s8", "fp8", "float8", "8bit")
}  # fmt: skip
HINTS |= {
    ("task", "segment"): "`export`, `quantize` and `bench` take a segmenter",
    ("task", "detect"): "only `export` takes a detector",
}

_REPR = reprlib.Repr()
_REPR.maxstring = 160  # most paths are shown whole


def shown(value: object) -> str:
    """A value in an error's line: short, and of objects nothing but their type."""
    if value is None or isinstance(value, str | bytes | bool | int | float | list | tuple | dict | set | os.PathLike):
        try:
            written = _REPR.repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
            return " ".join(written.split())
        except (ValueError, TypeError):  # a whole number of more digits than Python prints; a path of no text
            return f"a {type(value).__name__}"
    return f"of type {type(value).__module__}.{type(value).__qualname__}"


def _refused(name: str, value: object, expected: str) -> UsageError:
    return UsageError(f"{name} {shown(value)}; expected {expected}")


def _items(value: Any) -> list[Any] | None:
    """What a list, a tuple or an array contains; None of everything else, texts and loaders of images among it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _integers_of(texts: Sequence[str]) -> list[int | None]:
    return [int(text) if text.strip().isdecimal() and len(text) < 10 else None for text in texts]


def maybe(read: Callable[[str, Any], T], name: str, value: Any) -> T | None:
    """None as it is, anything else as `read` reads it."""
    return None if value is None else read(name, value)


def one_of(name: str, value: Any, words: Any) -> Any:
    """A word of a closed set, which is a `Literal` or a sequence; the nearest one is in the refusal."""
    allowed = get_args(words) or tuple(words)
    if isinstance(value, str) and value in allowed:
        return value
    if not isinstance(value, str):
        raise _refused(name, value, f"one of {', '.join(allowed)}")
    word = value.strip().lower()
    option = name.strip("-").replace("-", "_")
    near = [SYNONYMS[word]] if SYNONYMS.get(word) in allowed else difflib.get_close_matches(word, allowed, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else ""
    if "int8" not in allowed:
        hint = HINTS.get((option, word), hint)
    text = value if value.isprintable() and value else repr(value)
    raise UsageError(f"{name} {text[:60]}; expected one of {', '.join(allowed)}" + (f"; {hint}" if hint else ""))


def text(name: str, value: Any, expected: str = "text") -> str:
    if not isinstance(value, str) or not value.strip():
        raise _refused(name, value, expected)
    return value


def texts(name: str, value: Any, expected: str = "names") -> tuple[str, ...]:
    """Several words; one alone is taken as such, and not as its letters."""
    items = [value] if isinstance(value, str) else _items(value)
    if items is None:
        raise _refused(name, value, expected)
    return tuple(text(name, item, expected) for item in items)


def path(name: str, value: Any, expected: str = "a path") -> Path:
    if not isinstance(value, str | os.PathLike):
        raise _refused(name, value, expected)
    written = os.fspath(value)
    if not isinstance(written, str) or not written:
        raise _refused(name, written, expected)
    try:
        encoded = os.fsencode(written)
    except UnicodeEncodeError:
        encoded = b"\0"
    longest = max(map(len, encoded.split(os.fsencode(os.sep))))
    if b"\0" in encoded or longest > NAME_BYTES or len(encoded) > PATH_BYTES:
        raise UsageError(f"{name} {shown(written)} can be no file's name here; expected {expected}")
    return Path(written)


def file(name: str, value: Any, expected: str = "a file's name") -> Path:
    """Where a file is to be written; one that ends as folders do is refused, because `Path` forgets that."""
    file_path = path(name, value, expected)
    if os.fspath(value).endswith(("/", os.sep)):
        raise UsageError(f"{name} {shown(os.fspath(value))} names a folder; expected {expected}")
    return file_path


def paths(name: str, value: Any, expected: str = "a path, or several") -> tuple[Path, ...]:
    """Several paths; one alone is taken as such."""
    items = [value] if isinstance(value, str | os.PathLike) else _items(value)
    if items is None:
        raise _refused(name, value, expected)
    return tuple(path(name, item, expected) for item in items)


def weights(name: str, value: Any) -> str:
    """Where a checkpoint is. Objects that hold weights are not taken: the manifest names what was exported."""
    if isinstance(value, str | os.PathLike):
        path(name, value, WEIGHTS)
        return os.fspath(value)
    raise _refused(name, value, WEIGHTS)


def images(name: str, value: Any) -> str:
    """Where images are. Datasets and loaders of other libraries are not taken."""
    if isinstance(value, str | os.PathLike):
        path(name, value, IMAGES)
        return os.fspath(value)
    hint = "; write its images to class folders, and give the folder above them" if hasattr(value, "__iter__") else ""
    raise _refused(name, value, IMAGES + hint)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refused(name, value, "True or False")
    return value


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number of any integer type; without `most` it is below 2^31."""
    expected = f"a whole number of at least {least}"
    number = _integer(value)
    if number is None:
        raise _refused(name, value, expected)
    if not least <= number < 2**31:
        raise UsageError(f"{name} {shown(number)}; expected {'at least ' + str(least) if number < least else 'fewer'}")
    if most is not None and number > most:
        raise UsageError(f"{name} {shown(number)}; expected at most {most}")
    return number


def one_number(name: str, value: Any, allowed: tuple[int, ...]) -> int:
    """A whole number of a closed set."""
    number = _integer(value)
    if number not in allowed:
        raise _refused(name, value, f"one of {', '.join(map(str, allowed))}")
    return number


def batch_size(name: str, value: Any) -> int:
    """How many images are taken at once."""
    return whole(name, value, most=MAX_BATCH)


def number(name: str, value: Any, above: float, most: float, expected: str) -> float:
    """A finite number, above one limit and not beyond the other."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise _refused(name, value, expected)
    try:
        converted = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refused(name, value, expected) from None
    if not (math.isfinite(converted) and above < converted <= most):
        raise _refused(name, converted, expected)
    return converted


def wholes(name: str, value: Any, least: int = 1, most: int | None = None) -> tuple[int, ...]:
    """Several whole numbers; one alone is taken as such."""
    items = _items(value)
    return tuple(whole(name, item, least, most) for item in ([value] if items is None else items))


def batch_sizes(name: str, value: Any) -> tuple[int, ...]:
    """Several of them; one alone is taken as such."""
    return wholes(name, value, most=MAX_BATCH)


def levels(name: str, value: Any) -> tuple[int, ...]:
    """Which maps, of the stages 1 to 4, of one number, of several, or of "2,3,4"."""
    items = _integers_of(value.split(",")) if isinstance(value, str) else _items(value)
    numbers = [_integer(level) for level in ([value] if items is None else items)]
    if not numbers or any(level not in (1, 2, 3, 4) for level in numbers) or sorted(set(numbers)) != numbers:  # type: ignore[type-var]  # None is none of the four
        raise _refused(name, value, "some of 1,2,3,4 in ascending order, for the strides 4, 8, 16 and 32")
    return cast("tuple[int, ...]", tuple(numbers))


def names(name: str, value: Any) -> tuple[str, ...]:
    """Names of tensors, of several, or of "images,map1,map2"."""
    items = [part for part in value.split(",") if value] if isinstance(value, str) else _items(value)
    stripped = [item.strip() if isinstance(item, str) else item for item in items or []]
    if items is None or not all(isinstance(item, str) and item for item in stripped):
        raise _refused(name, value, "names of tensors, such as images,map1,map2")
    return cast("tuple[str, ...]", tuple(stripped))


def image_size(name: str, value: Any) -> tuple[int, int]:
    """(height, width) in pixels, of one number, of two, or of "224" and "800x1280"."""
    expected = f"pixels such as 224, or height and width such as (800, 1280), each at most {MAX_SIDE}"
    items = _items(value)
    if isinstance(value, str):
        items = [
            int(part) if part.strip().isdecimal() and len(part) < 10 else None for part in value.lower().split("x")
        ]
    sides = [_integer(side) for side in ([value] if items is None else items)]
    if len(sides) not in (1, 2) or not all(side is not None and 0 < side <= MAX_SIDE for side in sides):
        if isinstance(value, str) and value.isprintable() and value:
            expected = "pixels such as 224, or HEIGHTxWIDTH such as 800x1280"
            raise UsageError(f"{name} {value[:60]}; expected {expected}, each at most {MAX_SIDE}")
        raise _refused(name, value, expected)
    return cast(int, sides[0]), cast(int, sides[-1])


def image_sizes(name: str, value: Any) -> tuple[tuple[int, int], ...]:
    """Several image sizes; one number alone is one size, two of them are two."""
    items = [value] if isinstance(value, int | str) else _items(value)
    if items is None:
        raise _refused(name, value, "image sizes such as [224, (800, 1280)]")
    return tuple(image_size(name, item) for item in items)


def batch_range(name: str, value: Any) -> BatchRange:
    """Batch sizes, of one number, of (min, opt, max), of "8" and "1:8:32", or of a `BatchRange`."""
    expected = f"N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= {MAX_BATCH}"
    items = _items(value)
    if isinstance(value, BatchRange):
        items = [value.min, value.opt, value.max]
    elif isinstance(value, str):
        items = _integers_of(value.split(":"))
    sizes = [_integer(size) for size in ([value] if items is None else items)]
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) == 3 and all(size is not None for size in sizes):
        low, opt, high = (cast(int, size) for size in sizes)
        if 1 <= low <= opt <= high <= MAX_BATCH:
            return BatchRange(min=low, opt=opt, max=high)
        value = ":".join(shown(size) for size in (sizes[:1] if items is None or len(items) == 1 else sizes))
    raise UsageError(f"{name} {value[:60] if isinstance(value, str) else shown(value)}; expected {expected}")


def preprocessing(name: str, value: Any) -> dict[str, Any]:
    """Fields of `Preprocessing` by name. One number for `mean` or `std` is for every channel."""
    known = [field for field in Preprocessing.__struct_fields__ if field != "assumed"]
    if isinstance(value, Preprocessing):
        return {field: getattr(value, field) for field in known}
    if not isinstance(value, Mapping):
        raise _refused(name, value, f"a dictionary with any of {', '.join(known)}")
    fields = dict(value)
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(str(field), known, n=1)
            raise UsageError(
                f"{name} has {shown(field)}; expected any of {', '.join(known)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    for field in ("mean", "std"):
        if field in fields:
            fields[field] = numbers(f"{name} {field}", fields[field])
    if "crop_pct" in fields:
        fields["crop_pct"] = number(f"{name} crop_pct", fields["crop_pct"], 0, 1, "a share above 0 and at most 1")
    if "exif_orientation" in fields:
        fields["exif_orientation"] = flag(f"{name} exif_orientation", fields["exif_orientation"])
    for field, words in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if field in fields:
            fields[field] = one_of(f"{name} {field}", fields[field], words)
    return fields


def numbers(name: str, value: Any) -> tuple[float, ...]:
    expected = "one number, or one a channel, such as (0.485, 0.456, 0.406)"
    items = _items(value)
    if items == []:
        raise _refused(name, value, expected)
    return tuple(number(name, item, -math.inf, math.inf, expected) for item in ([value] if items is None else items))


_FIELDS = msgspec.structs.fields(Preprocessing)
INTERPOLATIONS, CROP_MODES = (
    next(field.type for field in _FIELDS if field.name == name) for name in ("interpolation", "crop_mode")
)


def called(name: str, value: Any, told: Sequence[str]) -> Any:
    """A function that is told something.

    It is called in the middle of the work, so one that does not take so many arguments is refused before.

    Args:
        told: what each of its arguments is.
    """
    expected = f"a function that takes {counted(len(told), 'argument')}: {', '.join(told)}"
    if not callable(value) or isinstance(value, type):  # a class makes an object of what it is told
        raise _refused(name, value, f"{expected}; or leave it out")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of some that are written in C nobody can tell
        return value
    try:
        signature.bind(*told)
    except TypeError:
        raise UsageError(f"{name} is a function of {str(signature)[:60]}; expected {expected}") from None
    return value


def progress(value: Any, told: Sequence[str]) -> None:
    """Refuse what `progress` is, unless it is left out."""
    if value is not None:
        called("progress", value, told)


def record(name: str, value: Any, kind: type[T], expected: str) -> T:
    """A record of one type, or a dictionary of its fields."""
    if isinstance(value, kind):
        value = {field: getattr(value, field) for field in kind.__struct_fields__}  # type: ignore[attr-defined]
    elif not isinstance(value, Mapping):
        raise _refused(name, value, expected)
    known = kind.__struct_fields__  # type: ignore[attr-defined]
    for field in value:
        if field not in known:
            raise UsageError(f"{name} has {shown(field)}; expected any of {', '.join(known)}")
    try:
        return msgspec.convert(dict(value), kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{name}: {plain(error)}; expected {expected}") from None
