"""Losses on dense targets, which hold mixing and label smoothing already: no loss here smooths again."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def soft_target_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy (scalar) of logits (N, K) against dense targets (N, K), in 32-bit."""
    return torch.sum(-targets * F.log_softmax(logits.float(), dim=1), dim=1).mean()


def binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, threshold: float | None = None
) -> torch.Tensor:
    """Binary cross entropy (scalar) of every class on its own, the mean over images and classes, in 32-bit.

    Parameters
    ----------
    logits, targets : torch.Tensor
        Float (N, K).
    threshold : float, optional
        Targets above it count as 1, others as 0 (timm's ``target_threshold``): each class in a mixed image is wholly
        there. None: as they are.

    Notes
    -----
    "ResNet Strikes Back" (arXiv 2110.00476), section 3; timm's ``BinaryCrossEntropy`` on dense targets.
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
