"""Whole volumes for training: augmented by nnU-Net's transforms, with windows drawn at random.

Tensor suffixes: 1 a batch of one, C channels, D H W axes of the volume, R random windows, 3 one coordinate per axis.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from batchgenerators.dataloading.data_loader import DataLoader
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from threadpoolctl import threadpool_limits
from torch import Tensor

TransformFactory = Callable[[tuple[int, ...]], BasicTransform]


class WholeVolumeLoader(DataLoader):
    """Yields one augmented volume a batch, with the first voxels of windows drawn at random.

    Each batch is a dictionary: `data` (1, C, D, H, W) float32, `target` (1, 1, D, H, W) int16, both padded to the patch
    size where the volume is smaller, as nnU-Net's predictor pads; `random_starts` (R, 3) int64; `keys`.

    Args:
        dataset: nnU-Net's preprocessed cases.
        patch_size: voxels of a window by axis.
        num_random_windows: R.
        foreground_windows: how many of these hold foreground for sure (nnU-Net's oversampling: a class drawn at
            random, and the window centred on one of its voxels).
        transforms: gives the transforms for a volume's shape; nnU-Net's spatial transform has to know it beforehand.
        at_random: draw cases at random; otherwise go round them in order.
        seed: of everything that is drawn, different for every worker; None leaves it to batchgenerators.
    """

    def __init__(
        self,
        dataset: nnUNetBaseDataset,
        patch_size: Sequence[int],
        num_random_windows: int,
        foreground_windows: int,
        transforms: TransformFactory,
        at_random: bool,
        seed: int | None = None,
    ) -> None:
        super().__init__(dataset, 1, 1, None, True, False, True, None)
        self.indices = list(dataset.identifiers)
        self.patch_size = tuple(patch_size)
        self.num_random_windows = num_random_windows
        self.foreground_windows = foreground_windows
        self.transforms = transforms
        self.at_random = at_random
        self.next_in_order = 0
        self.seed = seed

    def get_indices(self) -> list[str]:
        """The case of the next batch."""
        if self.at_random:
            return [self.indices[np.random.randint(len(self.indices))]]  # noqa: NPY002 - batchgenerators seeds it
        self.next_in_order += 1
        return [self.indices[(self.next_in_order - 1) % len(self.indices)]]

    def generate_train_batch(self) -> dict[str, Any]:
        """Load, augment and pad a volume."""
        if self.seed is not None:
            seed_everything(self.seed + 1000 * (1 + self.thread_id))
            self.seed = None
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            data, segmentation, _, _ = self._data.load_case(keys[0])
            volume = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
            labels = torch.from_numpy(np.asarray(segmentation[:], dtype=np.int16))
            transformed = self.transforms(tuple(volume.shape[1:]))(image=volume, segmentation=labels)
            volume = pad_nd_image(transformed["image"], self.patch_size, "constant", {"value": 0})
            labels = pad_nd_image(transformed["segmentation"], self.patch_size, "constant", {"value": 0})
        return {
            "data": volume[None],
            "target": labels[None],
            "random_starts": self.draw_windows(labels[0]),
            "keys": keys,
        }

    def draw_windows(self, labels_DHW: Tensor) -> Tensor:
        """First voxels of the random windows, the ones sure to hold foreground last."""
        patch_size = np.array(self.patch_size)
        last_start, half_patch = np.array(labels_DHW.shape) - patch_size, patch_size // 2
        starts = np.random.randint(0, last_start + 1, (self.num_random_windows, 3))  # noqa: NPY002
        classes = [label for label in np.unique(labels_DHW.numpy()) if label > 0] if self.foreground_windows else []
        if classes:
            for window in range(self.num_random_windows - self.foreground_windows, self.num_random_windows):
                voxels = (labels_DHW == int(np.random.choice(classes))).nonzero()  # noqa: NPY002
                centre = voxels[np.random.randint(len(voxels))].numpy()  # noqa: NPY002
                starts[window] = np.clip(centre - half_patch, 0, last_start)
        return torch.from_numpy(starts.astype(np.int64))


def seed_everything(seed: int) -> None:
    """Seed all generators that nnU-Net draws from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what batchgenerators draws from
    torch.manual_seed(seed)


def without_benchmark(transform: BasicTransform) -> BasicTransform:
    """Keep blur transforms from timing their two implementations for every new shape: here each volume is one."""
    if isinstance(transform, ComposeTransforms):
        for part in transform.transforms:
            without_benchmark(part)
    elif isinstance(transform, RandomTransform):
        without_benchmark(transform.transform)
    elif isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    return transform
