"""The first layers of ResNets in forms that compute the same in less time on a GPU."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Kernels for 16-bit floats take channels by eights. PyTorch pads them, in a pass of its own.
_CHANNELS_STEP = 8


class StemConv2d(nn.Conv2d):
    """A convolution of RGB images at stride 2. Where it is compiled, it goes over blocks of 2 x 2 pixels at stride 1.

    Blocks have 12 channels, which suit matrix units better than 3. The products are the same, and are added in another
    order. Evaluation is not compiled, so it computes as `torch.nn.Conv2d`.
    """

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Return True for a plain convolution of at most 4 channels at stride 2, with an odd, centred window."""
        if type(module) is not nn.Conv2d or module.in_channels > 4 or module.groups > 1:
            return False
        (height, width), padding = module.kernel_size, module.padding
        centred = height == width and height % 2 == 1 and padding == (height // 2, height // 2)
        return centred and module.stride == (2, 2) and module.dilation == (1, 1) and module.padding_mode == "zeros"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what `torch.nn.Conv2d` returns, up to rounding."""
        if torch.compiler.is_compiling() and input.shape[2] % 2 == 0 and input.shape[3] % 2 == 0:
            return self.blockwise(input)
        return super().forward(input)

    def blockwise(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve images (N, C, H, W) of even sides block by block."""
        n, channels, height, width = images.shape
        radius = self.kernel_size[0] // 2
        # A window begins a pixel before a block if its radius is odd. Then its weights get a row of zeros in front.
        front = radius % 2
        size = (self.kernel_size[0] + front + 1) // 2  # of the window, in blocks
        before, added = (radius + front) // 2, -4 * channels % _CHANNELS_STEP
        after = size - 1 - before
        blocks = images.permute(0, 2, 3, 1).reshape(n, height // 2, 2, width // 2, 2, channels)
        blocks = blocks.permute(0, 1, 3, 2, 4, 5).reshape(n, height // 2, width // 2, 4 * channels)
        blocks = F.pad(blocks, (0, added, before, after, before, after)).permute(0, 3, 1, 2)
        back = 2 * size - self.kernel_size[0] - front
        weight = F.pad(self.weight, (front, back, front, back)).reshape(-1, channels, size, 2, size, 2)
        weight = weight.permute(0, 2, 4, 3, 5, 1).reshape(-1, size, size, 4 * channels)
        return F.conv2d(blocks, F.pad(weight, (0, added)).permute(0, 3, 1, 2), self.bias)


class StemMaxPool2d(nn.MaxPool2d):
    """Max pooling that runs in `imagenet_training.models.max_pool` where it is compiled."""

    operation: Any  # from `replace_stem`, because Triton is not on every machine

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Return True for plain max pooling of 3 x 3 windows at stride 2."""
        if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
            return False
        values = (module.kernel_size, module.stride, module.padding, module.dilation)
        return all(value in (number, (number, number)) for value, number in zip(values, (3, 2, 1, 1), strict=True))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what `torch.nn.MaxPool2d` returns."""
        if torch.compiler.is_compiling() and input.shape[2] % 2 == 0 and input.shape[3] % 2 == 0:
            return self.operation(input)[0]
        return super().forward(input)


def replace_stem(model: nn.Module) -> None:
    """Change the classes of the layers that `StemConv2d` and `StemMaxPool2d` suit. They keep names and tensors.

    Parameters
    ----------
    model : torch.nn.Module
        On a GPU, in channels_last memory.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from imagenet_training.models.max_pool import OPERATION

    StemMaxPool2d.operation = OPERATION
    for module in model.modules():
        for form in (StemConv2d, StemMaxPool2d):
            if form.suits(module):
                module.__class__ = form
