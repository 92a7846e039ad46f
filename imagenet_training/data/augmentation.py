"""The operations between crop and mixing: built from a recipe, and in words."""

from typing import Any

from ffcv_ops import RandAugment, RandomErasing, TrivialAugmentWide, UserError
from imagenet_training.planning.recipe import Recipe


def build_augmentations(recipe: Recipe) -> list[Any]:
    """Build the operations, which change 8-bit images in place. ``augmentation.auto_augment`` must name real ones."""
    augmentation = recipe.augmentation
    operations: list[Any] = []
    if augmentation.auto_augment == "trivial":
        operations.append(TrivialAugmentWide())
    elif augmentation.auto_augment:
        try:
            operations.append(RandAugment(augmentation.auto_augment))
        except UserError as error:
            key = "augmentation.auto_augment"
            raise UserError(f"{key} ({recipe.source(key)}): {error}") from None
    if augmentation.erasing:
        operations.append(RandomErasing(augmentation.erasing))
    return operations


def describe_augmentations(recipe: Recipe) -> str:
    """Return the operations in words, for the summary of a run and for the preview."""
    augmentation = recipe.augmentation
    parts = []
    if augmentation.auto_augment == "trivial":
        parts.append("TrivialAugmentWide")
    elif augmentation.auto_augment:
        parts.append(f"RandAugment {augmentation.auto_augment}")
    if augmentation.erasing:
        parts.append(f"erasing {augmentation.erasing:g}")
    if augmentation.repeats > 1:
        parts.append(f"{augmentation.repeats} copies of each image")
    return ", ".join(parts or ["none"])
