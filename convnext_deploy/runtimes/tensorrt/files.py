"""The files of an engine: itself, which says what it is before it is loaded, and the record of how it was built."""

import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...artifact.manifest import write_file
from ...errors import ArtifactError, BuildError, is_full_disk, plain
from ...records.base import content_of
from ...records.manifest import EngineRecord

ENGINE_FILE = "model.engine"
RECORD_FILE = "build.json"

# Where the serialized form says what it is. Not documented: read off the engines of TensorRT-RTX 1.7.1, built for one
# compute capability after another. The size is that of the whole file; a set bit of the mask is one of BITS.
MAGIC = {b"vtrt", b"ptrt"}
HEADER = struct.Struct("<4s12xQ4B4sI")  # magic, size in bytes, version, magic again, mask of compute capabilities
BITS = {0x01: "sm75", 0x02: "sm80", 0x04: "sm86", 0x08: "sm89", 0x10: "sm120", 0x20: "sm121"}
AMPERE_ON = 0x40  # set where no target was named: every GPU from Ampere on, later ones included


def write_engine(path: Path, content: memoryview) -> None:
    try:
        write_file(path, content)  # type: ignore[arg-type]  # any buffer; a copy of a 1.4 GB engine is not needed
    except OSError as error:
        raise unwritten(path, error) from None


def unwritten(path: Path, error: OSError) -> BuildError:
    cure = "make room, or choose another --out" if is_full_disk(error) else "choose another --out"
    return BuildError(f"the engine cannot be written to {path.parent}: {plain(error)}; {cure}")


def save_record(folder: Path, record: EngineRecord) -> None:
    (folder / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read_record(folder: Path) -> EngineRecord:
    """What `build_artifact` recorded beside the engine in `folder`.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    path = folder / RECORD_FILE
    try:
        return msgspec.json.decode(content_of(path), type=EngineRecord)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {plain(error)}; export the engine again") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {plain(error)}; export the engine again") from None


@dataclass(frozen=True, slots=True)
class Header:
    version: str
    targets: tuple[str, ...]
    ampere_on: bool
    bytes: int


def read_header(path: Path) -> Header:
    """What an engine file says about itself, without loading it.

    Raises:
        ArtifactError: no engine, or one that was cut short.
    """
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size or start[:4] not in MAGIC:
        raise ArtifactError(f"{path} is not a TensorRT engine (its first bytes are {start[:4]!r}); export it again")
    _, size, *version, inner, mask = HEADER.unpack(start)
    actual = path.stat().st_size
    if size != actual:
        raise ArtifactError(f"{path} has {actual} bytes where its header says {size}: cut short; copy or export again")
    known = inner in MAGIC
    return Header(
        version=".".join(map(str, version)),
        targets=tuple(name for bit, name in BITS.items() if known and mask & bit),
        ampere_on=bool(known and mask & AMPERE_ON),
        bytes=size,
    )
