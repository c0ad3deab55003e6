"""Damaged files for the tests of every reader: bytes, and records of JSON, in ways that a fixed seed repeats.

    for content in fuzz.records([json_bytes, ...], 1000):   # JSON, JSON Lines
        with contextlib.suppress(ConvNextDeployError): reader(content)

Nothing here knows a reader. Each has a limit of time and memory for a file (`bounded`). `THINNED` is how many
mutations the suite takes of each; set CONVNEXT_DEPLOY_FUZZ to a number for more of them.
"""

import contextlib
import copy
import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from convnext_deploy.errors import ConvNextDeployError

THINNED = int(os.environ.get("CONVNEXT_DEPLOY_FUZZ", "400"))

# What a field contains instead: of another type, at the edge of its own, or beyond it.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**30, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, "", " ", "a",
    "nan", "\0", "\ud7ff", "ä" * 50, "../x", "/", "0" * 64, "f" * 64, "a\nb", "<script>", [], [[]], [None], [0], [0, 0],
    [-1.0] * 3, [1e308] * 4, {}, {"": None}, {"a": 1}, {"cpu": None, "cores": []}, [{}],
)  # fmt: skip
ODD_BYTES = (b"\xff", b"\x00", b"\xed\xa0\x80", b"[" * 5000, b"{" * 50, b"NaN", b"Infinity", b"1e999", b"\r\n", b"\n",
             b"=", b'"', b",", b"\xef\xbb\xbf", b"}", b"]", b"-", b"#", b"'''", b"9" * 400)  # fmt: skip


