"""Losses on dense targets. The targets already contain mixing and label smoothing, so no loss smooths again."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def soft_target_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy (scalar) of logits (N, K) against dense targets (N, K), computed in float32."""
    return torch.sum(-targets * F.log_softmax(logits.float(), dim=1), dim=1).mean()


def binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, threshold: float | None = None
) -> torch.Tensor:
    """Return the binary cross entropy (scalar): the mean over images and classes, computed in float32.

    Parameters
    ----------
    logits, targets : torch.Tensor
        Float (N, K).
    threshold : float, optional
        Targets above the threshold become 1, all others 0, as with timm's ``target_threshold``. Each class in a mixed
        image then counts fully. None: targets stay as they are.

    Notes
    -----
    Follows "ResNet Strikes Back" (arXiv 2110.00476), section 3, and timm's ``BinaryCrossEntropy`` on dense targets.
    """
    if threshold is not None:
        targets = (targets > threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def build_loss(name: str, *, bce_threshold: float | None = None) -> Loss:
    """Return the loss of a recipe: ``"cross_entropy"`` or ``"bce"``."""
    losses: dict[str, Loss] = {
        "cross_entropy": soft_target_cross_entropy,
        "bce": partial(binary_cross_entropy, threshold=bce_threshold),
    }
    return losses[name]
