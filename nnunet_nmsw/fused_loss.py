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
    logits_CV, counts_LV = logits_CV.flatten(1), counts_LV.flatten(1)
    targets_CV, voxels_V = encoding.targets(counts_LV)
    p_CV, cross_entropy_V = encoding.terms(logits_CV, targets_CV, voxels_V)
    return torch.cat(
        [
            (p_CV * targets_CV).sum(1),
            (p_CV * voxels_V).sum(1),
            targets_CV.sum(1),
            cross_entropy_V.sum()[None],
            voxels_V.sum()[None],
        ]
    )


def dice_and_cross_entropy(sums_S: Tensor, encoding: LabelEncoding) -> Tensor:
    """nnU-Net's loss from the sums of `loss_sums`: `DC_and_CE_loss` without background in the Dice, or, with regions,
    `DC_and_BCE_loss`; both with a smoothing of 1e-5."""
    intersection_C, prediction_C, target_C = sums_S[:-2].view(3, -1)
    cross_entropy, voxels = sums_S[-2:]
    dice_C = (2 * intersection_C + DICE_SMOOTH) / (target_C + prediction_C + DICE_SMOOTH).clamp_min(1e-8)
    return cross_entropy / voxels.clamp_min(1) - dice_C[0 if encoding.has_regions else 1 :].mean()


class LabelledWindow:
    """The reference of one window, and sums over its voxels.

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
            terms: of the window's prediction.
            share_DHW: what a voxel weighs.
            counts_Ldhw: those weights by label and low-resolution voxel.
        """
        encoding = self.encoding
        weight_DHW = share_DHW * self.counted_DHW
        weight_V = weight_DHW.flatten()
        target_C, voxels = encoding.targets(counts_Ldhw.flatten(1).sum(1))
        if encoding.has_regions:
            intersection_C = terms.hits_XV.flatten(1) @ weight_V
        else:
            hits_Ldhw = self.label_sums(terms.hits_XV[0] * weight_DHW)
            intersection_C = hits_Ldhw.flatten(1).sum(1)[: encoding.num_channels]
        prediction_C = terms.probability_CV.flatten(1) @ weight_V
        cross_entropy = terms.cross_entropy_V.flatten() @ weight_V
        return torch.cat([intersection_C, prediction_C, target_C, cross_entropy[None], voxels[None]])

    @torch.no_grad()
    def add_change_(self, change_Tdhw: Tensor, before: VoxelTerms, after: VoxelTerms) -> None:
        """Add what the sums of all that counts have less after than before, each low-resolution voxel its own."""
        channels, ignores = self.encoding.num_channels, self.encoding.ignore_label is not None
        hits_XDHW = (before.hits_XV - after.hits_XV) * self.counted_DHW
        if self.encoding.has_regions:
            add_to_low_resolution_(change_Tdhw[:channels], hits_XDHW, self.start, self.factor)
        else:
            box = self.label_sums.box
            change_Tdhw[:channels][(slice(None), *box)] += self.label_sums(hits_XDHW[0])[:channels]
        probability_CDHW = before.probability_CV - after.probability_CV
        if ignores:
            probability_CDHW *= self.counted_DHW
        add_to_low_resolution_(change_Tdhw[channels:-1], probability_CDHW, self.start, self.factor)
        cross_entropy_DHW = (before.cross_entropy_V - after.cross_entropy_V) * self.counted_DHW
        add_to_low_resolution_(change_Tdhw[-1], cross_entropy_DHW, self.start, self.factor)


class WindowChanges(NamedTuple):
    """What the windows do to the sums of `loss_sums`, each on its own against the coarse prediction.

    Attributes:
        lower_Tdhw: by how much the windows lower the sums, those of several windows added.
        voxels_dhw: voxels that windows cover and that are not ignored, those of several windows added.
    """

    lower_Tdhw: Tensor
    voxels_dhw: Tensor


