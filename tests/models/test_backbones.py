"""Backbones of detectors and segmenters, and DINOv3's: which norms their maps have, and what stands beside them."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from reference_models import NECK, Dinov3, OfficialBackbone, maps_of, mm_names
from references import DEPTHS, DIMS, TOLERANCE, Official, State, images, randomize_, relative_error
from torch import Tensor, nn

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.accuracy import oracle
from convnext_deploy.errors import UsageError, WeightsError
from convnext_deploy.models import given
from convnext_deploy.models.checkpoint import Loaded, load
from convnext_deploy.records.base import Task

Maps = tuple[Tensor, ...]
SIZES: dict[str, Any] = {"depths": list(DEPTHS), "hidden_sizes": list(DIMS)}
ALL = (1, 2, 3, 4)


def saved(state: State, folder: Path) -> str:
    torch.save(state, folder / "model.pth")
    return str(folder / "model.pth")


def read(state: State, folder: Path, task: Task = "features", **arguments: Any) -> Loaded:
    return load(saved(state, folder), task=task, image_size=(64, 64), **arguments)


def assert_equal(loaded: Loaded, expected: Maps) -> None:
    with torch.inference_mode():
        found = loaded.model(images())
    found = (found,) if isinstance(found, Tensor) else found
    assert len(found) == len(expected)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) <= TOLERANCE


# One norm a level ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v2", [pytest.param(False, id="V1"), pytest.param(True, id="V2")])
@pytest.mark.parametrize("names", ["official", "mmpretrain"])
@pytest.mark.parametrize("levels", [ALL, (2, 3, 4), (2,)])
@torch.inference_mode()
def test_a_detectors_backbone_gives_its_normalized_maps(
    v2: bool, names: str, levels: tuple[int, ...], tmp_path: Path
) -> None:
    """Those that have a norm, and no others: its own code gives no others."""
    reference: Any = randomize_(OfficialBackbone(v2, levels))
    state = mm_names(reference.state_dict()) if names == "mmpretrain" else reference.state_dict()
    whole = {f"backbone.{key}": value for key, value in state.items()} | NECK
    for loaded in (read(whole, tmp_path), read(whole, tmp_path, weights_key="backbone."), read(state, tmp_path)):
        assert loaded.weights.layout == names
        assert loaded.model.spec.levels == loaded.model.spec.level_norms == levels
        assert_equal(loaded, reference(images()))
    note = read(whole, tmp_path).note
    assert note is not None
    assert "neck.lateral_convs.0.conv.weight, rpn_head.rpn_cls.bias" in note


@torch.inference_mode()
def test_a_detector_with_the_last_map_alone_has_its_norm(tmp_path: Path) -> None:
    """mmpretrain's classifiers call another norm `norm3`; a neck beside the backbone says which it is."""
    reference: Any = randomize_(OfficialBackbone(levels=(4,)))
    state = {f"backbone.{key}": value for key, value in mm_names(reference.state_dict()).items()}
    for key in (None, "backbone."):
        loaded = read(state | NECK, tmp_path, weights_key=key)
        assert loaded.model.spec.levels == (4,)
        assert_equal(loaded, reference(images()))


@torch.inference_mode()
def test_a_classifier_of_mmpretrain_has_maps_without_norms(tmp_path: Path) -> None:
    reference: Any = randomize_(Official(DEPTHS, DIMS, v2=False, classes=7))
    state = {f"backbone.{key.replace('norm.', 'norm3.') if key.startswith('norm.') else key}": value
             for key, value in mm_names(reference.state_dict()).items() if not key.startswith("head.")}  # fmt: skip
    state |= {f"head.fc.{key}": value for key, value in reference.head.state_dict().items()}
    assert_equal(read(state, tmp_path, "classify"), (reference(images()),))
    assert_equal(read(state, tmp_path), maps_of(reference, images()))
    pooled = reference.norm(maps_of(reference, images())[3].mean((2, 3)))
    assert_equal(read(state, tmp_path, "embed"), (pooled,))


