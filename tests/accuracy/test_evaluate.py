"""Accuracy over a session, held against timm's own validation loop and a float64 reference."""

import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copy
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sample_records
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from convnext_deploy import cli, env
from convnext_deploy.accuracy import evaluation, inference, prediction_files
from convnext_deploy.accuracy import predictions as predictions_of
from convnext_deploy.artifact.batches import Images
from convnext_deploy.artifact.manifest import MANIFEST_NAME, Artifact, encode
from convnext_deploy.artifact.session import RunOptions, Session
from convnext_deploy.data import sources
from convnext_deploy.errors import CheckFailed, DataError, UsageError
from convnext_deploy.records.accuracy import EvalResult
from convnext_deploy.records.manifest import (
    BatchRange,
    ExportSpec,
    Manifest,
    ModelSpec,
    PrecisionTruth,
    Preprocessing,
)

ROOT = Path(__file__).parents[2]
CLASSES = 7
SIZE = (64, 64)
PREPROCESSING = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.9)


def artifact_at(path: Path, labels: tuple[str, ...] | None = None, **export: Any) -> Artifact:
    """A folder with a manifest and nothing else, which is all of an artifact that `evaluate` looks at."""
    manifest = sample_records.manifest(
        ExportSpec(format="eager", **export),
        model=ModelSpec(
            architecture="custom", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=CLASSES, image_size=SIZE
        ),
        preprocessing=PREPROCESSING,
        labels=labels,
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST_NAME).write_bytes(encode(manifest))
    return Artifact(path, manifest)


class TableSession(Session):
    """Gives logits that a function makes of the batch."""

    def __init__(self, manifest: Manifest, logits: Callable[[Images], NDArray[np.float32]]) -> None:
        super().__init__(manifest, RunOptions())
        self.logits = logits
        self.batches: list[int] = []

    def _bind(self, images: Images) -> None:
        self.images = images

    def _step(self) -> None:
        self.batches.append(len(self.images))
        self.outputs = self.logits(self.images)

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        return (self.outputs,)

    def _unshare(self) -> None: ...

    def _precision(self) -> PrecisionTruth:
        return PrecisionTruth(graph={})


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """timm's smallest ConvNeXt with random weights, its head widened so that the logits differ clearly."""
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=CLASSES)
    torch.nn.init.normal_(model.head.fc.weight, std=1.0)
    return model.eval()


def of_network(network: torch.nn.Module) -> Callable[[Images], NDArray[np.float32]]:
    def logits(images: Images) -> NDArray[np.float32]:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return logits


def of_pixels(images: Images) -> NDArray[np.float32]:
    """Logits that depend on each image alone, bit for bit, whatever the batch."""
    means = images.reshape(len(images), -1)[:, :: 64 * 3].astype(np.float32)
    return np.stack([np.sin(means[:, k] * (k + 3)) for k in range(CLASSES)], axis=1)


