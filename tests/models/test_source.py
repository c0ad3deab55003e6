"""The one record of which model is meant."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.errors import UsageError
from convnext_deploy.models.source import Source, SourceOptions
from convnext_deploy.records.base import Task
from convnext_deploy.workflows import export, half, quantize

FIELDS = {field.name for field in fields(Source)}


@pytest.mark.parametrize("verb", [export.export, quantize.quantize, half.half])
def test_what_reads_a_checkpoint_takes_one_source_and_none_of_its_fields(verb: Any) -> None:
    names = set(inspect.signature(verb).parameters)
    assert "source" in names
    assert not names & FIELDS


@pytest.mark.parametrize("verb", [api.export, api.quantize, api.half, api.optimize])
def test_every_keyword_that_a_public_function_shares_with_a_source_means_the_same(verb: Any) -> None:
    """Else two functions that are told the same read different models."""
    record = {field.name: field.default for field in fields(Source)}
    declared = SourceOptions.__annotations__
    shared = {name: given for name, given in inspect.signature(verb).parameters.items() if name in FIELDS}
    assert {"weights", "variant", "image_size", "preprocessing", "config"} <= set(shared)
    for name, given in shared.items():
        assert given.default == record[name], name
        if name == "task":  # some take the network's own tasks alone
            assert set(get_args(given.annotation)) <= set(get_args(Task))
        elif name != "weights":
            assert given.annotation == get_args(declared[name])[0], name


def test_what_can_be_said_about_a_checkpoint_is_what_a_source_records() -> None:
    assert {"weights", "task", *SourceOptions.__annotations__} == FIELDS


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


@pytest.mark.parametrize("form", ["timm", "transformers", "torchvision", "state dict"])
def test_a_model_in_memory_is_read_as_its_own_file_would_be(form: str) -> None:
    """Outputs as those of the library's own module, and the facts that the library states."""
    import timm
    import torchvision
    import transformers

    torch.manual_seed(0)
    if form == "transformers":
        config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)
        given: Any = transformers.ConvNextForImageClassification(config).eval()
    elif form == "torchvision":
        setting = torchvision.models.convnext.CNBlockConfig
        stages = [setting(8, 16, 1), setting(16, 24, 1), setting(24, 32, 1), setting(32, None, 1)]
        given = torchvision.models.ConvNeXt(stages, num_classes=5).eval()
    else:
        given = timm.create_model("test_convnext", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = given(images)
        loaded = Source.of(given.state_dict() if form == "state dict" else given, image_size=64).load()
        found = loaded.model.eval()(images)
    torch.testing.assert_close(found, getattr(expected, "logits", expected), rtol=1e-4, atol=1e-4)
    if form == "timm":
        assert loaded.preprocessing.mean == tuple(given.pretrained_cfg["mean"])
        assert "mean" not in loaded.preprocessing.assumed


def test_what_is_no_model_is_refused_with_what_is_taken() -> None:
    for wrong in ({"a": 1}, {}, 3, object()):
        with pytest.raises(UsageError, match="or in Python a module or a state dict"):
            Source.of(wrong)


def test_maps_of_timm_in_memory_bring_their_preprocessing() -> None:
    network = timm.create_model("test_convnext", features_only=True)  # which `save_for_hf` does not take
    loaded = Source.of(network, task="features").load()
    assert (loaded.model.spec.image_size, loaded.preprocessing.mean) == ((160, 160), (0.5, 0.5, 0.5))
    assert loaded.preprocessing.assumed == ()