@pytest.mark.parametrize("kind", ["ConvNext", "ConvNextV2"])
@pytest.mark.parametrize("levels", [ALL, (2, 4)])
@torch.inference_mode()
def test_a_backbone_of_transformers_gives_its_feature_maps(kind: str, levels: tuple[int, ...], tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, out_features=[f"stage{level}" for level in levels])
    reference: Any = randomize_(getattr(transformers, f"{kind}Backbone")(config))
    reference.save_pretrained(tmp_path / "folder")
    expected = reference(images()).feature_maps
    for loaded in (read(reference.state_dict(), tmp_path), load(str(tmp_path / "folder"), task="features")):
        assert loaded.model.spec.levels == levels
        assert_equal(loaded, expected)


@pytest.fixture(scope="module")
def upernet() -> nn.Module:
    backbone = transformers.ConvNextConfig(**SIZES, out_features=[f"stage{level}" for level in ALL])
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=4, pool_scales=[1], use_auxiliary_head=False
    )
    return randomize_(transformers.UperNetForSemanticSegmentation(config))


@torch.inference_mode()
def test_the_backbone_of_an_upernet_folder_is_read(upernet: Any, tmp_path: Path) -> None:
    upernet.save_pretrained(tmp_path / "folder")
    loaded = load(str(tmp_path / "folder"), task="features")
    assert_equal(loaded, upernet.backbone(images()).feature_maps)
    assert loaded.labels is None
    assert "decode_head." in str(loaded.note)


@torch.inference_mode()
def test_the_backbone_of_a_mask_former_is_found_below_its_prefix(upernet: Any, tmp_path: Path) -> None:
    prefix = "model.pixel_level_module.encoder."
    state = {prefix + key: value for key, value in upernet.backbone.state_dict().items()}
    state |= {
        "model.transformer_module.queries_embedder.weight": torch.ones(3, 3),
        "criterion.empty_weight": torch.ones(5),
    }
    assert_equal(read(state, tmp_path), upernet.backbone(images()).feature_maps)


@pytest.mark.parametrize("task", ["classify", "embed"])
def test_a_backbone_has_no_head(task: Task, tmp_path: Path) -> None:
    state = {f"backbone.{key}": value for key, value in OfficialBackbone().state_dict().items()} | NECK
    with pytest.raises(WeightsError, match="is a backbone: it gives maps and has no head; use --task features"):
        read(state, tmp_path, task)


# Levels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(2, 3, 4), (1, 2), (3,), (1, 4)])
@torch.inference_mode()
def test_levels_choose_maps_and_leave_out_the_stages_after_them(levels: tuple[int, ...], tmp_path: Path) -> None:
    plain, normed = randomize_(Official(DEPTHS, DIMS, v2=False)), randomize_(OfficialBackbone())
    for reference, maps in ((plain, maps_of(plain, images())), (normed, normed(images()))):
        loaded = read(reference.state_dict(), tmp_path, levels=levels)
        assert loaded.model.spec.levels == levels
        assert len(loaded.model.stages) == max(levels)
        assert_equal(loaded, tuple(maps[level - 1] for level in levels))


def test_a_level_without_its_norm_is_refused(tmp_path: Path) -> None:
    state = OfficialBackbone(levels=(2, 3, 4)).state_dict()
    with pytest.raises(WeightsError, match=r"norm for the maps of levels 2,3,4 and none for level 1,"):
        read(state, tmp_path, levels=(1, 2))


def test_levels_are_for_maps(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"levels 2,3 are for --task features, not for embed"):
        read(Official(DEPTHS, DIMS, v2=False).state_dict(), tmp_path, "embed", levels=(2, 3))


