"""Fusing patch predictions with the coarse one, and the loss of the result without ever building it.

Tensor suffixes:

    C  channels of the logits  D H W  axes of the volume, or of a patch
    L  labels
    K  chosen windows          d h w  axes of the low-resolution view
    V  voxels, any shape       S      loss sums, 3·C + 2 of them: see `loss_sums`

A channel stands for a label or, in region-based training, for a region: see `LabelEncoding`.

Inside windows, the fused logits of class c are a_c · patch + b_c · coarse + d_c, overlapping patches averaged with
nnU-Net's Gaussian; elsewhere they are the upsampled coarse logits. At inference, the difference between the two is
multiplied with the trust in the windows, averaged in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

from nnunet_nmsw.geometry import (
    Shape,
    add_to_low_resolution_,
    upsample_window,
    window_slices,
)
from nnunet_nmsw.labels import LabelEncoding

DICE_SMOOTH = 1e-5
"""nnU-Net's smoothing of the soft Dice."""


class FusionWeights(NamedTuple):
    """How patches and the coarse prediction make the fused one, by class.

    Attributes:
        patch_C: factor of the patch's logits.
        coarse_C: factor of the coarse logits.
        bias_C: what is added.
    """

    patch_C: Tensor
    coarse_C: Tensor
    bias_C: Tensor

    @classmethod
    def convex(cls, patch_C: Tensor) -> FusionWeights:
        """w · patch + (1 - w) · coarse, the paper's fusion."""
        return cls(patch_C, 1 - patch_C, torch.zeros_like(patch_C))

    def to(self, device: torch.device) -> FusionWeights:
        """The same on a device."""
        return FusionWeights(*(part.to(device) for part in self))

    def of_class(self, label: int) -> FusionWeights:
        """Those of one class, with a class axis of one."""
        return FusionWeights(*(part[label, None] for part in self))


def fuse(
    patch_logits_CDHW: Tensor, coarse_logits_CDHW: Tensor, weights: FusionWeights, trust_DHW: Tensor | None = None
) -> Tensor:
    """Fused logits, the weights broadcast over the trailing axes; full trust where None."""
    patch, coarse, bias = (part.view(-1, 1, 1, 1) for part in weights)
    fused_CDHW = torch.addcmul(torch.addcmul(bias, coarse, coarse_logits_CDHW), patch, patch_logits_CDHW)
    return fused_CDHW if trust_DHW is None else torch.lerp(coarse_logits_CDHW, fused_CDHW, trust_DHW)


