import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from fusion_problems import CLASSES, ENCODING, ENCODINGS, canvas, covered, loss_of, nnunet_loss, one_hot, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_nmsw.model.fusion import FusionWeights, fuse
from nnunet_nmsw.trainers.losses.benefit import benefit_map
from nnunet_nmsw.trainers.losses.fused import window_shares
from nnunet_nmsw.trainers.losses.sums import dice_and_cross_entropy, loss_sums
from nnunet_nmsw.volume.interpolation import upsample_window
from nnunet_nmsw.volume.label_counts import add_to_low_resolution_, label_counts
from nnunet_nmsw.volume.windows import WindowGrid, crop_windows, window_slices


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(list(ENCODINGS.values())))
def test_the_sums_make_nnunets_loss(seed, encoding):
    torch.manual_seed(seed)
    logits, labels = torch.randn(CLASSES, 4, 5, 6) * 2, torch.randint(0, encoding.num_labels, (4, 5, 6))
    sums = loss_sums(logits, one_hot(labels, encoding), encoding)
    torch.testing.assert_close(dice_and_cross_entropy(sums, encoding), nnunet_loss(logits, labels, encoding))


def test_label_counts_make_the_loss_of_the_block_wise_constant_prediction():
    torch.manual_seed(0)
    labels, low = torch.randint(0, CLASSES, (7, 8, 9)), torch.randn(CLASSES, 3, 4, 3)
    factor = (3, 2, 3)
    constant = low
    for axis in range(3):
        constant = constant.repeat_interleave(factor[axis], axis + 1).narrow(axis + 1, 0, labels.shape[axis])
    loss = dice_and_cross_entropy(loss_sums(low, label_counts(labels, CLASSES, factor), ENCODING), ENCODING)
    torch.testing.assert_close(loss, nnunet_loss(constant, labels))


def loss_and_its_canvas(problem):
    """The canvas-free loss, and the canvas it stands for: coarse logits constant per block outside the windows."""
    grid, labels = problem["grid"], problem["labels"]
    smooth = upsample_window(problem["coarse"], (0, 0, 0), grid.volume_shape, grid.downsampling_factor)
    fused, inside = canvas(problem["patch_logits"], problem["starts"], smooth, problem["weights"], grid.volume_shape)
    constant = problem["coarse"]
    for axis, factor in enumerate(grid.downsampling_factor):
        constant = constant.repeat_interleave(factor, axis + 1).narrow(axis + 1, 0, grid.volume_shape[axis])
    loss = loss_of(
        problem["patch_logits"],
        problem["starts"],
        problem["coarse"],
        crop_windows(labels[None, None], problem["starts"], grid.patch_size)[:, 0],
        label_counts(labels, problem["encoding"].num_labels, grid.downsampling_factor),
        problem["weights"],
        grid.downsampling_factor,
        problem["encoding"],
    )
    on_canvas = torch.where(inside, fused, constant)
    return loss, on_canvas


@settings(max_examples=40)
@given(problems(overlapping=False))
def test_loss_without_a_canvas_equals_the_canvas_where_windows_do_not_overlap(problem):
    loss, on_canvas = loss_and_its_canvas(problem)
    torch.testing.assert_close(
        loss.loss, nnunet_loss(on_canvas, problem["labels"], problem["encoding"]), rtol=1e-4, atol=1e-5
    )


@settings(max_examples=40)
@given(problems(overlapping=True, kinds=("labels",)))
def test_with_overlap_the_cross_entropy_is_bounded_by_jensens_gap(problem):
    """Blending the losses instead of the logits: never below the canvas, above it by at most the windows' spread.

    Cross-entropy is convex and, per voxel, Lipschitz with constant 2 in the maximum norm, so the gap of a voxel is at
    most twice the largest difference between the windows' logits there.
    """
    grid, labels, starts = problem["grid"], problem["labels"], problem["starts"]
    patch_size = grid.patch_size
    _, on_canvas = loss_and_its_canvas(problem)
    shares, inside = window_shares(starts, patch_size, torch.device("cpu")), covered(starts, grid)
    smooth = upsample_window(problem["coarse"], (0, 0, 0), grid.volume_shape, grid.downsampling_factor)
    blended_loss = torch.zeros(grid.volume_shape)
    low, high = torch.full_like(on_canvas, torch.inf), torch.full_like(on_canvas, -torch.inf)
    for share, logits, start in zip(shares, problem["patch_logits"], starts.tolist(), strict=True):
        where = window_slices(start, patch_size)
        everywhere = (slice(None), *where)
        fused = fuse(logits, smooth[everywhere], problem["weights"])
        blended_loss[where] += share * F.cross_entropy(fused[None], labels[where][None], reduction="none")[0]
        low[everywhere] = torch.minimum(low[everywhere], fused)
        high[everywhere] = torch.maximum(high[everywhere], fused)
    gap = (blended_loss - F.cross_entropy(on_canvas[None], labels[None], reduction="none")[0])[inside]
    assert (gap > -1e-4).all()
    assert (gap <= 2 * (high - low).amax(0)[inside] + 1e-4).all()


