"""Artifacts and images on other machines: the same files under the same paths where these are there, else sent.

Whether they are the same is asked of hashes. An artifact that arrives is verified like every other, and the hash of its
manifest has to be the one that was sent off.
"""

import hashlib
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..artifact import manifest
from ..artifact.manifest import MANIFEST_NAME, Artifact
from ..data.image_source import ImageSource, chosen
from ..data.readers import Contents, is_data
from ..errors import ArtifactError, DataError, plain
from .connection import Node
from .crew import Crew, pieces

SAMPLES = 8  # images whose bytes tell whether another machine sees the same


@dataclass(frozen=True, slots=True)
class Shared:
    """Something in the cluster's object store, which a node fetches once, where it is asked for."""

    references: tuple[Any, ...]  # one; within a tuple Ray fetches it only where `value` does

    def value(self) -> Any:
        import ray

        return ray.get(self.references[0])


def shared(value: Any) -> Shared:
    """Put it there."""
    import ray

    return Shared((ray.put(value),))


@dataclass(frozen=True, slots=True)
class Parcel:
    """An artifact on its way."""

    path: str  # absolute
    sha256: str
    content: Shared  # the files by name


def packed(artifact: Artifact) -> Parcel:
    """An artifact that was verified, put into the cluster's object store."""
    names = [MANIFEST_NAME, *(file.path for file in artifact.manifest.files)]
    content = {name: (artifact.path / name).read_bytes() for name in names}
    digest = hashlib.sha256(content[MANIFEST_NAME]).hexdigest()
    return Parcel(str(artifact.path.absolute()), digest, shared(content))


@contextmanager
def unpacked(parcel: Parcel) -> Iterator[Artifact]:
    """The artifact, verified. It is to be opened in the body: behind it a copy that was sent is gone.

    Raises:
        ArtifactError: what arrived is not what was sent off.
    """
    here = Path(parcel.path)
    try:
        same = hashlib.sha256((here / MANIFEST_NAME).read_bytes()).hexdigest() == parcel.sha256
        artifact = manifest.verified(here) if same else None
    except (OSError, ArtifactError):
        artifact = None
    if artifact is not None and artifact.sha256 == parcel.sha256:
        yield artifact
        return
    with tempfile.TemporaryDirectory(prefix="convnext-deploy-") as name:
        folder = Path(name)
        for path, content in parcel.content.value().items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        artifact = manifest.verified(folder)
        if artifact.sha256 != parcel.sha256:
            raise ArtifactError(f"{parcel.path} arrived as another artifact; run again")
        yield artifact


@dataclass(frozen=True, slots=True)
class Copy:
    """A file, or a folder's files without its folders, on its way."""

    path: str  # absolute
    is_file: bool
    hashes: Mapping[str, str]  # of the files, by name
    content: Shared  # likewise


def copied(path: Path) -> Copy:
    """Put it into the cluster's object store."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    content = {file.name: file.read_bytes() for file in files}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    return Copy(str(path.absolute()), path.is_file(), hashes, shared(content))


def placed(copy: Copy, folder: Path) -> Path:
    """Where it is: at the same path where that has the same bytes, else written into `folder`."""
    here = Path(copy.path)
    places = {name: here if copy.is_file else here / name for name in copy.hashes}
    try:
        if all(hashlib.sha256(places[name].read_bytes()).hexdigest() == copy.hashes[name] for name in places):
            return here
    except OSError:  # it is not there
        pass
    there = folder / here.name
    (folder if copy.is_file else there).mkdir(exist_ok=True)
    for name, data in copy.content.value().items():
        (there if copy.is_file else there / name).write_bytes(data)
    return there


@dataclass(frozen=True, slots=True)
class Proof:
    """Some images of a source, and the hashes of their bytes where the source was opened."""

    images: ImageSource
    hashes: tuple[str, ...]

    def holds(self) -> bool:
        """Whether the same bytes are read here."""
        return _hashes(self.images) == self.hashes


def proof_of(source: ImageSource) -> Proof | None:
    """None where a source is in this process's memory, so that no other can see it."""
    if not is_data(source.read_bytes) or (source.masks is not None and not is_data(source.masks.read_bytes)):
        return None
    count = min(SAMPLES, len(source))
    images = chosen(source, [number * len(source) // count for number in range(count)])
    return Proof(images, _hashes(images))


def told_who_is_blind(
    source: ImageSource, proof: Proof | None, say: Callable[[str], None]
) -> Callable[[Node, bool], None]:
    """What is to be called with each node and whether it sees the images; it says once of a node that they are sent."""
    blind: set[str] = set()

    def told(node: Node, seen: bool) -> None:
        if seen or node.id in blind:
            return
        blind.add(node.id)
        why = "its images are in memory here" if proof is None else f"it does not see {source.name}"
        what = "they are sent" if source.masks is None else "they are sent with their masks"
        say(f"node {node.address}: {why}, so {what}")

    return told


def _hashes(images: ImageSource) -> tuple[str, ...]:
    """Of each image, and of each mask where they have some."""
    readers = [images.read_bytes, *([] if images.masks is None else [images.masks.read_bytes])]
    hashes = []
    for read in readers:
        for index in range(len(images)):
            try:
                hashes.append(hashlib.sha256(read(index)).hexdigest())
            except (OSError, DataError) as error:
                hashes.append(plain(error))
    return tuple(hashes)


class Sighted(Protocol):
    """What a worker that was opened for images tells of itself."""

    @property
    def seen(self) -> bool: ...  # it reads the images itself


Opened = TypeVar("Opened", bound=Sighted)
Result = TypeVar("Result")


def results(
    workers: Crew[range, Opened, Result], source: ImageSource, ranges: Sequence[range], size: int
) -> Generator[Result, None, None]:
    """What the workers make of a source's images, in pieces of so many, which may come in any order.

    A worker is given the number of a piece's first image, and the images as a source of their own.
    """

    def load(indices: range, opened: Opened) -> tuple[int, ImageSource]:
        return indices.start, part(source, indices, opened.seen)

    for _, result in workers.results(pieces(ranges, size), load):
        yield result


def part(source: ImageSource, indices: range, seen: bool) -> ImageSource:
    """Those images, to be sent to a worker.

    Args:
        seen: it reads them itself; else their bytes, and those of their masks, are read here.
    """
    images = chosen(source, list(indices))
    if seen:
        return images
    masks = images.masks and replace(images.masks, read_bytes=_held(images.masks.read_bytes, len(images)))
    return replace(images, read_bytes=_held(images.encoded, len(images)), masks=masks, columns={})


def _held(read: Callable[[int], bytes], count: int) -> Contents:
    """What is read of so many, with why not where it cannot be."""
    contents: list[bytes | None] = []
    errors: list[str] = []
    for index in range(count):
        try:
            contents.append(read(index))
            errors.append("")
        except OSError as error:
            contents.append(None)
            errors.append(plain(error))
    return Contents(tuple(contents), tuple(errors))
