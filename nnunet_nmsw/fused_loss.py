"""The loss of the fused prediction of a whole volume, without ever building it, and what each window was worth.

Tensor suffixes:

    C  channels of the logits  D H W  axes of the volume, or of a patch
    L  labels                  d h w  axes of the low-resolution view
    K  windows                 V      voxels, any shape
    S  loss sums, 3·C + 2 of them: see `loss_sums`
    T  those of them that a prediction changes, 2·C + 1: intersections, predictions, cross-entropy
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.geometry import LabelSums, Shape, add_to_low_resolution_, upsample_window
from nnunet_nmsw.labels import LabelEncoding, VoxelTerms

DICE_SMOOTH = 1e-5
"""nnU-Net's smoothing of the soft Dice."""

MOST_VALUES = 2**23 - 2**10
"""Of a tensor on a CPU, where it can be helped: glibc maps larger ones (32 MiB) anew each time they are made, and that
takes longer than to compute them."""


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


def loss_sums(logits_CV: Tensor, counts_LV: Tensor, encoding: LabelEncoding) -> Tensor:
    """The sums over voxels of which nnU-Net's loss of Dice and (binary) cross-entropy is made.

    Args:
        logits_CV: logits.
        counts_LV: how much of each label a voxel holds: a one-hot target times the voxel's weight at full resolution,
            label counts at low resolution.
        encoding: of the labels.

    Returns:
        float32 vector S: by channel the intersection Σ p·n, the prediction Σ p·v and the target Σ n, with the voxel's
        amount n of the channel and v of all that counts; then the summed cross-entropy and the number of voxels Σ v.
    """
    return sums_of_targets(logits_CV, *encoding.targets(counts_LV), encoding)


def sums_of_targets(logits_CV: Tensor, targets_CV: Tensor, voxels_V: Tensor, encoding: LabelEncoding) -> Tensor:
    """`loss_sums` from how much of each channel a voxel holds (C, V), and how much of it counts (V)."""
    number = _most_voxels(logits_CV)
    parts = zip(
        logits_CV.flatten(1).split(number, 1),
        targets_CV.flatten(1).split(number, 1),
        voxels_V.flatten()[None].split(number, 1),
        strict=True,
    )
    return torch.stack([_sums_of_part(*part, encoding) for part in parts]).sum(0)


def _sums_of_part(logits_CV: Tensor, targets_CV: Tensor, voxels_1V: Tensor, encoding: LabelEncoding) -> Tensor:
    probability_CV, log_likelihood_CV, common_V = encoding.prediction(logits_CV)
    return torch.cat(
        [
            (probability_CV * targets_CV).sum(1),
            (probability_CV * voxels_1V).sum(1),
            targets_CV.sum(1),
            ((common_V * voxels_1V).sum() - (log_likelihood_CV * targets_CV).sum())[None],
            voxels_1V.sum(1),
        ]
    )


