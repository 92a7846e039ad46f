"""What changes the weights: parameter groups, optimizers, the moving average."""

import torch
from timm.optim import Lamb
from torch.optim.swa_utils import AveragedModel


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

    Notes
    -----
    Under a gradient scaler the fused ones skip a step that overflowed on the GPU itself; LAMB has the host wait for the
    verdict in every step.
    """
    groups = parameter_groups(model, weight_decay, bn_wd)
    fused = all(parameter.is_cuda for parameter in model.parameters())
    if name == "lamb":
        return Lamb(groups, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    if momentum:
        # The fused one takes whatever memory it is given as momentum where the very first gradient overflows. From
        # zeros the first step is the same: 0 x momentum + gradient.
        for group in groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


class MovingAverage(AveragedModel):
    """Exponential moving average of a model's parameters and buffers; buffers of integers are copied.

    As torchvision's references: the first update copies, each later one does ``ema = decay ema + (1 - decay) model``.
    The update of `AveragedModel` itself copies its count to the GPU, and the host waits for that.

    Parameters
    ----------
    model : torch.nn.Module
        On its device.
    decay : float
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Take in the model as it is now, without waiting for its device."""
        weight = 1.0 - self.decay if self.n_averaged else 1.0  # the count lies in the host's memory
        averages, values = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        pairs = list(zip(averages, values, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_([pair[0] for pair in floats], [pair[1] for pair in floats], weight)
        if others:
            torch._foreach_copy_([pair[0] for pair in others], [pair[1] for pair in others])
        self.n_averaged += 1


def build_ema(model: torch.nn.Module, decay: float) -> MovingAverage | None:
    """The moving average of a model, None for a decay of 0."""
    return MovingAverage(model, decay) if decay else None
