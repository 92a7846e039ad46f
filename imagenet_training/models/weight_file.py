"""Read files of weights, without running any code that they may hold."""

import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ffcv_ops.errors import UserError
from imagenet_training.models.card import CARD_KEY, ModelCard
from imagenet_training.torch_file import UnreadableFile, check_whole, load_file, no_file_message, unknown_classes

MAX_DEPTH = 5
AVERAGED_WORDS = {"ema", "swa", "avg", "average", "averaged"}
# The keys of tensors that have the names and shapes of weights, but are an optimizer's, or gradients.
NO_WEIGHTS = re.compile(r"optim|exp_avg|exp_inf|max_exp_avg|momentum|grad|scheduler|scaler", re.IGNORECASE)


@dataclass(frozen=True)
class TensorGroup:
    """Named tensors that lie together in a file.

    Attributes
    ----------
    place : str
        The keys that lead to them, such as ``state_dict_ema``; "" for a file of nothing else.
    tensors : dict of str to torch.Tensor
        On the CPU.
    metadata : dict or None
        The versions of the modules, which ``state_dict()`` gives as ``_metadata``.
    """

    place: str
    tensors: dict[str, torch.Tensor]
    metadata: Mapping[str, Any] | None


@dataclass(frozen=True)
class WeightFile:
    """The content of a file of weights.

    Attributes
    ----------
    name : str
        The file, in words for messages.
    groups : list of TensorGroup
    card : ModelCard or None
        The facts beside the tensors, if this project wrote the file.
    unread : list of str
        The keys that lead to averaged tensors without names.
    """

    name: str
    groups: list[TensorGroup]
    card: ModelCard | None
    unread: list[str] = field(default_factory=list)


def read_weight_file(path: str | Path, name: str) -> WeightFile:
    """Read a file of weights to the CPU: safetensors, or anything that ``torch.save`` writes of tensors.

    `name` is the file in words, for messages.

    Raises
    ------
    UserError
        If the file is missing, unreadable, or has no named tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{name}: {no_file_message(Path(path))}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        found = _read_safetensors(path, name) if start[8:] == b"{" else _read_pickle(path, name, start)
    except (SafetensorError, UnreadableFile, OSError) as error:
        raise UserError(f"{name} is not a file of weights: {error}") from error
    if not found.groups:
        raise UserError(f"{name} holds no state dict: save one with torch.save(model.state_dict(), FILE)")
    return found


def read_card(path: str | Path) -> ModelCard | None:
    """Read only the facts of a file of weights. Return None if it has none, or cannot be read.

    Raises
    ------
    UserError
        If this project wrote the file, but not this version, or the facts are damaged.
    """
    with suppress(OSError, SafetensorError, UnreadableFile):
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] != b"{":
            content = _load(path, mmap=start[:2] == b"PK")
            return ModelCard.of_checkpoint(content, str(path)) if isinstance(content, Mapping) else None
        with safe_open(path, "pt") as file:
            return _facts(file.metadata(), str(path)).card
    return None


class _Facts(NamedTuple):
    """The facts beside the tensors of an export: its card, the versions of its modules, the checksum of its tensors."""

    card: ModelCard | None = None
    metadata: Mapping[str, Any] | None = None
    checksum: int | None = None


def _facts(metadata: Mapping[str, str] | None, name: str) -> _Facts:
    """Read the facts in the metadata of a safetensors file."""
    text = (metadata or {}).get(CARD_KEY)
    if text is None:
        return _Facts()
    try:
        content = json.loads(text)
        card, versions, checksum = content["card"], content["metadata"], content.get("checksum")
        if not isinstance(card, dict) or not all(isinstance(values, dict) for values in versions.values()):
            raise TypeError("not as written")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{name}: the facts beside its tensors are damaged: copy or export the file again") from error
    return _Facts(ModelCard.from_dict(card, name), versions, checksum)


def checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the CRC-32 of the bytes of contiguous tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value


def _read_safetensors(path: str | Path, name: str) -> WeightFile:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        facts = _facts(file.metadata(), name)
    if facts.checksum is not None and facts.checksum != checksum(tensors):
        raise UnreadableFile("the checksum of its tensors is wrong, so it is damaged: copy or export it again")
    return WeightFile(name, [TensorGroup("", tensors, facts.metadata)] if tensors else [], facts.card)


def _read_pickle(path: str | Path, name: str, start: bytes) -> WeightFile:
    content = _load(path)
    if start[:2] == b"PK":
        check_whole(path)
    if isinstance(content, _StandIn):
        raise UnreadableFile(f"it holds an object of {type(content).__qualname__}; save its state_dict() instead")
    card = ModelCard.of_checkpoint(content, name) if isinstance(content, Mapping) else None
    return WeightFile(name, list(_groups(content)), card, list(_unnamed_averages(content)))


class _StandIn:
    """An object of a class that is not loaded. It keeps nothing and runs nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _DictStandIn:
    """A mapping of a class that is not loaded. Its items are kept in an ordinary one, and its class runs nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return OrderedDict()


def _load(path: str | Path, **options: Any) -> Any:
    """Load a file of ``torch.save``. An object of an unknown class, such as a script's options, becomes a stand-in."""
    try:
        return load_file(path, **options)
    except UnreadableFile as error:
        original = error
    unknown = unknown_classes(path)
    for stand_in in (_StandIn, _DictStandIn) if unknown else ():
        classes: list[Any] = [(type(found, (stand_in,), {}), found) for found in unknown]
        with torch.serialization.safe_globals(classes), suppress(UnreadableFile):
            return load_file(path, **options)
    raise original


def _groups(content: Any, place: str = "", depth: int = 0) -> Iterator[TensorGroup]:
    """Yield all groups of named tensors in nested mappings, but not those of an optimizer."""
    if not isinstance(content, Mapping) or depth > MAX_DEPTH:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield TensorGroup(place, tensors, getattr(content, "_metadata", None))
    for key, value in content.items():
        if not NO_WEIGHTS.match(str(key)):
            yield from _groups(value, f"{place}.{key}" if place else str(key), depth + 1)


def _unnamed_averages(content: Any, place: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the places of lists of averaged tensors, as the package torch_ema stores them."""
    if isinstance(content, Mapping) and depth <= MAX_DEPTH:
        for key, value in content.items():
            yield from _unnamed_averages(value, f"{place}.{key}" if place else str(key), depth + 1)
    elif isinstance(content, (list, tuple)) and is_averaged(place):
        if any(isinstance(value, torch.Tensor) for value in content):
            yield place


def is_averaged(place: str) -> bool:
    """Return True if the keys that lead to tensors name averaged weights."""
    return bool(AVERAGED_WORDS & set(re.split(r"[^a-z]+", place.lower())))
