"""How much mIoU a segmenter loses in fp16, bf16 and 8 bits: a small UPerNet, trained here on masks drawn by people.

    python benchmarks/bench_segmenter_drop.py --folder build/segmenter-drop --backbone atto.safetensors

The objects are the photographs of Debian's package `tuxpaint-stamps-default`, which `apt-get download` fetches: their
transparency, cut out by hand, is the mask. Each is placed on a crop of a photograph that comes with this package, and
its class is the folder it is in. The objects of training and validation are different ones, and so are the halves of
the photographs behind them. Cartoons, toys and symbols are left out.

A ConvNeXt-Atto with transformers' UPerNet head is trained on these scenes, from a seed. Then it goes the way of every
checkpoint: quantize, export, eval and gate, each format and type beside ONNX in fp32. --steps 0 takes the model that
is in the folder.
"""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import records
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from PIL import Image

from convnext_deploy import api, data
from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.records.accuracy import ScoreResult, ScoreVerdict
from convnext_deploy.records.base import Precision
from convnext_deploy.records.plan import Target

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
CLASSES = {
    "background": (),
    "animal": ("animals",),
    "plant": ("plants",),
    "food": ("food",),
    "thing": ("clothes", "hobbies", "household", "medical", "military", "sports", "town", "vehicles"),
}
LEFT_OUT = {"cartoon", "toys", "plastic", "roadsigns", "flags"}  # drawings, and what stands for another class
BEHIND = ("astronaut", "camera", "coffee", "gravel", "hubble", "retina", "rocket")  # the eighth shows a cat
SIDE = 128  # pixels of a scene
SCENES = {"train": 2400, "validation": 600}
EVERY = 4  # one object in so many is for validation
BATCH = 16
RATES = {"backbone": 4e-4, "head": 1e-3}
ROWS: tuple[tuple[Target, Precision | None], ...] = (
    ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", None),
    ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "bf16"), ("openvino", None),
)  # fmt: skip  # format and float type; None: a plan of its own

Pixels = NDArray[np.uint8]


def objects(folder: Path) -> list[tuple[int, Image.Image]]:
    """(class, the object alone as RGBA), in the order of their names."""
    root = folder / STAMPS
    if not root.is_dir():
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        (archive,) = folder.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        archive.unlink()
    found = []
    for number, tops in enumerate(CLASSES.values()):
        for path in sorted(path for top in tops for path in (root / top).rglob("*.png")):
            if LEFT_OUT & set(path.relative_to(root).parts):
                continue
            image: Image.Image = Image.open(path)
            if image.mode in ("RGBA", "LA", "P", "PA"):
                image = image.convert("RGBA")
                solid = np.asarray(image)[:, :, 3] > 127
                box = image.getchannel("A").getbbox()
                if box is not None and 0.05 < solid.mean() < 0.95:  # else it was not cut out
                    image = image.crop(box)
                    image.thumbnail((SIDE, SIDE))
                    found.append((number, image))
    return found


