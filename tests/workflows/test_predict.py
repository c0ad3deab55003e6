"""What a model says of images that nobody has labelled."""

import csv
import io
import json
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from false_servers import answering
from PIL import Image
from typer.testing import CliRunner

import convnext_deploy
from convnext_deploy.cli.app import app
from convnext_deploy.errors import DataError, UsageError
from convnext_deploy.records.prediction import PredictResult
from convnext_deploy.workflows import predict

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "examples" / "fashion-mnist" / "model.safetensors"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "bundled"
    convnext_deploy.export(WEIGHTS, format="torchscript", out=out)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three images, one of them damaged."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(generator.integers(0, 256, (40, 30), np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


def by_hand(artifact: Path, file: Path) -> np.ndarray:
    """Probabilities through torch's own softmax and the session's `run`."""
    from convnext_deploy.data import preprocess

    session = convnext_deploy.load(artifact)
    manifest = session.manifest
    read = preprocess.transform(manifest.preprocessing, manifest.model.image_size, manifest.model.in_chans)
    batch = preprocess.as_input(read(Image.open(file))[None], manifest.preprocessing, manifest.export.input)
    (logits,) = session.run(batch)
    return torch.from_numpy(logits[0]).double().softmax(0).numpy()


def test_the_most_probable_classes_come_with_their_names(artifact: Path, images: Path) -> None:
    result = convnext_deploy.predict(artifact, images / "a.png", top=3)
    (one,) = result.predictions
    right, names = by_hand(artifact, images / "a.png"), convnext_deploy.load(artifact).manifest.labels
    assert names is not None
    assert [best.number for best in one.classes] == list(np.argsort(-right)[:3])
    np.testing.assert_allclose([best.probability for best in one.classes], np.sort(right)[::-1][:3], rtol=1e-6)
    assert [best.name for best in one.classes] == [names[best.number] for best in one.classes]
    assert result.names_from == "artifact"


def test_a_folder_is_read_in_batches_and_what_cannot_be_read_is_listed(artifact: Path, images: Path) -> None:
    result = convnext_deploy.predict(artifact, images, batch=2)
    assert [one.image for one in result.predictions] == ["a.png", "b.jpg"]
    assert len(result.unreadable) == 1
    assert result.unreadable[0].startswith("c.png: ")
    for one in result.predictions:
        right = by_hand(artifact, images / one.image)
        assert one.classes[0].probability == pytest.approx(right.max(), rel=1e-5)


def test_files_open_files_and_images_of_pillow_say_the_same(artifact: Path, images: Path) -> None:
    session = convnext_deploy.load(artifact)
    with (images / "a.png").open("rb") as file:
        result = convnext_deploy.predict(session, [images / "a.png", Image.open(images / "a.png"), file])
    assert len({one.classes for one in result.predictions}) == 1
    assert len(result.predictions) == 3
    assert result.artifact_sha256 is None


def test_images_that_are_not_there_are_told_what_could_be(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nope.png' does not exist; expected an image, a folder, tar, .*standard input"
    ):
        convnext_deploy.predict(artifact, tmp_path / "nope.png")


def test_of_a_list_with_several_splits_one_is_chosen(artifact: Path, images: Path) -> None:
    file = images / "list.csv"
    file.write_text("path,label,split\na.png,0,train\nb.jpg,0,val\n")
    with pytest.raises(DataError, match="has entries of the splits train, val; choose one with --split"):
        convnext_deploy.predict(artifact, file)
    (found,) = convnext_deploy.predict(artifact, file, split="val").predictions
    assert found.image == "b.jpg"
    file.unlink()


