"""What stands in a file beside the network: its averaged copy, a normalization in front of it, a head behind it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import WeightsError, counted
from .heads import is_affine

# What wrappers of torch put inside a module's names: torch.compile, FSDP and checkpointed activations.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# In a prefix: of a copy that was averaged during training, beside the one that was trained.
AVERAGED = {"ema_model", "model_ema", "ema", "net_ema", "ema_net", "averaged_model", "swa_model"}
NAMES = (
    ("mean", "std"), ("pixel_mean", "pixel_std"), ("image_mean", "image_std"), ("_mean", "_std"),
    ("new_mean", "new_std"),  # of the package robustness
)  # fmt: skip
BGR = (103.53, 116.28, 123.675)  # ImageNet's mean, blue first
CLOSE = 0.5  # pixel values
BOOKKEEPING = {"decay", "num_updates", "n_averaged", "steps"}  # of averaged models

_QUANTIZED = (
    "it is quantized; give the float checkpoint that it was made from, and `convnext-deploy quantize` makes a plan "
    "from that"
)
# Names that other tools put beside or in the place of weights, with what they mean and what to do.
OTHER_TOOLS: tuple[tuple[str, str], ...] = (
    (
        r".*\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|(hada|lokr)_w[12](_[ab])?|ia3_l"
        r"|modules_to_save|original_module)(\..*)?",
        "it contains an adapter (LoRA or a relative) that is not merged; merge it where the model is defined, with "
        "model = model.merge_and_unload(), and save that",
    ),
    (r".*\.(weight_fake_quant|activation_post_process|_packed_params)(\..*)?", _QUANTIZED),
    (r".*\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)", _QUANTIZED),
    (r".*\.(weight:|weight\._|_weight_)(qdata|data|scale|zero_point)", _QUANTIZED),  # torchao and quanto
    (
        r".*\.(SCB|weight_format|weight_scale|weight_scale_inv|qweight|qzeros|zero_point|weight_zero_point"
        r"|input_scale|output_scale|scale_weight|scale_input|weight_packed|weight_shape)",
        _QUANTIZED,
    ),
    (
        r"(.*\.)?_?flat_param(_\d+)?",
        "it contains FSDP's flat parameters, of which several tensors are one; save it with a full state dict "
        "(FSDP.state_dict_type with StateDictType.FULL_STATE_DICT)",
    ),
    (
        r".*\.(dwconv|downsample_layers\.\d\.\d)\.kernel",
        "it contains the sparse convolutions of MinkowskiEngine, as pretraining with FCMAE saves them; convert it with "
        "the official repository's remap_checkpoint_keys first",
    ),
)


@dataclass(frozen=True, slots=True)
class Normalization:
    """Of pixels in 0..1, as the buffers of a layer in front of the network have it, and these buffers' keys."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    keys: tuple[str, str]


def unwrapped(key: str) -> str:
    """A key without what wrappers put into it, wherever they stand."""
    if not any(name in key for name in WRAPPED):
        return key
    return ".".join(part for part in key.split(".") if part not in WRAPPED)


