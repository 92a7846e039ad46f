"""What changes the weights: parameter groups, optimizers, the moving average."""

import torch
from timm.optim import Lamb
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def parameter_groups(model: torch.nn.Module, weight_decay: float, bn_wd: float | None = None) -> list[dict]:
    """Split a model's parameters by the weight decay they get.

    Parameters
    ----------
    model : torch.nn.Module
    weight_decay : float
        Of parameters with two dimensions and more: the weights of convolutions and linear layers.
    bn_wd : float, optional
        Of one-dimensional parameters: scales and shifts of normalisation layers, biases. None: ``weight_decay`` too.

    Returns
    -------
    list of dict
        Groups for a torch optimizer, empty ones left out. ffcv-imagenet tells normalisation layers by "bn" in their
        name and so misses those of ResNet's shortcuts; the number of dimensions misses none.
    """
    by_decay: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = bn_wd if bn_wd is not None and parameter.ndim <= 1 else weight_decay
            by_decay.setdefault(decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]


def build_optimizer(
    model: torch.nn.Module,
    name: str = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    bn_wd: float | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer over `parameter_groups`.

    Parameters
    ----------
    name : {"sgd", "lamb", "adamw"}
        SGD with momentum; timm's LAMB, which bounds the norm of the whole gradient by 1 (as "ResNet Strikes Back"
        trained); AdamW. SGD and AdamW are fused where the parameters lie on a GPU.
    momentum, nesterov
        Of SGD alone.
    """
    groups = parameter_groups(model, weight_decay, bn_wd)
    fused = all(parameter.is_cuda for parameter in model.parameters())
    if name == "lamb":
        return Lamb(groups, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)


def build_ema(model: torch.nn.Module, decay: float) -> AveragedModel | None:
    """Exponential moving average of a model's parameters and buffers, None for a decay of 0.

    As torchvision's references: the first update copies, each later one does ``ema = decay ema + (1 - decay) model``.
    """
    if decay == 0:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
