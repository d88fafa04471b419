"""What windows were worth: by how much they lower the loss of the fused prediction, and where.

Tensor suffixes:

    C  channels of the logits  d h w  axes of the low-resolution view
    S  loss sums, 3·C + 2 of them: see `loss_sums`
    T  the sums that a prediction changes, 2·C + 1: intersections, predictions, cross-entropy
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_nmsw.selection.sampler import BenefitMap
from nnunet_nmsw.trainers.distributed import sum_over_processes
from nnunet_nmsw.trainers.losses.sums import BoxChange
from nnunet_nmsw.volume.windows import Shape

SCALE_MEMORY = 0.99
"""Weight of the past in the running mean square of measured benefits."""


def benefit_map(
    changes: Sequence[BoxChange], slope_S: Tensor, low_shape: Sequence[int], patch_size: Sequence[int], factor: Shape
) -> BenefitMap:
    """Where windows lower the loss, each on its own against the coarse prediction; their mean where they overlap.

    The loss is made of sums over voxels (`loss_sums`). To first order in these sums each voxel has its part in the
    benefit of a window: `slope_S` times what the window changes in the voxel's summands.

    Args:
        changes: of `fused_loss`.
        slope_S: of `fused_loss`.
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
def updated_scale(scale: Tensor, measured: BenefitMap) -> Tensor:
    """The running root mean square of measured benefits after a step, of the volumes of all processes together.

    All processes have to call this.

    Args:
        scale: before the step, scalar; 0 before the first.
        measured: in the step.
    """
    weight_dhw = measured.weight_dhw
    mean_square = (weight_dhw * measured.benefit_dhw.square()).sum() / weight_dhw.sum().clamp_min(1e-6)
    counts = (weight_dhw.sum() > 0).float()
    mean_squares, volumes = sum_over_processes(torch.stack([mean_square * counts, counts]))
    mean_square = mean_squares / volumes
    mean = SCALE_MEMORY * scale.square() + (1 - SCALE_MEMORY) * mean_square
    mean = torch.where(scale > 0, mean, mean_square)
    # In half precision a step's logits may overflow. nnU-Net skips such a step; the scale has to, too.
    return torch.where(mean_square.isfinite(), mean.sqrt(), scale)
