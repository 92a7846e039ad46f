"""The classes of a model and of a validation file: the model's number for each class of the file."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffcv_ops import Beton, UserError
from ffcv_ops.units import show_names
from imagenet_training.models.weight_file import read_card
from imagenet_training.planning.recipe import Recipe


@dataclass(frozen=True, eq=False)
class ClassMatch:
    """The classes of a model, and the numbers that the model has for those of a validation file.

    Attributes
    ----------
    names : list of str or None
        Names of the model's classes, by number. None if they are not known.
    numbers : ndarray of int64, shape (classes of the file,), or None
        The model's number for each class of the file. None if both have the same numbers.
    notices : tuple of str
        Everything that was assumed or chosen.
    """

    names: list[str] | None
    numbers: np.ndarray | None = None
    notices: tuple[str, ...] = ()

    def to_model(self, labels: np.ndarray) -> np.ndarray:
        """Return the model's class numbers for labels of the file; both int64 (N,)."""
        return labels if self.numbers is None else self.numbers[labels]


def match_classes(file: Beton, names: Sequence[str] | None, num_classes: int, *, model: str) -> ClassMatch:
    """Match the classes of a validation file with those of a model, by name.

    Parameters
    ----------
    names : sequence of str or None
        Names of the model's classes, by number. None if they are not known.
    model : str
        The origin of the model's classes, for messages.

    Raises
    ------
    UserError
        If the file has a class that the model has not. If names are missing, and the numbers of classes differ.
    """
    if file.classes is not None and names is not None:
        return _match_by_name(file, file.classes, list(names), model)
    if file.num_classes != num_classes:
        without = model if names is None else "the file"
        raise UserError(
            f"{file.path} has {file.num_classes:,} classes, {model} has {num_classes:,}, and {without} has no names to "
            "match them by: write_beton.py keeps the names of a file's classes, and a checkpoint those of its run"
        )
    classes = file.classes if file.classes is not None else names
    notice = f"the {num_classes:,} classes of {file.path} are assumed to be those of {model} in the same order: "
    notice += "neither has names" if classes is None else f"only {'the file' if names is None else model} has names"
    return ClassMatch(None if classes is None else list(classes), None, (notice,))


def _match_by_name(file: Beton, classes: list[str], names: list[str], model: str) -> ClassMatch:
    if classes == names:
        return ClassMatch(names)
    known = set(names)
    foreign = [name for name in classes if name not in known]
    if len(foreign) == len(names) and are_all_numbers(classes):
        # ImageNet-V2 has such folders. Sorted as text, they are in the order 0, 1, 10, 100, ...
        notice = f"the classes of {file.path} are named 0 to {len(names) - 1}: taken as the numbers of {model}"
        return ClassMatch(names, np.array([int(name) for name in classes], np.int64), (notice,))
    if foreign:
        raise UserError(
            f"{file.path} has {len(foreign):,} of {len(classes):,} classes that {model} does not have: "
            f"{show_names(foreign)}"
        )
    for owner, listed in ((model, names), (str(file.path), classes)):
        if twins := [name for name, count in Counter(listed).items() if count > 1]:
            raise UserError(
                f"{owner} has several classes of the same name: {show_names(twins)}: names cannot match them"
            )
    number_of = {name: number for number, name in enumerate(names)}
    what = f"{len(classes):,} of the {len(names):,} classes" if len(classes) < len(names) else "the classes"
    order = "" if len(classes) < len(names) else " in another order"
    notice = f"{file.path} has {what} of {model}{order}: labels are matched by name"
    return ClassMatch(names, np.array([number_of[name] for name in classes], np.int64), (notice,))


def names_of_weights(recipe: Recipe, own: list[str] | None, source: str) -> list[str] | None:
    """Return the names of the classes of weights, by number: their own, or those of ``model.class_names``, if any.

    The source of the weights is for messages.

    Raises
    ------
    UserError
        If both have names, or the file of names cannot be read.
    """
    file = recipe.model.class_names
    if file is None:
        return own
    if own is not None:
        raise UserError(f"{recipe.shown('model.class_names')}: {source} has the names of its classes itself")
    from ffcv_ops.sources.webdataset import read_class_names  # here, because few runs need it

    return read_class_names(file)


def names_in_file(recipe: Recipe) -> list[str] | None:
    """Return `names_of_weights` for the file ``model.weights``, which is read for it."""
    weights = recipe.model.weights
    card = read_card(weights) if weights else None
    return names_of_weights(recipe, card.classes if card is not None else None, str(weights))


def order_notices(file: Beton) -> list[str]:
    """Return a notice if timm would number the classes of a file in another way, which weights do not show."""
    names = sorted(file.classes or [], key=_natural_key)
    if names == (file.classes or []):
        return []
    return [
        f"timm numbers classes of these names in another order: {show_names(names)}. If it has trained the weights, "
        "pass a file with the names in that order as --model.class_names"
    ]


def _natural_key(name: str) -> list[int | str]:
    """Return the key by which timm 1.0.31 sorts names: lower case, with digits as numbers."""
    # To import timm's function would take seconds.
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name.lower()))]


def head_notices(path: str, of_weights: Sequence[str] | None, of_data: Sequence[str] | None) -> list[str]:
    """Return a notice if the head of weights at a path has as many classes as the training data, but other ones."""
    if of_weights is None or of_data is None or len(of_weights) != len(of_data) or list(of_weights) == list(of_data):
        return []
    what = "the classes in another order" if set(of_weights) == set(of_data) else "other classes"
    return [f"{path} has a head of {what} than the training data: training starts from it all the same"]


def imagenet_names(file: Beton, num_classes: int) -> list[str] | None:
    """Return ImageNet's synsets in the order of published weights, if a model without names may be one of ImageNet.

    timm knows the lists of 1,000 classes and of ImageNet-21k, by their number of classes. None if there is no such
    list, or if the file has other classes.
    """
    classes = file.classes
    if classes is None or not (are_all_numbers(classes) or all(re.fullmatch(r"n\d{8}", name) for name in classes)):
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset  # importing timm takes seconds

    subset = infer_imagenet_subset({"num_classes": num_classes})
    names = list(ImageNetInfo(subset).label_names()) if subset else []
    fits = set(classes) <= set(names) or (are_all_numbers(classes) and len(classes) == len(names))
    return names if fits else None


def are_all_numbers(names: Sequence[str]) -> bool:
    """Return True if the names are the numbers from 0 on, each once, in any order."""
    return sorted(names) == sorted(str(number) for number in range(len(names)))
