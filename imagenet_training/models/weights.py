"""Fit the tensors of a file to a model, by their structure, and load them."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from ffcv_ops.errors import UserError
from imagenet_training.models.weight_file import TensorGroup, WeightFile, is_averaged

NUM_SHOWN = 3
# Names in published files of torchvision's DenseNets and vision transformers, and the present names. torchvision
# itself renames them only when it downloads the files, or by the version of a module.
OLDER_NAMES = (
    (re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


class Head:
    """The tensors of a model whose shapes depend on its number of classes.

    `build` makes the same architecture on the meta device, with another number of classes.
    """

    def __init__(self, model: nn.Module, build: Callable[[int], nn.Module], num_classes: int):
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._build, self.num_classes = build, num_classes

    @cached_property
    def class_dims(self) -> dict[str, list[int]]:
        """The dimensions of each of these tensors that grow with the number of classes, by the tensor's name."""
        other = self._build(self.num_classes + 1).state_dict()
        return {
            name: [dim for dim, (a, b) in enumerate(zip(shape, other[name].shape, strict=True)) if a != b]
            for name, shape in self._shapes.items()
            if shape != tuple(other[name].shape)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.class_dims

    def classes_of(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Return the number of classes of a head's tensor; None if its shape differs in other dimensions too."""
        own, dims = self._shapes[name], self.class_dims[name]
        if len(own) != len(shape) or any(
            a != b for i, (a, b) in enumerate(zip(own, shape, strict=True)) if i not in dims
        ):
            return None
        return shape[dims[0]] - own[dims[0]] + self.num_classes


@dataclass
class Fit:
    """A group of a file's tensors under the names of a model.

    Attributes
    ----------
    label : str
        Place and prefix of the tensors in the file.
    state : dict of str to torch.Tensor
        The tensors, by the names of the model.
    problems : list of str
        The reasons why the tensors do not fit; empty if they do.
    left_out : list of str
        Names of the group's tensors that are not the model's.
    num_matched : int
        Names that the model has too.
    new_head : list of str
        Names of the head's tensors that keep their initial values.
    head_classes : int or None
        Number of classes of the file's head; None if the file has no head.
    blurred : bool
        The file has the filters of ffcv-imagenet's BlurPool.
    other_head : bool
        The file has a head of other layers.
    """

    label: str
    averaged: bool
    state: dict[str, torch.Tensor]
    metadata: Mapping[str, Any] | None
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    num_matched: int = 0
    new_head: list[str] = field(default_factory=list)
    head_classes: int | None = None
    blurred: bool = False
    other_head: bool = False


def load_weights(
    model: nn.Module, file: WeightFile, head: Head, *, ema: bool | Literal["auto"]
) -> tuple[Fit, list[str]]:
    """Load a file of weights into a model, in place.

    The file may hold a state dict of PyTorch or safetensors, a checkpoint or an export of this project, or a checkpoint
    of other projects: of timm, torchvision, Lightning or ffcv-imagenet, for example. The tensors are found by their
    structure: anywhere in nested mappings, under any prefix. Only a head of another size keeps its initial values. If
    `ema` is ``"auto"``, averaged weights are taken if there are any.

    Returns
    -------
    fit : Fit
        The tensors that were loaded.
    notices : list of str
        Everything that was chosen, left out or not loaded.

    Raises
    ------
    UserError
        If its tensors do not fit or are not finite, or several groups of them fit.
    """
    fits = [fit for group in file.groups for fit in _fits(group, model, head)]
    if file.card is not None and file.card.averaged:
        for fit in fits:
            fit.averaged = True
    renamed = False
    if all(fit.problems for fit in fits):
        others = [fit for group in file.groups for fit in _fits(_renamed_by_timm(group, model), model, head)]
        if renamed := not all(fit.problems for fit in others):
            fits = others
    remedy = "; their shapes fit in their order: docs/FINE_TUNING.md renames such tensors"
    fit, notices = _choose(fits, ema, file.name, remedy if _has_the_shapes(file, model) else "")
    if renamed:
        notices.append(f"{file.name} fits after timm's rules for this architecture changed its names or sizes")
    if file.unread and not fit.averaged:
        notices.append(
            f"{file.name} has averaged weights without names ({', '.join(file.unread)}), which cannot be loaded: the "
            "raw ones are used"
        )
    _load(model, fit, file.name)
    if fit.left_out:
        notices.append(f"{file.name}: {_listed(fit.left_out)} left out, since the model has no such tensors")
    return fit, notices


def _has_the_shapes(file: WeightFile, model: nn.Module) -> bool:
    """Return True if a file has tensors with the shapes of the model's, in the same order."""
    own = [tensor.shape for tensor in model.state_dict().values()]
    return any([tensor.shape for tensor in group.tensors.values()] == own for group in file.groups)


def _choose(fits: list[Fit], ema: bool | Literal["auto"], source: str, remedy: str) -> tuple[Fit, list[str]]:
    """Choose the tensors to load among all groups of a file."""
    whole = [fit for fit in fits if not fit.problems]
    if not whole:
        nearest = max(fits, key=lambda fit: fit.num_matched)
        where = f" ({nearest.label})" if nearest.label else ""
        raise UserError(
            f"{source}{where} does not fit this architecture: tensors {'; '.join(nearest.problems)}{remedy}"
        )
    averaged, raw = [fit for fit in whole if fit.averaged], [fit for fit in whole if not fit.averaged]
    if ema is True and not averaged:
        raise UserError(f"{source} has no averaged weights: pass --model.ema=0 for the raw ones")
    if ema is False and not raw:
        raise UserError(f"{source} has only averaged weights: pass --model.ema=auto or 1 for these")
    chosen = raw if ema is False or not averaged else averaged
    first, *others = chosen
    if any(not _same(first, other) for other in others):
        labels = " and ".join(fit.label or "the outermost tensors" for fit in chosen)
        raise UserError(
            f"{source} has several weights that fit: {labels}. Save the ones you want in a file of their own"
        )
    notices = []
    if averaged and raw and ema == "auto":
        notices.append(
            f"{source} has averaged and raw weights: the averaged ones ({first.label}) are used; --model.ema=0 takes "
            f"the raw ones ({raw[0].label})"
        )
    return first, notices


def _same(one: Fit, other: Fit) -> bool:
    return one.state.keys() == other.state.keys() and all(
        torch.equal(tensor, other.state[name]) for name, tensor in one.state.items()
    )


def _load(model: nn.Module, fit: Fit, source: str) -> None:
    """Load tensors that fit, if their values are those of a trained model."""
    own = model.state_dict()
    if fault := fault_of(fit.state, own):
        raise UserError(f"{source} has {fault}: the training that made it failed")
    state: Any = type(own)({**own, **fit.state})
    # The versions of the modules, without which some architectures take current tensors for old ones.
    state._metadata = getattr(own, "_metadata", None) if fit.metadata is None else fit.metadata
    model.load_state_dict(state)


def fault_of(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """Return the values in tensors that no trained model has, in words; "" if there are none.

    The tensors are on the CPU. They are compared with those of a new model by the same names: values are judged in
    their type, and masks are not finite from the beginning.
    """
    cast = {name: tensor.to(own[name].dtype) for name, tensor in state.items() if tensor.is_floating_point()}
    if bad := [name for name, tensor in cast.items() if not _is_finite(tensor, own[name])]:
        return f"values that are not finite in {_listed(bad)}"
    if bad := [name for name, tensor in cast.items() if name.endswith("running_var") and (tensor < 0).any()]:
        return f"negative variances in {_listed(bad)}"
    return ""


def _is_finite(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    """Return True if a tensor is finite wherever a new model is."""
    finite = tensor.isfinite()
    return bool(finite.all()) or (not own.is_meta and bool((finite | ~own.cpu().isfinite()).all()))


def _fits(group: TensorGroup, model: nn.Module, head: Head) -> list[Fit]:
    """Return the fits of a group's tensors under each prefix that they may have."""
    own = model.state_dict()
    tensors, blurred = _without_blur(group.tensors)
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                counts[".".join(parts[:i])] += 1
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if 2 * count > most] or [""]
    fits = [_fit(group, tensors, prefix, model, head) for prefix in prefixes]
    counters = {_counter(prefix) for prefix in prefixes}
    for prefix, fit in zip(prefixes, fits, strict=True):
        others = tuple(f"{other}." for other in prefixes if other not in ("", prefix))
        fit.blurred = blurred
        fit.left_out = [name for name in fit.left_out if name not in counters and not name.startswith(others)]
    return fits


def _renamed_by_timm(group: TensorGroup, model: nn.Module) -> TensorGroup:
    """Return a group under the names that timm gives to the tensors of the project that published an architecture.

    timm applies such rules only to weights that it downloads. A group that the rules do not know is returned as it is.
    """
    rules = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rules is None:
        return group
    try:
        tensors = rules(dict(group.tensors), model)
    except Exception:  # the rules of each architecture fail in their own way
        return group
    return TensorGroup(group.place, dict(tensors), None)


def _counter(prefix: str) -> str | None:
    """Return the name of the count that AveragedModel stores beside its module; None if the prefix is of no module."""
    outer, _, last = f".{prefix}".rpartition(".")
    return f"{outer[1:]}.n_averaged".removeprefix(".") if last == "module" else None


def _without_blur(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """Return tensors without the blur filters that ffcv-imagenet stores, and True if there were any."""
    blurred = {name.removesuffix("blur_filter") for name in tensors if name.endswith(".blur_filter")}
    if not blurred:
        return dict(tensors), False
    renamed = {f"{layer}conv.{part}": f"{layer}{part}" for layer in blurred for part in ("weight", "bias")}
    kept = {renamed.get(name, name): tensor for name, tensor in tensors.items() if not name.endswith(".blur_filter")}
    return kept, True


def _fit(group: TensorGroup, tensors: Mapping[str, torch.Tensor], prefix: str, model: nn.Module, head: Head) -> Fit:
    """Give the tensors below a prefix the names of the model, and find what does not fit."""
    own, start = model.state_dict(), f"{prefix}." if prefix else ""
    below = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
    state = _known_parts(_present_names(below, own), own)
    beside = _beside(tensors, prefix, own, own.keys() - state.keys() - _batch_counts(model))
    state.update(beside.values())
    counter = _counter(prefix)
    label = ".".join(part for part in (group.place, prefix) if part)
    averaged = is_averaged(label) or (counter is not None and counter in tensors)
    fit = Fit(label, averaged, state, group.metadata if not prefix else _metadata_below(group.metadata, start))
    fit.left_out = sorted(name for name in tensors if not name.startswith(start) and name not in beside)
    matched = sorted(state.keys() & own.keys())
    fit.num_matched = len(matched)
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [name for name in matched if state[name].shape != own[name].shape]
    others = [
        name
        for name in matched
        if state[name].is_floating_point() != own[name].is_floating_point()
        or state[name].is_meta
        or state[name].layout != torch.strided
    ]
    missing = sorted(own.keys() - state.keys() - _batch_counts(model))
    if misshapen or missing:
        misshapen, missing = _leave_new_head(fit, misshapen, missing, own, head)
    if fit.new_head and unexpected:
        unexpected = _leave_other_layers(fit, start, unexpected)
    fit.problems = [
        f"{what} ({_listed(names)})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (misshapen, "of another shape"),
            (others, "of another type"),
        )
        if names
    ]
    return fit


def _leave_new_head(
    fit: Fit, misshapen: list[str], missing: list[str], own: Mapping[str, torch.Tensor], head: Head
) -> tuple[list[str], list[str]]:
    """Leave out a head of another size, or note that there is none; return the names that still do not fit."""
    sizes = {head.classes_of(name, tuple(fit.state[name].shape)) for name in misshapen if name in head}
    if len(sizes) == 1 and None not in sizes:
        (fit.head_classes,) = sizes
        fit.new_head = [name for name in own if name in misshapen and name in head]
    elif missing and not misshapen and set(missing) == set(head.class_dims):
        fit.new_head = [name for name in own if name in head]
    fit.state = {name: value for name, value in fit.state.items() if name not in fit.new_head}
    return [name for name in misshapen if name not in fit.new_head], [n for n in missing if n not in fit.new_head]


def _leave_other_layers(fit: Fit, start: str, unexpected: list[str]) -> list[str]:
    """Leave out the layers of a head that has others than the model's; return the names that still do not fit.

    People replace the head ``fc`` by a dropout and ``fc.1``, for example, or by several layers.
    """
    places = {f"{name.rpartition('.')[0]}." for name in fit.new_head}
    others = [name for name in unexpected if any(name.startswith(place) for place in places)]
    fit.state = {name: value for name, value in fit.state.items() if name not in others}
    fit.left_out += [f"{start}{name}" for name in others]
    fit.other_head = bool(others)
    return [name for name in unexpected if name not in others]


def _beside(
    tensors: Mapping[str, torch.Tensor], prefix: str, own: Collection[str], missing: Collection[str]
) -> dict[str, tuple[str, torch.Tensor]]:
    """Return tensors that a prefix lacks and that stand beside it, with the model's names, by their own names.

    Some projects keep the body and the head apart, as ``backbone.conv1.weight`` and ``head.fc.weight``.
    """
    parent = prefix.rpartition(".")[0]
    outer = f"{parent}." if parent else ""
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for name in missing if prefix else ():
        matches = [key for key in tensors if key.startswith(outer) and f".{key}".endswith(f".{name}")]
        if len(matches) != 1:
            return {}
        found[matches[0]] = name, tensors[matches[0]]
    places = {key.removesuffix(name) for key, (name, _) in found.items()}
    is_only_a_part = sum(f"{place}{name}" in tensors for place in places for name in own) == len(found)
    return found if len(places) == 1 and is_only_a_part else {}


def _present_names(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tensors with names of an earlier version of their library the names that the model has."""

    def present(name: str) -> str:
        for older, newer in OLDER_NAMES if name not in own else ():
            if (renamed := older.sub(newer, name)) in own:
                return renamed
        return name

    return {present(name): tensor for name, tensor in state.items()}


def _known_parts(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the parts of names that the model does not have, as wrappers of its layers add, if all names then fit."""
    if state.keys() <= own.keys():
        return state
    known = {part for name in own for part in name.split(".")}
    renamed = {".".join(part for part in name.split(".") if part in known): value for name, value in state.items()}
    return renamed if len(renamed) == len(state) and renamed.keys() <= own.keys() else state


def _metadata_below(metadata: Mapping[str, Any] | None, start: str) -> dict[str, Any] | None:
    """Return the versions of the modules below a prefix, by their names there."""
    if metadata is None:
        return None
    below = {
        f"{name}."[len(start) :].rstrip("."): value for name, value in metadata.items() if f"{name}.".startswith(start)
    }
    return below or None


def _batch_counts(model: nn.Module) -> set[str]:
    """Return the names of the counts of batches. They change nothing in a model, and old files do not have them."""
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return {f"{name}.num_batches_tracked" if name else "num_batches_tracked" for name in norms}


def _listed(names: Iterable[str]) -> str:
    """Return the number of names and the first few of them."""
    names = list(names)
    return f"{len(names)}: {', '.join(names[:NUM_SHOWN])}{', ...' if len(names) > NUM_SHOWN else ''}"