# Backbones without norms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_atto_ols", "convnextv2_atto", "convnext_zepto_rms"])
@torch.inference_mode()
def test_timms_features_only_is_read_in_its_own_names(name: str, tmp_path: Path) -> None:
    """As segmentation_models_pytorch contains it too."""
    sizes = {} if name == "convnext_zepto_rms" else {"depths": DEPTHS, "dims": DIMS}  # RMSNorm needs a published one
    reference: Any = randomize_(timm.create_model(name, features_only=True, **sizes))
    state = {f"encoder.model.{key}": value for key, value in reference.state_dict().items()}
    state |= {"decoder.blocks.0.conv1.0.weight": torch.ones(8, 8, 3, 3), "segmentation_head.0.bias": torch.ones(1)}
    loaded = read(state, tmp_path)
    assert loaded.weights.layout == "timm_features"
    assert_equal(loaded, tuple(reference(images())))


@pytest.mark.parametrize(("name", "stages"), [("convnext_atto", 2), ("convnext_atto", 3), ("convnextv2_nano", 2)])
@torch.inference_mode()
def test_a_backbone_that_was_cut_gives_the_maps_that_it_has(name: str, stages: int, tmp_path: Path) -> None:
    """V1 and V2, of no published width and of one; the variant is known where tensors say all of it."""
    sizes = {} if name == "convnextv2_nano" else {"depths": DEPTHS, "dims": DIMS}
    reference: Any = timm.create_model(name, features_only=True, out_indices=range(stages), **sizes)
    randomize_(reference)
    loaded = read(reference.state_dict(), tmp_path)
    assert loaded.model.spec.levels == tuple(range(1, stages + 1))
    assert loaded.model.spec.depths[stages:] == (0,) * (4 - stages)
    assert loaded.model.spec.architecture == ("convnextv2_nano" if name == "convnextv2_nano" else "custom")
    assert loaded.note is not None
    assert f"ends after stage {stages} of 4" in loaded.note
    maps = tuple(reference(images()))
    assert_equal(loaded, maps)
    assert_equal(read(reference.state_dict(), tmp_path, levels=(2,)), maps[1:2])
    judged = oracle.judge(loaded, images().numpy(), tuple(x.numpy() for x in loaded.model(images())))
    assert judged.name.startswith("timm"), judged


def test_what_a_cut_backbone_has_not_is_refused(tmp_path: Path) -> None:
    reference = timm.create_model("convnext_atto", features_only=True, out_indices=(0, 1), depths=DEPTHS, dims=DIMS)
    state = reference.state_dict()
    with pytest.raises(WeightsError, match=r"ends after stage 2 of 4, and the map of level 3 is asked for; .* 1,2$"):
        read(state, tmp_path, levels=(1, 3))
    with pytest.raises(WeightsError, match="is a backbone"):
        read(state, tmp_path, "embed")
    whole = timm.create_model("convnext_atto", features_only=True, depths=DEPTHS, dims=DIMS).state_dict()
    damaged = {name: value for name, value in whole.items() if not name.startswith("stages_2.")}
    with pytest.raises(WeightsError, match="is incomplete: stage 2 has no block 0"):
        read(damaged, tmp_path)
    classifier = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS).state_dict()
    for last in ("stages.3.", "stages.2."):  # nobody cuts off stages and keeps the head
        classifier = {name: value for name, value in classifier.items() if not name.startswith(last)}
        with pytest.raises(WeightsError, match=f"is incomplete: stage {last[-2]} has no block 0"):
            read(classifier, tmp_path)


