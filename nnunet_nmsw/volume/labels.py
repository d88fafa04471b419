"""What labels mean: plain labels or overlapping regions, with or without an ignore label.

Tensor suffixes: L labels (the ignore label included), C channels of the logits, V voxels, any shape, X as C where
channels are regions and one where they are labels.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_nmsw.transfer import sent


class Prediction(NamedTuple):
    """What the sums that nnU-Net's loss is made of need of logits.

    Attributes:
        probability_CV: by channel.
        log_likelihood_CV: the cross-entropy of a voxel is `common_V` for the share of it that counts, minus this times
            what it holds of each channel.
        common_V: see there; scalar 0 where channels are labels.
    """

    probability_CV: Tensor
    log_likelihood_CV: Tensor
    common_V: Tensor


class VoxelTerms(NamedTuple):
    """What voxels of one label each put into these sums.

    Attributes:
        probability_CV: by channel.
        hits_XV: the probability in the channels that hold the voxel's label. Where channels are labels that is one
            channel for each voxel, and X = 1; where they are regions X = C, with 0 for those that do not hold it.
        cross_entropy_V: that of nnU-Net's loss, where it is summed over all that counts and divided by their number.
    """

    probability_CV: Tensor
    hits_XV: Tensor
    cross_entropy_V: Tensor


@dataclasses.dataclass(frozen=True)
class LabelEncoding:
    """How a dataset's labels become targets, and logits become labels.

    Attributes:
        num_labels: the labels are 0 to this minus one; the ignore label is one of them.
        ignore_label: voxels of this label do not count; None where there is none.
        regions: the labels that each channel of the logits stands for; None where a channel stands for one label.
        regions_class_order: label that each region gives its voxels, later ones over earlier ones.
    """

    num_labels: int
    ignore_label: int | None = None
    regions: tuple[tuple[int, ...], ...] | None = None
    regions_class_order: tuple[int, ...] = ()

    @classmethod
    def of(cls, manager: LabelManager) -> LabelEncoding:
        """That of a dataset."""
        num_labels = max(manager.all_labels) + 1 + manager.has_ignore_label
        if not manager.has_regions:
            return cls(num_labels, manager.ignore_label)
        regions = tuple(tuple(r) if isinstance(r, tuple | list) else (int(r),) for r in manager.foreground_regions)
        return cls(num_labels, manager.ignore_label, regions, tuple(manager.regions_class_order))

    @property
    def has_regions(self) -> bool:
        """Channels are regions, each with its own sigmoid."""
        return self.regions is not None

    @property
    def foreground_labels(self) -> list[int]:
        """The labels but the background and the ignore label."""
        return list(range(1, self.num_labels - (self.ignore_label is not None)))

    @property
    def num_channels(self) -> int:
        """Channels of the logits."""
        if self.regions is not None:
            return len(self.regions)
        return self.num_labels - (self.ignore_label is not None)

    def membership(self, device: torch.device) -> Tensor:
        """1 where a channel holds a label, float32 of shape C, L; nothing holds the ignore label."""
        return _membership(self, device)

    def targets(self, counts_LV: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each channel a voxel holds (C, V), and how much of it counts (V), from that of each label."""
        counted_LV = counts_LV if self.ignore_label is None else counts_LV[: self.ignore_label]
        voxels_V = counted_LV.sum(0)
        if self.regions is None:
            return counted_LV, voxels_V
        return torch.tensordot(self.membership(counts_LV.device)[:, : len(counted_LV)], counted_LV, 1), voxels_V

    def prediction(self, logits_CV: Tensor) -> Prediction:
        """What logits say of each channel."""
        logits_CV = logits_CV.float()
        if not self.has_regions:
            log_p_CV = logits_CV.log_softmax(0)
            return Prediction(log_p_CV.exp(), log_p_CV, torch.zeros((), device=logits_CV.device))
        # nnU-Net takes the mean of the binary cross-entropy over regions, but with an ignore label its sum.
        scale = 1 / len(logits_CV) if self.ignore_label is None else 1.0
        return Prediction(logits_CV.sigmoid(), scale * logits_CV, scale * F.softplus(logits_CV).sum(0))

    def voxel_terms(self, logits_CV: Tensor, labels_V: Tensor) -> VoxelTerms:
        """What voxels that hold one label each put into the sums; ignored ones have some finite numbers.

        Args:
            logits_CV: logits.
            labels_V: integer labels.
        """
        probability_CV, log_likelihood_CV, common_V = self.prediction(logits_CV)
        if self.has_regions:
            targets_CV = self.membership(labels_V.device)[:, labels_V.long()]
            hits_XV, log_likelihood_V = probability_CV * targets_CV, (log_likelihood_CV * targets_CV).sum(0)
        else:
            channel_1V = labels_V.long().clamp_max(self.num_channels - 1)[None]
            log_likelihood_1V = log_likelihood_CV.gather(0, channel_1V)
            hits_XV, log_likelihood_V = log_likelihood_1V.exp(), log_likelihood_1V[0]
        return VoxelTerms(probability_CV, hits_XV, common_V - log_likelihood_V)

    def local_targets(self, labels_BV: Tensor) -> Tensor:
        """Targets of nnU-Net's loss: labels as they are, of shape B, 1, V; or regions and, last, what is ignored.

        Args:
            labels_BV: integer labels.
        """
        if not self.has_regions:
            return labels_BV[:, None]
        member_RL = self.membership(labels_BV.device)
        if self.ignore_label is not None:
            ignored_L = torch.arange(self.num_labels, device=labels_BV.device) == self.ignore_label
            member_RL = torch.cat([member_RL, ignored_L[None]])
        return (member_RL > 0)[:, labels_BV.long()].movedim(0, 1)

    def foreground(self, labels_V: Tensor) -> Tensor:
        """bool: whether a voxel is annotated as anything but background."""
        return (labels_V > 0) & self.counted(labels_V)

    def counted(self, labels_V: Tensor) -> Tensor:
        """bool: whether a voxel is annotated."""
        return labels_V < (self.num_labels if self.ignore_label is None else self.ignore_label)

    def hits(self, labels_V: Tensor, prediction_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """True positive, false positive and false negative voxels by foreground label or region, int64.

        Args:
            labels_V: integer labels of the reference; ignored voxels do not count.
            prediction_V: labels of the prediction.
        """
        pairs = labels_V.long() * self.num_labels + prediction_V
        confusion_LL = torch.bincount(pairs.flatten(), minlength=self.num_labels**2).view(self.num_labels, -1)
        member_CL = self.membership(labels_V.device).long().cpu()
        confusion_LL = confusion_LL.cpu()
        if self.ignore_label is not None:
            confusion_LL[self.ignore_label] = 0
        true_positive_C = (member_CL @ confusion_LL * member_CL).sum(1)
        reference_C = member_CL @ confusion_LL.sum(1)
        predicted_C = member_CL @ confusion_LL.sum(0)
        foreground = slice(0 if self.has_regions else 1, None)
        false_positive_C, false_negative_C = predicted_C - true_positive_C, reference_C - true_positive_C
        return true_positive_C[foreground], false_positive_C[foreground], false_negative_C[foreground]

    def dice(self, labels_V: Tensor, prediction_V: Tensor) -> Tensor:
        """Dice by foreground label or region, float64; NaN for one that neither has, as in nnU-Net. See `hits`."""
        hit_C, wrong_C, missed_C = (count.double() for count in self.hits(labels_V, prediction_V))
        return 2 * hit_C / (2 * hit_C + wrong_C + missed_C)

    def decided(self, logits_CV: Tensor) -> Tensor:
        """What logits say, int16 of shape V: the label; of regions the last one's number, from 1, that is there, or 0.

        Where all corners of a cell have the same of these numbers, so has every point between them.
        """
        if not self.has_regions:
            return logits_CV.argmax(0).to(torch.int16)
        numbers = torch.arange(1, len(logits_CV) + 1, dtype=torch.int16, device=logits_CV.device)
        return ((logits_CV > 0) * numbers.view(-1, *[1] * (logits_CV.ndim - 1))).amax(0)

    def labels_of(self, decided_V: Tensor) -> Tensor:
        """Labels, int16 of any shape, of what `decided` gives."""
        if not self.has_regions:
            return decided_V
        order = torch.tensor([0, *self.regions_class_order], dtype=torch.int16, device=decided_V.device)
        return order[decided_V.long()]

    def entropy(self, logits_CV: Tensor) -> Tensor:
        """Entropy of a prediction in nats, shape V: of the softmax over labels, or of each region's sigmoid."""
        logits_CV = logits_CV.float()
        if self.has_regions:
            p_CV = logits_CV.sigmoid()
            return (p_CV * F.softplus(-logits_CV) + (1 - p_CV) * F.softplus(logits_CV)).sum(0)
        log_p_CV = logits_CV.log_softmax(0)
        return -(log_p_CV.exp() * log_p_CV).sum(0)

    def foreground_probability(self, logits_CV: Tensor) -> Tensor:
        """Probability of any foreground, shape V; of overlapping regions that of the most probable one."""
        return logits_CV.float().sigmoid().amax(0) if self.has_regions else 1 - logits_CV.float().softmax(0)[0]


@lru_cache(maxsize=64)
def _membership(encoding: LabelEncoding, device: torch.device) -> Tensor:
    """See `LabelEncoding.membership`: made once for a device."""
    groups = encoding.regions
    if groups is None:
        groups = tuple((label,) for label in range(encoding.num_channels))
    with torch.inference_mode(False):  # a training may take what a prediction has made
        rows = [[float(label in group) for label in range(encoding.num_labels)] for group in groups]
        return sent(torch.tensor(rows), device)