def encoded(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((90, 75), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


FILES = {f"c{number % CLASSES}/{number:02d}.jpg": encoded(number) for number in range(45)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), FILES)


@pytest.fixture
def source(folder: Path) -> sources.ImageSource:
    return sources.open_source(str(folder))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_at(tmp_path / "artifact")


def by_name(path: Path) -> dict[str, tuple[object, ...]]:
    found = prediction_files.read_predictions(path)
    columns = (found.labels, found.top_classes, found.top_log_probs, found.label_log_prob)
    return {name: tuple(map(str, row)) for name, *row in zip(found.names, *columns, strict=True)}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's ImageDataset leaves its files to the GC
def test_the_numbers_are_those_of_timms_validation(
    folder: Path, source: sources.ImageSource, artifact: Artifact, network: torch.nn.Module
) -> None:
    from timm.data import create_dataset, create_loader
    from timm.utils import accuracy

    loader = create_loader(
        create_dataset("", root=str(folder)),
        (3, *SIZE),
        batch_size=8,
        use_prefetcher=True,
        device=torch.device("cpu"),
        num_workers=0,
        persistent_workers=False,
        interpolation=PREPROCESSING.interpolation,
        mean=PREPROCESSING.mean,
        std=PREPROCESSING.std,
        crop_pct=PREPROCESSING.crop_pct,
    )
    top1 = top5 = count = 0
    with torch.inference_mode():
        for images, target in loader:  # as validate.py sums them up
            one, five = accuracy(network(images), target, topk=(1, 5))
            top1, top5, count = top1 + one.item() * len(target), top5 + five.item() * len(target), count + len(target)
    session = TableSession(artifact.manifest, of_network(network))
    result = evaluation.evaluate(session, source, artifact=artifact, batch=8)
    assert result.images == count == 45
    assert result.top1 == pytest.approx(top1 / count / 100, abs=1e-6)
    assert result.top5 == pytest.approx(top5 / count / 100, abs=1e-6)
    assert 0 < result.top1 < result.top5 < 1
    assert session.batches == [8, 8, 8, 8, 8, 5]
    assert (result.predictions, result.corrupt) == (None, ())
    assert result.images_per_s > 0


def test_folder_tar_and_parquet_give_the_same_predictions(tmp_path: Path, folder: Path, artifact: Artifact) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, arcname=".")
    labels = [int(name[1]) for name in FILES]
    images = [{"bytes": content, "path": name} for name, content in reversed(FILES.items())]
    pq.write_table(pa.table({"image": images, "label": labels[::-1]}), tmp_path / "set.parquet", row_group_size=10)
    found: list[Any] = []
    for place in (folder, tmp_path / "set.tar", tmp_path / "set.parquet"):
        out = tmp_path / f"result-{len(found)}"
        session = TableSession(artifact.manifest, of_pixels)
        evaluation.evaluate(session, sources.open_source(str(place)), artifact=artifact, batch=8, out=out)
        found.append(by_name(tmp_path / f"{out.name}.npz"))
    assert len(found[0]) == 45
    assert found[0] == found[1] == found[2]


def test_predictions_and_result_can_be_read_back(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact
) -> None:
    session = TableSession(artifact.manifest, of_pixels)
    result = evaluation.evaluate(session, source, artifact=artifact, batch=16, out=tmp_path / "new" / "run.fp32")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["run.fp32.json", "run.fp32.npz"]
    assert evaluation.read_result(tmp_path / "new" / "run.fp32.json") == result
    assert result.predictions == "run.fp32.npz"
    assert (result.artifact, result.artifact_sha256) == ("artifact", artifact.sha256)
    assert (result.data, result.data_sha256) == (source.name, source.sha256)
    predictions = prediction_files.read_predictions(tmp_path / "new" / result.predictions)
    assert predictions.names == source.names
    np.testing.assert_array_equal(predictions.labels, source.labels)
    assert predictions.top_classes.shape == predictions.top_log_probs.shape == (45, 5)
    assert (predictions.top_classes.dtype, predictions.top_log_probs.dtype) == (np.int32, np.float32)
    with np.load(tmp_path / "new" / "run.fp32.npz", allow_pickle=False) as columns:  # without this package
        assert json.loads(columns["names"].tobytes()) == list(source.names)
        np.testing.assert_array_equal(columns["top_classes"], predictions.top_classes)
        np.testing.assert_array_equal(columns["label_log_prob"], predictions.label_log_prob)
    right = predictions.top_classes[:, 0] == predictions.labels
    assert result.top1 == right.mean()
    assert result.top5 == (predictions.top_classes == predictions.labels[:, None]).any(axis=1).mean()
    assert sum(entry.images for entry in result.per_class) == 45
    assert [entry.name for entry in result.per_class] == [f"c{label}" for label in range(CLASSES)]
    for entry in result.per_class:
        assert entry.top1 == right[predictions.labels == entry.label].mean()


