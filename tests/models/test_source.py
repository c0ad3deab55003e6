"""The one record of which model is meant."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.errors import UsageError
from convnext_deploy.models.source import Source
from convnext_deploy.workflows import export, half, quantize

FIELDS = {field.name for field in fields(Source)}


@pytest.mark.parametrize("verb", [export.export, quantize.quantize, half.half])
def test_what_reads_a_checkpoint_takes_one_source_and_none_of_its_fields(verb: Any) -> None:
    names = set(inspect.signature(verb).parameters)
    assert "source" in names
    assert not names & FIELDS


@pytest.mark.parametrize("verb", [api.export, api.quantize, api.half])
def test_every_keyword_that_a_public_function_shares_with_a_source_means_the_same(verb: Any) -> None:
    """Else two functions that are told the same read different models."""
    of = inspect.signature(Source.of).parameters
    shared = {name: given for name, given in inspect.signature(verb).parameters.items() if name in FIELDS}
    assert {"weights", "variant", "task", "image_size", "weights_key", "preprocessing"} <= set(shared)
    for name, given in shared.items():
        if name != "weights":
            assert (given.annotation, given.default) == (of[name].annotation, of[name].default), name


def test_a_source_reads_its_arguments_in_every_plain_form_and_loads_what_they_say() -> None:
    source = Source.of(
        "random", variant="test_convnext", task="embed", image_size="32x64", in_chans=1, preprocessing={"mean": 0.5}
    )
    assert source.image_size == (32, 64)
    loaded = source.load()
    assert (loaded.model.spec.task, loaded.model.spec.image_size, loaded.model.spec.in_chans) == ("embed", (32, 64), 1)
    assert loaded.preprocessing.mean == (0.5,)
    with pytest.raises(UsageError, match="task nothing"):
        Source.of("random", variant="test_convnext", task="nothing")  # type: ignore[arg-type]


@pytest.mark.parametrize(("record", "places"), [("Manifest", 1), ("ExportSpec", 3)])
def test_what_an_artifact_is_is_recorded_whole_and_in_one_place(record: str, places: int) -> None:
    """An ExportSpec also for timm's models: as they are built, and as they come."""
    package = Path(convnext_deploy.__file__).parent
    made = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if f"{record}(" in line and not line.startswith("class ")
    ]
    assert len(made) == places, made
