"""Parameter groups and the moving average."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay

from imagenet_training.models.architectures import build_model
from imagenet_training.training.optim import build_ema, build_optimizer, parameter_groups


def test_one_dimensional_parameters_get_their_own_decay():
    model = build_model("resnet50")
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 1e-4, 0.0)}
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 53
    assert len(groups[0.0]) == 2 * 53 + 1 and all(p.ndim == 1 for p in groups[0.0])
    assert len(groups[1e-4]) == 54 and all(p.ndim > 1 for p in groups[1e-4])


@pytest.mark.parametrize("arch", ["test_vit", "swin_tiny_patch4_window7_224", "beit_base_patch16_224", "test_resnet"])
def test_the_parameters_without_decay_are_timm_s(arch):
    with torch.device("meta"):
        model = timm.create_model(arch)
    names = {parameter: name for name, parameter in model.named_parameters()}
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=getattr(model, "no_weight_decay", set)())
    ours = parameter_groups(model, 0.05, 0.0)
    spared = [
        {names[parameter] for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
        for groups in (ours, theirs)
    ]
    assert spared[0] == spared[1]
    assert any(model.get_parameter(name).ndim > 1 for name in spared[0]) == (arch != "test_resnet")


def test_without_a_decay_of_their_own_all_share_one_group():
    model = build_model("resnet18")
    (group,) = parameter_groups(model, 5e-5, None)
    assert group["weight_decay"] == 5e-5 and len(group["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = build_model("resnet18")
    model.conv1.weight.requires_grad = False
    (group,) = parameter_groups(model, 0.1, 0.1)
    assert len(group["params"]) == len(list(model.parameters())) - 1


def test_sgd_as_asked():
    optimizer = build_optimizer(build_model("resnet18"), lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1)
    assert optimizer.defaults["momentum"] == 0.8 and optimizer.defaults["nesterov"]
    assert all(group["lr"] == 0.3 for group in optimizer.param_groups)


def test_momentum_begins_at_zero_also_where_the_first_gradient_overflows(monkeypatch):
    sgd = torch.optim.SGD  # CPUs have the fused one too, though it is not taken there
    monkeypatch.setattr(torch.optim, "SGD", lambda *groups, **options: sgd(*groups, **{**options, "fused": True}))
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with NaN
    try:
        model = torch.nn.Linear(3, 2)
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer, scaler = build_optimizer(model, lr=0.5, momentum=0.9), torch.amp.GradScaler("cpu")
        for loss in (float("inf"), 1.0):
            scaler.scale(loss * sum(parameter.sum() for parameter in model.parameters())).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    finally:
        torch.use_deterministic_algorithms(False)
    assert optimizer.defaults["fused"] and scaler.get_scale() < 2**16, "the first step was skipped"
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, was - 0.5)


def test_lamb_and_adamw():
    model = build_model("resnet18")
    lamb = build_optimizer(model, "lamb", lr=5e-3, weight_decay=0.02, bn_wd=0.0)
    assert type(lamb).__name__ == "Lamb" and lamb.defaults["max_grad_norm"] == 1.0
    assert sorted(group["weight_decay"] for group in lamb.param_groups) == [0.0, 0.02]
    assert isinstance(build_optimizer(model, "adamw", lr=1e-3), torch.optim.AdamW)


def test_ema_is_the_recursion_over_parameters_and_buffers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    ema = build_ema(model, 0.9)
    expected = None
    for _ in range(4):
        with torch.no_grad():
            for tensor in [*model.parameters(), model[1].running_mean, model[1].running_var]:
                tensor.add_(torch.randn_like(tensor))
        ema.update_parameters(model)
        now = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
        expected = now if expected is None else {name: 0.9 * expected[name] + 0.1 * now[name] for name in now}
    for name, value in expected.items():
        torch.testing.assert_close(ema.module.state_dict()[name], value)
    assert build_ema(model, 0) is None
