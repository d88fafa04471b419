"""A training step: volume → coarse prediction → windows → local predictions → losses.

Tensor suffixes: B windows (K drawn ones first, then random ones), C channels or classes, L labels, D H W axes of the
volume or of a window, d h w axes of the low-resolution view, 3 one coordinate per axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.trainers.losses.benefit import benefit_map, updated_scale
from nnunet_nmsw.trainers.losses.fused import LowResolution, WindowPredictions, fused_loss
from nnunet_nmsw.trainers.losses.local import LocalLoss
from nnunet_nmsw.trainers.views import TrainingVolume
from nnunet_nmsw.volume.precision import full_precision


class StepResult(NamedTuple):
    """What a step made of a volume.

    Attributes:
        loss: scalar.
        report: parts of the loss and other numbers by name, see `REPORTED`; detached.
        coarse: prediction of the global branch.
        starts_B3: first voxels of the windows, int64 on the host.
    """

    loss: Tensor
    report: dict[str, Tensor]
    coarse: CoarsePrediction
    starts_B3: Tensor


REPORTED = (
    "loss_local",
    "loss_global",
    "loss_fused",
    "entropy",
    "foreground_share",
    "benefit",
    "benefit_loss",
    "fusion_weights",
)
"""Names in the report of a step."""


class TrainingStep:
    """One step on one volume. nnU-Net takes it for a batch, and gives it to the network, which calls it with itself.

    So the step runs inside of what wraps the network: PyTorch's distributed training needs that.

    Args:
        volume: with what the step draws of its augmentation.
        local_loss: of the patches.

    Attributes:
        result: of the step, once it is done.
    """

    result: StepResult

    def __init__(self, volume: TrainingVolume, local_loss: LocalLoss) -> None:
        self.volume, self.local_loss = volume, local_loss

    def to(self, device: torch.device, non_blocking: bool = False) -> TrainingStep:
        """Move the volume to a device, in place and once: nnU-Net moves input and target apart, and this is both."""
        self.volume.to(device, non_blocking)
        return self

    def __call__(self, network: NMSWNetwork) -> StepResult:
        """Do the step, up to the loss."""
        volume, encoding = self.volume, self.local_loss.encoding
        sampler, settings = network.sampler, network.settings

        # The whole volume, coarsely.
        coarse = network.coarse(volume.low_resolution(settings.downsampling_factor), encoding)

        # Windows: some drawn from the scores, some at random.
        draw = sampler.in_training.choose(coarse, network.grid(volume.shape), Budget(settings.sampled_windows))
        num_drawn, num_random = len(draw.starts_K3), len(volume.random_starts_R3)
        starts_B3 = torch.cat([draw.starts_K3, volume.random_starts_R3])
        patches_BCDHW, labels_B1DHW = volume.windows(starts_B3, network.patch_size)

        # Local predictions.
        weights_K = sampler.input_weights(draw)
        if weights_K is not None:
            weights_B = torch.cat([weights_K, weights_K.new_ones(num_random)])
            patches_BCDHW = patches_BCDHW * weights_B.view(-1, 1, 1, 1, 1)
        logits = network.local(patches_BCDHW)
        finest_BCDHW = finest_scale(logits)

        # Losses: of the patches, of the coarse prediction, of the two fused, and what trains the scores.
        local = self.local_loss(logits, labels_B1DHW)
        with full_precision(labels_B1DHW.device):
            with torch.no_grad():
                counts_Ldhw = volume.label_counts(encoding.num_labels, settings.downsampling_factor)
            num_fused = num_drawn + num_random * sampler.fuses_random_windows
            weights_K = sampler.window_weights(draw)
            fused = fused_loss(
                WindowPredictions(finest_BCDHW, labels_B1DHW[:, 0], starts_B3),
                LowResolution(coarse.logits_Cdhw, counts_Ldhw, settings.downsampling_factor, encoding),
                network.fusion_weights,
                num_fused,
                None if weights_K is None else torch.cat([weights_K, weights_K.new_ones(num_fused - num_drawn)]),
                sampler.measures_benefit,
            )
            measured, scale = None, network.benefit_scale
            if sampler.measures_benefit:
                measured = benefit_map(
                    fused.changes,
                    fused.slope_S,
                    counts_Ldhw.shape[1:],
                    network.patch_size,
                    settings.downsampling_factor,
                )
                if coarse.score_map_dhw.requires_grad:  # in training, not in validation
                    scale.copy_(updated_scale(scale, measured))
            score = sampler.score_loss(draw, coarse, measured, scale)
        report = {
            "loss_local": local.detach().float(),
            "loss_global": fused.coarse_loss.detach(),
            "loss_fused": fused.loss.detach(),
            "entropy": draw.entropy.detach(),
            "foreground_share": encoding.foreground(labels_B1DHW[:num_drawn]).flatten(1).any(1).float().mean(),
            "benefit": fused.benefit_K[:num_drawn].mean(),
            "benefit_loss": score.regression,
            "fusion_weights": torch.cat(list(network.fusion_weights)).detach(),
        }
        loss = local + fused.coarse_loss + fused.loss + score.loss
        self.result = StepResult(loss, report, coarse, starts_B3)
        return self.result


class LossOfStep(nn.Module):
    """What nnU-Net takes for the loss: a step has worked it out already.

    Args:
        local: of the patches.
    """

    def __init__(self, local: LocalLoss) -> None:
        super().__init__()
        self.local = local

    def forward(self, output: StepResult, target: TrainingStep) -> Tensor:
        """The loss of the step."""
        return output.loss


def finest_scale(logits: Tensor | list[Tensor]) -> Tensor:
    """Logits at full resolution, with deep supervision or without."""
    return logits if isinstance(logits, Tensor) else logits[0]
