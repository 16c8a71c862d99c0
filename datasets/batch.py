"""What every loader yields."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One batch, on the training device.

    Attributes:
        image: normalised images, float32 ``[B, 3, H, W]``.
        label: class of each image, int64 ``[B]``.
        index: place of each image in its data set, int64 ``[B]``; CRD's memory banks are addressed by it.
    """

    image: Tensor
    label: Tensor
    index: Tensor
