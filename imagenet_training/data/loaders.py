"""The data of a recipe: its two files, and the loaders that turn them into batches."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ffcv_ops import (
    Beton,
    CenterCrop,
    Label,
    Loader,
    Mix,
    Normalize,
    OrderOption,
    RandomResizedCrop,
    ToDevice,
    ToTensor,
    UserError,
    read_beton,
)
from ffcv_ops.loading.epoch import EpochIterator
from ffcv_ops.machine import cpus_per_rank
from imagenet_training.data.augmentation import build_augmentations
from imagenet_training.data.classes import ClassMatch, imagenet_names, match_classes, names_in_file, order_notices
from imagenet_training.data.contact_sheet import denormalized
from imagenet_training.data.normalization import pixel_statistics
from imagenet_training.distributed import World
from imagenet_training.models.precision import DTYPES
from imagenet_training.planning.plan import IMAGENET_NUM_CLASSES, IMAGENET_NUM_TRAIN, IMAGENET_NUM_VAL, RunPlan
from imagenet_training.planning.recipe import Recipe


@dataclass(frozen=True)
class TrainingData:
    """The two files of a run, and the match of the classes of `val` with the model's.

    A run that only evaluates has no training file.
    """

    val: Beton
    classes: ClassMatch
    train: Beton | None = None

    @property
    def class_counts(self) -> np.ndarray | None:
        """Training images of each class, int64 (K,). None for a run that only evaluates."""
        return None if self.train is None else np.bincount(self.train.labels, minlength=self.train.num_classes)

    @property
    def num_val(self) -> int:
        return self.val.num_samples

    @property
    def num_train(self) -> int:
        return self.train.num_samples if self.train is not None else self.val.num_samples


class EarlyLoader(Loader):
    """A loader whose next epoch can begin before it is asked for. The arguments are those of `Loader`."""

    _begun: tuple[int, EpochIterator] | None = None

    def begin(self, epoch: int | None = None) -> None:
        """Begin to prepare the next epoch, or that of a number. If that fails, `epoch` tries it again."""
        next_epoch = self.next_epoch
        epoch = next_epoch if epoch is None else epoch
        with suppress(OSError, UserError), torch.inference_mode(False):
            self._begun = epoch, self.epoch(epoch)
        self.next_epoch = next_epoch

    def epoch(self, epoch: int, skip: int = 0, *, skip_samples: int | None = None) -> EpochIterator:
        """Return the batches of an epoch, as `Loader.epoch` does. If it has begun, some of them may be ready."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == epoch and not skip and not skip_samples:
            self.next_epoch = epoch + 1
            return begun[1]
        if begun is not None:
            begun[1].close()
        return super().epoch(epoch, skip, skip_samples=skip_samples)


@dataclass
class Loaders:
    """The loaders of a run that trains.

    When one of them has no more to prepare, the other one begins. Both keep the buffers of their batches in any case.

    Attributes
    ----------
    train : Loader
        Normalised images, float (N, 3, H, W), and dense targets, float (N, K).
    val : Loader
        Normalised images, float (N, 3, H, W), and labels, int64 (N,): this rank's share, each sample once.
    """

    train: EarlyLoader
    val: EarlyLoader
    train_crop: RandomResizedCrop

    def set_resolution(self, size_px: int) -> None:
        """Set the side of the training crops for the epochs that begin from now on."""
        self.train_crop.size = size_px

    def begin_training(self, epoch: int, plan: RunPlan) -> None:
        """Begin to prepare an epoch of training, if the run has it and its images have the same size as the last ones.

        For another size, the step is compiled or recorded first, and nothing should use the device meanwhile.
        """
        if epoch < plan.epochs and plan.resolution(epoch) == self.train_crop.size:
            self.train.begin(epoch)


def open_training_data(recipe: Recipe) -> TrainingData:
    """Open the files of a recipe that trains, and match their classes by name.

    Raises
    ------
    UserError
        If a file is missing or damaged, the training file has not as many classes as the model, the validation file has
        a class that the training file does not have, or ``model.class_names`` does not fit the weights.
    """
    if recipe.model.class_names:
        names_in_file(recipe)  # an error before anything is created
    train, val = open_train_file(recipe), read_beton(recipe.data.val_dataset)
    return TrainingData(val, match_splits(train, val), train)


def match_splits(train: Beton, val: Beton) -> ClassMatch:
    """Match the classes of the validation file with those of the training file, which are the model's.

    The notices also name files that would have the run validated on images that it trains on.
    """
    match = match_classes(val, train.classes, train.num_classes, model=str(train.path))
    return replace(match, notices=(*match.notices, *shared_image_notices(train, val)))


