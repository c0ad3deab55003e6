"""The networks of the golden packed files: numbers that are the same everywhere, and a record of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnext_deploy.native import packed
from convnext_deploy.native.packed import Block, ChannelNorm, Downsample, Features, Head, Network, Product, Stem

GOLDEN = Path(__file__).resolve().parent / "golden" / "packed"
SIDE = 40  # pixels of the images


class Numbers:
    """Floats in [-0.5, 0.5) from integer arithmetic alone, others each time."""

    def __init__(self) -> None:
        self.used = 0

    def floats(self, *shape: int) -> Any:
        count = int(np.prod(shape))
        places = np.arange(self.used, self.used + count, dtype=np.uint64)
        self.used += count
        return ((places * np.uint64(2654435761) % np.uint64(2**32)) / 2**32 - 0.5).astype(np.float32).reshape(shape)

    def product(self, outputs: int, inputs: int, type: packed.ProductType = "fp32", **codes: Any) -> Product:
        weight = self.floats(outputs, inputs)
        bias = self.floats(outputs)
        if type != "int8":
            return Product(weight=weight, bias=bias, type=type)
        scales = (self.floats(outputs) + np.float32(1.5)) / np.float32(127)
        return Product(
            weight=np.rint(weight * 254).astype(np.int8), bias=bias, type=type, weight_scale=scales, **codes
        )  # fmt: skip

    def norm(self, channels: int, affine: bool = True, kind: Any = "layernorm") -> ChannelNorm:
        weight = self.floats(channels) + np.float32(1) if affine else None
        return ChannelNorm(kind=kind, eps=1e-6, weight=weight, bias=self.floats(channels) if affine else None)

    def block(self, channels: int, kernel: int, expand: Product, project: Product, **others: Any) -> Block:
        return Block(
            dw_weight=self.floats(channels, kernel, kernel), dw_bias=self.floats(channels),
            norm=self.norm(channels, affine=False), expand=expand, project=project, **others,
        )  # fmt: skip


def classifier() -> Network:
    n = Numbers()
    codes = {"scale": 1 / 32, "zero_point": 120}
    return Network(
        input="uint8",
        in_chans=3,
        stem=Stem(convs=(n.product(8, 48, "int8", scale=1.0, zero_point=0),), norm=n.norm(8)),
        stages=(
            (n.block(8, 7, n.product(32, 8), n.product(8, 32), activation="gelu"),),
            (
                n.block(
                    12, 3, n.product(48, 12, "bf16"), n.product(12, 48, "bf16"), activation="gelu_tanh",
                    grn_weight=n.floats(48), grn_bias=n.floats(48),
                ),
            ),
            (
                n.block(
                    16, 5, n.product(64, 16, "int8", **codes),
                    n.product(16, 64, "int8", scale=1 / 64, zero_point=17, shift=-0.125), activation="gelu",
                ),
            ),
            (n.block(16, 9, n.product(64, 16), n.product(16, 64, "int8", **codes), activation="silu"),),
        ),
        downsamples=(
            Downsample(norm=n.norm(8), conv=n.product(12, 32, "int8", **codes)),
            Downsample(norm=n.norm(12, kind="rmsnorm"), conv=n.product(16, 48, "bf16")),
            Downsample(norm=n.norm(16, kind="simplenorm"), conv=n.product(16, 64)),
        ),
        head=Head(
            norm=n.norm(16), norm_first=False, hidden=n.product(20, 16), activation="tanh",
            classifier=n.product(5, 20, "bf16"),
        ),
    )  # fmt: skip


def features() -> Network:
    n = Numbers()
    return Network(
        input="float32",
        in_chans=3,
        stem=Stem(
            convs=(n.product(6, 27), n.product(8, 54)), norm=n.norm(8), activation="gelu", input_mean=n.floats(3)
        ),
        stages=((n.block(8, 7, n.product(32, 8), n.product(8, 32), activation="relu"),), ()),
        downsamples=(Downsample(norm=n.norm(8), conv=n.product(24, 32)),),
        head=None,
        features=(Features(channels=8), Features(channels=24, norm=n.norm(24))),
    )


NETWORKS = {"classifier": classifier, "features": features}


def images(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """A batch, floats or bytes, whose outputs are kept beside the files."""
    values: NDArray[np.float32] = Numbers().floats(*shape)
    return np.rint((values + 0.5) * 255).astype(np.uint8) if dtype == np.uint8 else values


def assert_kept(name: str, found: list[NDArray[Any]]) -> None:
    """Outputs are those that were kept: to float32's rounding, and where there are codes to a few of their steps.

    One code that is rounded otherwise moves others.
    """
    with np.load(GOLDEN / f"{name}-1.npz") as kept:
        expected = list(kept.values())
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        limit = (2e-2 if name == "classifier" else 1e-5) * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)
