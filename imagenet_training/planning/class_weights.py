"""Weights of classes in the loss, from their numbers of training images."""

from collections.abc import Sequence

import numpy as np

# Cui et al. try 0.9 to 0.9999. With 0.999 a class of more than some 1,000 images counts as one of 1,000.
BETA = 0.999


def effective_number_weights(counts: Sequence[int] | np.ndarray, beta: float = BETA) -> tuple[float, ...]:
    """Return the weight of each class: 1 / its effective number of images, scaled to a mean of 1 over all images.

    The effective number of n images is ``(1 - beta^n) / (1 - beta)``: close to n for rare classes, and at most
    ``1 / (1 - beta)``. Follows "Class-Balanced Loss Based on Effective Number of Samples" (Cui et al. 2019, arXiv
    1901.05555), equation 4. There, the weights have a mean of 1 over the classes. Here, the mean loss of an epoch keeps
    its size, and with it the meaning of a learning rate. A class without images has the weight 0.
    """
    images = np.asarray(counts, np.float64)
    effective = (1 - beta**images) / (1 - beta)
    weights = np.divide(1.0, effective, out=np.zeros_like(effective), where=images > 0)
    return tuple((weights * images.sum() / (weights * images).sum()).tolist())
