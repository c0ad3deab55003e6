"""Export's comparison, made again where an artifact is opened; and what a server does with its outcome."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

import convnext_deploy
from convnext_deploy.accuracy import canary
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.data import preprocess
from convnext_deploy.errors import ArtifactError, CheckFailed, ParityError
from convnext_deploy.records.accuracy import Check, Limits, Verdict
from convnext_deploy.records.manifest import Parity


def found(artifact: Artifact) -> Parity | str:
    return canary.compared(convnext_deploy.load(artifact.path), artifact.manifest, artifact.path)


def rewritten(artifact: Artifact, folder: Path, **changes: Any) -> Artifact:
    """A copy whose canary has other arrays, with a manifest that lists it as it is."""
    shutil.copytree(artifact.path, folder)
    with np.load(folder / canary.FILE) as kept:
        arrays = {name: kept[name] for name in kept.files}
    np.savez(folder / canary.FILE, **(arrays | changes))
    return relisted(artifact, folder)


def relisted(artifact: Artifact, folder: Path) -> Artifact:
    record = msgspec.structs.replace(artifact.manifest, files=manifest.file_records(folder))
    (folder / manifest.MANIFEST_NAME).write_bytes(manifest.encode(record))
    return manifest.verified(folder)


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("onnx", input="uint8")


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("onnx", {"input": "uint8"}),
        ("onnx", {"task": "features"}),
        ("onnx", {"precision": "fp16"}),
        ("native", {"input": "uint8"}),
    ],
)
def test_every_artifact_keeps_what_its_outputs_are_compared_with(
    artifact_of: Callable[..., Artifact], format: str, options: dict[str, Any]
) -> None:
    made = artifact_of(format, **options)
    parity = found(made)
    assert isinstance(parity, Parity)
    assert parity.failures == ()
    assert parity.samples == 16
    exported = next(one for one in made.manifest.parity if one.reference == "source" and one.images == "bundled")
    assert parity.relative_error == pytest.approx(exported.relative_error, rel=2)
    size = next(file.bytes for file in made.manifest.files if file.path == canary.FILE)
    assert size < canary.MOST_BYTES + 10_000


def test_another_result_than_at_the_export_is_found(artifact: Artifact, tmp_path: Path) -> None:
    with np.load(artifact.path / canary.FILE) as kept:
        logits = kept["output0"].copy()
    logits[5] *= 1 + 1e-4  # ten times what float32's rounding makes
    parity = found(rewritten(artifact, tmp_path / "other", output0=logits))
    assert isinstance(parity, Parity)
    assert parity.failures
    assert "on sample 5" in parity.failures[0]


def test_what_cannot_be_compared_is_said(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    shutil.copytree(artifact.path, old)
    (old / canary.FILE).unlink()
    assert found(relisted(artifact, old)) == "the artifact keeps no outputs to compare with; export it again"
    spliced = msgspec.structs.replace(artifact.manifest, splice=cast(Any, object()))
    said = canary.compared(convnext_deploy.load(artifact.path), spliced, artifact.path)
    assert said == "a graph of somebody else keeps no outputs to compare with"
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact.path, damaged)
    (damaged / canary.FILE).write_bytes(b"PK\x03\x04")
    with pytest.raises(ArtifactError, match=r"canary\.npz cannot be read: "):
        found(relisted(artifact, damaged))
    whole = preprocess.probe_images
    monkeypatch.setattr(preprocess, "probe_images", lambda *given: whole(*given) ^ 1)
    assert str(found(artifact)).startswith("Pillow's JPEG decoder gives other pixels here")


def verdict(artifact: Artifact, file: Path, **changes: Any) -> Path:
    limits = Limits(max_drop=1)
    check = Check(name="top1_drop", decision="PASS", limit=0.01, value=0.0)
    made = Verdict(
        decision="PASS", limits=limits, baseline="a", baseline_sha256="0" * 64, candidate="b",
        candidate_sha256=artifact.sha256, data="d", data_sha256="0" * 64, images=9, baseline_top1=1.0,
        candidate_top1=1.0, lost=0, gained=0, p_value=1.0, images_needed=None, checks=(check,), agreement=1.0,
        confident=9, confident_flips=0, kl_at_least=0.0, per_class=(), flips=(),
    )  # fmt: skip
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(made, **changes)))
    return file


class TestServed:
    """The same through the server."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("uvicorn", reason="the extra serve is not installed")

    def test_wrong_outputs_are_never_ready(self, artifact: Artifact, tmp_path: Path) -> None:
        with np.load(artifact.path / canary.FILE) as kept:
            wrong = rewritten(artifact, tmp_path / "wrong", output0=kept["output0"] * 1.01)
        with pytest.raises(ParityError, match="computes something else on this machine than where it was exported: "):
            convnext_deploy.serve(wrong.path, port=0, ready=lambda server: pytest.fail("ready"))

    def test_a_changed_file_is_never_ready(self, artifact: Artifact, tmp_path: Path) -> None:
        folder = tmp_path / "changed"
        shutil.copytree(artifact.path, folder)
        content = bytearray((folder / "model.onnx").read_bytes())
        content[-1] ^= 1
        (folder / "model.onnx").write_bytes(content)
        with pytest.raises(ArtifactError, match="was changed after the export"):
            convnext_deploy.serve(folder, port=0)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"decision": "FAIL"}, r"says FAIL of .*; only PASS is served"),
            ({"decision": "INCONCLUSIVE"}, "says INCONCLUSIVE"),
            ({"candidate_sha256": "1" * 64}, "is about the candidate 111111111111"),
        ],
    )
    def test_only_what_the_gate_passed_is_served(
        self, artifact: Artifact, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        from server_process import serving

        with pytest.raises(CheckFailed, match=message):
            convnext_deploy.serve(artifact.path, port=0, gate=verdict(artifact, tmp_path / "v.json", **changes))
        with serving(f"m={artifact.path}", gate=verdict(artifact, tmp_path / "v.json")) as one:
            assert one.ask("GET", "/readyz")[0] == 200

    def test_a_reload_takes_a_good_artifact_without_losing_a_request_and_refuses_bad_ones(
        self, artifact: Artifact, artifact_of: Callable[..., Artifact], tmp_path: Path
    ) -> None:
        import threading

        from server_process import picture, serving, until

        place = tmp_path / "live"
        shutil.copytree(artifact.path, place)
        gate = verdict(artifact, tmp_path / "v.json")
        with serving(f"m={place}", gate=gate, sessions=1) as one:
            answers: list[tuple[int, str]] = []
            ended = threading.Event()

            def client() -> None:
                while not ended.is_set():
                    status, answer, _ = one.ask("POST", "/classify", picture())
                    answers.append((status, answer.get("artifact_sha256") or json.dumps(answer)))

            threads = [threading.Thread(target=client) for _ in range(4)]
            for thread in threads:
                thread.start()
            until(lambda: len(answers) > 10)
            better = artifact_of("onnx", input="uint8", batch=3)
            shutil.rmtree(place)
            shutil.copytree(better.path, place)
            with pytest.raises(CheckFailed, match="is about the candidate"):
                one.service.reload()  # the gate's file is of the old one
            verdict(better, gate, decision="FAIL")
            with pytest.raises(CheckFailed, match="says FAIL"):
                one.service.reload()
            seen = len(answers)
            until(lambda: len(answers) > seen + 10)
            assert {sha256 for _, sha256 in answers} == {artifact.sha256}
            verdict(better, gate)
            assert one.service.reload() == [f"m: {artifact.sha256[:12]} -> {better.sha256[:12]}"]
            seen = len(answers)
            until(lambda: len(answers) > seen + 10)
            ended.set()
            for thread in threads:
                thread.join(20)
            assert {status for status, _ in answers} == {200}
            assert [sha256 for _, sha256 in answers[-4:]] == [better.sha256] * 4
            assert one.metric('reloads_total{outcome="done"}') == 1
            assert one.metric('reloads_total{outcome="refused"}') == 2
            assert one.metric(f'model_info{{format="onnx",model="m",precision="fp32",sha256="{better.sha256}"}}') == 1
            assert one.metric(f'model_info{{format="onnx",model="m",precision="fp32",sha256="{artifact.sha256}"}}') == 0
