"""The layers of a model by their depth: learning rates that fall towards the input, and a body that does not train."""

from collections.abc import Collection, Iterator

from torch import nn


def freeze_body(model: nn.Module, head: Collection[str]) -> None:
    """Let only the head of a model train, in place: the parameters of these names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in head)


def set_training_mode(model: nn.Module) -> None:
    """Put a model in training mode, but the parts of it that are frozen in evaluation mode.

    A part whose parameters are all frozen computes as in evaluation: its BatchNorm statistics stay as they are, and its
    dropout and drop path drop nothing. Dropout between such parts and the head still drops.
    """
    model.train()
    if not all(parameter.requires_grad for parameter in model.parameters()):
        _evaluate_frozen_parts(model)


def _evaluate_frozen_parts(module: nn.Module) -> None:
    for child in module.children():
        flags = [parameter.requires_grad for parameter in child.parameters()]
        if flags and not any(flags):
            child.eval()
        elif not all(flags):
            _evaluate_frozen_parts(child)


def lr_scales(model: nn.Module, layer_decay: float, head: Collection[str]) -> dict[str, float]:
    """Return the factor of each parameter's learning rate, by its name.

    It is ``layer_decay`` to the power of the layer's distance to the last layer, which has the head and the factor 1,
    as in BEiT (arXiv 2106.08254) and timm. `head` has the names of the parameters whose shapes depend on the number of
    classes.
    """
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters  # here, because importing timm takes two seconds

        # timm counts from the input too, and its last layer has the head.
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        last = max(layers.values())
    else:
        layers = _layers_by_depth(model)
        last = 1 + max((layer for name, layer in layers.items() if name not in head), default=-1)
    return {name: 1.0 if name in head else layer_decay ** (last - layer) for name, layer in layers.items()}


def _layers_by_depth(model: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter, from 0 at the input, for a model that has no groups of its own.

    Each block is a layer, in the order of definition: see `_blocks`. A normalisation layer belongs to the layer before
    it. A parameter outside all blocks, such as an embedding of positions, is in layer 0.
    """
    layers, layer = {name: 0 for name, _ in model.named_parameters()}, -1
    for prefix, block in _blocks(model, sum(parameter.numel() for parameter in model.parameters())):
        parameters = dict(block.named_parameters(prefix))
        only_scales = all(parameter.ndim <= 1 for parameter in parameters.values())
        layer += 1 if layer < 0 or not only_scales else 0
        layers.update(dict.fromkeys(parameters, layer))
    return layers


def _blocks(module: nn.Module, num_parameters: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a model by name. Containers are taken apart, and modules with most of its parameters."""
    for name, child in module.named_children():
        path, size = f"{prefix}.{name}" if prefix else name, sum(parameter.numel() for parameter in child.parameters())
        is_container = type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        if any(child.children()) and (is_container or 2 * size > num_parameters):
            yield from _blocks(child, num_parameters, path)
        elif size:
            yield path, child
