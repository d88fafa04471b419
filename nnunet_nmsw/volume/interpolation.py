"""Linear interpolation axis by axis, and where it is not needed: between voxels that agree on the winning class.

Linear interpolation is a convex combination. Where a class has the largest logit at all corners of a cell it has the
largest everywhere in the cell, and where the sign of a region's logit is the same at all corners it is so everywhere.

Tensor suffixes: D H W axes of the source, Z Y X axes of the target, P points, 3 one coordinate per axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from nnunet_nmsw.transfer import sent
from nnunet_nmsw.volume.precision import full_precision
from nnunet_nmsw.volume.windows import Shape


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

    def matrix(self, source_size: int) -> Tensor:
        """Weights of the source voxels (columns) in the target voxels, float32; rows sum to 1."""
        source = torch.arange(source_size, device=self.lower.device)
        of_lower = (source == self.lower[:, None]) * (1 - self.weight[:, None])
        return of_lower + (source == self.upper[:, None]) * self.weight[:, None]

    def to(self, device: torch.device) -> Axis:
        """The same on a device."""
        return Axis(*(sent(tensor, device) for tensor in self))

    def is_identity(self, source_size: int) -> bool:
        """Whether the target voxels are the source voxels."""
        same = len(self.lower) == source_size and torch.equal(self.lower, torch.arange(source_size))
        return same and not self.weight.any()


def linear_axis(source_size: int, target_size: int) -> Axis:
    """Axes of the same length, edges replicated: `align_corners=False`, or skimage's `resize` of order 1."""
    position = (torch.arange(target_size, dtype=torch.float64) + 0.5) * (source_size / target_size) - 0.5
    return axis_between(position, source_size)


def nearest_axis(source_size: int, target_size: int) -> Axis:
    """As `linear_axis`, but the nearest voxel's value: SciPy's `map_coordinates` of order 0."""
    position = source_size / target_size * (np.arange(target_size) + 0.5) - 0.5
    # SciPy itself says what is nearest half-way between two voxels.
    voxels = map_coordinates(np.arange(source_size, dtype=float), position[None], order=0, mode="nearest")
    nearest = torch.from_numpy(voxels).long()
    return Axis(nearest, nearest, torch.zeros(target_size))


def upsampling_axis(low_size: int, factor: int, start: int, size: int, device: torch.device | None = None) -> Axis:
    """From an axis of the low-resolution view to voxels `start` to `start + size` of the volume's; edges replicated."""
    # Twice the factor times the position among the low-resolution voxels: whole numbers on every device.
    voxels = torch.arange(start, start + size, device=device)
    position = (2 * voxels + 1 - factor).clamp(0, 2 * factor * (low_size - 1))
    lower = position.div(2 * factor, rounding_mode="floor")
    weight = 1 - (2 * factor - position.remainder(2 * factor)) / (2 * factor)
    return Axis(lower, (lower + 1).clamp_max(low_size - 1), weight)


def axis_between(position: Tensor, size: int) -> Axis:
    """An axis from positions among source voxels, 0 being the centre of the first one; edges replicated.

    Args:
        position: float64, not decreasing.
        size: source voxels.
    """
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
        if index.device.type != "cpu" or int(index.max()) >= size:  # pairs cost less than to wait for a GPU's answer
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
        needed = weight_P.device.type != "cpu" or bool(weight_P.any())  # as in `agreed`
        sides.append((lower, (axis.upper[point_P], weight_P)) if needed else (lower,))
    for (d_P, of_d_P), (h_P, of_h_P), (w_P, of_w_P) in itertools.product(*sides):
        yield (d_P, h_P, w_P), of_d_P * of_h_P * of_w_P


def upsample_window(low_Cdhw: Tensor, start: Sequence[int], size: Sequence[int], factor: Shape) -> Tensor:
    """Trilinear interpolation of a low-resolution map at the voxels of one window.

    Equal to interpolating the whole map (voxel centres aligned, edges replicated) and cutting the window out, at the
    cost of the window alone. A window of the size of the volume at (0, 0, 0) gives the whole volume. One matrix product
    per axis: on a CPU ten times faster than `torch.nn.functional.interpolate`, forwards and backwards.

    Args:
        low_Cdhw: a map on the low-resolution grid, finite; any leading axes.
        start: first voxel of the window.
        size: voxels of the window by axis.
        factor: voxels of the volume per low-resolution voxel.

    Returns:
        float32, the same leading axes and `size`.
    """
    values, origin = surroundings(low_Cdhw.float(), start, size, factor)
    matrices: list[Tensor | None] = []
    for axis, f, a, o, n in zip((-3, -2, -1), factor, map(int, start), origin, size, strict=True):
        if f == 1:
            values = values.narrow(axis, a - o, n)
        matrices.append(None if f == 1 else _upsampling_matrix(values.shape[axis], f, a - o, n, values.device))
    return interpolated(values, matrices)


@lru_cache(maxsize=256)
def _upsampling_matrix(low_size: int, factor: int, start: int, size: int, device: torch.device) -> Tensor:
    """Windows and tiles lie in few ways on the low-resolution grid: what is made once for each way is small."""
    with torch.inference_mode(False):  # a training may take what a prediction has made
        return upsampling_axis(low_size, factor, start, size, device).matrix(low_size)


def interpolated(values_DHW: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """A map on another grid, float32 of shape Z, Y, X behind any leading axes; differentiable.

    Args:
        values_DHW: finite; any leading axes.
        matrices: of each axis, see `Axis.matrix`; None where voxels stay.
    """
    values = values_DHW.float()
    with full_precision(values.device):
        for dimension in (-1, -2, -3):
            matrix = matrices[dimension]
            if matrix is None:
                continue
            if dimension == -1:
                values = values @ matrix.T
            elif dimension == -2:
                values = matrix @ values
            else:
                values = (matrix @ values.flatten(-2)).unflatten(-1, values.shape[-2:])
    return values


def interpolated_between(values_DHW: Tensor, axes: Sequence[Axis | None]) -> Tensor:
    """As `interpolated`, by two look-ups an axis and not by a product: of large axes, on a GPU.

    Args:
        values_DHW: finite; any leading axes.
        axes: to the other grid; None where voxels stay.
    """
    values = values_DHW.float()
    for dimension, axis in zip((-3, -2, -1), axes, strict=True):
        if axis is None:
            continue
        lower, upper = (values.index_select(dimension, index) for index in (axis.lower, axis.upper))
        values = torch.lerp(lower, upper, axis.weight.view([-1] + [1] * (-1 - dimension)))
    return values


def surroundings(
    low_Cdhw: Tensor, start: Sequence[int], size: Sequence[int], factor: Shape
) -> tuple[Tensor, tuple[int, int, int]]:
    """The part of a low-resolution map from which the voxels of a window are interpolated, as a view.

    Args:
        low_Cdhw: a map on the low-resolution grid; any leading axes.
        start: first voxel of the window.
        size: voxels of the window by axis.
        factor: voxels of the volume per low-resolution voxel.

    Returns:
        The part, and the voxel of the volume at which it begins.
    """
    origin = []
    for axis, (a, n, f) in enumerate(zip(map(int, start), size, factor, strict=True)):
        # One voxel more on both sides than the window touches: what its outermost voxels interpolate with.
        first, last = max(0, a // f - 1), min(low_Cdhw.shape[axis - 3], -(-(a + n) // f) + 1)
        low_Cdhw = low_Cdhw.narrow(axis - 3, first, last - first)
        origin.append(first * f)
    d, h, w = origin
    return low_Cdhw, (d, h, w)