def test_a_network_of_three_or_five_stages_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    """transformers builds three; timm's own class has four in its code."""
    config = transformers.ConvNextConfig(num_stages=3, depths=DEPTHS[:3], hidden_sizes=DIMS[:3], num_labels=5)
    three = transformers.ConvNextForImageClassification(config).state_dict()
    why = rf"expected four stages, and it has 3 \(depths {', '.join(map(str, DEPTHS[:3]))}\): .* --task features"
    for task in ("classify", "features"):
        with pytest.raises(WeightsError, match=why):
            read(three, tmp_path, task)
    bare = {name: value for name, value in three.items() if not name.startswith(("classifier.", "convnext.layernorm"))}
    assert read(bare, tmp_path).model.spec.depths[:3] == DEPTHS[:3]  # as the line says
    four = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS).state_dict()
    five = four | {name.replace("stages.3", "stages.4"): one for name, one in four.items() if "stages.3" in name}
    with pytest.raises(WeightsError, match=r"has more than four stages \(stages\.4\.0\..*\); expected a ConvNeXt's 4"):
        read(five, tmp_path, "classify")


@pytest.mark.parametrize("stages", [2, 3])
def test_what_stands_beside_a_cut_backbone_says_all_four_stages(stages: int, tmp_path: Path) -> None:
    reference: Any = timm.create_model("convnext_atto", features_only=True, out_indices=range(stages))
    loaded = load(given.weights("weights", reference), task="features", image_size=(64, 64))
    assert loaded.model.spec.depths == (*(2, 2, 6)[:stages], *(0,) * (4 - stages))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnext_atto", "num_classes": 0}))
    assert load(str(tmp_path), task="features", image_size=(64, 64)).model.spec == loaded.model.spec
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnext_tiny", "num_classes": 0}))
    with pytest.raises(WeightsError, match="its configuration says depths"):
        load(str(tmp_path), task="features", image_size=(64, 64))


def test_a_cut_network_that_several_variants_begin_with_is_of_none(tmp_path: Path) -> None:
    """Tiny and small: what they have in common is known, and what they have not is in no tensor that is here."""
    reference = timm.create_model("convnext_tiny", features_only=True, out_indices=(0, 1))
    spec = read(reference.state_dict(), tmp_path).model.spec
    assert (spec.architecture, spec.depths, spec.dims) == ("custom", (3, 3, 0, 0), (96, 192, 0, 0))


@torch.inference_mode()
def test_the_body_of_torchvisions_detectors_is_read(tmp_path: Path) -> None:
    from torchvision.models.convnext import CNBlockConfig

    outs = [*DIMS[1:], None]
    stages = [CNBlockConfig(*stage) for stage in zip(DIMS, outs, DEPTHS, strict=True)]
    model = randomize_(torchvision.models.ConvNeXt(stages))
    layers = {str(index): str(index // 2) for index in (1, 3, 5, 7)}
    body = torchvision.models._utils.IntermediateLayerGetter(model.features, layers)
    state = {f"backbone.body.{key}": value for key, value in body.state_dict().items()}
    loaded = read(state | {"backbone.fpn.inner_blocks.0.0.weight": torch.ones(8, 16, 1, 1)}, tmp_path)
    assert loaded.weights.layout == "torchvision_features"
    assert_equal(loaded, tuple(body(images()).values()))


# DINOv3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov3() -> nn.Module:
    return randomize_(transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**SIZES)))


@torch.inference_mode()
def test_the_official_dinov3_gives_its_class_token_and_maps(tmp_path: Path) -> None:
    reference: Any = randomize_(Dinov3())
    state = reference.state_dict()
    maps = maps_of(reference, images())
    assert {"norms.3.weight", "norm.weight"} < state.keys()
    for prefix in ("", "teacher.backbone."):
        named = {prefix + key: value for key, value in state.items()}
        embedding = read(named, tmp_path, "embed")
        assert_equal(embedding, (reference.norm(maps[3].mean((2, 3))),))
        assert_equal(read(named, tmp_path), maps)
        assert (embedding.weights.layout, embedding.weights.licence) == ("dinov3", "dinov3-license")


def test_a_second_copy_that_differs_is_refused(tmp_path: Path) -> None:
    state = dict(Dinov3().state_dict())
    state["norms.3.bias"] = state["norm.bias"] + 1e-3
    with pytest.raises(WeightsError, match=r"norms\.3\.bias differs from the head\.norm\.bias that it is a copy of"):
        read(state, tmp_path, "embed")


