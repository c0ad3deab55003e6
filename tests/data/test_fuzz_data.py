"""Damaged images, masks, tars, tables, lists, annotations, results and predictions: only our own errors come out.

CONVNEXT_DEPLOY_FUZZ=20000 takes so many mutations of each kind; the suite takes a few hundred.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import fuzz
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from convnext_deploy.accuracy import evaluation as evaluate
from convnext_deploy.accuracy import gate, outputs, prediction_files
from convnext_deploy.accuracy import predictions as predicted
from convnext_deploy.data import boxes, decoding, jxl, masks, sources
from convnext_deploy.data.image_source import ImageSource
from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.records.accuracy import ClassAccuracy, EvalResult, Limits, ScoreResult
from convnext_deploy.records.base import Goal

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0"
SEED = 19


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """One to eight of: bytes replaced, bits flipped, a piece removed, repeated or zeroed, the end cut off."""
    made = bytearray(content)
    for _ in range(int(generator.integers(1, 9))):
        if not made:
            break
        place, length = int(generator.integers(len(made))), int(generator.integers(1, 17))
        match int(generator.integers(7)):
            case 0:
                made[place] = int(generator.integers(256))
            case 1:
                made[place] ^= 1 << int(generator.integers(8))
            case 2:
                del made[place : place + length]
            case 3:
                made[place:place] = made[place : place + length]
            case 4:
                made[place : place + length] = bytes(len(made[place : place + length]))
            case 5:
                made[place : place + length] = b"\xff" * len(made[place : place + length])
            case 6 if generator.random() < 0.2:
                del made[place:]
    return bytes(made)


def images() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    picture = Image.fromarray(noise).resize((21, 17))
    wide = Image.fromarray(np.arange(21 * 17, dtype=np.uint16).reshape(17, 21) * 180)
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        (picture, "PNG", {}), (picture.convert("P"), "PNG", {}), (wide, "PNG", {}), (picture, "JPEG", {}),
        (picture, "JPEG", {"progressive": True}), (picture.convert("CMYK"), "JPEG", {}), (picture, "WEBP", {}),
        (picture.convert("RGBA"), "WEBP", {"lossless": True}), (picture, "BMP", {}), (picture, "GIF", {}),
        (picture, "PPM", {}), (picture, "TIFF", {}), (picture, "TIFF", {"compression": "tiff_lzw"}), (wide, "TIFF", {}),
        (picture, "ICO", {}), (picture, "DDS", {}), (picture.convert("F"), "SPIDER", {}), (picture, "TGA", {}),
        (picture, "PCX", {}), (picture, "SGI", {}), (picture, "EPS", {}),
    ]  # fmt: skip
    kinds += [(picture, "AVIF", {})] if features.check("avif") else []
    kinds += [(picture, "JPEG2000", {})] if features.check("jpg_2000") else []
    made = []
    for image, kind, options in kinds:
        file = io.BytesIO()
        image.save(file, kind, **options)
        made.append(file.getvalue())
    return made


def check_is_a_line(error: Exception) -> None:
    assert "\n" not in str(error)


def read_image(content: bytes, folder: Path) -> None:
    try:
        assert decoding.decoded(content).mode not in ("I;16", "I", "F")
    except decoding.UnreadableImage as error:
        check_is_a_line(error)


def mask_files() -> list[bytes]:
    numbers = np.random.default_rng(0).integers(0, 5, (9, 7)).astype(np.int32)
    made = [masks.written(numbers, most=5, reduce_labels=False), masks.written(numbers, most=300, reduce_labels=True)]
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        file = io.BytesIO()
        Image.fromarray(numbers.astype(np.uint8)).save(file, kind)
        made.append(file.getvalue())
    return made


def read_mask(content: bytes, folder: Path) -> None:
    (folder / "mask.png").write_bytes(content)
    reduce = bool(len(content) % 2)  # one of the two, for the limit of time is of one reading
    try:
        found = masks.read(masks.of_files([folder / "mask.png"], ignored=255, reduce_labels=reduce), 0, 5)
        assert ((found >= 0) & (found < 5) | (found == masks.IGNORED)).all()
    except ConvNextDeployError as error:
        check_is_a_line(error)


def jxl_heads() -> list[bytes]:
    """Of 8 and of 600 pixels a side, bare and in boxes; what follows is no image."""
    bare = [b"\xff\x0a\x01" + bytes(20), b"\xff\x0a\x5c\x12" + bytes(range(20))]
    boxes = jxl.CONTAINER + b"\r\n\x87\n\x00\x00\x00\x14ftypjxl \x00\x00\x00\x00jxl "
    parts = [boxes + b"\0\0\0\x20jxlc" + bare[0], boxes + b"\0\0\0\1jxlp\0\0\0\0\0\0\0\x2c\0\0\0\0" + bare[1]]
    return bare + parts


def read_jxl(content: bytes, folder: Path) -> None:
    sides = jxl.sides(content)
    assert sides is None or (len(sides) == 2 and min(sides) >= 0)
    read_image(content, folder)


def tars() -> list[bytes]:
    made: list[bytes] = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        for nested in (False, True):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=form) as tar:
                names = ["ant/1.png", "bee/2.png", f"{'deep/' * 15}3.jpg", "ünï/4.png", "notes.txt"]
                bodies = [b"x" * (40 * number) for number in range(5)]
                if nested:
                    names, bodies = ["cat.tar", "dog.tar"], [made[0], made[0]]
                for name, body in zip(names, bodies, strict=True):
                    member = tarfile.TarInfo(name)
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
            made.append(file.getvalue())
    return made


def open_and_read(file: Path) -> None:
    try:
        source = sources.open_source(str(file))
        for index in range(min(len(source), 3)):
            try:
                source.read(index)
            except decoding.UnreadableImage as error:
                check_is_a_line(error)
    except ConvNextDeployError as error:
        check_is_a_line(error)


def read_tar(content: bytes, folder: Path) -> None:
    (folder / "a.tar").write_bytes(content)
    open_and_read(folder / "a.tar")


def shards() -> list[bytes]:
    """In webdataset's layout, with numbers and with names."""
    made = []
    for said in (("1", "0", "17"), ("ant", "bee", "fly")):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number, text in enumerate(said):
                for suffix, body in (("jpg", b"x" * 90), ("cls", text.encode()), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
        made.append(file.getvalue())
    return made


LISTS = ("csv", "tsv", "txt", "jsonl", "json")


def lists() -> list[bytes]:
    """Each behind a byte that says of which kind it is."""
    pairs = [("a.png", "ant"), ("b.png", "bee"), ("c.png", "3")]
    texts = ["path,label\n" + "\n".join(map(",".join, pairs)), "\n".join(map("\t".join, pairs)),
             "\n".join(map(" ".join, pairs)), "\n".join(json.dumps({"path": p, "label": n}) for p, n in pairs),
             json.dumps(dict(pairs))]  # fmt: skip
    tables = [(0, "path,a,b\na.png,1,0\nb.png,0,1"), (0, "path,x,y\na.png,0.5,-3e2\nb.png,1e9,0"),
              (4, json.dumps([["a.png", [0.5, 1]], ["b.png", [2, 3.5]]])),
              (0, "ImageId,PredictionString\na,n01440764 1 2 3 4\nb,n01443537 0 0 9 9 n01440764 1 1 2 2")]  # fmt: skip
    return [bytes([kind]) + text.encode() for kind, text in (*enumerate(texts), *tables)]


def read_a_list(content: bytes, folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).touch()
    file = folder / f"list.{LISTS[content[0] % len(LISTS)] if content else 'csv'}"
    file.write_bytes(content[1:])
    open_and_read(file)


def coco_files() -> list[bytes]:
    images = [{"id": number, "file_name": f"{name}.png", "width": 9, "height": 7} for number, name in enumerate("ab")]
    objects = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3.5, 4], "area": 14, "iscrowd": 0},
               {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 7], "iscrowd": 1}]  # fmt: skip
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    return [json.dumps({"images": images, "annotations": objects, "categories": categories}).encode()]


