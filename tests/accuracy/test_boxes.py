"""A detector's mean average precision is pycocotools', and a gate on it keeps its promises."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from detectors import drawn

from convnext_deploy.accuracy import boxes, gate_scores, outputs
from convnext_deploy.accuracy.boxes import Detections, InstanceMasks
from convnext_deploy.accuracy.prediction_files import decode, encode
from convnext_deploy.accuracy.predictions import Chunk, joined
from convnext_deploy.artifact.instance_masks import run_lengths
from convnext_deploy.cli import words
from convnext_deploy.data import boxes as coco_files
from convnext_deploy.data import sources
from convnext_deploy.errors import DataError
from convnext_deploy.records.accuracy import Limits, OutputScore, ScoreResult

coder = pytest.importorskip("pycocotools.mask")
SIDE = 100.0


def of_images(seed: int, images: int, classes: int = 3, noise: float = 3.0, missed: float = 0.2) -> Detections:
    """Objects, most of them found nearly in their places, and detections of nothing."""
    generator = np.random.default_rng(seed)
    predicted, predicted_counts, truth, truth_counts = [], [], [], []
    for _ in range(images):
        count = int(generator.integers(0, 5))
        corner, sides = generator.uniform(0, 60, (count, 2)), generator.uniform(10, 40, (count, 2))
        numbers = generator.integers(1, classes + 1, count)
        crowd = (generator.uniform(size=count) < 0.05).astype(float)
        truth += np.column_stack([corner, corner + sides, numbers, sides.prod(axis=1), crowd]).tolist()
        truth_counts.append(count)
        seen = np.flatnonzero(generator.uniform(size=count) > missed)
        own = np.column_stack(
            [
                np.concatenate([corner, corner + sides], 1)[seen] + generator.normal(0, noise, (len(seen), 4)),
                generator.uniform(0.3, 1, len(seen)),
                numbers[seen],
            ]
        )
        false = int(generator.integers(0, 3))
        place = generator.uniform(0, 60, (false, 2))
        extra = np.column_stack(
            [place, place + 20, generator.uniform(0.05, 0.7, false), generator.integers(1, classes + 1, false)]
        )
        predicted += [*own.tolist(), *extra.tolist()]
        predicted_counts.append(len(own) + false)
    return Detections(
        tuple(f"{number}.png" for number in range(images)),
        np.array(predicted, np.float32).reshape(-1, 6),
        np.array(predicted_counts, np.int64),
        np.array(truth, np.float64).reshape(-1, 7),
        np.array(truth_counts, np.int64),
    )


def pycocotools_of(found: Detections, folder: Path) -> Any:
    """As its users call it: a file of instances and a list of results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects, results = [], []
    images = np.repeat(np.arange(len(found.names)), found.truth_counts)
    for number, (image, row) in enumerate(zip(images.tolist(), found.truth.tolist(), strict=True), 1):
        box = [row[0], row[1], row[2] - row[0], row[3] - row[1]]
        one = {"id": number, "image_id": image, "category_id": int(row[4]), "bbox": box}
        objects.append({**one, "area": row[5], "iscrowd": int(row[6])})
    images = np.repeat(np.arange(len(found.names)), found.predicted_counts)
    for image, row in zip(images.tolist(), found.predicted.astype(np.float64).tolist(), strict=True):
        box = [row[0], row[1], row[2] - row[0], row[3] - row[1]]
        results.append({"image_id": image, "category_id": int(row[5]), "bbox": box, "score": row[4]})
    document = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(found.names)],
        "annotations": objects,
        "categories": [{"id": number, "name": str(number)} for number in range(1, 4)],
    }
    (folder / "instances.json").write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "instances.json"))
        judge = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_pycocotools(seed: int, tmp_path: Path) -> None:
    found = of_images(seed, 40)
    judged = boxes.judged(found)
    theirs = pycocotools_of(found, tmp_path)
    assert judged.average_precision == pytest.approx(theirs.stats[0], abs=1e-12)
    assert judged.at_50 == pytest.approx(theirs.stats[1], abs=1e-12)
    by_class = theirs.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    assert judged.per_class[1:] == pytest.approx(by_class.tolist(), abs=1e-12)


