"""What windows were worth: by how much they lower the loss of the fused prediction, and where.

Tensor suffixes:

    C  channels of the logits  d h w  axes of the low-resolution view
    L  labels
    S  loss sums, 3·C + 2 of them: see `loss_sums`
    T  those of them that a prediction changes, 2·C + 1: intersections, predictions, cross-entropy
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.geometry import Shape
from nnunet_nmsw.labels import LabelEncoding
from nnunet_nmsw.loss_sums import BoxChange


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
