"""Other ways to fuse patches with the coarse prediction, for networks that were trained with the default's.

They build classes × voxels and are for the ablations only. Tensor suffixes: K windows, C classes, D H W axes of the
volume or of a patch, d h w axes of the low-resolution view.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nnunet_nmsw.model.fusion import FusionWeights, blended_trust, fuse, summed
from nnunet_nmsw.volume.windows import Shape, upsample_window

Fusion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Blended patch logits, coarse logits (C, D, H, W each) and windows' weights (D, H, W) to fused scores (C, D, H, W)."""

Trust = Callable[[Tensor], Tensor]


def confidence(logits_CDHW: Tensor) -> Tensor:
    """1 minus the entropy of a prediction as a share of the largest possible one, shape D, H, W."""
    log_p_CDHW = logits_CDHW.log_softmax(0)
    return 1 + (log_p_CDHW.exp() * log_p_CDHW).sum(0) / math.log(len(logits_CDHW))


def by_confidence(patch_CDHW: Tensor, coarse_CDHW: Tensor, _: Tensor) -> Tensor:
    """Probabilities of both, weighted voxel by voxel with the confidence of each."""
    of_patch_DHW, of_coarse_DHW = confidence(patch_CDHW), confidence(coarse_CDHW)
    weight_DHW = of_patch_DHW / (of_patch_DHW + of_coarse_DHW).clamp_min(1e-6)
    return weight_DHW * patch_CDHW.softmax(0) + (1 - weight_DHW) * coarse_CDHW.softmax(0)


def fusions(weights: FusionWeights) -> dict[str, tuple[Fusion, Trust]]:
    """The ways by name, each with what it makes of the windows' shares of the largest predicted benefit.

    Args:
        weights: those that were trained.
    """

    def by_window(patch_CDHW: Tensor, coarse_CDHW: Tensor, weight_DHW: Tensor) -> Tensor:
        return fuse(patch_CDHW, coarse_CDHW, weights, weight_DHW)

    return {
        "fusion by patch alone": (lambda patch_CDHW, *_: patch_CDHW, torch.ones_like),
        "fusion by mean of logits": (lambda patch_CDHW, coarse_CDHW, _: patch_CDHW + coarse_CDHW, torch.ones_like),
        "fusion by confidence": (by_confidence, torch.ones_like),
        "fusion by window": (by_window, torch.clone),
        "fusion by root": (by_window, torch.sqrt),
    }


def fused_labels(
    fusion: Fusion,
    patch_logits_KCDHW: Tensor,
    starts_K3: Tensor,
    weight_K: Tensor,
    coarse_logits_Cdhw: Tensor,
    volume_shape: Shape,
    factor: Shape,
) -> Tensor:
    """Labels of a fused prediction; where no window is, the coarse prediction's.

    Args:
        fusion: one of `fusions`.
        patch_logits_KCDHW: logits of the windows.
        starts_K3: first voxels of the windows.
        weight_K: of the windows, for the fusion by window.
        coarse_logits_Cdhw: coarse logits of the volume.
        volume_shape: of the volume.
        factor: voxels of the volume per low-resolution voxel.

    Returns:
        int64 labels of shape `volume_shape`.
    """
    patch_size = patch_logits_KCDHW.shape[2:]
    coarse_CDHW = upsample_window(coarse_logits_Cdhw, (0, 0, 0), volume_shape, factor)
    placed = (starts_K3, patch_size, volume_shape, coarse_CDHW.device)
    (total_DHW,) = summed(torch.ones(len(starts_K3), 1, 1, 1, 1), *placed)
    covered_DHW, total_DHW = total_DHW > 0, total_DHW.clamp_min(1e-12)
    patch_CDHW = summed(patch_logits_KCDHW, *placed) / total_DHW
    fused_CDHW = fusion(patch_CDHW, coarse_CDHW, blended_trust(weight_K, *placed))
    return torch.where(covered_DHW, fused_CDHW.argmax(0), coarse_CDHW.argmax(0))
