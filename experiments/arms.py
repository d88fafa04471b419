"""Arms of the ablations that are no settings: subclasses of what the package is made of.

nnU-Net finds these trainers where the variable `nnUNet_extTrainer` names this folder, as `ablation.py` does for its
runs. Each changes one thing; a trainer of your own is made in the same way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_nmsw.model.context import Context
from nnunet_nmsw.model.fusion import CLASS_WEIGHTS
from nnunet_nmsw.model.network import NMSWNetwork, Parts
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.draw import Draw, PlackettLuce
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.selection.sampler import BenefitSampler
from nnunet_nmsw.trainers import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.augmentation import Augmentation
from nnunet_nmsw.trainers.builder import network_builder
from nnunet_nmsw.trainers.step import TrainingStep
from nnunet_nmsw.trainers.views import TrainingVolume, Transform
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape, WindowGrid


class FreeMap(BenefitSampler):
    """The score map is the network's output, without the gate of the coarse prediction's entropy."""

    def score_map(self, output_dhw: Tensor, entropy_dhw: Tensor) -> Tensor:
        """The output as it is."""
        return output_dhw


class SampledFused(BenefitSampler):
    """The random windows of a step train the local branch alone."""

    fuses_random_windows = False


class Jittered(PlackettLuce):
    """Moves each drawn window by up to half of the step between windows."""

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> Draw:
        """See the parent."""
        draw = super().choose(coarse, grid, budget)
        patch_3 = torch.tensor(grid.patch_size)
        reach_3 = patch_3 * grid.tile_step_size / 2
        moved_K3 = draw.starts_K3 + ((2 * torch.rand(draw.starts_K3.shape) - 1) * reach_3).round().long()
        moved_K3 = torch.minimum(moved_K3.clamp_min(0), torch.tensor(grid.volume_shape) - patch_3)
        return dataclasses.replace(draw, starts_K3=moved_K3)


class JitteredDraw(BenefitSampler):
    """Windows of a step lie between the grid's positions, too."""

    in_training = Jittered(by_spread=True)


class WithoutDropout(Context):
    """No window is without context."""

    dropout = 0.0


class OfProbabilities(Context):
    """The coarse probabilities alone, mixed into the channels."""

    def of_volume(self, output_Gdhw: Tensor, logits_Cdhw: Tensor, encoding: LabelEncoding) -> Tensor:
        """See the parent."""
        return super().of_volume(0 * output_Gdhw, logits_Cdhw, encoding)


class OfFeatures(Context):
    """What the global branch puts out for the context alone."""

    def of_volume(self, output_Gdhw: Tensor, logits_Cdhw: Tensor, encoding: LabelEncoding) -> Tensor:
        """See the parent."""
        return output_Gdhw + 0 * super().of_volume(output_Gdhw, logits_Cdhw, encoding)


class IntoProbabilities(Context):
    """The local loss trains the coarse prediction, too."""

    def of_volume(self, output_Gdhw: Tensor, logits_Cdhw: Tensor, encoding: LabelEncoding) -> Tensor:
        """See the parent."""
        probability_Cdhw = encoding.prediction(logits_Cdhw).probability_CV
        return output_Gdhw + self.of_probabilities(probability_Cdhw[None])[0].float()


CONTEXTS = {
    "context_without_dropout": WithoutDropout,
    "context_of_probabilities": OfProbabilities,
    "context_of_features": OfFeatures,
    "context_into_probabilities": IntoProbabilities,
}
PARTS = {
    **{name: Parts(BenefitSampler(), context=context) for name, context in CONTEXTS.items()},
    "free_map": Parts(FreeMap()),
    "sampled_fused": Parts(SampledFused()),
    "jittered": Parts(JitteredDraw()),
    "class_weights": Parts(BenefitSampler(), CLASS_WEIGHTS),
}
"""By name of the arm."""


