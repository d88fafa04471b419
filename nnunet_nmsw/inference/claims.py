"""What fine models with labels of their own say of an image, and whom to believe where they meet.

A fine model is asked where its windows are. There it claims the voxels at which one of its classes has a larger fused
logit than "none of its classes", and the difference of the two is how sure it is. A voxel gets the class that is
claimed most surely. Where nobody claims it, it gets the best label of the coarse model among the labels that no model
with a window there has. The order of the models makes no difference.

Tensor suffixes: C channels of the coarse model's logits, F and M channels of a fine model, see `MatchedLabels`, D H W
axes of a padded volume, Z Y X axes of the cropped image, K windows, P points, 3 one coordinate per axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.open_windows import FusedModel
from nnunet_nmsw.inference.planes import (
    MOST_POINTS,
    TILE,
    FusedPrediction,
    Planes,
    resampled,
    segment,
    slabs_of,
    weighted_rows,
)
from nnunet_nmsw.inference.volume import Padded
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.volume.interpolation import Axis, interpolated
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.matched_labels import MatchedLabels
from nnunet_nmsw.volume.windows import Shape, WindowGrid, overlap, window_slices

MOST_MODELS = 63
"""A bit of a whole number for each."""


class Claims(NamedTuple):
    """What a fine model says of a box of the cropped image.

    Attributes:
        box: where it is.
        covered_ZYX: bool, where the model has a window.
        labels_ZYX: int16, the number of the claimed class among the model's classes, from 1; 0 where it claims none.
        sureness_ZYX: float16, how far the logit of a claimed class is above that of none, more than 0.
    """

    box: tuple[slice, slice, slice]
    covered_ZYX: Tensor
    labels_ZYX: Tensor
    sureness_ZYX: Tensor


class FinePrediction(NamedTuple):
    """A fine model's prediction of an image, not worked out yet.

    Attributes:
        prediction: of the padded volume.
        labels: the classes that it has channels for.
        starts_K3: first voxels of the windows in the padded volume.
        axes: from the volume before padding to the cropped image.
        padded: the volume.
        planes_at_once: planes of the volume to hold logits of.
    """

    prediction: FusedPrediction
    labels: MatchedLabels
    starts_K3: Tensor
    axes: Sequence[Axis]
    padded: Padded
    planes_at_once: int


def claims_of(fine: FinePrediction) -> Iterator[Claims]:
    """What a model claims, box by box along the first axis; tensors are on the host."""
    prediction, labels, starts_K3, axes, padded, planes_at_once = fine
    device, patch_size = prediction.device, prediction.patch_size
    first = [int(start) - before for start, before in zip(starts_K3.amin(0), padded.offset, strict=True)]
    last = starts_K3.amax(0) + torch.tensor(patch_size)
    end = [int(after) - before for after, before in zip(last, padded.offset, strict=True)]
    targets = [_targets(axis, a, b) for axis, a, b in zip(axes, first, end, strict=True)]
    if any(part.start >= part.stop for part in targets):
        return
    parts = [axis.part(part.start, part.stop) for axis, part in zip(axes, targets, strict=True)]
    sources = [int(axis.lower[part.start]) for axis, part in zip(axes, targets, strict=True)]
    sizes = [int(part.upper.max()) + 1 for part in parts]
    in_plane = [part.to(device) for part in parts[1:]]
    box = [
        slice(before + source, before + source + size)
        for before, source, size in zip(padded.offset[1:], sources[1:], sizes[1:], strict=True)
    ]
    for slab, begin, stop in slabs_of(parts[0], planes_at_once):
        first_plane = padded.offset[0] + sources[0] + begin
        start: Shape = (first_plane, box[0].start, box[1].start)
        covered_DHW = covered(starts_K3, patch_size, start, (stop - begin, sizes[1], sizes[2]))
        if not covered_DHW.any():
            continue
        planes = prediction.planes(first_plane, first_plane + stop - begin, box)
        across = parts[0].part(slab.start, slab.stop).to(device)
        to_image = [across, *in_plane]
        labels_ZYX = resampled(prediction, planes, to_image).cpu()
        labels_ZYX[labels_ZYX >= labels.num_shared] = 0  # classes that nobody asks for
        matrices = [axis.matrix(size) for axis, size in zip(to_image, planes.labels_DHW.shape, strict=True)]
        # An interpolated maximum is at least the maximum of what is interpolated: a claim stays above 0.
        sureness_ZYX = interpolated(_sureness(planes, labels), matrices).cpu()
        covered_ZYX = nearest(covered_DHW, [axis.to(torch.device("cpu")) for axis in to_image])
        smallest, largest = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max
        yield Claims(
            (slice(targets[0].start + slab.start, targets[0].start + slab.stop), targets[1], targets[2]),
            covered_ZYX,
            torch.where(covered_ZYX, labels_ZYX, 0),
            sureness_ZYX.clamp(smallest, largest).half(),
        )


class Merged:
    """The labels of an image of which several fine models claim voxels.

    Args:
        shape: of the cropped image.
        classes: of each model, the coarse model's numbers in the order of the model's own.

    Raises:
        UserError: there are too many models.
    """

    def __init__(self, shape: Sequence[int], classes: Sequence[Sequence[int]]) -> None:
        if len(classes) > MOST_MODELS:
            raise UserError(f"--local_model names {len(classes)} models: give {MOST_MODELS} at most")
        self.classes = classes
        self._labels_ZYX = torch.zeros(tuple(shape), dtype=torch.int16)
        self._sureness_ZYX = torch.zeros(tuple(shape), dtype=torch.float16)
        # Which models have a window, bit by bit.
        kinds = torch.uint8, torch.int16, torch.int32, torch.int64
        bits = next(kind for kind in kinds if torch.iinfo(kind).max.bit_length() >= len(classes))
        self._models_ZYX = torch.zeros(tuple(shape), dtype=bits)

    def add(self, model: int, claims: Claims) -> None:
        """Take in what a model says of a box."""
        labels_ZYX, sureness_ZYX = self._labels_ZYX[claims.box], self._sureness_ZYX[claims.box]
        numbers = torch.tensor([0, *self.classes[model]], dtype=torch.int16)
        claimed_ZYX = numbers[claims.labels_ZYX.long()]
        surer_ZYX = claims.sureness_ZYX > sureness_ZYX
        # Equally sure claims go to the smaller label, whoever came first.
        surer_ZYX |= (claims.sureness_ZYX == sureness_ZYX) & (claimed_ZYX < labels_ZYX)
        surer_ZYX &= claimed_ZYX > 0
        labels_ZYX[surer_ZYX] = claimed_ZYX[surer_ZYX]
        sureness_ZYX[surer_ZYX] = claims.sureness_ZYX[surer_ZYX]
        self._models_ZYX[claims.box] |= claims.covered_ZYX.to(self._models_ZYX.dtype) << model

    def labels(self, coarse: FusedPrediction, axes: Sequence[Axis], planes_at_once: int) -> Tensor:
        """Labels of the cropped image, int16 of shape Z, Y, X.

        Args:
            coarse: the coarse model's prediction in voxels of its own, without windows.
            axes: from its volume to the image.
            planes_at_once: planes of its volume to hold logits of.
        """
        logits_Cdhw = coarse.coarse_logits_Cdhw
        d, h, w = logits_Cdhw.shape[1:]
        coarse_ZYX = segment(coarse, axes, (0, 0, 0), (d, h, w), planes_at_once)
        owners = self._owners(len(logits_Cdhw))
        unclaimed_ZYX = self._labels_ZYX == 0
        denied_ZYX = unclaimed_ZYX & ((owners[coarse_ZYX.long()] & self._models_ZYX) != 0)
        labels_ZYX = torch.where(unclaimed_ZYX, coarse_ZYX, self._labels_ZYX)
        on_device = [axis.to(logits_Cdhw.device) for axis in axes]
        for points_P3 in denied_ZYX.nonzero().split(MOST_POINTS):
            at = points_P3.unbind(1)
            rows = coarse.coarse_rows, coarse.coarse_row_dhw
            logits_PC = weighted_rows(*rows, points_P3.to(logits_Cdhw.device), on_device).cpu()
            denied_PC = (owners & self._models_ZYX[at][:, None]) != 0
            labels_ZYX[at] = logits_PC.masked_fill(denied_PC, -torch.inf).argmax(1).to(torch.int16)
        return labels_ZYX

    def _owners(self, num_labels: int) -> Tensor:
        """Which models have each of the coarse model's labels, bit by bit."""
        owners = torch.zeros(num_labels, dtype=self._models_ZYX.dtype)
        for model, classes in enumerate(self.classes):
            for number in classes:
                owners[number] |= 1 << model
        return owners


