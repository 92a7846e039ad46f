"""The classes of validation files that are not those of the model: fewer, in another order, foreign, without names."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from betons import photographs
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key
from torch import nn

from ffcv_ops import UserError, read_beton
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write
from imagenet_training.data.classes import imagenet_names, match_classes, order_notices
from imagenet_training.distributed import World
from imagenet_training.training.epoch import measure

WORLD = World()
ANIMALS = ["ant", "bee", "cow", "dog", "eel"]
SYNSETS = ImageNetInfo().label_names()


@pytest.fixture
def make(tmp_path):
    """Write a .beton file of one small image for each class, by its class folders."""

    def make(classes, *, named=True, order=None):
        for name, image in zip(classes, photographs(len(classes), side=8), strict=True):
            (tmp_path / "images" / name).mkdir(parents=True)
            assert cv2.imwrite(str(tmp_path / "images" / name / "0.png"), image)
        target = tmp_path / "val.beton"
        settings = WriteSettings(mode="raw")
        write(tmp_path / "images", target, settings, num_workers=1, classes=order, notice=lambda line: None)
        if not named:
            (tmp_path / "val.beton.json").unlink()
        return read_beton(target)

    return make


def match(file, names, num_classes=None):
    return match_classes(file, names, num_classes or len(names), model="the model")


@pytest.mark.parametrize(
    ("classes", "order", "names", "told"),
    [
        (ANIMALS, None, ANIMALS, None),
        (["bee", "cow"], ANIMALS, ANIMALS, None),  # written with the numbers of the training split
        (["bee", "dog"], None, ANIMALS, "has 2 of the 5 classes of the model: labels are matched by name"),
        (ANIMALS, None, ANIMALS[::-1], "has the classes of the model in another order: labels are matched by name"),
        (["eel"], None, [*SYNSETS[:7], "eel"], "has 1 of the 8 classes"),
        ([str(i) for i in range(12)], None, SYNSETS[:12], "named 0 to 11: taken as the numbers of the model"),
    ],
)
def test_every_label_is_the_model_s_number_of_its_class(make, classes, order, names, told):
    file = make(classes, order=order)
    found = match(file, names)
    assert found.names == list(names) and len(found.notices) == bool(told) and (told or "") in "".join(found.notices)
    ours = [names[number] for number in found.to_model(file.labels)]
    theirs = [file.classes[label] for label in file.labels]
    assert ours == ([names[int(name)] for name in theirs] if theirs[0].isdigit() else theirs)
    assert len(set(ours)) == len(classes)


def test_what_cannot_be_matched_is_refused(make):
    file = make(["bee", "yak", "zebu"])
    with pytest.raises(UserError, match=r"val.beton has 2 of 3 classes that the model does not have: yak, zebu$"):
        match(file, ANIMALS)
    with pytest.raises(UserError, match="has 3 classes, the model has 5, and the model has no names to match them by"):
        match(file, None, 5)
    with pytest.raises(UserError, match="the model has several classes of the same name: crane"):
        match(file, ["crane", "bee", "yak", "zebu", "crane"])


def test_numbers_as_names_are_no_numbers_of_a_model_with_other_classes(make):
    with pytest.raises(UserError, match=r"3 of 3 classes that the model does not have: 0, 1, 2$"):
        match(make(["0", "1", "2"]), ANIMALS)


@pytest.mark.parametrize(("named", "names"), [(True, None), (False, ANIMALS), (False, None)])
def test_an_order_that_nobody_knows_is_assumed_and_told(make, named, names):
    found = match(make(ANIMALS, named=named), names, 5)
    assert "are assumed to be those of the model in the same order" in found.notices[0] and found.numbers is None
    assert found.names == (ANIMALS if named or names else None)


@pytest.mark.parametrize(
    ("classes", "other"),
    [
        (["ant", "bee"], None),
        (["n01440764", "n02102040"], None),
        (["class10", "class9"], "class9, class10"),
        (["1", "10", "2", "3"], "1, 2, 3 and 1 more"),
        (["Zebra", "ant"], "ant, Zebra"),
        (["a2b", "a10", "a2"], "a2, a2b, a10"),
    ],
)
def test_an_order_of_timm_is_told_where_it_differs(make, classes, other):
    file = make(classes)
    assert (sorted(file.classes, key=natural_key) != file.classes) == (other is not None)
    assert [f"in another order: {other}. If" in notice for notice in order_notices(file)] == [True] * bool(other)


def test_a_file_without_names_of_another_count_is_refused(make):
    with pytest.raises(UserError, match="has 4 classes, the model has 5, and the file has no names"):
        match(make(ANIMALS[:4], named=False), ANIMALS)


def test_weights_without_names_may_be_of_imagenet(make):
    some = [SYNSETS[i] for i in (999, 3, 500)]
    file = make(some)
    assert imagenet_names(file, 1000) == SYNSETS
    assert sorted(match(file, SYNSETS).to_model(file.labels)) == [3, 500, 999]
    names = imagenet_names(file, 21843)
    assert len(names) == 21843 and [names[number] for number in match(file, names).numbers] == sorted(some)
    assert imagenet_names(file, 100) is None


@pytest.mark.parametrize("classes", [ANIMALS, ["n00000001", SYNSETS[0]]])
def test_weights_are_not_of_imagenet_if_the_file_is_not(make, classes):
    assert imagenet_names(make(classes), 1000) is None


@pytest.fixture
def case():
    """A classifier of 6 classes, and images of three of them under a file's own numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
    return model, 5 * torch.randn(40, 3, 8, 8), torch.randint(3, (40,)), np.array([4, 0, 5])


def test_labels_are_those_of_the_model_before_anything_is_measured(case):
    model, images, labels, numbers = case
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    values = measure(model, batches, WORLD, num_samples=40, precision="32", numbers=numbers)
    logits, truth = model(images), torch.from_numpy(numbers)[labels]
    assert values["val/loss"] == pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-5)
    assert values["val/acc1"] == pytest.approx((logits.argmax(1) == truth).float().mean().item())


def test_only_classes_of_the_file_are_predicted_if_so_wanted(case):
    model, images, labels, numbers = case
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    among = np.sort(numbers)
    values = measure(model, batches, WORLD, num_samples=40, precision="32", numbers=numbers, among=among)
    logits = model(images)[:, torch.from_numpy(numbers)]
    assert values["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert values["val/acc1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert values["val/acc5"] == 1
    everything = measure(model, batches, WORLD, num_samples=40, precision="32", numbers=numbers)
    assert values["val/acc1"] > everything["val/acc1"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_image_without_finite_logits_is_no_hit(case, bad):
    model, images, labels, numbers = case
    nn.init.constant_(model[2].bias, bad)
    values = measure(model, [(images, labels)], WORLD, num_samples=40, precision="32", numbers=numbers)
    assert values["val/acc1"] == values["val/acc5"] == 0 and not np.isfinite(values["val/loss"])