def test_classes_are_called_as_the_model_calls_them(tmp_path: Path, source: sources.ImageSource) -> None:
    artifact = artifact_at(tmp_path / "a", labels=tuple("ABCDEFG"))
    result = evaluation.evaluate(TableSession(artifact.manifest, of_pixels), source, artifact=artifact, batch=45)
    assert [entry.name for entry in result.per_class] == list("ABCDEFG")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_first_five_and_their_log_probabilities_equal_a_float64_reference(draw: st.DataObject) -> None:
    shape = (draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 9)))
    # Few values, so that ties are frequent; 1e4 overflows a naive softmax.
    values = st.one_of(st.sampled_from([-1.0, 0.0, 2.0, 1e4]), st.floats(-50, 50, width=32))
    logits = draw.draw(hnp.arrays(np.float32, shape, elements=values))
    labels = draw.draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
    found = predictions_of.of_logits(tuple(map(str, range(shape[0]))), labels, logits)
    exact = logits.astype(np.float64)
    log_probs = exact - np.logaddexp.reduce(exact, axis=1, keepdims=True)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.top_classes, order)
    np.testing.assert_array_equal(found.top_classes[:, 0], logits.argmax(axis=1))
    # One rounding to float32, and the cancellation of up to 1e4 in float64.
    tolerance: dict[str, Any] = {"rtol": 2.0**-23, "atol": 1e-11}
    np.testing.assert_allclose(found.top_log_probs, np.take_along_axis(log_probs, order, axis=1), **tolerance)
    np.testing.assert_allclose(found.label_log_prob, log_probs[np.arange(shape[0]), labels], **tolerance)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_fail_the_evaluation(
    source: sources.ImageSource, artifact: Artifact, value: float
) -> None:
    def logits(images: Images) -> NDArray[np.float32]:
        made = of_pixels(images)
        made[2, 3] = value
        return made

    with pytest.raises(CheckFailed, match=f"outputs for {source.names[2]} have NaN or infinite"):
        evaluation.evaluate(TableSession(artifact.manifest, logits), source, artifact=artifact, batch=9)


CORRUPT = {
    "c0/empty.jpg": b"",
    "c3/text.jpg": b"not an image",
    "c6/cut.jpg": encoded(1)[:900],
}


def test_corrupt_images_are_listed_and_change_no_other_prediction(
    tmp_path: Path, folder: Path, source: sources.ImageSource, artifact: Artifact
) -> None:
    mixed = sources.open_source(str(write_folder(tmp_path / "mixed", FILES | CORRUPT)))
    for name, images in (("clean", source), ("mixed", mixed)):
        session = TableSession(artifact.manifest, of_pixels)
        result = evaluation.evaluate(session, images, artifact=artifact, batch=4, out=tmp_path / f"{name}.out")
        assert result.images == 45
    assert [line.partition(":")[0] for line in result.corrupt] == sorted(CORRUPT)
    assert result.corrupt[0] == "c0/empty.jpg: the file is empty"
    assert by_name(tmp_path / "clean.out.npz") == by_name(tmp_path / "mixed.out.npz")
    assert evaluation.read_result(tmp_path / "mixed.out.json").corrupt == result.corrupt


def test_a_set_of_nothing_but_corrupt_images_is_refused(tmp_path: Path, artifact: Artifact) -> None:
    for label in range(CLASSES):
        (tmp_path / "bad" / f"c{label}").mkdir(parents=True)
    images = sources.open_source(str(write_folder(tmp_path / "bad", CORRUPT)))
    with pytest.raises(DataError, match=r"none of the 3 images of .* the first is c0/empty\.jpg: the file is empty"):
        evaluation.evaluate(
            TableSession(artifact.manifest, of_pixels), images, artifact=artifact, batch=2, out=tmp_path / "out"
        )


class Interrupted(TableSession):
    """Ctrl-C at one of its batches."""

    def __init__(self, manifest: Manifest, at: int) -> None:
        super().__init__(manifest, of_pixels)
        self.at = at

    def _step(self) -> None:
        if len(self.batches) == self.at:
            raise KeyboardInterrupt
        super()._step()