def gaussian_weights(patch_size: Sequence[int], device: torch.device) -> Tensor:
    """nnU-Net's importance of a patch's voxels, float32, shape `patch_size`.

    As nnU-Net has it, of half precision: corners, which are smaller, have the smallest number there is.
    """
    gaussian: Tensor = compute_gaussian(tuple(patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
    return gaussian.float()


def summed(
    values_KCDHW: Tensor, starts_K3: Tensor, patch_size: Sequence[int], volume_shape: Shape, device: torch.device
) -> Tensor:
    """Sum over windows of their values times nnU-Net's Gaussian; 0 where no window is.

    Args:
        values_KCDHW: by window; axes of a patch may have length 1 where a window has one value.
        starts_K3: first voxels of the windows.
        patch_size: voxels of a window.
        volume_shape: of the volume.
        device: of the result.

    Returns:
        float32 of shape C, `volume_shape`.
    """
    gaussian_DHW = gaussian_weights(patch_size, device)
    sums_CDHW = torch.zeros(values_KCDHW.shape[1], *volume_shape, device=device)
    for start, values_CDHW in zip(starts_K3.tolist(), values_KCDHW, strict=True):
        sums_CDHW[(slice(None), *window_slices(start, patch_size))] += gaussian_DHW * values_CDHW.to(device).float()
    return sums_CDHW


def blended_trust(
    trust_K: Tensor, starts_K3: Tensor, patch_size: Sequence[int], volume_shape: Shape, device: torch.device
) -> Tensor:
    """The trust in the windows over each voxel, averaged with nnU-Net's Gaussian; 0 where no window is.

    Args:
        trust_K: of the windows.
        starts_K3: first voxels of the windows.
        patch_size: voxels of a window.
        volume_shape: of the volume.
        device: of the result.

    Returns:
        float32 of shape `volume_shape`.
    """
    values_K2111 = torch.stack([trust_K, torch.ones_like(trust_K)], 1)[..., None, None, None]
    trust_DHW, total_DHW = summed(values_K2111, starts_K3, patch_size, volume_shape, device)
    return trust_DHW / total_DHW.clamp_min(torch.finfo(torch.float32).tiny)


def fuse_volume_(
    patch_logits_CDHW: Tensor,
    coarse_logits_Cdhw: Tensor,
    trust_DHW: Tensor,
    weights: FusionWeights,
    offset: Sequence[int],
    factor: Shape,
) -> Tensor:
    """Fuse a volume of blended patch logits with the coarse prediction, in place and class by class.

    Args:
        patch_logits_CDHW: blended patch logits; anything (NaN included) where no window is.
        coarse_logits_Cdhw: coarse logits.
        trust_DHW: of `blended_trust`, 0 where no window is.
        weights: of the fusion.
        offset: voxel of the coarse prediction's volume at which the volume begins.
        factor: voxels of the volume per low-resolution voxel.

    Returns:
        `patch_logits_CDHW`.
    """
    size = patch_logits_CDHW.shape[1:]
    device = patch_logits_CDHW.device
    for label, (patch_DHW, coarse_dhw) in enumerate(zip(patch_logits_CDHW, coarse_logits_Cdhw, strict=True)):
        coarse_1DHW = upsample_window(coarse_dhw[None, None].float(), offset, size, factor)[0].to(device)
        fused_1DHW = fuse(patch_DHW[None].float(), coarse_1DHW, weights.of_class(label).to(device), trust_DHW)
        patch_DHW.copy_(torch.where(trust_DHW > 0, fused_1DHW, coarse_1DHW)[0])
    return patch_logits_CDHW


def fused_segmentation(
    patch_logits_KCDHW: Tensor,
    starts_K3: Tensor,
    trust_K: Tensor,
    coarse_logits_Cdhw: Tensor,
    weights: FusionWeights,
    volume_shape: Shape,
    factor: Shape,
    encoding: LabelEncoding,
) -> Tensor:
    """Labels of the fused prediction of a volume, one class at a time: no volume × classes is built.

    Returns:
        int64 labels of shape `volume_shape`.
    """
    patch_size, device = patch_logits_KCDHW.shape[2:], coarse_logits_Cdhw.device
    total_1DHW = summed(torch.ones(len(starts_K3), 1, 1, 1, 1), starts_K3, patch_size, volume_shape, device)
    trust_DHW = blended_trust(trust_K, starts_K3, patch_size, volume_shape, device)
    best_DHW = torch.full(volume_shape, -torch.inf, device=device)
    labels_DHW = torch.zeros(volume_shape, dtype=torch.int64, device=device)
    for label, coarse_dhw in enumerate(coarse_logits_Cdhw):
        patches_1DHW = summed(patch_logits_KCDHW[:, label, None], starts_K3, patch_size, volume_shape, device)
        patches_1DHW /= total_1DHW
        logits_DHW = fuse_volume_(
            patches_1DHW, coarse_dhw[None], trust_DHW, weights.of_class(label), (0, 0, 0), factor
        )[0]
        if encoding.has_regions:
            labels_DHW[logits_DHW > 0] = encoding.regions_class_order[label]
            continue
        better_DHW = logits_DHW > best_DHW
        best_DHW = torch.where(better_DHW, logits_DHW, best_DHW)
        labels_DHW[better_DHW] = label
    return labels_DHW


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


class FusedLoss(NamedTuple):
    """Loss of the fused prediction of a whole volume.

    Attributes:
        loss: nnU-Net's loss, scalar.
        benefit_K: by how much each window lowers it against the coarse prediction there, all others as they are
            (first order in the sums; detached).
        slope_S: derivative of the loss with respect to the sums of `loss_sums`; detached.
    """

    loss: Tensor
    benefit_K: Tensor
    slope_S: Tensor


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
        window_weight_K: a factor of 1 in value on the difference that each window makes to the sums. Its gradient is
            minus the window's benefit; this is how scores are trained.
        logits_weight_K: a factor of 1 in value on the difference that each window makes to the logits, another way.
    """
    patch_size = patch_logits_KCDHW.shape[2:]
    shares_KDHW = window_shares(starts_K3, patch_size, coarse_logits_Cdhw.device)
    rest_Ldhw = counts_Ldhw.clone()
    with_window, without_window = [], []
    for window, start in enumerate(starts_K3.tolist()):
        counts_LDHW = encoding.one_hot(labels_KDHW[window]) * shares_KDHW[window]
        coarse_CDHW = upsample_window(coarse_logits_Cdhw[None].float(), start, patch_size, factor)[0]
        fused_CDHW = fuse(patch_logits_KCDHW[window].float(), coarse_CDHW, weights)
        if logits_weight_K is not None:
            fused_CDHW = coarse_CDHW + logits_weight_K[window] * (fused_CDHW - coarse_CDHW)
        with_window.append(loss_sums(fused_CDHW, counts_LDHW, encoding))
        with torch.no_grad():
            without_window.append(loss_sums(coarse_CDHW, counts_LDHW, encoding))
            add_to_low_resolution_(rest_Ldhw, -counts_LDHW, start, factor)

    with torch.no_grad():
        # The counts of a rotated volume are interpolated, those of its windows are not: what windows do not cover keeps
        # its number of voxels, and nothing counts twice.
        left_dhw = rest_Ldhw.sum(0).clamp_min(0)
        rest_Ldhw.clamp_min_(0)
        rest_Ldhw *= left_dhw / rest_Ldhw.sum(0).clamp_min(1e-6)
        rest_S = loss_sums(coarse_logits_Cdhw.detach(), rest_Ldhw, encoding)

    difference_KS = torch.stack(with_window) - torch.stack(without_window)
    if window_weight_K is None:
        window_weight_K = torch.ones(len(starts_K3), device=labels_KDHW.device)
    sums_S = rest_S + torch.stack(without_window).sum(0) + window_weight_K @ difference_KS
    with torch.enable_grad():
        leaf_S = sums_S.detach().requires_grad_()
        (slope_S,) = torch.autograd.grad(dice_and_cross_entropy(leaf_S, encoding), leaf_S)
    return FusedLoss(dice_and_cross_entropy(sums_S, encoding), -difference_KS.detach() @ slope_S, slope_S)


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


@torch.no_grad()
def benefit_map(
    patch_logits_KCDHW: Tensor,
    starts_K3: Tensor,
    coarse_logits_Cdhw: Tensor,
    labels_KDHW: Tensor,
    weights: FusionWeights,
    factor: Shape,
    encoding: LabelEncoding,
    slope_S: Tensor,
    of_labels: bool = False,
) -> BenefitMap:
    """Where windows lower the loss, each on its own against the coarse prediction; their mean where they overlap.

    The loss is made of sums over voxels (`loss_sums`). To first order in these sums each voxel has its part in the
    benefit of a window: `slope_S` times what the window changes in the voxel's summands.

    Args:
        patch_logits_KCDHW: logits of the windows.
        starts_K3: first voxels of the windows.
        coarse_logits_Cdhw: coarse logits of the volume.
        labels_KDHW: integer labels of the windows.
        weights: of the fusion.
        factor: voxels of the volume per low-resolution voxel.
        encoding: of the labels.
        slope_S: of `fused_loss`, or `dice_slope`.
        of_labels: compare predicted labels instead of probabilities.
    """
    patch_size = patch_logits_KCDHW.shape[2:]
    slope_intersection_C, slope_prediction_C, _ = slope_S[:-2].view(3, -1)
    slope_cross_entropy = slope_S[-2]

    def part_of_loss(logits_CDHW: Tensor, targets_CDHW: Tensor, counts_DHW: Tensor) -> Tensor:
        p_CDHW, cross_entropy_DHW = encoding.terms(logits_CDHW, targets_CDHW, counts_DHW)
        if of_labels:
            p_CDHW = encoding.decided(logits_CDHW)
        return (
            torch.tensordot(slope_prediction_C, p_CDHW, 1) * counts_DHW
            + torch.tensordot(slope_intersection_C, p_CDHW * targets_CDHW, 1)
            + slope_cross_entropy * cross_entropy_DHW
        )

    benefit_dhw = torch.zeros(coarse_logits_Cdhw.shape[1:], device=coarse_logits_Cdhw.device)
    voxels_dhw = torch.zeros_like(benefit_dhw)
    for window, start in enumerate(starts_K3.tolist()):
        targets_CDHW, counts_DHW = encoding.targets(encoding.one_hot(labels_KDHW[window]))
        coarse_CDHW = upsample_window(coarse_logits_Cdhw[None].float(), start, patch_size, factor)[0]
        fused_CDHW = fuse(patch_logits_KCDHW[window].float(), coarse_CDHW, weights)
        before_DHW, after_DHW = (
            part_of_loss(logits_CDHW, targets_CDHW, counts_DHW) for logits_CDHW in (coarse_CDHW, fused_CDHW)
        )
        add_to_low_resolution_(benefit_dhw, before_DHW - after_DHW, start, factor)
        add_to_low_resolution_(voxels_dhw, counts_DHW, start, factor)
    return BenefitMap(benefit_dhw / voxels_dhw.clamp_min(1) * math.prod(patch_size), voxels_dhw / math.prod(factor))


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
