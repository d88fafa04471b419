"""A training volume, augmented only where it is looked at.

Augmenting a whole volume costs with its size; a training step looks at a low-resolution view and a few windows.

Tensor suffixes: 1 a batch of one, B windows, C channels or classes, D H W axes of the volume or of a window, d h w axes
of the low-resolution view, 3 one coordinate per axis.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_nmsw.geometry import Shape, crop, downsample, label_counts
from nnunet_nmsw.precision import full_precision

OUTSIDE = -1
"""nnU-Net's label of voxels outside of the image."""

Transform = Callable[..., dict[str, Any]]
"""One of nnU-Net's transforms: takes and returns `image` (C, D, H, W) and `segmentation` (1, D, H, W)."""


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
        previous_11DHW: labels that the cascade's previous stage predicted, -1 outside of the image; None without it.
        num_previous: number of its foreground labels, 1 and up: each becomes a channel of the image.
        previous_transforms: what makes these channels of a window's second channel of labels, and deforms them.
    """

    def __init__(
        self,
        volume_1CDHW: Tensor,
        labels_11DHW: Tensor,
        random_starts_R3: Tensor,
        affine_33: np.ndarray | None = None,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        previous_11DHW: Tensor | None = None,
        num_previous: int = 0,
        previous_transforms: Sequence[Transform] = (),
    ) -> None:
        self.volume_1CDHW = volume_1CDHW
        self.labels_11DHW = labels_11DHW
        self.random_starts_R3 = random_starts_R3
        self.affine_33 = affine_33
        self.transforms = transforms
        self.seed = seed
        self.previous_11DHW = previous_11DHW
        self.num_previous = num_previous
        self.previous_transforms = previous_transforms

    def to(self, device: torch.device, non_blocking: bool = False) -> TrainingVolume:
        """Move to a device, in place and once: nnU-Net moves input and target apart, and this is both."""
        self.volume_1CDHW = self.volume_1CDHW.to(device, non_blocking=non_blocking)
        self.labels_11DHW = self.labels_11DHW.to(device, non_blocking=non_blocking)
        if self.previous_11DHW is not None:
            self.previous_11DHW = self.previous_11DHW.to(device, non_blocking=non_blocking)
        return self

    def pin_memory(self) -> TrainingVolume:
        """Pin the tensors, in place, for copies to a GPU that do not block."""
        self.volume_1CDHW = self.volume_1CDHW.pin_memory()
        self.labels_11DHW = self.labels_11DHW.pin_memory()
        if self.previous_11DHW is not None:
            self.previous_11DHW = self.previous_11DHW.pin_memory()
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
        if self.previous_11DHW is not None:
            counts_Pdhw = self._counts(self.previous_11DHW, self.num_previous + 1, factor)
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
            if self.previous_11DHW is not None:
                previous_1DHW = self._window_of_labels(self.previous_11DHW, start, size)
                labels_1DHW = torch.cat([labels_1DHW, previous_1DHW])
                transforms = [*transforms, *self.previous_transforms]
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
                    view = transform(**view)
        return view["image"], view["segmentation"]


def seed_everything(*seeds: int) -> None:
    """Seed all generators that nnU-Net draws from, by one number or several: seed, rank, epoch, and so on."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[list[torch.Generator]]:
    """Restore the state of all generators that nnU-Net draws from at the end. Gives those of PyTorch for a device."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        )
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    states = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for generator, generator_state in zip(generators, states, strict=True):
            generator.set_state(generator_state)


def sample_affine(
    volume_1CDHW: Tensor,
    affine_33: np.ndarray,
    start: Sequence[int],
    size: Sequence[int],
    centre: np.ndarray | None = None,
    nearest: bool = False,
    outside: float = 0.0,
) -> Tensor:
    """A window of a rotated and scaled volume, linearly interpolated.

    The value at position x of the rotated volume is that of the volume at A (x - c) + c.

    Args:
        volume_1CDHW: any floating type.
        affine_33: A.
        start: first voxel of the window in the rotated volume, which has the volume's shape.
        size: voxels of the window by axis.
        centre: c, in voxels; the volume's centre where None.
        nearest: take the nearest voxel's value instead.
        outside: the value outside of the volume.

    Returns:
        float32 of shape 1, C, `size`. Only what the window looks at is read and converted.
    """
    shape, device = np.array(volume_1CDHW.shape[2:]), volume_1CDHW.device
    if centre is None:
        centre = (shape - 1) / 2
    corners = np.array(list(itertools.product(*((a, a + n - 1) for a, n in zip(start, size, strict=True)))))
    reached = (corners - centre) @ affine_33.T + centre
    first = np.clip(np.floor(reached.min(0)).astype(int), 0, shape - 1)
    end = np.clip(np.ceil(reached.max(0)).astype(int) + 1, first + 1, shape)
    piece_1CDHW = crop(volume_1CDHW, first.tolist(), (end - first).tolist()).float() - outside
    # grid_sample's positions: -1 and 1 are the outer edges of the first and the last voxel, axes in reverse order.
    scale = 2 / (end - first)
    linear = torch.as_tensor(affine_33 * scale[:, None], dtype=torch.float32, device=device)
    origin = affine_33 @ (np.array(start) - centre) + centre - first
    position_DHW3 = torch.as_tensor((origin + 0.5) * scale - 1, dtype=torch.float32, device=device)
    for axis, n in enumerate(size):
        steps = torch.arange(n, device=device, dtype=torch.float32)
        along = steps[:, None] * linear[:, axis]
        position_DHW3 = position_DHW3 + along.view([n if a == axis else 1 for a in range(3)] + [3])
    sampled_1CDHW = F.grid_sample(
        piece_1CDHW,
        position_DHW3.flip(-1)[None],
        mode="nearest" if nearest else "bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled_1CDHW + outside


def sample_labels_affine(
    labels_11DHW: Tensor,
    affine_33: np.ndarray,
    start: Sequence[int],
    size: Sequence[int],
    centre: np.ndarray | None = None,
) -> Tensor:
    """A window of a rotated and scaled label map, the nearest voxel's label; -1 outside. See `sample_affine`."""
    sampled = sample_affine(labels_11DHW, affine_33, start, size, centre, nearest=True, outside=OUTSIDE)
    return sampled.round().to(labels_11DHW.dtype)