@pytest.mark.parametrize("chunk", [1, 8, 256])  # a save after each batch, after two, and at the end only
def test_an_interrupted_evaluation_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(inference, "CHUNK", chunk)
    images = sources.open_source(str(write_folder(tmp_path / "set", FILES | CORRUPT)))
    whole = evaluation.evaluate(
        TableSession(artifact.manifest, of_pixels), images, artifact=artifact, batch=4, out=tmp_path / "whole"
    )
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(
            Interrupted(artifact.manifest, 3), images, artifact=artifact, batch=4, out=tmp_path / "part"
        )
    assert not (tmp_path / "part.json").exists()
    assert (tmp_path / "part.partial").is_dir()
    with pytest.raises(KeyboardInterrupt):  # and once more
        evaluation.evaluate(
            Interrupted(artifact.manifest, 5), images, artifact=artifact, batch=4, out=tmp_path / "part"
        )
    session, calls = TableSession(artifact.manifest, of_pixels), []
    rest = evaluation.evaluate(
        session, images, artifact=artifact, batch=4, out=tmp_path / "part", progress=lambda *call: calls.append(call)
    )
    assert calls[0] == (32, 48)  # 3 + 5 batches are not run again
    assert calls[-1] == (48, 48)
    assert sum(session.batches) == 48 - 32 - sum(name > "c4" for name in CORRUPT)
    assert (tmp_path / "part.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    unlike = {"images_per_s": 0.0, "predictions": None}
    assert msgspec.structs.replace(rest, **unlike) == msgspec.structs.replace(whole, **unlike)
    assert not (tmp_path / "part.partial").exists()


def test_another_batch_may_go_on_where_one_was_interrupted(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(
            Interrupted(artifact.manifest, 2), source, artifact=artifact, batch=10, out=tmp_path / "out"
        )
    session = TableSession(artifact.manifest, of_pixels)
    evaluation.evaluate(session, source, artifact=artifact, batch=7, out=tmp_path / "out")
    assert session.batches == [7, 7, 7, 4]
    assert prediction_files.read_predictions(tmp_path / "out.npz").names == source.names


def test_what_is_missing_anywhere_in_the_middle_is_run_and_nothing_else(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "CHUNK", 1)
    session = TableSession(artifact.manifest, of_pixels)
    evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(Interrupted(artifact.manifest, 6), source, artifact=artifact, batch=4, out=tmp_path / "out")
    for start in (0, 12, 16):
        (tmp_path / "out.partial" / f"{start:09d}.npz").unlink()
    session, calls = TableSession(artifact.manifest, of_pixels), []
    evaluation.evaluate(
        session, source, artifact=artifact, batch=4, out=tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    assert session.batches == [4, 4, 4, 4, 4, 4, 4, 4, 1]
    assert calls[0] == (12, 45)
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_pieces_may_come_in_any_order(tmp_path: Path, source: sources.ImageSource, artifact: Artifact) -> None:
    session = TableSession(artifact.manifest, of_pixels)
    evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "whole")

    def backwards(work: inference.Work, ranges: Sequence[range]) -> Generator[inference.Piece, None, None]:
        yield from list(inference.here(session)(work, ranges))[::-1]

    evaluation.evaluate(backwards, source, artifact=artifact, batch=4, out=tmp_path / "out")
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def interrupt(tmp_path: Path, source: sources.ImageSource, artifact: Artifact) -> Path:
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(Interrupted(artifact.manifest, 2), source, artifact=artifact, batch=4, out=tmp_path / "out")
    return tmp_path / "out.partial"


def test_unfinished_predictions_of_something_else_are_refused(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact
) -> None:
    interrupt(tmp_path, source, artifact)
    other = artifact_at(tmp_path / "other", input="uint8")
    session = TableSession(other.manifest, of_pixels)
    with pytest.raises(UsageError, match=r"out\.partial is of another artifact; remove the folder or give another"):
        evaluation.evaluate(session, source, artifact=other, batch=4, out=tmp_path / "out")
    session = TableSession(artifact.manifest, of_pixels)
    with pytest.raises(UsageError, match=r"out\.partial is of another set of images"):
        evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "out", limit=5)
    assert session.batches == []


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: (path / "identity.json").unlink(), UsageError, "has no unfinished evaluation"),
        (lambda path: (path / "identity.json").write_text("{}"), UsageError, r"identity\.json is damaged"),
        (lambda path: (path / "000000000.npz").write_text("x"), DataError, "does not contain predictions of eval"),
        (lambda path: (path / "000000000.npz").rename(path / "9.npz"), None, ""),  # the name decides nothing
        (lambda path: copy(path / "000000000.npz", path / "1.npz"), UsageError, "has image 0 of the source twice"),
    ],
)
def test_a_damaged_folder_of_unfinished_predictions_is_refused(
    tmp_path: Path,
    source: sources.ImageSource,
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    error: type[Exception] | None,
    message: str,
) -> None:
    monkeypatch.setattr(inference, "CHUNK", 1 if error is UsageError else 256)
    damage(interrupt(tmp_path, source, artifact))
    session = TableSession(artifact.manifest, of_pixels)
    if error is None:
        evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "out")
        assert sum(session.batches) == 45 - 8
        return
    with pytest.raises(error, match=message):
        evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "out")


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_finished_result_is_not_overwritten(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact, suffix: str
) -> None:
    (tmp_path / f"out{suffix}").write_text("precious")
    with pytest.raises(UsageError, match=rf"out\{suffix} exists; choose another --out, or replace it with --force"):
        evaluation.evaluate(
            TableSession(artifact.manifest, of_pixels), source, artifact=artifact, batch=4, out=tmp_path / "out"
        )
    assert (tmp_path / f"out{suffix}").read_text() == "precious"
    assert not (tmp_path / "out.partial").exists()