@torch.inference_mode()
def test_a_dinov3_of_transformers_gives_its_pooler_and_its_maps(dinov3: Any, tmp_path: Path) -> None:
    """Files leave out the `model.` that a module's own state dict has."""
    dinov3.save_pretrained(tmp_path / "folder")
    expected = dinov3(images(), output_hidden_states=True)
    for source in (str(tmp_path / "folder"), saved(dinov3.state_dict(), tmp_path)):
        loaded = load(source, task="embed")
        assert_equal(loaded, (expected.pooler_output,))
        assert (loaded.weights.layout, loaded.weights.licence) == ("dinov3_transformers", "dinov3-license")
        assert_equal(load(source, task="features"), expected.hidden_states[-4:])


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "in a detector"])
@torch.inference_mode()
def test_a_dinov3_backbone_of_transformers_gives_the_maps_of_its_config(whole: bool, tmp_path: Path) -> None:
    """It has no norms, which would tell which maps."""
    config = transformers.DINOv3ConvNextConfig(**SIZES, out_features=["stage2", "stage4"])
    model: Any = randomize_(transformers.DINOv3ConvNextBackbone(config))
    model.save_pretrained(tmp_path / "folder")
    if whole:
        detector = {"model_type": "rt_detr", "backbone_config": model.config.to_dict()}
        (tmp_path / "folder/config.json").write_text(json.dumps(detector))
    loaded = load(str(tmp_path / "folder"), task="features")
    assert loaded.model.spec.levels == (2, 4)
    assert_equal(loaded, model(images()).feature_maps)
    assert_equal(load(str(tmp_path / "folder"), task="features", levels=(2,)), model(images()).feature_maps[:1])


@torch.inference_mode()
def test_a_pyramid_that_has_a_stem_is_no_second_network(tmp_path: Path) -> None:
    """MaskFormer's `decoder.fpn.stem` is called as timm's stem."""
    names = [f"stage{level}" for level in ALL]
    backbone = transformers.ConvNextConfig(**SIZES, out_features=names)
    transformer = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=2, decoder_ffn_dim=2, num_queries=2,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=transformer, fpn_feature_size=32, mask_feature_size=32
    )
    model: Any = randomize_(transformers.MaskFormerForInstanceSegmentation(config))
    model.save_pretrained(tmp_path / "folder")
    loaded = load(str(tmp_path / "folder"), task="features")
    assert_equal(loaded, model.model.pixel_level_module.encoder(images()).feature_maps)


@torch.inference_mode()
def test_a_dinov3s_patch_tokens_are_those_of_transformers(dinov3: Any, tmp_path: Path) -> None:
    dinov3.save_pretrained(tmp_path / "folder")
    expected = dinov3(images())
    tokens = expected.last_hidden_state[:, 1:]
    assert tokens.shape[1] > 1
    for source in (str(tmp_path / "folder"), saved(dinov3.state_dict(), tmp_path)):
        assert_equal(load(source, task="embed", patch_tokens=True), (expected.pooler_output, tokens))
    reference: Any = randomize_(Dinov3())
    last = maps_of(reference, images())[3]
    pooled = last.mean((2, 3))
    official = load(saved(reference.state_dict(), tmp_path), task="embed", patch_tokens=True)
    assert_equal(official, (reference.norm(pooled), reference.norm(last.flatten(2).mT)))
    with pytest.raises(WeightsError, match="--patch-tokens is for --task embed, not for features"):
        load(str(tmp_path / "folder"), task="features", patch_tokens=True)


