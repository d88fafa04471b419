"""Sums over the voxels of a window, or of a volume, in each low-resolution voxel.

Tensor suffixes: L labels, C any channels, V voxels in a row, D H W axes of a window or of a volume, d h w axes of the
low-resolution view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nnunet_nmsw.transfer import sent
from nnunet_nmsw.volume.windows import Shape


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
        first, size = int(start[axis]) % factor[axis], window_CDHW.shape[axis - 3]
        sums = (sums.movedim(axis - 3, -1) @ _lies_in(first, size, factor[axis], sums.device)).movedim(-1, axis - 3)
    low_Cdhw[(..., *box)] += sums


@lru_cache(maxsize=256)
def _lies_in(first: int, size: int, factor: int, device: torch.device) -> Tensor:
    """Which block of an axis each voxel lies in, voxels × blocks: 1 in that block. Windows lie in few ways on blocks.

    Args:
        first: place of the first voxel in its block.
        size: voxels.
        factor: voxels of a block.
        device: of the matrix.
    """
    with torch.inference_mode(False):  # a training may take what a prediction has made
        blocks = torch.arange(first, first + size) // factor
        return sent((blocks[:, None] == torch.arange(int(blocks[-1]) + 1)).float(), device)


def low_resolution_box(start: Sequence[int], size: Sequence[int], factor: Shape) -> tuple[slice, slice, slice]:
    """The low-resolution voxels that a window touches, as slices of the three axes."""
    d, h, w = (slice(int(a) // f, -(-(int(a) + n) // f)) for a, n, f in zip(start, size, factor, strict=True))
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
