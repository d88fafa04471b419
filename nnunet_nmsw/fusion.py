"""Fusing patch predictions with the coarse one.

Tensor suffixes:

    C  channels of the logits  D H W  axes of the volume, or of a patch
    K  chosen windows          d h w  axes of the low-resolution view

A channel stands for a label or, in region-based training, for a region: see `LabelEncoding`.

Inside windows, the fused logits of class c are a_c · patch + b_c · coarse + d_c, overlapping patches averaged with
nnU-Net's Gaussian; elsewhere they are the upsampled coarse logits. At inference, the difference between the two is
multiplied with the trust in the windows, averaged in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

from nnunet_nmsw.geometry import Shape, upsample_window, window_slices
from nnunet_nmsw.labels import LabelEncoding


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
        coarse_1DHW = upsample_window(coarse_dhw[None], offset, size, factor).to(device)
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