def _most_voxels(logits_CV: Tensor) -> int:
    """Voxels to handle at once: all on a GPU, on a CPU what keeps tensors in memory that the process has already."""
    return max(1, MOST_VALUES // len(logits_CV)) if logits_CV.device.type == "cpu" else max(1, logits_CV[0].numel())


def dice_and_cross_entropy(sums_S: Tensor, encoding: LabelEncoding) -> Tensor:
    """nnU-Net's loss from the sums of `loss_sums`: `DC_and_CE_loss` without background in the Dice, or, with regions,
    `DC_and_BCE_loss`; both with a smoothing of 1e-5."""
    intersection_C, prediction_C, target_C = sums_S[:-2].view(3, -1)
    cross_entropy, voxels = sums_S[-2:]
    dice_C = (2 * intersection_C + DICE_SMOOTH) / (target_C + prediction_C + DICE_SMOOTH).clamp_min(1e-8)
    return cross_entropy / voxels.clamp_min(1) - dice_C[0 if encoding.has_regions else 1 :].mean()


class BoxChange(NamedTuple):
    """What a window, or a part of it, does to the sums of `loss_sums` against the coarse prediction.

    Attributes:
        box: the low-resolution voxels that it touches, as slices of the three axes.
        lower_Tdhw: by how much it lowers the sums, each low-resolution voxel its own.
        voxels_dhw: its voxels that are not ignored.
    """

    box: tuple[slice, slice, slice]
    lower_Tdhw: Tensor
    voxels_dhw: Tensor


class LabelledBox:
    """The reference of a window, or of a part of it, and sums over its voxels.

    Every voxel holds one label, so that nothing of size labels × voxels is made of it; `loss_sums` of its one-hot
    target has the same result.

    Args:
        labels_DHW: integer labels.
        start: first voxel.
        factor: voxels of the volume per low-resolution voxel.
        encoding: of the labels.
    """

    def __init__(self, labels_DHW: Tensor, start: Sequence[int], factor: Shape, encoding: LabelEncoding) -> None:
        self.labels_DHW, self.start, self.factor, self.encoding = labels_DHW, start, factor, encoding
        self.counted_DHW = encoding.counted(labels_DHW).float()
        self.label_sums = LabelSums(labels_DHW, encoding.num_labels, start, factor)

    def sums(self, terms: VoxelTerms, share_DHW: Tensor, counts_Ldhw: Tensor) -> Tensor:
        """As `loss_sums`, with gradient.

        Args:
            terms: of a prediction.
            share_DHW: what a voxel weighs.
            counts_Ldhw: those weights by label and low-resolution voxel.
        """
        encoding = self.encoding
        weight_DHW = share_DHW * self.counted_DHW
        target_C, voxels = encoding.targets(counts_Ldhw.flatten(1).sum(1))
        hits_XDHW = terms.hits_XV * weight_DHW
        if encoding.has_regions:
            intersection_C = hits_XDHW.flatten(1).sum(1)
        else:
            intersection_C = self.label_sums(hits_XDHW[0]).flatten(1).sum(1)[: encoding.num_channels]
        prediction_C = (terms.probability_CV * weight_DHW).flatten(1).sum(1)
        cross_entropy = (terms.cross_entropy_V * weight_DHW).sum()
        return torch.cat([intersection_C, prediction_C, target_C, cross_entropy[None], voxels[None]])

    @torch.no_grad()
    def change(self, before: VoxelTerms, after: VoxelTerms) -> BoxChange:
        """By how much the sums of all that counts are lower after than before."""
        channels, box = self.encoding.num_channels, self.label_sums.box
        shape = [axis.stop - axis.start for axis in box]
        lower_Tdhw = torch.zeros(2 * channels + 1, *shape, device=self.labels_DHW.device)
        hits_XDHW = (before.hits_XV - after.hits_XV) * self.counted_DHW
        if self.encoding.has_regions:
            self._add_(lower_Tdhw[:channels], hits_XDHW)
        else:
            lower_Tdhw[:channels] = self.label_sums(hits_XDHW[0])[:channels]
        probability_CDHW = before.probability_CV - after.probability_CV
        if self.encoding.ignore_label is not None:
            probability_CDHW *= self.counted_DHW
        self._add_(lower_Tdhw[channels:-1], probability_CDHW)
        self._add_(lower_Tdhw[-1], (before.cross_entropy_V - after.cross_entropy_V) * self.counted_DHW)
        voxels_dhw = torch.zeros_like(lower_Tdhw[0])
        self._add_(voxels_dhw, self.counted_DHW)
        return BoxChange(box, lower_Tdhw, voxels_dhw)

    def _add_(self, sums_Cdhw: Tensor, values_CDHW: Tensor) -> None:
        start = [a % f for a, f in zip(self.start, self.factor, strict=True)]
        add_to_low_resolution_(sums_Cdhw, values_CDHW, start, self.factor)


class FusedLoss(NamedTuple):
    """Loss of the fused prediction of a whole volume.

    Attributes:
        loss: nnU-Net's loss, scalar.
        coarse_loss: that of the coarse prediction alone, at low resolution.
        benefit_K: by how much each fused window lowers it against the coarse prediction there, all others as they are
            (first order in the sums; detached).
        slope_S: derivative of the loss with respect to the sums of `loss_sums`; detached.
        changes: what all windows do, each on its own, for `benefit_map`; detached.
    """

    loss: Tensor
    coarse_loss: Tensor
    benefit_K: Tensor
    slope_S: Tensor
    changes: list[BoxChange]


def fused_loss(
    patch_logits_KCDHW: Tensor,
    starts_K3: Tensor,
    coarse_logits_Cdhw: Tensor,
    labels_KDHW: Tensor,
    counts_Ldhw: Tensor,
    weights: FusionWeights,
    factor: Shape,
    encoding: LabelEncoding,
    window_weight_K: Tensor | None = None,
    logits_weight_K: Tensor | None = None,
    num_fused: int | None = None,
    changes_of_labels: bool = False,
) -> FusedLoss:
    """Loss of the fused prediction of a volume, without its canvas.

    Sums over the windows at full resolution are added to sums over the rest at low resolution, where the prediction is
    the coarse one, constant over each low-resolution voxel and detached. Both are exact, so that for windows that do
    not overlap the loss is that of the full canvas. Where they overlap, every voxel still counts once, its loss being
    the mean of the windows' losses with the blending weights instead of the loss of the blended logits. Cross-entropy
    is convex in the logits, hence never smaller than the canvas's.

    Args:
        patch_logits_KCDHW: logits of the windows.
        starts_K3: first voxels of the windows.
        coarse_logits_Cdhw: coarse logits of the volume.
        labels_KDHW: integer labels of the windows.
        counts_Ldhw: voxels of each label in each low-resolution voxel of the volume.
        weights: of the fusion.
        factor: voxels of the volume per low-resolution voxel.
        encoding: of the labels.
        window_weight_K: a factor of 1 in value on the difference that each fused window makes to the sums. Its gradient
            is minus the window's benefit; this is how scores are trained.
        logits_weight_K: a factor of 1 in value on the difference that each fused window makes to the logits, another
            way.
        num_fused: the first so many windows are fused, all where None; the rest has changes only.
        changes_of_labels: in the changes, compare predicted labels instead of probabilities.
    """
    num_fused = len(starts_K3) if num_fused is None else num_fused
    patch_size, device = patch_logits_KCDHW.shape[2:], coarse_logits_Cdhw.device
    shares_KDHW = window_shares(starts_K3[:num_fused], patch_size, device)
    depth = max(1, _most_voxels(patch_logits_KCDHW[0]) // math.prod(patch_size[1:]))
    covered_Ldhw, changes = torch.zeros_like(counts_Ldhw), []
    with_window, without_window, window_of_sums = [], [], []
    # Unbound and split: the gradient of a slice would be as large as all windows, and there would be many.
    for window, patch_logits_CDHW in enumerate(patch_logits_KCDHW.unbind()):
        start = starts_K3[window].tolist()
        for part, logits_CDHW in enumerate(patch_logits_CDHW.split(depth, 1)):
            slab = slice(part * depth, (part + 1) * depth)
            part_start = (start[0] + slab.start, *start[1:])
            reference = LabelledBox(labels_KDHW[window, slab], part_start, factor, encoding)
            coarse_CDHW = upsample_window(coarse_logits_Cdhw, part_start, logits_CDHW.shape[1:], factor)
            fused_CDHW = fuse(logits_CDHW.float(), coarse_CDHW, weights)
            if logits_weight_K is not None and window < num_fused:
                fused_CDHW = coarse_CDHW + logits_weight_K[window] * (fused_CDHW - coarse_CDHW)
            after = encoding.voxel_terms(fused_CDHW, reference.labels_DHW)
            with torch.no_grad():
                before = encoding.voxel_terms(coarse_CDHW, reference.labels_DHW)
            if window < num_fused:
                share_DHW = shares_KDHW[window, slab]
                counts_of_part_Ldhw = reference.label_sums(share_DHW)
                covered_Ldhw[(slice(None), *reference.label_sums.box)] += counts_of_part_Ldhw
                with_window.append(reference.sums(after, share_DHW, counts_of_part_Ldhw))
                without_window.append(reference.sums(before, share_DHW, counts_of_part_Ldhw))
                window_of_sums.append(window)
            if changes_of_labels:
                before, after = (
                    encoding.voxel_terms(logits_CDHW.detach(), reference.labels_DHW, decided=True)
                    for logits_CDHW in (coarse_CDHW, fused_CDHW)
                )
            changes.append(reference.change(before, after))

    coarse_S = loss_sums(coarse_logits_Cdhw, counts_Ldhw, encoding)
    rest_S = coarse_S.detach() + _without_covered(coarse_logits_Cdhw.detach(), counts_Ldhw, covered_Ldhw, encoding)
    index = torch.tensor(window_of_sums, device=device)
    with_KS, without_KS = (
        torch.zeros(num_fused, len(rest_S), device=device).index_add(0, index, torch.stack(sums))
        for sums in (with_window, without_window)
    )
    difference_KS = with_KS - without_KS
    if window_weight_K is None:
        window_weight_K = torch.ones(num_fused, device=device)
    sums_S = rest_S + without_KS.sum(0) + window_weight_K @ difference_KS
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


@torch.no_grad()
def _without_covered(
    coarse_logits_Cdhw: Tensor, counts_Ldhw: Tensor, covered_Ldhw: Tensor, encoding: LabelEncoding
) -> Tensor:
    """What is to be added to the coarse prediction's sums where windows cover some voxels; the sums are linear in them.

    The counts of a rotated volume are interpolated, those of its windows are not: what windows do not cover keeps its
    number of voxels, and nothing counts twice.
    """
    where_N = covered_Ldhw.sum(0).flatten().nonzero()[:, 0]
    logits_CN, counts_LN, covered_LN = (
        x.flatten(1)[:, where_N] for x in (coarse_logits_Cdhw, counts_Ldhw, covered_Ldhw)
    )
    rest_LN = counts_LN - covered_LN
    left_N = rest_LN.sum(0).clamp_min(0)
    rest_LN.clamp_min_(0)
    rest_LN *= left_N / rest_LN.sum(0).clamp_min(1e-6)
    return loss_sums(logits_CN, rest_LN - counts_LN, encoding)


class BenefitMap(NamedTuple):
    """What windows were worth where, on the low-resolution grid.

    Attributes:
        benefit_dhw: by how much a window lowers the loss of the fused prediction, in a low-resolution voxel, times the
            voxels of a patch over those of the low-resolution voxel: the mean over a window is the window's benefit.
            0 where no window is; a voxel that is partly ignored has the mean of the rest.
        weight_dhw: share of the voxel that windows cover and that is not ignored, those of several windows added.
    """

    benefit_dhw: Tensor
    weight_dhw: Tensor


def benefit_map(
    changes: Sequence[BoxChange], slope_S: Tensor, low_shape: Sequence[int], patch_size: Sequence[int], factor: Shape
) -> BenefitMap:
    """Where windows lower the loss, each on its own against the coarse prediction; their mean where they overlap.

    The loss is made of sums over voxels (`loss_sums`). To first order in these sums each voxel has its part in the
    benefit of a window: `slope_S` times what the window changes in the voxel's summands.

    Args:
        changes: of `fused_loss`.
        slope_S: of `fused_loss`, or `dice_slope`.
        low_shape: of the low-resolution grid.
        patch_size: voxels of a window.
        factor: voxels of the volume per low-resolution voxel.
    """
    benefit_dhw, voxels_dhw = torch.zeros(2, *low_shape, device=slope_S.device)
    channels = len(slope_S) // 3
    slope_T = torch.cat([slope_S[: 2 * channels], slope_S[-2, None]])
    for change in changes:
        benefit_dhw[change.box] += torch.tensordot(slope_T, change.lower_Tdhw, 1)
        voxels_dhw[change.box] += change.voxels_dhw
    return BenefitMap(benefit_dhw / voxels_dhw.clamp_min(1) * math.prod(patch_size), voxels_dhw / math.prod(factor))


@torch.no_grad()
def dice_slope(coarse_logits_Cdhw: Tensor, counts_Ldhw: Tensor, encoding: LabelEncoding) -> Tensor:
    """Slope of minus the mean Dice of the coarse prediction's labels with respect to the sums of `loss_sums`.

    The mean is that of the foreground labels or regions which the volume has.

    Args:
        coarse_logits_Cdhw: coarse logits of the volume.
        counts_Ldhw: voxels of each label in each low-resolution voxel.
        encoding: of the labels.

    Returns:
        float32 vector S.
    """
    targets_Cdhw, voxels_dhw = encoding.targets(counts_Ldhw)
    predicted_Cdhw = encoding.decided(coarse_logits_Cdhw)
    intersection_C = (predicted_Cdhw * targets_Cdhw).flatten(1).sum(1)
    target_C = targets_Cdhw.flatten(1).sum(1)
    total_C = (predicted_Cdhw * voxels_dhw).flatten(1).sum(1) + target_C
    share_C = (target_C > 0).float()
    if not encoding.has_regions:
        share_C[0] = 0
    share_C /= share_C.sum().clamp_min(1)
    slope_intersection_C = -2 * share_C / total_C.clamp_min(1)
    slope_prediction_C = 2 * share_C * intersection_C / total_C.clamp_min(1).square()
    nothing_C = torch.zeros_like(share_C)
    return torch.cat([slope_intersection_C, slope_prediction_C, nothing_C, nothing_C.new_zeros(2)])


def distillation_loss(
    patch_logits_KCDHW: Tensor, starts_K3: Tensor, coarse_logits_Cdhw: Tensor, factor: Shape, encoding: LabelEncoding
) -> Tensor:
    """Cross-entropy of the coarse prediction with what the patches predict on average in each low-resolution voxel.

    Args:
        patch_logits_KCDHW: logits of the windows; they get no gradient.
        starts_K3: first voxels of the windows.
        coarse_logits_Cdhw: coarse logits of the volume.
        factor: voxels of the volume per low-resolution voxel.
        encoding: of the labels.

    Returns:
        Mean over the windows' voxels, scalar.
    """
    p_Cdhw = torch.zeros_like(coarse_logits_Cdhw, dtype=torch.float32)
    voxels_dhw = torch.zeros_like(p_Cdhw[0])
    with torch.no_grad():
        for logits_CDHW, start in zip(patch_logits_KCDHW, starts_K3.tolist(), strict=True):
            logits_CDHW = logits_CDHW.float()
            p_CDHW = logits_CDHW.sigmoid() if encoding.has_regions else logits_CDHW.softmax(0)
            add_to_low_resolution_(p_Cdhw, p_CDHW, start, factor)
            add_to_low_resolution_(voxels_dhw, torch.ones_like(p_CDHW[0]), start, factor)
    cross_entropy = sums_of_targets(coarse_logits_Cdhw, p_Cdhw, voxels_dhw, encoding)[-2]
    return cross_entropy / voxels_dhw.sum()
