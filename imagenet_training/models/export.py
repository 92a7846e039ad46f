"""Write the weights of a model with the facts that they need, and build the model again."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import nn

from ffcv_ops.errors import UserError
from ffcv_ops.files import replacing
from imagenet_training.models.architectures import TORCHVISION_OPTIONS, build_model, head_of
from imagenet_training.models.card import CARD_KEY, IMAGENET_MEAN, IMAGENET_STD, ModelCard
from imagenet_training.models.memory_format import set_memory_format
from imagenet_training.models.weight_file import checksum, read_weight_file
from imagenet_training.models.weights import load_weights


class LoadedModel(NamedTuple):
    """A model, ready to be evaluated, and the facts about it."""

    model: nn.Module
    card: ModelCard


def export_weights(path: Path, state: Mapping[str, torch.Tensor], card: ModelCard) -> None:
    """Write a safetensors file with the tensors and the facts of a model. It appears whole or not at all.

    The ``_metadata`` of a ``state_dict()``, the versions of the modules, is stored too.
    """
    versions = getattr(state, "_metadata", {})
    tensors: dict[str, torch.Tensor] = {}
    used = set()
    for name, tensor in state.items():  # the format has neither memory formats nor shared tensors
        storage = tensor.untyped_storage().data_ptr()
        dense = tensor.detach().cpu().contiguous()
        tensors[name] = dense.clone() if storage in used else dense
        used.add(storage)
    facts = {
        "card": card.to_dict(),
        "metadata": {name: dict(values) for name, values in versions.items()},
        "checksum": checksum(tensors),
    }
    content = save(tensors, {"format": "pt", CARD_KEY: json.dumps(facts)})
    header, start = _sorted_header(content)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        file.write(memoryview(content)[start:])


def _sorted_header(content: bytes) -> tuple[bytes, int]:
    """Return the header of a safetensors file with sorted metadata, and where the tensors begin in the file.

    The package (0.8.0) writes metadata in an order that changes, which would give equal weights several digests.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, start


def load_model(path: str | Path, *, ema: bool | Literal["auto"] = "auto") -> LoadedModel:
    """Build the model of an exported weights file or of a checkpoint, on the CPU and in evaluation mode.

    The model is the one that its run has evaluated. No setting is needed: the file has them all::

        model, card = load_model("checkpoints/resnet50-weights.safetensors")
        logits = model(card.transform(PIL.Image.open("dog.jpg"))[None])
        print(card.classes[logits.argmax()])

    Parameters
    ----------
    path : path
        A file that this project wrote: ``checkpoints/ARCH-weights.safetensors``, or a checkpoint.
    ema : bool or "auto"
        Of a checkpoint with a moving average, take the average or the raw weights. ``"auto"``: the average, as the
        run's evaluation does.

    Returns
    -------
    model : torch.nn.Module
        From normalised images, float (N, 3, H, W), to logits, float (N, K). It takes any side that the architecture
        takes.
    card : ModelCard
        The facts: mean, std, resolution, names of the classes, accuracy and others. ``card.transform(image)`` makes
        the model's input of a PIL image.

    Raises
    ------
    UserError
        If the file is missing, damaged, or has no facts beside its tensors.
    """
    file = read_weight_file(path, str(path))
    if file.card is None:
        raise UserError(
            f"{path} does not say how to build its model: only checkpoints, and weights exported as .safetensors do. "
            "Load other weights with --model.weights and a recipe"
        )
    model = build_model(**file.card.model)
    fit, _ = load_weights(model, file, head_of(model, **file.card.model), ema=ema)
    if fit.new_head:
        raise UserError(f"{path} has other classes than its facts say: {', '.join(fit.new_head)} do not fit")
    is_raw_of_both = file.card.averaged is None and not fit.averaged
    acc1 = None if is_raw_of_both else file.card.acc1
    set_memory_format(model, file.card.channels_last, torch.device("cpu"))
    return LoadedModel(model.eval(), dataclasses.replace(file.card, averaged=fit.averaged, acc1=acc1))


def use_of_weights(path: Path, card: ModelCard) -> list[str]:
    """Return lines of Python that build the model of an exported file.

    The first line needs this project. A second line needs only the library of the architecture. It is left out if the
    library would build a model that computes something else, or expects images that are normalised in another way.
    """
    arch, library, num_classes = (card.model[key] for key in ("arch", "library", "num_classes"))
    file = json.dumps(str(path))
    lines = [f"from imagenet_training import load_model; model, card = load_model({file})"]
    if not _library_builds_the_same(card):
        return lines
    if library == "timm":
        build = f'timm.create_model("{arch}", num_classes={num_classes}, checkpoint_path={file})'
        return [*lines, f"import timm; model = {build}.eval()"]
    options = "".join(f", {key}={value}" for key, value in TORCHVISION_OPTIONS.get(arch, {}).items())
    build = f"torchvision.models.{arch}(num_classes={num_classes}{options})"
    load = f"model.load_state_dict(safetensors.torch.load_file({file}))"
    return [*lines, f"import safetensors.torch, torchvision; model = {build}.eval(); {load}"]


def _library_builds_the_same(card: ModelCard) -> bool:
    """Return True if the library's own model takes the tensors as they are in the file, and computes the same."""
    plain = {key: card.model[key] for key in ("arch", "library", "num_classes")}
    if (card.mean, card.std) != (IMAGENET_MEAN, IMAGENET_STD):
        return False
    if plain["library"] == "torchvision" and plain["arch"] in TORCHVISION_OPTIONS:
        return False
    if any(value for key, value in card.model.items() if key not in plain and key != "drop_path"):
        return False
    with torch.device("meta"):
        model = build_model(**plain)
    try:
        model.load_state_dict(dict(model.state_dict()), assign=True)
    except (RuntimeError, ValueError):
        # Without the versions of its modules, the library takes the tensors for older ones.
        return False
    return True
