"""A fused prediction, some planes at a time: its labels on the image's grid, or its logits.

Tensor suffixes: C channels of the logits, D H W axes of the padded volume, d h w axes of the low-resolution view,
Z Y X axes of the cropped image, K windows, P points, 3 one coordinate per axis.

For labels, nothing of classes × voxels is built: each part is worked out in as few places as the result allows.

- Where no window is, the labels are the coarse prediction's. Logits are interpolated only in cells of the
  low-resolution grid whose corners have different labels.
- Where windows are, they are blended and fused in tiles.
- Between the grid of the network and that of the image, logits are interpolated only where the labels of the voxels
  around differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.inference.open_windows import FusedModel, OpenWindows
from nnunet_nmsw.model.fusion import fuse, gaussian_weights
from nnunet_nmsw.volume.interpolation import Axis, agreed, corners, upsample_window, upsampling_axis
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape, WindowGrid, overlap, window_slices

TILE = 32
"""Voxels of a tile along each axis."""

DENSE = 0.25
"""Where a larger share of a tile's voxels needs logits, those of all are cheaper than those of some."""

FEWEST_PLANES = 4
"""Planes to work out at a time, at least."""

MOST_POINTS = 1 << 18
"""Points whose logits are interpolated at a time."""


class Planes(NamedTuple):
    """Some planes of the fused prediction.

    Attributes:
        labels_DHW: int16, see `LabelEncoding.decided`.
        tiles: by number, rows first, the tiles of which all logits are known, those that windows touch among them:
            float32 of shape C, D, H, W.
        axes: from the low-resolution view to these planes.
    """

    labels_DHW: Tensor
    tiles: dict[int, Tensor]
    axes: list[Axis]


