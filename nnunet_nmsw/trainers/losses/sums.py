"""The sums over voxels that nnU-Net's loss is made of, and what windows change in them.

Tensor suffixes:

    C  channels of the logits  D H W  axes of the volume, or of a patch
    L  labels                  d h w  axes of the low-resolution view
    V  voxels, any shape       X      C where channels are regions, one where they are labels
    S  loss sums, 3·C + 2 of them: see `loss_sums`
    T  those of them that a prediction changes, 2·C + 1: intersections, predictions, cross-entropy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnunet_nmsw.volume.label_counts import LabelSums, add_to_low_resolution_
from nnunet_nmsw.volume.labels import LabelEncoding, VoxelTerms
from nnunet_nmsw.volume.windows import Shape

DICE_SMOOTH = 1e-5
"""nnU-Net's smoothing of the soft Dice."""

MOST_VALUES = 2**23 - 2**10
"""Of a tensor on a CPU, where it can be helped: glibc maps larger ones (32 MiB) anew each time they are made, and that
takes longer than to compute them."""

MOST_VALUES_ELSEWHERE = 2**26
"""On a GPU: 256 MiB a tensor."""


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
    targets_CV, voxels_V = encoding.targets(counts_LV)
    number = most_voxels(logits_CV)
    parts = zip(
        logits_CV.flatten(1).split(number, 1),
        targets_CV.flatten(1).split(number, 1),
        voxels_V.flatten()[None].split(number, 1),
        strict=True,
    )
    return torch.stack([computed_again(_sums_of_part, *part, encoding) for part in parts]).sum(0)


def _sums_of_part(logits_CV: Tensor, targets_CV: Tensor, voxels_1V: Tensor, encoding: LabelEncoding) -> Tensor:
    probability_CV, log_likelihood_CV, common_V = encoding.prediction(logits_CV)
    return torch.cat(
        [
            (probability_CV * targets_CV).sum(1),
            (probability_CV * voxels_1V).sum(1),
            targets_CV.sum(1),
            (common_V * voxels_1V - (log_likelihood_CV * targets_CV).sum(0)).sum(1),
            voxels_1V.sum(1),
        ]
    )


def computed_again(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result, of which nothing is kept for the gradient but the arguments."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def most_voxels(logits_CV: Tensor) -> int:
    """Voxels to handle at once, for tensors of classes × voxels that are no larger than they should be."""
    most_values = MOST_VALUES if logits_CV.device.type == "cpu" else MOST_VALUES_ELSEWHERE
    return max(1, most_values // len(logits_CV))


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

    `loss_sums` of the one-hot target has the same result; but a voxel holds one label, which is looked up instead.

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
