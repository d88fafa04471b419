"""A training volume, augmented only where it is looked at.

Augmenting a whole volume costs with its size; a training step looks at a low-resolution view and a few windows.

Tensor suffixes: 1 a batch of one, B windows, C channels or classes, D H W axes of the volume or of a window, d h w axes
of the low-resolution view, 3 one coordinate per axis.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunet_nmsw.nnunet.transforms import transformed
from nnunet_nmsw.trainers.randomness import generators_kept
from nnunet_nmsw.volume.affine import sample_affine, sample_labels_affine
from nnunet_nmsw.volume.label_counts import label_counts
from nnunet_nmsw.volume.precision import full_precision
from nnunet_nmsw.volume.windows import Shape, crop, downsample

Transform = Callable[..., dict[str, Any]]
"""One of nnU-Net's transforms: takes and returns `image` (C, D, H, W) and `segmentation` (1, D, H, W)."""


class PreviousStage(NamedTuple):
    """What the cascade's previous stage predicted of a volume.

    Attributes:
        labels_11DHW: integer labels, -1 outside of the image.
        num_labels: number of foreground labels, 1 and up: each becomes a channel of the image.
        transforms: what makes these channels of a window's second channel of labels, and deforms them.
    """

    labels_11DHW: Tensor
    num_labels: int
    transforms: Sequence[Transform] = ()