def trainer_of(name: str, parts: Parts) -> type[nnUNetTrainerNMSW]:
    """The trainer of an arm."""

    attributes = {"__module__": __name__, "build_network_architecture": network_builder(lambda settings: parts)}
    return type(f"nnUNetTrainerNMSW_{name}", (nnUNetTrainerNMSW,), attributes)


globals().update({(trainer := trainer_of(name, parts)).__name__: trainer for name, parts in PARTS.items()})


class nnUNetTrainerNMSW_uniform(nnUNetTrainerNMSW):
    """No random window is drawn for its foreground: the windows that are drawn by their scores hold some."""

    def get_dataloaders(self) -> tuple[Any, Any]:
        """See the parent."""
        self.oversample_foreground_percent = 0.0
        loaders: tuple[Any, Any] = super().get_dataloaders()
        return loaders


class nnUNetTrainerNMSW_uniform_jittered(nnUNetTrainerNMSW_uniform):
    """And windows that are drawn lie between the grid's positions, too."""

    build_network_architecture = network_builder(lambda settings: PARTS["jittered"])


class LocalStep(TrainingStep):
    """A step that uses the global branch and does not train it."""

    def coarse(self, network: NMSWNetwork) -> CoarsePrediction:
        """See the parent."""
        with torch.no_grad():
            return super().coarse(network)


class nnUNetTrainerNMSW_global_in_turns(nnUNetTrainerNMSW):
    """Trains the global branch in every second step."""

    def step_of(self, batch: dict[str, Any], augmentation: Augmentation) -> TrainingStep:
        """See the parent."""
        self.steps = getattr(self, "steps", 0) + 1
        step = super().step_of(batch, augmentation)
        return LocalStep(step.volume, step.local_loss) if self.steps % 2 else step


class CoarseInMillimetres(TrainingVolume):
    """Noise, blur and low resolution in millimetres: averages over blocks of voxels hardly show them."""

    OF_VOXELS = (GaussianNoiseTransform, GaussianBlurTransform, SimulateLowResolutionTransform)

    def low_resolution(self, factor: Shape) -> Tensor:
        """See the parent."""
        of_windows, self.transforms = self.transforms, list(map(self.without_voxels, self.transforms))
        try:
            return super().low_resolution(factor)
        finally:
            self.transforms = of_windows

    def without_voxels(self, transform: Transform) -> Transform:
        """A transform, or one that changes nothing in the place of those named above."""
        of_voxels = isinstance(getattr(transform, "transform", transform), self.OF_VOXELS)
        return (lambda **view: view) if of_voxels else transform


class nnUNetTrainerNMSW_augmentation_in_mm(nnUNetTrainerNMSW):
    """Augments the view of the global branch in millimetres."""

    def step_of(self, batch: dict[str, Any], augmentation: Augmentation) -> TrainingStep:
        """See the parent."""
        step = super().step_of(batch, augmentation)
        return TrainingStep(CoarseInMillimetres(**vars(step.volume)), step.local_loss)


class nnUNetTrainer_any_network(nnUNetTrainer):
    """Stock nnU-Net for networks of other classes than its own: MONAI's, by the package's adapters."""

    def initialize(self) -> None:
        """See the parent. SwinUNETR has one output."""
        network_class = self.configuration_manager.network_arch_class_name
        self.enable_deep_supervision = not network_class.endswith("SwinUNETR")
        super().initialize()

    @torch.no_grad()
    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """By the network's outputs; None with one output."""
        if not self.enable_deep_supervision:
            return None
        patch_size = self.configuration_manager.patch_size
        outputs = self.network(torch.zeros(1, self.num_input_channels, *patch_size, device=self.device))
        return [[n / p for n, p in zip(output.shape[2:], patch_size, strict=True)] for output in outputs]

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The parent's, where the network has the switch."""
        if hasattr(self.network, "decoder"):
            super().set_deep_supervision_enabled(enabled)
