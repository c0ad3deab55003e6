"""Files of records and settings may be anybody's: one that is too large, or has no end, is refused in a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convnext_deploy.accuracy import evaluation, partial
from convnext_deploy.api import accuracy
from convnext_deploy.artifact import manifest
from convnext_deploy.data import numbering
from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.models import configured, locations, mm_config
from convnext_deploy.quantization import plan
from convnext_deploy.records import base
from convnext_deploy.reports import results
from convnext_deploy.runtimes.tensorrt import files
from convnext_deploy.timing import compare

ZERO = Path("/dev/zero")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert base.content_of(tmp_path / "a", 10) == b"x" * 10
    with pytest.raises(OSError, match="it has more than 9 bytes, which is the most that is read"):
        base.content_of(tmp_path / "a", 9)


@pytest.mark.skipif(not ZERO.exists(), reason="no device without an end here")
def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(OSError, match="more than 67,108,864 bytes"):
        base.content_of(ZERO)


def manifest_in(path: Path) -> Any:
    path.rename(path.with_name(manifest.MANIFEST_NAME))
    return manifest.read(path.parent)


def engine_record_in(path: Path) -> Any:
    path.rename(path.with_name(files.RECORD_FILE))
    return files.read_record(path.parent)


READERS: dict[str, Callable[[Path], Any]] = {
    "manifest": manifest_in,
    "engine": engine_record_in,
    "plan": plan.read,
    "labels": numbering.class_map,
    "config.json": configured._of_json,
    "config.py": mm_config.read_config,
    "a checkpoint's config.json": locations._json,
    "limits": accuracy._limits,
    "bench": compare.read_results,
    "report": lambda path: results.read([path]),
    "evaluation": evaluation.read_result,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_record_of_more_than_memory_should_hold_is_refused_in_a_line(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (compare, partial, results):
        monkeypatch.setattr(module, "MAX_RESULTS_BYTES", base.MAX_BYTES)
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(base.MAX_BYTES + 1)  # a hole: it takes no room on the disk
    with pytest.raises(ConvNextDeployError, match="cannot be read: it has more than 67,108,864 bytes") as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)