class TrainingVolume:
    """A whole volume with the augmentation of one training step.

    Args:
        volume_1CDHW: the image, half or single precision.
        labels_11DHW: integer labels, -1 outside of the image.
        random_starts_R3: first voxels, in the augmented volume, of windows drawn at random; stays on the host.
        affine_33: the rotation and scaling of the step, which take a position in the augmented volume to one in the
            volume, both relative to the centre; None for neither.
        transforms: what else is done to a view, in nnU-Net's order. Each draws the same parameters for every view.
        seed: of these draws.
        previous: what the cascade's previous stage predicted; None without it.
    """

    def __init__(
        self,
        volume_1CDHW: Tensor,
        labels_11DHW: Tensor,
        random_starts_R3: Tensor,
        affine_33: np.ndarray | None = None,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        previous: PreviousStage | None = None,
    ) -> None:
        self.volume_1CDHW = volume_1CDHW
        self.labels_11DHW = labels_11DHW
        self.random_starts_R3 = random_starts_R3
        self.affine_33 = affine_33
        self.transforms = transforms
        self.seed = seed
        self.previous = previous

    def to(self, device: torch.device, non_blocking: bool = False) -> TrainingVolume:
        """Move to a device, in place."""
        self.volume_1CDHW = self.volume_1CDHW.to(device, non_blocking=non_blocking)
        self.labels_11DHW = self.labels_11DHW.to(device, non_blocking=non_blocking)
        if self.previous is not None:
            moved = self.previous.labels_11DHW.to(device, non_blocking=non_blocking)
            self.previous = self.previous._replace(labels_11DHW=moved)
        return self

    @property
    def shape(self) -> Shape:
        """Voxels by axis."""
        d, h, w = self.labels_11DHW.shape[2:]
        return d, h, w

    def low_resolution(self, factor: Shape) -> Tensor:
        """The view of the global branch, float32 of shape 1, C, d, h, w: downsampled, then augmented.

        The channels of the cascade's previous stage are shares of each label, only rotated and scaled.
        """
        image_1Cdhw = downsample(self.volume_1CDHW.float(), factor)
        shape = image_1Cdhw.shape[2:]
        # Labels of the middle voxels: the transforms look for no more than what lies outside of the image.
        middles = [
            (torch.arange(low, device=self.labels_11DHW.device) * f + f // 2).clamp_max(n - 1)
            for low, f, n in zip(shape, factor, self.shape, strict=True)
        ]
        labels_11dhw = self.labels_11DHW
        for axis, middle in enumerate(middles):
            labels_11dhw = labels_11dhw.index_select(axis + 2, middle)
        if self.affine_33 is not None:
            affine_33, centre = self._low_affine(factor)
            image_1Cdhw = sample_affine(image_1Cdhw, affine_33, (0, 0, 0), shape, centre)
            labels_11dhw = sample_labels_affine(labels_11dhw, affine_33, (0, 0, 0), shape, centre)
        image_Cdhw, _ = self._transform(image_1Cdhw[0], labels_11dhw[0], self.transforms)
        if self.previous is not None:
            counts_Pdhw = self._counts(self.previous.labels_11DHW, self.previous.num_labels + 1, factor)
            image_Cdhw = torch.cat([image_Cdhw, (counts_Pdhw / counts_Pdhw.sum(0))[1:]])
        return image_Cdhw[None]

    def windows(self, starts_B3: Tensor, size: Shape) -> tuple[Tensor, Tensor]:
        """Windows of the augmented volume.

        Returns:
            The images, float32 of shape B, C, `size`, and their labels, int16 of shape B, 1, `size`.
        """
        views = []
        for start in starts_B3.tolist():
            if self.affine_33 is None:
                image_1CDHW = crop(self.volume_1CDHW, start, size)
            else:
                image_1CDHW = sample_affine(self.volume_1CDHW, self.affine_33, start, size)
            labels_1DHW = self._window_of_labels(self.labels_11DHW, start, size)
            transforms = self.transforms
            if self.previous is not None:
                previous_1DHW = self._window_of_labels(self.previous.labels_11DHW, start, size)
                labels_1DHW = torch.cat([labels_1DHW, previous_1DHW])
                transforms = [*transforms, *self.previous.transforms]
            views.append(self._transform(image_1CDHW[0], labels_1DHW, transforms))
        images, labels = zip(*views, strict=True)
        return torch.stack(images), torch.stack(labels)

    def label_counts(self, num_labels: int, factor: Shape) -> Tensor:
        """Voxels of each label in each low-resolution voxel of the augmented volume, float32 of shape C, d, h, w.

        With a rotation or scaling these are interpolated and not counted; what comes from outside of the volume is
        background.
        """
        return self._counts(self.labels_11DHW, num_labels, factor)

    def _window_of_labels(self, labels_11DHW: Tensor, start: Sequence[int], size: Shape) -> Tensor:
        if self.affine_33 is None:
            return crop(labels_11DHW, start, size)[0]
        return sample_labels_affine(labels_11DHW, self.affine_33, start, size)[0]

    def _counts(self, labels_11DHW: Tensor, num_labels: int, factor: Shape) -> Tensor:
        counts_Cdhw = label_counts(labels_11DHW[0, 0].clamp_min(0), num_labels, factor)
        if self.affine_33 is None:
            return counts_Cdhw
        affine_33, centre = self._low_affine(factor)
        voxels_1dhw, shape = counts_Cdhw.sum(0, keepdim=True), counts_Cdhw.shape[1:]
        share_Cdhw = sample_affine((counts_Cdhw / voxels_1dhw)[None], affine_33, (0, 0, 0), shape, centre)[0]
        share_Cdhw[0] += 1 - share_Cdhw.sum(0)
        return share_Cdhw * voxels_1dhw

    def _low_affine(self, factor: Shape) -> tuple[np.ndarray, np.ndarray]:
        """The affine and its centre in voxels of the low-resolution view, whose last voxels may cover a rest."""
        assert self.affine_33 is not None
        centre = np.array(self.shape) / (2 * np.array(factor)) - 0.5
        return self.affine_33 * np.array(factor)[None] / np.array(factor)[:, None], centre

    def _transform(
        self, image_CDHW: Tensor, labels_1DHW: Tensor, transforms: Sequence[Transform]
    ) -> tuple[Tensor, Tensor]:
        # Copies: nnU-Net's transforms work in place.
        view: dict[str, Any] = {
            "image": image_CDHW.to(torch.float32, copy=True),
            "segmentation": labels_1DHW.to(torch.int16, copy=True),
        }
        if transforms:
            # nnU-Net's workers know no autocast, under which a blur, for one, would be computed in half precision.
            with full_precision(image_CDHW.device), generators_kept(image_CDHW.device) as torch_generators:
                for index, transform in enumerate(transforms):
                    # Anew for every transform: how much the one before drew depends on the size of the view.
                    random.seed(self.seed + index)
                    np.random.seed(self.seed + index)  # noqa: NPY002 - what nnU-Net draws from
                    for generator in torch_generators:
                        generator.manual_seed(self.seed + index)
                    view = transformed(transform, view)
        return view["image"], view["segmentation"]
