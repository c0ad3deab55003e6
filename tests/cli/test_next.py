"""What a command says to type next works as it stands."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from PIL import Image

from convnext_deploy import api, cli
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli import hints, serve

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of ten classes; its name has to be quoted."""
    root = tmp_path / "my photos"
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = root / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def test_each_step_names_the_next_ones_and_these_run_as_they_are(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"IMAGE": str(photos / "class0" / "0.png"), "IMAGES": str(photos), "CANDIDATE": "my model"}

    def then(*words: str) -> list[list[str]]:
        """The commands that come next, by their words."""
        assert cli.run([*words, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        return [[places.get(word, word) for word in shlex.split(line, comments=True)[1:]] for line in document["next"]]

    size = ["--image-size", "64", "--batch", "2"]
    predict, evaluate = then("export", "--weights", str(checkpoint), "--format", "eager", *size, "--out", "my model")
    assert (predict[0], evaluate[0]) == ("predict", "eval")
    assert cli.run([*predict, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 1
    for one in api.predict("my model", photos).predictions:  # its own answers, so that it is better than chance
        folder = photos / f"class{one.classes[0].number}"
        (photos / one.image).rename(folder / Path(one.image).name)
    (gate,) = then(*evaluate)
    assert gate[:3] == ["gate", "--baseline", "my model-eval.json"]
    serve, in_ci = then(*gate, "--max-drop", "60")
    assert serve == ["serve", "my model"]
    assert cli.run([*in_ci, "--quiet"]) == 0
    assert (tmp_path / "gate.xml").is_file()


@pytest.mark.slow
def test_a_bench_names_the_page_of_its_results_and_the_same_run_held_against_them(
    artifact_of: Callable[..., Artifact], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", str(artifact_of("eager").path), "--batch", "2", "--seconds", "0.05"]
    assert cli.run([*words, "--json"]) == 0
    (bench,) = json.loads(capsys.readouterr().out)["next"]
    assert cli.run([*shlex.split(bench)[1:], "--json"]) == 0
    report, again = json.loads(capsys.readouterr().out)["next"]
    assert cli.run([*shlex.split(report)[1:], "--quiet"]) == 0
    assert (tmp_path / "bench.html").is_file()
    assert shlex.split(again)[1:] == [*words, "--against", "bench.jsonl"]


@pytest.mark.parametrize("saving", [["--save", "r.jsonl"], ["--save=r.jsonl"]])
def test_a_run_is_held_against_its_results_and_does_not_overwrite_them(saving: list[str]) -> None:
    _, again = hints.after_bench(["m", *saving, "--batch", "1"], Path("r.jsonl"))
    assert again == "convnext-deploy bench m --batch 1 --against r.jsonl"


def test_a_model_without_classes_gives_a_file_and_is_not_evaluated(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = str(tmp_path / "m")
    words = ["export", "--weights", str(checkpoint), "--format", "eager", "--image-size", "64", "--task", "embed"]
    words += ["--batch", "2"]  # `bench` takes 1 and 8 otherwise
    assert cli.run([*words, "--out", out]) == 0
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines[0] == f"next: convnext-deploy predict {out} IMAGE --out {out}.npz"
    assert lines[1] == f"      convnext-deploy bench {out} --batch 2"
    named = [str(photos / "class0" / "0.png") if w == "IMAGE" else w for w in shlex.split(lines[0])[2:]]
    assert cli.run([*named, "--quiet"]) == 0
    assert Path(f"{out}.npz").is_file()


def test_the_images_that_an_export_was_checked_on_are_those_to_evaluate_on(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: Captured
) -> None:
    words = ["export", "--weights", str(checkpoint), "--format", "eager", "--image-size", "64", "--mean", "0.5",
             "--std", "0.5", "--crop-pct", "1", "--data", str(photos), "--class-order", "timm"]  # fmt: skip
    assert cli.run([*words, "--out", str(tmp_path / "m"), "--json"]) == 0
    evaluate = shlex.split(json.loads(capsys.readouterr().out)["next"][1])
    assert evaluate[3:7] == ["--data", str(photos), "--class-order", "timm"]


def test_results_are_alone_on_stdout(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ["export", "--weights", str(checkpoint), "--format", "eager", "--image-size", "64"]
    assert cli.run([*words, "--out", str(tmp_path / "m")]) == 0
    captured = capsys.readouterr()
    assert "next:" in captured.err
    assert "next:" not in captured.out


def test_a_server_names_the_request_that_tries_it() -> None:
    line = hints.request("http://127.0.0.1:8000", token=True)
    assert line == "curl -H 'Authorization: Bearer TOKEN' --data-binary @IMAGE http://127.0.0.1:8000/classify"


@pytest.mark.parametrize(("task", "name"), [("classify", None), ("detect", "mine"), ("features", "mine")])
def test_a_server_is_not_asked_for_classes_that_its_model_has_not(
    task: Any, name: str | None, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    found = artifact_of("eager").manifest
    other = msgspec.structs.replace(found, model=msgspec.structs.replace(found.model, task=task))
    (tmp_path / "manifest.json").write_bytes(manifest.encode(other))
    assert serve._tensors([f"mine={tmp_path}"]) == name
    assert hints.request("http://a:1", token=False, tensors="mine") == "curl http://a:1/v2/models/mine"


def test_a_graph_of_somebody_else_is_looked_at_and_not_asked_for_classes(artifact_of: Callable[..., Artifact]) -> None:
    found = artifact_of("eager").manifest
    spliced = msgspec.structs.replace(found, splice=cast(Any, object()))
    assert hints.after_export(Path("b/detector"), spliced, ()) == ("convnext-deploy inspect b/detector",)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_masks_and_boxes_are_named_beside_the_images(task: Any, artifact_of: Callable[..., Artifact]) -> None:
    found = artifact_of("eager").manifest
    other = msgspec.structs.replace(found, model=msgspec.structs.replace(found.model, task=task))
    assert hints.after_export(Path("b"), other, ())[1] == (
        "convnext-deploy eval b --data IMAGES --annotations ANNOTATIONS --out b-eval"
    )
