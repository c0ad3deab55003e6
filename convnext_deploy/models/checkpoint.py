"""Checkpoints from anywhere, filled into our module with every key accounted for.

A source is a published timm name (`convnext_base.fb_in1k`), `hf-hub:owner/name` (with `@revision` after it for one
branch, tag or commit), a folder with `config.json` (timm's
or transformers'), a file (.safetensors, .pth, .pt, .bin, .ckpt), or the word `random`.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..artifact.manifest import sha256_of
from ..errors import WeightsError
from ..records.base import STRIDE, Problem, Task
from ..records.manifest import HeadActivation, ModelSpec, Preprocessing, Provenance, WeightsRecord
from . import open_clip, registry
from .configured import configured
from .convnext import ConvNeXt
from .facts import facts_of, labels_of, preprocessing_of, understood, with_facts, with_problem, with_tokens
from .files import read_file
from .layouts import Converted, convert, spec_of
from .processor import merged
from .provenance import joined, provenance, sourced

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
REMEDIES = "give a checkpoint with --weights FILE, or --weights random for a model without training"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A filled module and everything the manifest says about where it came from."""

    model: ConvNeXt
    weights: WeightsRecord
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    note: str | None = None  # which of several models in the file this is, and what of it was left out
    provenance: dict[str, Provenance] = field(default_factory=dict)
    origin: "Origin | None" = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a module's tensors were read, so that another library can read them too (`oracle`)."""

    files: tuple[Path, ...]
    config: Mapping[str, Any]
    key: str | None
    layout: str
    overridden: bool  # the user said some of the preprocessing


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read, before it is known to be a ConvNeXt. `facts` are what stood beside the tensors."""

    source: str
    state: Mapping[str, Tensor]
    facts: dict[str, Any]
    prefix: str | None
    file_sha256: str | None
    licence: str | None
    note: str | None = None
    revision: str | None = None
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def load(
    weights: str | None,
    *,
    variant: str | None = None,
    task: Task = "classify",
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights_key: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    levels: tuple[int, ...] | None = None,
    head_activation: HeadActivation | None = None,
    patch_tokens: bool = False,
    config: Path | None = None,
    problem: Problem | None = None,
) -> Loaded:
    """Find, read and convert a checkpoint.

    Args:
        weights: the source (see the module); None takes timm's published weights of `variant`.
        variant: a variant's name in any form that `registry.resolve` knows; None infers it from the tensors.
        image_size: (height, width) in pixels; None takes what the source says, else 224x224.
        num_classes, in_chans: must agree with the checkpoint; they shape the model where `weights` is "random".
        weights_key: the wrapper or key prefix to load from a file that holds several models.
        preprocessing: fields of `Preprocessing` that override what stands beside the checkpoint; a mean or std of one
            number is for every channel.
        head_activation: between the two linears of an MLP head, which tensors do not tell.
        patch_tokens: of the task embed: also the last map's pixels, as DINOv3 gives them.
        config: a file with what stands beside the checkpoint otherwise: a configuration of mmpretrain and its relatives
            (.py, with the files that it begins in), or a JSON file of timm, transformers or open_clip.
        problem: what a classifier's outputs mean; None: what stands beside the checkpoint.
        levels: of the task features: which maps, of 1 to 4; None: those that have a norm in the checkpoint, else all.

    Raises:
        WeightsError: nothing found, nothing reachable, not a ConvNeXt, or in contradiction to the arguments.
        UsageError: an unknown variant.
    """
    name, tag = registry.resolve(variant) if variant else (None, None)
    if head_activation is not None and (task != "classify" or weights == "random"):
        where = "random weights" if weights == "random" else f"--task {task}"
        raise WeightsError(f"--head-activation {head_activation} is for a checkpoint's classifier, not for {where}")
    if config is not None and weights == "random":
        raise WeightsError(f"--config {config} is of a checkpoint, not of random weights; leave it out")
    if weights == "random":
        if name is None:
            raise WeightsError("--weights random needs --variant: there are no tensors to infer it from")
        for field, asked, least in (("classes", num_classes, int(task == "classify")), ("channels", in_chans, 1)):
            if asked is not None and asked < least:
                raise WeightsError(f"{asked} {field}; expected at least {least}")
        overrides = {"num_classes": num_classes, "in_chans": in_chans}
        spec = registry.spec(name, **{key: value for key, value in overrides.items() if value is not None})
        spec = _with_levels(_placed(spec, task, image_size, None), levels, "random weights")
        spec = with_problem(with_tokens(spec, patch_tokens), None, problem, "random weights")
        model = random_model(spec)
        record = WeightsRecord(
            source="random", layout="own", random=True, tensors_sha256=tensors_sha256(model.state_dict())
        )
        known = {"input_size": spec.image_size, "global_pool": "avg"}  # of what has no training
        return Loaded(model, record, preprocessing_of(known | dict(preprocessing or {}), spec), None)

    checkpoint = _read(weights, name, tag, weights_key)
    if config is not None:
        facts = configured(checkpoint.facts, config, preprocessing or {}, checkpoint.source)
        checkpoint = replace(checkpoint, facts=facts)
    converted = convert(
        checkpoint.state, checkpoint.source, checkpoint.prefix, task=task, head_activation=head_activation
    )
    spec = spec_of(converted, name, checkpoint.source)
    for field, asked, found in (("classes", num_classes, spec.num_classes), ("channels", in_chans, spec.in_chans)):
        if asked is not None and asked != found:
            raise WeightsError(f"{checkpoint.source} has {found} {field}, not {asked}; fine-tune it first")
    spec = _placed(
        with_facts(spec, checkpoint.facts, checkpoint.source), task, image_size, checkpoint.facts.get("input_size")
    )
    spec = _with_levels(spec, levels, checkpoint.source, checkpoint.facts.get("levels"))
    spec = with_problem(with_tokens(spec, patch_tokens), checkpoint.facts.get("problem"), problem, checkpoint.source)
    if task == "classify" and spec.num_classes == 0:
        raise WeightsError(f"{checkpoint.source} has no classifier; use --task embed or --task features")
    model = filled(spec, converted, checkpoint.source)
    _refuse_not_finite(model, converted, checkpoint)
    record = WeightsRecord(
        source=checkpoint.source,
        layout=converted.layout,
        random=False,
        tensors_sha256=tensors_sha256(model.state_dict()),
        file_sha256=checkpoint.file_sha256,
        licence=checkpoint.licence or _licence_of(converted.layout, checkpoint.source),
        revision=checkpoint.revision,
    )
    known = _with_normalization(checkpoint, converted, preprocessing or {})
    if image_size is not None:
        known["input_size"] = list(image_size)
    if converted.layout not in ("own", "timm"):
        known["global_pool"] = "avg"  # the code of those layouts has no other
    silent = open_clip.DEFAULTS if converted.layout == "open_clip" else {}
    prepared = preprocessing_of({**known, **(preprocessing or {})}, spec, silent)
    labels = labels_of(checkpoint.facts, spec)
    given = {field: f"--{field.replace('_', '-')}" for field in preprocessing or {}}
    given |= {} if image_size is None else {"image_size": "--image-size"}
    given |= {} if name is None else {"activation": "--variant", "norm_eps": "--variant"}
    facts = checkpoint.facts
    if converted.normalization is not None:
        facts = joined(facts, sourced({"mean": 0, "std": 0}, "the layer in front of the network"))
    return Loaded(
        model,
        record,
        prepared,
        labels,
        "; ".join(filter(None, (checkpoint.note, converted.note))) or None,
        provenance(spec, prepared, labels, facts, converted.layout, given),
        Origin(checkpoint.files, checkpoint.config, weights_key, converted.layout, bool(preprocessing)),
    )


def _licence_of(layout: str, source: str) -> str | None:
    """The licence of weights that are published under it alone: DINOv3's layouts, and its name in that of a file."""
    return "dinov3-license" if layout.startswith("dinov3") or "dinov3" in source.lower() else None