class FusedPrediction:
    """The fused prediction of a padded volume, worked out plane by plane along the first axis, forwards.

    Args:
        models: of the ensemble; their logits are averaged.
        grid: of the volume.
        encoding: of the labels.
        windows_at_once: how many windows to ask a model for at a time.
        memory_of_windows: bytes for the logits of windows of a model; those of further ones lie in a temporary file.
    """

    def __init__(
        self,
        models: Sequence[FusedModel],
        grid: WindowGrid,
        encoding: LabelEncoding,
        windows_at_once: int = 1,
        memory_of_windows: float = math.inf,
    ) -> None:
        self.models = models
        self.patch_size, self.factor = grid.patch_size, grid.downsampling_factor
        self.encoding = encoding
        self.device = models[0].coarse_logits_Cdhw.device
        self.gaussian_DHW = gaussian_weights(grid.patch_size, self.device)
        self._open = [OpenWindows(model, grid.patch_size, windows_at_once, memory_of_windows) for model in models]

    # Only `planes` looks at the coarse prediction alone.

    @cached_property
    def coarse_logits_Cdhw(self) -> Tensor:
        """Mean of the models' coarse logits."""
        return mean(model.coarse_logits_Cdhw for model in self.models)

    @cached_property
    def coarse_rows(self) -> Tensor:
        """The same, a row for each low-resolution voxel."""
        return self.coarse_logits_Cdhw.flatten(1).T.contiguous()

    @cached_property
    def coarse_row_dhw(self) -> Tensor:
        """Number of each voxel's row, int64."""
        shape = self.coarse_logits_Cdhw.shape[1:]
        return torch.arange(math.prod(shape), device=self.device).view(shape)

    @cached_property
    def coarse_labels_dhw(self) -> Tensor:
        """int16, see `LabelEncoding.decided`."""
        return self.encoding.decided(self.coarse_logits_Cdhw)

    def planes(self, first: int, end: int, box: Sequence[slice]) -> Planes:
        """Planes `first` to `end`. Planes before `first` cannot be asked for any more.

        Args:
            first: first plane.
            end: plane after the last.
            box: the part of the second and third axis that is looked at.
        """
        for windows in self._open:
            windows.move_to(first, end)
        spans = [(first, end - first), *((part.start, part.stop - part.start) for part in box)]
        axes = [
            upsampling_axis(low, factor, start, size, self.device)
            for low, factor, (start, size) in zip(self.coarse_labels_dhw.shape, self.factor, spans, strict=True)
        ]
        labels_DHW, disagree_DHW = agreed(self.coarse_labels_dhw, axes)
        tiles = {}
        corners_of_tiles = itertools.product(*(range(part.start, part.stop, TILE) for part in box))
        for number, (h, w) in enumerate(corners_of_tiles):
            start, size = (first, h, w), (end - first, min(TILE, box[0].stop - h), min(TILE, box[1].stop - w))
            inside = window_slices((0, h - box[0].start, w - box[1].start), size)
            touched = any(windows.touched(start, size) for windows in self._open)
            if touched or disagree_DHW[inside].float().mean() > DENSE:
                tiles[number] = self._mean_fused(start, size)
                labels_DHW[inside] = self.encoding.decided(tiles[number])
                disagree_DHW[inside] = False
        for some_P3 in disagree_DHW.nonzero().split(MOST_POINTS):
            labels_DHW[some_P3.unbind(1)] = self.encoding.decided(self._coarse(some_P3, axes).T)
        return Planes(labels_DHW, tiles, axes)

    def dense(self, first: int, end: int, box: Sequence[slice]) -> Tensor:
        """Logits of all voxels of planes `first` to `end`; arguments as in `planes`.

        Returns:
            float32 of shape C, D, H, W.
        """
        for windows in self._open:
            windows.move_to(first, end)
        start = (first, box[0].start, box[1].start)
        return self._mean_fused(start, (end - first, box[0].stop - start[1], box[1].stop - start[2]))

    def logits(self, planes: Planes, points_P3: Tensor) -> Tensor:
        """Logits of some voxels of planes, relative to their first, float32 of shape P, C."""
        rows_PC = torch.empty(len(points_P3), len(self.coarse_logits_Cdhw), device=self.device)
        columns = -(-planes.labels_DHW.shape[2] // TILE)
        number_P = points_P3[:, 1] // TILE * columns + points_P3[:, 2] // TILE
        members = number_P.argsort(stable=True).split(torch.bincount(number_P).tolist())
        without_tile = [some for number, some in enumerate(members) if number not in planes.tiles]
        for some in torch.cat(without_tile).split(MOST_POINTS) if without_tile else ():
            rows_PC[some] = self._coarse(points_P3[some], planes.axes)
        for number, tile_CDHW in planes.tiles.items():
            if number < len(members) and len(members[number]):
                d, h, w = points_P3[members[number]].unbind(1)
                rows_PC[members[number]] = tile_CDHW[:, d, h % TILE, w % TILE].T
        return rows_PC

    def _mean_fused(self, start: Shape, size: Shape) -> Tensor:
        both = zip(self.models, self._open, strict=True)
        return mean(self._fused(model, windows, start, size) for model, windows in both)

    def _fused(self, model: FusedModel, windows: OpenWindows, start: Shape, size: Shape) -> Tensor:
        coarse_CDHW = upsample_window(model.coarse_logits_Cdhw, start, size, self.factor)
        sums_CDHW = torch.zeros_like(coarse_CDHW)
        weight_DHW = torch.zeros(size, device=self.device)
        for window, logits_CDHW in windows.touching(start, size):
            here, there = overlap(start, size, window, self.patch_size)
            gaussian_DHW = self.gaussian_DHW[there]
            patch_CDHW = logits_CDHW[(slice(None), *there)].to(self.device, torch.float32)
            sums_CDHW[(slice(None), *here)].addcmul_(patch_CDHW, gaussian_DHW)
            weight_DHW[here] += gaussian_DHW
        sums_CDHW /= weight_DHW.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(weight_DHW > 0, fuse(sums_CDHW, coarse_CDHW, model.weights), coarse_CDHW)

    def _coarse(self, points_P3: Tensor, axes: Sequence[Axis]) -> Tensor:
        return weighted_rows(self.coarse_rows, self.coarse_row_dhw, points_P3, axes)


def mean(tensors: Iterable[Tensor]) -> Tensor:
    """Mean of tensors of one shape, made one after the other: two of them are there at a time."""
    left = iter(tensors)
    total, number = next(left), 1
    for tensor in left:
        total, number = total + tensor, number + 1
    return total / number if number > 1 else total


def segment(
    prediction: FusedPrediction, axes: Sequence[Axis], offset: Sequence[int], inside: Shape, planes_at_once: int
) -> Tensor:
    """Labels on the grid of the cropped image.

    Args:
        prediction: of the padded volume.
        axes: from the volume before padding to the image.
        offset: voxels of padding before the volume, by axis.
        inside: voxels of the volume before padding, by axis.
        planes_at_once: planes of the volume to hold logits of.

    Returns:
        int16 of shape Z, Y, X on the host; of regions their numbers, see `LabelEncoding.decided`.
    """
    device = prediction.device
    in_plane = [axis.to(device) for axis in axes[1:]]
    box = [slice(offset[axis], offset[axis] + inside[axis]) for axis in (1, 2)]
    result_ZYX = torch.empty([len(axis.lower) for axis in axes], dtype=torch.int16)
    for slab, first, end in slabs_of(axes[0], planes_at_once):
        planes = prediction.planes(offset[0] + first, offset[0] + end, box)
        across = axes[0].part(slab.start, slab.stop).to(device)
        result_ZYX[slab] = resampled(prediction, planes, [across, *in_plane]).cpu()
    return result_ZYX


def slabs_of(axis: Axis, planes_at_once: int) -> Iterator[tuple[slice, int, int]]:
    """Target planes, and the first source plane that they lie between, and the one after the last.

    As many target planes at a time as lie within so many source planes, one at least.
    """
    lower, begin = axis.lower.tolist(), 0
    while begin < len(lower):
        end = begin + 1
        while end < len(lower) and lower[end] + 1 < lower[begin] + planes_at_once:
            end += 1
        yield slice(begin, end), lower[begin], int(axis.upper[end - 1]) + 1
        begin = end


def resampled(prediction: FusedPrediction, planes: Planes, axes: Sequence[Axis]) -> Tensor:
    """Labels of planes on another grid, int16 of shape Z, Y, X."""
    labels_ZYX, disagree_ZYX = agreed(planes.labels_DHW, axes)
    points_P3 = disagree_ZYX.nonzero()
    if not len(points_P3):
        return labels_ZYX
    shape = planes.labels_DHW.shape
    needed_DHW = torch.zeros(shape, dtype=torch.bool, device=prediction.device)
    for voxel_P, _ in corners(points_P3, axes):
        needed_DHW[voxel_P] = True
    voxels_P3 = needed_DHW.nonzero()
    rows_PC = prediction.logits(planes, voxels_P3)
    row_DHW = torch.zeros(shape, dtype=torch.int64, device=prediction.device)
    row_DHW[needed_DHW] = torch.arange(len(voxels_P3), device=prediction.device)
    for some_P3 in points_P3.split(MOST_POINTS):
        logits_PC = weighted_rows(rows_PC, row_DHW, some_P3, axes)
        labels_ZYX[some_P3.unbind(1)] = prediction.encoding.decided(logits_PC.T)
    return labels_ZYX


def weighted_rows(rows_PC: Tensor, row_DHW: Tensor, points_P3: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Interpolated logits, float32 of shape P, C.

    Args:
        rows_PC: logits of some voxels.
        row_DHW: int64, the row of each voxel that is needed.
        points_P3: target voxels.
        axes: to the target.
    """
    result_PC = torch.zeros(len(points_P3), rows_PC.shape[1], device=rows_PC.device)
    for voxel_P, weight_P in corners(points_P3, axes):
        result_PC.addcmul_(rows_PC[row_DHW[voxel_P]], weight_P[:, None])
    return result_PC


def bytes_of_plane(num_channels: int, voxels: int) -> int:
    """Memory for the logits of a plane of so many voxels, and for what is made of them."""
    return 3 * 4 * num_channels * voxels


def planes_for(memory: float, num_channels: int, height: int, width: int) -> int:
    """Planes of the volume whose logits, and what is made of them, fit into so many bytes; some at least."""
    planes = math.floor(memory / bytes_of_plane(num_channels, height * width))
    return max(FEWEST_PLANES, min(TILE, planes))
