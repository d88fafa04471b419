"""Fusing patch predictions with the coarse one.

Tensor suffixes: C channels of the logits, D H W axes of a box.

A channel stands for a label or, in region-based training, for a region: see `LabelEncoding`.

Inside windows, the fused logits of class c are a_c · patch + b_c · coarse + d_c, overlapping patches averaged with
nnU-Net's Gaussian; elsewhere they are the upsampled coarse logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

INITIAL_CLASS_WEIGHT = 2.0
"""Patches start with a weight of sigmoid(2) = 0.88: a trained patch is mostly right where coarse is unsure."""


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
        """w · patch + (1 - w) · coarse."""
        return cls(patch_C, 1 - patch_C, torch.zeros_like(patch_C))

    def to(self, device: torch.device) -> FusionWeights:
        """A copy on a device: they may be views of a network's parameters, which get the values of other folds."""
        return FusionWeights(*torch.stack(list(self)).to(device))

    def of_class(self, label: int) -> FusionWeights:
        """Those of one class, with a class axis of one."""
        return FusionWeights(*(part[label, None] for part in self))


class FusionForm(NamedTuple):
    """What learned parameters make of patches and the coarse prediction.

    Attributes:
        rows: parameters by class, which start at 0.
        weights: the weights, of parameters of shape `rows`, C.
    """

    rows: int
    weights: Callable[[Tensor], FusionWeights]


def affine_weights(parameters_3C: Tensor) -> FusionWeights:
    """Three free weights by class. Parameters are what they differ by from where they start."""
    weight = float(torch.sigmoid(torch.tensor(INITIAL_CLASS_WEIGHT)))
    return FusionWeights(weight + parameters_3C[0], 1 - weight + parameters_3C[1], parameters_3C[2])


def class_weights(parameters_1C: Tensor) -> FusionWeights:
    """w · patch + (1 - w) · coarse with a weight w between 0 and 1 by class, the paper's fusion."""
    return FusionWeights.convex(torch.sigmoid(INITIAL_CLASS_WEIGHT + parameters_1C[0]))


AFFINE = FusionForm(3, affine_weights)
CLASS_WEIGHTS = FusionForm(1, class_weights)


def fuse(patch_logits_CDHW: Tensor, coarse_logits_CDHW: Tensor, weights: FusionWeights) -> Tensor:
    """Fused logits, the weights broadcast over the trailing axes."""
    patch, coarse, bias = (part.view(-1, 1, 1, 1) for part in weights)
    return torch.addcmul(torch.addcmul(bias, coarse, coarse_logits_CDHW), patch, patch_logits_CDHW)


def gaussian_weights(patch_size: Sequence[int], device: torch.device) -> Tensor:
    """nnU-Net's importance of a patch's voxels, float32, shape `patch_size`.

    As nnU-Net has it, of half precision: corners, which are smaller, have the smallest number there is.
    """
    gaussian: Tensor = compute_gaussian(tuple(patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
    return gaussian.float()