@pytest.mark.parametrize(
    ("format", "dynamic"),
    [
        ("torchscript", True),
        ("onnx", True),
        pytest.param("onnx", False, marks=pytest.mark.slow),
        pytest.param("openvino", True, marks=pytest.mark.slow),
        pytest.param("openvino", False, marks=pytest.mark.slow),
    ],
)
def test_patch_tokens_are_a_second_output_of_an_artifact(
    format: str, dynamic: bool, dinov3: Any, tmp_path: Path
) -> None:
    dinov3.save_pretrained(tmp_path / "folder")
    made = convnext_deploy.export(
        tmp_path / "folder", task="embed", patch_tokens=True, format=format, image_size=64,
        dynamic_image_size=dynamic, out=tmp_path / "out",
    )  # fmt: skip
    assert [output.name for output in made.manifest.outputs] == ["embedding", "patch_tokens"]
    assert made.manifest.oracle is not None
    assert made.manifest.oracle.name.startswith("transformers")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 96 if dynamic else 64, 64)).astype(np.float32)
    pooled, tokens = convnext_deploy.load(tmp_path / "out").run(pixels)
    with torch.inference_mode():
        expected = dinov3(torch.from_numpy(pixels))
    np.testing.assert_allclose(pooled, expected.pooler_output, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tokens, expected.last_hidden_state[:, 1:], rtol=1e-3, atol=1e-4)


def test_a_release_of_transformers_without_the_class_judges_nothing_and_is_named(
    dinov3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dinov3.save_pretrained(tmp_path / "folder")
    older = types.ModuleType("transformers")
    older.__spec__ = transformers.__spec__
    monkeypatch.setitem(sys.modules, "transformers", older)
    made = convnext_deploy.export(
        tmp_path / "folder", task="embed", format="eager", image_size=64, out=tmp_path / "out"
    )  # fmt: skip
    assert made.manifest.oracle is not None
    assert (made.manifest.oracle.name, made.manifest.oracle.why) == (
        "self", "transformers does not take the file: this release has no DINOv3ConvNextConfig; update it"
    )  # fmt: skip


def test_native_and_other_tasks_refuse_patch_tokens(dinov3: Any, tmp_path: Path) -> None:
    dinov3.save_pretrained(tmp_path / "folder")
    with pytest.raises(UsageError, match="format native gives no patch tokens"):
        convnext_deploy.export(
            tmp_path / "folder", task="embed", patch_tokens=True, format="native", image_size=64, out=tmp_path / "out"
        )


@torch.inference_mode()
def test_every_norm_of_a_dinov3_has_the_epsilon_of_its_config(tmp_path: Path) -> None:
    config = transformers.DINOv3ConvNextConfig(**SIZES, layer_norm_eps=0.3, image_size=96)
    reference: Any = randomize_(transformers.DINOv3ConvNextModel(config))
    reference.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), task="embed")
    assert loaded.model.spec.image_size == (96, 96)
    assert_equal(loaded, (reference(images()).pooler_output,))


@torch.inference_mode()
@pytest.mark.skipif(not hasattr(transformers, "DINOv3ConvNextBackbone"), reason="transformers before 5.0 has none")
def test_a_dinov3_backbone_of_transformers_gives_its_feature_maps(tmp_path: Path) -> None:
    config = transformers.DINOv3ConvNextConfig(**SIZES, out_features=["stage2", "stage4"])
    reference: Any = randomize_(transformers.DINOv3ConvNextBackbone(config))
    reference.save_pretrained(tmp_path)
    assert_equal(load(str(tmp_path), task="features", levels=(2, 4)), reference(images()).feature_maps)


@pytest.mark.parametrize(
    ("of", "licence"),
    [("dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb.pth", "dinov3-license"), ("model.pth", None)],
)
def test_the_name_of_a_file_tells_its_licence(of: str, licence: str | None, tmp_path: Path) -> None:
    torch.save(Official(DEPTHS, DIMS, v2=False).state_dict(), tmp_path / of)
    assert load(str(tmp_path / of), task="embed").weights.licence == licence


