"""Windows, the low-resolution view, and the way between the two.

Axis order is that of nnU-Net's preprocessed arrays everywhere. Tensor suffixes:

    N  windows of the grid                    D H W  axes of the volume, or of a patch
    K  chosen windows                         d h w  axes of the low-resolution view
    B  batch   C  channels or classes         3      one coordinate per axis, in voxels
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor

from nnunet_nmsw.precision import full_precision

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class WindowGrid:
    """The candidate windows of one volume: the positions of nnU-Net's sliding window, in its order.

    Attributes:
        volume_shape: voxels by axis, padded to the patch size at least.
        patch_size: voxels by axis.
        downsampling_factor: voxels of the volume per low-resolution voxel, by axis.
        tile_step_size: step between windows as a fraction of the patch size.
    """

    volume_shape: Shape
    patch_size: Shape
    downsampling_factor: Shape
    tile_step_size: float = 0.5

    @cached_property
    def steps(self) -> list[list[int]]:
        """First voxels of the windows along each axis; the windows are the product of the three lists."""
        steps: list[list[int]] = compute_steps_for_sliding_window(
            self.volume_shape, self.patch_size, self.tile_step_size
        )
        return steps

    @cached_property
    def starts_N3(self) -> Tensor:
        """First voxel of every window, int64."""
        return torch.tensor(list(itertools.product(*self.steps)), dtype=torch.int64)

    def __len__(self) -> int:
        return math.prod(len(axis_steps) for axis_steps in self.steps)

    @property
    def low_shape(self) -> Shape:
        """Shape of the low-resolution view."""
        return low_shape(self.volume_shape, self.downsampling_factor)

    def mean(self, map_dhw: Tensor) -> Tensor:
        """Mean of a low-resolution map over the box of every window, boundaries weighted by their fraction.

        The windows are a product of positions along the axes, so their means are three products with small matrices:
        exact in float32, where a cumulative sum over the volume would cancel digits.

        Args:
            map_dhw: shape `low_shape`.

        Returns:
            Means of shape N, float32, differentiable.
        """
        means = map_dhw.float()
        with full_precision(map_dhw.device):
            for axis in (2, 1, 0):
                means = torch.tensordot(self._overlaps(axis, map_dhw.device), means, dims=([1], [2]))
        return means.reshape(-1)

    def max(self, map_dhw: Tensor) -> Tensor:
        """Maximum of a low-resolution map over the voxels that every window touches, shape N."""
        values = map_dhw
        for axis, axis_steps in enumerate(self.steps):
            factor, size = self.downsampling_factor[axis], self.patch_size[axis]
            spans = [(start // factor, -(-(start + size) // factor)) for start in axis_steps]
            values = torch.stack([values.narrow(axis, a, b - a).amax(axis) for a, b in spans], axis)
        return values.reshape(-1)

    def coverage(self, window: int, device: torch.device) -> Tensor:
        """Share of every low-resolution voxel that a window covers, shape `low_shape`."""
        counts = [len(axis_steps) for axis_steps in self.steps]
        shares = []
        for axis, step in enumerate(np.unravel_index(window, counts)):
            factor, size = self.downsampling_factor[axis], self.patch_size[axis]
            voxels = (self.volume_shape[axis] - torch.arange(self.low_shape[axis], device=device) * factor).clamp_max(
                factor
            )
            shares.append(self._overlaps(axis, device)[int(step)] * size / voxels)
        return torch.einsum("d,h,w->dhw", *shares)

    def _overlaps(self, axis: int, device: torch.device) -> Tensor:
        """Share of each window of an axis that lies in each low-resolution voxel: windows × voxels, rows sum to 1."""
        factor, size = self.downsampling_factor[axis], self.patch_size[axis]
        start = torch.tensor(self.steps[axis], dtype=torch.float32, device=device)[:, None]
        edge = torch.arange(self.low_shape[axis], dtype=torch.float32, device=device)[None] * factor
        overlap = (torch.minimum(start + size, edge + factor) - torch.maximum(start, edge)).clamp_min(0)
        return overlap / size


def low_shape(volume_shape: Sequence[int], factor: Sequence[int]) -> Shape:
    """Shape of the low-resolution view of a volume: the last voxel of an axis may cover a rest."""
    d, h, w = (-(-n // f) for n, f in zip(volume_shape, factor, strict=True))
    return d, h, w


def downsample(volume_BCDHW: Tensor, factor: Shape) -> Tensor:
    """Area average of `factor` voxels, over the voxels that exist where the last block is incomplete.

    Returns:
        Shape B, C, `low_shape`; low-resolution voxel j covers voxels j·f to (j+1)·f of an axis.
    """
    kernel = tuple(min(f, n) for f, n in zip(factor, volume_BCDHW.shape[2:], strict=True))
    return F.avg_pool3d(volume_BCDHW, kernel, factor, ceil_mode=True, count_include_pad=False)


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
    with full_precision(values.device):
        for axis in (-1, -2, -3):
            first, f, low = int(start[axis]) - origin[axis], factor[axis], values.shape[axis]
            if f == 1:
                values = values.narrow(axis, first, size[axis])
                continue
            # Twice the factor times the position among the low-resolution voxels: whole numbers on every device.
            voxels = torch.arange(first, first + size[axis], device=values.device)
            position = (2 * voxels + 1 - f).clamp(0, 2 * f * (low - 1))
            distance = (position[:, None] - 2 * f * torch.arange(low, device=values.device)).abs()
            matrix = (1 - distance / (2 * f)).clamp_min(0)
            if axis == -1:
                values = values @ matrix.T
            elif axis == -2:
                values = matrix @ values
            else:
                values = (matrix @ values.flatten(-2)).unflatten(-1, values.shape[-2:])
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


def add_to_low_resolution_(low_Cdhw: Tensor, window_CDHW: Tensor, start: Sequence[int], factor: Shape) -> None:
    """Add every voxel of a window to the low-resolution voxel it lies in, in place.

    Args:
        low_Cdhw: float32 map on the low-resolution grid; any leading axes.
        window_CDHW: values of the window's voxels, float32; the same leading axes.
        start: first voxel of the window.
        factor: voxels of the volume per low-resolution voxel.
    """
    sums, box = window_CDHW, low_resolution_box(start, window_CDHW.shape[-3:], factor)
    for axis in (2, 1, 0):
        first, size = int(start[axis]), window_CDHW.shape[axis - 3]
        blocks = torch.arange(first, first + size, device=window_CDHW.device) // factor[axis]
        lies_in = (blocks[:, None] == torch.arange(box[axis].start, box[axis].stop, device=window_CDHW.device)).float()
        sums = (sums.movedim(axis - 3, -1) @ lies_in).movedim(-1, axis - 3)
    low_Cdhw[(..., *box)] += sums


def low_resolution_box(start: Sequence[int], size: Sequence[int], factor: Shape) -> tuple[slice, slice, slice]:
    """The low-resolution voxels that a window touches, as slices of the three axes."""
    d, h, w = (slice(int(a) // f, -(-(int(a) + n) // f)) for a, n, f in zip(start, size, factor, strict=True))
    return d, h, w


def crop(volume_BCDHW: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """The window of a volume, as a view."""
    return volume_BCDHW[(..., *window_slices(start, size))]


def crop_windows(volume_1CDHW: Tensor, starts_K3: Tensor, size: Sequence[int]) -> Tensor:
    """The windows of one volume as a batch, shape K, C, `size`."""
    return torch.cat([crop(volume_1CDHW, start, size) for start in starts_K3.tolist()])


def window_slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, slice, slice]:
    """The window as slices of the three axes."""
    d, h, w = (slice(int(a), int(a) + int(n)) for a, n in zip(start, size, strict=True))
    return d, h, w


class LabelSums:
    """Sums over the voxels of each label in each low-resolution voxel that a window touches.

    One pass over the window, whatever the number of labels.

    Args:
        labels_DHW: integer labels from 0 to `num_labels` - 1.
        num_labels: number of labels.
        start: first voxel of the window.
        factor: voxels of the volume per low-resolution voxel.

    Attributes:
        box: the low-resolution voxels, as slices of the three axes.
    """

    def __init__(self, labels_DHW: Tensor, num_labels: int, start: Sequence[int], factor: Shape) -> None:
        self.box = low_resolution_box(start, labels_DHW.shape, factor)
        self._shape = (num_labels, *(low.stop - low.start for low in self.box))
        offsets, blocks = [], 1
        for axis in (2, 1, 0):
            first, size, low_first = int(start[axis]), labels_DHW.shape[axis], self.box[axis].start
            block = torch.arange(first, first + size, device=labels_DHW.device) // factor[axis] - low_first
            offsets.append((block * blocks).view([-1 if a == axis else 1 for a in range(3)]))
            blocks *= self._shape[axis + 1]
        # In place, and of 32 bits where they suffice: this is most of the time that counts of a volume take.
        dtype = torch.int32 if num_labels * blocks < 2**31 else torch.int64
        index_DHW = labels_DHW.to(dtype, copy=True)
        index_DHW *= blocks
        index_DHW += offsets[0].to(dtype)
        index_DHW += (offsets[1] + offsets[2]).to(dtype)
        self._index_V = index_DHW.reshape(-1)

    def __call__(self, values_DHW: Tensor) -> Tensor:
        """The sums of values, float32, with their gradient.

        Returns:
            float32 of shape `num_labels`, d, h, w: the axes of `box`.
        """
        return self._sums(values_DHW.reshape(-1))

    def counts(self) -> Tensor:
        """The number of voxels, of the same shape."""
        return self._sums(torch.ones(1, device=self._index_V.device).expand(len(self._index_V)))

    def _sums(self, values_V: Tensor) -> Tensor:
        sums = torch.zeros(math.prod(self._shape), device=values_V.device)
        return sums.index_add(0, self._index_V, values_V).view(self._shape)


def label_counts(labels_DHW: Tensor, num_labels: int, factor: Shape) -> Tensor:
    """Voxels of each label in each low-resolution voxel of a volume.

    Args:
        labels_DHW: integer labels from 0 to `num_labels` - 1.
        num_labels: number of labels.
        factor: voxels of the volume per low-resolution voxel.

    Returns:
        float32, shape `num_labels`, d, h, w.
    """
    return LabelSums(labels_DHW, num_labels, (0, 0, 0), factor).counts()
