"""The memory format of a model's weights: channels_last, unless a kernel of the device fails with it."""

import torch
from torch import nn

# Entries of oneDNN's largest block of channels, with AVX-512. AVX2's block has 8.
_BLOCK = 16


def to_channels_last(model: nn.Module) -> None:
    """Store the 4-D parameters and buffers of a model in channels_last format, in place.

    ``model.to(memory_format=torch.channels_last)`` does the same, but refuses models with 5-D weights, such as timm's
    lambda_resnet26t.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)  # unlike contiguous(), of 1 x 1 too


def layer_without_channels_last(model: nn.Module, device: torch.device) -> str | None:
    """Return the name of a layer that a device cannot train in channels_last format; None if there is none.

    On CPUs, oneDNN computes the gradient of a strided 1 x 1 convolution with fewer input channels than a block has.
    In channels_last format, it writes behind its workspace (https://github.com/uxlfoundation/oneDNN/issues/6035). The
    process then ends by a signal, or the gradient is wrong. Seen with PyTorch 2.14.1, oneDNN 3.12.0 and AVX2. The first
    layers of RepVGG, MobileOne and FastViT are such convolutions.
    """
    if device.type != "cpu":
        return None
    for name, layer in model.named_modules():
        if (
            isinstance(layer, nn.Conv2d)
            and set(layer.kernel_size) == {1}
            and max(layer.stride) > 1
            and layer.groups == 1
            and 1 < layer.in_channels < _BLOCK
        ):
            return name
    return None


def set_memory_format(model: nn.Module, channels_last: bool, device: torch.device) -> tuple[bool, list[str]]:
    """Store a new model's weights in channels_last format, in place, if that is wanted and `device` can train it.

    Return True if they are in that format, and a notice if they are not though that is wanted.
    """
    if not channels_last:
        return False, []
    layer = layer_without_channels_last(model, device)
    if layer is not None:
        return False, [
            "training.channels_last=1 is not used on the CPU: PyTorch cannot compute the gradient of the layer "
            f"{layer} in that memory format there"
        ]
    to_channels_last(model)
    return True, []
