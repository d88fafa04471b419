import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform, create_affine_matrix_3d
from fusion_problems import loss_of
from hypothesis import given, settings
from hypothesis import strategies as st
from training import nnunet_augmentation

from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.nnunet.transforms import for_views
from nnunet_nmsw.trainers.randomness import seed_everything
from nnunet_nmsw.trainers.views import PreviousStage, TrainingVolume
from nnunet_nmsw.volume.affine import sample_affine
from nnunet_nmsw.volume.label_counts import label_counts
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import crop, crop_windows, downsample

SHAPE, PATCH = (18, 21, 24), (8, 8, 8)


def smooth_volume(seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(1, 1, 3, 3, 3, generator=generator)
    return torch.nn.functional.interpolate(low, size=shape, mode="trilinear")


def blocks(shape=SHAPE):
    labels = torch.zeros(1, 1, *shape, dtype=torch.int8)
    labels[:, :, 5:12, 6:15, 7:16] = 1
    labels[:, :, 8:10, 8:12, 9:12] = 2
    return labels


@settings(max_examples=25)
@given(st.tuples(*[st.floats(-0.6, 0.6)] * 3), st.floats(0.7, 1.4), st.integers(0, 1000))
def test_an_affine_view_is_a_crop_of_nnunets_spatial_transform(angles, scale, seed):
    affine = create_affine_matrix_3d(list(angles), [scale] * 3)
    volume = smooth_volume(seed)
    fixed = SpatialTransform(SHAPE, 0, False, p_rotation=1, p_scaling=1, scaling=(scale, scale))
    fixed.get_parameters(image=volume[0])
    grid = fixed._get_base_grid_clone() @ torch.from_numpy(affine.T).float()
    from batchgeneratorsv2.transforms.spatial.spatial import _convert_my_grid_to_grid_sample_grid

    grid = _convert_my_grid_to_grid_sample_grid(grid, SHAPE)
    expected = torch.nn.functional.grid_sample(volume, grid[None], padding_mode="zeros", align_corners=False)
    start = np.random.default_rng(seed).integers(0, np.array(SHAPE) - PATCH).tolist()
    view = sample_affine(volume, affine, start, PATCH)
    torch.testing.assert_close(view, crop_windows(expected, torch.tensor([start]), PATCH), rtol=1e-3, atol=1e-3)


def test_without_augmentation_views_are_the_volume():
    volume, labels = smooth_volume().half(), blocks()
    training = TrainingVolume(volume, labels, torch.zeros(0, 3, dtype=torch.int64))
    starts = torch.tensor([[0, 0, 0], [10, 13, 16]])
    images, targets = training.windows(starts, PATCH)
    torch.testing.assert_close(images, crop_windows(volume, starts, PATCH).float())
    assert torch.equal(targets, crop_windows(labels, starts, PATCH).short())
    torch.testing.assert_close(training.low_resolution((3, 3, 2)), downsample(volume.float(), (3, 3, 2)))
    assert torch.equal(training.label_counts(3, (3, 3, 2)), label_counts(labels[0, 0], 3, (3, 3, 2)))


def test_transforms_know_no_autocast():
    blur = GaussianBlurTransform((0.8, 0.8), synchronize_channels=True, p_per_channel=1)
    training = TrainingVolume(smooth_volume(), blocks(), torch.zeros(0, 3, dtype=torch.int64), transforms=[blur])
    expected = training.low_resolution((2, 2, 2)), training.windows(torch.tensor([[1, 2, 3]]), PATCH)[0]
    with torch.autocast("cpu", torch.bfloat16):
        views = training.low_resolution((2, 2, 2)), training.windows(torch.tensor([[1, 2, 3]]), PATCH)[0]
    for view, of_nnunet in zip(views, expected, strict=True):
        assert torch.equal(view, of_nnunet)


def test_views_of_one_volume_fit_together():
    """With rotation, scaling and intensity transforms: the low-resolution view shows what the windows show."""
    affine = create_affine_matrix_3d([0.3, -0.2, 0.5], [1.2] * 3)
    brightness = [lambda image, segmentation: {"image": image * 2 + torch.rand(1), "segmentation": segmentation}]
    training = TrainingVolume(smooth_volume(), blocks(), torch.zeros(0, 3, dtype=torch.int64), affine, brightness, 5)
    starts, factor = torch.tensor([[4, 6, 8]]), (2, 2, 2)
    image, labels = training.windows(starts, PATCH)
    low = training.low_resolution(factor)[0, 0, 2:6, 3:7, 4:8]
    torch.testing.assert_close(low, downsample(image, factor)[0, 0], rtol=0.1, atol=0.1)
    counts = training.label_counts(3, factor)[:, 2:6, 3:7, 4:8]
    expected = label_counts(labels[0, 0].clamp_min(0), 3, factor)
    assert (counts - expected).abs().mean() < 0.7  # of 8 voxels, the one interpolated and the other of nearest labels
    assert counts.sum(0).allclose(torch.tensor(8.0))


def test_every_view_draws_the_same_and_leaves_the_generators_alone():
    augmentation = nnunet_augmentation()
    volume = torch.ones(1, 2, *SHAPE)
    volume[:, 1] = torch.rand(SHAPE)
    for seed in range(10):
        training = TrainingVolume(volume, blocks(), torch.zeros(0, 3), None, augmentation.of_views, seed)
        seed_everything(0)
        starts = torch.tensor([[0, 0, 0], [0, 0, 0], [3, 3, 3]])
        state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        images, labels = training.windows(starts, PATCH)
        again, _ = training.windows(starts, PATCH)
        assert torch.equal(images, again)
        assert torch.equal(images[0], images[1])
        assert labels.min() >= 0
        assert torch.equal(torch.get_rng_state(), state[0])
        assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002


def test_draws_do_not_depend_on_the_size_of_the_view():
    """Noise draws as many numbers as the view has voxels; what the next transform draws is the same for all views."""

    def noise(image, segmentation):
        return {"image": image + 0 * torch.randn_like(image), "segmentation": segmentation}

    def shift(image, segmentation):
        return {"image": image + torch.rand(1) + np.random.rand(), "segmentation": segmentation}  # noqa: NPY002

    training = TrainingVolume(torch.zeros(1, 1, *SHAPE), blocks(), torch.zeros(0, 3), None, [noise, shift], 3)
    start = torch.tensor([[0, 0, 0]])
    values = [training.windows(start, size)[0].unique() for size in (PATCH, (4, 5, 6))]
    values.append(training.low_resolution((2, 2, 2)).unique())
    assert len(values[0]) == 1
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("factor", [(2, 2, 2), (3, 3, 3)])
def test_no_voxel_of_a_rotated_volume_counts_twice_in_the_fused_loss(factor):
    """Windows that tile the volume leave nothing to the interpolated counts."""
    affine = create_affine_matrix_3d([0.3, -0.2, 0.4], [1.1] * 3)
    shape, patch = (24, 24, 24), (12, 12, 12)
    labels = torch.zeros(1, 1, *shape, dtype=torch.int8)
    labels[:, :, 4:7, 4:7, 4:7] = 1
    training = TrainingVolume(torch.zeros(1, 1, *shape), labels, torch.zeros(0, 3), affine)
    starts = torch.cartesian_prod(*[torch.tensor([0, 12])] * 3)
    _, targets = training.windows(starts, patch)
    targets = targets[:, 0].clamp_min(0)
    whole = torch.zeros(shape, dtype=torch.long)
    for (d, h, w), target in zip(starts.tolist(), targets, strict=True):
        whole[d : d + 12, h : h + 12, w : w + 12] = target
    logits = torch.randn(8, 2, *patch, generator=torch.Generator().manual_seed(0))
    coarse, weights = torch.randn(2, *(24 // f for f in factor)), FusionWeights.convex(torch.full((2,), 0.5))
    interpolated, counted = training.label_counts(2, factor), label_counts(whole, 2, factor)
    assert not torch.allclose(interpolated, counted)
    losses = [
        loss_of(logits, starts, coarse, targets, counts, weights, factor, LabelEncoding(2))
        for counts in (interpolated, counted)
    ]
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    torch.testing.assert_close(losses[0].slope_S, losses[1].slope_S)


@pytest.mark.parametrize("affine", [None, create_affine_matrix_3d([0.3, -0.2, 0.4], [1.1] * 3)])
def test_labels_of_a_previous_stage_become_channels(affine):
    """Inference takes one-hot channels and downsamples them like the image."""
    previous = torch.randint(0, 3, (1, 1, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    channels = torch.cat([(previous == label).half() for label in (1, 2)], 1)
    volume, starts = smooth_volume(), torch.tensor([[1, 2, 3]])
    nothing = torch.zeros(0, 3, dtype=torch.int64)
    move = MoveSegAsOneHotToDataTransform(1, [1, 2])
    cascade = TrainingVolume(volume, blocks(), nothing, affine, [], 0, PreviousStage(previous, 2, [move]))
    image, labels = cascade.windows(starts, PATCH)
    plain, plain_labels = TrainingVolume(volume, blocks(), nothing, affine).windows(starts, PATCH)
    assert torch.equal(image[:, :1], plain)
    assert torch.equal(labels, plain_labels)
    assert image.shape[1] == 3
    low = cascade.low_resolution((2, 2, 2))
    assert low.shape[1] == 3
    if affine is None:
        assert torch.equal(image[:, 1:], crop(channels, (1, 2, 3), PATCH).float())
        torch.testing.assert_close(low, downsample(torch.cat([volume, channels], 1).float(), (2, 2, 2)))
    else:
        assert set(image[:, 1:].unique().tolist()) == {0, 1}
        assert (low[:, 1:] >= 0).all()
        assert (low[:, 1:].sum(1) <= 1 + 1e-5).all()


def test_what_lies_outside_of_the_image_stays_masked():
    transforms = [lambda image, segmentation: {"image": image * (segmentation >= 0), "segmentation": segmentation}]
    labels = blocks()
    labels[:, :, :6] = -1
    training = TrainingVolume(torch.ones(1, 1, *SHAPE), labels, torch.zeros(0, 3), None, transforms)
    assert training.low_resolution((3, 3, 3))[0, 0].mean((1, 2)).tolist() == [0, 0, 1, 1, 1, 1]
    assert training.label_counts(3, (3, 3, 3))[1:, :1].sum() == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 9), (9, 9, 9)])
def test_the_identity_samples_the_voxels(shape):
    volume = torch.rand(1, 2, *shape)
    size = tuple(min(4, n) for n in shape)
    start = [n - s for n, s in zip(shape, size, strict=True)]
    torch.testing.assert_close(
        sample_affine(volume, np.eye(3), start, size), crop_windows(volume, torch.tensor([start]), size)
    )


def test_draws_of_a_previous_stages_transforms_do_not_depend_on_earlier_draws():
    channels = [1, 2, 3, 4]
    for transform in (
        for_views(ApplyRandomBinaryOperatorTransform(channels, p_per_label=0.5)),
        for_views(RemoveRandomConnectedComponentFromOneHotEncodingTransform(channels, p_per_label=0.5)),
    ):
        draws = []
        for _ in range(3):
            np.random.seed(3)  # noqa: NPY002 - what the transforms draw from
            torch.manual_seed(3)
            draws.append(transform.get_parameters(image=torch.zeros(5, 4, 4, 4))["apply_to_channels"])
        assert draws[0] == draws[1] == draws[2]