def test_a_process_killed_before_the_summary_leaves_nothing_to_run_again(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = evaluation.write_file

    def killed(path: Path, content: bytes) -> None:
        if path.name == "out.json":
            raise KeyboardInterrupt
        written(path, content)

    monkeypatch.setattr(evaluation, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(
            TableSession(artifact.manifest, of_pixels), source, artifact=artifact, batch=4, out=tmp_path / "out"
        )
    monkeypatch.undo()
    session = TableSession(artifact.manifest, of_pixels)
    result = evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "out")
    assert session.batches == []
    assert (result.images, result.images_per_s) == (45, 0.0)


def test_a_fixed_batch_is_filled_up_and_cut_off_again(tmp_path: Path, source: sources.ImageSource) -> None:
    fixed = artifact_at(tmp_path / "fixed", batch=BatchRange(min=8, opt=8, max=8))
    session = TableSession(fixed.manifest, of_pixels)
    evaluation.evaluate(session, source, artifact=fixed, batch=8, out=tmp_path / "fixed.out")
    assert session.batches == [8] * 6  # 45 images
    free = artifact_at(tmp_path / "free")
    evaluation.evaluate(
        TableSession(free.manifest, of_pixels), source, artifact=free, batch=8, out=tmp_path / "free.out"
    )
    assert by_name(tmp_path / "fixed.out.npz") == by_name(tmp_path / "free.out.npz")


@pytest.mark.parametrize("batch", [0, 3, 17])
def test_a_batch_that_the_artifact_does_not_take_is_refused(
    tmp_path: Path, source: sources.ImageSource, batch: int
) -> None:
    artifact = artifact_at(tmp_path / "a", batch=BatchRange(min=4, opt=8, max=16))
    with pytest.raises(UsageError, match=f"batch {batch}; this artifact takes 4 to 16 images at once"):
        evaluation.evaluate(TableSession(artifact.manifest, of_pixels), source, artifact=artifact, batch=batch)


def test_uint8_artifacts_get_raw_pixels(tmp_path: Path, source: sources.ImageSource) -> None:
    artifact = artifact_at(tmp_path / "a", input="uint8")
    seen = []

    def logits(images: Images) -> NDArray[np.float32]:
        seen.append((images.dtype, images.shape))
        return of_pixels(images)

    evaluation.evaluate(TableSession(artifact.manifest, logits), source, artifact=artifact, batch=45)
    assert seen == [(np.uint8, (45, *SIZE, 3))]


def test_a_label_past_the_models_classes_is_refused_by_name(source: sources.ImageSource, artifact: Artifact) -> None:
    assert source.labels is not None
    labels = source.labels.copy()
    labels[[30, 40]] = [7, 199]
    wrong = replace(source, labels=labels, class_names=None, labels_from="column")
    with pytest.raises(DataError) as caught:
        evaluation.evaluate(TableSession(artifact.manifest, of_pixels), wrong, artifact=artifact, batch=4)
    assert str(caught.value) == f"{source.names[30]} of {source.name} has the label 7; expected 0..6"


def test_class_folders_get_the_numbers_of_the_models_labels(tmp_path: Path, source: sources.ImageSource) -> None:
    names = ("c1", "c0", "c2", "c6", "c4", "c5", "c3")
    artifact = artifact_at(tmp_path / "a", labels=names)
    session = TableSession(artifact.manifest, of_pixels)
    result = evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "out")
    predictions = prediction_files.read_predictions(tmp_path / "out.npz")
    assert [names[label] for label in predictions.labels] == [name[:2] for name in predictions.names]
    assert "7 classes numbered by the model's labels" in result.notes