def damaged(contents: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` files, each one of `contents` with one to four damages to its bytes."""
    generator = random.Random(seed)
    for _ in range(count):
        content = generator.choice(contents)
        for _ in range(generator.choice((1, 1, 2, 4))):
            content = _damage(content, contents, generator)
        yield content


def records(contents: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Likewise of JSON or JSON Lines: three in four stay JSON and are wrong in one to three places."""
    generator = random.Random(seed)
    documents = [[json.loads(line) for line in _lines(content)] for content in contents]
    bytes_only = damaged(contents, count, seed + 1)
    for _ in range(count):
        if generator.random() < 0.25:
            yield next(bytes_only)
            continue
        lines = copy.deepcopy(generator.choice(documents))
        for _ in range(generator.choice((1, 1, 2, 3))):
            _misplace(lines, documents, generator)
        yield b"\n".join(json.dumps(line).encode("utf-8", "surrogatepass") for line in lines)


# Larger than any limit, also of 64 bits; almost nothing; and what Python's JSON takes for infinity.
HOSTILE = (b"99999999", b"1" + b"0" * 30, b"1e-320", b"1e999")
# A number of JSON, TOML or Python's source, that is no part of a name or a text.
_NUMBER = re.compile(rb"""(?<![\w."'+-])-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w."'])""")
_SHOWN = 3  # numbers of one list; the others are read as these are


def numbers(contents: Sequence[bytes]) -> Iterator[bytes]:
    """Texts, each with one number replaced by one of `HOSTILE`."""
    for content in contents:
        end = run = 0
        for match in _NUMBER.finditer(content):
            run = run + 1 if end and content[end : match.start()].strip() == b"," else 0
            end = match.end()
            for value in HOSTILE if run < _SHOWN else ():
                yield content[: match.start()] + value + content[match.end() :]


SECONDS, ROOM = 2.0, 256 << 20
_MOST = 4 << 30  # of addresses; allocators take more of these than they use


def bounded(reader: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """The reader with `SECONDS` of processor time, and `ROOM` bytes of memory beside what the process has.

    It raises TimeoutError or MemoryError where that is too little.
    """

    def read(content: bytes) -> object:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        before = signal.signal(signal.SIGPROF, _too_long)
        with contextlib.suppress(OSError):  # a hardened kernel; the peak may then be an earlier one, and finds less
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        taken, addresses = _memory("VmHWM"), _memory("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (addresses + _MOST, hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        began = time.process_time()
        try:
            return reader(content)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            signal.signal(signal.SIGPROF, before)
            if time.process_time() - began > SECONDS:
                _too_long()
            if _memory("VmHWM") > taken + ROOM:
                raise MemoryError(f"more than {ROOM:,} bytes of memory")

    return read


def _memory(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _too_long(*_: object) -> NoReturn:
    raise TimeoutError(f"more than {SECONDS:g} seconds of processor time")


def _lines(content: bytes) -> list[bytes]:
    try:
        json.loads(content)
        return [content]
    except ValueError:
        return [line for line in content.splitlines() if line.strip()]


def _damage(content: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    at, end = sorted(generator.randrange(len(content) + 1) for _ in range(2))
    end = min(end, at + generator.choice((1, 1, 2, 8, 64, 100_000)))
    kind = generator.randrange(6)
    if kind == 0 and content:  # one bit
        flipped = bytearray(content)
        flipped[min(at, len(content) - 1)] ^= 1 << generator.randrange(8)
        return bytes(flipped)
    if kind == 1:  # cut out
        return content[:at] + content[end:]
    if kind == 2:  # cut off
        return content[:at]
    if kind == 3:  # put in
        return content[:at] + generator.choice(ODD_BYTES) + content[end:]
    if kind == 4:  # another's middle
        other = generator.choice(others)
        first, last = sorted(generator.randrange(len(other) + 1) for _ in range(2))
        return content[:at] + other[first:last] + content[end:]
    return content[:at] + content[at:end] * generator.choice((2, 3, 20)) + content[end:]  # repeated


def _misplace(document: Any, others: Any, generator: random.Random) -> None:
    """One place of a document, in place: replaced, removed, added, or filled from another place."""
    places = _places(document)
    holder, key = generator.choice(places)
    kind = generator.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[generator.choice(("record", "benchmark", "extra", "top1", ""))] = _odd(generator)
    elif kind == 1:
        holder.insert(key, _odd(generator))
    elif kind == 2:
        source, where = generator.choice(_places(others))
        holder[key] = copy.deepcopy(source[where])
    elif kind == 3 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] * generator.choice((-1, 0, 0.5, 1e-30, 1e30))
    elif kind == 4 and isinstance(holder[key], list) and len(holder[key]) > 1:
        generator.shuffle(holder[key])
        del holder[key][generator.randrange(1, len(holder[key])) :]
    else:
        holder[key] = _odd(generator)


def _odd(generator: random.Random) -> Any:
    return copy.deepcopy(generator.choice(ODD_VALUES))


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of everything inside; of long lists the first few and the last, or they would be all there is."""
    found: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        holder = pending.pop()
        keys: list[Any] = list(holder) if isinstance(holder, dict) else [*range(len(holder))]
        if isinstance(holder, list) and len(keys) > 6:
            keys = [*keys[:3], keys[-1]]
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                pending.append(holder[key])
    return found or [([None], 0)]


def tracebacks(contents: Iterator[bytes], reader: Callable[[bytes], object]) -> dict[str, bytes]:
    """What a reader let out that is none of our own errors: its type and place, with the first file that did it."""
    found: dict[str, bytes] = {}
    read = bounded(reader)
    for content in contents:
        try:
            read(content)
        except ConvNextDeployError as error:
            if "\n" in str(error):
                found.setdefault(f"a message of several lines: {error}", content)
        except Exception as error:
            place = error.__traceback__
            ours = ""
            while place is not None:
                path = Path(place.tb_frame.f_code.co_filename)
                if "convnext_deploy" in path.parts:
                    ours = f"{path.name}:{place.tb_lineno}"
                place = place.tb_next
            found.setdefault(f"{type(error).__name__} at {ours}: {error}"[:200], content)
    return found
