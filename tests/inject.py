"""Faults in what a builder writes: the module that it gets is a copy with one thing wrong, which only a check can see.

`python tests/inject.py [--faults 300]` makes that many faults a format and type with a fixed seed and prints how many
were caught, and the smallest relative error of those that were and the largest of those that were not
(docs/design/verification.md).
"""

import argparse
import copy
import dataclasses
import importlib
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from convnext_deploy import api
from convnext_deploy.errors import CheckFailed
from convnext_deploy.formats.base import Format, StandIn
from convnext_deploy.graph.capture import DeployGraph
from convnext_deploy.models.convnext import Block, ChannelNorm, ConvNeXt
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import BatchRange

Fault = Callable[[ConvNeXt, random.Random], None]


def _parameter(model: ConvNeXt, chance: random.Random, ending: str = "") -> torch.Tensor:
    return chance.choice([value for name, value in model.named_parameters() if name.endswith(ending)]).data


def _blocks(model: ConvNeXt) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def flipped_bit(model: ConvNeXt, chance: random.Random) -> None:
    """The last bit of one weight, or another of its mantissa."""
    value = _parameter(model, chance).reshape(-1)
    bits = value.view(torch.int32 if value.dtype == torch.float32 else torch.int16)
    bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(7)


def zeroed_bias(model: ConvNeXt, chance: random.Random) -> None:
    _parameter(model, chance, "bias").zero_()


def zeroed_channel(model: ConvNeXt, chance: random.Random) -> None:
    value = _parameter(model, chance, "weight")
    value[chance.randrange(len(value))] = 0


def swapped_hidden_channels(model: ConvNeXt, chance: random.Random) -> None:
    weight = chance.choice(_blocks(model)).expand.linear.weight.data
    pair = chance.sample(range(len(weight)), 2)
    weight[pair] = weight[pair[::-1]]


def scaled_layer(model: ConvNeXt, chance: random.Random) -> None:
    _parameter(model, chance, "weight").mul_(1.01)


def other_epsilon(model: ConvNeXt, chance: random.Random) -> None:
    norm = chance.choice([module for module in model.modules() if isinstance(module, ChannelNorm)])
    norm.eps *= 10


def other_gelu(model: ConvNeXt, chance: random.Random) -> None:
    expand = chance.choice(_blocks(model)).expand
    expand.activation = "gelu" if expand.activation == "gelu_tanh" else "gelu_tanh"


FAULTS: tuple[Fault, ...] = (
    flipped_bit, zeroed_bias, zeroed_channel, swapped_hidden_channels, scaled_layer, other_epsilon, other_gelu,
)  # fmt: skip


def faulty(fmt: Format, fault: Fault, chance: random.Random) -> Format:
    """The format with a fault between its build and the check; the module that is compared with stays right."""

    def build(graph: DeployGraph, folder: Path) -> StandIn | None:
        wrong = copy.deepcopy(graph.module)
        assert isinstance(wrong, ConvNeXt)
        with torch.no_grad():
            fault(wrong, chance)
        return fmt.build(dataclasses.replace(graph, module=wrong), folder)

    return dataclasses.replace(fmt, build=build)


def caught(name: str, precision: Precision, fault: Fault, chance: random.Random, folder: Path) -> bool:
    """Whether an export with the fault is refused."""
    module = importlib.import_module(f"convnext_deploy.formats.{name}")
    right = module.FORMAT
    module.FORMAT = faulty(right, fault, chance)
    try:
        api.export(
            "random", variant="test_convnext", num_classes=10, format=name, precision=precision, image_size=(32, 32),
            batch=BatchRange(min=1, opt=4, max=4), out=folder / "artifact", force=True,
        )  # fmt: skip
    except CheckFailed:
        return True
    finally:
        module.FORMAT = right
    return False


CASES: tuple[tuple[str, Precision], ...] = (
    ("eager", "fp32"), ("eager", "fp16"), ("eager", "bf16"), ("native", "fp32"), ("native", "bf16"),
    ("onnx", "fp32"), ("onnx", "fp16"), ("openvino", "fp32"), ("openvino", "bf16"),
    ("torchscript", "fp32"), ("torchscript", "bf16"), ("pt2", "fp32"), ("pt2", "fp16"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the faults that verification catches, by format and type.")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, precision in CASES:
        if arguments.only and name not in arguments.only:
            continue
        chance, missed = random.Random(0), dict.fromkeys((fault.__name__ for fault in FAULTS), 0)
        with tempfile.TemporaryDirectory() as folder:
            for index in range(arguments.faults):
                fault = FAULTS[index % len(FAULTS)]
                missed[fault.__name__] += not caught(name, precision, fault, chance, Path(folder))
        found = arguments.faults - sum(missed.values())
        print(name, precision, f"{found} of {arguments.faults}", {k: v for k, v in missed.items() if v}, flush=True)


if __name__ == "__main__":
    main()
