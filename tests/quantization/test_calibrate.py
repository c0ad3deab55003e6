"""Calibration on the bundled images: beside timm's own module, beside itself interrupted, and what it refuses."""

import io
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from convnext_deploy.cluster.crew import pieces
from convnext_deploy.data import preprocess, sources
from convnext_deploy.data.image_source import chosen
from convnext_deploy.errors import CheckFailed, DataError, UsageError
from convnext_deploy.models import checkpoint, files, parameters, passes, registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.quantization import calibrate as module
from convnext_deploy.quantization.calibrate import Calibration, calibrate, report
from convnext_deploy.quantization.counting import Piece, Runner, Work, here, joined
from convnext_deploy.quantization.images import content_sha256, open_images, random_images
from convnext_deploy.quantization.observers import Histogram, histogram, merged, to_arrays
from convnext_deploy.records.manifest import ModelSpec, Preprocessing

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist"
IMAGES = 20
NAMES = (
    "stem.convs.0",
    "stages.0.0.expand.linear",
    "stages.2.1.project.linear",
    "downsamples.1.conv",
    "head.classifier",
)
# What the same tensors are inputs of in timm's module.
TIMM_NAMES = ("stem.0", "stages.0.blocks.0.mlp.fc1", "stages.2.blocks.1.mlp.fc2", "stages.2.downsample.1", "head.fc")


@pytest.fixture(scope="module")
def loaded() -> checkpoint.Loaded:
    return checkpoint.load(str(EXAMPLE / "model.safetensors"))


@pytest.fixture(scope="module")
def source() -> sources.ImageSource:
    return sources.open_source(str(EXAMPLE / "test-2000.parquet"))


@pytest.fixture
def run(loaded: checkpoint.Loaded, source: sources.ImageSource) -> Callable[..., Calibration]:
    """`calibrate` of the bundled model on the bundled images, with what a test changes."""

    def calibrated(**changes: Any) -> Calibration:
        arguments: dict[str, Any] = {
            "model": loaded.model, "names": NAMES, "source": source, "preprocessing": loaded.preprocessing,
            "images": IMAGES, "batch": 4,
        }  # fmt: skip
        return calibrate(**(arguments | changes))

    return calibrated


