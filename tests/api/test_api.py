"""`export` and `load` when something is wrong: what is refused, when, in which words, and what is left behind."""

import dataclasses
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import jsonschema
import msgspec
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from convnext_deploy import api
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import ArtifactError, DataError, InputError, ParityError, UsageError, WeightsError
from convnext_deploy.formats import eager
from convnext_deploy.models import checkpoint as weights
from convnext_deploy.records.accuracy import EvalResult
from convnext_deploy.records.manifest import BatchRange
from convnext_deploy.workflows import export

ArtifactOf = Callable[..., Artifact]


pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a checkpoint is the first work; refusals that come before it cost nothing."""

    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a checkpoint was read")

    monkeypatch.setattr(weights, "load", load)


def exported(source: Any, out: Path, **options: Any) -> Artifact:
    return api.export(source, out=out, **({"format": "eager", "image_size": (64, 64)} | options))


def random_export(out: Path, **options: Any) -> Artifact:
    return exported("random", out, **({"variant": "test_convnext", "num_classes": 10} | options))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An artifact that is there already, with 7 classes."""
    return random_export(tmp_path / "model", num_classes=7).path


def classes(path: Path) -> int:
    return manifest.verified(path).manifest.model.num_classes


# Before the work -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onxx"}, "unknown format 'onxx'; did you mean onnx?"),
        ({"format": "onnx", "precision": "bf16"}, "format onnx has no bf16; it has fp16, fp32"),
        ({"precision": "int4"}, "precision int4; expected one of fp32, tf32, fp16, bf16"),
        ({"format": "openvino", "device": "cuda"}, "format openvino runs on cpu, not on cuda"),
        ({"device": "tpu"}, "device tpu; expected one of cpu, cuda"),
        (
            {"batch": BatchRange(min=4, opt=2, max=8)},
            "batch 4:2:8; expected N or MIN:OPT:MAX with 1 <= MIN",
        ),
        ({"batch": BatchRange(min=1, opt=9, max=8)}, "batch 1:9:8"),
        ({"batch": BatchRange(min=0, opt=1, max=8)}, "batch 0:1:8"),
        ({"image_size": (0, 64)}, "image_size (0, 64); expected pixels"),
        ({"image_size": (-32, 64)}, "image_size (-32, 64); expected pixels"),
        ({"num_classes": -3}, "num_classes -3; expected at least 0"),
        ({"in_chans": 0}, "in_chans 0; expected at least 1"),
        ({"task": "embed", "num_classes": -1}, "num_classes -1; expected at least 0"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_any_work(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        random_export(tmp_path / "deep" / "model", **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an NVIDIA GPU")
@pytest.mark.usefixtures("no_work")
def test_cuda_without_a_gpu_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu"):
        random_export(tmp_path / "model", device="cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
def test_a_missing_package_is_refused_before_any_work(tmp_path: Path, replaced_format: Callable[..., None]) -> None:
    replaced_format("openvino", requires=("no_such_package_anywhere",))
    line = "format openvino: no_such_package_anywhere is not installed; run: pip install convnext-deploy"
    with pytest.raises(UsageError) as caught:
        random_export(tmp_path / "model", format="openvino")
    assert str(caught.value) == line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (31, 100)}, "image size 31x100 pixels; expected at least 32x32"),
        ({"num_classes": 0}, "0 classes; expected at least 1"),
    ],
)
def test_a_model_that_cannot_exist_is_refused_and_leaves_nothing(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError) as caught:
        random_export(tmp_path / "model", **options)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_no_classes_are_fine_for_embeddings(tmp_path: Path) -> None:
    artifact = random_export(tmp_path / "model", task="embed", num_classes=0)
    assert api.load(artifact.path).run(np.zeros((1, 3, 64, 64), np.float32))[0].shape == (1, 64)


@pytest.mark.usefixtures("no_work")
def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="model exists; choose another --out or give --force"):
        random_export(tmp_path / "model")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_files_is_never_replaced(force: bool, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        random_export(tmp_path, force=force)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_is_read_only_is_refused_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="is not writable; choose another --out"):
            random_export(tmp_path / "deep" / "model")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.usefixtures("no_work")
