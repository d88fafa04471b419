"""Windows of a volume, and its low-resolution view.

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
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor

from nnunet_nmsw.transfer import sent
from nnunet_nmsw.volume.precision import full_precision

Shape = tuple[int, int, int]

TILE_STEP_SIZE = 0.5
"""Step between windows as a fraction of the patch size, nnU-Net's default."""


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
    tile_step_size: float = TILE_STEP_SIZE

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

    def mean(self, map_dhw: Tensor, at: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Mean of a low-resolution map over the box of every window, boundaries weighted by their fraction.

        The windows are a product of positions along the axes, so their means are three products with small matrices:
        exact in float32, where a cumulative sum over the volume would cancel digits.

        Args:
            map_dhw: shape `low_shape`, or the part of it that is not zero.
            at: where that part lies, see `touched`.

        Returns:
            Means of shape N, float32, differentiable.
        """
        means = map_dhw.float()
        with full_precision(map_dhw.device):
            for axis in (2, 1, 0):
                overlaps = self._overlaps(axis, map_dhw.device)
                if at is not None:
                    overlaps = overlaps.index_select(1, at[axis].flatten())
                means = torch.tensordot(overlaps, means, dims=([1], [2]))
        return means.reshape(-1)

    def max(self, map_dhw: Tensor) -> Tensor:
        """Maximum of a low-resolution map over the voxels that every window touches, shape N."""
        values = map_dhw
        for axis, axis_steps in enumerate(self.steps):
            factor, size = self.downsampling_factor[axis], self.patch_size[axis]
            spans = [(start // factor, -(-(start + size) // factor)) for start in axis_steps]
            values = torch.stack([values.narrow(axis, a, b - a).amax(axis) for a, b in spans], axis)
        return values.reshape(-1)

    def touched(self, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Low-resolution voxels that a window touches, and neighbours where these are fewer than with other windows.

        Args:
            window: its number, int64 scalar, on any device.

        Returns:
            Indices by axis, of shapes d, 1, 1 and 1, h, 1 and 1, 1, w: they index a map of shape `low_shape`.
        """
        indices = []
        for axis, step_1 in enumerate(self._steps_of(window)):
            factor, size, low_size = self.downsampling_factor[axis], self.patch_size[axis], self.low_shape[axis]
            most = min(low_size, -(-size // factor) + 1)
            first_1 = _first(tuple(self.steps[axis]), factor, low_size - most, window.device).index_select(0, step_1)
            shape = [1, 1, 1]
            shape[axis] = most
            indices.append((first_1 + torch.arange(most, device=window.device)).view(shape))
        d_d11, h_1h1, w_11w = indices
        return d_d11, h_1h1, w_11w

    def coverage(self, window: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Share of low-resolution voxels that a window covers.

        Args:
            window: its number, int64 scalar, on any device.
            at: the voxels, see `touched`. The window covers no others.
        """
        shares = []
        for axis, step_1 in enumerate(self._steps_of(window)):
            factor, size = self.downsampling_factor[axis], self.patch_size[axis]
            voxels = (self.volume_shape[axis] - at[axis] * factor).clamp_max(factor)
            overlaps = self._overlaps(axis, window.device).index_select(0, step_1)[0][at[axis]]
            shares.append(overlaps * size / voxels)
        share_d11, share_1h1, share_11w = shares
        return share_d11 * share_1h1 * share_11w

    def _steps_of(self, window: Tensor) -> list[Tensor]:
        """Which of the axes' positions a window has, each of shape 1."""
        number_1, steps = window[None], []
        for axis_steps in reversed(self.steps):
            steps.append(number_1 % len(axis_steps))
            number_1 = number_1 // len(axis_steps)
        return steps[::-1]

    def _overlaps(self, axis: int, device: torch.device) -> Tensor:
        """Share of each window of an axis that lies in each low-resolution voxel: windows × voxels, rows sum to 1."""
        factor, size = self.downsampling_factor[axis], self.patch_size[axis]
        return _overlaps(tuple(self.steps[axis]), size, factor, self.low_shape[axis], device)


@lru_cache(maxsize=64)
def _overlaps(steps: tuple[int, ...], size: int, factor: int, low_size: int, device: torch.device) -> Tensor:
    """See `WindowGrid`. Choosing windows asks for the same again and again."""
    with torch.inference_mode(False):  # a training may take what a prediction has made
        start = torch.tensor(steps, dtype=torch.float32)[:, None]
        edge = torch.arange(low_size, dtype=torch.float32)[None] * factor
        overlap = (torch.minimum(start + size, edge + factor) - torch.maximum(start, edge)).clamp_min(0)
        return sent(overlap / size, device)


@lru_cache(maxsize=64)
def _first(steps: tuple[int, ...], factor: int, last: int, device: torch.device) -> Tensor:
    """First low-resolution voxel of each window of an axis, `last` at most."""
    with torch.inference_mode(False):
        return sent(torch.tensor([min(start // factor, last) for start in steps]), device)


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


def overlap(
    start: Sequence[int], size: Sequence[int], window: Sequence[int], patch_size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a window overlaps a box, as slices of the box and of the window."""
    here, there = [], []
    for a, n, b, m in zip(start, size, window, patch_size, strict=True):
        first, end = max(a, b), min(a + n, b + m)
        here.append(slice(first - a, end - a))
        there.append(slice(first - b, end - b))
    return tuple(here), tuple(there)