def test_masks_are_judged_as_pycocotools_judges_them(tmp_path: Path) -> None:
    """Objects of the left half of their boxes: a mask that fills its box overlaps one by a half."""
    found = of_images(3, 20)
    sides = np.full((20, 2), SIDE, np.int64)

    def encoded(rows: Any, share: float) -> tuple[bytes, ...]:
        masks = []
        for left, top, right, bottom in np.clip(rows[:, :4], 0, SIDE).tolist():
            whole = np.zeros((int(SIDE), int(SIDE)), np.uint8, order="F")
            whole[round(top) : round(bottom), round(left) : round(left + share * (right - left))] = 1
            masks.append(bytes(coder.encode(whole)["counts"]))
        return tuple(masks)

    right = replace(found, masks=InstanceMasks(encoded(found.predicted, 0.5), encoded(found.truth, 0.5), sides))
    wrong = replace(found, masks=InstanceMasks(encoded(found.predicted, 1.0), encoded(found.truth, 0.5), sides))
    of_boxes = boxes.judged(found).average_precision
    assert 0.5 * of_boxes < boxes.judged(right, "segm").average_precision < 1.2 * of_boxes
    assert boxes.judged(wrong, "segm").average_precision < 0.2 * of_boxes
    scores = outputs.scored(right, "detection")
    assert scores.score == of_boxes
    assert scores.of_masks is not None
    (tmp_path / "kept.npz").write_bytes(encode(Chunk(0, 20, right, ())))
    again = decode(tmp_path / "kept.npz").predictions
    assert isinstance(again, Detections)
    assert again.masks is not None
    assert right.masks is not None
    assert (again.masks.predicted, again.masks.truth) == (right.masks.predicted, right.masks.truth)
    both = joined([Chunk(0, 20, right, ()), Chunk(20, 40, right, ())]).predictions
    assert isinstance(both, Detections)
    assert both.masks is not None
    assert len(both.masks.predicted) == 2 * len(found.predicted)


@pytest.mark.parametrize("wrong", [b"0", b"d", b"\x81d0", b"d0" * 20, b"0d0" + b"o" * 9, b""])
def test_a_kept_mask_that_pycocotools_would_not_check_is_refused(wrong: bytes, tmp_path: Path) -> None:
    """Of an image of 4x5 pixels: its readers go on behind a mask whose lengths are of fewer or more."""
    rows, one = np.array([[0, 0, 4, 4, 0.5, 1]], np.float32), np.ones(1, np.int64)
    truth = np.array([[0, 0, 4, 4, 1, 16, 0]], np.float64)
    for coded in (b"d0", b"0d0", wrong):
        kept = InstanceMasks((coded,), (b"d0",), np.array([[4, 5]], np.int64))
        found = Detections(("a.png",), rows, one, truth, one, kept)
        (tmp_path / "kept.npz").write_bytes(encode(Chunk(0, 1, found, ())))
        with pytest.raises(DataError, match="run lengths") if coded == wrong else contextlib.nullcontext():
            decode(tmp_path / "kept.npz")


def test_run_lengths_are_read_as_pycocotools_wrote_them() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        side = int(generator.integers(1, 300))
        whole = np.kron(generator.random((side, 7)) < 0.5, np.ones((40, 3), bool)) ^ (generator.random() < 0.5)
        coded = coder.encode(np.asfortranarray(whole.astype(np.uint8)))["counts"]
        assert coco_files.lengths_of(coded, whole.shape).tolist() == run_lengths(whole)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 2, 3]], "less than three points"),
        ([[0, 0, 3e8, 0, 3e8, 3e8]], r"the point \(3e\+08, 0\) is far outside of an image of 60x90 pixels"),
        ([[0, 0, 9, 9, 0, -241]], "far outside"),
        ([[0, 0, 9, 9, 0, "nan"]], "far outside"),
        ([[0, 0, 360, 0] * 30_000], "outline is 21,600,000 pixels long"),
        ("PPY", "no polygons and no run lengths"),
        ({"size": [60, 90], "counts": [5]}, "do not make up the image"),
        ({"size": [60, 90], "counts": [2**70]}, "no run lengths"),
        ({"size": [6, 9], "counts": [54]}, "run lengths of"),
        ({"size": [60, 90], "counts": "\u00ff"}, "in another code"),
        ({"size": [60, 90], "counts": "o" * 99}, "in another code"),
    ],
)
def test_a_mask_that_pycocotools_would_not_check_is_refused(segmentation: Any, reason: str, tmp_path: Path) -> None:
    images, file = drawn(tmp_path, 1)
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = segmentation
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=reason):
        coco_files.boxed(sources.open_source(str(images)), file, None, 4, masks=True)


