"""Learning rates by depth, and a body that does not train."""

import copy
from collections import defaultdict

import pytest
import torch
from timm import create_model
from timm.optim import param_groups_layer_decay

from ffcv_ops.errors import UserError
from imagenet_training.distributed import World
from imagenet_training.models.architectures import build_model, head_of
from imagenet_training.models.layers import freeze_body, lr_scales, set_training_mode
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.run.resume import _restore_optimizer
from imagenet_training.training.optim import build_ema, build_optimizer
from imagenet_training.training.trainer import build_trainer


def model_and_head(arch, library, num_classes=4):
    network = {"arch": arch, "library": library}
    model = build_model(**network, num_classes=num_classes)
    return model, set(head_of(model, **network, num_classes=num_classes).class_dims)


def recipe_of(*settings):
    return read_recipe(["--model.arch=test_resnet", "--model.num_classes=4", "--batch_size=4", *settings])


def trainer_of(*settings):
    recipe = recipe_of(*settings)
    plan = plan_run(recipe, world_size=1, num_train=8, num_val=8, device_type="cpu")
    return build_trainer(recipe, plan, World())


def layers_of(scales):
    layers = defaultdict(set)
    for name, scale in scales.items():
        layers[scale].add(name)
    return [layers[scale] for scale in sorted(layers)]


def test_the_layers_of_torchvision_s_resnet_are_those_that_timm_states_for_its_own():
    model, head = model_and_head("resnet18", "torchvision")
    ours = lr_scales(model, 0.5, head)
    theirs = param_groups_layer_decay(create_model("resnet18", num_classes=4), 0.1, layer_decay=0.5)
    assert ours.keys() == dict(model.named_parameters()).keys() and len(layers_of(ours)) == 10
    assert sorted(set(ours.values())) == sorted({group["lr_scale"] for group in theirs})
    assert ours["conv1.weight"] == ours["bn1.bias"] == 0.5**9 and ours["fc.bias"] == 1.0
    assert ours["layer4.1.conv1.weight"] == 0.5 and ours["layer1.0.bn2.weight"] == 0.5**8


@pytest.mark.parametrize("arch", ["test_vit", "test_efficientnet", "test_convnext"])
def test_the_scales_of_timm_s_architectures_are_timm_s(arch):
    model, head = model_and_head(arch, "timm")
    groups = param_groups_layer_decay(model, 0.1, layer_decay=0.75)
    theirs = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = lr_scales(model, 0.75, head)
    assert {id(p): scales[name] for name, p in model.named_parameters()} == theirs


@pytest.mark.parametrize(("arch", "num_layers"), [("mobilenet_v3_small", 15), ("squeezenet1_0", 10), ("alexnet", 8)])
def test_every_block_of_torchvision_s_other_architectures_is_a_layer(arch, num_layers):
    model, head = model_and_head(arch, "torchvision")
    layers = layers_of(lr_scales(model, 0.9, head))
    assert len(layers) == num_layers and layers[-1] == head


def test_a_step_moves_each_layer_by_its_share_of_the_learning_rate():
    trainer = trainer_of("--training.layer_decay=0.5", "--training.momentum=0", "--training.weight_decay=0")
    model = trainer.model
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer_step(1.0, step=0)
    scales = lr_scales(model, 0.5, trainer.head)
    assert len(set(scales.values())) > 4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, scales[name]))


@pytest.mark.parametrize(("arch", "library"), [("resnet18", "torchvision"), ("test_efficientnet", "timm")])
def test_a_frozen_body_keeps_its_weights_and_statistics(arch, library):
    torch.manual_seed(0)
    model, head = model_and_head(arch, library)
    freeze_body(model, head)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == head
    optimizer, ema = build_optimizer(model, lr=0.1, weight_decay=0.1), build_ema(model, 0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(head)
    before = copy.deepcopy(model.state_dict())
    set_training_mode(model)
    for _ in range(2):
        model(torch.randn(4, 3, 64, 64)).square().sum().backward()
        optimizer.step()
        ema.update_parameters(model)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == head
    changed = {name for name, value in ema.module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == head


def test_dropout_before_the_head_still_drops_and_that_of_the_body_does_not():
    body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    model = torch.nn.Sequential(body, torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    freeze_body(model, {"2.weight", "2.bias"})
    set_training_mode(model)
    assert [module.training for module in model] == [False, True, True] and not body[2].training
    for parameter in model.parameters():
        parameter.requires_grad_()
    set_training_mode(model)
    assert all(module.training for module in model.modules())


def test_a_resumed_optimizer_has_the_groups_of_its_run_and_the_factors_of_its_recipe(tmp_path):
    first = trainer_of("--training.layer_decay=0.5")
    content = {
        "optimizer": copy.deepcopy(first.optimizer.state_dict()),
        "recipe": {"training": {"optimizer": "sgd"}},
    }
    assert content["optimizer"]["param_groups"][0]["lr_scale"] < 1
    again = trainer_of("--training.layer_decay=0.8")
    _restore_optimizer(again, content, recipe_of())
    assert again.optimizer.param_groups[0]["lr_scale"] == 0.8**5
    weights = tmp_path / "weights.pt"
    torch.save(first.model.state_dict(), weights)
    for settings in ((), (f"--model.weights={weights}", "--model.freeze=body")):
        with pytest.raises(UserError, match=r"keep training.bn_wd, training.layer_decay and model.freeze"):
            _restore_optimizer(trainer_of(*settings), content, recipe_of())


def groups_of_an_earlier_version(model, weight_decay, bn_wd, scales):
    """Group parameters by their number of dimensions only: position embeddings decay too."""
    groups = {}
    for name, parameter in model.named_parameters():
        key = weight_decay if parameter.ndim > 1 else bn_wd, scales[name] if scales else None
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, **({"lr_scale": scale} if scale else {})}
        for (decay, scale), parameters in groups.items()
    ]


@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_a_run_of_a_version_that_decayed_position_embeddings_goes_on_so(layer_decay):
    """With a layer decay, the groups of both versions have equal sizes, but other parameters."""
    settings = ["--model.arch=test_vit", "--training.optimizer=adamw", "--training.weight_decay=0.1"]
    settings += ["--training.bn_wd=0", *([f"--training.layer_decay={layer_decay}"] if layer_decay else [])]

    def step(trainer):
        for number, parameter in enumerate(trainer.model.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        trainer.optimizer_step(0.1, step=0)

    earlier, again = trainer_of(*settings), trainer_of(*settings)
    scales = lr_scales(earlier.model, layer_decay, earlier.head) if layer_decay else None
    earlier.optimizer = torch.optim.AdamW(groups_of_an_earlier_version(earlier.model, 0.1, 0.0, scales), lr=0.1)
    step(earlier)
    content = {
        "optimizer": copy.deepcopy(earlier.optimizer.state_dict()),
        "recipe": {"training": {"optimizer": "adamw"}},
    }
    again.model.load_state_dict(earlier.model.state_dict())
    _restore_optimizer(again, content, recipe_of(*settings))
    step(earlier)
    step(again)
    for name, value in earlier.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert "gave training.weight_decay to cls_token, pos_embed too" in again.notices[-1]