def shared_image_notices(train: Beton, val: Beton) -> list[str]:
    """Return a notice if both files hold the same images, as far as their manifests show.

    An archive or a folder of shards may have several splits, so the manifests of both files may name it. A folder of
    images has one, unless a share of it was held out.
    """
    sources = [(file.manifest or {}).get("source") or {} for file in (train, val)]
    places = [source.get("folder") or source.get("path") for source in sources]
    shares = [source.get("hold_out", 0.0) for source in sources]
    is_one_place = places[0] == places[1] and places[1] is not None and ("folder" in sources[1] or shares[1] > 0)
    is_held_out = [source.get("split") for source in sources] == ["train", "val"] and shares[0] >= shares[1]
    is_same = train.digest == val.digest and train.digest is not None
    if not is_same and (not is_one_place or is_held_out):
        return []
    what = "has the images of" if is_same else f"is from {places[1]}, as is"
    return [f"{val.path} {what} {train.path}, so the run is validated on images that it trains on"]


def open_evaluation_data(recipe: Recipe, names: Sequence[str] | None, val_digest: str | None = None) -> TrainingData:
    """Open only the validation file, and match its classes with those of the model by name.

    Parameters
    ----------
    names : sequence of str or None
        Names of the model's classes, by number. None if they are not known.
    val_digest : str or None
        Digest of the file on which the run of the model was validated. If the names are not known, those of this file
        are the model's.

    Raises
    ------
    UserError
        If the file is missing or damaged, or the model does not have its classes.
    """
    val, num_classes, notices = read_beton(recipe.data.val_dataset), recipe.model.known_num_classes, list[str]()
    if names is None and val_digest is not None and val_digest == val.digest:
        names = val.classes
    if names is None:
        names = imagenet_names(val, num_classes)
        if names is not None:
            notices.append(f"the model has no class names: its {num_classes:,} classes are assumed to be ImageNet's")
        else:
            notices += order_notices(val)
    match = match_classes(val, names, num_classes, model="the model")
    return TrainingData(val, replace(match, notices=(*notices, *match.notices)))


def settle_num_classes(recipe: Recipe) -> Recipe:
    """Return a recipe with a number for ``model.num_classes``. ``auto`` becomes the number of the data's classes.

    The data are the training file, or the validation file if the recipe only evaluates. A dry run without the file
    keeps ImageNet's number.

    Raises
    ------
    UserError
        If the file is missing or damaged.
    """
    if recipe.model.num_classes != "auto":
        return recipe
    training = recipe.training
    path = recipe.data.val_dataset if training.eval_only else recipe.data.train_dataset
    if training.dry_run and not Path(path).exists():
        return recipe.with_values({"model.num_classes": IMAGENET_NUM_CLASSES}, f"no {path}: ImageNet's number")
    return recipe.with_values({"model.num_classes": read_beton(path).num_classes}, str(path))


class PlannedData(NamedTuple):
    """The images of the two splits for a plan, the training images of each class if they are known, and notices."""

    num_train: int
    num_val: int
    class_counts: np.ndarray | None
    notices: list[str]


def planned_data(recipe: Recipe) -> PlannedData:
    """Return the sizes of the data for a plan: of files, which are checked, or of ImageNet for missing files."""
    paths, notices = [Path(path) for path in (recipe.data.train_dataset, recipe.data.val_dataset)], list[str]()
    for path, size in zip(paths, (IMAGENET_NUM_TRAIN, IMAGENET_NUM_VAL), strict=True):
        if not path.exists():
            notices.append(f"{path} does not exist: assuming ImageNet's {size:,} images")
    train = open_train_file(recipe) if paths[0].exists() else None
    val = read_beton(paths[1]) if paths[1].exists() else None
    if train is not None and val is not None:
        notices += match_splits(train, val).notices
    num_train = IMAGENET_NUM_TRAIN if train is None else train.num_samples
    counts = None if train is None else np.bincount(train.labels, minlength=train.num_classes)
    return PlannedData(num_train, IMAGENET_NUM_VAL if val is None else val.num_samples, counts, notices)


def open_train_file(recipe: Recipe) -> Beton:
    """Open the training file, and check its number of classes against the model."""
    path = recipe.data.train_dataset
    beton = read_beton(path)
    if beton.num_classes != recipe.model.num_classes:
        raise UserError(
            f"{path} has {beton.num_classes} classes, the model {recipe.model.num_classes}: "
            f"pass --model.num_classes={beton.num_classes}, or another --data.train_dataset"
        )
    return beton


