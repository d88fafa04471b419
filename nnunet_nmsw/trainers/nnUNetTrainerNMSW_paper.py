"""The method of the paper: "No More Sliding Window" (Jeon et al., 2025), built from the same parts as ours.

It is what people will compare with. What differs from ours is here; docs/ablations.md compares the two. The optimiser
is nnU-Net's: with AdamW, as in the paper's public code, the prediction is worse.

Tensor suffixes: K drawn windows, d h w axes of the low-resolution view.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from nnunet_nmsw.model.fusion import CLASS_WEIGHTS
from nnunet_nmsw.model.network import Parts
from nnunet_nmsw.selection.by_score import TopK
from nnunet_nmsw.selection.draw import Draw, PlackettLuce
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.selection.sampler import ENTROPY_WEIGHT, BenefitMap, ScoreLoss
from nnunet_nmsw.trainers.builder import network_builder
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW


class PaperSampler:
    """Differentiable Top-k: Gumbel noise on the scores, and the relaxed weight of a window on its input patch.

    The score of a window is the mean of the score map over it. The map is the global branch's last channel as it is.
    """

    in_training = PlackettLuce(by_spread=False)
    at_inference = TopK()
    """Plain top-k, without noise."""

    measures_benefit = False
    fuses_random_windows = False
    """The random window of a step trains the local branch alone."""

    def score_map(self, output_dhw: Tensor, entropy_dhw: Tensor) -> Tensor:
        """The output as it is."""
        return output_dhw

    def input_weights(self, draw: Draw) -> Tensor | None:
        """1 in value, with the gradient of the relaxed weight, a softmax of temperature 2/3 among the windows left."""
        relaxed_K = draw.sample.relaxed_K
        return 1 + (relaxed_K - relaxed_K.detach())

    def window_weights(self, draw: Draw) -> Tensor | None:
        """None: the gradient goes through the local branch."""
        return None

    def score_loss(
        self, draw: Draw, coarse: CoarsePrediction, measured: BenefitMap | None, benefit_scale: Tensor
    ) -> ScoreLoss:
        """The entropy bonus, which keeps the distribution of windows from collapsing."""
        return ScoreLoss(-ENTROPY_WEIGHT * draw.entropy, torch.zeros_like(draw.entropy).detach())


class nnUNetTrainerNMSW_paper(nnUNetTrainerNMSW):
    """Trains the paper's method: 4 drawn windows and a random one a step, fused by class weights.

    The optimiser is nnU-Net's, and the loss of the fused prediction is ours, which needs no canvas. The setting
    `score_training` has no say here.
    """

    defaults: ClassVar[dict[str, Any]] = {"sampled_windows": 4, "random_windows": 1}

    build_network_architecture = network_builder(lambda settings: Parts(PaperSampler(), CLASS_WEIGHTS))
