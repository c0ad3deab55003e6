"""The rows of the table in `docs/reference/checkpoints.md`: checkpoints as people have them, each with its oracle.

`scripts/make_checkpoints.py` writes the table, and `test_checkpoint_rows` holds every row against what happens.
"""

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segmenters
import timm
import torch
import transformers
from reference_models import (
    NECK,
    Dinov3,
    OfficialBackbone,
    clip,
    maps_of,
    mm_names,
    mmpretrain,
    torchvision_model,
    transformers_model,
)
from references import DEPTHS, DIMS, Official, State, images, randomize_, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from convnext_deploy.errors import WeightsError
from convnext_deploy.models.checkpoint import load
from convnext_deploy.records.base import Task

SIZES: dict[str, Any] = {"depths": list(DEPTHS), "hidden_sizes": list(DIMS)}
CLASSES = 7

Outputs = tuple[Tensor, ...]
Made = tuple[object, Callable[[], Outputs]]  # what is saved, and what it gives


@dataclass(frozen=True)
class Row:
    """A checkpoint. `make` gives what is saved (a state dict, or a folder that it has written) and its outputs."""

    what: str
    head: str
    oracle: str  # a package, or the published code rebuilt
    task: Task
    make: Callable[[Path], Made]
    options: dict[str, Any] | None = None

    def result(self, folder: Path) -> float | str:
        """The relative error of the worst sample, or the line that it is refused with."""
        made, expected = self.make(folder)
        path = folder / "checkpoint.pth"
        if not isinstance(made, Path):
            torch.save(made, path)
        try:
            source = str(made if isinstance(made, Path) else path)
            loaded = load(source, task=self.task, image_size=(64, 64), **self.options or {})
        except WeightsError as error:
            return str(error).replace(f"{folder}/", "")
        with torch.inference_mode():
            found, wanted = loaded.model(images()), expected()
        found = (found,) if isinstance(found, Tensor) else found
        assert len(found) == len(wanted)
        return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))

    @property
    def judge(self) -> str:
        return self.oracle if " " in self.oracle else f"{self.oracle} {importlib.metadata.version(self.oracle)}"


def of(model: nn.Module, state: State | None = None, call: Callable[[Tensor], Any] | None = None) -> Made:
    def expected() -> Outputs:
        with torch.inference_mode():
            found = (call or model)(images())
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return state or model.state_dict(), expected


def of_timm(**arguments: Any) -> nn.Module:
    made = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, num_classes=CLASSES, **arguments)
    return randomize_(made)


def with_head(*parts: nn.Module) -> Any:
    model: Any = of_timm()
    model.head.fc = nn.Sequential(*parts)
    return randomize_(model)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def averaged(_: Path) -> Made:
    from torch.optim.swa_utils import AveragedModel

    model = of_timm()
    ema = randomize_(AveragedModel(model), 3)
    return {"model": model.state_dict(), "model_ema": ema.state_dict()}, of(ema)[1]


def of_transformers(kind: str, folder: Path, **arguments: Any) -> nn.Module:
    config = getattr(
        transformers,
        f"{kind.removesuffix('Model').removesuffix('Backbone').removesuffix('ForImageClassification')}Config",
    )(**SIZES, **arguments)
    model: Any = randomize_(getattr(transformers, kind)(config))
    model.save_pretrained(folder / "folder")
    return model


def dinov3(folder: Path, *, tokens: bool) -> Made:
    model = of_transformers("DINOv3ConvNextModel", folder)

    def call(x: Tensor) -> Outputs:
        found = model(x)
        return (found.pooler_output, found.last_hidden_state[:, 1:]) if tokens else (found.pooler_output,)

    return folder / "folder", of(model, call=call)[1]


def dinov3_official(_: Path) -> Made:
    model: Any = randomize_(Dinov3())
    return of(model, call=lambda x: model.norm(maps_of(model, x)[3].mean((2, 3))))


def backbone(folder: Path) -> Made:
    names = [f"stage{level}" for level in range(1, 5)]
    model = of_transformers("ConvNextBackbone", folder, out_features=names)
    return folder / "folder", of(model, call=lambda x: model(x).feature_maps)[1]


def upernet(folder: Path) -> Made:
    names = [f"stage{level}" for level in range(1, 5)]
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(**SIZES, out_features=names), hidden_size=16, num_labels=3,
        auxiliary_in_channels=DIMS[2],
    )  # fmt: skip
    model: Any = randomize_(transformers.UperNetForSemanticSegmentation(config))
    model.save_pretrained(folder / "folder")
    return folder / "folder", of(model, call=lambda x: model.backbone(x).feature_maps)[1]


