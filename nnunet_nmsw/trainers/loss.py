"""The loss of a training step: local, global and fused, and what it reports of them.

Tensor suffixes: B windows, C channels of the logits, L labels, D H W axes of the volume, d h w axes of the
low-resolution view, K sampled windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from torch import Tensor, nn

from nnunet_nmsw.benefit import BenefitMap, benefit_map, dice_slope
from nnunet_nmsw.config import NMSWConfig
from nnunet_nmsw.fused_loss import distillation_loss, fused_loss
from nnunet_nmsw.labels import LabelEncoding
from nnunet_nmsw.network import TrainingOutput
from nnunet_nmsw.precision import full_precision
from nnunet_nmsw.trainers.distributed import sum_over_processes
from nnunet_nmsw.views import TrainingVolume

SCALE_MEMORY = 0.99
"""Weight of the past in the running mean square of measured benefits."""

LARGEST_BENEFIT = 10.0
"""Measured benefits are cut off at this many root mean squares: a few voxels of a tiny lesion would rule the loss."""


class NMSWLoss(nn.Module):
    """Weighted sum of the losses of the local, the global and the fused prediction, minus the entropy bonus.

    Args:
        local_loss: nnU-Net's loss for patches, deep supervision included where `deep_supervision_scales` is given.
        deep_supervision_scales: nnU-Net's scales of the local outputs.
        config: the settings.
        encoding: of the labels.

    After a call, `report` holds the parts by name, detached.
    """

    report: dict[str, Tensor]

    def __init__(
        self,
        local_loss: Callable[..., Tensor],
        deep_supervision_scales: list[list[float]] | None,
        config: NMSWConfig,
        encoding: LabelEncoding,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.downsample_targets = (
            None if deep_supervision_scales is None else DownsampleSegForDSTransform(deep_supervision_scales)
        )
        self.config = config
        self.encoding = encoding
        self.report = {}

    def forward(self, output: TrainingOutput, volume: TrainingVolume) -> Tensor:
        """The loss of one volume."""
        config, encoding, coarse_logits_Cdhw = self.config, self.encoding, output.coarse.logits_Cdhw
        finest = finest_scale(output.local)
        num_sampled, targets = len(output.sample.indices_K), output.targets
        local = self.local_loss(output.local, self._local_targets(targets))

        with full_precision(targets.device):
            with torch.no_grad():
                counts_Ldhw = volume.label_counts(encoding.num_labels, config.downsampling_factor)
            # 1 in value; its gradient is that of the log-probability of the draw.
            log_p_K = output.sample.log_probability_K
            weight_K = (log_p_K - log_p_K.detach()).exp()
            num_fused = len(finest) if config.fuse_random_windows else num_sampled
            weight_of_all = torch.cat([weight_K, weight_K.new_ones(num_fused - num_sampled)])
            of_labels = config.benefit == "dice"
            changes_of = ("labels" if of_labels else "probabilities") if config.benefit_loss_weight else None
            fused = fused_loss(
                finest,
                output.starts,
                coarse_logits_Cdhw,
                targets[:, 0],
                counts_Ldhw,
                output.fusion,
                config.downsampling_factor,
                encoding,
                weight_of_all if config.gradient_path == "contribution" else None,
                weight_of_all if config.gradient_path == "contribution_logits" else None,
                num_fused,
                changes_of,
            )
            benefit_K = fused.benefit_K[:num_sampled]
            selection, benefit_loss = torch.zeros_like(fused.loss), torch.zeros_like(fused.loss)
            if config.gradient_path == "contribution" and config.gradient_baseline and num_sampled > 1:
                mean_of_others_K = (benefit_K.sum() - benefit_K) / (num_sampled - 1)
                selection = mean_of_others_K @ (weight_K - 1)
            if config.benefit_loss_weight:
                slope_S = dice_slope(coarse_logits_Cdhw, counts_Ldhw, encoding) if of_labels else fused.slope_S
                measured = benefit_map(
                    fused.changes, slope_S, counts_Ldhw.shape[1:], finest.shape[2:], config.downsampling_factor
                )
                benefit_loss = self._benefit_loss(output, measured)
            distillation = torch.zeros_like(fused.loss)
            if config.distillation_weight:
                distillation = distillation_loss(
                    finest, output.starts, coarse_logits_Cdhw, config.downsampling_factor, encoding
                )
        self.report = {
            "loss_local": local.detach().float(),
            "loss_global": fused.coarse_loss.detach(),
            "loss_fused": fused.loss.detach(),
            "entropy": output.entropy.detach(),
            "foreground_share": encoding.foreground(targets[:num_sampled]).flatten(1).any(1).float().mean(),
            "benefit": benefit_K.mean(),
            "benefit_loss": benefit_loss.detach(),
            "loss_distillation": distillation.detach(),
            "fusion_weights": torch.cat(list(output.fusion)).detach(),
        }
        # The draw trains nothing where there is no gradient path, and the entropy of the windows has no gradient.
        entropy_weight = 0.0 if config.gradient_path == "none" else config.entropy_weight
        return (
            config.local_loss_weight * local
            + config.global_loss_weight * fused.coarse_loss
            + config.fused_loss_weight * (fused.loss + selection)
            + config.benefit_loss_weight * benefit_loss
            + config.distillation_weight * distillation
            - entropy_weight * output.entropy
        )

    def _benefit_loss(self, output: TrainingOutput, measured: BenefitMap) -> Tensor:
        """Squared error of the score map where windows are, in units of the benefit's running root mean square."""
        weight_dhw, scale = measured.weight_dhw, output.benefit_scale
        # Nothing counts in windows that are ignored as a whole.
        total = weight_dhw.sum().clamp_min(1e-6)
        mean_square = (weight_dhw * measured.benefit_dhw.square()).sum() / total
        score_map_dhw = output.coarse.score_map_dhw
        if score_map_dhw.requires_grad:
            # Of the volumes of all processes, so that the scale is the same in all.
            counts = (weight_dhw.sum() > 0).float()
            mean_squares, volumes = sum_over_processes(torch.stack([mean_square * counts, counts]))
            mean_square = mean_squares / volumes
            mean = SCALE_MEMORY * scale.square() + (1 - SCALE_MEMORY) * mean_square
            mean = torch.where(scale > 0, mean, mean_square)
            # In half precision a step's logits may overflow. nnU-Net skips such a step; the scale has to, too.
            scale.copy_(torch.where(mean_square.isfinite(), mean.sqrt(), scale))
        target_dhw = (measured.benefit_dhw / scale.clamp_min(1e-12)).clamp(-LARGEST_BENEFIT, LARGEST_BENEFIT)
        return (weight_dhw * (score_map_dhw - target_dhw).square()).sum() / total

    def _local_targets(self, labels_B1DHW: Tensor) -> Tensor | list[Tensor]:
        if self.downsample_targets is None:
            return self.encoding.local_targets(labels_B1DHW[:, 0])
        # The transform takes one sample with channels; here the batch stands in for them.
        scales: list[Tensor] = self.downsample_targets(segmentation=labels_B1DHW[:, 0])["segmentation"]
        return [self.encoding.local_targets(labels_BDHW) for labels_BDHW in scales]


def finest_scale(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Logits at full resolution, with deep supervision or without."""
    return logits if isinstance(logits, Tensor) else logits[0]
