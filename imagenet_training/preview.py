"""The preview: training images of a recipe as the model gets them, on one contact sheet."""

from pathlib import Path

from imagenet_training import distributed
from imagenet_training.data.augmentation import describe_augmentations
from imagenet_training.data.contact_sheet import caption, class_names, denormalized, draw_contact_sheet, take_images
from imagenet_training.data.loaders import build_random_crop, build_train_loader, open_train_file
from imagenet_training.data.normalization import pixel_statistics
from imagenet_training.models.precision import DTYPES
from imagenet_training.planning.plan import epoch_samples
from imagenet_training.planning.recipe import Recipe
from imagenet_training.planning.schedule import resolution_at


def draw_preview(recipe: Recipe) -> None:
    """Draw the first training images of epoch 0 as the model gets them. This needs data, and trains nothing."""
    path, world = Path(recipe.training.preview or ""), distributed.start()
    data = open_train_file(recipe)
    num_samples = epoch_samples(data.num_samples, world.world_size, recipe.augmentation.repeats)
    batch_size = min(recipe.training.batch_size, num_samples // world.world_size)
    crop = build_random_crop(recipe, resolution_at(recipe.resolution, 0))
    dtype = DTYPES[recipe.training.precision if world.device.type == "cuda" else "32"]
    with build_train_loader(recipe, data, world, dtype, crop, batch_size=batch_size) as loader:
        images, targets = take_images(loader.epoch(0), len(loader))
    if world.is_main:
        shown = denormalized(images, *pixel_statistics(recipe))
        names = class_names(data.classes, data.num_classes)
        captions = [caption(target, names) for target in targets.numpy()]
        draw_contact_sheet(shown, captions, path, title=preview_title(recipe, crop.size))
        print(f"{len(shown)} training images as the model gets them: {path}")
    distributed.stop()


def preview_title(recipe: Recipe, size_px: int) -> str:
    """Return what the images of a preview went through."""
    augmentation, names = recipe.augmentation, ", ".join(str(path) for path in recipe.files) or "no recipe"
    mixing = f"Mixup {augmentation.mixup_alpha:g}, CutMix {augmentation.cutmix_alpha:g}"
    return (
        f"{names}: epoch 0, {size_px} px, seed {recipe.training.seed}, the first images of the first batches\n"
        f"augmentation {describe_augmentations(recipe)}, {mixing}, "
        f"label smoothing {recipe.training.label_smoothing:g}; below each image its classes and their target weights"
    )
