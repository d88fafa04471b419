"""How much of what a model finds lies where another one looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage


class Reached(NamedTuple):
    """Objects of a class: connected voxels, diagonal neighbours included.

    Attributes:
        objects: that the model's own sliding window finds.
        reached: how many of them a window touches.
        voxels: of all objects, in the image.
        voxels_reached: how many of them lie in a window.
    """

    objects: int
    reached: int
    voxels: int
    voxels_reached: int

    @classmethod
    def of(cls, own: np.ndarray, windows: np.ndarray) -> Reached:
        """Count.

        Args:
            own: bool, what the model finds of a class.
            windows: bool, same shape, where the model has a window.
        """
        objects, number = ndimage.label(own, ndimage.generate_binary_structure(own.ndim, own.ndim))
        touched = np.unique(objects[windows & own])
        return cls(number, len(touched), int(own.sum()), int((windows & own).sum()))

    @classmethod
    def together(cls, of_cases: Sequence[Reached]) -> Reached:
        """The sums over cases."""
        return cls(*map(sum, zip(*of_cases, strict=True)))
