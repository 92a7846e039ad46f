"""The facts about a trained model that its tensors do not hold."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling, fromarray

from ffcv_ops.errors import UserError
from ffcv_ops.settings.declare import parameters_of
from imagenet_training.planning.recipe import Recipe
from imagenet_training.state import TrainState

# The key of the facts in the metadata of a safetensors file.
CARD_KEY = "imagenet_training"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMAT = 1
# The settings of a recipe that facts are the values of, so that both have the same bounds.
_SETTINGS_OF_MODEL = {
    "arch": "model.arch", "library": "model.library", "num_classes": "model.num_classes",
    "drop_path": "model.drop_path", "use_blurpool": "training.use_blurpool",
}  # fmt: skip
_SETTINGS = {
    "mean": "data.mean", "std": "data.std", "resolution": "validation.resolution",
    "crop_ratio": "validation.crop_ratio", "resize": "validation.resize",
    "interpolation": "validation.interpolation", "flip": "validation.lr_tta", "precision": "training.precision",
    "channels_last": "training.channels_last",
}  # fmt: skip


@dataclass(frozen=True)
class ModelCard:
    """The facts about a trained model that its tensors do not hold: how to build it, and how to give it an image.

    Attributes
    ----------
    model : dict
        Arguments of `imagenet_training.models.architectures.build_model`: ``arch``, ``library``, ``num_classes``,
        ``use_blurpool`` and others.
    mean, std : tuple of 3 float
        Mean and standard deviation that normalise each channel, in units of 0 to 1.
    resolution : int
        Side of the images, px.
    crop_ratio, resize : float, int or None
        The centre crop of the evaluation; see `ffcv_ops.CenterCrop`.
    interpolation : {"bilinear", "bicubic"}
    flip : bool
        The evaluation averaged the logits of each image and its mirror image.
    precision, channels_last : {"16-mixed", "bf16-mixed", "32"}, bool
        Numbers, and memory format of the weights, in the evaluation.
    classes : list of str or None
        Names of the classes, in the order of the logits; None if they are not known.
    averaged : bool or None
        The tensors are a moving average of the weights. None: the file holds both.
    epoch : int
        The epoch of the tensors, counted from 0; -1 before the end of the first.
    acc1 : float or None
        Top-1 on the validation split, in [0, 1]; None if these tensors were not evaluated.
    run_name : str
    """

    model: dict[str, Any]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resolution: int = 224
    crop_ratio: float = 0.875
    resize: int | None = None
    interpolation: str = "bilinear"
    flip: bool = False
    precision: str = "32"
    channels_last: bool = False
    classes: list[str] | None = field(default=None, repr=False)
    averaged: bool | None = None
    epoch: int = -1
    acc1: float | None = None
    run_name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON types, for `from_dict`."""
        values = dataclasses.asdict(self)
        return {"format": FORMAT, **values, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str) -> "ModelCard":
        """Build a card from the facts of a file. Facts that this version does not know are left out.

        Raises
        ------
        UserError
            If a later version of this project wrote the file in another format, or the facts are no run's.
        """
        if values.get("format") != FORMAT:
            raise UserError(f"{name} has facts of format {values.get('format')}; this version reads {FORMAT}")
        known = {entry.name for entry in dataclasses.fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        if problem := _problem_of(chosen):
            raise UserError(f"the facts in {name} are damaged: {problem}")
        model = {"library": "auto", "drop_path": 0.0, "use_blurpool": False, **chosen["model"]}
        return cls(**{**chosen, "model": model, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, Any], model: Mapping[str, Any], classes: list[str] | None) -> "ModelCard":
        """Build the card of a run from its resolved recipe, by section, and the arguments of its model."""
        places = {fact: key.split(".") for fact, key in _SETTINGS.items()}
        # A setting that the version of the recipe does not have yet had the present default.
        facts = {fact: recipe[section][name] for fact, (section, name) in places.items() if name in recipe[section]}
        for statistic in facts.keys() & {"mean", "std"}:
            facts[statistic] = tuple(facts[statistic])
        return cls(model=dict(model), classes=classes, **facts)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of a recipe that the card has, by section, with the types of JSON."""
        facts, found = self.to_dict(), dict[str, dict[str, Any]]()
        for values, settings in ((facts["model"], _SETTINGS_OF_MODEL), (facts, _SETTINGS)):
            for fact, key in settings.items():
                section, name = key.split(".")
                found.setdefault(section, {})[name] = values[fact]
        return found

    @classmethod
    def of_checkpoint(cls, content: Mapping[str, Any], name: str) -> "ModelCard | None":
        """Build the card of a checkpoint of this project. Return None for the content of another file."""
        recipe, state = content.get("recipe"), content.get("state")
        if not isinstance(recipe, Mapping) or not isinstance(state, Mapping) or "run_name" not in state:
            return None
        if "card" in content:
            card = cls.from_dict(content["card"], name)
        else:  # a checkpoint of an earlier version
            names = ("arch", "library", "num_classes", "drop_path")
            model = {key: recipe["model"][key] for key in names}
            card = cls.of_recipe(
                recipe, {**model, "use_blurpool": recipe["training"]["use_blurpool"]}, content.get("classes")
            )
        return card.at(TrainState.of(content), averaged=None if content.get("ema") else False)

    def at(self, state: TrainState, *, averaged: bool | None) -> "ModelCard":
        """Return the card with the facts of a position of its run."""
        evaluated = state.samples == 0 and state.epoch == state.best_epoch + 1
        return dataclasses.replace(
            self,
            averaged=averaged,
            epoch=state.epoch - 1,
            acc1=state.best_acc1 if evaluated and state.best_acc1 >= 0 else None,
            run_name=state.run_name,
        )

    def transform(self, image: Image) -> torch.Tensor:
        """Return an image as the model takes it: cropped, resized and normalised as in the evaluation.

        Parameters
        ----------
        image : PIL.Image.Image
            Of any mode and size. As in the writing of a file, 16-bit grayscale keeps its upper 8 bits.

        Returns
        -------
        torch.Tensor
            Float32 (3, resolution, resolution). Pillow resizes the image. The pixels differ a little from those of
            the evaluation: the images of a ``.beton`` file are encoded again, and large ones shrunk. If the crop
            is large, the JPEG decoder also halves the image first.

        Raises
        ------
        UserError
            If the pixels are numbers of unknown range, such as floating-point numbers.
        """
        # Here, because importing the kernels takes seconds.
        from ffcv_ops.operations.crops import center_crops
        from ffcv_ops.sources.image import rgb_pixels

        sides = np.array([image.height]), np.array([image.width])
        y, x, height, width = center_crops(*sides, self.resolution, self.crop_ratio, self.resize)[0].tolist()
        resampling = Resampling[self.interpolation.upper()]
        size = (self.resolution, self.resolution)
        box = (x, y, x + width, y + height)
        pixels = np.array(fromarray(rgb_pixels(image)).resize(size, resampling, box=box))
        scaled = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        return (scaled - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def _problem_of(facts: Mapping[str, Any]) -> str:
    """Return what is wrong with facts; "" if nothing is."""
    model, classes = facts.get("model"), facts.get("classes")
    if not isinstance(model, dict) or not {"arch", "num_classes"} <= model.keys() <= _SETTINGS_OF_MODEL.keys():
        return f"model must have arch and num_classes, and nothing but {', '.join(_SETTINGS_OF_MODEL)}: {model!r}"
    if not all(isinstance(facts.get(key), (list, tuple)) for key in ("mean", "std")):
        return "mean and std must be lists"
    if not all(isinstance(model.get(key, ""), str) for key in ("arch", "library")):
        return "arch and library must be text"
    parameters = parameters_of(Recipe)
    for values, settings in ((model, _SETTINGS_OF_MODEL), (facts, _SETTINGS)):
        for key in settings.keys() & values.keys():
            checker, value = parameters[settings[key]].checker, values[key]
            if value is None and key == "resize":
                continue
            try:
                checker.check(value)
            except (ValueError, TypeError, OverflowError):
                return f"{key} must be {checker.help()}, not {value!r}"
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return "classes must be a list of names"
    if classes is not None and len(classes) != model["num_classes"]:
        return f"the model has {model['num_classes']:,} classes, and {len(classes):,} names"
    return "" if facts.get("averaged") in (None, True, False) else "averaged must be true, false or null"