def test_one_object_without_a_segmentation_turns_masks_off_and_is_said(tmp_path: Path) -> None:
    images, file = drawn(tmp_path, 2)
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = []
    file.write_text(json.dumps(content))
    found = coco_files.boxed(sources.open_source(str(images)), file, None, 4, masks=True)
    assert found.boxes is not None
    assert found.boxes.masks is None
    objects = len(content["annotations"])
    line = f"masks are not judged: 1 of {objects} objects of {file.name} without a segmentation"
    assert line in found.notes
    assert line not in coco_files.boxed(sources.open_source(str(images)), file, None, 4).notes


def test_the_score_of_masks_is_said_beside_that_of_boxes() -> None:
    found = of_images(3, 20)
    sides = np.full((20, 2), SIDE, np.int64)
    square = np.ones((int(SIDE), int(SIDE)), np.uint8, order="F")
    mask = bytes(coder.encode(square)["counts"])
    masks = InstanceMasks((mask,) * len(found.predicted), (mask,) * len(found.truth), sides)
    found = replace(found, masks=masks)
    scores = outputs.scored(found, "detection")
    assert scores.of_masks is not None
    assert scores.of_masks.at_50 is not None
    per = tuple(OutputScore(output=n, name=str(n), positives=1, score=one) for n, one in enumerate(scores.per_output))
    result = ScoreResult(
        problem="detection", artifact="a", artifact_sha256="0" * 64, data="d", data_sha256="1" * 64,
        images=20, corrupt=(), score=scores.score, per_output=per, exact=None, mean_absolute_error=None,
        root_mean_square_error=None, average_precision_50=scores.at_50,
        mask_average_precision=scores.of_masks.score, mask_average_precision_50=scores.of_masks.at_50,
        images_per_s=1.0, predictions="a.npz",
    )  # fmt: skip
    said = f"mAP of masks {scores.of_masks.score:.2%}  AP50 of masks {scores.of_masks.at_50:.2%}  on 20 images"
    assert said in words.score_lines(result)[0]
    side = gate_scores.ScoredSide(result=result, outputs=found)
    verdict = gate_scores.judge_scores(side, side, Limits(max_drop=1.0))
    of_masks = f"; mAP of masks {scores.of_masks.score:.2%} before, {scores.of_masks.score:.2%} after"
    assert words.counts(verdict).endswith(of_masks)
    # Masks that are worse are a drop of their own, beside boxes that are the same.
    smaller = square.copy(order="F")
    smaller[: int(SIDE) // 3] = 0
    worse = replace(masks, predicted=(bytes(coder.encode(smaller)["counts"]),) * len(found.predicted))
    other = gate_scores.ScoredSide(result=result, outputs=replace(found, masks=worse))
    verdict = gate_scores.judge_scores(side, other, Limits(max_drop=1.0))
    after = outputs.scored(other.outputs, "detection").of_masks
    assert after is not None
    drop = outputs.drop_between(scores.of_masks, after, 0.05)
    assert drop.value > 0.1
    assert [(one.name, one.limit, one.value) for one in verdict.checks] == [
        ("map_drop", 0.01, 0.0), ("mask_map_drop", 0.01, drop.value)
    ]  # fmt: skip
    assert (verdict.checks[1].lower, verdict.checks[1].upper) == (drop.lower, drop.upper)
    assert (verdict.baseline_mask_score, verdict.candidate_mask_score) == (scores.of_masks.score, after.score)
    # And what was judged by boxes alone is no baseline of what has masks.
    alone = gate_scores.ScoredSide(
        result=msgspec.structs.replace(result, artifact="of boxes"), outputs=replace(found, masks=None)
    )
    for pair in ((alone, side), (side, alone)):
        with pytest.raises(DataError, match="of boxes was evaluated without masks and the other with masks"):
            gate_scores.judge_scores(*pair, Limits(max_drop=1.0))


def test_the_three_forms_of_a_mask_are_one(tmp_path: Path) -> None:
    images, file = drawn(tmp_path, 1)
    content = json.loads(file.read_text())
    del content["annotations"][1:]
    made = []
    for form in ("polygons", "lengths", "text"):
        if form != "polygons":
            x, y, w, h = content["annotations"][0]["bbox"]
            whole = np.zeros((60, 90), np.uint8, order="F")
            whole[y : y + h, x : x + w] = 1
            text = coder.encode(whole)["counts"].decode()
            lengths = run_lengths(whole.astype(bool))
            told = {"size": [60, 90], "counts": text if form == "text" else lengths}
            content["annotations"][0]["segmentation"] = told
        file.write_text(json.dumps(content))
        objects = coco_files.boxed(sources.open_source(str(images)), file, None, 4, masks=True).boxes
        assert objects is not None
        assert objects.masks is not None
        made.append(objects.masks[0][0])
    assert made[0] == made[1] == made[2]


def repeated(found: Detections, image: int, times: int) -> Detections:
    """With one image so many times more."""
    starts = [np.concatenate([[0], np.cumsum(counts)]) for counts in (found.predicted_counts, found.truth_counts)]
    of_given, of_wanted = (slice(start[image], start[image + 1]) for start in starts)
    predicted, truth = found.predicted[of_given], found.truth[of_wanted]
    return Detections(
        found.names + tuple(f"again {number}" for number in range(times)),
        np.concatenate([found.predicted, *[predicted] * times]),
        np.concatenate([found.predicted_counts, [len(predicted)] * times]),
        np.concatenate([found.truth, *[truth] * times]),
        np.concatenate([found.truth_counts, [len(truth)] * times]),
    )


def test_each_image_moves_the_score_as_its_derivative_says() -> None:
    """Of many images, one more of the same kind moves the score by its derivative."""
    found = of_images(5, 150)
    judged = boxes.judged(found)
    assert abs(judged.moves.sum()) < 1e-9  # more of all images changes nothing
    assert judged.shares.sum() == pytest.approx(1)
    chosen = [*np.argsort(judged.moves)[:4].tolist(), *np.argsort(-judged.moves)[:4].tolist()]
    seen = [boxes.judged(repeated(found, image, 1)).average_precision - judged.average_precision for image in chosen]
    assert np.corrcoef(seen, judged.moves[chosen])[0, 1] > 0.98
    assert np.abs(np.array(seen) / judged.moves[chosen] - 1).max() < 0.5


def test_a_detector_that_finds_nothing_scores_nothing() -> None:
    found = of_images(1, 10)
    nothing = replace(found, predicted=found.predicted[:0], predicted_counts=np.zeros(10, np.int64))
    judged = boxes.judged(nothing)
    assert judged.average_precision == judged.at_50 == 0
    assert not outputs.is_above_chance(nothing, outputs.scored(nothing, "detection"), "detection")
    with pytest.raises(DataError, match="not one image has an object"):
        boxes.judged(replace(found, truth=found.truth[:0], truth_counts=np.zeros(10, np.int64)))


@pytest.mark.slow
def test_a_drop_at_the_limit_passes_and_fails_with_the_chance_of_alpha_at_most() -> None:
    """Baseline and candidate see the same objects; the candidate misses some more. The true drop is of many images."""
    alpha, trials, images = 0.05, 200, 120

    def pair(seed: int, count: int) -> tuple[outputs.Scored, outputs.Scored]:
        one = of_images(seed, count, noise=2.0, missed=0.1)
        generator = np.random.default_rng(seed + 10**6)
        kept = generator.uniform(size=len(one.predicted)) > 0.06
        image = np.repeat(np.arange(count), one.predicted_counts)[kept]
        other = replace(one, predicted=one.predicted[kept], predicted_counts=np.bincount(image, minlength=count))
        return outputs.scored(one, "detection"), outputs.scored(other, "detection")

    large = [pair(7_000 + number, 1500) for number in range(3)]
    limit = float(np.mean([before.score - after.score for before, after in large]))
    passed = failed = 0
    for trial in range(trials):
        drop = outputs.drop_between(*pair(trial, images), alpha)
        passed += drop.upper <= limit
        failed += drop.lower > limit
    room = 2.6 * np.sqrt(alpha * (1 - alpha) / trials)
    assert passed / trials <= alpha + room
    assert failed / trials <= alpha + room


def test_detections_are_kept_as_they_are(tmp_path: Path) -> None:
    one, other = of_images(0, 4), of_images(1, 3)
    chunk = joined([Chunk(0, 4, one, ()), Chunk(4, 7, other, ("x.png: broken",))])
    (tmp_path / "kept.npz").write_bytes(encode(chunk))
    again = decode(tmp_path / "kept.npz")
    assert isinstance(again.predictions, Detections)
    assert again.predictions.names == one.names + other.names
    assert np.array_equal(again.predictions.predicted, np.concatenate([one.predicted, other.predicted]))
    assert again.corrupt == ("x.png: broken",)
    broken = replace(one, predicted_counts=one.predicted_counts + 1)
    (tmp_path / "broken.npz").write_bytes(encode(Chunk(0, 4, broken, ())))
    with pytest.raises(DataError, match="boxes are of other images"):
        decode(tmp_path / "broken.npz")


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("truth", 6, 1e30, "neither a crowd nor none"),  # pycocotools keeps it in a byte
        ("truth", 6, -1, "neither a crowd nor none"),
        ("truth", 6, 0.5, "neither a crowd nor none"),
        ("truth", 4, 0.5, "a class is no whole number"),  # and would be counted as another
        ("predicted", 5, 1.5, "a class is no whole number"),
        ("truth", 4, -1, "a class is negative or too large"),
        ("predicted", 5, 2**24, "a class is negative or too large"),
        ("truth", 2, np.inf, "a value is not finite"),
    ],
)
def test_boxes_that_no_evaluation_writes_are_refused(
    table: str, column: int, value: float, message: str, tmp_path: Path
) -> None:
    rows = getattr(of_images(0, 4), table).copy()
    rows[1, column] = value
    (tmp_path / "a.npz").write_bytes(encode(Chunk(0, 4, replace(of_images(0, 4), **{table: rows}), ())))
    with pytest.raises(DataError, match=message):
        decode(tmp_path / "a.npz")


