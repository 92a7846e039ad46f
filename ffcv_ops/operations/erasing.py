"""Random erasing of 8-bit images, in place (Zhong et al., arXiv 1708.04896)."""

from collections.abc import Sequence

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.operations.base import Batch
from ffcv_ops.operations.image_operation import IMAGENET_MEAN, ImageOperation, read_colour
from ffcv_ops.rng import ERASING


class RandomErasing(ImageOperation):
    """Random erasing: a rectangle of some images is painted over, as by ``RandomErasing(p)`` of torchvision.

    The input is a uint8 array (N, H, W, 3), which is changed in place. Scale and ratio are torchvision's defaults.
    torchvision erases with 0 after the normalisation. Here the colour is the mean, which the normalisation turns into 0
    but for the rounding of the mean.

    Parameters
    ----------
    prob : float
        Probability that a rectangle of an image is erased.
    fill : sequence of 3 int
        Colour of the rectangle, 0 to 255.

    Raises
    ------
    UserError
        If `prob` is not a probability or `fill` is not a colour.
    """

    scale = (0.02, 0.33)
    ratio = (0.3, 3.3)
    num_attempts = 10

    def __init__(self, prob: float, fill: Sequence[int] = IMAGENET_MEAN):
        super().__init__()
        if not 0 <= prob <= 1:
            raise UserError(f"prob is {prob}; it must be 0 to 1")
        self.prob = prob
        self.fill = read_colour(fill)

    def draw(self, batch: Batch, size: tuple[int, int]) -> np.ndarray:
        """Draw a rectangle for each image of a batch.

        Parameters
        ----------
        batch : Batch
        size : tuple of two int
            Height and width of the images in px.

        Returns
        -------
        ndarray of int64, shape (N, 4)
            Top, bottom, left and right in px; all 0 if nothing is erased.
        """
        height, width = size
        numbers = batch.draw_uniforms(ERASING, (1 + self.num_attempts, 4))
        erased, (area, ratio, y, x) = numbers[:, 0, 0] < self.prob, np.moveaxis(numbers[:, 1:], 2, 0)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
        low, high = np.log(self.ratio)
        ratio = np.exp(low + (high - low) * ratio)
        tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (tall < height) & (wide < width)
        top, left = np.floor(y * (height - tall + 1)), np.floor(x * (width - wide + 1))
        boxes = np.stack([top, top + tall, left, left + wide], axis=2).astype(np.int64)
        boxes = boxes[np.arange(len(boxes)), fits.argmax(axis=1)]
        boxes[~(erased & fits.any(axis=1))] = 0
        return boxes

    def apply(self, images: np.ndarray, batch: Batch) -> None:
        boxes = self.draw(batch, (images.shape[1], images.shape[2]))
        for i in np.flatnonzero(boxes[:, 1] > boxes[:, 0]):
            top, bottom, left, right = boxes[i]
            images[i, top:bottom, left:right] = self.fill
