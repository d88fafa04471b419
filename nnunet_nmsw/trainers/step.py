"""A training step: volume → coarse prediction → windows → local predictions → losses → weights.

Tensor suffixes: B windows (K drawn ones first, then random ones), C channels or classes, L labels, D H W axes of the
volume or of a window, d h w axes of the low-resolution view, 3 one coordinate per axis, S steps, X any values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.trainers.losses.benefit import benefit_map, updated_scale
from nnunet_nmsw.trainers.losses.fused import LowResolution, WindowPredictions, fused_loss
from nnunet_nmsw.trainers.losses.local import LocalLoss
from nnunet_nmsw.trainers.views import TrainingVolume
from nnunet_nmsw.volume.precision import full_precision, mixed_precision


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
    "gradient_local",
    "gradient_global",
)
"""Names in the report of a step, with the norms of the gradients of the local branch, and of all else."""

LARGEST_NORM = 12.0
"""Of a gradient, as in nnU-Net: it is scaled down to this. Each branch by itself: a large gradient of the global branch
would else shrink the steps of the local one, which nnU-Net's network, alone, would take."""


class TrainingStep:
    """One step on one volume. It is given to the network, which calls it with itself.

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
        """Move the volume to a device, in place."""
        self.volume.to(device, non_blocking)
        return self

    def coarse(self, network: NMSWNetwork) -> CoarsePrediction:
        """Run the global branch on the volume."""
        low_1Cdhw = self.volume.low_resolution(network.settings.downsampling_factor)
        return network.coarse(low_1Cdhw, self.local_loss.encoding)

    def __call__(self, network: NMSWNetwork) -> StepResult:
        """Do the step, up to the loss."""
        volume, encoding = self.volume, self.local_loss.encoding
        sampler, settings = network.sampler, network.settings

        # The whole volume, coarsely.
        coarse = self.coarse(network)

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
        logits = network.local(network.with_context(patches_BCDHW, coarse, starts_B3))
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


def update(step: TrainingStep, network: nn.Module, optimizer: Optimizer, scaler: GradScaler | None) -> dict[str, Any]:
    """Do a step on the device of its volume, and update the weights.

    Args:
        step: to be done.
        network: an `NMSWNetwork`, or what wraps it.
        optimizer: of its weights.
        scaler: of the loss, where gradients have half precision.

    Returns:
        The step's loss under `loss`, and what is named in `REPORTED`: arrays, float32, on the host.
    """
    device = step.volume.volume_1CDHW.device
    optimizer.zero_grad(set_to_none=True)
    with mixed_precision(device):
        loss, report, *_ = network(step)
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    local: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (local if "local_branch." in name else other).append(parameter)
    norms = {"gradient_local": _clipped(local, device), "gradient_global": _clipped(other, device)}
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return on_host({"loss": loss.detach(), **report, **norms})


def _clipped(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of a gradient, which is scaled down if it is too large."""
    if all(parameter.grad is None for parameter in parameters):
        return torch.zeros((), device=device)
    return nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)


def means_of_steps(outputs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Means over steps by name, each over the steps that have finite numbers: in half precision some overflow.

    Args:
        outputs: of `update`.
        names: of the numbers to average.

    Returns:
        Arrays of one axis; not finite where no step has finite numbers.
    """
    means = {}
    for name in names:
        values_SX = np.stack([np.atleast_1d(output[name]) for output in outputs])
        finite_S = np.isfinite(values_SX).all(1)
        means[name] = (values_SX[finite_S] if finite_S.any() else values_SX).mean(0)
    return means


def on_host(numbers: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Small tensors by name as float32 arrays on the host, by one copy from the device."""
    values = torch.cat([value.reshape(-1).float() for value in numbers.values()]).cpu()
    parts = values.split([value.numel() for value in numbers.values()])
    return {name: part.view(value.shape).numpy() for (name, value), part in zip(numbers.items(), parts, strict=True)}


def finest_scale(logits: Tensor | list[Tensor]) -> Tensor:
    """Logits at full resolution, with deep supervision or without."""
    return logits if isinstance(logits, Tensor) else logits[0]
