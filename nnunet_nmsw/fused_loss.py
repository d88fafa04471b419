"""The loss of the fused prediction of a whole volume, without ever building it.

Tensor suffixes:

    C  channels of the logits  D H W  axes of the volume, or of a patch
    L  labels                  d h w  axes of the low-resolution view
    K  windows                 N      some low-resolution voxels
    S  loss sums, 3·C + 2 of them: see `loss_sums`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.geometry import Shape, add_to_low_resolution_, surroundings, upsample_window
from nnunet_nmsw.labels import LabelEncoding
from nnunet_nmsw.loss_sums import (
    BoxChange,
    LabelledBox,
    computed_again,
    dice_and_cross_entropy,
    loss_sums,
    most_voxels,
    sums_of_targets,
)


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
    changes_of: str | None = "probabilities",
) -> FusedLoss:
    """Loss of the fused prediction of a volume, without its canvas.

    Sums over the windows at full resolution are added to sums over the rest at low resolution, where the prediction is
    the coarse one, constant over each low-resolution voxel and detached. Both are exact, so that for windows that do
    not overlap the loss is that of the full canvas. Where they overlap, every voxel still counts once, its loss being
    the mean of the windows' losses with the blending weights instead of the loss of the blended logits. Cross-entropy
    is convex in the logits, hence never smaller than the canvas's.

    Nothing of the size of logits is kept for the gradient but the logits: it is computed again, part by part.

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
        changes_of: compare "probabilities" or predicted "labels" in the changes; None for no changes.
    """
    num_fused = len(starts_K3) if num_fused is None else num_fused
    patch_size, device = patch_logits_KCDHW.shape[2:], coarse_logits_Cdhw.device
    shares_KDHW = window_shares(starts_K3[:num_fused], patch_size, device)
    depth = max(1, most_voxels(patch_logits_KCDHW[0]) // math.prod(patch_size[1:]))
    covered_Ldhw, changes = torch.zeros_like(counts_Ldhw), []
    with_window, without_window = [], []
    # Unbound, split, and cut out once: the gradient of each slice is as large as what it is a slice of.
    for window, (patch_CDHW, start) in enumerate(zip(patch_logits_KCDHW.unbind(), starts_K3.tolist(), strict=True)):
        fused = window < num_fused
        if not fused and changes_of is None:
            break
        coarse_Cdhw, origin = surroundings(coarse_logits_Cdhw, start, patch_size, factor)
        for part, logits_CDHW in enumerate(patch_CDHW.split(depth, 1)):
            slab = slice(part * depth, (part + 1) * depth)
            reference = LabelledBox(labels_KDHW[window, slab], (start[0] + slab.start, *start[1:]), factor, encoding)
            weighted = None
            if fused:
                share_DHW = shares_KDHW[window, slab]
                counts_of_part_Ldhw = reference.label_sums(share_DHW)
                covered_Ldhw[(slice(None), *reference.label_sums.box)] += counts_of_part_Ldhw
                weighted = (share_DHW, counts_of_part_Ldhw)
            logits_weight = logits_weight_K[window] if fused and logits_weight_K is not None else None
            compare = partial(_compared, origin=origin, reference=reference, weighted=weighted, changes_of=changes_of)
            with torch.set_grad_enabled(fused and torch.is_grad_enabled()):
                sums, change = computed_again(compare, logits_CDHW, coarse_Cdhw, weights, logits_weight)
            if change is not None:
                changes.append(change)
            if sums is not None:
                with_window.append(sums[0])
                without_window.append(sums[1])

    coarse_S = loss_sums(coarse_logits_Cdhw, counts_Ldhw, encoding)
    # No less than nothing, where windows cover all that the coarse prediction has of a class.
    rest_S = coarse_S.detach() + _without_covered(coarse_logits_Cdhw.detach(), counts_Ldhw, covered_Ldhw, encoding)
    rest_S = rest_S.clamp_min(0)
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


def _compared(
    patch_logits_CDHW: Tensor,
    coarse_logits_Cdhw: Tensor,
    weights: FusionWeights,
    logits_weight: Tensor | None,
    origin: tuple[int, int, int],
    reference: LabelledBox,
    weighted: tuple[Tensor, Tensor] | None,
    changes_of: str | None,
) -> tuple[tuple[Tensor, Tensor] | None, BoxChange | None]:
    """The fused against the coarse prediction in one box.

    Args:
        patch_logits_CDHW: logits of the box.
        coarse_logits_Cdhw: coarse logits around it.
        weights: of the fusion.
        logits_weight: see `fused_loss`.
        origin: the voxel of the volume at which the coarse logits begin.
        reference: of the box.
        weighted: what its voxels weigh, and that by label and low-resolution voxel.
        changes_of: see `fused_loss`.

    Returns:
        Where weights are given, the sums of the fused and of the coarse prediction; and where they are asked for, the
        changes, without weights.
    """
    encoding, labels_DHW = reference.encoding, reference.labels_DHW
    start = [a - b for a, b in zip(reference.start, origin, strict=True)]
    coarse_CDHW = upsample_window(coarse_logits_Cdhw, start, labels_DHW.shape, reference.factor)
    fused_CDHW = fuse(patch_logits_CDHW.float(), coarse_CDHW, weights)
    if logits_weight is not None:
        fused_CDHW = coarse_CDHW + logits_weight * (fused_CDHW - coarse_CDHW)
    after = encoding.voxel_terms(fused_CDHW, labels_DHW)
    with_S = reference.sums(after, *weighted) if weighted is not None else None
    with torch.no_grad():  # after what has a gradient, which is all that is computed again
        before, change = encoding.voxel_terms(coarse_CDHW, labels_DHW), None
        without_S = reference.sums(before, *weighted) if weighted is not None else None
        if changes_of == "labels":
            before, after = (
                encoding.voxel_terms(logits_CDHW, labels_DHW, decided=True) for logits_CDHW in (coarse_CDHW, fused_CDHW)
            )
        if changes_of is not None:
            change = reference.change(before, after)
    return None if with_S is None or without_S is None else (with_S, without_S), change


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
