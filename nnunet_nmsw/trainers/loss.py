"""The loss of a training step: local, global and fused, and what it reports of them.

Tensor suffixes: C classes, D H W axes of the volume, d h w axes of the low-resolution view, K sampled windows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from torch import Tensor, nn

from nnunet_nmsw.config import NMSWConfig
from nnunet_nmsw.fusion import dice_and_cross_entropy, fused_loss, loss_sums
from nnunet_nmsw.geometry import crop_windows, label_counts
from nnunet_nmsw.network import TrainingOutput
from nnunet_nmsw.precision import full_precision


class NMSWLoss(nn.Module):
    """Weighted sum of the losses of the local, the global and the fused prediction, minus the entropy bonus.

    Args:
        local_loss: nnU-Net's loss for patches, deep supervision included where `deep_supervision_scales` is given.
        deep_supervision_scales: nnU-Net's scales of the local outputs.
        config: the settings.

    After a call, `report` holds the parts by name, detached.
    """

    report: dict[str, Tensor]

    def __init__(
        self,
        local_loss: Callable[..., Tensor],
        deep_supervision_scales: list[list[float]] | None,
        config: NMSWConfig,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.downsample_targets = (
            None if deep_supervision_scales is None else DownsampleSegForDSTransform(deep_supervision_scales)
        )
        self.config = config
        self.report = {}

    def forward(self, output: TrainingOutput, target_11DHW: Tensor) -> Tensor:
        """The loss of one volume. `target_11DHW` holds integer labels."""
        config, coarse_logits_Cdhw = self.config, output.coarse.logits_Cdhw
        finest = output.local[0] if isinstance(output.local, list | tuple) else output.local
        num_sampled, patch_size = len(output.sample.indices_K), finest.shape[2:]
        labels_DHW = target_11DHW[0, 0]

        targets = crop_windows(target_11DHW, output.starts, patch_size)
        local = self.local_loss(output.local, self._local_targets(targets))

        with full_precision(target_11DHW.device):
            with torch.no_grad():
                counts_Cdhw = label_counts(labels_DHW, len(coarse_logits_Cdhw), config.downsampling_factor)
            coarse = dice_and_cross_entropy(loss_sums(coarse_logits_Cdhw, counts_Cdhw))
            log_p_K = output.sample.log_probability_K
            fused = fused_loss(
                finest[:num_sampled],
                output.starts[:num_sampled],
                coarse_logits_Cdhw,
                labels_DHW,
                output.class_weights_C,
                config.downsampling_factor,
                # 1 in value; its gradient is that of the log-probability of the draw.
                (log_p_K - log_p_K.detach()).exp() if config.gradient_path == "contribution" else None,
            )
        self.report = {
            "loss_local": local.detach().float(),
            "loss_global": coarse.detach(),
            "loss_fused": fused.loss.detach(),
            "entropy": output.entropy.detach(),
            "foreground_share": (targets[:num_sampled] > 0).flatten(1).any(1).float().mean(),
            "benefit": fused.benefit_K.mean(),
            "class_weights": output.class_weights_C.detach(),
        }
        return (
            config.local_loss_weight * local
            + config.global_loss_weight * coarse
            + config.fused_loss_weight * fused.loss
            - config.entropy_weight * output.entropy
        )

    def _local_targets(self, targets: Tensor) -> Tensor | list[Tensor]:
        if self.downsample_targets is None:
            return targets
        # The transform takes one sample with channels; here the batch stands in for them.
        scales: list[Tensor] = self.downsample_targets(segmentation=targets[:, 0])["segmentation"]
        return [scale[:, None] for scale in scales]
