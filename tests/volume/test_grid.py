from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_nmsw.volume.interpolation import upsample_window
from nnunet_nmsw.volume.label_counts import LabelSums, add_to_low_resolution_, label_counts
from nnunet_nmsw.volume.windows import (
    WindowGrid,
    crop,
    crop_windows,
    downsample,
    low_shape,
    window_slices,
)


@st.composite
def grids(draw):
    """Grids with anisotropic patches and factors, volumes no smaller than the patch."""
    patch = tuple(draw(st.integers(1, 9)) for _ in range(3))
    volume = tuple(n + draw(st.integers(0, 12)) for n in patch)
    factor = tuple(draw(st.integers(1, 4)) for _ in range(3))
    return WindowGrid(volume, patch, factor, draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])))


def full_resolution(low: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    for axis, factor in enumerate(grid.downsampling_factor):
        low = low.repeat_interleave(factor, axis).narrow(axis, 0, grid.volume_shape[axis])
    return low


@settings(max_examples=60)
@given(grids(), st.integers(0, 2**31))
def test_window_means_and_maxima_are_those_of_the_boxes(grid, seed):
    low = torch.randn(grid.low_shape, generator=torch.Generator().manual_seed(seed))
    volume = full_resolution(low, grid)
    boxes = [volume[window_slices(start, grid.patch_size)] for start in grid.starts_N3.tolist()]
    assert len(grid) == len(boxes)
    torch.testing.assert_close(grid.mean(low), torch.stack([box.mean() for box in boxes]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grid.max(low), torch.stack([box.max() for box in boxes]))


@settings(max_examples=40)
@given(grids(), st.integers(0, 2**31))
def test_coverage_and_sums_at_low_resolution_are_those_of_the_voxels(grid, seed):
    window = seed % len(grid)
    start = grid.starts_N3[window].tolist()
    values = torch.randn(grid.patch_size, generator=torch.Generator().manual_seed(seed))
    volume = torch.zeros(grid.volume_shape)
    volume[window_slices(start, grid.patch_size)] = values
    blocks = downsample(torch.ones(1, 1, *grid.volume_shape), grid.downsampling_factor) * 0
    voxels = torch.zeros(grid.low_shape)
    for position in np.ndindex(*grid.low_shape):
        box = tuple(slice(p * f, (p + 1) * f) for p, f in zip(position, grid.downsampling_factor, strict=True))
        blocks[(0, 0, *position)], voxels[position] = volume[box].sum(), volume[box].numel()
    sums, ones = torch.zeros(grid.low_shape), torch.zeros(grid.low_shape)
    add_to_low_resolution_(sums, values, start, grid.downsampling_factor)
    add_to_low_resolution_(ones, torch.ones(grid.patch_size), start, grid.downsampling_factor)
    torch.testing.assert_close(sums, blocks[0, 0], rtol=1e-4, atol=1e-5)
    at = grid.touched(torch.tensor(window))
    covered = torch.zeros(grid.low_shape)
    covered[at] = grid.coverage(torch.tensor(window), at)
    torch.testing.assert_close(covered, ones / voxels)
    part = torch.zeros(grid.low_shape)
    part[at] = sums[at]
    torch.testing.assert_close(grid.mean(sums[at], at), grid.mean(part))


def test_window_means_do_not_lose_digits_in_large_volumes():
    grid = WindowGrid((300, 300, 300), (32, 32, 32), (3, 3, 3))
    low = torch.rand(grid.low_shape) + 100
    exact = WindowGrid.mean(grid, low)
    start = grid.starts_N3[-1].tolist()
    box = full_resolution(low.double(), grid)[window_slices(start, grid.patch_size)]
    assert abs(exact[-1] - box.mean()) < 1e-4


def test_window_means_are_differentiable():
    grid = WindowGrid((7, 8, 9), (4, 4, 4), (2, 3, 2))
    low = torch.randn(grid.low_shape, dtype=torch.float64, requires_grad=True)
    grid.mean(low).sum().backward()
    # Each window's mean has weights that sum to one.
    assert low.grad is not None
    assert abs(low.grad.sum().item() - len(grid)) < 1e-4


@settings(max_examples=30)
@given(grids())
def test_windows_are_nnunets_in_nnunets_order(grid):
    configuration = SimpleNamespace(patch_size=grid.patch_size)
    predictor = SimpleNamespace(configuration_manager=configuration, tile_step_size=grid.tile_step_size, verbose=False)
    slicers = nnUNetPredictor._internal_get_sliding_window_slicers(predictor, grid.volume_shape)
    assert [(slice(None), *window_slices(start, grid.patch_size)) for start in grid.starts_N3.tolist()] == slicers


@settings(max_examples=40)
@given(st.tuples(*[st.integers(1, 11)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_downsampling_averages_the_voxels_that_exist(shape, factor):
    volume = torch.randn(1, 2, *shape)
    low = downsample(volume, factor)
    assert tuple(low.shape[2:]) == low_shape(shape, factor)
    expected = torch.empty_like(low)
    for d, h, w in np.ndindex(*low.shape[2:]):
        block = [slice(i * f, (i + 1) * f) for i, f in zip((d, h, w), factor, strict=True)]
        expected[0, :, d, h, w] = volume[(0, slice(None), *block)].mean((1, 2, 3))
    torch.testing.assert_close(low, expected)


@settings(max_examples=60)
@given(grids(), st.data())
def test_a_windows_interpolation_is_a_crop_of_the_whole(grid, data):
    low = torch.randn(1, 2, *grid.low_shape)
    whole = upsample_window(low, (0, 0, 0), grid.volume_shape, grid.downsampling_factor)
    assert tuple(whole.shape[2:]) == grid.volume_shape
    incomplete = [n * f for n, f in zip(grid.low_shape, grid.downsampling_factor, strict=True)]
    expected = torch.nn.functional.interpolate(low, incomplete, mode="trilinear", align_corners=False)
    torch.testing.assert_close(whole, crop(expected, (0, 0, 0), grid.volume_shape), rtol=1e-4, atol=1e-5)
    start = data.draw(st.sampled_from(grid.starts_N3.tolist()))
    window = upsample_window(low, start, grid.patch_size, grid.downsampling_factor)
    torch.testing.assert_close(window, crop(whole, start, grid.patch_size), rtol=1e-4, atol=1e-5)


def test_interpolation_is_exact_for_a_linear_ramp():
    ramp = torch.arange(30.0).view(1, 1, 30, 1, 1).expand(1, 1, 30, 6, 6)
    restored = upsample_window(downsample(ramp, (3, 2, 2)), (0, 0, 0), (30, 6, 6), (3, 2, 2))
    torch.testing.assert_close(restored[:, :, 2:-2], ramp[:, :, 2:-2])


@settings(max_examples=40)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 2**31))
def test_label_counts_and_what_is_left_without_a_window(shape, factor, seed):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 4, shape).astype(np.int16))
    counts = label_counts(labels, 4, factor)
    start = [int(rng.integers(0, n)) for n in shape]
    window = window_slices(start, [int(rng.integers(1, n - a + 1)) for n, a in zip(shape, start, strict=True)])
    weight = torch.zeros(shape)
    weight[window] = torch.from_numpy(rng.random(weight[window].shape, np.float32))
    left = counts.clone()
    one_hot = torch.nn.functional.one_hot(labels[window].long(), 4).movedim(-1, 0).float()
    add_to_low_resolution_(left, -one_hot * weight[window], start, factor)
    sums = LabelSums(labels[window], 4, start, factor)
    torch.testing.assert_close(counts[(slice(None), *sums.box)] - sums(weight[window]), left[(slice(None), *sums.box)])
    assert torch.equal(sums.counts().flatten(1).sum(1), one_hot.flatten(1).sum(1))
    for d, h, w in np.ndindex(*counts.shape[1:]):
        block = tuple(slice(i * f, (i + 1) * f) for i, f in zip((d, h, w), factor, strict=True))
        for label in range(4):
            here = labels[block] == label
            assert counts[label, d, h, w] == here.sum()
            assert left[label, d, h, w].item() == pytest.approx((here * (1 - weight[block])).sum().item(), abs=1e-4)


def test_crop_windows_is_a_batch_of_crops():
    volume = torch.randn(1, 2, 8, 9, 10)
    starts = torch.tensor([[0, 1, 2], [4, 5, 6]])
    patches = crop_windows(volume, starts, (4, 4, 4))
    assert patches.shape == (2, 2, 4, 4, 4)
    assert torch.equal(patches[1], volume[0, :, 4:8, 5:9, 6:10])
