"""A preprocessed volume in, labels or logits out. Nothing here knows of files, plans, or nnU-Net's classes.

Tensor suffixes: C channels or classes, D H W axes of the volume or of a patch, d h w axes of the low-resolution view,
K chosen windows, 3 one coordinate per axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor
from tqdm import tqdm

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.device import all_threads, unless_out_of_memory
from nnunet_nmsw.inference.open_windows import FusedModel
from nnunet_nmsw.inference.planes import FusedPrediction, planes_for, segment
from nnunet_nmsw.inference.slabs import free_memory, planes_of_slab, segment_slabs
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.selection.budget import budget_of
from nnunet_nmsw.selection.interface import CoarsePrediction, Selector, WindowChoice
from nnunet_nmsw.volume.interpolation import Axis
from nnunet_nmsw.volume.windows import Shape, WindowGrid

Result = TypeVar("Result")


class Padded(NamedTuple):
    """A preprocessed volume, padded to the patch size at least as nnU-Net's predictor pads.

    Attributes:
        volume_CDHW: with the padding.
        offset: voxels of padding before each axis.
        inside: voxels of the volume before padding, by axis.
    """

    volume_CDHW: Tensor
    offset: Shape
    inside: Shape

    @classmethod
    def of(cls, volume_CDHW: Tensor, patch_size: Sequence[int]) -> Padded:
        """Pad a volume.

        Raises:
            UserError: it has no voxels, which nnU-Net's preprocessing makes of an image that is too thin.
        """
        if 0 in volume_CDHW.shape:
            raise UserError(
                "the image is thinner than half a voxel of the model's spacing along an axis: give the whole volume, "
                "or a model of a finer spacing"
            )
        padded_CDHW, unpad = pad_nd_image(volume_CDHW, patch_size, "constant", {"value": 0}, True)
        a, b, c = (axis.start for axis in unpad[1:])
        return cls(padded_CDHW, (a, b, c), spatial_shape(volume_CDHW))

    def on(self, device: torch.device) -> Padded:
        """The same on a device, by one copy; as it is where the device has too little memory."""
        volume_CDHW = unless_out_of_memory(lambda: self.volume_CDHW.to(device), lambda: self.volume_CDHW, device)
        return self._replace(volume_CDHW=volume_CDHW)


class Patches(Protocol):
    """What predicts windows at full resolution."""

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """Logits of the windows of a volume, floating, of shape K, C, patch size."""
        ...


class Networks(Patches, Protocol):
    """The two networks of a fold, and the weights of their fusion."""

    @property
    def weights(self) -> FusionWeights:
        """Weights of the fusion."""
        ...

    def grid(self, volume_shape: Shape) -> WindowGrid:
        """The windows of nnU-Net's sliding window over a padded volume."""
        ...

    def coarse(self, padded: Padded) -> CoarsePrediction:
        """The coarse prediction of a volume."""
        ...


class Spending(NamedTuple):
    """What may be spent on a volume, and who decides on what.

    Attributes:
        selector: chooses windows.
        num_patches: a number, a percentage, "all" or "auto"; 0 for the coarse prediction alone.
        threshold: with "auto", see `Budget`.
    """

    selector: Selector
    num_patches: int | str
    threshold: float | None = None

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid) -> WindowChoice:
        """The windows of a volume."""
        budget = budget_of(self.num_patches, len(grid), self.threshold)
        return self.selector.choose(coarse, grid, budget) if budget.num_windows else WindowChoice.nothing()


@dataclasses.dataclass(frozen=True)
class ChosenWindows:
    """The windows that one network took of one preprocessed volume.

    Attributes:
        starts: int, windows × 3, first voxel in the preprocessed volume; negative where a small volume was padded.
        scores: float32, by window, in the order of choice.
        patch_size: voxels by axis.
        volume_shape: of the preprocessed volume, without padding.
        num_windows: how many there were to choose from.
    """

    starts: np.ndarray
    scores: np.ndarray
    patch_size: tuple[int, int, int]
    volume_shape: tuple[int, int, int]
    num_windows: int


class FoldOfCase(NamedTuple):
    """What a fold has made of a volume before its patches are predicted.

    Attributes:
        networks: of the fold, which predict its patches.
        coarse: the coarse prediction.
        grid: of the padded volume.
        windows: that were chosen.
        weights: of the fusion.
    """

    networks: Patches
    coarse: CoarsePrediction
    grid: WindowGrid
    windows: WindowChoice
    weights: FusionWeights

    def in_volume(self, padded: Padded) -> ChosenWindows:
        """The windows, without padding."""
        starts = self.windows.starts_K3.numpy() - np.array(padded.offset)
        scores = self.windows.scores_K.numpy()
        return ChosenWindows(starts, scores, self.grid.patch_size, padded.inside, len(self.grid))