def test_a_parent_that_the_system_calls_unwritable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, to whom no folder is read-only."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with pytest.raises(UsageError) as caught:
        random_export(tmp_path / "deep" / "model")
    assert str(caught.value) == f"{tmp_path} is not writable; choose another --out"


@pytest.mark.usefixtures("no_work")
def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is not writable"):
        random_export(tmp_path / "file" / "model")


# Replacing, and being interrupted ------------------------------------------------------------------------------------


def test_force_replaces_an_artifact(old: Path) -> None:
    random_export(old, force=True, num_classes=9)
    assert classes(old) == 9
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_without_force_the_old_artifact_stays(old: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        random_export(old)
    assert classes(old) == 7


def failing_build(error: BaseException) -> Callable[..., None]:
    def build(graph: Any, folder: Path) -> None:
        eager.build(graph, folder)
        assert list(folder.iterdir())
        raise error

    return build


FAILURES = [
    (KeyboardInterrupt(), KeyboardInterrupt, None),
    (RuntimeError("a bug"), RuntimeError, "a bug"),
    (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
    (OSError(errno.ENOSPC, "No space left on device"), UsageError, r" is full; make room, or choose another --out$"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), UsageError, r" is full; make room, or choose another --out$"),
    # As safetensors says it.
    (ValueError("I/O error: No space left on device (os error 28)"), UsageError, r" is full; make room"),
]


@pytest.mark.parametrize(("raised", "seen", "message"), FAILURES, ids=lambda value: getattr(value, "__name__", None))
def test_a_build_that_ends_early_leaves_the_old_artifact_and_nothing_else(
    raised: BaseException,
    seen: type[BaseException],
    message: str | None,
    old: Path,
    replaced_format: Callable[..., None],
) -> None:
    replaced_format("eager", build=failing_build(raised))
    with pytest.raises(seen, match=message):
        random_export(old, force=True)
    assert classes(old) == 7
    assert [path.name for path in old.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(("raised", "seen", "message"), FAILURES, ids=lambda value: getattr(value, "__name__", None))
def test_a_first_build_that_ends_early_leaves_nothing(
    raised: BaseException,
    seen: type[BaseException],
    message: str | None,
    tmp_path: Path,
    replaced_format: Callable[..., None],
) -> None:
    replaced_format("eager", build=failing_build(raised))
    with pytest.raises(seen, match=message):
        random_export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_verification_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export.probes, "judged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_is_refused_leaves_the_old_one(old: Path, replaced_format: Callable[..., None]) -> None:
    def build(graph: Any, folder: Path) -> None:
        with torch.no_grad():
            graph.module.head.classifier.bias += 1
        eager.build(graph, folder)

    replaced_format("eager", build=build)
    with pytest.raises(ParityError, match="kept aside in"):
        random_export(old, force=True)
    assert classes(old) == 7
    assert sorted(path.name for path in old.parent.iterdir()) == ["model", "model.rejected"]


def test_a_rejected_artifact_takes_the_place_of_nobodys_files(
    tmp_path: Path, replaced_format: Callable[..., None]
) -> None:
    def build(graph: Any, folder: Path) -> None:
        with torch.no_grad():
            graph.module.head.classifier.bias += 1
        eager.build(graph, folder)

    replaced_format("eager", build=build)
    notes = tmp_path / "model.rejected" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(
        ParityError, match=r"relative error .*; not kept aside: .*model\.rejected contains files that are"
    ):
        random_export(tmp_path / "model")
    assert notes.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model.rejected"]


def test_a_disk_that_is_too_full_is_refused_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced_format: Callable[..., None]
) -> None:
    def build(graph: Any, folder: Path) -> None:
        raise AssertionError("it was built")

    replaced_format("eager", build=build)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(UsageError) as caught:
        random_export(tmp_path / "deep" / "model")
    parameters = sum(p.numel() for p in timm.create_model("test_convnext", num_classes=10).parameters())
    assert str(caught.value) == f"{tmp_path} has 1 MB free; building needs up to {12 * parameters / 1e6:.0f} MB"
    assert list(tmp_path.iterdir()) == []


# Weights -------------------------------------------------------------------------------------------------------------


def test_neither_weights_nor_a_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"which model\? give --variant"):
        exported(None, tmp_path / "model")


