"""Every error a user can meet.

ConvNextDeployError            one line: what was wrong, the value, what was expected, what to do
├── UsageError                 the request cannot be carried out as asked (exit code 2)
│   ├── WeightsError           a checkpoint that cannot be found, read, or matched to the architecture
│   ├── ArtifactError          an artifact folder that is missing, damaged, or of another schema
│   ├── DataError              an image source that cannot be read
│   ├── InputError             a batch whose shape, dtype or values the artifact does not take
│   └── MissingPackageError    an optional package that is not installed
└── CheckFailed                the work was done and a check on it failed (exit code 1)
    ├── BuildError             a converter or compiler refused the model
    ├── PassError              an exact rewrite moved the outputs
    ├── ParityError            an artifact does not compute what its PyTorch source computes
    ├── PrecisionError         an artifact does not run in the precision that was asked for
    └── WorkerError            a process that builds or measures crashed, or reported an error
"""

import errno
import os
import re

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # the latter of a user's share
# The system's words, which libraries put into errors of their own types, and NumPy's where `tofile` wrote a part only.
_FULL_DISK_WORDS = re.compile(
    "|".join(re.escape(os.strerror(number)) for number in _FULL_DISK)
    + r"|problem writing element|\d+ requested and \d+ written"
)
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # PyTorch sets parts of its messages in bold
_NOISE = re.compile(_TERMINAL_CODES.pattern + r"|\[Errno -?\d+\] ")  # a library's error quotes one of the system's


_LONGEST = 240  # characters that we take over of somebody else's message


def plain(error: BaseException) -> str:
    """What the system, Python or another library raised, in plain words for the end of a line of ours.

    `str` of these says "[Errno 13] Permission denied: 'x'", "'state_dict'" or nothing at all.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"it has no {' '.join(repr(error.args[0]).split())[:_LONGEST]}"
    for kind, words in _WORDS.items():
        if isinstance(error, kind):
            return words
    said = " ".join(_NOISE.sub("", str(error)).split())[:_LONGEST]
    return said or f"a {type(error).__name__} that says no more"


_WORDS: dict[type[BaseException], str] = {
    EOFError: "it ends too early",
    RecursionError: "it nests deeper than Python reads",
    MemoryError: "there is not enough memory for it",
    UnicodeDecodeError: "it is no UTF-8 text",
    TimeoutError: "it took too long",
}


def was_interrupted(error: BaseException) -> bool:
    """Whether an error comes of Ctrl-C: an extension module that is being imported turns it into an ImportError."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, tells of a disk, or of a user's share of one, that is full."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL_DISK or _FULL_DISK_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(error: OSError) -> str | None:
    """The line for a disk, or a user's share of one, that is full; None of other errors."""
    return f"{error.filename or 'the disk'} is full; make room, or write elsewhere" if is_full_disk(error) else None


def counted(count: int, noun: str) -> str:
    """`1 image`, `2,000 images`, `3 classes`, `4 entries`."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"


def printable(text: str) -> str:
    """A name as text that UTF-8 can hold: where Python took the system for ASCII, or a name is of other bytes."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


class ConvNextDeployError(Exception):
    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(_TERMINAL_CODES.sub("", str(message)))


class UsageError(ConvNextDeployError):
    exit_code = 2


class WeightsError(UsageError):
    pass


class ArtifactError(UsageError):
    pass


class DataError(UsageError):
    pass


class InputError(UsageError):
    pass


class MissingPackageError(UsageError):
    pass


class CheckFailed(ConvNextDeployError):
    pass


class BuildError(CheckFailed):
    pass


class PassError(CheckFailed):
    pass


class ParityError(CheckFailed):
    pass


class PrecisionError(CheckFailed):
    pass


class WorkerError(CheckFailed):
    pass
