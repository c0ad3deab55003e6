"""Images behind addresses: what a store gives is what the files on a disk give, and its refusals are one line."""

import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores
from image_tars import write_tar
from PIL import Image

from convnext_deploy.data import remote, sources
from convnext_deploy.errors import DataError, MissingPackageError

COUNT = 12


def image(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def parquet(root: Path) -> None:
    for part in range(2):
        rows = [
            {"image": {"bytes": image(number), "path": f"{number}.png"}, "label": number % 3}
            for number in range(part, COUNT, 2)
        ]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{part}.parquet", row_group_size=4)


def tars(root: Path) -> None:
    for part in range(2):
        write_tar(
            root / f"{part}.tar", {f"c{number % 3}/{number}.png": image(number) for number in range(part, COUNT, 2)}
        )


def webdataset(root: Path) -> None:
    for part in range(2):
        files: dict[str, bytes] = {}
        for number in range(part, COUNT, 2):
            files |= {f"{number:05d}.cls": str(number % 3).encode(), f"{number:05d}.png": image(number)}
        write_tar(root / f"val-{part}.tar", files)


def as_on_disk(address: str, folder: Path) -> sources.ImageSource:
    """The source of an address, which gives what the same files in a folder give."""
    found, expected = sources.open_source(address), sources.open_source(str(folder))
    assert (found.name, found.sha256, found.class_names) == (address, expected.sha256, expected.class_names)
    contents = [expected.read_bytes(index) for index in range(COUNT)]
    assert [found.read_bytes(index) for index in reversed(range(COUNT))] == contents[::-1]
    part = pickle.loads(pickle.dumps(sources.subset(found, 5)))  # as a worker is sent it
    assert [part.read_bytes(index) for index in range(5)] == [contents[index * COUNT // 5] for index in range(5)]
    return found


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Puts a folder's files where fsspec keeps them in memory."""
    system = fsspec.filesystem("memory")

    def put(name: str) -> str:
        for file in (tmp_path / name).iterdir():
            system.pipe_file(f"/bucket/{name}/{file.name}", file.read_bytes())
        return f"memory://bucket/{name}"

    yield put
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("write", [parquet, tars, webdataset])
def test_a_folder_at_an_address_is_read_as_one_on_the_disk(
    tmp_path: Path, memory: Callable[[str], str], write: Callable[[Path], None]
) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set")
    address = memory("set")
    as_on_disk(address, tmp_path / "set")
    as_on_disk(f"{address}/*{'.parquet' if write is parquet else '.tar'}", tmp_path / "set")


def test_one_file_and_a_split_by_its_name_are_taken(tmp_path: Path, memory: Callable[[str], str]) -> None:
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set")
    for name, split in (("0", "train"), ("1", "test")):
        (tmp_path / "set" / f"{name}.parquet").rename(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    address = memory("set")
    one = sources.open_source(f"{address}/test-00000-of-00001.parquet")
    assert one.names == sources.open_source(address, "test").names
    with pytest.raises(DataError, match="has the splits test, train; choose one with --split"):
        sources.open_source(address)


def test_opening_a_parquet_file_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    rows = [{"image": {"bytes": noise, "path": f"{number}.png"}, "label": 0} for number in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=5, use_dictionary=False)
    read: list[int] = []
    opened = remote.opened

    class Counted(io.RawIOBase):
        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, *where: int) -> int:
            return self.file.seek(*where)

        def tell(self) -> int:
            return self.file.tell()

        def read(self, size: int = -1) -> bytes:
            content = self.file.read(size)
            read.append(len(content))
            return content

    @contextmanager
    def counted(place: str, **options: Any) -> Iterator[IO[bytes]]:
        with opened(place, **options) as file:
            yield Counted(file)  # type: ignore[misc]  # what Arrow asks of a file

    monkeypatch.setattr(remote, "opened", counted)
    source = sources.open_source(str(tmp_path / "a.parquet"))
    assert sum(read) < 100_000  # of 1,000,000: the end of the file, names and labels
    source.read_bytes(7)
    assert sum(read) < 400_000  # and a row group


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nowhere/a.parquet", r"memory://nowhere/a\.parquet does not exist there; expected a \.parquet"),
        ("memory://nowhere", r"memory://nowhere does not exist there"),
        ("memory://nowhere/*.tar", r"has no \.parquet and no \.tar file"),
        ("ftp7://a/b.tar", r"ftp7://a/b\.tar cannot be opened: Protocol not known: ftp7"),
    ],
)
def test_an_address_without_images_is_refused(address: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sources.open_source(address)


def test_two_kinds_of_files_and_splits_of_tars_are_refused(tmp_path: Path, memory: Callable[[str], str]) -> None:
    (tmp_path / "set").mkdir()
    tars(tmp_path / "set")
    address = memory("set")
    with pytest.raises(DataError, match=r"has tars and no split 'val'; name those of the split"):
        sources.open_source(address, "val")
    parquet(tmp_path / "set")
    memory("set")
    with pytest.raises(DataError, match=r"has both \.parquet and \.tar files; name one of the two"):
        sources.open_source(address)


def test_a_damaged_file_at_an_address_is_one_line(tmp_path: Path, memory: Callable[[str], str]) -> None:
    (tmp_path / "set").mkdir()
    for name in ("a.parquet", "b.tar"):
        (tmp_path / "set" / name).write_bytes(b"nothing of the kind" * 100)
    address = memory("set")
    for name in ("a.parquet", "b.tar"):
        with pytest.raises(DataError, match=rf"set/{name} cannot be read") as found:
            sources.open_source(f"{address}/{name}")
        assert "\n" not in str(found.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    fsspec.registry  # noqa: B018 - imported before, so that its own imports are not hidden
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(MissingPackageError, match=r"gcsfs, which reads gs://, is not installed; .*\[remote\]"):
        sources.open_source("gs://bucket/a.parquet")


# A store of S3's kind, on this machine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server; what is needed to use it stands in the environment."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str) -> Iterator[Any]:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("photos")
    yield system
    system.rm("photos", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("write", [parquet, tars, webdataset])
def test_s3_is_read_as_a_disk(tmp_path: Path, bucket: Any, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    for file in tmp_path.iterdir():
        bucket.put_file(str(file), f"photos/set/{file.name}")
    source = as_on_disk("s3://photos/set", tmp_path)
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.load(sys.stdin.buffer).read_bytes(0))"
    read = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], input=pickle.dumps(sources.subset(source, 1)),
        capture_output=True,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr.decode()
    assert read.stdout == source.read_bytes(0)


def test_missing_credentials_are_refused_with_where_they_are_taken_from() -> None:
    """It said "run it again", which mends nothing."""

    class NoCredentialsError(Exception):
        """As botocore calls it."""

    line = r"^s3://b/x cannot be read: Unable.*; give credentials .*FSSPEC_S3_ANON=true$"
    with pytest.raises(DataError, match=line), remote.refused("s3://b/x"):
        raise NoCredentialsError("Unable to locate credentials")


def test_a_wrong_bucket_no_credentials_and_no_network_are_one_line_each(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    def refusal(address: str) -> str:
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(DataError) as found:
            sources.open_source(address)
        assert "\n" not in str(found.value)
        return str(found.value)

    assert "s3://photoss/a.parquet does not exist there" in refusal("s3://photoss/a.parquet")
    assert "s3://photos/a.parquet does not exist there" in refusal("s3://photos/a.parquet")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    line = refusal("s3://photos/a.parquet")
    assert "cannot be read" in line
    assert line.endswith("; check the network and run it again")  # nothing is kept yet to go on from
    monkeypatch.undo()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "credentials" in refusal("s3://photos/a.parquet")


# Google's store and Hugging Face's hub, as a server on this machine answers for them ----------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[stores.Store, dict[str, str]]]:
    """A store, and the address of its folder `set` by scheme; its packages find it where users' settings stand."""
    pytest.importorskip("gcsfs")
    hub = pytest.importorskip("huggingface_hub")
    with stores.store() as store:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": store.address, "token": False})
        yield store, {"gs": f"gs://{stores.BUCKET}/set", "hf": f"hf://datasets/{stores.REPOSITORY}/set"}
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    hub.HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("write", [parquet, webdataset])
@pytest.mark.parametrize("scheme", ["gs", "hf"])
def test_googles_store_and_the_hub_are_read_as_a_disk(
    tmp_path: Path, elsewhere: tuple[stores.Store, dict[str, str]], scheme: str, write: Callable[[Path], None]
) -> None:
    store, addresses = elsewhere
    write(tmp_path)
    store.files = {f"set/{file.name}": file.read_bytes() for file in tmp_path.iterdir()}
    as_on_disk(addresses[scheme], tmp_path)
    one = next(file.name for file in sorted(tmp_path.iterdir()))
    assert len(sources.open_source(f"{addresses[scheme]}/{one}")) == COUNT // 2


@pytest.mark.parametrize("scheme", ["gs", "hf"])
def test_what_is_absent_or_not_allowed_there_is_one_line(
    elsewhere: tuple[stores.Store, dict[str, str]], scheme: str
) -> None:
    store, addresses = elsewhere
    with pytest.raises(DataError, match=r"absent\.parquet does not exist there") as refusal:
        sources.open_source(f"{addresses[scheme]}/absent.parquet")
    assert "\n" not in str(refusal.value)
    store.status = 403
    with pytest.raises(
        DataError, match=f"{scheme}://.*(may not be read with these credentials|cannot be read)"
    ) as refusal:
        sources.open_source(f"{addresses[scheme]}-of-others/other.parquet")
    assert "\n" not in str(refusal.value)