def scenes(
    stamps: list[tuple[int, Image.Image]], behind: list[Image.Image], count: int, seed: int
) -> Iterator[tuple[Pixels, Pixels]]:
    """(pixels (H, W, 3), class of each (H, W)): one to three objects on a photograph; 255 where an edge is soft."""
    rng = np.random.default_rng(seed)
    by_class = {number: [image for other, image in stamps if other == number] for number, _ in stamps}
    for _ in range(count):
        photo = behind[rng.integers(len(behind))]
        edge = int(min(photo.size) * rng.uniform(0.3, 1.0))
        left, top = (int(rng.integers(0, size - edge + 1)) for size in photo.size)
        scene = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
        mask = np.zeros((SIDE, SIDE), np.uint8)
        for _ in range(rng.integers(1, 4)):
            number = int(rng.choice(sorted(by_class)))
            stamp = by_class[number][rng.integers(len(by_class[number]))]
            scale = SIDE * rng.uniform(0.35, 0.8) / max(stamp.size)
            stamp = stamp.resize([max(4, round(side * scale)) for side in stamp.size], Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            stamp = stamp.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
            x, y = (int(rng.integers(-side // 4, SIDE - 3 * side // 4)) for side in stamp.size)
            layer = Image.new("RGBA", (SIDE, SIDE))
            layer.paste(stamp, (x, y))
            opacity = np.asarray(layer)[:, :, 3]
            scene = Image.alpha_composite(scene.convert("RGBA"), layer).convert("RGB")
            mask[opacity > 191] = number
            mask[(opacity > 63) & (opacity <= 191)] = 255
        yield np.asarray(scene), mask


def drawn(folder: Path) -> None:
    """`images/SPLIT` and `masks/SPLIT` below the folder, unless they are there."""
    if (folder / "masks").is_dir():
        return
    stamps = objects(folder)
    photographs = [Image.open(Path(data.__file__).parent / f"images/{name}.jpg").convert("RGB") for name in BEHIND]
    for seed, (split, count) in enumerate(SCENES.items()):
        held = split == "validation"
        own = [stamp for index, stamp in enumerate(stamps) if (index % EVERY == 0) == held]
        halves = [photo.crop(_half(photo.size, held)) for photo in photographs]
        print(f"{split}: {len(own)} objects, {count} scenes", flush=True)
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for index, arrays in enumerate(scenes(own, halves, count, seed)):
            for kind, array in zip(("images", "masks"), arrays, strict=True):
                Image.fromarray(array).save(folder / kind / split / f"{index:04}.png")


def _half(size: tuple[int, int], right: bool) -> tuple[int, int, int, int]:
    width, height = size
    return (width // 2 * right, 0, width // 2 * (1 + right), height)


def network(backbone: Path | None) -> Any:
    """An Atto with a head of 64 channels, which begins from timm's weights or from the seed's."""
    sizes = [40, 80, 160, 320]
    inside = transformers.ConvNextConfig(
        hidden_sizes=sizes, depths=[2, 2, 6, 2], out_features=[f"stage{level}" for level in range(1, 5)],
        layer_scale_init_value=0.1,
    )  # fmt: skip
    names = dict(enumerate(CLASSES))
    config = transformers.UperNetConfig(
        backbone_config=inside, hidden_size=64, use_auxiliary_head=False, id2label=names,
        label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    model: Any = transformers.UperNetForSemanticSegmentation(config)
    if backbone is not None:
        held = {named(key): value for key, value in safetensors.torch.load_file(backbone).items() if "head." not in key}
        own = model.backbone.state_dict()
        held = {key: value.reshape(own[key].shape) for key, value in held.items()}
        missing, strange = model.backbone.load_state_dict(held, strict=False)
        assert not strange, strange
        assert all(key.startswith("hidden_states_norms.") for key in missing), missing
    return model


def named(key: str) -> str:
    """timm's name of a tensor as transformers has it."""
    for pattern, replacement in (
        (r"stem\.0\.", "embeddings.patch_embeddings."), (r"stem\.1\.", "embeddings.layernorm."),
        (r"stages\.(\d)\.", r"encoder.stages.\1."), (r"\.downsample\.", ".downsampling_layer."),
        (r"\.blocks\.", ".layers."), (r"\.conv_dw\.", ".dwconv."), (r"\.norm\.", ".layernorm."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."), (r"\.gamma$", ".layer_scale_parameter"),
    ):  # fmt: skip
        key = re.sub(pattern, replacement, key)
    return key


def trained(folder: Path, steps: int, backbone: Path | None) -> Path:
    """The folder of the trained checkpoint, as transformers saves it."""
    out = folder / "checkpoint"
    if not steps:
        return out
    torch.manual_seed(0)
    model = network(backbone).train()
    processor = transformers.SegformerImageProcessor(size={"height": SIDE, "width": SIDE})
    paths = sorted((folder / "images/train").iterdir())
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([np.asarray(Image.open(folder / "masks/train" / p.name)) for p in paths])).long()
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (processor.image_mean, processor.image_std))
    groups = {"backbone": model.backbone.parameters(), "head": model.decode_head.parameters()}
    optimizer = torch.optim.AdamW([{"params": groups[n], "lr": rate} for n, rate in RATES.items()], weight_decay=0.05)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, [*RATES.values()], steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    for step in range(steps):
        chosen = rng.choice(len(images), BATCH, replace=False)
        pixels, wanted = (images[chosen].float() / 255 - mean) / std, masks[chosen]
        if rng.random() < 0.5:
            pixels, wanted = pixels.flip(-1), wanted.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.decode_head(
                model.backbone(pixels.contiguous(memory_format=torch.channels_last)).feature_maps
            )
        logits = F.interpolate(logits.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, wanted, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
        falling.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)
    return out


def judged(folder: Path, checkpoint: Path, file_name: str) -> None:
    """A line for each format and type: mIoU, and the drop from ONNX in fp32 with its bounds."""
    held, calibration = folder / "images/validation", folder / "images/train"
    for format, precision in ROWS:
        name = f"{format}-{precision or 'int8'}"
        made = folder / name
        given: dict[str, Any] = {"precision": precision}
        if precision is None:
            plan = folder / f"{name}.json"
            api.quantize(checkpoint, task="segment", target=format, calibration=calibration, out=plan, force=True)
            given = {"plan": plan}
        try:
            artifact = api.export(
                checkpoint, task="segment", format=format, batch=(1, 8, 8), out=made, force=True, **given
            )
        except ConvNextDeployError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        masks = folder / "masks/validation"
        result = folder / f"{name}-eval"
        found = api.evaluate(made, held, annotations=masks, out=result, force=True)
        assert isinstance(found, ScoreResult)
        paths = (folder / "onnx-fp32-eval.json", result.with_name(f"{result.name}.json"))
        verdict = api.gate(*paths, limits={"max_drop": 1.0})
        assert isinstance(verdict, ScoreVerdict)
        drop, facts = verdict.checks[0], artifact.manifest
        record = {
            "benchmark": "segmenter-drop",
            "format": format,
            "type": precision or "int8",
            "executed": dict(facts.precision.executed or {}),
            "note": facts.precision.note,
            "images": found.images,
            "miou": found.score,
            "pixel_accuracy": found.pixel_accuracy,
            "per_class": {one.name: one.score for one in found.per_output},
            "drop": drop.value,
            "standard_error": verdict.standard_error,
            "lower": drop.lower,
            "upper": drop.upper,
            "limit": drop.limit,
            "decision": verdict.decision,
            "tensors_sha256": facts.weights.tensors_sha256,
        }
        records.append(record, file_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/segmenter-drop"))
    parser.add_argument("--backbone", type=Path, help="weights of an Atto in timm's names to begin with")
    parser.add_argument("--steps", type=int, default=1200, help="of training; 0: judge the model that is there")
    parser.add_argument("--file-name", default="segmenter-drop", help="of the results, behind the date")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("dpkg-deb") is None:
        parser.error("dpkg-deb is not here; the photographs are a package of Debian's")
    drawn(args.folder)
    judged(args.folder, trained(args.folder, args.steps, args.backbone), args.file_name)


if __name__ == "__main__":
    main()
