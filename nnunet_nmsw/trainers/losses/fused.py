"""The loss of the fused prediction of a whole volume, without ever building it.

Tensor suffixes:

    C  channels of the logits  D H W  axes of the volume, or of a patch
    L  labels                  d h w  axes of the low-resolution view
    K  windows                 N      some low-resolution voxels
    S  loss sums, 3·C + 2 of them: see `loss_sums`
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.model.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.trainers.losses.sums import (
    BoxChange,
    LabelledBox,
    computed_again,
    dice_and_cross_entropy,
    loss_sums,
    most_voxels,
)
from nnunet_nmsw.volume.interpolation import surroundings, upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape


def window_shares(starts_K3: Tensor, patch_size: Sequence[int], device: torch.device) -> Tensor:
    """The share of each window in the prediction of its voxels: its Gaussian over the sum of all windows' Gaussians.

    Costs K² small boxes and nothing that grows with the volume: for the few windows of a training step.

    Returns:
        float32 of shape K, `patch_size`; the windows' shares sum to 1 at every covered voxel.
    """
    gaussian_DHW, starts = gaussian_weights(patch_size, device), starts_K3.tolist()
    shares = []
    for start in starts:
        total_DHW = torch.zeros_like(gaussian_DHW)
        for other in starts:
            shift = [b - a for a, b in zip(start, other, strict=True)]
            if all(abs(d) < n for d, n in zip(shift, patch_size, strict=True)):
                here = [slice(max(0, d), n + min(0, d)) for d, n in zip(shift, patch_size, strict=True)]
                there = [slice(max(0, -d), n + min(0, -d)) for d, n in zip(shift, patch_size, strict=True)]
                total_DHW[tuple(here)] += gaussian_DHW[tuple(there)]
        shares.append(gaussian_DHW / total_DHW)
    return torch.stack(shares)


class WindowPredictions(NamedTuple):
    """Windows of a training step.

    Attributes:
        logits_KCDHW: of the local branch.
        labels_KDHW: integer labels.
        starts_K3: first voxels, int64.
    """

    logits_KCDHW: Tensor
    labels_KDHW: Tensor
    starts_K3: Tensor


class LowResolution(NamedTuple):
    """A volume on the low-resolution grid.

    Attributes:
        logits_Cdhw: coarse logits.
        counts_Ldhw: voxels of each label in each low-resolution voxel.
        factor: voxels of the volume per low-resolution voxel.
        encoding: of the labels.
    """

    logits_Cdhw: Tensor
    counts_Ldhw: Tensor
    factor: Shape
    encoding: LabelEncoding


class FusedLoss(NamedTuple):
    """Loss of the fused prediction of a whole volume.

    Attributes:
        loss: nnU-Net's loss, scalar.
        coarse_loss: that of the coarse prediction alone, at low resolution.
        benefit_K: by how much each fused window lowers it against the coarse prediction there, all others as they are
            (first order in the sums; detached).
        slope_S: derivative of the loss with respect to the sums of `loss_sums`; detached.
        changes: what all windows do, each on its own, in one part or several, for `benefit_map`; detached.
    """

    loss: Tensor
    coarse_loss: Tensor
    benefit_K: Tensor
    slope_S: Tensor
    changes: list[BoxChange]


def fused_loss(
    windows: WindowPredictions,
    low: LowResolution,
    weights: FusionWeights,
    num_fused: int | None = None,
    window_weight_K: Tensor | None = None,
    with_changes: bool = True,
) -> FusedLoss:
    """Loss of the fused prediction of a volume, without its canvas.

    Sums over the windows at full resolution are added to sums over the rest at low resolution, where the prediction is
    the coarse one, constant over each low-resolution voxel and detached. Both are exact, so that for windows that do
    not overlap the loss is that of the full canvas. Where they overlap, every voxel still counts once, its loss being
    the mean of the windows' losses with the blending weights instead of the loss of the blended logits. Cross-entropy
    is convex in the logits, hence never smaller than the canvas's.

    Nothing of the size of logits is kept for the gradient but the logits: it is computed again, part by part.

    Args:
        windows: predictions of the local branch, and their labels.
        low: the coarse prediction, and the labels of the volume.
        weights: of the fusion.
        num_fused: the first so many windows are fused, all where None; the rest has changes only.
        window_weight_K: a factor of 1 in value on the difference that each fused window makes to the sums. Its gradient
            is minus the window's benefit.
        with_changes: work out what the windows change, voxel by voxel.
    """
    num_fused = len(windows.starts_K3) if num_fused is None else num_fused
    parts = _Parts(low, weights, with_changes)
    patch_size, device = windows.logits_KCDHW.shape[2:], low.logits_Cdhw.device
    shares_KDHW = window_shares(windows.starts_K3[:num_fused], patch_size, device)
    with_window, without_window, changes = [], [], []
    # Unbound, split, and cut out once: the gradient of each slice is as large as what it is a slice of.
    each = zip(windows.logits_KCDHW.unbind(), windows.labels_KDHW, windows.starts_K3.tolist(), strict=True)
    for number, (logits_CDHW, labels_DHW, start) in enumerate(each):
        fused = number < num_fused
        if not fused and not with_changes:
            break
        for sums, change in parts.of_window(logits_CDHW, labels_DHW, start, shares_KDHW[number] if fused else None):
            if change is not None:
                changes.append(change)
            if sums is not None:
                with_window.append(sums[0])
                without_window.append(sums[1])

    encoding = low.encoding
    coarse_S = loss_sums(low.logits_Cdhw, low.counts_Ldhw, encoding)
    # No less than nothing, where windows cover all that the coarse prediction has of a class.
    rest_S = (coarse_S.detach() + _without_covered(low, parts.covered_Ldhw)).clamp_min(0)
    with_KS, without_KS = (  # all windows have as many parts
        torch.stack(sums).view(num_fused, -1, len(rest_S)).sum(1) for sums in (with_window, without_window)
    )
    difference_KS = with_KS - without_KS
    sums_S = rest_S + with_KS.sum(0)
    if window_weight_K is not None:
        sums_S = sums_S + (window_weight_K - 1) @ difference_KS
    with torch.enable_grad():
        leaf_S = sums_S.detach().requires_grad_()
        (slope_S,) = torch.autograd.grad(dice_and_cross_entropy(leaf_S, encoding), leaf_S)
    return FusedLoss(
        dice_and_cross_entropy(sums_S, encoding),
        dice_and_cross_entropy(coarse_S, encoding),
        -difference_KS.detach() @ slope_S,
        slope_S,
        changes,
    )


Sums = tuple[Tensor, Tensor]
"""`loss_sums` of the fused and of the coarse prediction in one part of a window."""


class _Parts:
    """Handles windows part by part, and keeps account of what they cover.

    Args:
        low: see `fused_loss`.
        weights: see `fused_loss`.
        with_changes: see `fused_loss`.

    Attributes:
        covered_Ldhw: how much of each label in each low-resolution voxel fused windows have covered.
    """

    def __init__(self, low: LowResolution, weights: FusionWeights, with_changes: bool) -> None:
        self.low, self.weights, self.with_changes = low, weights, with_changes
        self.covered_Ldhw = torch.zeros_like(low.counts_Ldhw)

    def of_window(
        self, logits_CDHW: Tensor, labels_DHW: Tensor, start: Sequence[int], share_DHW: Tensor | None
    ) -> Iterator[tuple[Sums | None, BoxChange | None]]:
        """The sums, where the window is fused, and the changes of each part of a window.

        Args:
            logits_CDHW: of the local branch.
            labels_DHW: integer labels.
            start: first voxel.
            share_DHW: of the window in its voxels; None where it is not fused.
        """
        low, patch_size = self.low, labels_DHW.shape
        depth = max(1, most_voxels(logits_CDHW) // math.prod(patch_size[1:]))
        coarse_Cdhw, origin = surroundings(low.logits_Cdhw, start, patch_size, low.factor)
        for number, part_CDHW in enumerate(logits_CDHW.split(depth, 1)):
            slab = slice(number * depth, (number + 1) * depth)
            box = LabelledBox(labels_DHW[slab], (start[0] + slab.start, *start[1:]), low.factor, low.encoding)
            weighted = None
            if share_DHW is not None:
                counts_Ldhw = box.label_sums(share_DHW[slab])
                self.covered_Ldhw[(slice(None), *box.label_sums.box)] += counts_Ldhw
                weighted = (share_DHW[slab], counts_Ldhw)
            compare = partial(self._compared, origin=origin, box=box, weighted=weighted)
            with torch.set_grad_enabled(share_DHW is not None and torch.is_grad_enabled()):
                compared = computed_again(compare, part_CDHW, coarse_Cdhw, self.weights)
            yield compared

    def _compared(
        self,
        patch_logits_CDHW: Tensor,
        coarse_logits_Cdhw: Tensor,
        weights: FusionWeights,
        origin: tuple[int, int, int],
        box: LabelledBox,
        weighted: tuple[Tensor, Tensor] | None,
    ) -> tuple[Sums | None, BoxChange | None]:
        """The fused against the coarse prediction in one box.

        Args:
            patch_logits_CDHW: logits of the box.
            coarse_logits_Cdhw: coarse logits around it.
            weights: of the fusion.
            origin: the voxel of the volume at which the coarse logits begin.
            box: the reference.
            weighted: what its voxels weigh, and that by label and low-resolution voxel.
        """
        encoding, labels_DHW = box.encoding, box.labels_DHW
        start = [a - b for a, b in zip(box.start, origin, strict=True)]
        coarse_CDHW = upsample_window(coarse_logits_Cdhw, start, labels_DHW.shape, box.factor)
        after = encoding.voxel_terms(fuse(patch_logits_CDHW.float(), coarse_CDHW, weights), labels_DHW)
        with_S = box.sums(after, *weighted) if weighted is not None else None
        with torch.no_grad():  # after what has a gradient, which is all that is computed again
            before = encoding.voxel_terms(coarse_CDHW, labels_DHW)
            without_S = box.sums(before, *weighted) if weighted is not None else None
            change = box.change(before, after) if self.with_changes else None
        return None if with_S is None or without_S is None else (with_S, without_S), change


@torch.no_grad()
def _without_covered(low: LowResolution, covered_Ldhw: Tensor) -> Tensor:
    """What is to be added to the coarse prediction's sums where windows cover some voxels; the sums are linear in them.

    The counts of a rotated volume are interpolated, its windows' counts are not: what windows do not cover keeps its
    number of voxels, and nothing counts twice.
    """
    logits_CN, counts_LN, covered_LN = (x.flatten(1) for x in (low.logits_Cdhw.detach(), low.counts_Ldhw, covered_Ldhw))
    if covered_Ldhw.device.type == "cpu":  # a GPU looks at all voxels sooner than the host knows which are covered
        where_N = covered_LN.sum(0).nonzero()[:, 0]
        logits_CN, counts_LN, covered_LN = (x[:, where_N] for x in (logits_CN, counts_LN, covered_LN))
    rest_LN = counts_LN - covered_LN
    left_N = rest_LN.sum(0).clamp_min(0)
    rest_LN.clamp_min_(0)
    rest_LN *= left_N / rest_LN.sum(0).clamp_min(1e-6)
    return loss_sums(logits_CN, rest_LN - counts_LN, low.encoding)