def detr(folder: Path) -> Made:
    """Which renames the keys of its backbone when it is saved."""
    names = [f"stage{level}" for level in range(2, 5)]
    small = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, d_model=32,
        backbone_config=transformers.ConvNextConfig(**SIZES, out_features=names),
        encoder_layers=1, decoder_layers=1, num_queries=5, num_labels=3, **small,
    )  # fmt: skip
    model: Any = randomize_(transformers.DetrForObjectDetection(config))
    model.save_pretrained(folder / "folder")
    body = next(module for module in model.modules() if isinstance(module, transformers.ConvNextBackbone))
    return folder / "folder", of(body, call=lambda x: body(x).feature_maps)[1]


def detr_around_timm(folder: Path) -> Made:
    small = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    body = transformers.TimmBackboneConfig(
        backbone="test_convnext2", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3), features_only=True
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=body, d_model=32,
        encoder_layers=1, decoder_layers=1, num_queries=5, num_labels=3, **small,
    )  # fmt: skip
    model: Any = randomize_(transformers.DetrForObjectDetection(config))
    model.save_pretrained(folder / "folder")
    inner: Any = next(module for module in model.modules() if type(module).__name__ == "FeatureListNet")
    return folder / "folder", of(inner, call=lambda x: inner(x))[1]


def unet_of_lightning(_: Path) -> Made:
    """segmentation_models_pytorch's keys, with a loss and a metric beside the network."""
    encoder = randomize_(timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, features_only=True))
    others = {
        "model.decoder.blocks.0.conv1.0.weight": torch.ones(8, 8, 3, 3),
        "model.decoder.blocks.0.conv1.1.num_batches_tracked": torch.tensor(3),
        "model.segmentation_head.0.weight": torch.ones(2, 8, 3, 3),
        "loss.weight": torch.ones(2),
        "iou.confmat": torch.zeros(2, 2),
    }
    content = {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(encoder.state_dict(), "model.encoder.model.") | others,
        "hyper_parameters": {"arch": "Unet", "encoder_name": "tu-convnext_atto"},
    }
    return content, of(encoder)[1]


def segmenter(v2: bool) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        model = segmenters.upernet(v2)
        segmenters.saved(model, folder / "folder")
        return folder / "folder", of(model, call=lambda x: segmenters.logits_of(model, x))[1]

    return make


def features_only(_: Path) -> Made:
    whole = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, features_only=True)
    return of(randomize_(whole))


def torchvision_features(_: Path) -> Made:
    model: Any = randomize_(torchvision_model(DEPTHS, DIMS))

    def call(x: Tensor) -> Outputs:
        maps = []
        for index, part in enumerate(model.features):
            x = part(x)
            maps += [x] if index % 2 else []
        return tuple(maps)

    return of(model, prefixed(model.features.state_dict(), "backbone.body."), call)


def detector(_: Path) -> Made:
    model = randomize_(OfficialBackbone())
    return of(model, prefixed(mm_names(model.state_dict()), "backbone.") | NECK)


def official(v2: bool) -> Callable[[Path], Made]:
    return lambda _: of(randomize_(Official(DEPTHS, DIMS, v2, CLASSES)))


def of_mmpretrain(_: Path) -> Made:
    model = randomize_(Official(DEPTHS, DIMS, False, CLASSES))
    return of(model, mmpretrain(model.state_dict()))


def transformers_classifier(v2: bool) -> Callable[[Path], Made]:
    def make(_: Path) -> Made:
        model = randomize_(transformers_model(v2, DEPTHS, DIMS))
        return of(model, call=lambda x: model(x).logits)

    return make


def script(folder: Path) -> Made:
    model = of_timm()
    trace: Any = torch.jit.trace  # which has no types
    traced = trace(model, images())
    traced.save(str(folder / "checkpoint.pt"))
    return folder / "checkpoint.pt", of(model)[1]


def pickled(folder: Path) -> Made:
    model = torchvision_model(DEPTHS, DIMS)
    torch.save(model, folder / "checkpoint.pt")
    return folder / "checkpoint.pt", of(model)[1]


def beside_objects(_: Path) -> Made:
    model = of_timm()
    content = {"state_dict": model.state_dict(), "root": Path("/data"), "log": defaultdict(list, loss=[0.5])}
    return content, of(model)[1]