@pytest.fixture(scope="module")
def pixels(loaded: checkpoint.Loaded, source: sources.ImageSource) -> NDArray[np.uint8]:
    """Of every hundredth image, which are those that are calibrated on, (N, C, H, W)."""
    spec = loaded.model.spec
    to_pixels = preprocess.transform(loaded.preprocessing, spec.image_size, spec.in_chans)
    return np.stack([to_pixels(source.read(index)) for index in range(0, 2000, 2000 // IMAGES)])


def assert_same(a: Histogram, b: Histogram) -> None:
    for left, right in zip(to_arrays(a).values(), to_arrays(b).values(), strict=True):
        np.testing.assert_array_equal(left, right)


def assert_same_calibration(a: Calibration, b: Calibration) -> None:
    assert (a.identity, a.inputs) == (b.identity, b.inputs)
    assert a.statistics.keys() == b.statistics.keys()
    for key, statistics in a.statistics.items():
        assert_same(statistics, b.statistics[key])


def tensors(model: nn.Module, names: tuple[str, ...], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of modules, by torch's hooks on one whole batch."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found.__setitem__(name, inputs[0])
        )
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


# What is counted ------------------------------------------------------------------------------------------------------


def test_the_tensors_are_those_of_timms_own_module(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded, pixels: NDArray[np.uint8]
) -> None:
    spec = loaded.model.spec
    theirs = timm.create_model(
        "convnext_atto", depths=spec.depths, dims=spec.dims, conv_mlp=False, in_chans=1, num_classes=10,
        ls_init_value=1e-6,
    ).eval()  # fmt: skip
    theirs.load_state_dict(files.read_file(EXAMPLE / "model.safetensors").state)
    images = torch.from_numpy(preprocess.as_input(pixels, loaded.preprocessing, "float32"))
    found = run()
    values = tensors(theirs, TIMM_NAMES, images)
    for name, timm_name in zip(NAMES, TIMM_NAMES, strict=True):
        value = values[timm_name]
        whole = found.whole(name)
        channels = value.movedim(1, -1) if value.ndim == 4 and "conv" in name else value
        expected = histogram(channels, name)
        for ours, other in ((whole.low, expected.low), (whole.high, expected.high)):
            np.testing.assert_allclose(ours, other, rtol=0, atol=1e-4 * float(expected.high.max()))
        # In a batch of another size a value on the edge of a bin may round into the next.
        moved = (whole.counts.cumsum(1) - expected.counts.cumsum(1)).abs().sum()
        assert int(moved) <= 1e-4 * value.numel()
        assert int(whole.counts.sum()) == value.numel()


def test_the_halves_are_the_even_and_the_odd_images_whatever_the_batch(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded, pixels: NDArray[np.uint8]
) -> None:
    images = torch.from_numpy(preprocess.as_input(pixels, loaded.preprocessing, "float32"))  # the stem's own input
    for batch in (1, 3, IMAGES, 64):
        even, odd = run(batch=batch, names=NAMES[:1]).halves("stem.convs.0")
        for part, expected in ((even, images[0::2]), (odd, images[1::2])):
            assert np.array_equal(part.counts, histogram(expected.movedim(1, -1), "x").counts)
            assert part.images == IMAGES // 2


def test_the_whole_is_both_halves(run: Callable[..., Calibration]) -> None:
    found = run()
    assert_same(found.whole(NAMES[1]), merged(*found.halves(NAMES[1])))
    assert found.whole(NAMES[1]).images == IMAGES


def test_a_model_that_takes_uint8_is_given_raw_pixels(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded, pixels: NDArray[np.uint8]
) -> None:
    raw = checkpoint.load(str(EXAMPLE / "model.safetensors")).model
    passes.fold_norm_affine(raw)
    passes.fold_preprocessing(raw, loaded.preprocessing)
    whole = run(model=raw).whole("stem.convs.0")
    assert (float(whole.low[0]), float(whole.high[0])) == (pixels.min(), pixels.max())


def test_the_channels_of_a_linear_are_its_last_axis_and_of_a_convolution_its_second(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded
) -> None:
    found = run(names=("stages.1.0.dwconv_norm.conv", "stages.1.0.project.linear"))
    width = loaded.model.spec.dims[1]
    assert len(found.whole("stages.1.0.dwconv_norm.conv").low) == width
    assert len(found.whole("stages.1.0.project.linear").low) == 4 * width


def test_the_model_is_left_without_hooks(run: Callable[..., Calibration], loaded: checkpoint.Loaded) -> None:
    run(images=2)
    assert not any(found._forward_pre_hooks for found in loaded.model.modules())


# Interrupted and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 8, 12], ids=["in the first batch", "after a save", "between two saves"])
def test_an_interrupted_calibration_goes_on_and_ends_as_if_it_had_not_been(
    run: Callable[..., Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 8)
    file = tmp_path / "state"

    def interrupt(done: int, images: int) -> None:
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(resume=file, progress=interrupt)
    steps: list[tuple[int, int]] = []
    resumed = run(resume=file, progress=lambda done, images: steps.append((done, images)))
    assert steps[0] == (max(4, stop), IMAGES)
    assert steps[-1] == (IMAGES, IMAGES)
    assert_same_calibration(resumed, run())


def shards(size: int) -> Runner:
    """Runs parts of the source as workers do, each as a source of its own, the last one first."""

    def ran(work: Work, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        for part in reversed(pieces(ranges, size)):
            images = chosen(work.source, list(part))
            yield joined(list(here(1)(replace(work, source=images, first=part.start), [range(len(part))])))

    return ran


@pytest.mark.parametrize("size", [4, 12], ids=["of a batch", "of several"])
def test_shards_in_any_order_have_the_statistics_of_one_process(run: Callable[..., Calibration], size: int) -> None:
    assert_same_calibration(run(runner=shards(size)), run())


def test_what_shards_left_between_them_is_done_by_the_next_call(
    run: Callable[..., Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images in the middle and at the end are done, those between are not."""

    def interrupted(work: Work, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        for number, piece in enumerate(shards(4)(work, ranges)):
            if number in (0, 2):
                yield piece
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(resume=tmp_path / "state", runner=interrupted)
    steps: list[tuple[int, int]] = []
    resumed = run(resume=tmp_path / "state", progress=lambda *step: steps.append(step))
    assert steps[0] == (8, IMAGES)
    assert_same_calibration(resumed, run())


def test_noise_of_channels_that_no_image_has_is_the_same_in_shards() -> None:
    model = parameters.random_model(msgspec.structs.replace(registry.spec("test_convnext"), in_chans=5))
    facts = Preprocessing(mean=(0.5,) * 5, std=(0.5,) * 5)
    noise, names = random_images(8, model.spec.image_size), ("stem.convs.0",)
    one, other = (
        calibrate(model.eval(), names, noise, preprocessing=facts, images=8, batch=2, runner=runner)
        for runner in (None, shards(4))
    )
    assert_same_calibration(one, other)


def test_an_interruption_inside_a_batch_leaves_nothing_of_it(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded, tmp_path: Path
) -> None:
    calls = 0

    def interrupt(_: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hook = loaded.model.get_submodule("head").register_forward_pre_hook(interrupt)  # all but the head's are counted
    try:
        with pytest.raises(KeyboardInterrupt):
            run(resume=tmp_path / "state")
    finally:
        hook.remove()
    assert_same_calibration(run(resume=tmp_path / "state"), run())


def test_a_finished_file_is_a_calibration_without_running_the_model(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(resume=tmp_path / "state")
    monkeypatch.setattr(ConvNeXt, "forward", None)
    assert_same_calibration(run(resume=tmp_path / "state"), first)


def test_what_the_images_look_like_and_what_the_model_says_of_them_is_kept(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded, pixels: NDArray[np.uint8]
) -> None:
    found = run().inputs
    assert found is not None
    wide = pixels.reshape(IMAGES, -1).astype(np.float64) / 255
    np.testing.assert_allclose(found.mean + found.mean_spread, (wide.mean(1).mean(), wide.mean(1).std()), atol=1e-6)
    np.testing.assert_allclose(found.std + found.std_spread, (wide.std(1).mean(), wide.std(1).std()), atol=1e-6)
    images = preprocess.as_input(pixels, loaded.preprocessing, "float32")
    with torch.no_grad():
        logits = loaded.model(torch.from_numpy(images))
    assert found.classes == tuple(torch.bincount(logits.argmax(1), minlength=10).tolist())
    assert run(source=random_images(IMAGES, (28, 28))).inputs is None  # noise is no reference


def test_a_file_without_them_is_refused(run: Callable[..., Calibration], tmp_path: Path) -> None:
    run(resume=tmp_path / "state")
    kept = load_file(tmp_path / "state")
    with safe_open(tmp_path / "state", framework="numpy") as file:
        facts = file.metadata()
    save_file({key: array for key, array in kept.items() if not key.startswith("images/")}, tmp_path / "state", facts)
    with pytest.raises(
        UsageError, match="does not contain a calibration: it has no 'images'; remove it or name another file"
    ):
        run(resume=tmp_path / "state")


def test_progress_starts_at_nothing_and_ends_with_all_images(run: Callable[..., Calibration]) -> None:
    steps: list[tuple[int, int]] = []
    run(images=6, progress=lambda done, images: steps.append((done, images)))
    assert steps == [(0, 6), (4, 6), (6, 6)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": IMAGES - 2}, "images"),
        ({"batch": 5}, "batch"),
        ({"names": NAMES[1:]}, "names"),
        ({"preprocessing": Preprocessing(mean=(0.5,), std=(0.5,))}, "preprocessing"),
    ],
)
def test_the_file_of_another_calibration_is_refused(
    run: Callable[..., Calibration], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(resume=tmp_path / "state")
    with pytest.raises(UsageError, match=rf"is of another calibration \(it differs in .*{named}") as refused:
        run(resume=tmp_path / "state", **change)
    assert "\n" not in str(refused.value)


def test_the_file_of_other_weights_is_refused(
    run: Callable[..., Calibration], loaded: checkpoint.Loaded, tmp_path: Path
) -> None:
    run(resume=tmp_path / "state", images=2)
    other = checkpoint.load(str(EXAMPLE / "model.safetensors")).model
    with torch.no_grad():
        other.get_parameter("head.classifier.bias")[0] += 1e-6
    with pytest.raises(UsageError, match="weights_sha256"):
        run(resume=tmp_path / "state", images=2, model=other)


def test_the_file_of_images_with_the_same_names_and_other_pixels_is_refused(
    run: Callable[..., Calibration], source: sources.ImageSource, tmp_path: Path
) -> None:
    run(resume=tmp_path / "state")
    changed = replace(source, read_bytes=lambda index: source.read_bytes(1 if index == 0 else index))
    assert changed.sha256 == source.sha256
    with pytest.raises(UsageError, match=r"differs in data_sha256\)"):
        run(resume=tmp_path / "state", source=changed)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x02\0\0\0\0\0\0\0{}"], ids=["empty", "text", "no facts"])
def test_a_damaged_file_is_refused(run: Callable[..., Calibration], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(UsageError, match="does not contain a calibration") as refused:
        run(resume=tmp_path / "state")
    assert "\n" not in str(refused.value)


def test_a_file_that_could_not_be_written_is_refused_before_any_work(
    run: Callable[..., Calibration], tmp_path: Path
) -> None:
    steps: list[int] = []
    with pytest.raises(UsageError, match="absent or not writable"):
        run(resume=tmp_path / "absent" / "state", progress=lambda done, _: steps.append(done))
    assert not steps


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_corrupt_image_is_refused_by_name_and_not_left_out(
    run: Callable[..., Calibration], source: sources.ImageSource
) -> None:
    damaged = replace(
        source, read_bytes=lambda index: source.read_bytes(index)[: 60 if index == 700 else None]
    )  # one of those that are taken
    with pytest.raises(DataError, match="calibration leaves none out") as refused:
        run(source=damaged)
    assert source.names[700] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_corrupt_images_are_said_at_once(run: Callable[..., Calibration], source: sources.ImageSource) -> None:
    """And not one an attempt."""
    damaged = replace(
        source, read_bytes=lambda index: source.read_bytes(index)[: 60 if 700 <= index < 1450 else None]
    )  # eight of those that are taken
    listing = re.escape(", ".join(source.names[index] for index in range(800, 1300, 100)))
    with pytest.raises(DataError, match=rf"replace or remove it and 7 more \({listing}, \.\.\.\), calibration leaves"):
        run(source=damaged)


def test_an_image_that_has_gone_is_refused_by_name(
    run: Callable[..., Calibration], source: sources.ImageSource
) -> None:
    def read_bytes(index: int) -> bytes:
        if index == 700:
            raise FileNotFoundError(2, "No such file or directory")
        return source.read_bytes(index)

    with pytest.raises(DataError, match="cannot be read") as refused:
        run(source=replace(source, read_bytes=read_bytes))
    assert source.names[700] in str(refused.value)


def test_fewer_images_than_asked_for_are_refused(run: Callable[..., Calibration]) -> None:
    with pytest.raises(DataError, match="has 2,000 images; 2001 were asked for"):
        run(images=2001)


@pytest.mark.parametrize("change", [{"images": 1}, {"images": 0}, {"batch": 0}])
def test_too_few_images_are_refused(run: Callable[..., Calibration], change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 2 images and a batch of at least 1"):
        run(**change)


@pytest.mark.parametrize(
    ("name", "found"), [("stages.0.9.expand.linear", "nothing"), ("stages.0.0.expand", "an? Expand")]
)
def test_a_name_that_is_no_linear_and_no_convolution_is_refused(
    run: Callable[..., Calibration], name: str, found: str
) -> None:
    with pytest.raises(UsageError, match=f"{found} at '{name}'"):
        run(names=(name,))


def test_a_tensor_that_overflows_is_refused_by_name(run: Callable[..., Calibration]) -> None:
    model = checkpoint.load(str(EXAMPLE / "model.safetensors")).model
    with torch.no_grad():
        model.get_parameter("stages.2.1.expand.linear.bias")[3] = torch.inf
    with pytest.raises(CheckFailed, match=r"stages\.2\.1\.project\.linear contains NaN or infinite"):
        run(model=model)


# Noise ----------------------------------------------------------------------------------------------------------------


def test_noise_is_given_only_where_it_is_asked_for_and_is_marked(
    run: Callable[..., Calibration], source: sources.ImageSource, loaded: checkpoint.Loaded
) -> None:
    size = loaded.model.spec.image_size
    noise = open_images("random", None, images=4, image_size=size)
    assert report(run(source=noise, images=4), "minmax", "u8_asymmetric").random
    assert not report(run(images=4), "minmax", "u8_asymmetric").random
    with pytest.raises(DataError, match="does not exist"):
        open_images("randomly", None, images=4, image_size=size)
    assert open_images(str(EXAMPLE / "test-2000.parquet"), None, images=4, image_size=size).names == source.names


def test_noise_is_the_same_for_the_same_seed() -> None:
    first, again, other = (random_images(2, (32, 48), seed) for seed in (0, 0, 1))
    assert content_sha256(first) == content_sha256(again) != content_sha256(other)
    assert first.read_bytes(0) != first.read_bytes(1)
    assert Image.open(io.BytesIO(first.read_bytes(0))).size == (48, 32)


# The report -----------------------------------------------------------------------------------------------------------


def test_a_report_says_what_the_ranges_come_from(run: Callable[..., Calibration], source: sources.ImageSource) -> None:
    found = run()
    record = report(found, "percentile", "s8_symmetric", percentile=99.9)
    assert (record.data, record.images, record.method, record.scheme) == (
        source.name, IMAGES, "percentile", "s8_symmetric",
    )  # fmt: skip
    assert record.percentile == 99.9
    assert report(found, "mse", "s8_symmetric").percentile is None
    assert tuple(tensor.name for tensor in record.tensors) == NAMES
    assert record.data_sha256 == content_sha256(sources.subset(source, IMAGES))
    for tensor in record.tensors:
        whole = found.whole(tensor.name)
        assert tensor.low == -tensor.high
        assert (tensor.min, tensor.max) == (float(whole.low.min()), float(whole.high.max()))
        assert 0 < tensor.clip_rate < 0.002 or tensor.name in ("stem.convs.0", "head.classifier")  # few distinct values


def made_of(even: torch.Tensor, odd: torch.Tensor, run: Callable[..., Calibration]) -> Calibration:
    """A calibration with the given values (N, ..., C) in place of one module's."""
    statistics = {"a/even": histogram(even, "a"), "a/odd": histogram(odd, "a")}
    found = run(images=2)
    return Calibration(found.data, msgspec.structs.replace(found.identity, names=("a",)), statistics)


def test_a_channel_above_ten_times_the_median_is_listed_and_no_more_than_sixteen(
    run: Callable[..., Calibration],
) -> None:
    values = torch.ones(2, 3, 50)
    values[..., 7], values[..., 9], values[..., 11] = -30.0, 10.5, 9.9
    (tensor,) = report(made_of(values, values, run), "minmax", "s8_symmetric").tensors
    assert tensor.outlier_channels == ((7, 30.0), (9, 10.5))
    values[..., :20] = torch.arange(100, 120).float()
    (tensor,) = report(made_of(values, values, run), "minmax", "s8_symmetric").tensors
    assert [channel for channel, _ in tensor.outlier_channels] == list(range(19, 3, -1))


def test_halves_that_differ_are_told(run: Callable[..., Calibration]) -> None:
    values = torch.linspace(-1, 1, 60).reshape(2, 10, 3)
    (same,) = report(made_of(values, values, run), "minmax", "s8_symmetric").tensors
    assert same.halves_difference == 0
    (apart,) = report(made_of(values, values * 2, run), "minmax", "u8_asymmetric").tensors
    assert apart.halves_difference == pytest.approx(1 / 4)  # an end moves by 1, and the range is 4 wide


def test_a_model_with_grn_and_overlapping_stem_is_calibrated_too(source: sources.ImageSource) -> None:
    spec = ModelSpec(
        architecture="custom", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), stem="overlap", grn=True, layer_scale=False,
        num_classes=3, image_size=(64, 64),
    )  # fmt: skip
    names = ("stem.convs.1", "stages.3.0.project.linear")
    imagenet = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    found = calibrate(parameters.random_model(spec), names, source, preprocessing=imagenet, images=4, batch=3)
    record = report(found, "mse", "u8_asymmetric")
    assert all(tensor.low < 0 < tensor.high for tensor in record.tensors)