def test_random_weights_without_a_variant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--weights random needs --variant"):
        exported("random", tmp_path / "model")


@pytest.mark.parametrize(
    "arguments", [{"weights": None, "variant": "base"}, {"weights": "convnext_tiny.fb_in1k"}, {"weights": "hf-hub:a/b"}]
)
def test_weights_that_cannot_be_fetched_are_never_replaced_by_random_ones(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def random_model(*arguments: Any) -> None:
        raise AssertionError("random weights were made")

    monkeypatch.setattr(weights, "random_model", random_model)
    with pytest.raises(WeightsError, match="cannot be fetched from the hub and is not cached") as caught:
        api.export(format="eager", out=tmp_path / "model", **arguments)
    assert "\n" not in str(caught.value)
    assert "--weights random" in str(caught.value)  # offered, not taken
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_not_reached_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's package tries each file for half a minute, and an export without a network took minutes to say so."""
    asked: list[bool] = []

    def unreached(repository: str, filename: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreached)
    with pytest.raises(WeightsError, match=r"cannot be fetched from the hub and is not cached \(no network\)"):
        api.export("hf-hub:a/b", format="eager", out=tmp_path / "model")
    assert asked[:1] == [False]
    assert set(asked[1:]) == {True}


def test_random_weights_are_marked(tmp_path: Path, checkpoint: Path) -> None:
    assert random_export(tmp_path / "a").manifest.weights.random is True
    found = exported(str(checkpoint), tmp_path / "b").manifest.weights
    assert (found.random, found.source) == (False, "test_convnext.safetensors")
    assert found.file_sha256 == manifest.sha256_of(checkpoint)


def test_labels_and_preprocessing_beside_the_checkpoint_are_in_the_manifest(tmp_path: Path) -> None:
    """As timm itself writes them."""
    names = ["tench", "goldfish", "great white shark"]
    model = timm.create_model("test_convnext", num_classes=3)
    model.pretrained_cfg |= {"label_names": names, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.75, "num_classes": 3}
    save_for_hf(model, tmp_path / "checkpoint", safe_serialization=True)
    found = exported(str(tmp_path / "checkpoint"), tmp_path / "model").manifest
    assert found.labels == tuple(names)
    assert found.preprocessing.mean == (0.1, 0.2, 0.3)
    assert found.preprocessing.crop_pct == 0.75


def test_the_manifest_says_what_was_done(old: Path) -> None:
    found = manifest.verified(old).manifest
    assert [record.name for record in found.passes] == ["fold_norm_affine", "fold_layer_scale"]
    assert (
        found.versions["torch"] == torch.__version__.partition("+")[0] or found.versions["torch"] == torch.__version__
    )
    assert found.parity[0].images == "bundled"
    assert found.parity[0].samples == export.probes.IMAGES
    assert found.precision.graph == {"fp32": 1.0}
    assert {file.path for file in found.files} == {"model.safetensors", "canary.npz"}


# Loading -------------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"model\.safetensors was changed after the export \(its SHA-256 differs\)"),
        (truncate, r"model\.safetensors has \d+ bytes where the manifest says \d+"),
        (Path.unlink, r"model\.safetensors is missing"),
    ],
)
def test_a_damaged_file_is_named_on_load(damage: Callable[[Path], None], message: str, old: Path) -> None:
    damage(old / "model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        api.load(old)


def test_tensors_that_do_not_fit_the_manifest_are_refused_in_one_line(old: Path) -> None:
    """The hashes agree: someone wrote both."""
    file = old / "model.safetensors"
    tensors = load_tensors(file.read_bytes())  # not mapped: the file is written over
    tensors["extra"] = tensors.pop("head.classifier.bias")
    save_file(tensors, file)
    found = manifest.read(old).manifest
    changed = msgspec.structs.replace(found, files=manifest.file_records(old))
    (old / "manifest.json").write_bytes(manifest.encode(changed))
    with pytest.raises(ArtifactError, match=r"does not fit its manifest: .*extra") as caught:
        api.load(old)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["eager", "onnx", "openvino", "torchscript", "pt2", "aotinductor", "native"])