def of_mmengine(_: Path) -> Made:
    """Its EMAHook puts the averaged weights into `state_dict`, and those that were trained into the other."""
    averaged, trained = (randomize_(Official(DEPTHS, DIMS, False, CLASSES), seed) for seed in (0, 1))
    content = {
        "meta": {"mmengine_version": "0.10.7"},
        "state_dict": mmpretrain(averaged.state_dict()),
        "ema_state_dict": prefixed(mmpretrain(trained.state_dict()), "module."),
    }
    return content, of(averaged)[1]


def pruned(_: Path) -> Made:
    model = of_timm()
    for module in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
        prune.random_unstructured(module, "weight", 0.3)  # type: ignore[no-untyped-call]  # torch has no types for it
    return of(model)


def with_norm(norm: Callable[..., nn.Module]) -> Callable[[Path], Made]:
    def make(_: Path) -> Made:
        model: Any = of_timm()
        norm(model.head.fc)
        return of(model.eval())

    return make


def of_timm_wrapper(folder: Path) -> Made:
    sizes = {"depths": list(DEPTHS), "dims": list(DIMS)}
    config = transformers.TimmWrapperConfig(architecture="convnext_atto", model_args=sizes, num_labels=CLASSES)
    model: Any = randomize_(transformers.TimmWrapperForImageClassification(config))
    model.save_pretrained(folder / "folder")
    return folder / "folder", of(model, call=lambda x: model(x).logits)[1]


def with_activation(folder: Path) -> Made:
    model = of_transformers("ConvNextForImageClassification", folder, hidden_act="gelu_new", num_labels=CLASSES)
    return folder / "folder", of(model, call=lambda x: model(x).logits)[1]


def longer_classifier(_: Path) -> Made:
    model: Any = torchvision_model(DEPTHS, DIMS)
    model.classifier = nn.Sequential(*model.classifier[:2], nn.Dropout(), nn.Linear(DIMS[3], CLASSES))
    return of(randomize_(model))


def with_entry(key: str, value: Tensor) -> Callable[[Path], Made]:
    return lambda _: of((m := of_timm()), m.state_dict() | {key: value})


REBUILT = "the published code rebuilt"
RELU = {"head_activation": "relu"}