def test_the_images_of_a_store_are_taken(images: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(images / "a.png", "a.png")
    system = fsspec.filesystem("memory")
    system.pipe_file("/predicted/photos.tar", content.getvalue())
    try:
        ((name, read),) = predict.listed("memory://predicted/photos.tar")
        assert name == "a.png"
        assert np.array_equal(np.asarray(read()), np.asarray(Image.open(images / "a.png")))
        with pytest.raises(DataError, match=r"memory://predicted/b\.tar does not exist there"):
            predict.listed("memory://predicted/b.tar")
    finally:
        system.rm("/predicted", recursive=True)


def test_a_file_that_cannot_be_written_is_refused_before_an_image_is_read(artifact: Path, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    for name, reason in (("nowhere/a.csv", "there is no folder"), ("folder.csv", "is a folder; expected the name of")):
        (tmp_path / "folder.csv").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=reason):
            convnext_deploy.predict(
                artifact, Image.new("L", (64, 64)), out=tmp_path / name, progress=lambda *step: asked.append(step)
            )
    assert asked == []


GENERATOR = np.random.default_rng(1)
COLOURS = GENERATOR.integers(0, 256, (40, 30, 4), np.uint8)
PHOTO = Image.fromarray(COLOURS[..., :3])


def _file_of(kind: str, folder: Path) -> tuple[Path, Image.Image]:
    """An image file, and the picture in RGB or grey that it has to be read as."""
    path = folder / f"{kind}.png"
    if kind == "cmyk":
        path = folder / "cmyk.tif"
        PHOTO.convert("CMYK").save(path)
        return path, Image.open(path).convert("RGB")
    if kind == "palette":
        PHOTO.quantize(17).save(path, transparency=3)
        return path, Image.open(path).convert("RGB")
    if kind == "alpha":
        Image.fromarray(COLOURS).save(path)
        return path, PHOTO
    if kind == "grey of 16 bits":
        deep = GENERATOR.integers(0, 2**16, (40, 30), np.uint16)
        Image.fromarray(deep).save(path)
        return path, Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    if kind == "animated":
        path = folder / "animated.webp"
        PHOTO.save(path, save_all=True, append_images=[PHOTO.rotate(180)], lossless=True)
        return path, PHOTO
    assert kind == "turned"
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(path, exif=exif)
    return path, PHOTO


@pytest.mark.parametrize("kind", ["cmyk", "palette", "alpha", "grey of 16 bits", "animated", "turned"])
def test_every_kind_of_image_is_read_as_the_guide_says(kind: str, artifact: Path, tmp_path: Path) -> None:
    path, plain = _file_of(kind, tmp_path)
    (read,), (expected,) = (convnext_deploy.predict(artifact, given).predictions for given in (path, plain))
    assert read.classes == expected.classes


def test_an_address_is_fetched(artifact: Path, images: Path) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            if self.path == "/a.png":
                self.wfile.write((images / "a.png").read_bytes())

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        found = convnext_deploy.predict(artifact, f"{address}/a.png")
        with pytest.raises(
            DataError, match=r"^http://.*/absent\.png: the address cannot be read: HTTP Error 404: Not Found"
        ):
            convnext_deploy.predict(artifact, f"{address}/absent.png")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found.predictions[0].classes == convnext_deploy.predict(artifact, images / "a.png").predictions[0].classes


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "Remote end closed connection without response"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n" + b"A: b\r\n" * 200 + b"\r\n", "got more than 100 headers"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nshort", "IncompleteRead"),
    ],
    ids=["nothing", "another protocol", "too many headers", "cut off"],
)
def test_what_is_no_answer_of_http_is_one_line(answer: bytes, reason: str, artifact: Path) -> None:
    with answering(answer) as place:
        address = f"http://{place}/a.png"
        with pytest.raises(DataError, match=rf"^{address}: the address cannot be read: .*{re.escape(reason)}"):
            convnext_deploy.predict(artifact, address)


def test_results_are_kept_as_csv_json_and_npz(artifact: Path, images: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "json", "npz"):
        result = convnext_deploy.predict(artifact, images, top=2, out=tmp_path / f"out.{suffix}")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"]) for row in rows] == [
        ("a.png", "1"), ("a.png", "2"), ("b.jpg", "1"), ("b.jpg", "2")
    ]  # fmt: skip
    assert msgspec.json.decode((tmp_path / "out.json").read_bytes(), type=PredictResult) == result
    with np.load(tmp_path / "out.npz") as kept:
        assert list(kept["images"]) == ["a.png", "b.jpg"]
        powers = np.exp(kept["output0"].astype(np.float64))
        right = by_hand(artifact, images / "a.png")
        np.testing.assert_allclose(powers[0] / powers[0].sum(), right, rtol=1e-5)


