from functools import partial

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.geometry import crop_windows
from nnunet_nmsw.trainers.data import WholeVolumeLoader, without_benchmark


class Cases:
    """Three preprocessed cases of different shapes in memory; the labels say where the image is bright."""

    identifiers = ("a", "b", "c")
    shapes = (20, 24, 28), (5, 30, 16), (18, 18, 18)

    def load_case(self, key):
        rng = np.random.default_rng(ord(key))
        labels = np.zeros((1, *self.shapes[self.identifiers.index(key)]), np.int8)
        labels[:, 2:5, 3:6, 4:7] = 1
        labels[:, 3:4, 10:13, 9:12] = 2
        return rng.normal(0, 0.1, labels.shape).astype(np.float32) + 10 * labels, labels, None, {}


def plain(shape):
    return lambda image, segmentation: {"image": image, "segmentation": segmentation}


def nnunet_augmentation():
    return partial(
        nnUNetTrainer.get_training_transforms,
        rotation_for_DA=(-0.5, 0.5),
        deep_supervision_scales=None,
        mirror_axes=(0, 1, 2),
        do_dummy_2d_data_aug=False,
    )


def loader(transforms=plain, at_random=False, windows=6, foreground=3):
    return WholeVolumeLoader(Cases(), (12, 12, 12), windows, foreground, transforms, at_random)


def test_volumes_come_in_order_padded_to_the_patch():
    batches = [batch for batch, _ in zip(loader(), range(4), strict=False)]
    assert [batch["keys"] for batch in batches] == [["a"], ["b"], ["c"], ["a"]]
    shapes = [tuple(batch["data"].shape) for batch in batches]
    assert shapes == [(1, 1, 20, 24, 28), (1, 1, 12, 30, 16), (1, 1, 18, 18, 18), (1, 1, 20, 24, 28)]
    for batch in batches:
        assert batch["data"].shape == batch["target"].shape
        assert (batch["target"] > 0).sum() == 27 + 9


def test_random_windows_lie_inside_and_the_last_hold_foreground():
    np.random.seed(0)  # noqa: NPY002 - batchgenerators draws from it
    seen = set()
    for batch, _ in zip(loader(at_random=True), range(30), strict=False):
        shape = torch.tensor(batch["data"].shape[2:])
        starts = batch["random_starts"]
        assert starts.shape == (6, 3)
        assert (starts >= 0).all()
        assert (starts + 12 <= shape).all()
        targets = crop_windows(batch["target"], starts, (12, 12, 12))
        assert (targets[3:] > 0).flatten(1).any(1).all()
        seen.update(batch["keys"])
    assert seen == {"a", "b", "c"}


def test_augmentation_keeps_image_and_labels_together():
    np.random.seed(0)  # noqa: NPY002 - batchgenerators draws from it
    torch.manual_seed(0)
    batches = loader(nnunet_augmentation(), at_random=True)
    for batch, _ in zip(batches, range(15), strict=False):
        image, labels = batch["data"][0, 0], batch["target"][0, 0]
        assert labels.min() >= 0
        if (labels == 1).sum() > 20:
            assert image[labels == 1].median() > image[labels == 0].median()


@pytest.mark.parametrize("flat", [False, True])
def test_blurs_do_not_time_themselves_for_every_volume(flat):
    get_transforms = nnunet_augmentation()
    transform = without_benchmark(get_transforms((9, 30, 30), do_dummy_2d_data_aug=flat))
    blurs = [part.transform for part in transform.transforms if hasattr(part, "transform")]
    blurs = [blur for blur in blurs if isinstance(blur, GaussianBlurTransform)]
    assert len(blurs) == 1
    assert not blurs[0].benchmark
    image = torch.randn(1, 9, 30, 30)
    labels = torch.zeros(1, 9, 30, 30, dtype=torch.int16)
    assert transform(image=image, segmentation=labels)["image"].shape == image.shape
