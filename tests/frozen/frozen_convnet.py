"""Run a script with a very small architecture that timm knows as ``frozen_convnet``.

    python -m frozen_convnet train_imagenet.py ARGUMENTS

Its checkpoints have a few kilobytes. With ``STOP_AFTER=N`` in the environment, the process sends itself SIGTERM in the
training step of its batch N, counted from 1.
"""

import os
import runpy
import signal
import sys

import torch
from timm.models import register_model
from torch import nn


class FrozenConvNet(nn.Module):
    """Two convolutions, each with BatchNorm, and a linear head."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(16, num_classes)
        self.num_batches = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) of images (N, 3, H, W)."""
        self.num_batches += self.training
        if self.training and self.num_batches == int(os.environ.get("STOP_AFTER", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return self.head(self.features(images))


@register_model
def frozen_convnet(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> FrozenConvNet:
    """Build the architecture."""
    return FrozenConvNet(num_classes)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
