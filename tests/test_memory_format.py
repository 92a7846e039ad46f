"""Weights are in channels_last format, but for those that this format would break."""

import copy
import re

import pytest
import torch
from torch import nn

from imagenet_training.distributed import World
from imagenet_training.models.architectures import build_meta_model, build_model, model_arguments
from imagenet_training.models.card import ModelCard
from imagenet_training.models.export import export_weights, load_model
from imagenet_training.models.memory_format import layer_without_channels_last, set_memory_format, to_channels_last
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.training.trainer import build_trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORLD = World()


def trainer_of(arch, *arguments):
    recipe = read_recipe([f"--model.arch={arch}", "--model.num_classes=5", "--batch_size=2", *arguments])
    plan = plan_run(recipe, world_size=1, num_train=100, num_val=10, device_type="cpu")
    return recipe, build_trainer(recipe, plan, WORLD)


def train_a_step(trainer):
    loss, _ = trainer.backward(torch.randn(2, 3, 32, 32), torch.full((2, 5), 0.2), number=0, place=(0,))
    trainer.optimizer_step(0.01, step=0)
    return loss


def is_channels_last(model):
    return any(tensor.ndim == 4 and not tensor.is_contiguous() for tensor in model.parameters())


@pytest.mark.parametrize(("arch", "library"), [("test_vit_relpos", "timm"), ("resnet18", "torchvision")])
def test_the_format_is_that_of_pytorch(arch, library):
    """Also of weights of 1 x 1, whose strides DistributedDataParallel compares with those of their gradients."""
    ours = build_model(arch, library=library, num_classes=5)
    theirs = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    to_channels_last(ours)
    pairs = [*zip(ours.parameters(), theirs.parameters(), strict=True)]
    pairs += [*zip(ours.buffers(), theirs.buffers(), strict=True)]
    assert is_channels_last(ours)
    for one, other in pairs:
        assert one.stride() == other.stride() and torch.equal(one, other)


def test_five_dimensions_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3))
    with pytest.raises(RuntimeError, match="rank 4"):
        copy.deepcopy(model).to(memory_format=torch.channels_last)
    to_channels_last(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) and model[1].weight.is_contiguous()
    _, trainer = trainer_of("lambda_resnet26t")
    assert is_channels_last(trainer.model) and train_a_step(trainer).isfinite()


@pytest.mark.parametrize(
    "arch, layer",
    [
        ("repvgg_a0", "stem.conv_1x1.conv"),
        ("mobileone_s0", "stem.conv_scale.conv"),
        ("fastvit_t8", "stem.0.conv_scale.conv"),
        ("gernet_s", "stages.0.0.shortcut.conv"),  # 13 channels
        ("resnet50", None),
        ("ghostnetv3_050", None),  # strided 1 x 1 convolutions of one channel each
    ],
)
def test_layers_that_a_cpu_cannot_train_in_channels_last_are_found(arch, layer):
    model = build_meta_model(arch=arch, num_classes=5)
    assert layer_without_channels_last(model, CPU) == layer
    assert layer_without_channels_last(model, CUDA) is None


def test_such_a_model_trains_on_a_cpu_in_the_other_format_and_a_note_says_so(tmp_path):
    recipe, trainer = trainer_of("repvgg_a0")
    assert not trainer.channels_last and not is_channels_last(trainer.model)  # else the next line ends the process
    assert train_a_step(trainer).isfinite()
    note = "training.channels_last=1 is not used on the CPU: .* gradient of the layer stem.conv_1x1.conv"
    (text,) = (text for text in trainer.notices if "channels_last" in text)
    assert re.match(note, text)
    card = ModelCard(model_arguments(recipe), channels_last=True)
    export_weights(tmp_path / "x.safetensors", trainer.model.state_dict(), card)
    assert not is_channels_last(load_model(tmp_path / "x.safetensors").model)
    _, asked = trainer_of("repvgg_a0", "--training.channels_last=0")
    assert not asked.channels_last and not any("channels_last" in text for text in asked.notices)


def test_only_what_is_wanted_is_changed():
    model = build_model("resnet18", num_classes=5)
    assert set_memory_format(model, False, CPU) == (False, []) and not is_channels_last(model)
    assert set_memory_format(model, True, CPU) == (True, []) and is_channels_last(model)
