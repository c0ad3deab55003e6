"""The same function in other numbers: rewritten checkpoints on which quantization is hard and floats are not.

Trained ConvNeXts differ in how far their channels reach; the bundled one is tame. Each rewrite here changes a state
dict, under timm's or this project's own key names, so that float arithmetic gives the same outputs and 8 bits with one
scale a tensor do not: what a quantizer has to survive, with a reference that is known.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

OUTLIER = 64.0  # a power of two: in floats of any width the rewrite is exact, bit for bit
OFFSET = 8.0  # about as far as a trained stream reaches by itself; float32 then keeps outputs to 3e-6

# A norm, and the product that alone reads its output.
_NORMS = (
    (r"(stages\.\d\.blocks\.\d+)\.norm", r"\1.mlp.fc1"),
    (r"(stages\.\d\.downsample)\.0", r"\1.1"),
    (r"(stages\.\d\.\d+)\.dwconv_norm\.norm", r"\1.expand.linear"),
    (r"(downsamples\.\d)\.norm", r"\1.conv"),
    (r"head\.norm", "head.fc"),
    (r"head\.norm", "head.classifier"),
)
# What a block adds to the residual stream, and the layer scale that multiplies it.
_BLOCKS = (
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc2\.bias", "stages.{}.blocks.{}.gamma"),
    (r"stages\.(\d)\.(\d+)\.project\.linear\.bias", "stages.{}.{}.project.layer_scale"),
)


def with_outlier_channels(state: Mapping[str, Tensor], *, channels: int = 4, seed: int = 0) -> State:
    """A few channels of every norm's output `OUTLIER` times as large, and the weights that read them as much smaller.

    Folding the norms' scale and shift into what follows undoes it. Without, the tensor's one scale is made for these
    channels, and all others are left with a few of the 256 codes.

    Args:
        channels: how many of each norm, chosen at random.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = dict(state)
    for norm, product in _norms(state):
        chosen = torch.randperm(len(state[f"{norm}.weight"]), generator=generator)[:channels]
        for key in (f"{norm}.weight", f"{norm}.bias"):
            if key in state:
                changed[key] = state[key].clone()
                changed[key][chosen] *= OUTLIER
        changed[f"{product}.weight"] = state[f"{product}.weight"].clone()
        changed[f"{product}.weight"][:, chosen] /= OUTLIER
    return changed


def with_residual_offsets(state: Mapping[str, Tensor]) -> State:
    """`OFFSET` added to every channel of the residual stream at each stage's end.

    The norm of the downsample, or of the head, subtracts the mean over the channels and with it the offset. Before a
    stage's end that would not be exact: the depthwise convolutions pad with zeros, so that at the border they see less
    of an offset than in the middle. Only LayerNorms subtract the mean.
    """
    changed = dict(state)
    for bias, layer_scale in _last_blocks(state):
        scale = state[layer_scale].double() if layer_scale in state else 1.0
        changed[bias] = (state[bias].double() + OFFSET / scale).to(state[bias].dtype)
    return changed


def hardened(state: Mapping[str, Tensor]) -> State:
    """Both."""
    return with_residual_offsets(with_outlier_channels(state))


def write_twin(checkpoint: Path, twin: Path) -> None:
    """A checkpoint's hardened twin as a file with the same header."""
    with safe_open(checkpoint, framework="pt") as file:
        header = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    save_file(hardened(state), twin, header)


def _norms(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    for key in state:
        for pattern, product in _NORMS:
            match = re.fullmatch(rf"{pattern}\.weight", key)
            if match is not None and f"{match.expand(product)}.weight" in state:
                yield key.removesuffix(".weight"), match.expand(product)


def _last_blocks(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    last: dict[str, tuple[int, str, str]] = {}
    for key in state:
        for pattern, layer_scale in _BLOCKS:
            match = re.fullmatch(pattern, key)
            if match is not None and int(match[2]) >= last.get(match[1], (-1, "", ""))[0]:
                last[match[1]] = int(match[2]), key, layer_scale.format(*match.groups())
    for _, bias, layer_scale in last.values():
        yield bias, layer_scale