class FusedLoss(NamedTuple):
    """Loss of the fused prediction of a whole volume.

    Attributes:
        loss: nnU-Net's loss, scalar.
        benefit_K: by how much each fused window lowers it against the coarse prediction there, all others as they are
            (first order in the sums; detached).
        slope_S: derivative of the loss with respect to the sums of `loss_sums`; detached.
        changes: of all windows, for `benefit_map`; detached.
    """

    loss: Tensor
    benefit_K: Tensor
    slope_S: Tensor
    changes: WindowChanges


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
    rest_Ldhw = counts_Ldhw.clone()
    lower_Tdhw = torch.zeros(2 * encoding.num_channels + 1, *coarse_logits_Cdhw.shape[1:], device=device)
    voxels_dhw = torch.zeros_like(lower_Tdhw[0])
    with_window, without_window = [], []
    # Unbound at once: the gradient of `patch_logits_KCDHW[window]` would be as large as all of them, for each window.
    patches = enumerate(zip(patch_logits_KCDHW.unbind(), starts_K3.tolist(), strict=True))
    for window, (patch_logits_CDHW, start) in patches:
        reference = LabelledWindow(labels_KDHW[window], start, factor, encoding)
        coarse_CDHW = upsample_window(coarse_logits_Cdhw, start, patch_size, factor)
        fused_CDHW = fuse(patch_logits_CDHW.float(), coarse_CDHW, weights)
        if logits_weight_K is not None and window < num_fused:
            fused_CDHW = coarse_CDHW + logits_weight_K[window] * (fused_CDHW - coarse_CDHW)
        after = encoding.voxel_terms(fused_CDHW, reference.labels_DHW)
        with torch.no_grad():
            before = encoding.voxel_terms(coarse_CDHW, reference.labels_DHW)
        if window < num_fused:
            counts_of_window_Ldhw = reference.label_sums(shares_KDHW[window])
            rest_Ldhw[(slice(None), *reference.label_sums.box)] -= counts_of_window_Ldhw
            with_window.append(reference.sums(after, shares_KDHW[window], counts_of_window_Ldhw))
            without_window.append(reference.sums(before, shares_KDHW[window], counts_of_window_Ldhw))
        if changes_of_labels:
            before, after = (
                encoding.voxel_terms(logits_CDHW.detach(), reference.labels_DHW, decided=True)
                for logits_CDHW in (coarse_CDHW, fused_CDHW)
            )
        reference.add_change_(lower_Tdhw, before, after)
        add_to_low_resolution_(voxels_dhw, reference.counted_DHW, start, factor)

    with torch.no_grad():
        # The counts of a rotated volume are interpolated, those of its windows are not: what windows do not cover keeps
        # its number of voxels, and nothing counts twice.
        left_dhw = rest_Ldhw.sum(0).clamp_min(0)
        rest_Ldhw.clamp_min_(0)
        rest_Ldhw *= left_dhw / rest_Ldhw.sum(0).clamp_min(1e-6)
        rest_S = loss_sums(coarse_logits_Cdhw.detach(), rest_Ldhw, encoding)

    difference_KS = torch.stack(with_window) - torch.stack(without_window)
    if window_weight_K is None:
        window_weight_K = torch.ones(num_fused, device=device)
    sums_S = rest_S + torch.stack(without_window).sum(0) + window_weight_K @ difference_KS
    with torch.enable_grad():
        leaf_S = sums_S.detach().requires_grad_()
        (slope_S,) = torch.autograd.grad(dice_and_cross_entropy(leaf_S, encoding), leaf_S)
    return FusedLoss(
        dice_and_cross_entropy(sums_S, encoding),
        -difference_KS.detach() @ slope_S,
        slope_S,
        WindowChanges(lower_Tdhw, voxels_dhw),
    )


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


def benefit_map(changes: WindowChanges, slope_S: Tensor, patch_size: Sequence[int], factor: Shape) -> BenefitMap:
    """Where windows lower the loss, each on its own against the coarse prediction; their mean where they overlap.

    The loss is made of sums over voxels (`loss_sums`). To first order in these sums each voxel has its part in the
    benefit of a window: `slope_S` times what the window changes in the voxel's summands.

    Args:
        changes: of `fused_loss`.
        slope_S: of `fused_loss`, or `dice_slope`.
        patch_size: voxels of a window.
        factor: voxels of the volume per low-resolution voxel.
    """
    channels = len(changes.lower_Tdhw) // 2
    slope_T = torch.cat([slope_S[: 2 * channels], slope_S[-2, None]])
    lower_dhw = torch.tensordot(slope_T, changes.lower_Tdhw, 1)
    voxels_dhw = changes.voxels_dhw
    return BenefitMap(lower_dhw / voxels_dhw.clamp_min(1) * math.prod(patch_size), voxels_dhw / math.prod(factor))


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
    _, cross_entropy_dhw = encoding.terms(coarse_logits_Cdhw, p_Cdhw, voxels_dhw)
    return cross_entropy_dhw.sum() / voxels_dhw.sum()