@settings(max_examples=20)
@given(problems(overlapping=True))
def test_shares_sum_to_one_under_windows(problem):
    grid = problem["grid"]
    shares = window_shares(problem["starts"], grid.patch_size, torch.device("cpu"))
    total = torch.zeros(grid.volume_shape)
    for share, start in zip(shares, problem["starts"].tolist(), strict=True):
        total[window_slices(start, grid.patch_size)] += share
    torch.testing.assert_close(total, covered(problem["starts"], grid).float())


def test_the_weight_of_a_window_has_its_benefit_as_gradient():
    torch.manual_seed(1)
    grid = WindowGrid((12, 12, 12), (6, 6, 6), (3, 3, 3), 1.0)
    labels = torch.zeros(grid.volume_shape, dtype=torch.long)
    labels[2:5, 2:5, 2:5] = 1
    starts = grid.starts_N3[[0, 7]]
    truth = F.one_hot(labels[:6, :6, :6], CLASSES).movedim(-1, 0).float() * 8
    patch_logits = torch.stack([truth, torch.randn(CLASSES, 6, 6, 6)])
    coarse, weights = torch.zeros(CLASSES, *grid.low_shape), FusionWeights.convex(torch.full((CLASSES,), 0.9))
    counts = label_counts(labels, CLASSES, grid.downsampling_factor)
    arguments = (weights, grid.downsampling_factor, ENCODING)
    cropped = crop_windows(labels[None, None], starts, grid.patch_size)[:, 0]
    window_weight = torch.ones(2, requires_grad=True)
    loss, _, benefit, *_ = loss_of(
        patch_logits, starts, coarse, cropped, counts, *arguments, window_weight_K=window_weight
    )
    (gradient,) = torch.autograd.grad(loss, window_weight)
    torch.testing.assert_close(-gradient, benefit)
    assert benefit[0] > 0 > benefit[1]
    # Against leaving the window out, which the first-order benefit stands for.
    without = loss_of(patch_logits[1:], starts[1:], coarse, cropped[1:], counts, *arguments).loss
    smooth = upsample_window(coarse, (0, 0, 0), grid.volume_shape, grid.downsampling_factor)
    assert torch.equal(smooth, torch.zeros_like(smooth))  # so that inside and outside the coarse prediction agree
    assert (without - loss).item() == pytest.approx(benefit[0].item(), rel=0.5)