def test_a_model_without_classes_gives_its_outputs(images: Path, tmp_path: Path) -> None:
    convnext_deploy.export(WEIGHTS, format="torchscript", task="embed", out=tmp_path / "embed")
    with pytest.raises(UsageError, match=r"no classes: its task is embed; keep its outputs with --out NAME.npz"):
        convnext_deploy.predict(tmp_path / "embed", images)
    result = convnext_deploy.predict(tmp_path / "embed", images, out=tmp_path / "out.npz")
    assert all(not one.classes for one in result.predictions)
    with np.load(tmp_path / "out.npz") as kept:
        assert kept["output0"].shape == (2, convnext_deploy.load(tmp_path / "embed").manifest.model.dims[-1])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"top": 0}, "top 0; expected at least 1"),
        ({"out": "x.txt"}, "ends in '.txt'; expected one of .csv, .json, .npz"),
        ({"images": "absent.png"}, "'absent.png' does not exist"),
        ({"images": []}, "expected at least one"),
        ({"images": 3}, "images of type int; expected a path"),
        ({"images": np.zeros((8, 8, 3), np.uint8)}, "of type ndarray; .* Image.fromarray .* red first"),
        ({"images": b"GIF89a"}, "of type bytes; .* give io.BytesIO of an encoded image's bytes"),
    ],
)
def test_mistakes_are_refused_in_a_line(artifact: Path, images: Path, options: dict[str, object], why: str) -> None:
    arguments = {"images": images, **options}
    with pytest.raises((UsageError, DataError), match=why):
        convnext_deploy.predict(artifact, **arguments)  # type: ignore[arg-type]


def test_labels_of_a_file_go_before_the_artifacts_and_must_be_all(artifact: Path, images: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {number}" for number in range(10)))
    best = convnext_deploy.predict(artifact, images / "a.png", labels=names).predictions[0].classes[0]
    assert best.name == f"kind {best.number}"
    names.write_text("one\ntwo\n")
    with pytest.raises(UsageError, match=r"names 2 classes, up to number 1; the model has 10 \(0..9\)"):
        convnext_deploy.predict(artifact, images / "a.png", labels=names)


def test_the_thousand_outputs_of_a_model_without_labels_are_taken_for_imagenets_and_that_is_said(
    images: Path, tmp_path: Path
) -> None:
    convnext_deploy.export("random", variant="test_convnext", format="torchscript", image_size=64, out=tmp_path / "r")
    said: list[str] = []
    result = convnext_deploy.predict(tmp_path / "r", images / "a.png", say=said.append)
    assert result.names_from == "imagenet"
    assert "taken for ImageNet-1k's" in said[0]
    assert result.notes == tuple(said)
    import timm.data

    best = result.predictions[0].classes[0]
    assert best.name == timm.data.ImageNetInfo().index_to_description(best.number)


def test_the_command_prints_a_table_or_json_and_reads_standard_input(artifact: Path, images: Path) -> None:
    run = CliRunner()
    table = run.invoke(app, ["predict", str(artifact), str(images)])
    assert table.exit_code == 0
    assert "a.png" in table.stdout
    assert "1 image cannot be read, the first: c.png: " in table.stdout
    piped = run.invoke(app, ["predict", str(artifact), "-", "--json"], input=(images / "a.png").read_bytes())
    assert piped.exit_code == 0, piped.output
    found = json.loads(piped.stdout)["predictions"][0]["classes"]
    assert found[0]["number"] == int(by_hand(artifact, images / "a.png").argmax())


def test_a_result_is_the_sequence_of_its_predictions(artifact: Path, images: Path) -> None:
    """It had no length, could not be looped over and had no first item."""
    result = convnext_deploy.predict(artifact, images)
    assert len(result) == 2
    assert [one.image for one in result] == [one.image for one in result.predictions]
    assert result[0] is result.predictions[0]
    assert result[-1:] == result.predictions[1:]
    (line,) = result.unreadable
    assert "c.png" in line


def test_a_result_of_many_images_is_printed_in_short(artifact: Path, images: Path) -> None:
    result = convnext_deploy.predict(artifact, [images / "a.png"] * 2_000, top=1)
    assert repr(result).count("Prediction(image=") == 5
    assert "... 1,995 more)" in repr(result)


def test_an_open_file_that_gives_no_bytes_is_refused_in_a_line(artifact: Path, images: Path) -> None:
    """They ended in errors of Python's own."""
    with (images / "a.png").open("rb") as closed:
        pass
    with pytest.raises(DataError, match=r"a\.png cannot be read: read of closed file; expected an open file of bytes"):
        convnext_deploy.predict(artifact, closed)
    with (images / "a.png").open() as text, pytest.raises(DataError, match=r"it is no UTF-8 text; expected an open"):
        convnext_deploy.predict(artifact, text)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"an open file gives str; expected an open file of bytes, as open\(path"):
        convnext_deploy.predict(artifact, io.StringIO("a"))  # type: ignore[arg-type]


def test_a_place_that_does_not_exist_is_shown_whole(artifact: Path, tmp_path: Path) -> None:
    """Its middle was left out, where the mistake can be."""
    place = tmp_path / "photographs-of-the-year" / "validation"
    with pytest.raises(DataError, match=f"^'{place}' does not exist"):
        convnext_deploy.predict(artifact, place)
