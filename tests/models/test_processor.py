"""Image processors of transformers: what they make of an image, held against their own code, or a refusal."""

from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from convnext_deploy.data import preprocess
from convnext_deploy.errors import WeightsError
from convnext_deploy.models.facts import preprocessing_of
from convnext_deploy.models.processor import merged, processor_facts
from convnext_deploy.records.manifest import ModelSpec

# Those that compute with Pillow have names of their own since transformers 5.
THEIRS: dict[str, Any] = {
    name: getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    for name in ("ConvNextImageProcessor", "BitImageProcessor", "ViTImageProcessor")
}
NORMAL = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_rescale": True}
BIT = {"size": {"shortest_edge": 96}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True}


@pytest.mark.parametrize(
    ("kind", "said", "size", "crop"),
    [
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.875}, (64, 64), (0.875, "center")),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, (384, 384), (1.0, "squash")),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "do_normalize": False}, (64, 64), None),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "rescale_factor": 1 / 127.5}, (64, 64), None),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "resample": 2}, (64, 64), None),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "resample": 0}, (64, 64), None),
        (
            "ConvNextImageProcessor",
            {"size": {"shortest_edge": 64}, "image_mean": None, "image_std": None},
            (64, 64),
            None,
        ),
        ("ViTImageProcessor", {"size": 64, "image_mean": None, "image_std": None}, (64, 64), None),
        ("BitImageProcessor", BIT | {"image_mean": None, "image_std": None}, (64, 64), None),
        ("BitImageProcessor", BIT, (64, 64), (64 / 96, "center")),
        ("BitImageProcessor", BIT | {"size": {"shortest_edge": 72}, "resample": 1}, (64, 64), None),
        ("BitImageProcessor", BIT | {"size": {"height": 96, "width": 96}}, (64, 64), (64 / 96, "squash")),
        ("BitImageProcessor", BIT | {"do_normalize": False, "rescale_factor": 1 / 127.5}, (64, 64), None),
        ("ViTImageProcessor", {"size": {"height": 64, "width": 96}}, (64, 96), (1.0, "squash")),
        ("ViTImageProcessor", {"size": 64}, (64, 64), (1.0, "squash")),
    ],
)
def test_what_a_processor_does_is_done_exactly(
    kind: str, said: dict[str, Any], size: tuple[int, int], crop: tuple[float, str] | None
) -> None:
    config = {
        name: value for name, value in (NORMAL | {"image_processor_type": kind} | said).items() if value is not None
    }
    facts = processor_facts(config)
    assert tuple(facts["input_size"]) == size
    found = preprocessing_of(facts, ModelSpec(architecture="x", depths=(1,) * 4, dims=(8,) * 4, image_size=size))
    assert crop is None or (found.crop_pct, found.crop_mode) == crop
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize((240, 180), Image.Resampling.BICUBIC)
    theirs = THEIRS[kind](**config)(image, return_tensors="np")["pixel_values"]
    pixels = preprocess.transform(found, size, 3)(image)
    ours = preprocess.as_input(pixels[None], found, "float32")
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=2e-5)  # float32 steps in another order; a level is 0.01 or more


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"do_resize": False}, "do_resize false"),
        ({"do_rescale": False, "image_mean": [0.5] * 3}, "do_rescale false"),
        ({"do_pad": True}, "do_pad True"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order True"),
        ({"resample": 5}, "resample 5"),
        ({"size": {"longest_edge": 64}}, r"size \{'longest_edge': 64\}"),
        ({"size": {"shortest_edge": 64, "longest_edge": 99}}, "ConvNextImageProcessor takes shortest_edge"),
        ({"size": {"shortest_edge": 64}, "image_processor_type": "CLIPImageProcessor"}, "without a crop"),
        (BIT | {"size": {"shortest_edge": 32}}, "expected a crop that fits"),
        (BIT | {"crop_size": {"height": 64, "width": 96}}, "expected a square"),
        (BIT | {"crop_size": None}, "do_center_crop true without crop_size"),
        ({"image_processor_type": "LevitImageProcessorFast", "size": {"shortest_edge": 64}}, "256/224 of its size"),
        ({"image_processor_type": "EfficientNetImageProcessor", "size": 64}, "standard deviation a second time"),
        ({"feature_extractor_type": "PoolFormerFeatureExtractor"}, "its crop_pct is of another computation"),
        ({"rescale_factor": 0, "image_mean": [0.5], "image_std": [0.5]}, "rescale_factor 0"),
        ({"rescale_factor": 1 / 127.5}, "without image_mean and image_std"),
        (
            BIT | {"image_processor_type": "ConvNextImageProcessor", "crop_size": 32},
            "crops by crop_pct already",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_one_line(said: dict[str, Any], why: str) -> None:
    with pytest.raises(WeightsError, match=why) as caught:
        processor_facts(said)
    assert "\n" not in str(caught.value)


def test_means_in_0_to_255_go_with_pixels_that_are_not_rescaled() -> None:
    facts = processor_facts({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3})
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.2] * 3)


@pytest.mark.parametrize("kind", ["DINOv3ViTImageProcessorFast", "SegformerImageProcessor"])
def test_a_class_whose_name_contains_anothers_does_not_have_its_defaults(kind: str) -> None:
    assert "mean" not in processor_facts({"image_processor_type": kind, "size": {"height": 64, "width": 64}})


def test_no_normalization_is_a_mean_of_0_and_a_std_of_1() -> None:
    facts = processor_facts({"do_normalize": False, "image_mean": [0.4] * 3, "image_std": [0.2] * 3})
    assert (facts["mean"], facts["std"]) == ([0.0], [1.0])


def test_the_processor_file_of_transformers_5_is_read_and_must_agree_with_the_older_one() -> None:
    assert merged({"size": 3}, None) == {"size": 3}
    assert merged(None, {"processor_class": "x"}) is None
    assert merged(None, {"image_processor": {"size": 3}}) == {"size": 3}
    assert merged({"size": 3, "resample": 2}, {"image_processor": {"size": 3}}) == {"size": 3, "resample": 2}
    with pytest.raises(WeightsError, match=r"size is 4 in preprocessor_config\.json and 3 in processor_config\.json"):
        merged({"size": 4}, {"image_processor": {"size": 3}})


def test_grey_images_with_the_means_of_three_channels_are_refused_with_what_to_give() -> None:
    spec = ModelSpec(architecture="x", depths=(1,) * 4, dims=(8,) * 4, in_chans=1)
    with pytest.raises(WeightsError, match=r"for grey images give their averages, --mean 0\.449 --std 0\.226"):
        preprocessing_of({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, spec)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"resample": "bicubic"}, {"interpolation": "bicubic"}),
        ({"resample": "PILImageResampling.BILINEAR"}, {"interpolation": "bilinear"}),
        ({"size": [64, 64]}, {"input_size": [64, 64]}),
    ],
    ids=str,
)
def test_other_ways_of_writing_it_mean_the_same(said: dict[str, Any], expected: dict[str, Any]) -> None:
    config = NORMAL | {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}} | said
    assert expected.items() <= processor_facts(config).items()


@pytest.mark.parametrize(
    "said", [{"resample": "cubic"}, {"resample": 4}, {"resample": []}, {"size": [64, 96]}], ids=str
)
def test_a_filter_or_size_that_is_none_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="the image processor has"):
        processor_facts(NORMAL | {"image_processor_type": "ConvNextImageProcessor", "size": 64} | said)
