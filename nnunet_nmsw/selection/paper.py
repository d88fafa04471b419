"""The choice of windows in the paper: "No More Sliding Window" (Jeon et al., 2025).

Tensor suffixes: K drawn windows, d h w axes of the low-resolution view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_nmsw.selection.by_score import TopK
from nnunet_nmsw.selection.draw import Draw, PlackettLuce
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.selection.sampler import ENTROPY_WEIGHT, BenefitMap, ScoreLoss


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
