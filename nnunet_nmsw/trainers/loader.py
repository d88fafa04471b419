"""Whole volumes for training, as they are: what a step looks at is augmented later, by `TrainingVolume`.

Tensor suffixes: 1 a batch of one, C channels, D H W axes of the volume, R random windows, 3 one coordinate per axis.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from batchgenerators.dataloading.data_loader import DataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnunet_nmsw.console import follow_parent
from nnunet_nmsw.nnunet.trainer import load_case
from nnunet_nmsw.trainers.augmentation import Augmentation
from nnunet_nmsw.trainers.randomness import seed_everything
from nnunet_nmsw.volume.affine import OUTSIDE

SLICES_OF_NOISE = 8
"""Slices of a volume in which its noise is estimated, evenly spaced."""

LARGEST_HALF = float(np.finfo(np.float16).max)
"""Largest number of half precision."""

MOST_DRAWS = 20
"""How often a foreground voxel is drawn until one lies inside of the rotated volume."""


class WholeVolumeLoader(DataLoader):
    """Yields one volume a batch, with the first voxels of windows drawn at random, and the draws of its augmentation.

    Each batch is a dictionary: `data` (1, C, D, H, W), see `for_travel`; `target` (1, 1, D, H, W) int8, or int16
    where labels need it, -1 outside of the image; both mirrored, and padded to the patch size where the volume is
    smaller, as nnU-Net's predictor pads; `previous`, the labels that the cascade's previous stage predicted, as
    `target`, or None; `random_starts` (R, 3) int64, in the augmented volume; `affine` (3, 3) or None; `seed`; and
    `keys`.

    Args:
        dataset: nnU-Net's preprocessed cases.
        patch_size: voxels of a window by axis.
        num_random_windows: R.
        foreground_windows: how many of these hold foreground, a fraction being the probability of one more (nnU-Net's
            oversampling: a class drawn at random, and the window centred on one of its voxels), unless a rotation turns
            what is drawn out of the volume many times. With an ignore label the other windows are centred on annotated
            voxels, as in nnU-Net.
        augmentation: what to draw from.
        at_random: draw cases at random; otherwise go round them in order.
        seed: of everything that a worker process draws, together with the worker's number. None is a random seed in a
            worker process, and leaves it to who seeds the process that the loader runs in, otherwise.
    """

    def __init__(
        self,
        dataset: nnUNetBaseDataset,
        patch_size: Sequence[int],
        num_random_windows: int,
        foreground_windows: float,
        augmentation: Augmentation,
        at_random: bool,
        seed: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dataset, 1, 1, None, True, False, True, None)
        self.indices = list(dataset.identifiers)
        self.patch_size = tuple(patch_size)
        self.num_random_windows = num_random_windows
        self.foreground_windows = foreground_windows
        self.augmentation = augmentation
        self.at_random = at_random
        self.next_in_order = 0
        self.is_in_worker = False
        self.has_begun = False
        self.seed = seed

    def get_indices(self) -> list[str]:
        """The case of the next batch."""
        if self.at_random:
            return [self.indices[np.random.randint(len(self.indices))]]  # noqa: NPY002 - batchgenerators seeds it
        self.next_in_order += 1
        return [self.indices[(self.next_in_order - 1) % len(self.indices)]]

    def generate_train_batch(self) -> dict[str, Any]:
        """Load, mirror and pad a volume, and draw the rest."""
        if not self.has_begun:
            self._begin()
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            data, segmentation, previous, properties = load_case(self, keys[0])
            axes = self.augmentation.draw_mirrored_axes()
            volume_CDHW = for_travel(np.asarray(data[:], dtype=np.float32)).flip([axis + 1 for axis in axes])
            shape = np.array(volume_CDHW.shape[1:])
            volume_CDHW, unpad = pad_nd_image(volume_CDHW, self.patch_size, "constant", {"value": 0}, True)
            labels_1DHW = self._labels(segmentation[:1], axes)
            previous_1DHW = None if previous is None else self._labels(previous[:][None], axes)
            offset = np.array([axis.start for axis in unpad[1:]])
        affine_33 = self.augmentation.draw_affine()
        # nnU-Net's sample of each class's voxels, in the volume as it was loaded; the first column is the channel.
        locations = {name: voxels[:, 1:] for name, voxels in properties["class_locations"].items() if len(voxels)}
        # Under all labels together, -1 first, it keeps annotated voxels where the dataset has an ignore label.
        annotated = [name for name in locations if isinstance(name, tuple) and name[0] == -1]
        annotated_voxels = [locations.pop(name) for name in annotated]
        voxels_by_class = list(locations.values()) or annotated_voxels

        def position(voxel: np.ndarray) -> np.ndarray:
            mirrored = np.where([axis in axes for axis in range(3)], shape - 1 - voxel, voxel) + offset
            return in_augmented_volume(mirrored, np.array(labels_1DHW.shape[1:]), affine_33)

        return {
            "data": volume_CDHW[None],
            "target": labels_1DHW[None],
            "previous": None if previous_1DHW is None else previous_1DHW[None],
            "random_starts": self.draw_windows(
                tuple(labels_1DHW.shape[1:]), voxels_by_class, position, annotated_voxels or None
            ),
            "affine": affine_33,
            "seed": int(np.random.randint(2**31)),  # noqa: NPY002
            "keys": keys,
        }

    def _begin(self) -> None:
        if self.seed is not None:
            seed_everything(*self.seed, self.thread_id)
        elif self.is_in_worker:  # batchgenerators seeds NumPy alone: all forks have one state of PyTorch's generator
            seed_everything(secrets.randbits(64))
        if self.is_in_worker:
            follow_parent()
        self.has_begun = True

    def _labels(self, labels: np.ndarray, mirrored_axes: list[int]) -> Tensor:
        """Mirrored and padded, of the smallest type."""
        labels = np.asarray(labels)
        smallest_type = np.int8 if labels.max(initial=0) < 128 else np.int16
        labels_1DHW = torch.from_numpy(labels.astype(smallest_type)).flip([axis + 1 for axis in mirrored_axes])
        padded: Tensor = pad_nd_image(labels_1DHW, self.patch_size, "constant", {"value": OUTSIDE})
        return padded

    def draw_windows(
        self,
        volume_shape: Sequence[int],
        voxels_by_class: list[np.ndarray],
        position: Callable[[np.ndarray], np.ndarray],
        annotated_voxels: list[np.ndarray] | None = None,
    ) -> Tensor:
        """First voxels of the random windows in the augmented volume, the ones centred on foreground last.

        Args:
            volume_shape: of the augmented volume.
            voxels_by_class: some voxels of each class that the case has, n × 3.
            position: where such a voxel lies in the augmented volume.
            annotated_voxels: what the other windows are centred on; None to draw them anywhere.
        """
        last_start = np.array(volume_shape, np.int64) - np.array(self.patch_size, np.int64)
        starts = np.random.randint(0, last_start + 1, (self.num_random_windows, 3))  # noqa: NPY002
        with_foreground = int(self.foreground_windows)
        if self.foreground_windows > with_foreground:
            with_foreground += int(np.random.uniform() < self.foreground_windows - with_foreground)  # noqa: NPY002
        for window in range(self.num_random_windows):
            foreground = window >= self.num_random_windows - with_foreground
            groups = voxels_by_class if foreground else annotated_voxels
            if not groups:
                continue
            for _ in range(MOST_DRAWS):
                voxels = groups[np.random.randint(len(groups))]  # noqa: NPY002
                centre = position(voxels[np.random.randint(len(voxels))]).round()  # noqa: NPY002
                if (centre >= 0).all() and (centre < volume_shape).all():
                    break
            starts[window] = np.clip(centre - np.array(self.patch_size) // 2, 0, last_start)
        return torch.from_numpy(starts)


def for_travel(volume: np.ndarray) -> Tensor:
    """A volume in the type in which it travels from worker to device: half of the bytes, where nothing is lost by that.

    That is float16, unless a channel has values that it cannot hold, or that it would round by more than the noise of
    the image. The noise is estimated by the smallest differences: those of neighbours along the last axis which differ,
    the lower quartile of them.

    Args:
        volume: float32, shape C, D, H, W.

    Returns:
        float16 or float32, of the same shape.
    """
    for channel in volume:
        largest = max(abs(float(channel.min(initial=0))), abs(float(channel.max(initial=0))))
        if not largest <= LARGEST_HALF:  # a NaN is not, either
            return torch.from_numpy(volume)
        sample = channel[:: max(1, channel.shape[0] // SLICES_OF_NOISE)]
        differences = np.abs(np.diff(sample, axis=-1))
        differences = differences[differences > 0]
        rounding = float(np.spacing(np.float16(largest))) / 2
        if len(differences) and rounding > np.quantile(differences, 0.25):
            return torch.from_numpy(volume)
    return torch.from_numpy(volume.astype(np.float16))


def in_augmented_volume(voxel: np.ndarray, shape: np.ndarray, affine_33: np.ndarray | None) -> np.ndarray:
    """Position in the augmented volume of a voxel of the volume."""
    if affine_33 is None:
        return voxel
    centre = (shape - 1) / 2
    moved: np.ndarray = np.linalg.solve(affine_33, voxel - centre) + centre
    return moved