def test_numbering_by_position_and_an_accuracy_at_chance_are_said_and_recorded(
    source: sources.ImageSource, artifact: Artifact
) -> None:
    said: list[str] = []
    session = TableSession(artifact.manifest, of_pixels)
    result = evaluation.evaluate(session, source, artifact=artifact, batch=4, say=said.append)
    assumed, chance = result.notes
    assert assumed == (
        "the model has no labels: its outputs are assumed to be the class folders sorted by name, 'c0' first"
    )
    assert chance.startswith(f"top-1 {result.top1:.2%} is not clearly above what the same answers in any order")
    assert said == [assumed, chance]


def test_force_replaces_an_earlier_result_and_nothing_else(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact
) -> None:
    def run(force: bool) -> EvalResult:
        session = TableSession(artifact.manifest, of_pixels)
        return evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "out", force=force)

    interrupt(tmp_path, source, artifact)
    first = run(force=True)
    assert msgspec.structs.replace(run(force=True), images_per_s=0.0) == msgspec.structs.replace(
        first, images_per_s=0.0
    )
    for name in ("out.json", "out.npz"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("precious")
        with pytest.raises(DataError, match="of eval"):
            run(force=True)
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).write_bytes(before)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="has no unfinished evaluation"):
        run(force=True)
    assert (tmp_path / "out.partial" / "mine.txt").exists()


def test_going_on_is_said(tmp_path: Path, source: sources.ImageSource, artifact: Artifact) -> None:
    interrupt(tmp_path, source, artifact)
    said: list[str] = []
    session = TableSession(artifact.manifest, of_pixels)
    evaluation.evaluate(session, source, artifact=artifact, batch=4, out=tmp_path / "out", say=said.append)
    assert "going on: 8 of 45 images are done" in said


def test_images_without_labels_are_refused(source: sources.ImageSource, artifact: Artifact) -> None:
    with pytest.raises(
        DataError, match="has no labels; expected class folders, a column label, a list, or --annotations"
    ):
        evaluation.evaluate(
            TableSession(artifact.manifest, of_pixels), replace(source, labels=None), artifact=artifact, batch=4
        )


@pytest.mark.parametrize("task", ["embed", "features"])
def test_only_classifiers_have_an_accuracy(artifact: Artifact, source: sources.ImageSource, task: str) -> None:
    model = msgspec.structs.replace(artifact.manifest.model, task=task)
    other = replace(artifact, manifest=msgspec.structs.replace(artifact.manifest, model=model))
    with pytest.raises(UsageError, match=f"exported for the task {task}; only classify, segment and detect have"):
        evaluation.evaluate(TableSession(other.manifest, of_pixels), source, artifact=other, batch=4)


def test_a_limit_takes_evenly_spaced_images(source: sources.ImageSource, artifact: Artifact) -> None:
    session = TableSession(artifact.manifest, of_pixels)
    result = evaluation.evaluate(session, source, artifact=artifact, batch=4, limit=15)
    assert result.images == sum(session.batches) == 15
    assert len(result.per_class) == CLASSES  # the first fifteen files are of three classes
    with pytest.raises(UsageError, match="limit 0; expected at least 1 image"):
        evaluation.evaluate(session, source, artifact=artifact, batch=4, limit=0)


def test_no_more_images_are_decoded_ahead_than_a_batch_and_a_few(
    source: sources.ImageSource, artifact: Artifact
) -> None:
    lock, started, seen = threading.Lock(), [], []

    def read_bytes(index: int) -> bytes:
        with lock:
            started.append(index)
        return source.read_bytes(index)

    def logits(images: Images) -> NDArray[np.float32]:
        seen.append(len(started))
        return of_pixels(images)

    evaluation.evaluate(
        TableSession(artifact.manifest, logits), replace(source, read_bytes=read_bytes), artifact=artifact, batch=5
    )
    ahead = 5 + env.usable_cores()
    assert all(count <= 5 * (batch + 1) + ahead for batch, count in enumerate(seen))
    assert sorted(started) == list(range(45))