def test_a_licence_that_has_to_be_passed_on_is_in_the_artifact(
    dinov3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convnext_deploy import cli

    dinov3.save_pretrained(tmp_path / "folder")
    out = tmp_path / "artifact"
    command = ["export", "--weights", str(tmp_path / "folder"), "--task", "embed", "--format", "eager"]
    assert cli.run([*command, "--image-size", "64", "--out", str(out)]) == 0
    text = (out / "dinov3-license.md").read_text("utf-8")
    assert text.startswith("# DINOv3 License")
    assert "you shall provide a copy of this Agreement" in text
    second = capsys.readouterr().out.splitlines()[1]
    assert second.startswith("LICENCE of the weights: dinov3-license; it binds this artifact too")
    assert cli.run(["inspect", str(out)]) == 0
    assert "file: dinov3-license.md" in capsys.readouterr().out


# Formats -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfficialBackbone, Path]:
    reference: Any = randomize_(OfficialBackbone())
    assert isinstance(reference, OfficialBackbone)
    path = tmp_path_factory.mktemp("detector") / "detector.pth"
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in reference.state_dict().items()} | NECK}, path)
    return reference, path


SLOW = pytest.mark.slow
# Of AOTInductor's maps tests/formats/test_formats.py has four; what it compiles is the graph of `pt2`.
FORMATS = [
    "eager", "onnx", "torchscript", "native", pytest.param("openvino", marks=SLOW), pytest.param("pt2", marks=SLOW),
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_normalized_maps_that_are_asked_for(
    format: str, detector: tuple[OfficialBackbone, Path], need_format: Callable[[str], None], tmp_path: Path
) -> None:
    need_format(format)
    reference, path = detector
    made = api.export(
        str(path),
        format=format,
        task="features",
        levels=(2, 3),
        image_size=(64, 64),
        batch=(1, 2, 4),
        out=tmp_path / "a",
    )
    assert [output.name for output in made.manifest.outputs] == ["stride8", "stride16"]
    assert made.manifest.oracle is not None
    assert made.manifest.oracle.name.startswith("timm ")
    found = api.load(made.path).run(images().numpy())
    with torch.inference_mode():
        expected = reference(images())[1:3]
    errors = [relative_error(torch.from_numpy(a), b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize(
    ("format", "precision"),
    [pytest.param("onnx", "fp16", marks=SLOW), pytest.param("openvino", "bf16", marks=SLOW), ("native", "bf16")],
)
def test_norms_of_maps_stay_in_fp32(
    format: str,
    precision: Any,
    detector: tuple[OfficialBackbone, Path],
    need_format: Callable[[str], None],
    tmp_path: Path,
) -> None:
    """The export holds the file to it: it is read back, tensor by tensor."""
    need_format(format)
    made = api.export(
        str(detector[1]), format=format, precision=precision, task="features", levels="2,4", image_size=64,
        batch=2, out=tmp_path / "a",
    )  # fmt: skip
    assert {output.dtype for output in made.manifest.outputs} == {"float32"}


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=SLOW), pytest.param("openvino", marks=SLOW), "native"])
def test_a_plan_in_8_bits_has_the_same_levels_and_norms(
    format: Any, detector: tuple[OfficialBackbone, Path], need_format: Callable[[str], None], tmp_path: Path
) -> None:
    need_format(format)
    wanted: dict[str, Any] = {"task": "features", "levels": [1, 3], "image_size": 64}
    plan = api.quantize(
        str(detector[1]), out=tmp_path / "plan.json", calibration="random", target=format, images=32, **wanted
    )
    assert not any(name.startswith(("stages.3", "downsamples.2", "head")) for name in plan.operations)
    made = api.export(
        str(detector[1]), format=format, plan=tmp_path / "plan.json", out=tmp_path / "a", batch=2, **wanted
    )
    assert made.manifest.export.eight_bits == "int8"
    found = api.load(made.path).run(images().numpy())
    with torch.inference_mode():
        expected = detector[0](images())
    errors = [relative_error(torch.from_numpy(a), expected[level - 1]) for a, level in zip(found, (1, 3), strict=True)]
    assert max(errors) < 0.1
