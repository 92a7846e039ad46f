"""The mean and standard deviation that normalise images: those that the weights of a model expect."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torchvision

from ffcv_ops.settings.fields import show
from imagenet_training.models.architectures import find_library
from imagenet_training.models.card import IMAGENET_MEAN, IMAGENET_STD
from imagenet_training.models.weight_file import read_card
from imagenet_training.planning.recipe import Recipe

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Expected:
    """The normalisation that weights expect, in units of 0 to 1, and the source of it; "" if ImageNet's is assumed."""

    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    source: str = ""
    notices: tuple[str, ...] = ()


def settle_normalization(recipe: Recipe, resumed: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe with numbers for ``data.mean`` and ``data.std``, and a notice if they are not the weights' own.

    A setting that is not ``auto`` is kept. Otherwise the numbers are those of the checkpoint that the run continues
    from, of the file of weights, or of the pretrained weights. If none of them has numbers, they are ImageNet's.
    """
    expected = _of_checkpoint(resumed) if resumed is not None else _of_weights(recipe)
    taken: dict[str, Any] = {}
    notices = list(expected.notices)
    for name, value in (("mean", expected.mean), ("std", expected.std)):
        key, asked = f"data.{name}", getattr(recipe.data, name)
        if asked == "auto":
            taken[key] = value
        elif asked != value and expected.source:
            notices.append(f"{recipe.shown(key)} is not {show(value)}, which {expected.source} have been trained with")
    settled = recipe.with_values(taken, expected.source or "ImageNet") if taken else recipe
    return replace(settled, notices=(*recipe.notices, *notices))


def pixel_statistics(recipe: Recipe) -> tuple[Triple, Triple]:
    """Return mean and standard deviation of each channel in units of 0 to 255."""
    data = recipe.data if "auto" not in (recipe.data.mean, recipe.data.std) else settle_normalization(recipe).data
    assert data.mean != "auto" and data.std != "auto"
    (r, g, b), (dr, dg, db) = data.mean, data.std
    return (r * 255, g * 255, b * 255), (dr * 255, dg * 255, db * 255)


def _triple(values: Iterable[float]) -> Triple:
    red, green, blue = values
    return red, green, blue


def _of_checkpoint(content: Mapping[str, Any]) -> Expected:
    data = content["recipe"]["data"]  # earlier versions had no other numbers than ImageNet's
    mean, std = data.get("mean", IMAGENET_MEAN), data.get("std", IMAGENET_STD)
    return Expected(_triple(mean), _triple(std), "the weights resumed")


def _of_weights(recipe: Recipe) -> Expected:
    model = recipe.model
    if not model.weights:
        return (_published(recipe) if model.pretrained else None) or Expected()
    card = read_card(model.weights)
    if card is not None:
        return Expected(card.mean, card.std, f"the weights of {model.weights}")
    published = _published(recipe) if "auto" in (recipe.data.mean, recipe.data.std) else None
    if published is None or (published.mean, published.std) == (IMAGENET_MEAN, IMAGENET_STD):
        return Expected()
    notice = (
        f"{model.weights} does not say its normalisation: ImageNet's is assumed. {published.source} expect "
        f"--data.mean={show(published.mean)} --data.std={show(published.std)}"
    )
    return Expected(notices=(notice,))


def _published(recipe: Recipe) -> Expected | None:
    """Return what the library's own weights of an architecture expect; None if there are none."""
    arch, library = recipe.model.arch, find_library(recipe.model.arch, recipe.model.library)
    source = f"{library}'s own weights of {arch}"
    if library == "timm":
        import timm

        known = timm.get_pretrained_cfg(arch)
        return Expected(_triple(known.mean), _triple(known.std), source) if known is not None else None
    chosen = torchvision.models.get_model_weights(arch).__members__.get("IMAGENET1K_V1")
    if chosen is None:
        return None
    preset: Any = chosen.transforms()
    return Expected(_triple(preset.mean), _triple(preset.std), source)
