"""Where checkpoints are: timm's published names, the Hugging Face hub, folders and files. What is there is read."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact.manifest import sha256_of
from ..errors import WeightsError, plain
from ..records.base import content_of
from . import file_kinds, open_clip, registry
from .facts import facts_of, understood
from .files import read_file
from .processor import merged
from .provenance import joined, sourced

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
REMEDIES = "give a checkpoint with --weights FILE, or --weights random for a model without training"


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


def read(weights: str | None, name: str | None, tag: str | None, key: str | None) -> Checkpoint:
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
        file_kinds.refuse_part(path)
        read = read_file(path, key)
        notes = (read.note, _unread(path))
        return Checkpoint(
            read.label, read.state, read.facts, read.prefix, sha256_of(path), read.facts.get("license"),
            "; ".join(filter(None, notes)) or None, files=(path,),
        )  # fmt: skip
    if "://" in weights:
        raise WeightsError(f"--weights {weights} is an address; download it, and give the file")
    plain = weights.removeprefix("timm:").removeprefix("timm/")
    if plain.partition(".")[0] in registry.VARIANTS or registry.is_deprecated(plain):
        architecture, its_tag = registry.resolve(plain)
        if name is not None and architecture != name:
            raise WeightsError(f"--weights {weights} is not a {name}; leave --variant out or make them agree")
        return _published(architecture, its_tag)
    raise WeightsError(
        f"--weights {weights}: no such file or folder, and not a published timm name; {REMEDIES}, or hf-hub:owner/name"
    )


def _unread(file: Path) -> str | None:
    """Of a file that is taken alone: that a library's configuration stands beside it."""
    unread = [name for name in ("config.json", *PROCESSOR_FILES) if (file.parent / name).is_file()]
    if file.name not in WEIGHT_FILES or not unread:
        return None
    return f"{' and '.join(unread)} beside {file.name} is not read (--weights {file.parent} reads the whole folder)"


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
    checkpoint = _from_hub(config.hf_hub_id, f"timm:{name}.{config.tag}")
    return replace(checkpoint, licence=checkpoint.licence or config.license)


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

    commit, reached = revision, True

    def download(filename: str) -> Path:
        with _quiet("huggingface_hub"):  # it logs what it then raises
            return Path(hf_hub_download(repository, filename, revision=commit, local_files_only=not reached))

    def fetched(filename: str) -> Path:
        nonlocal commit, reached
        try:
            file = download(filename)
        except LocalEntryNotFoundError:
            reached = False  # it has tried for half a minute: of the other files the cache is asked alone
            raise
        except (HFValidationError, OSError):
            raise
        except Exception as error:  # of the hub's HTTP client, which is another one in every version
            reached = False
            try:
                file = download(filename)
            except LocalEntryNotFoundError as absent:
                raise LocalEntryNotFoundError(plain(error)) from absent
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
            if candidate.endswith(file_kinds.INDEX):
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
    library = logging.getLogger(logger)
    before = library.level
    library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        library.setLevel(before)


def _from_folder(folder: Path, source: str, key: str | None) -> Checkpoint:
    config_file = folder / "config.json"
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    note = None
    if not files:
        others = [name for name in file_kinds.weights_in(folder) if "/" not in name]
        if len(others) != 1 or not config_file.is_file():
            file_kinds.refuse_folder(folder)
        files, note = [folder / others[0]], f"taking {others[0]}, the only weights in {folder}"
    else:
        others = [file.name for file in files[1:]] + file_kinds.further_models(folder)
        note = f"taking {files[0].name} of {folder}, and not {', '.join(others)}" if others else None
    parts = [folder / part for part in _shards(files[0])] if files[0].suffix == ".json" else files[:1]
    config = _json(config_file) if config_file.is_file() else {}
    if (folder / open_clip.CONFIG).is_file():
        config["open_clip"] = _json(folder / open_clip.CONFIG)
    beside = [_json(folder / name) if (folder / name).is_file() else None for name in PROCESSOR_FILES]
    if any(content is not None for content in beside):
        config["preprocessor"] = merged(*beside)
    checkpoint = _with_config(source, parts, config, key)
    return replace(checkpoint, note="; ".join(filter(None, (note, checkpoint.note))) or None)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(content_of(file))
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {plain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON: {plain(error)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file} contains a {type(content).__name__}; expected a JSON object")
    return content


def _shards(index: Path) -> list[str]:
    try:
        return sorted({Path(part).name for part in _json(index)["weight_map"].values()})
    except (KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} is not an index of weight files: {plain(error)}") from None


def _refuse_differing(read: Mapping[str, Tensor], more: Mapping[str, Tensor], source: str, part: str) -> None:
    """Refuse a tensor that is in two parts of a checkpoint with other values, of which none can be told to be right.

    Raises:
        WeightsError: with its key.
    """
    for key in sorted(read.keys() & more.keys()):
        one, other = read[key], more[key]
        if one.shape != other.shape or one.dtype != other.dtype or not bool((one == other).all()):
            raise WeightsError(
                f"{source} has {key if key.isprintable() else repr(key)} in two of its parts, the second of them "
                f"{part}, with different values; remove the parts that another run left there"
            )


def _with_config(source: str, files: list[Path], config: dict[str, Any], key: str | None = None) -> Checkpoint:
    missing = [file for file in files if not os.path.isfile(file)]  # false for a name that no file can have, too
    if missing:
        raise WeightsError(f"{source} lacks the part {missing[0].name!r}")
    state: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    prefix = note = None
    for file in files:
        read = read_file(file, key)
        _refuse_differing(state, read.state, source, file.name)
        state |= read.state
        facts = joined(facts, read.facts)
        prefix, note = read.prefix, read.note
    beside = open_clip.CONFIG if "open_clip" in config else "config.json"
    facts = joined(facts, sourced(understood(facts_of, config, f"{source}: config.json"), beside))
    digest = sha256_of(files[0]) if len(files) == 1 else None
    licence = facts.get("license")
    return Checkpoint(source, state, facts, prefix, digest, licence, note, files=tuple(files), config=config)
