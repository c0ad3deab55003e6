"""Train the bundled demo model: a small ConvNeXt on Fashion-MNIST.

    python scripts/train_demo.py --data /usr/share/datasets/fashion-mnist --out build/demo-model

The data are real (Zalando's Fashion-MNIST, MIT licence). Debian ships them as the package
`dataset-fashion-mnist`; without `--data` torchvision downloads them. The 28-pixel images are resized to
64 pixels with the same Pillow bicubic filter that the evaluation uses, so that training and deployment see
the same pixels. The recorded run took 89 minutes on two CPU cores that did other work besides; an interrupted
one resumes from its last epoch.

Writes `OUT/model.safetensors` (timm key names, EMA weights, the facts that a loader needs as metadata) and
`OUT/training.json` (every epoch, and the scores on all 10,000 test images).
"""

import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.convnext import ConvNeXt
from timm.utils import ModelEmaV3

DEPTHS, DIMS = (2, 2, 4, 2), (24, 48, 96, 128)
IMAGE_SIZE = 64  # pixels; the stem and three downsamplings divide it by 32
SMALL_SIZE = 48  # pixels of the first epochs: half the work
MEAN, STD = 0.2860, 0.3530  # of the training images, in [0, 1]
BATCH = 128
CYCLES = ((24, 3e-3), (8, 1.5e-3))  # epochs, and the learning rate they start from: cosines with a warm restart
SMALL_EPOCHS = 14
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_split(folder: Path | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One split as uint8 images (N, 28, 28) and int64 labels (N,)."""
    if folder is None:
        from torchvision.datasets import FashionMNIST

        dataset = FashionMNIST("build/fashion-mnist", train=split == "train", download=True)
        return dataset.data.numpy(), dataset.targets.numpy()
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels


def resized(images: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (N, 28, 28) -> uint8 (N, 1, size, size), Pillow's bicubic filter."""
    out = np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC)) for i in images])
    return torch.from_numpy(out)[:, None]


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - MEAN) / STD


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the images and shift each by up to 1/16 of the side. (N, 1, S, S) float."""
    n, _, size, _ = images.shape
    flip = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    reach = size // 16
    padded = F.pad(images, (reach,) * 4, value=float(images.min()))
    dy, dx = torch.randint(0, 2 * reach + 1, (2, n, 1, 1), generator=generator)
    rows, cols = dy + torch.arange(size)[:, None], dx + torch.arange(size)  # (N, S, 1), (N, 1, S)
    return padded[torch.arange(n)[:, None, None], 0, rows, cols][:, None]


def learning_rate(epoch: float) -> float:
    """At a fractional epoch: one epoch of linear warm-up, then one falling cosine after the other."""
    begin = 0
    for epochs, start in CYCLES:
        if epoch < begin + epochs:
            falling = start * (0.5 + 0.5 * math.cos(math.pi * (epoch - begin) / epochs))
            return min(start * (epoch + 0.01), falling) if begin == 0 else falling
        begin += epochs
    return 0.0


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    model.eval()
    logits = torch.cat([model(normalized(chunk)) for chunk in images.split(500)])  # type: ignore[no-untyped-call]  # torch has no types for it
    top5 = logits.topk(5).indices
    hits = top5 == labels[:, None]
    return {"top1": hits[:, 0].double().mean().item(), "top5": hits.any(1).double().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the four *-ubyte.gz files (default: download)")
    parser.add_argument("--out", type=Path, default=Path("build/demo-model"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = ConvNeXt(in_chans=1, num_classes=10, depths=DEPTHS, dims=DIMS, ls_init_value=0.1)
    model = model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=0.9995, use_warmup=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CYCLES[0][1], weight_decay=0.05)

    train_images, train_labels = read_split(args.data, "train")
    test_images, test_labels = read_split(args.data, "t10k")
    by_size = {size: resized(train_images, size) for size in (SMALL_SIZE, IMAGE_SIZE)}
    train_y, test_y = torch.from_numpy(train_labels), torch.from_numpy(test_labels)
    test_x = resized(test_images, IMAGE_SIZE)

    history: list[dict[str, float]] = []
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    steps_per_epoch = len(train_y) // BATCH
    for epoch in range(len(history), sum(epochs for epochs, _ in CYCLES)):
        generator = torch.Generator().manual_seed(epoch)
        images = by_size[SMALL_SIZE if epoch < SMALL_EPOCHS else IMAGE_SIZE]
        order = torch.randperm(len(train_y), generator=generator)
        model.train()
        start, losses = time.time(), []
        for step in range(steps_per_epoch):
            done = epoch * steps_per_epoch + step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done / steps_per_epoch)
            chosen = order[step * BATCH : (step + 1) * BATCH]
            batch = augmented(normalized(images[chosen]), generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(batch), train_y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            optimizer.step()
            ema.update(model, step=done)
            losses.append(loss.item())
        # Half the test set watches the training; nothing is chosen by it: the last epoch's weights are kept.
        score = accuracy(ema.module, test_x[::2], test_y[::2])
        history.append({"epoch": epoch, "loss": float(np.mean(losses)), "seconds": time.time() - start, **score})
        print(json.dumps(history[-1]), flush=True)
        state = {"model": model.state_dict(), "ema": ema.module.state_dict()}
        torch.save(state | {"optimizer": optimizer.state_dict(), "history": history}, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)

    final = accuracy(ema.module, test_x, test_y)
    metadata = {
        "image_size": str(IMAGE_SIZE), "mean": str(MEAN), "std": str(STD), "interpolation": "bicubic",
        "crop_pct": "1.0", "labels": json.dumps(CLASSES), "license": "mit", "dataset": "Fashion-MNIST",
    }  # fmt: skip
    weights = {key: value.contiguous() for key, value in ema.module.state_dict().items()}
    safetensors.torch.save_file(weights, args.out / "model.safetensors", metadata)
    (args.out / "training.json").write_text(json.dumps({"test": final, "epochs": history}, indent=1) + "\n")
    print(json.dumps(final))


if __name__ == "__main__":
    main()
