"""Read files of weights, without running any code that they may hold."""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ffcv_ops.errors import UserError
from imagenet_training.card import CARD_KEY, ModelCard

MAX_DEPTH = 5


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
    """

    name: str
    groups: list[TensorGroup]
    card: ModelCard | None


def read_weight_file(path: str | Path, name: str) -> WeightFile:
    """Read a file of weights to the CPU: safetensors, or anything that ``torch.save`` writes of tensors.

    Parameters
    ----------
    path : path
    name : str
        The file, in words for messages.

    Raises
    ------
    UserError
        If the file is missing, unreadable, or has no named tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{name}: no such file")
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        found = _read_safetensors(path, name) if start[8:] == b"{" else _read_pickle(path, name)
    except (SafetensorError, _Unreadable) as error:
        raise UserError(f"{name} is not a file of weights: {error}") from error
    if not found.groups:
        raise UserError(f"{name} holds no state dict: save one with torch.save(model.state_dict(), FILE)")
    return found


def read_card(path: str | Path) -> ModelCard | None:
    """Read only the facts of a file of weights. Return None if it has none, or cannot be read."""
    with suppress(OSError, SafetensorError, _Unreadable):
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] != b"{":
            content = _read_content(path, mmap=start[:2] == b"PK")
            return ModelCard.of_checkpoint(content, str(path)) if isinstance(content, Mapping) else None
        with safe_open(path, "pt") as file:
            facts = (file.metadata() or {}).get(CARD_KEY)
        return ModelCard.from_dict(json.loads(facts)["card"], str(path)) if facts is not None else None
    return None


class _Unreadable(Exception):
    """A file is no archive of tensors."""


def _read_safetensors(path: str | Path, name: str) -> WeightFile:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        facts = (file.metadata() or {}).get(CARD_KEY)
    card, metadata = None, None
    if facts is not None:
        content = json.loads(facts)
        card, metadata = ModelCard.from_dict(content["card"], name), content["metadata"]
    return WeightFile(name, [TensorGroup("", tensors, metadata)] if tensors else [], card)


def _read_pickle(path: str | Path, name: str) -> WeightFile:
    content = _read_content(path)
    if isinstance(content, _StandIn):
        raise _Unreadable(f"it holds an object of {type(content).__qualname__}; save its state_dict() instead")
    card = ModelCard.of_checkpoint(content, name) if isinstance(content, Mapping) else None
    return WeightFile(name, list(_groups(content)), card)


def _read_content(path: str | Path, *, mmap: bool = False) -> Any:
    try:
        return _load(path, mmap=mmap)
    except Exception as error:  # the unpicklers and archives raise many kinds
        raise _Unreadable(str(error).partition("\n")[0] or type(error).__name__) from error


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


def _load(path: str | Path, **further: Any) -> Any:
    """Load a file of ``torch.save``. An object of an unknown class, such as a script's options, becomes a stand-in."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, **further}
    try:
        return torch.load(path, **options)
    except Exception as error:
        original = error
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the file is damaged, or in PyTorch's oldest format
        unknown = []
    for stand_in in (_StandIn, _DictStandIn) if unknown else ():
        classes: list[Any] = [(type(found, (stand_in,), {}), found) for found in unknown]
        with torch.serialization.safe_globals(classes), suppress(Exception):
            return torch.load(path, **options)
    raise original


def _groups(content: Any, place: str = "", depth: int = 0) -> Iterator[TensorGroup]:
    """Yield all groups of named tensors in nested mappings."""
    if not isinstance(content, Mapping) or depth > MAX_DEPTH:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield TensorGroup(place, tensors, getattr(content, "_metadata", None))
    for key, value in content.items():
        yield from _groups(value, f"{place}.{key}" if place else str(key), depth + 1)
