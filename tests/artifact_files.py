"""A made-up artifact: its manifest, its files, and what a folder contains."""

from pathlib import Path

import msgspec

from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import MANIFEST_NAME, encode
from convnext_deploy.models import registry
from convnext_deploy.records.manifest import (
    BatchRange,
    ExportSpec,
    Manifest,
    Parity,
    PassRecord,
    PrecisionTruth,
    Preprocessing,
    TensorRecord,
    WeightsRecord,
)

PROBE = Manifest(
    schema_version=1,
    created="2026-01-02T03:04:05+00:00",
    tool="convnext-deploy 0.1.0",
    model=registry.spec("convnextv2_atto", num_classes=3, image_size=(64, 96)),
    weights=WeightsRecord(source="a.pth", layout="timm", random=False, tensors_sha256="0" * 64, licence="mit"),
    preprocessing=Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    labels=("a", "é", "😀"),
    export=ExportSpec(format="onnx", batch=BatchRange(min=1, opt=2, max=3)),
    inputs=(TensorRecord(name="images", dtype="float32", shape=("batch", 3, 64, 96)),),
    outputs=(TensorRecord(name="logits", dtype="float32", shape=("batch", 3)),),
    passes=(PassRecord(name="fold_layer_scale", relative_change=1e-7),),
    parity=(
        Parity(
            images="random", samples=8, relative_error=1e-6, cosine=1.0, top1_agreement=None, near_ties=0, failures=()
        ),
    ),
    precision=PrecisionTruth(graph={"fp32": 1.0}),
    versions={"torch": "2"},
    machine={"cpu": "x", "cores": 2},
    files=(),
)
FILES = {"model.onnx": b"graph" * 1000, "data/weights.bin": b"\0\1\2" * 100, "empty": b""}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    records = manifest.file_records(folder)
    (folder / MANIFEST_NAME).write_bytes(encode(msgspec.structs.replace(PROBE, files=records)))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