def without_windows(logits_Cdhw: Tensor, encoding: LabelEncoding) -> FusedPrediction:
    """A model's prediction in voxels of its own, which no window touches: for `Merged.labels`."""
    d, h, w = logits_Cdhw.shape[1:]
    weights = FusionWeights.convex(torch.zeros(len(logits_Cdhw), device=logits_Cdhw.device))
    model = FusedModel(logits_Cdhw, torch.zeros((0, 3), dtype=torch.int64), weights, _no_windows)
    return FusedPrediction([model], WindowGrid((d, h, w), (1, 1, 1), (1, 1, 1)), encoding)


def _no_windows(starts_K3: Tensor) -> Tensor:
    raise AssertionError("there are no windows")


def covered(starts_K3: Tensor, patch_size: Shape, start: Shape, size: Shape) -> Tensor:
    """Which voxels of a box have a window over them, bool of the box's shape.

    Args:
        starts_K3: first voxels of the windows.
        patch_size: voxels of a window.
        start: first voxel of the box.
        size: voxels of the box.
    """
    covered_DHW = torch.zeros(size, dtype=torch.bool)
    for window in starts_K3.tolist():
        here, _ = overlap(start, size, window, patch_size)
        if all(part.start < part.stop for part in here):
            covered_DHW[here] = True
    return covered_DHW


def _targets(axis: Axis, first: int, end: int) -> slice:
    """The target voxels of an axis whose nearest source voxels are from `first` to `end`."""
    nearest = _nearest_voxels(axis)
    inside = ((nearest >= first) & (nearest < end)).nonzero()
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)


def nearest(values_DHW: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Values of the nearest voxels on another grid, shape Z, Y, X."""
    for dimension, axis in enumerate(axes):
        values_DHW = values_DHW.index_select(dimension, _nearest_voxels(axis))
    return values_DHW


def _nearest_voxels(axis: Axis) -> Tensor:
    return torch.where(axis.weight > 0.5, axis.upper, axis.lower)


def _sureness(planes: Planes, labels: MatchedLabels) -> Tensor:
    """How far the best class is above none, float32 of the planes' shape; 0 where no logits were needed."""
    sureness_DHW = torch.zeros(planes.labels_DHW.shape, device=planes.labels_DHW.device)
    columns = -(-planes.labels_DHW.shape[2] // TILE)
    for number, tile_FDHW in planes.tiles.items():
        row, column = divmod(number, columns)
        depth, height, width = tile_FDHW.shape[1:]
        tile = window_slices((0, row * TILE, column * TILE), (depth, height, width))
        shared_MDHW = labels.of_shared(tile_FDHW)
        sureness_DHW[tile] = shared_MDHW[1:].amax(0) - shared_MDHW[0]
    return sureness_DHW