def read_coco(content: bytes, folder: Path) -> None:
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    (folder / "instances.json").write_bytes(content)
    open_and_read(folder / "instances.json")
    source = ImageSource(name="d", names=("a.png", "b.png"), labels=None, class_names=None, read_bytes=lambda _: b"")
    for numbers in (None, {"red": 0, "blue": 1}):
        try:
            found = boxes.boxed(source, folder / "instances.json", numbers, 3)
            assert found.boxes is not None
        except ConvNextDeployError as error:
            check_is_a_line(error)


def voc_files() -> list[bytes]:
    thing = "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>1</xmin></bndbox></object>"
    return [f"<annotation><filename>a.png</filename>{thing.format('cat')}{thing.format('dog')}</annotation>".encode()]


def read_voc(content: bytes, folder: Path) -> None:
    for name in ("JPEGImages", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "JPEGImages" / "a.png").touch()
    (folder / "Annotations" / "a.xml").write_bytes(content)
    open_and_read(folder)


def parquets() -> list[bytes]:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = b'{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b"]}}}}'
    made = []
    for compression in ("none", "snappy", "zstd"):
        rows = [{"bytes": b"not an image" * 3, "path": f"{number}.png"} for number in range(6)]
        schema = pa.schema([("image", image), ("label", pa.int64())], metadata={b"huggingface": features})
        file = io.BytesIO()
        table = pa.table({"image": rows, "label": [0, 1] * 3}, schema=schema)
        pq.write_table(table, file, compression=compression, row_group_size=4)
        made.append(file.getvalue())
    return made