def refuse_other_tools(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not the network's own numbers, by the names that other tools give them.

    Raises:
        WeightsError: adapters, quantized weights, sparse convolutions, or the shards of a trainer.
    """
    for key in state:
        for pattern, words in OTHER_TOOLS:
            if re.fullmatch(pattern, key, re.DOTALL):
                raise WeightsError(f"{where} has {key if key.isprintable() else repr(key)}: {words}")
    empty = [key for key, value in state.items() if value.numel() == 0 and not value.is_meta]
    if 2 * len(empty) > len(state):
        raise WeightsError(
            f"{where} has {len(empty)} of {len(state)} tensors without values, as a trainer that shards weights "
            "(DeepSpeed ZeRO-3, FSDP) leaves them; join the shards with the trainer's own script first"
        )


def without_copies(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """Without the second set of weights that `EMAHook` of mmcv keeps in buffers, and a note of it.

    It calls the copy of `backbone.norm3.weight` `ema_backbone_norm3_weight`, and exchanges both before a checkpoint is
    saved: the averaged weights have the network's own names, and the copies are those that were trained.
    """
    outer = "module." if all(key.startswith("module.") for key in state) else ""
    flat = {f"{outer}ema_{key.removeprefix(outer).replace('.', '_')}" for key in state}
    copies = [key for key in state if key in flat]
    if not copies:
        return dict(state), None
    kept = {key: value for key, value in state.items() if key not in flat}
    return kept, f"left out {counted(len(copies), 'buffer')} of an EMAHook, such as {copies[0]}: the average is taken"


def averaged(prefixes: Iterable[str]) -> str | None:
    """The prefix of the averaged copy of a network, where one of them is that."""
    averages = [prefix for prefix in prefixes if AVERAGED & set(prefix.split("."))]
    return averages[0] if len(averages) == 1 else None


def normalization(
    state: Mapping[str, Tensor], outside: Iterable[str], channels: int, where: str
) -> Normalization | None:
    """The layer that normalizes pixels before the network.

    Args:
        outside: keys that stand beside the network.

    Raises:
        WeightsError: its values are those of images with blue first, which are not what is given here.
    """
    for key, other in normalizing(state, outside, channels):
        values = [[float(value) for value in state[entry].flatten()] for entry in (key, other)]
        values = [value * channels if len(value) == 1 else value for value in values]
        if max(max(value) for value in values) > 1:
            if len(values[0]) == 3 and all(abs(a - b) < CLOSE for a, b in zip(values[0], BGR, strict=True)):
                raise WeightsError(
                    f"{where}: {key} is the mean of images with blue first, and images are given with red first; "
                    "reverse the channels of the stem's weight and of this mean"
                )
            values = [[entry / 255 for entry in value] for value in values]  # of pixels in 0..255
        return Normalization(tuple(values[0]), tuple(values[1]), (key, other))
    return None


def normalizing(state: Mapping[str, Tensor], outside: Iterable[str], channels: int) -> Iterator[tuple[str, str]]:
    """The keys of each mean and its standard deviation, of one number or one for each channel."""
    beside = set(outside)
    for key in sorted(beside):
        parent, _, name = key.rpartition(".")
        for mean_name, std_name in NAMES:
            other = f"{parent}.{std_name}" if parent else std_name
            if name != mean_name or other not in beside:
                continue
            mean, std = (state[entry] for entry in (key, other))
            if not (mean.is_meta or std.is_meta) and {mean.numel(), std.numel()} <= {1, channels}:
                yield key, other


def is_counter(key: str, value: Tensor) -> bool:
    """Whether a single number beside the network is bookkeeping, such as AveragedModel's `n_averaged`."""
    return not value.is_floating_point() or key.rpartition(".")[2] in BOOKKEEPING


def refuse_learned_pooling(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a pooling with a parameter, which no task but features goes without.

    Raises:
        WeightsError: with its key.
    """
    for key, value in state.items():
        if re.fullmatch(r"(.*\.)?[^.]*(pool|gem)[^.]*\.p", key, re.DOTALL | re.IGNORECASE) and value.numel() == 1:
            raise WeightsError(
                f"{where} has {key if key.isprintable() else repr(key)}: it pools with a learned exponent (GeM); "
                "expected the average; use --task features and pool yourself"
            )


def heads(
    state: Mapping[str, Tensor], outside: Iterable[str], parent: str, width: int, biased: bool = True
) -> list[str]:
    """What the names of each linear or MLP begin with that stands beside the network and takes its pooled vector.

    Args:
        outside: keys that stand beside the network.
        parent: what stands before the network's own name.
        width: channels of the pooled vector.
        biased: only those with a bias; others may be no linears (cosine, ArcFace).
    """
    roots: dict[str, list[str]] = {}
    for key in outside:
        if key.startswith(parent):
            roots.setdefault(parent + key.removeprefix(parent).partition(".")[0] + ".", []).append(key)
    return [
        root
        for root, keys in roots.items()
        if all(key.startswith(root) and is_affine(key) for key in keys)
        and any(state[key].ndim == 2 and state[key].shape[1] == width for key in keys)
        and all(state[key].ndim <= 2 for key in keys)
        and (not biased or any(key.endswith("bias") for key in keys))
    ]
