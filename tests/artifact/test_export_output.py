"""An export in Python prints nothing: standard output is its caller's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from convnext_deploy import api

MODEL = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist" / "model.safetensors"


def test_an_export_writes_nothing_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], need_format: Callable[[str], None]
) -> None:
    """With onnxscript before 0.7, the number of patterns that it rewrote."""
    need_format("openvino")
    api.export(str(MODEL), format="openvino", out=tmp_path / "a")
    assert capsys.readouterr().out == ""