ROWS = (
    Row("timm, V1", "linear", "timm", "classify", lambda _: of(of_timm())),
    Row("timm, V2", "linear", "timm", "classify", lambda _: of(of_timm(use_grn=True, ls_init_value=None))),
    Row("timm, `conv_mlp`", "linear", "timm", "classify", lambda _: of(of_timm(conv_mlp=True))),
    Row("timm, kernels of 3, 5, 7, 9", "linear", "timm", "classify",
        lambda _: of(of_timm(kernel_sizes=(3, 5, 7, 9)))),
    Row("timm", "dropout, linear", "timm", "classify", lambda _: of(with_head(nn.Dropout(), nn.Linear(DIMS[3], 7)))),
    Row("timm", "BatchNorm, linear", "timm", "classify",
        lambda _: of(with_head(nn.BatchNorm1d(DIMS[3]), nn.Linear(DIMS[3], 7)))),
    Row("timm", "linear, ReLU, linear with `--head-activation relu`", "timm", "classify",
        lambda _: of(with_head(nn.Linear(DIMS[3], 20), nn.ReLU(), nn.Linear(20, 7))), RELU),
    Row("timm", "linear, ReLU, linear", "timm", "classify",
        lambda _: of(with_head(nn.Linear(DIMS[3], 20), nn.ReLU(), nn.Linear(20, 7)))),
    Row("timm", "two classifiers", "timm", "classify",
        lambda _: of(with_head(nn.ModuleDict({"color": nn.Linear(DIMS[3], 5), "shape": nn.Linear(DIMS[3], 3)})))),
    Row("timm", "any, left out", "timm", "embed",
        lambda _: of((m := with_head(nn.Linear(DIMS[3], 20), nn.Tanh(), nn.Linear(20, 7))),
                     call=lambda x: m.forward_head(m.forward_features(x), pre_logits=True))),
    Row("timm, `features_only`", "none", "timm", "features", features_only),
    Row("segmentation_models_pytorch's Unet, Lightning", "none", "timm", "features", unet_of_lightning),
    Row("timm, patches of 2", "linear", "timm", "classify", lambda _: of(of_timm(patch_size=2))),
    Row("`module.` and `_orig_mod.`", "linear", "timm", "classify",
        lambda _: of((m := of_timm()), prefixed(m.state_dict(), "module._orig_mod."))),
    Row("`AveragedModel` beside the model", "linear", "timm", "classify", averaged),
    Row("Lightning, a loss's weights beside", "linear", "timm", "classify",
        lambda _: of((m := of_timm()), prefixed(m.state_dict(), "model.") | {"loss.weight": torch.ones(CLASSES)})),
    Row("the same with `--weights-key model.`", "linear", "timm", "classify",
        lambda _: of((m := of_timm()), prefixed(m.state_dict(), "model.") | {"loss.weight": torch.ones(CLASSES)}),
        {"weights_key": "model."}),
    Row("paths and logs beside the weights", "linear", "timm", "classify", beside_objects),
    Row("pruned, with masks", "linear", "timm", "classify", pruned),
    Row("weight norm", "linear", "timm", "classify", with_norm(parametrizations.weight_norm)),
    Row("spectral norm", "linear", "timm", "classify", with_norm(parametrizations.spectral_norm)),
    Row("LoRA, not merged", "linear", "timm", "classify",
        with_entry("base_model.model.stages.0.blocks.0.mlp.fc1.lora_A.default.weight", torch.ones(1))),
    Row("quantized by bitsandbytes", "linear", "timm", "classify",
        with_entry("stages.0.blocks.0.mlp.fc1.weight.absmax", torch.ones(1))),
    Row("GeM pooling", "linear", "timm", "classify", with_entry("head.global_pool.p", torch.ones(1))),
    Row("timm", "linear without a bias", "timm", "classify",
        lambda _: of((m := of_timm()), {k: v for k, v in m.state_dict().items() if k != "head.fc.bias"})),
    Row("official, V1", "linear", REBUILT, "classify", official(False)),
    Row("official, V2", "linear", REBUILT, "classify", official(True)),
    Row("mmpretrain", "linear", REBUILT, "classify", of_mmpretrain),
    Row("mmengine, with its average", "linear", REBUILT, "classify", of_mmengine),
    Row("mmdetection, mmsegmentation", "a norm a map", REBUILT, "features", detector),
    Row("torchvision", "linear", "torchvision", "classify",
        lambda _: of(randomize_(torchvision_model(DEPTHS, DIMS)))),
    Row("torchvision", "dropout, linear added", "torchvision", "classify", longer_classifier),
    Row("torchvision, `BackboneWithFPN`", "none", "torchvision", "features", torchvision_features),
    Row("transformers, V1", "linear", "transformers", "classify", transformers_classifier(False)),
    Row("transformers, V2", "linear", "transformers", "classify", transformers_classifier(True)),
    Row("transformers, `hidden_act` of `gelu_new`", "linear", "transformers", "classify", with_activation),
    Row("transformers around timm", "linear", "transformers", "classify", of_timm_wrapper),
    Row("transformers, `ConvNextBackbone`", "a norm a map", "transformers", "features", backbone),
    Row("transformers, DETR", "a norm a map", "transformers", "features", detr),
    Row("transformers, DETR around timm", "none", "timm", "features", detr_around_timm),
    Row("transformers, UPerNet", "a norm a map", "transformers", "features", upernet),
    Row("transformers, UPerNet, V1", "UPerNet's", "transformers", "segment", segmenter(False)),
    Row("transformers, UPerNet, V2", "UPerNet's", "transformers", "segment", segmenter(True)),
    Row("open_clip", "projection", REBUILT, "classify", lambda _: of(clip(depths=DEPTHS, dims=DIMS))),
    Row("DINOv3, official", "none", REBUILT, "embed", dinov3_official),
    Row("DINOv3, transformers", "none", "transformers", "embed", lambda folder: dinov3(folder, tokens=False)),
    Row("DINOv3, transformers with `--patch-tokens`", "none", "transformers", "embed",
        lambda folder: dinov3(folder, tokens=True), {"patch_tokens": True}),
    Row("TorchScript", "linear", "timm", "classify", script),
    Row("a whole model in a pickle", "linear", "torchvision", "classify", pickled),
)  # fmt: skip


def cell(result: float | str) -> str:
    """What the table says: the error to one digit, or the refusal."""
    if isinstance(result, str):
        return f"refused: {result}"
    return f"{result:.0e}" if result else "0, bit for bit"