def test_a_failing_session_leaves_no_thread_behind(source: sources.ImageSource, artifact: Artifact) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(Interrupted(artifact.manifest, 1), source, artifact=artifact, batch=4)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_progress_counts_images_up_to_all(source: sources.ImageSource, artifact: Artifact) -> None:
    calls: list[tuple[int, int]] = []
    evaluation.evaluate(
        TableSession(artifact.manifest, of_pixels),
        source,
        artifact=artifact,
        batch=20,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(0, 45), (20, 45), (40, 45), (45, 45)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is not a result of eval"),
        (b"\xff\xfe", "is not a result of eval"),
        (b'{"top1": 0.5}', "is not a result of eval: Object missing required field"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        evaluation.read_result(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_field_of_a_result_that_a_later_version_wrote_is_not_read_and_one_that_is_lacking_is_refused(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact
) -> None:
    result = evaluation.evaluate(
        TableSession(artifact.manifest, of_pixels), source, artifact=artifact, batch=45, out=tmp_path / "out"
    )
    fields = json.loads((tmp_path / "out.json").read_bytes())
    assert list(fields) == list(EvalResult.__struct_fields__)
    (tmp_path / "out.json").write_text(json.dumps(fields | {"top_10": 1.0}))
    assert evaluation.read_result(tmp_path / "out.json") == result
    del fields["top1"]
    (tmp_path / "out.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="missing required field `top1`"):
        evaluation.read_result(tmp_path / "out.json")


def test_what_holds_no_predictions_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x" * 100)
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "b.parquet")
    (tmp_path / "a.npz").write_bytes(b"PK" + b"x" * 100)
    np.savez(tmp_path / "b.npz", name=["a"])
    monkeypatch.setattr(prediction_files, "_MOST_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.npy", bytes(2**20 + 1))
    files = {
        **dict.fromkeys(("a.parquet", "b.parquet", "a.npz", "b.npz"), "does not contain"),
        "bomb.npz": "has 1,048,577 bytes; at most 1,048,576 are read", "c.npz": "cannot be read: No such file",
    }  # fmt: skip
    for name, message in files.items():
        with pytest.raises(DataError, match=message) as caught:
            prediction_files.read_predictions(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_an_out_that_cannot_be_written_is_refused(
    tmp_path: Path, source: sources.ImageSource, artifact: Artifact
) -> None:
    (tmp_path / "file").write_text("")
    session = TableSession(artifact.manifest, of_pixels)
    for out, message in ((tmp_path / "file" / "out", "cannot be used: "), (Path("/"), "names no file")):
        with pytest.raises(UsageError, match=message):
            evaluation.evaluate(session, source, artifact=artifact, batch=4, out=out)
    assert session.batches == []


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "timm", "torchvision", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Absent())
from convnext_deploy import cli
sys.exit(cli.run(sys.argv[1:]))
"""


def test_an_onnx_artifact_is_evaluated_without_torch_and_what_needs_more_says_so_in_a_line(
    tmp_path: Path, folder: Path, artifact_of: Callable[..., Artifact]
) -> None:
    onnx, eager = artifact_of("onnx"), artifact_of("eager")
    for label in (7, 8, 9):  # ten classes
        (tmp_path / "set" / f"c{label}").mkdir(parents=True)
    write_folder(tmp_path / "set", FILES)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT, "eval", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    done = run(onnx.path, "--data", tmp_path / "set", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 45
    (tmp_path / "a.parquet").write_bytes(b"x")
    for arguments, package in (
        ((onnx.path, "--data", tmp_path / "a.parquet"), "pyarrow"),
        ((eager.path, "--data", tmp_path / "set"), "torch"),
    ):
        done = run(*arguments, "--quiet")
        assert done.returncode == 2
        line = done.stderr.replace("\nhint: ", "; ")
        assert line.endswith(f"{env.missing_line(package)}\n")
        assert line.count("\n") == 1


def test_the_path_of_the_predictions_is_printed_and_going_on_is_offered_on_an_interrupt(
    tmp_path: Path,
    folder: Path,
    artifact_of: Callable[..., Artifact],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for label in (7, 8, 9):
        (tmp_path / "set" / f"c{label}").mkdir(parents=True)
    write_folder(tmp_path / "set", FILES)
    command = ["eval", str(artifact_of("onnx").path), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "a.b")]
    with monkeypatch.context() as patched:
        patched.setattr(inference, "_outputs", interrupted)
        assert cli.run(command) == 130
    assert "the same command goes on where this one stopped" in capsys.readouterr().err
    assert cli.run(command) == 0
    assert f"predictions in {tmp_path / 'a.b.npz'}\n" in capsys.readouterr().out
    assert cli.run(command) == 2
    assert "or replace it with --force" in capsys.readouterr().err
    assert cli.run([*command, "--force"]) == 0


def interrupted(session: Session, pixels: object) -> None:
    raise KeyboardInterrupt