def build_loaders(recipe: Recipe, plan: RunPlan, data: TrainingData, world: World) -> Loaders:
    """Build the loaders of training and validation for this rank."""
    assert data.train is not None, "a run that only evaluates has no training loader"
    dtype = DTYPES[plan.precision]
    crop = build_random_crop(recipe, plan.resolution(0))
    return Loaders(
        train=build_train_loader(recipe, data.train, world, dtype, crop, batch_size=plan.batch_size),
        val=build_val_loader(recipe, data.val, world, dtype),
        train_crop=crop,
    )


def build_random_crop(recipe: Recipe, size_px: int) -> RandomResizedCrop:
    """Build the decoder of training images."""
    augmentation = recipe.augmentation
    return RandomResizedCrop(
        size=size_px,
        scale=augmentation.crop_scale,
        ratio=augmentation.crop_ratio,
        flip=augmentation.flip,
        interpolation=augmentation.interpolation,
    )


def build_train_loader(
    recipe: Recipe, file: Beton, world: World, dtype: torch.dtype, crop: RandomResizedCrop, *, batch_size: int
) -> EarlyLoader:
    """Build the loader of `Loaders.train`."""
    augmentation = recipe.augmentation
    mix = Mix(
        num_classes=recipe.model.known_num_classes,
        mixup_alpha=augmentation.mixup_alpha,
        cutmix_alpha=augmentation.cutmix_alpha,
        prob=augmentation.mix_prob,
        switch_prob=augmentation.switch_prob,
        smoothing=recipe.training.label_smoothing,
        per=augmentation.mix_per,
    )
    normalize = Normalize(*pixel_statistics(recipe), dtype)
    to_device = _to_device(world)
    return EarlyLoader(
        file,
        batch_size=batch_size,
        num_workers=_num_workers(recipe),
        os_cache=recipe.data.in_memory,
        order=OrderOption[recipe.data.order.upper()],
        distributed=world.world_size > 1,
        rank=world.rank,
        world_size=world.world_size,
        seed=recipe.training.seed,
        drop_last=True,
        repeats=augmentation.repeats,
        pipelines={
            "image": [crop, *build_augmentations(recipe), ToTensor(), *to_device, normalize, mix.images()],
            "label": [Label(), *to_device, mix.targets()],
        },
    )


def build_val_loader(
    recipe: Recipe,
    file: Beton,
    world: World,
    dtype: torch.dtype,
    *,
    indices: Sequence[int] | None = None,
    num_workers: int | None = None,
) -> EarlyLoader:
    """Build the loader of `Loaders.val`, of all samples or of those whose ids are given."""
    validation, to_device = recipe.validation, _to_device(world)
    crop = CenterCrop(
        validation.resolution,
        ratio=validation.crop_ratio,
        resize=validation.resize,
        interpolation=validation.interpolation,
    )
    return EarlyLoader(
        file,
        batch_size=validation.batch_size,
        num_workers=num_workers or _num_workers(recipe),
        os_cache=recipe.data.in_memory,
        order=OrderOption.SEQUENTIAL,
        distributed=world.world_size > 1,
        rank=world.rank,
        world_size=world.world_size,
        indices=indices,
        drop_last=False,
        pipelines={
            "image": [crop, ToTensor(), *to_device, Normalize(*pixel_statistics(recipe), dtype)],
            "label": [Label(), *to_device],
        },
    )


def validation_images(recipe: Recipe, file: Beton, ids: np.ndarray) -> np.ndarray:
    """Return images of the validation split as the model gets them, but in 8 bits: uint8 (N, H, W, 3).

    The ids of the samples, int64 (N,), may be in any order. No GPU is used, because its memory may be full.
    """
    alone = World()
    with build_val_loader(recipe, file, alone, torch.float32, indices=np.sort(ids).tolist(), num_workers=1) as loader:
        batches = [denormalized(images, *pixel_statistics(recipe)) for images, _ in loader]
    return np.concatenate(batches)[np.argsort(np.argsort(ids))] if batches else np.zeros((0, 1, 1, 3), np.uint8)


def _to_device(world: World) -> list[Any]:
    """Return the operations that bring a batch to this rank's GPU; none on a CPU."""
    return [ToDevice(world.device, non_blocking=True)] if world.device.type == "cuda" else []


def _num_workers(recipe: Recipe) -> int:
    """Return the number of threads that load for this rank."""
    return recipe.data.num_workers if recipe.data.num_workers > 0 else cpus_per_rank()
