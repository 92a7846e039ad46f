"""The optimizer of a run, its parameter groups, and the moving average of the weights."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch.optim.swa_utils import AveragedModel


def parameter_groups(
    model: torch.nn.Module,
    weight_decay: float,
    bn_wd: float | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[dict]:
    """Split a model's parameters into groups by the weight decay they get, and by the share of the learning rate.

    If there are scales, each group has its own as ``lr_scale``.

    Parameters
    ----------
    weight_decay : float
        For parameters with two dimensions and more: the weights of convolutions and linear layers.
    bn_wd : float, optional
        For one-dimensional parameters: scales and shifts of normalisation layers, biases. It is also for those that a
        model of timm names in ``no_weight_decay()``, as in timm's own optimizers. None: as ``weight_decay``.
        ffcv-imagenet recognises normalisation layers by "bn" in their names, and so misses those of ResNet's shortcuts.
    scales : mapping of str to float, optional
        The factor of the learning rate of each parameter, by its name; see `imagenet_training.models.layers.lr_scales`.
    """
    groups: dict[tuple[float, float | None], list[torch.nn.Parameter]] = {}
    named: Callable[[], Iterable[str]] = getattr(model, "no_weight_decay", tuple)
    patterns = tuple(named())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in patterns)
            decay = bn_wd if bn_wd is not None and is_spared else weight_decay
            groups.setdefault((decay, None if scales is None else scales[name]), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, **({} if scale is None else {"lr_scale": scale})}
        for (decay, scale), parameters in groups.items()
    ]


def regroup_as_earlier(optimizer: torch.optim.Optimizer, model: torch.nn.Module, weight_decay: float) -> list[str]:
    """Group the parameters as versions did that gave `weight_decay` to all with two dimensions and more, in place.

    Return the names of the parameters whose weight decay this changes.
    """
    own = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    groups: dict[tuple[float, float | None], dict] = {}
    changed = []
    for name, parameter in model.named_parameters():
        if parameter in own:
            group = own[parameter]
            decay = weight_decay if parameter.ndim > 1 else group["weight_decay"]
            if decay != group["weight_decay"]:
                changed.append(name)
            empty = {**group, "params": [], "weight_decay": decay}
            groups.setdefault((decay, group.get("lr_scale")), empty)["params"].append(parameter)
    optimizer.param_groups[:] = groups.values()
    return changed


def build_optimizer(
    model: torch.nn.Module,
    name: str = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    bn_wd: float | None = None,
    scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer over `parameter_groups`: SGD with momentum, AdamW, or timm's LAMB.

    LAMB bounds the norm of the whole gradient by 1, as in "ResNet Strikes Back". SGD and AdamW are fused if the
    parameters are on a GPU. If a gradient overflows under a gradient scaler, fused optimizers skip the step on the GPU
    itself. LAMB makes the host wait for the result of that check in every step. `Trainer.optimizer_step` applies the
    scales of the learning rate in every step.
    """
    groups = parameter_groups(model, weight_decay, bn_wd, scales)
    fused = all(parameter.is_cuda for parameter in model.parameters())
    if name == "lamb":
        from timm.optim import Lamb  # here, because importing timm takes two seconds

        return Lamb(groups, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    if momentum:
        # Fused SGD allocates its momentum at the first step, and does not fill it if the first gradient overflows.
        # Whatever was in that memory is the momentum from then on. A momentum of zeros gives the same first step.
        for group in groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


class MovingAverage(AveragedModel):
    """Exponential moving average of a model's parameters and buffers; buffers of integers are copied.

    The first update copies. Each later one does ``ema = decay ema + (1 - decay) model``, as torchvision's references.
    The update of `AveragedModel` copies its count to the GPU, and the host waits for the copy. This update does not.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    def update_parameters(self, model: torch.nn.Module) -> None:
        """Update the average with the model as it is now, without waiting for its device."""
        self.move_towards(model, 1.0 - self.decay if self.n_averaged else 1.0)  # the count is in the host's memory
        self.n_averaged += 1

    @torch.no_grad()
    def move_towards(self, model: torch.nn.Module, weight: float) -> None:
        """Give the model a weight in the average, from 0 to 1. Buffers of integers are copied."""
        averages, values = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        pairs = list(zip(averages, values, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_([pair[0] for pair in floats], [pair[1] for pair in floats], weight)
        if others:
            torch._foreach_copy_([pair[0] for pair in others], [pair[1] for pair in others])


def build_ema(model: torch.nn.Module, decay: float) -> MovingAverage | None:
    """Build the moving average of a model; None for a decay of 0."""
    return MovingAverage(model, decay) if decay else None