class Share(NamedTuple):
    """What may go on at a time.

    Attributes:
        num_preprocessing: cases that are preprocessed beside the prediction.
        num_writers: files that are written beside it.
        planes: bytes for the logits of the planes that are worked out.
        windows: bytes for windows' logits; further ones are kept in a file.
        patches_at_once: patches of a batch.
    """

    num_preprocessing: int
    num_writers: int
    planes: int
    windows: int
    patches_at_once: int


class Work(NamedTuple):
    """How a volume is worked through.

    Attributes:
        share: what may go on at a time.
        device: where results are kept, if they fit there.
        progress_bar: show one.
    """

    share: Share
    device: torch.device
    progress_bar: bool = False


def where_it_fits(predict: Callable[[Work], Result], work: Work) -> Result:
    """What is predicted with results on the device of the work, or on the host if the device has too little memory."""

    def on_host() -> Result:
        print("The results do not fit on the device; predicting again with results on the host")
        with all_threads():
            return predict(work._replace(device=torch.device("cpu")))

    return unless_out_of_memory(lambda: predict(work), on_host, work.device)


def choose(networks: Networks, padded: Padded, spending: Spending) -> FoldOfCase:
    """Predict a volume coarsely and choose windows."""
    grid = networks.grid(spatial_shape(padded.volume_CDHW))
    coarse = networks.coarse(padded)
    return FoldOfCase(networks, coarse, grid, spending.choose(coarse, grid), networks.weights)


def predict_labels(padded: Padded, folds: Sequence[FoldOfCase], axes: Sequence[Axis], work: Work) -> Tensor:
    """Labels of a volume on another grid, without a volume of logits.

    Args:
        padded: the volume.
        folds: of the ensemble, whose logits are averaged.
        axes: to the grid, from the volume before padding.
        work: how.

    Returns:
        int16 on the host; of regions their numbers, see `LabelEncoding.decided`.
    """
    num_channels = len(folds[0].coarse.logits_Cdhw)
    _, height, width = padded.inside
    with patches_bar(folds, work) as bar:
        prediction = fused_prediction(padded, folds, work, bar)
        if work.device.type == "cpu":
            planes = planes_for(work.share.planes, num_channels, height, width)
            return segment(prediction, axes, padded.offset, padded.inside, planes)
        memory = free_memory(work.device, work.share.planes)
        planes = planes_of_slab(memory, num_channels, axes, padded.inside)
        return segment_slabs(prediction, axes, padded.offset, padded.inside, planes)


def predict_logits(padded: Padded, folds: Sequence[FoldOfCase], work: Work) -> Tensor:
    """Logits of a volume.

    Args:
        padded: the volume.
        folds: of the ensemble, whose logits are averaged.
        work: how.

    Returns:
        float16 of shape C, D, H, W without padding, on the device of the work.
    """
    num_channels = len(folds[0].coarse.logits_Cdhw)
    depth, height, width = padded.inside
    planes = planes_for(work.share.planes, num_channels, height, width)
    logits_CDHW = torch.empty(num_channels, *padded.inside, dtype=torch.float16, device=work.device)
    before, *offset = padded.offset
    box = [slice(start, start + size) for start, size in zip(offset, (height, width), strict=True)]
    with patches_bar(folds, work) as bar:
        prediction = fused_prediction(padded, folds, work, bar)
        for first in range(0, depth, planes):
            end = min(depth, first + planes)
            logits_CDHW[:, first:end] = prediction.dense(before + first, before + end, box)
    return logits_CDHW


def spatial_shape(volume_CDHW: Tensor) -> Shape:
    """Voxels by axis."""
    d, h, w = volume_CDHW.shape[1:]
    return d, h, w


def patches_bar(folds: Sequence[FoldOfCase], work: Work) -> tqdm:
    """A progress bar over the patches of a volume."""
    total = sum(len(fold.windows.starts_K3) for fold in folds)
    return tqdm(total=total, desc="patches", disable=not work.progress_bar, leave=False)


def fused_prediction(padded: Padded, folds: Sequence[FoldOfCase], work: Work, bar: tqdm) -> FusedPrediction:
    """The fused prediction of a volume, whose patches are predicted when they are asked for."""
    device, share, grid = work.device, work.share, folds[0].grid

    def model(fold: FoldOfCase) -> FusedModel:
        def windows(starts_K3: Tensor) -> Tensor:
            logits_KCDHW = fold.networks.patches(padded, fold.coarse, starts_K3)
            bar.update(len(starts_K3))
            return logits_KCDHW.to(device, torch.float16)

        choice = fold.windows
        logits_Cdhw = fold.coarse.logits_Cdhw.to(device)
        return FusedModel(logits_Cdhw, choice.starts_K3, fold.weights.to(device), windows)

    return FusedPrediction(
        [model(fold) for fold in folds],
        grid,
        folds[0].coarse.encoding,
        share.patches_at_once,
        share.windows / len(folds) if device.type == "cpu" else math.inf,
    )
