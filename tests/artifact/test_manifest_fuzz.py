"""Damaged manifests through everything that reads one before a runtime opens a file: only our own errors."""

import contextlib
import json
from pathlib import Path

import fuzz
import msgspec
import pytest
from artifact_files import PROBE

from convnext_deploy import formats
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli.terminal import details
from convnext_deploy.errors import ConvNextDeployError

SEEDS = (
    PROBE,
    msgspec.structs.replace(
        PROBE,
        labels=None,
        weights=msgspec.structs.replace(PROBE.weights, random=False),
        preprocessing=msgspec.structs.replace(PROBE.preprocessing, assumed=("mean", "crop_pct")),
        files=(manifest.FileRecord(path="model.onnx", bytes=3, sha256="a" * 64),),
    ),
)


def test_damaged_manifests_bring_only_our_own_errors(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"abc")

    def read(content: bytes) -> None:
        (folder / manifest.MANIFEST_NAME).write_bytes(content)
        found = manifest.read(folder).manifest
        artifact = Artifact(folder, found)
        details(folder, found, artifact.bytes).encode()
        manifest.encode(found)
        manifest.not_ours(folder)
        with contextlib.suppress(ConvNextDeployError):
            manifest.verified(folder)
        formats.of(artifact)

    seeds = [manifest.encode(seed) for seed in SEEDS]
    assert fuzz.tracebacks(fuzz.records(seeds, fuzz.THINNED), read) == {}


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"files": 1}', "\udcff"])
def test_a_folder_with_any_manifest_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    reason = manifest.not_ours(tmp_path / "a")
    assert reason is not None
    assert "is no artifact of this version" in reason
    assert "\n" not in reason
    assert json.dumps(reason)
