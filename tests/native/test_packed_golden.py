"""Packed files of version 1, byte for byte: what wrote them is below, with numbers that are the same everywhere.

`classifier` has products of every type, GRN, several kernels, a shift and both linears of a head; `features` has an
overlapping stem with a mean, and two maps, one of them through a norm. `python tests/native/test_packed_golden.py`
writes them and what the portable path computes: run it only for a new version, beside the files of this one.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convnext_deploy.native import library, packed
from convnext_deploy.native.engine import Engine
from convnext_deploy.native.packed import Block, ChannelNorm, Downsample, Features, Head, Network, Product, Stem

HAS_COMPILER = any(map(shutil.which, library.COMPILERS))
ISAS = library.isas() if HAS_COMPILER else ()
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "packed"
SIDE = 40  # pixels


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


def computed(source: Path, isa: str) -> list[Any]:
    engine = Engine(source, 2, SIDE, SIDE, 2, isa)
    images = Numbers().floats(*engine.input_shape)
    engine.bind(np.rint((images + 0.5) * 255).astype(np.uint8) if engine.input_dtype == np.uint8 else images)
    engine.run()
    return list(engine.outputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_writer_writes_version_1_byte_for_byte(name: str, tmp_path: Path) -> None:
    packed.write(NETWORKS[name](), tmp_path / name)
    assert packed.VERSION == 1
    assert (tmp_path / name).read_bytes() == (GOLDEN / f"{name}-1.cnxt").read_bytes()


@pytest.mark.skipif(not HAS_COMPILER, reason="the native engine needs a C++ compiler")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_version_1_is_read_and_computes_what_it_did(name: str, isa: str) -> None:
    """To float32's rounding; where there are codes, one that is rounded otherwise moves the outputs by a few steps."""
    with np.load(GOLDEN / f"{name}-1.npz") as kept:
        expected = list(kept.values())
    found = computed(GOLDEN / f"{name}-1.cnxt", isa)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        limit = (2e-2 if name == "classifier" else 1e-5) * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


if __name__ == "__main__":
    for name, network in NETWORKS.items():
        packed.write(network(), GOLDEN / f"{name}-1.cnxt")
        outputs = computed(GOLDEN / f"{name}-1.cnxt", "portable")
        np.savez(GOLDEN / f"{name}-1.npz", **{str(i): output for i, output in enumerate(outputs)})
