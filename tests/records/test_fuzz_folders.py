"""Folders as transformers writes them, with one damaged file of JSON: one line of our own comes out."""

import json
from pathlib import Path

import fuzz
import pytest
import transformers

from convnext_deploy.models import checkpoint

NAMES = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hub")
    config = transformers.ConvNextConfig(
        hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], image_size=32, num_labels=3, id2label=dict(enumerate("abc"))
    )
    transformers.ConvNextForImageClassification(config).save_pretrained(made, max_shard_size=4000)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(made)
    assert all((made / name).is_file() for name in NAMES)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_damaged_file_is_refused_in_one_line(name: str, folder: Path) -> None:
    path = folder / name
    whole = path.read_bytes()
    assert checkpoint.load(str(folder)).model is not None  # before, it is taken

    def read(content: bytes) -> object:
        path.write_bytes(content)
        return checkpoint.load(str(folder))

    try:
        assert fuzz.tracebacks(fuzz.records([json.dumps(json.loads(whole)).encode()], fuzz.THINNED), read) == {}
    finally:
        path.write_bytes(whole)
