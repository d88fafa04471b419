"""How much of what models find lies where others look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage


class Reached(NamedTuple):
    """Objects of a class: connected voxels, diagonal neighbours included.

    Attributes:
        objects: that sliding windows find.
        reached: how many of them a window touches.
        voxels: of all objects, in the image.
        voxels_reached: how many of them lie in a window.
    """

    objects: int
    reached: int
    voxels: int
    voxels_reached: int

    @property
    def percentage(self) -> float:
        """Of the objects' voxels that lie in a window."""
        return 100 * self.voxels_reached / max(1, self.voxels)

    @classmethod
    def of(cls, own: np.ndarray, windows: np.ndarray) -> Reached:
        """Count.

        Args:
            own: bool, what is found of a class.
            windows: bool, same shape, where there is a window.
        """
        return FoundObjects.of(own).reached(windows)

    @classmethod
    def together(cls, of_cases: Sequence[Reached]) -> Reached:
        """The sums over cases."""
        return cls(*map(sum, zip(*of_cases, strict=True)))


class FoundObjects(NamedTuple):
    """The objects of a class, found once for many choices of windows.

    Attributes:
        box: of all of them, in the image.
        objects: in the box, the number of the object of each voxel, from 1; 0 where there is none.
        number: of objects.
    """

    box: tuple[slice, ...]
    objects: np.ndarray
    number: int

    @classmethod
    def of(cls, own: np.ndarray) -> FoundObjects:
        """The objects of bool voxels."""
        boxes = ndimage.find_objects(own.astype(np.uint8))
        box = boxes[0] if boxes else (slice(0, 0),) * own.ndim
        return cls(box, *ndimage.label(own[box], ndimage.generate_binary_structure(own.ndim, own.ndim)))

    def reached(self, windows: np.ndarray) -> Reached:
        """What windows reach.

        Args:
            windows: bool, of the image's shape.
        """
        inside = self.objects[windows[self.box]]
        touched = np.unique(inside)
        return Reached(
            self.number,
            int(np.count_nonzero(touched)),
            int(np.count_nonzero(self.objects)),
            int(np.count_nonzero(inside)),
        )
