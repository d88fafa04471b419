"""A training in memory, for tests: cases, augmentation, steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.trainers.augmentation import Augmentation
from nnunet_nmsw.trainers.loader import WholeVolumeLoader
from nnunet_nmsw.trainers.losses.local import LocalLoss
from nnunet_nmsw.trainers.step import StepResult, TrainingStep
from nnunet_nmsw.trainers.views import TrainingVolume
from nnunet_nmsw.volume.labels import LabelEncoding

PATCH = (12, 12, 12)
ENCODING = LabelEncoding(3)


class Cases:
    """Three preprocessed cases of different shapes in memory; the labels say where the image is bright."""

    identifiers = ("a", "b", "c")
    shapes = (20, 24, 28), (5, 30, 16), (18, 18, 18)

    def load_case(self, key: str) -> tuple[Any, ...]:
        """As nnU-Net's dataset does."""
        rng = np.random.default_rng(ord(key))
        labels = np.zeros((1, *self.shapes[self.identifiers.index(key)]), np.int8)
        labels[:, 2:5, 3:6, 4:7] = 1
        labels[:, 3:4, 10:13, 9:12] = 2
        locations = {label: np.argwhere(labels == label) for label in (1, 2)}
        image = rng.normal(0, 0.1, labels.shape).astype(np.float32) + 10 * labels
        return image, labels, None, {"class_locations": locations}


def nnunet_augmentation(
    flat: bool = False, mirror_axes: tuple[int, ...] = (0, 1, 2), cascade: bool = False
) -> Augmentation:
    """nnU-Net's of a training."""
    return Augmentation.of(
        nnUNetTrainer.get_training_transforms(
            patch_size=(1, 1, 1),
            rotation_for_DA=(-0.5, 0.5),
            deep_supervision_scales=None,
            mirror_axes=mirror_axes,
            do_dummy_2d_data_aug=flat,
            is_cascaded=cascade,
            foreground_labels=[1, 2] if cascade else None,
        )
    )


NONE = Augmentation(None, None, [], [])


def loader(
    augmentation: Augmentation = NONE,
    at_random: bool = False,
    windows: int = 6,
    foreground: float = 3,
    seed: tuple[int, ...] | None = None,
) -> WholeVolumeLoader:
    """A loader of the cases."""
    return WholeVolumeLoader(Cases(), PATCH, windows, foreground, augmentation, at_random, seed)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """In the place of nnU-Net's loss of patches."""
    return torch.nn.functional.cross_entropy(logits, target[:, 0].long())


def step_on(volume: TrainingVolume, num_classes: int = 3, of_patches: Any = cross_entropy) -> TrainingStep:
    """A step on a volume."""
    return TrainingStep(volume, LocalLoss(of_patches, None, LabelEncoding(num_classes)))


def a_step(shape: tuple[int, int, int], num_classes: int = 3, patch_size: tuple[int, ...] = (8, 8, 8)) -> TrainingStep:
    """A step on a volume of noise, with two random windows."""
    volume = torch.randn(1, 1, *shape)
    target = torch.randint(0, num_classes, (1, 1, *shape), dtype=torch.int16)
    starts = torch.tensor([[0, 0, 0], [n - p for n, p in zip(shape, patch_size, strict=True)]])
    return step_on(TrainingVolume(volume, target, starts), num_classes)


def training_step(network: NMSWNetwork, shape: tuple[int, int, int], num_classes: int = 3) -> StepResult:
    """The result of `a_step`."""
    result: StepResult = network(a_step(shape, num_classes, network.patch_size))
    return result