@settings(max_examples=40)
@given(problems(overlapping=True))
def test_the_changes_are_those_of_the_sums_in_each_low_resolution_voxel(problem):
    grid, encoding, factor = problem["grid"], problem["encoding"], problem["grid"].downsampling_factor
    labels = crop_windows(problem["labels"][None, None], problem["starts"], grid.patch_size)[:, 0]
    counts = label_counts(problem["labels"], encoding.num_labels, factor)
    arguments = (problem["starts"], problem["coarse"], labels, counts, problem["weights"], factor, encoding)
    # Whether a window is fused has no say in its changes.
    loss = loss_of(problem["patch_logits"], *arguments, num_fused=1)
    expected, lower = torch.zeros(2, 2 * CLASSES + 1, *grid.low_shape)
    voxels, counted = torch.zeros(2, *grid.low_shape)
    low = [torch.arange(n) // f for n, f in zip(grid.volume_shape, factor, strict=True)]
    for start, logits, of_window in zip(problem["starts"].tolist(), problem["patch_logits"], labels, strict=True):
        coarse = upsample_window(problem["coarse"], start, grid.patch_size, factor)
        fused = fuse(logits, coarse, problem["weights"])
        d, h, w = (axis[part] for axis, part in zip(low, window_slices(start, grid.patch_size), strict=True))
        for i, j, k in itertools.product(d.unique(), h.unique(), w.unique()):
            block = (d == i)[:, None, None] & (h == j)[None, :, None] & (w == k)[None, None]
            target = one_hot(of_window[block], encoding)
            sums = loss_sums(coarse[:, block], target, encoding) - loss_sums(fused[:, block], target, encoding)
            expected[:, i, j, k] += torch.cat([sums[: 2 * CLASSES], sums[-2, None]])
            voxels[i, j, k] += encoding.counted(of_window[block]).sum()
    for change in loss.changes:
        lower[(slice(None), *change.box)] += change.lower_Tdhw
        counted[change.box] += change.voxels_dhw
    torch.testing.assert_close(lower, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(counted, voxels)


@settings(max_examples=20)
@given(problems(overlapping=True))
def test_the_loss_has_the_gradient_of_the_sums_of_one_hot_targets(problem):
    """The reference makes a one-hot target of each window and sums by `loss_sums`, with the windows' shares."""
    grid, encoding, factor, starts = (
        problem["grid"],
        problem["encoding"],
        problem["grid"].downsampling_factor,
        problem["starts"],
    )
    labels = crop_windows(problem["labels"][None, None], starts, grid.patch_size)[:, 0]
    counts = label_counts(problem["labels"], encoding.num_labels, factor)
    leaves = [problem["patch_logits"], problem["coarse"], *problem["weights"]]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = problem["weights"]
    loss = loss_of(problem["patch_logits"], starts, problem["coarse"], labels, counts, weights, factor, encoding)
    rest, sums = counts.clone(), 0
    shares = window_shares(starts, grid.patch_size, torch.device("cpu"))
    for start, logits, of_window, share in zip(starts.tolist(), problem["patch_logits"], labels, shares, strict=True):
        weighted = one_hot(of_window, encoding) * share
        coarse = upsample_window(problem["coarse"], start, grid.patch_size, factor)
        sums = sums + loss_sums(fuse(logits, coarse, weights), weighted, encoding)
        add_to_low_resolution_(rest, -weighted, start, factor)
    sums = sums + loss_sums(problem["coarse"].detach(), rest.clamp_min(0), encoding)
    expected = dice_and_cross_entropy(sums, encoding)
    torch.testing.assert_close(loss.loss, expected, rtol=1e-4, atol=1e-5)
    for gradient, of_reference in zip(
        torch.autograd.grad(loss.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, of_reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_in_parts_the_loss_is_the_same_and_nothing_of_their_size_is_kept(encoding, monkeypatch):
    torch.manual_seed(0)
    grid, factor = WindowGrid((14, 12, 9), (7, 6, 5), (3, 2, 2), 0.5), (3, 2, 2)
    starts, labels = grid.starts_N3[[0, 5, 7]], torch.randint(0, encoding.num_labels, grid.volume_shape)
    patches = torch.randn(3, CLASSES, *grid.patch_size, requires_grad=True)
    arguments = (
        torch.randn(CLASSES, *grid.low_shape, requires_grad=True),
        crop_windows(labels[None, None], starts, grid.patch_size)[:, 0],
        label_counts(labels, encoding.num_labels, factor),
        FusionWeights.convex(torch.full((CLASSES,), 0.8)),
        factor,
        encoding,
    )
    results = []
    factors = torch.ones(2, requires_grad=True)  # on the sums of each window
    two_planes = 2 * CLASSES * 6 * 5
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (patches, arguments[0])}
    for most_values in (10**6, two_planes):
        monkeypatch.setattr("nnunet_nmsw.trainers.losses.sums.MOST_VALUES", most_values)
        kept = []

        def pack(tensor, kept=kept):
            if tensor.untyped_storage().data_ptr() not in inputs:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(patches, starts, *arguments, 2, factors)
        assert sum(kept) < 2 * arguments[0].numel()  # what the volume holds of each channel
        measured = benefit_map(loss.changes, loss.slope_S, grid.low_shape, grid.patch_size, factor)
        gradient = torch.autograd.grad(loss.loss + loss.coarse_loss, [patches, arguments[0], factors])
        results.append([*loss[:-1], *measured, *gradient, len(loss.changes)])
    assert [result.pop() for result in results] == [3, 12]
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_a_class_that_nothing_has_any_more_costs_nothing():
    """Windows cover all that the coarse prediction has of an absent class, overlap, and do not have it."""
    grid, factor = WindowGrid((24, 24, 24), (16, 16, 16), (2, 2, 2), 0.5), (2, 2, 2)
    labels = torch.zeros(grid.volume_shape, dtype=torch.long)
    patches = torch.zeros(len(grid), CLASSES, *grid.patch_size)
    patches[:, 0] = 60
    cropped = crop_windows(labels[None, None], grid.starts_N3, grid.patch_size)[:, 0]
    counts, weights = label_counts(labels, CLASSES, factor), FusionWeights.convex(torch.ones(CLASSES))
    coarse = torch.zeros(CLASSES, *grid.low_shape)
    loss = loss_of(patches, grid.starts_N3, coarse, cropped, counts, weights, factor, ENCODING).loss
    assert -1 - 1e-4 <= loss.item() <= 0.01


@settings(max_examples=30)
@given(problems(overlapping=False))
def test_the_benefit_map_adds_up_to_the_windows_benefits(problem):
    grid, factor = problem["grid"], problem["grid"].downsampling_factor
    labels = crop_windows(problem["labels"][None, None], problem["starts"], grid.patch_size)[:, 0]
    encoding = problem["encoding"]
    counts = label_counts(problem["labels"], encoding.num_labels, factor)
    coarse, weights = problem["coarse"], problem["weights"]
    arguments = (counts, weights, factor, encoding)
    loss = loss_of(problem["patch_logits"], problem["starts"], coarse, labels, *arguments)
    for window in range(len(problem["starts"])):
        logits, start = problem["patch_logits"][window, None], problem["starts"][window, None]
        changes = loss_of(logits, start, coarse, labels[window, None], *arguments).changes
        alone = benefit_map(changes, loss.slope_S, grid.low_shape, grid.patch_size, factor)
        voxels = alone.weight_dhw * math.prod(factor)
        assert voxels.sum() == encoding.counted(labels[window]).sum()
        benefit = (alone.benefit_dhw * voxels).sum() / math.prod(grid.patch_size)
        torch.testing.assert_close(benefit, loss.benefit_K[window], rtol=1e-3, atol=1e-5)


def test_the_benefit_map_is_positive_where_a_patch_is_right_and_negative_where_it_is_wrong():
    labels = torch.zeros(8, 8, 16, dtype=torch.long)
    labels[2:6, 2:6, 2:6] = 1
    starts = torch.tensor([[0, 0, 0], [0, 0, 8]])
    coarse, factor = torch.zeros(CLASSES, 4, 4, 8), (2, 2, 2)
    coarse[0] = 1
    right = 8 * F.one_hot(labels[:, :, :8], CLASSES).movedim(-1, 0).float()
    wrong = torch.zeros(CLASSES, 8, 8, 8)
    wrong[1] = 8
    patches, weights = torch.stack([right, wrong]), FusionWeights.convex(torch.ones(CLASSES))
    cropped, counts = torch.stack([labels[:, :, :8], labels[:, :, 8:]]), label_counts(labels, CLASSES, factor)
    loss = loss_of(patches, starts, coarse, cropped, counts, weights, factor, ENCODING)
    measured = benefit_map(loss.changes, loss.slope_S, (4, 4, 8), (8, 8, 8), factor)
    assert (measured.benefit_dhw[:, :, :4] > 0).all()
    assert (measured.benefit_dhw[:, :, 4:] < 0).all()
    assert measured.benefit_dhw[1:3, 1:3, 1:3].mean() > measured.benefit_dhw[:1, :, :4].mean()
    assert (measured.weight_dhw == 1).all()


def test_an_ignored_window_is_worth_nothing_and_says_nothing():
    encoding, grid = ENCODINGS["ignore"], WindowGrid((8, 8, 16), (8, 8, 8), (2, 2, 2), 1.0)
    labels = torch.full(grid.volume_shape, 3)
    labels[:, :, :8] = torch.randint(0, 3, (8, 8, 8), generator=torch.Generator().manual_seed(0))
    patches = torch.randn(2, CLASSES, 8, 8, 8, requires_grad=True)
    coarse, weights = torch.zeros(CLASSES, *grid.low_shape), FusionWeights.convex(torch.full((CLASSES,), 0.9))
    cropped = crop_windows(labels[None, None], grid.starts_N3, grid.patch_size)[:, 0]
    counts = label_counts(labels, 4, (2, 2, 2))
    loss = loss_of(patches, grid.starts_N3, coarse, cropped, counts, weights, (2, 2, 2), encoding)
    assert loss.benefit_K[1] == 0
    (gradient,) = torch.autograd.grad(loss.loss, patches)
    assert gradient[0].abs().max() > 0
    assert (gradient[1] == 0).all()
    measured = benefit_map(loss.changes, loss.slope_S, grid.low_shape, grid.patch_size, (2, 2, 2))
    assert (measured.weight_dhw[:, :, :4] == 1).all()
    assert (measured.weight_dhw[:, :, 4:] == 0).all()
