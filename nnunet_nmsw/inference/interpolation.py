"""Linear interpolation axis by axis, and where it is not needed: between voxels that agree on the winning class.

Linear interpolation is a convex combination. Where a class has the largest logit at all corners of a cell it has the
largest everywhere in the cell, and where the sign of a region's logit is the same at all corners it is so everywhere.

Tensor suffixes: D H W axes of the source, Z Y X axes of the target, P points, 3 one coordinate per axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor


class Axis(NamedTuple):
    """Between which two source voxels each target voxel of an axis lies.

    Attributes:
        lower: index of the one, int64; not decreasing.
        upper: index of the other, the same or the next.
        weight: of the other, float32; the one's is 1 minus this.
    """

    lower: Tensor
    upper: Tensor
    weight: Tensor

    def part(self, first: int, end: int) -> Axis:
        """Target voxels `first` to `end`, and no more of the source than they lie in."""
        start = self.lower[first]
        return Axis(self.lower[first:end] - start, self.upper[first:end] - start, self.weight[first:end])

    def to(self, device: torch.device) -> Axis:
        """The same on a device."""
        return Axis(*(tensor.to(device) for tensor in (self.lower, self.upper, self.weight)))


def linear_axis(source_size: int, target_size: int) -> Axis:
    """Axes of the same length, edges replicated: `align_corners=False`, or skimage's `resize` of order 1."""
    position = (torch.arange(target_size, dtype=torch.float64) + 0.5) * (source_size / target_size) - 0.5
    return _between(position, source_size)


def nearest_axis(source_size: int, target_size: int) -> Axis:
    """As `linear_axis`, but the nearest voxel's value: SciPy's `map_coordinates` of order 0."""
    position = source_size / target_size * (np.arange(target_size) + 0.5) - 0.5
    # SciPy itself says what is nearest half-way between two voxels.
    voxels = map_coordinates(np.arange(source_size, dtype=float), position[None], order=0, mode="nearest")
    nearest = torch.from_numpy(voxels).long()
    return Axis(nearest, nearest, torch.zeros(target_size))


def upsampling_axis(low_size: int, factor: int, start: int, size: int) -> Axis:
    """From an axis of the low-resolution view to voxels `start` to `start + size` of the volume's."""
    position = (torch.arange(start, start + size, dtype=torch.float64) + 0.5) / factor - 0.5
    return _between(position, low_size)


def _between(position: Tensor, size: int) -> Axis:
    position = position.clamp(0, size - 1)
    lower = position.floor().long()
    return Axis(lower, (lower + 1).clamp_max(size - 1), (position - lower).float())


def agreed(labels_DHW: Tensor, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """The label of each target voxel whose eight source voxels have the same, and which do not.

    Args:
        labels_DHW: integer labels of the source.
        axes: to the target.

    Returns:
        Labels of shape Z, Y, X, meaningless where source voxels disagree, and bool of this shape, where they do.
    """
    smallest = largest = labels_DHW
    for dimension, axis in enumerate(axes):
        size = smallest.shape[dimension]
        # Pairs of neighbours are made in the source, which is mostly smaller, and looked up behind the voxels. A source
        # voxel of no weight has no say.
        index = torch.where((axis.weight > 0) & (axis.upper > axis.lower), size + axis.lower, axis.lower)
        if int(index.max()) >= size:
            smallest = _with_pairs(torch.minimum, smallest, dimension)
            largest = _with_pairs(torch.maximum, largest, dimension)
        if dimension < 2:
            smallest, largest = (values.index_select(dimension, index) for values in (smallest, largest))
    return smallest.index_select(2, index), (smallest != largest).index_select(2, index)


def _with_pairs(combine: Callable[[Tensor, Tensor], Tensor], values: Tensor, dimension: int) -> Tensor:
    """Voxels along an axis, and behind them what each makes with the next."""
    number = values.shape[dimension] - 1
    pairs = combine(values.narrow(dimension, 0, number), values.narrow(dimension, 1, number))
    return torch.cat([values, pairs], dimension)


def corners(points_P3: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """The source voxels of some target voxels, one of eight after the other: indices by axis (P) and weights (P).

    Corners that have no weight for any of the voxels are left out.
    """
    sides = []
    for point_P, axis in zip(points_P3.unbind(1), axes, strict=True):
        weight_P = axis.weight[point_P]
        lower = (axis.lower[point_P], 1 - weight_P)
        sides.append((lower, (axis.upper[point_P], weight_P)) if weight_P.any() else (lower,))
    for (d_P, of_d_P), (h_P, of_h_P), (w_P, of_w_P) in itertools.product(*sides):
        yield (d_P, h_P, w_P), of_d_P * of_h_P * of_w_P