def test_a_file_that_the_runtime_cannot_read_is_refused_in_one_line(
    format: str, old: Path, need_format: Callable[[str], None]
) -> None:
    from convnext_deploy import formats

    need_format(format)
    (old / "model.safetensors").unlink()
    (old / f"model{formats.get(format).suffix}").write_bytes(b"not a model")
    found = manifest.read(old).manifest
    export = msgspec.structs.replace(found.export, format=format)
    changed = msgspec.structs.replace(found, export=export, files=manifest.file_records(old))
    (old / "manifest.json").write_bytes(manifest.encode(changed))
    with pytest.raises(ArtifactError) as caught:
        api.load(old)
    assert "\n" not in str(caught.value)


def test_an_artifact_of_an_unknown_format_is_refused(old: Path) -> None:
    found = manifest.read(old).manifest
    changed = msgspec.structs.replace(found, export=msgspec.structs.replace(found.export, format="tensorflow"))
    (old / "manifest.json").write_bytes(manifest.encode(changed))
    with pytest.raises(ArtifactError, match="is of format 'tensorflow', which is none of"):
        api.load(old)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_below_one_are_refused(threads: int, old: Path) -> None:
    with pytest.raises(UsageError, match=f"threads {threads}; expected at least 1"):
        api.load(old, threads=threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an NVIDIA GPU")
def test_loading_for_cuda_without_a_gpu_is_refused(old: Path) -> None:
    with pytest.raises(UsageError, match="PyTorch finds no NVIDIA GPU"):
        api.load(old, device="cuda")


def test_an_artifact_loads_from_wherever_it_is_moved(old: Path, tmp_path: Path) -> None:
    moved = old.rename(tmp_path / "somewhere else ü")
    assert api.load(moved).run(np.zeros((1, 3, 64, 64), np.float32))[0].shape == (1, 7)


# More images to verify on --------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(10):
        (tmp_path / "pictures" / f"class{number}").mkdir(parents=True)
    for index in range(3):
        folder = tmp_path / "pictures" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (90, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def test_verify_data_is_verified_beside_the_bundled_images(tmp_path: Path, pictures: Path) -> None:
    parity = random_export(tmp_path / "model", verify_data=str(pictures)).manifest.parity
    assert [(p.images, p.samples, p.failures) for p in parity] == [("bundled", 16, ()), (str(pictures), 3, ())]


def test_a_corrupt_image_among_verify_data_is_one_line(tmp_path: Path, pictures: Path) -> None:
    file = next(pictures.rglob("2.png"))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match="contains an image that cannot be read: ") as caught:
        random_export(tmp_path / "model", verify_data=str(pictures))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_verify_data_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        random_export(tmp_path / "model", verify_data=str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_parity_on_verify_data_can_fail_on_its_own(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact that is right on the bundled images only."""
    right = export.probes.judged

    def judged(session: Any, found: Any, sets: Any, reload: Any) -> Any:
        moved = tuple(
            dataclasses.replace(probe, expected=tuple(1.01 * output for output in probe.expected))
            if probe.name == str(pictures)
            else probe
            for probe in sets
        )
        return right(session, found, moved)

    monkeypatch.setattr(export.probes, "judged", judged)
    with pytest.raises(ParityError) as caught:
        random_export(tmp_path / "model", verify_data=str(pictures))
    assert str(caught.value).startswith(f"on {pictures}: relative error 0.0099")
    assert "bundled" not in str(caught.value)


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_a_batch_of_zero_images_is_refused_and_not_taken_for_the_default(old: Path, pictures: Path) -> None:
    with pytest.raises(UsageError, match="batch 0; expected at least 1"):
        api.evaluate(old, str(pictures), batch=0)


def test_accuracy_is_what_timms_own_model_says(
    tmp_path: Path, pictures: Path, checkpoint: Path, timm_reference: Callable[..., nn.Module]
) -> None:
    artifact = exported(str(checkpoint), tmp_path / "model", input="uint8")
    found = api.evaluate(artifact.path, str(pictures), out=tmp_path / "result")
    facts = artifact.manifest.preprocessing
    transform = timm.data.create_transform(
        (3, 64, 64),
        mean=facts.mean,
        std=facts.std,
        crop_pct=facts.crop_pct,
        interpolation=facts.interpolation,
    )
    hits = 0
    for file in pictures.rglob("*.png"):
        with Image.open(file) as image, torch.inference_mode():
            hits += int(timm_reference()(transform(image)[None]).argmax()) == int(file.parent.name[-1])
    assert found.images == 3
    assert isinstance(found, EvalResult)
    assert found.top1 == pytest.approx(hits / 3)
    assert sorted(path.name for path in tmp_path.glob("result*")) == ["result.json", "result.npz"]


def test_files_of_a_model_in_memory_are_removed_when_the_call_ends(
    tmp_path: Path, timm_reference: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stayed until the process ended: a copy of the weights for each call."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for given in (timm_reference(), timm_reference().state_dict()):
        api.export(given, format="eager", out=tmp_path / type(given).__name__, image_size=64, batch=1)
        with pytest.raises(UsageError, match="exists"):
            api.export(given, format="eager", out=tmp_path / type(given).__name__, image_size=64)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_is_named_where_a_result_is_written(
    number: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was the system's own error in Python, and on the command line a line that named no disk."""

    artifact = random_export(tmp_path / "model")

    def full(source: str, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError) as caught:
        api.predict(artifact.path, str(pictures), out=tmp_path / "result.csv")
    assert re.fullmatch(rf"{tmp_path}\S* is full; make room, or write elsewhere", str(caught.value))


def test_a_manifest_is_what_the_published_schema_says(artifact_of: Callable[..., Artifact]) -> None:
    schema = json.loads((Path(__file__).resolve().parents[2] / "docs" / "manifest.schema.json").read_text())
    document = json.loads((artifact_of("onnx").path / "manifest.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(document)
    for wrong in ({**document, "schema_version": 2}, {**document, "files": [{}]}, {**document, "inputs": 1}):
        assert not validator.is_valid(wrong)
    assert validator.is_valid({**document, "of_a_later_version": 1})


@pytest.mark.parametrize(
    "said",
    [
        {"split": "val"},
        {"labels": "names.txt"},
        {"annotations": "list.csv"},
        {"class_order": "timm"},
        {"problem": "binary"},
        {"reduce_labels": True},
    ],
)
def test_what_is_said_about_images_is_refused_where_both_sides_are_evaluated(
    said: dict[str, Any], tmp_path: Path
) -> None:
    """Half of these were taken before and changed nothing."""
    sides = [tmp_path / name for name in ("a.json", "b.json")]
    for side in sides:
        side.write_text("{}")
    option = f"--{next(iter(said)).replace('_', '-')}"
    with pytest.raises(UsageError, match=f"^{option} .*is for artifacts, and both sides are results of eval"):
        api.gate(*sides, limits={"max_drop": 1}, **said)


def test_a_batch_that_an_artifact_does_not_take_is_refused_before_anything_is_measured(
    artifact_of: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convnext_deploy.workflows import bench, contenders

    def never(*_: object) -> None:
        raise AssertionError("measured first")

    monkeypatch.setattr(contenders, "measured_ceilings", never)
    with pytest.raises(UsageError, match="batch 9999; test_convnext eager fp32 takes 1 to 4; give others with --batch"):
        list(api.bench(artifact_of("eager").path, bench.Plan(batches=(9999,))))
