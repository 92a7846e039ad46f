"""What a model cannot do is found on a few images, by trying, and before a run creates anything."""

import copy
import re

import pytest
import torch
from torch import nn

from imagenet_training.models.architectures import build_meta_model, build_model, model_arguments, recipe_meta_model
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.training.loss import recipe_loss
from imagenet_training.training.trial import Trial, candidates, try_model


def recipe_of(arch, sizes=(32, 32, 32), *arguments):
    smallest, largest, validation = sizes
    return read_recipe(
        [
            f"--model.arch={arch}", "--model.num_classes=5", f"--resolution.min_res={smallest}", "--batch_size=8",
            f"--resolution.max_res={largest}", f"--validation.resolution={validation}", *arguments,
        ]
    )  # fmt: skip


def plan_of(recipe):
    return plan_run(recipe, world_size=1, num_train=100, num_val=10, device_type="cpu")


def try_recipe(arch, sizes=(32, 32, 32), *arguments, on_meta=False):
    recipe = recipe_of(arch, sizes, *arguments)
    model = recipe_meta_model(recipe) if on_meta else build_model(**model_arguments(recipe))
    try_model(recipe, plan_of(recipe), model, recipe_loss(recipe))


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize(
    "arch, sizes",
    [
        ("regnet_y_400mf", (32, 64, 48)),  # computes with values while it is built
        ("googlenet", (32, 32, 32)),  # auxiliary heads
        ("levit_128s", (224, 224, 224)),  # two heads; caches in evaluation
    ],
)
def test_what_can_be_trained_passes(arch, sizes, on_meta):
    try_recipe(arch, sizes, on_meta=on_meta)


@pytest.mark.parametrize(
    "arch, sizes, remedy",
    [
        ("test_vit3", (128, 192, 160), "--resolution.min_res=160 --resolution.max_res=160 work"),
        ("test_vit_relpos", (160, 160, 256), "--validation.resolution=160 works"),
        ("squeezenet1_1", (16, 32, 32), "--resolution.min_res=32 works"),
        ("test_maxvit", (128, 160, 160), "--resolution.min_res=160 works"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line_with_sizes_that_do(arch, sizes, remedy):
    with pytest.raises(ValueError, match=rf"'s {arch} cannot take images of .*; {remedy}$") as caught:
        try_recipe(arch, sizes, on_meta=arch == "test_maxvit")
    assert "\n" not in str(caught.value)
    try_recipe(arch, sizes, *re.findall(r"--\S+=\d+", str(caught.value)), on_meta=True)


def test_a_size_within_the_ramp_is_tried_too():
    recipe = recipe_of("test_vit", (64, 128, 64), "--epochs=5", "--resolution.end_ramp=2")
    whole_tiles = nn.Sequential(nn.PixelUnshuffle(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 * 64**2, 5))
    with pytest.raises(
        ValueError, match="96 px in training, between .* and resolution.max_res.*--resolution.min_res=128 works"
    ):
        try_model(recipe, plan_of(recipe), whole_tiles, recipe_loss(recipe))


class OfOneSize(nn.Module):
    """A model that takes images of one size only, and declares the sizes of timm's models of published weights."""

    def __init__(self, size_px, declared_px):
        super().__init__()
        self.size_px, self.head = size_px, nn.Linear(3, 5)
        self.pretrained_cfg = {"input_size": (3, declared_px, declared_px), "test_input_size": (3, 1026, 770)}

    def forward(self, images):
        assert images.shape[-1] == self.size_px, f"images of {self.size_px} px are wanted"
        return self.head(images.mean((2, 3)))


def test_the_size_that_a_model_declares_is_tried():
    recipe = recipe_of("resnet18", (224, 224, 256))
    with pytest.raises(
        ValueError, match="--resolution.min_res=518 --resolution.max_res=518 --validation.resolution=518"
    ):
        try_model(recipe, plan_of(recipe), OfOneSize(518, 518), recipe_loss(recipe))
    with pytest.raises(ValueError, match=r"; none of \d+ sizes that were tried works: choose another --model.arch$"):
        try_model(recipe, plan_of(recipe), OfOneSize(518, 196), recipe_loss(recipe))


def test_timm_s_sizes_of_published_weights_are_candidates():
    for arch, size_px in {"vit_small_patch14_dinov2": 518, "eva_large_patch14_196": 196, "resnet50": 224}.items():
        assert size_px in candidates(build_meta_model(arch=arch, library="timm"))


def test_one_image_is_too_few_for_batch_normalisation_at_one_pixel():
    with pytest.raises(ValueError, match=r"cannot take one image of 32 px.*; --batch_size 2 or more works"):
        try_recipe("resnet18", (32, 32, 32), "--batch_size=1")
    try_recipe("resnet18", (64, 64, 64), "--batch_size=1")


@pytest.mark.parametrize(
    "arch, fault", [("ghostnet_050", "has no drop path"), ("test_efficientnet", "accepts the setting and ignores it")]
)
def test_drop_path_has_an_effect_or_is_refused(arch, fault):
    arguments = [(32, 32, 32), "--model.library=timm", "--model.drop_path=0.1"]
    with pytest.raises(ValueError, match=f"drop_path=0.1.*{arch} {fault}; pass --model.drop_path=0"):
        try_recipe(arch, *arguments, on_meta=True)
    try_recipe("test_convnext", *arguments)


def test_a_trial_changes_nothing():
    recipe = recipe_of("resnet18")
    model = build_model(**model_arguments(recipe))
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    try_model(recipe, plan_of(recipe), model, recipe_loss(recipe))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_large_images_pass_with_values_only_if_small_ones_or_the_shapes_fail(monkeypatch):
    sizes, forward = [], Trial._forward

    def record(trial, size_px, batch_size):
        sizes.append((trial.device.type, size_px))
        return forward(trial, size_px, batch_size)

    monkeypatch.setattr(Trial, "_forward", record)
    try_recipe("test_resnet", (160, 224, 256), "--training.class_weights=auto")
    assert {size for kind, size in sizes if kind == "cpu"} == {64}
    assert {size for kind, size in sizes if kind == "meta"} == {160, 224, 256}
    sizes.clear()
    try_recipe("test_vit3", (160, 160, 160))  # of a fixed size
    assert {size for kind, size in sizes if kind == "cpu"} == {64, 160}