Change = Callable[[dict[str, Any]], object]


def changed(folder: Path, change: Change, mark: bytes = b"") -> Callable[..., Any]:
    """Three drawn images, and a file of them that somebody else would have written in another way."""
    images, file = drawn(folder, 3)
    content = json.loads(file.read_text())
    change(content)
    file.write_bytes(mark + json.dumps(content).encode())
    return lambda **options: coco_files.boxed(sources.open_source(str(images)), file, None, 4, **options)


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        pytest.param(lambda c: [one.update(iscrowd=False) for one in c["annotations"]], b"", id="iscrowd false"),
        pytest.param(lambda c: [one.update(iscrowd=None) for one in c["annotations"]], b"", id="iscrowd null"),
        pytest.param(lambda c: [one.update(height=float(one["height"])) for one in c["images"]], b"", id="60.0 pixels"),
        pytest.param(
            lambda c: [one.update(file_name=f"./{one['file_name']}") for one in c["images"]], b"", id="./ before names"
        ),
        pytest.param(lambda c: None, b"\xef\xbb\xbf", id="a byte-order mark"),
    ],
)
def test_other_ways_to_write_a_coco_file_say_the_same(change: Change, mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = changed(tmp_path / "a", lambda content: None)(masks=True)
    found = changed(tmp_path / "b", change, mark)(masks=True)
    assert [one.tolist() for one in found.boxes.objects] == [one.tolist() for one in expected.boxes.objects]
    assert found.boxes.masks == expected.boxes.masks


def test_names_in_folders_are_found_as_windows_writes_them(tmp_path: Path) -> None:
    images, file = drawn(tmp_path, 3)
    content = json.loads(file.read_text())
    for one in content["images"]:
        one["file_name"] = f"{images.name}\\{one['file_name']}"
    file.write_text(json.dumps(content))
    (tmp_path / "root").mkdir()
    images.rename(tmp_path / "root" / images.name)
    found = coco_files.boxed(sources.open_source(str(tmp_path / "root")), file, None, 4)
    assert len(found) == 3


def test_sides_that_nobody_wrote_are_needed_for_masks_alone(tmp_path: Path) -> None:
    read = changed(tmp_path, lambda content: [one.update(height=None) for one in content["images"]])
    assert read().boxes.masks is None
    with pytest.raises(DataError, match=r"is 0x\d+ pixels; expected its height and width"):
        read(masks=True)


@pytest.mark.parametrize("masks", [False, True])
def test_objects_of_images_that_are_not_listed_are_said(masks: bool, tmp_path: Path) -> None:
    read = changed(tmp_path, lambda content: content["annotations"][0].update(image_id=77))
    assert any("left out: 1 object of images that " in note for note in read(masks=masks).notes)


@pytest.mark.parametrize("masks", [False, True])
def test_objects_of_no_image_that_is_listed_are_refused(masks: bool, tmp_path: Path) -> None:
    """Numbers in texts, which nothing compares equal: the score would be one of images without objects."""
    read = changed(tmp_path, lambda c: [one.update(image_id=str(one["image_id"])) for one in c["annotations"]])
    with pytest.raises(DataError, match=r"none of its \d+ objects is of an image that it lists, such as '\d'"):
        read(masks=masks)


def test_two_categories_of_one_id_are_refused(tmp_path: Path) -> None:
    read = changed(tmp_path, lambda c: c["categories"].append({"id": c["categories"][0]["id"], "name": "another"}))
    with pytest.raises(DataError, match="to 2 categories, whose objects cannot be told apart"):
        read()


def test_categories_are_found_by_name_or_by_their_ids(tmp_path: Path) -> None:
    images, file = drawn(tmp_path, 5)
    source = sources.open_source(str(images))
    by_id = coco_files.boxed(source, file, None, 4)
    assert by_id.boxes is not None
    assert any("ids are taken for the numbers" in note for note in by_id.notes)
    by_name = coco_files.boxed(source, file, {"nothing": 0, "blue": 1, "red": 2}, 3)
    assert by_name.boxes is not None
    for one, other in zip(by_id.boxes.objects, by_name.boxes.objects, strict=True):
        assert np.array_equal(one[:, 4], 3 - other[:, 4])
        assert np.array_equal(one[:, :4], other[:, :4])
    assert by_id.sha256 != by_name.sha256
    assert sources.subset(by_id, 2).boxes is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"categories": [{"id": 1, "name": "red"}, {"id": 9, "name": "blue"}]}, "a category with the id 9"),
        ({"annotations": [{"image_id": 0, "category_id": 7, "bbox": [0, 0, 1, 1]}]}, "category 7, which"),
        ({"annotations": [{"image_id": 0, "category_id": 1, "bbox": [0, 0, -1, 1]}]}, "expected x, y, width, height"),
        ({"annotations": 5}, "is no COCO file"),
        ({"images": [{"id": 1, "file_name": "other.png"}]}, "names none of the 3 images"),
        ({"images": [{"id": 1, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}]}, "the id 1 to two images"),
    ],
)
def test_a_file_that_is_no_coco_file_of_these_images_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    images, file = drawn(tmp_path, 3)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=reason) as raised:
        coco_files.boxed(sources.open_source(str(images)), file, None, 4)
    assert "\n" not in str(raised.value)
