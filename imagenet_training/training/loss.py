"""Losses on dense targets. The targets already contain mixing and label smoothing, so no loss smooths again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from imagenet_training.planning.recipe import Recipe

Loss = Callable[[Any, torch.Tensor], torch.Tensor]

# Weight of the loss of each auxiliary head, which torchvision's architectures of these names have in training.
# GoogLeNet: arXiv 1409.4842, section 5. Inception-v3: the code of its authors.
AUXILIARY_WEIGHTS = {"googlenet": 0.3, "inception_v3": 0.4}


def mean_over_images(losses: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean (scalar) of the losses of images (N,), each times the weight of its classes.

    The weight of an image is the mean of the weights of all classes (K,), each by its share in the target (N, K). A
    mixed image has the weights of its two classes, by their shares. Label smoothing moves each weight a little towards
    their mean. PyTorch's ``weight`` multiplies the term of each class instead, which would change the smoothed target
    itself.
    """
    return losses.mean() if weights is None else (losses * (targets.float() @ weights)).mean()


def soft_target_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the cross entropy (scalar) of logits (N, K) against dense targets (N, K), computed in float32."""
    losses = torch.sum(-targets * F.log_softmax(logits.float(), dim=1), dim=1)
    return mean_over_images(losses, targets, weights)


def binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    threshold: float | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the binary cross entropy (scalar): the mean over images and classes, computed in float32.

    Targets (N, K) above the threshold become 1, all others 0, as with timm's ``target_threshold``. Each class in a
    mixed image then counts fully. The threshold does not change the weight of an image; see `mean_over_images`. Follows
    "ResNet Strikes Back" (arXiv 2110.00476), section 3, and timm's ``BinaryCrossEntropy`` on dense targets.
    """
    wanted = targets if threshold is None else (targets > threshold).to(logits.dtype)
    if weights is None:
        return F.binary_cross_entropy_with_logits(logits.float(), wanted.float())
    losses = F.binary_cross_entropy_with_logits(logits.float(), wanted.float(), reduction="none").mean(dim=1)
    return mean_over_images(losses, targets, weights)


def loss_of_outputs(loss: Loss, auxiliary_weight: float | None, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss (scalar) of a model's outputs: that of the main head, and the share of each auxiliary head.

    The outputs are logits (N, K), or a tuple of them that begins with those of the main head. The targets, too, are
    (N, K).

    Raises
    ------
    TypeError
        If there are several outputs and no weight, or the output is no tensor.
    """
    if isinstance(outputs, torch.Tensor):
        return loss(outputs, targets)
    if not isinstance(outputs, tuple) or auxiliary_weight is None:
        raise TypeError(f"the model's output is a {type(outputs).__name__}, for which no loss is defined")
    logits, *auxiliary = outputs
    return loss(logits, targets) + auxiliary_weight * sum(loss(output, targets) for output in auxiliary)


def main_logits(outputs: Any) -> torch.Tensor:
    """Return the logits (N, K) of the main head."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def build_loss(
    name: str,
    *,
    bce_threshold: float | None = None,
    auxiliary_weight: float | None = None,
    class_weights: torch.Tensor | None = None,
) -> Loss:
    """Return the loss of a recipe, ``"cross_entropy"`` or ``"bce"``, as a function of a model's outputs and targets."""
    losses: dict[str, Loss] = {
        "cross_entropy": partial(soft_target_cross_entropy, weights=class_weights),
        "bce": partial(binary_cross_entropy, threshold=bce_threshold, weights=class_weights),
    }
    return partial(loss_of_outputs, losses[name], auxiliary_weight)


def recipe_loss(
    recipe: Recipe, class_weights: Sequence[float] | None = None, device: torch.device | None = None
) -> Loss:
    """Return the loss of a recipe on a device, by default the CPU; see `build_loss`."""
    training = recipe.training
    return build_loss(
        training.loss,
        bce_threshold=training.bce_threshold,
        auxiliary_weight=AUXILIARY_WEIGHTS.get(recipe.model.arch),
        class_weights=None if class_weights is None else torch.tensor(class_weights, device=device),
    )
