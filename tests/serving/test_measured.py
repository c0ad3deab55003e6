"""A server's settings from measured rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sample_records import score_verdict

from convnext_deploy.errors import CheckFailed, UsageError
from convnext_deploy.records.timing import BenchResult, ServerLoad
from convnext_deploy.serving.measured import settings
from convnext_deploy.serving.service import refuse_ungated

ONE, OTHER = "1" * 64, "2" * 64


def row(sha256: str, rate: float | None, slo_ms: float, threads: int, max_batch: int = 8) -> bytes:
    load = ServerLoad(slo_ms=slo_ms, fraction=0.99, max_batch=max_batch, seed=0, queries_per_s=rate, trials=())
    made: dict[str, Any] = dict.fromkeys(BenchResult.__struct_fields__)
    made |= {
        "schema_version": 1, "created": "now", "run": "r", "subject": "s", "model": "m", "runtime": "native",
        "precision": "fp32", "task": "classify", "image_size": (64, 64), "device": "cpu", "threads": threads,
        "streams": 1, "batch": 1, "scenario": "server", "scope": "compute", "artifact_sha256": sha256,
        "random_weights": False, "status": "valid", "samples_ms": (), "turns": (), "turn_images_per_s": (),
        "yardstick_ms": (), "quantiles": (), "server": load, "machine": {}, "versions": {},
    }  # fmt: skip
    return msgspec.json.encode(BenchResult(**made))


def test_the_setting_that_carried_the_most_within_the_limit_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [row(ONE, 90, 20, 1), row(ONE, 120, 20, 2, 4), row(ONE, 300, 50, 4), row(OTHER, 999, 20, 8)]
    file.write_bytes(b"\n".join([*rows, row(ONE, None, 5, 1), b""]))
    assert settings(file, ONE, 20)[0] == {"threads": 2, "max_batch": 4, "slo_ms": 20}
    assert settings(file, ONE, 30)[0] == {"threads": 2, "max_batch": 4, "slo_ms": 30}
    assert settings(file, ONE, None)[0] == {"threads": 4, "max_batch": 8, "slo_ms": 50}
    assert settings(file, ONE, 20)[1] == "as measured: 2 threads, batches of up to 4; 120 requests/s kept 20 ms"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "contains no rows of `bench --save`"),
        (row(OTHER, 9, 20, 1), "has no rate that this artifact carried within 20 ms"),
        (row(ONE, 9, 21, 1), "has no rate that this artifact carried within 20 ms"),
        (row(ONE, None, 20, 1), "has no rate that this artifact carried within 20 ms"),
    ],
)
def test_rows_that_say_nothing_of_the_artifact_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        settings(file, ONE, 20)
    assert message in str(error.value)


def test_a_file_that_nests_deeper_than_python_reads_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_bytes(b'{"unknown": ' + b"[" * 100_000)
    with pytest.raises(UsageError, match="contains no rows of `bench --save`"):
        settings(file, ONE, None)
    with pytest.raises(UsageError, match="contains no verdict"):
        refuse_ungated(SimpleNamespace(), file)  # type: ignore[arg-type]  # is not looked at


@pytest.mark.parametrize("problem", ["multi-label", "regression", "segmentation", "detection"])
def test_a_verdict_of_a_score_is_read_like_one_of_classes(problem: Any, tmp_path: Path) -> None:
    """`serve --gate` said of each that it contains no verdict, so that no segmenter could be served with one."""
    verdict = score_verdict(problem=problem)
    file = tmp_path / "verdict.json"
    file.write_bytes(msgspec.json.encode(verdict))
    refuse_ungated(SimpleNamespace(sha256=ONE, path=tmp_path), file)  # type: ignore[arg-type]  # all that it looks at
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(verdict, decision="FAIL")))
    with pytest.raises(CheckFailed, match=r"says FAIL of .*; only PASS is served"):
        refuse_ungated(SimpleNamespace(sha256=ONE, path=tmp_path), file)  # type: ignore[arg-type]