def read_parquet(content: bytes, folder: Path) -> None:
    (folder / "a.parquet").write_bytes(content)
    open_and_read(folder / "a.parquet")


def evaluation() -> tuple[EvalResult, predicted.Predictions]:
    labels = np.arange(12) % 3
    predictions = predicted.of_logits(
        tuple(f"{number}.png" for number in range(12)), labels, np.eye(3, dtype=np.float32)[labels]
    )
    result = EvalResult(
        artifact="a", artifact_sha256="a" * 64, data="d", data_sha256="d" * 64, images=12, corrupt=("x: y",), top1=1.0,
        top5=1.0, per_class=tuple(ClassAccuracy(label=n, name="c", images=4, top1=1.0) for n in range(3)),
        images_per_s=1.0, predictions="a.npz",
    )  # fmt: skip
    return result, predictions


def results() -> list[bytes]:
    return [msgspec.json.encode(evaluation()[0])]


def predictions() -> list[bytes]:
    return [prediction_files.encode(predicted.Chunk(0, 12, evaluation()[1], ("x: y",)))]


def judge(result: EvalResult, found: predicted.Predictions) -> None:
    side = gate.Side(result=result, predictions=found)
    other = gate.Side(result=evaluation()[0], predictions=evaluation()[1])
    for pair in ((side, other), (other, side)):
        gate.judge(*pair, Limits(max_drop=1))


def read_result(content: bytes, folder: Path) -> None:
    (folder / "a.json").write_bytes(content)
    try:
        judge(evaluate.read_result(folder / "a.json"), evaluation()[1])
    except ConvNextDeployError as error:
        check_is_a_line(error)


def of_boxes() -> tuple[ScoreResult, predicted.Kept]:
    given = np.array([[1, 2, 5, 6, 0.9, 1], [0, 0, 9, 7, 0.5, 2]], np.float32)
    wanted = np.array([[1, 2, 4.5, 6, 1, 14, 0], [0, 0, 9, 7, 2, 63, 0]], np.float64)
    counts = np.array([1, 1, 0], np.int64)
    return scores("detection"), predicted.Detections(("a", "b", "c"), given, counts, wanted, counts.copy())


def of_pixels() -> tuple[ScoreResult, predicted.Kept]:
    hits = np.arange(6, dtype=np.int64).reshape(3, 2)
    return scores("segmentation"), predicted.Segments(("a", "b", "c"), hits, hits + 3, hits + 1)


def of_numbers() -> tuple[ScoreResult, predicted.Kept]:
    values = np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2)
    return scores("regression"), predicted.Outputs(("a", "b", "c"), values, values + values**2)