def _with_normalization(checkpoint: Checkpoint, converted: Converted, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The facts, with the mean and std of a layer in front of the network in their place.

    Raises:
        WeightsError: the user, or what stands beside the checkpoint, says another mean or std.
    """
    known, found = dict(checkpoint.facts), converted.normalization
    if found is None:
        return known
    for name, key, own in zip(("mean", "std"), found.keys, (found.mean, found.std), strict=True):
        said = asked.get(name, known.get(name))
        values = tuple(said) if isinstance(said, (list, tuple)) else own
        if len(values) != len(own) or any(abs(a - b) > 1e-3 for a, b in zip(values, own, strict=True)):
            shown = ",".join(f"{value:.4g}" for value in own)
            raise WeightsError(
                f"{checkpoint.source} has a normalization in front of the network, {key} {shown}, and {name} "
                f"{','.join(f'{value:.4g}' for value in values)} is said beside it; expected one of them: load the "
                f"network alone with --weights-key, or leave the other out"
            )
    return known | {"mean": list(found.mean), "std": list(found.std)}


def _refuse_not_finite(model: ConvNeXt, converted: Converted, checkpoint: Checkpoint) -> None:
    """Refuse weights that are NaN, infinite or without values, by the names that they have in the file."""
    keys = {id(value): key for key, value in checkpoint.state.items()}
    state = model.state_dict()
    empty = [name for name, value in state.items() if value.is_meta]
    if empty:
        raise WeightsError(
            f"{checkpoint.source}: {keys.get(id(converted.tensors.get(empty[0])), empty[0])} is on the meta device and "
            "has no values; save it once it has them"
        )
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        shown = ", ".join(keys.get(id(converted.tensors.get(name)), name) for name in broken[:4])
        raise WeightsError(
            f"{checkpoint.source} has NaN or infinite values in {len(broken)} of {len(state)} tensors: {shown}"
            + (f" and {len(broken) - 4} more" if len(broken) > 4 else "")
            + "; take a checkpoint from before training diverged"
        )


def filled(spec: ModelSpec, converted: Converted, where: str) -> ConvNeXt:
    """The module of `spec` holding a checkpoint's tensors as float32, in eval mode.

    Raises:
        WeightsError: a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = ConvNeXt(spec)
    wanted = model.state_dict()
    unused = _unused(spec)
    tensors = {name: value for name, value in converted.tensors.items() if not name.startswith(unused)}
    missing, extra = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has more than the architecture:", extra)
        raise WeightsError(
            f"{where} ({converted.layout} layout) {what} {', '.join(names[:4])}"
            + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            + (" (--task features needs no head)" if missing and all(n.startswith("head.") for n in missing) else "")
        )
    ready = {}
    for name, value in tensors.items():
        shape = wanted[name].shape
        if [size for size in value.shape if size != 1] != [size for size in shape if size != 1]:
            raise WeightsError(f"{where}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        if not value.is_floating_point() or value.layout is not torch.strided:
            raise WeightsError(
                f"{where}: {name} is {value.dtype}, {value.layout}; expected a dense floating-point type"
            )
        # A 1x1 convolution is a linear, and (C, 1, 1) a vector: the same numbers under a shape with ones.
        ready[name] = value.detach().to(torch.float32).reshape(shape).contiguous()
    model.load_state_dict(ready, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _unused(spec: ModelSpec) -> tuple[str, ...]:
    """How the names of tensors begin that a task leaves out."""
    if spec.task != "features":
        return ("level_norms.",) if spec.task == "classify" else ("level_norms.", "head.classifier.")
    after = [name for i in range(spec.stages, 4) for name in (f"stages.{i}.", f"downsamples.{i - 1}.")]
    return ("head.", *after, *(f"level_norms.{level}." for level in range(1, 5) if level not in spec.levels))


def random_model(spec: ModelSpec, seed: int = 0) -> ConvNeXt:
    """A module whose every parameter matters: for tests, timing and trying things out, never for predictions.

    PyTorch's own initialisation would leave layer scale at 1 or 1e-6 and norms at identity, which hides mistakes
    in exactly the parameters that converters and folding touch.
    """
    with torch.device("meta"):
        model = ConvNeXt(spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.state_dict().items():
        value = torch.empty(parameter.shape).normal_(generator=generator)
        if parameter.ndim > 1:
            value /= math.sqrt(parameter[0].numel())
        elif name.endswith("layer_scale"):
            value.mul_(0.1).add_(0.3)
        elif "norm" in name and name.endswith("weight"):
            value.mul_(0.2).add_(1.0)
        else:
            value *= 0.2
        tensors[name] = value
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and float32 bytes in name order, whatever file held them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        value = state[name].detach().cpu().contiguous()
        digest.update((value.float() if value.is_floating_point() else value).numpy().data)
    return digest.hexdigest()


# Reading -------------------------------------------------------------------------------------------------------------


def _read(weights: str | None, name: str | None, tag: str | None, key: str | None) -> Checkpoint:
    if weights is None:
        if name is None:
            raise WeightsError("which model? give --variant (see `convnext-deploy list`) or --weights FILE")
        return _published(name, tag)
    if weights.startswith(("hf-hub:", "hf_hub:")):
        repository, _, revision = weights.partition(":")[2].partition("@")
        return _from_hub(repository, weights, revision or None)
    path = Path(weights).expanduser()
    if path.is_dir():
        return _from_folder(path, weights, key)
    if path.is_file():
        read = read_file(path, key)
        return Checkpoint(
            read.label, read.state, read.facts, read.prefix, sha256_of(path), read.facts.get("license"), read.note,
            files=(path,),
        )  # fmt: skip
    plain = weights.removeprefix("timm:").removeprefix("timm/")
    if plain.partition(".")[0] in registry.VARIANTS or registry.is_deprecated(plain):
        found, its_tag = registry.resolve(plain)
        if name is not None and found != name:
            raise WeightsError(f"--weights {weights} is not a {name}; leave --variant out or make them agree")
        return _published(found, its_tag)
    raise WeightsError(
        f"--weights {weights}: no such file or folder, and not a published timm name; {REMEDIES}, or hf-hub:owner/name"
    )


def _published(name: str, tag: str | None) -> Checkpoint:
    """timm's published weights, from the Hugging Face hub or its cache."""
    from timm.models import get_pretrained_cfg

    full = f"{name}.{tag}" if tag else name
    try:
        config = get_pretrained_cfg(full)
    except RuntimeError:  # timm's word for a tag it does not know
        config = None
    if config is None or not config.hf_hub_id:
        from timm import list_pretrained

        published = list_pretrained(f"{name}.*")
        raise WeightsError(
            f"timm publishes no weights {full!r}"
            + (f"; it has {', '.join(published)}" if published else f" for {name}; {REMEDIES}")
        )
    found = _from_hub(config.hf_hub_id, f"timm:{name}.{config.tag}")
    return replace(found, licence=found.licence or config.license)


def _from_hub(repository: str, source: str, revision: str | None = None) -> Checkpoint:
    """A repository of the Hugging Face hub, every file of the one commit that the first file was found at.

    Args:
        revision: a branch, tag or commit; None: the main branch as it is now.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    commit = revision

    def fetched(filename: str) -> Path:
        nonlocal commit
        with _quiet("huggingface_hub"):  # it logs what it then raises
            file = Path(hf_hub_download(repository, filename, revision=commit))
        commit = _commit_of(file) or commit
        return file

    unreachable = None
    try:
        try:
            config = _json(fetched("config.json"))
        except EntryNotFoundError as error:  # a LocalEntryNotFoundError where the network is not reached
            try:
                config = {"open_clip": _json(fetched(open_clip.CONFIG))}
            except EntryNotFoundError:
                raise error from None
        if "model_type" in config:  # transformers, which keeps the preprocessing in a file of its own
            beside: dict[str, dict[str, Any] | None] = {}
            for name in PROCESSOR_FILES:
                try:
                    beside[name] = _json(fetched(name))
                except LocalEntryNotFoundError:
                    if name == PROCESSOR_FILES[0]:
                        raise
                    beside[name] = None  # offline; older repositories do not have it
                except EntryNotFoundError:
                    beside[name] = None
            config["preprocessor"] = merged(*(beside[name] for name in PROCESSOR_FILES))
        for candidate in WEIGHT_FILES:
            try:
                file = fetched(candidate)
            except LocalEntryNotFoundError as error:  # offline; another of the repository's files may be cached
                unreachable = unreachable or error
                continue
            except EntryNotFoundError:
                continue
            files = [file]
            if candidate.endswith(".index.json"):
                files = [fetched(part) for part in _shards(file)]
            return replace(_with_config(source, files, config), revision=commit)
        if unreachable is not None:
            raise unreachable
    except HFValidationError:
        raise WeightsError(f"{source} is not a hub name; expected hf-hub:owner/name or owner/name@revision") from None
    except RevisionNotFoundError:
        raise WeightsError(f"{source}: the hub's {repository} has no branch, tag or commit {revision!r}") from None
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError) as error:
        # The hub's own messages run over several lines; the first says what happened.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise WeightsError(
            f"{source} cannot be fetched from the hub and is not cached ({reason}); {REMEDIES}"
        ) from None
    raise WeightsError(f"{source} has none of {', '.join(WEIGHT_FILES)}; {REMEDIES}")


def _commit_of(file: Path) -> str | None:
    """The commit that a file of the hub's cache, `snapshots/<commit>/<name>`, is of."""
    parts = file.parts
    if "snapshots" not in parts[:-2]:
        return None
    return parts[len(parts) - parts[::-1].index("snapshots")]


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Logging is global: silence one library's logger for a while, and put it back."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        found.setLevel(before)


def _from_folder(folder: Path, source: str, key: str | None) -> Checkpoint:
    config_file = folder / "config.json"
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not files:
        raise WeightsError(f"{folder} has none of {', '.join(WEIGHT_FILES)}; name the file itself with --weights")
    parts = [folder / part for part in _shards(files[0])] if files[0].suffix == ".json" else files[:1]
    config = _json(config_file) if config_file.is_file() else {}
    if (folder / open_clip.CONFIG).is_file():
        config["open_clip"] = _json(folder / open_clip.CONFIG)
    beside = [_json(folder / name) if (folder / name).is_file() else None for name in PROCESSOR_FILES]
    if any(found is not None for found in beside):
        config["preprocessor"] = merged(*beside)
    return _with_config(source, parts, config, key)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds a {type(content).__name__}; expected a JSON object")
    return content


def _shards(index: Path) -> list[str]:
    try:
        return sorted({Path(part).name for part in _json(index)["weight_map"].values()})
    except (KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} is not an index of weight files: {error!r}") from None


def _with_config(source: str, files: list[Path], config: dict[str, Any], key: str | None = None) -> Checkpoint:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{source} lacks the part {missing[0].name}")
    state: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    prefix = note = None
    for file in files:
        read = read_file(file, key)
        state |= read.state
        facts = joined(facts, read.facts)
        prefix, note = read.prefix, read.note
    beside = open_clip.CONFIG if "open_clip" in config else "config.json"
    facts = joined(facts, sourced(understood(facts_of, config, f"{source}: config.json"), beside))
    digest = sha256_of(files[0]) if len(files) == 1 else None
    licence = facts.get("license")
    return Checkpoint(source, state, facts, prefix, digest, licence, note, files=tuple(files), config=config)


def _with_levels(
    spec: ModelSpec, asked: tuple[int, ...] | None, where: str, said: tuple[int, ...] | None = None
) -> ModelSpec:
    """With the maps that are asked for, or else those that the source's own code gives.

    Args:
        said: by the configuration (`out_indices`).

    Raises:
        WeightsError: a level without a norm, of a source that has one for others; or levels for another task.
    """
    if spec.task != "features":
        if asked is not None:
            raise WeightsError(f"levels {_joined(asked)} are for --task features, not for {spec.task}; leave them out")
        return spec
    if said is not None and spec.level_norms and said != spec.level_norms:
        raise WeightsError(
            f"{where}: its configuration says out_indices for the levels {_joined(said)}, and its tensors have norms "
            f"for {_joined(spec.level_norms)}; mend one of them"
        )
    lacking = [level for level in asked or () if spec.level_norms and level not in spec.level_norms]
    if lacking:
        raise WeightsError(
            f"{where} has a norm for the maps of levels {_joined(spec.level_norms)} and none for level {lacking[0]}, "
            f"which its own code does not give; expected some of {_joined(spec.level_norms)}"
        )
    return msgspec.structs.replace(spec, levels=asked or spec.level_norms or said or spec.levels)


def _joined(levels: tuple[int, ...]) -> str:
    return ",".join(map(str, levels))


def _placed(spec: ModelSpec, task: Task, asked: tuple[int, int] | None, trained: list[int] | None) -> ModelSpec:
    size = asked or (tuple(trained) if trained else (224, 224))
    if len(size) != 2 or any(not isinstance(side, int) or side < STRIDE for side in size):
        shown = "x".join(map(str, size))
        raise WeightsError(
            f"image size {shown} pixels; expected at least {STRIDE}x{STRIDE} (--image-size 224 or 800x1280)"
        )
    return msgspec.structs.replace(spec, task=task, image_size=(size[0], size[1]))
