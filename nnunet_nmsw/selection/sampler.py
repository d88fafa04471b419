"""How windows are scored, how their scores are trained, and how windows are chosen at inference.

Tensor suffixes: K drawn windows, d h w axes of the low-resolution view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nnunet_nmsw.selection.budget import UNCALIBRATED
from nnunet_nmsw.selection.by_score import GreedyBenefit
from nnunet_nmsw.selection.draw import Draw, PlackettLuce
from nnunet_nmsw.selection.interface import CoarsePrediction, Selector

GATE_ENTROPY = 0.1
"""In nats. Well below this entropy of the coarse prediction (98% for one of two classes), a patch is worth nothing."""

LARGEST_BENEFIT = 10.0
"""Measured benefits are cut off at this many root mean squares: a few voxels of a tiny lesion would rule the loss."""

BENEFIT_LOSS_WEIGHT = 0.1
"""Weight of the regression of the score map. The map shares the global branch with the coarse prediction."""

ENTROPY_WEIGHT = 0.01
"""Weight of the entropy bonus on the distribution of windows, for scores that are trained through the draw: without it
the draw collapses (docs/design-notes.md, "Exploration")."""


class BenefitMap(NamedTuple):
    """What windows were worth where, on the low-resolution grid.

    Attributes:
        benefit_dhw: by how much a window lowers the loss of the fused prediction, in a low-resolution voxel, times the
            voxels of a patch over those of the low-resolution voxel: the mean over a window is the window's benefit.
            0 where no window is; a voxel that is partly ignored has the mean of the rest.
        weight_dhw: share of the voxel that windows cover and that is not ignored, those of several windows added.
    """

    benefit_dhw: Tensor
    weight_dhw: Tensor


class ScoreLoss(NamedTuple):
    """What trains the scores.

    Attributes:
        loss: to be added to the losses of the predictions, scalar.
        regression: error of the score map against measured benefit, scalar; 0 where nothing is regressed.
    """

    loss: Tensor
    regression: Tensor


class Sampler(Protocol):
    """One way to learn where patches are worth it. Training and inference share it."""

    @property
    def in_training(self) -> PlackettLuce:
        """Draws the windows of a training step."""
        ...

    @property
    def at_inference(self) -> Selector:
        """Chooses windows without noise."""
        ...

    @property
    def measures_benefit(self) -> bool:
        """A step measures what its windows are worth, for `score_loss`."""
        ...

    @property
    def fuses_random_windows(self) -> bool:
        """The windows that a step draws at random take part in the fused loss."""
        ...

    def score_map(self, output_dhw: Tensor, entropy_dhw: Tensor) -> Tensor:
        """The score map.

        Args:
            output_dhw: last channel of the global branch.
            entropy_dhw: of the coarse prediction, in nats.
        """
        ...

    def input_weights(self, draw: Draw) -> Tensor | None:
        """Factors K on the drawn windows' input patches; None for none."""
        ...

    def window_weights(self, draw: Draw) -> Tensor | None:
        """Factors K of 1 in value on what the drawn windows change in the fused loss; None for none."""
        ...

    def score_loss(
        self, draw: Draw, coarse: CoarsePrediction, measured: BenefitMap | None, benefit_scale: Tensor
    ) -> ScoreLoss:
        """What trains the scores beside the losses of the predictions.

        Args:
            draw: the windows.
            coarse: prediction of the global branch.
            measured: what the windows were worth, where `measures_benefit`.
            benefit_scale: running root mean square of measured benefits, scalar; scores are in its units.
        """
        ...


def own_num_patches(setting: int | str, sampler: Sampler) -> int | str:
    """The setting `num_patches`; `UNCALIBRATED` in the place of "auto" where scores predict no benefits."""
    return UNCALIBRATED if setting == "auto" and not sampler.measures_benefit else setting


class _GatedSampler:
    """What the two samplers of the settings share: the gate of the score map, and the choice at inference."""

    fuses_random_windows = True

    @property
    def at_inference(self) -> Selector:
        """Greedily, between the positions of the grid, too."""
        return GreedyBenefit()

    def score_map(self, output_dhw: Tensor, entropy_dhw: Tensor) -> Tensor:
        """x H / (H + 0.1): where the coarse prediction is certain, a patch is worth nothing."""
        return output_dhw * entropy_dhw / (entropy_dhw + GATE_ENTROPY)

    def input_weights(self, draw: Draw) -> Tensor | None:
        """None."""
        return None


class BenefitSampler(_GatedSampler):
    """The score map is regressed on what the windows of a step were worth, voxel by voxel. The draw has no gradient."""

    in_training = PlackettLuce(by_spread=True)
    measures_benefit = True

    def window_weights(self, draw: Draw) -> Tensor | None:
        """None."""
        return None

    def score_loss(
        self, draw: Draw, coarse: CoarsePrediction, measured: BenefitMap | None, benefit_scale: Tensor
    ) -> ScoreLoss:
        """Squared error of the score map where windows are, in units of the scale."""
        assert measured is not None
        weight_dhw = measured.weight_dhw
        # Nothing counts in windows that are ignored as a whole.
        total = weight_dhw.sum().clamp_min(1e-6)
        target_dhw = (measured.benefit_dhw / benefit_scale.clamp_min(1e-12)).clamp(-LARGEST_BENEFIT, LARGEST_BENEFIT)
        regression = (weight_dhw * (coarse.score_map_dhw - target_dhw).square()).sum() / total
        return ScoreLoss(BENEFIT_LOSS_WEIGHT * regression, regression.detach())


class ContributionSampler(_GatedSampler):
    """Scores follow the fused loss's gradient through the log-probabilities of the draw: see docs/design-notes.md."""

    in_training = PlackettLuce(by_spread=False)
    measures_benefit = False

    def window_weights(self, draw: Draw) -> Tensor | None:
        """1 in value; the gradient is that of the log-probability of the draw."""
        log_p_K = draw.sample.log_probability_K
        return (log_p_K - log_p_K.detach()).exp()

    def score_loss(
        self, draw: Draw, coarse: CoarsePrediction, measured: BenefitMap | None, benefit_scale: Tensor
    ) -> ScoreLoss:
        """The entropy bonus."""
        return ScoreLoss(-ENTROPY_WEIGHT * draw.entropy, torch.zeros_like(draw.entropy).detach())


SAMPLERS: dict[str, Callable[[], Sampler]] = {"benefit": BenefitSampler, "contribution": ContributionSampler}
"""By the setting `score_training`."""