def scores(problem: Goal) -> ScoreResult:
    return ScoreResult(
        problem=problem, artifact="a", artifact_sha256="a" * 64, data="d", data_sha256="d" * 64, images=3, corrupt=(),
        score=0.5, per_output=(), exact=None, mean_absolute_error=None, root_mean_square_error=None, images_per_s=1.0,
        predictions="a.npz",
    )  # fmt: skip


OTHERS = (of_boxes, of_pixels, of_numbers)


def scored_predictions() -> list[bytes]:
    """Of detectors, segmenters and regressions; each array behind two bytes that say which it is."""
    made = []
    for number, make in enumerate(OTHERS):
        with zipfile.ZipFile(io.BytesIO(prediction_files.encode(predicted.Chunk(0, 3, make()[1], ())))) as archive:
            names = sorted(archive.namelist())
            made += [bytes([number, place]) + archive.read(name) for place, name in enumerate(names)]
    return made


def read_scored(content: bytes, folder: Path) -> None:
    if len(content) < 2:
        return
    result, whole = OTHERS[content[0] % len(OTHERS)]()
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(prediction_files.encode(predicted.Chunk(0, 3, whole, ())))) as archive,
        zipfile.ZipFile(packed, "w") as other,
    ):
        names = sorted(archive.namelist())
        for name in names:
            other.writestr(name, content[2:] if name == names[content[1] % len(names)] else archive.read(name))
    (folder / "a.npz").write_bytes(packed.getvalue())
    try:
        outputs.scored(prediction_files.read_outputs(folder / "a.npz"), result.problem)
    except ConvNextDeployError as error:
        check_is_a_line(error)


MEMBERS = ("about", "names", "labels", "top_classes", "top_log_probs", "label_log_prob")


def columns() -> list[bytes]:
    """Each array of a file of predictions, behind a byte that says which: zip's checksums would catch most damage."""
    with zipfile.ZipFile(io.BytesIO(predictions()[0])) as archive:
        return [bytes([number]) + archive.read(f"{name}.npy") for number, name in enumerate(MEMBERS)]


def read_columns(content: bytes, folder: Path) -> None:
    chosen = MEMBERS[content[0] % len(MEMBERS)] if content else ""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(predictions()[0])) as archive, zipfile.ZipFile(packed, "w") as other:
        for name in MEMBERS:
            other.writestr(f"{name}.npy", content[1:] if name == chosen else archive.read(f"{name}.npy"))
    read_predictions(packed.getvalue(), folder)


def old_predictions() -> list[bytes]:
    return [(GOLDEN / "eager-eval.parquet").read_bytes()]


def read_predictions(content: bytes, folder: Path, suffix: str = ".npz") -> None:
    (folder / f"a{suffix}").write_bytes(content)
    try:
        judge(evaluation()[0], prediction_files.read_predictions(folder / f"a{suffix}"))
    except ConvNextDeployError as error:
        check_is_a_line(error)


def read_old_predictions(content: bytes, folder: Path) -> None:
    read_predictions(content, folder, ".parquet")


KINDS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes, Path], None]]] = {
    "image": (images, read_image),
    "mask": (mask_files, read_mask),
    "jxl": (jxl_heads, read_jxl),
    "tar": (tars, read_tar),
    "webdataset": (shards, read_tar),
    "list": (lists, read_a_list),
    "coco": (coco_files, read_coco),
    "voc": (voc_files, read_voc),
    "parquet": (parquets, read_parquet),
    "result": (results, read_result),
    "predictions": (predictions, read_predictions),
    "columns": (columns, read_columns),
    "scored": (scored_predictions, read_scored),
    "old predictions": (old_predictions, read_old_predictions),
}


@pytest.mark.filterwarnings("ignore")  # decoders warn of what is damaged
@pytest.mark.parametrize("kind", list(KINDS))
def test_only_our_own_errors_come_out_of_damaged_files(kind: str, tmp_path: Path) -> None:
    make, read = KINDS[kind]
    seeds, generator = make(), np.random.default_rng(SEED)
    for seed in seeds:
        read(seed, tmp_path)  # before, it is taken
    damaged = (mutated(seeds[number % len(seeds)], generator) for number in range(fuzz.THINNED))
    assert fuzz.tracebacks(damaged, lambda content: read(content, tmp_path)) == {}
