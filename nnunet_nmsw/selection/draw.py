"""Windows drawn at random by their scores, for training.

Tensor suffixes: N windows of the grid, K chosen windows, in the order of choice.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.interface import SCORE_SCALE, CoarsePrediction, WindowChoice, candidates, scores
from nnunet_nmsw.volume.windows import WindowGrid

TEMPERATURE = 2 / 3
"""Of the relaxed Top-k, as in the paper."""


class WindowSample(NamedTuple):
    """Windows drawn without replacement.

    Attributes:
        indices_K: the windows, int64.
        log_probability_K: log of the probability of each draw given the draws before it (Plackett-Luce), free of the
            Gumbel noise; its gradient is the score function of the draw.
        relaxed_K: the temperature softmax of the noisy scores at each draw, which the paper puts on the input patch.
    """

    indices_K: Tensor
    log_probability_K: Tensor
    relaxed_K: Tensor


@dataclasses.dataclass(frozen=True)
class Draw(WindowChoice):
    """Windows drawn for a training step. Their scores stay on the device.

    Attributes:
        sample: how they were drawn.
        entropy: of the distribution of windows, in nats.
    """

    sample: WindowSample
    entropy: Tensor


@dataclasses.dataclass(frozen=True)
class PlackettLuce:
    """Draws candidate windows without replacement, with probabilities that go with the exponential of their scores.

    Attributes:
        by_spread: scores have no scale of their own, as predicted benefits have none: what is drawn depends on their
            spread in the volume. Such a draw has no gradient.
    """

    name: ClassVar[str] = "draw"

    by_spread: bool

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> Draw:
        """See `Selector`. `budget.num_windows` of them, or as many as there are."""
        scores_N = scores(coarse.score_map_dhw, grid)
        k = min(budget.num_windows, len(grid))
        candidates_N = candidates(coarse, grid, at_least=k)
        if self.by_spread:
            spread = _spread(scores_N, candidates_N).clamp_min(1e-6)
            scores_N = SCORE_SCALE * (scores_N / spread).detach()
        sample = sample_windows(scores_N, k, candidates_N, TEMPERATURE)
        scores_K = scores_N.index_select(0, sample.indices_K).detach()
        starts_K3 = grid.starts_N3[sample.indices_K.cpu()]
        return Draw(starts_K3, scores_K, sample, window_entropy(scores_N, candidates_N))


def sample_windows(scores_N: Tensor, k: int, candidates_N: Tensor, temperature: float) -> WindowSample:
    """Draw `k` different candidate windows: Gumbel noise on the scores, then k rounds of masked softmax.

    The largest noisy scores are a draw without replacement whose inclusion follows Plackett-Luce (Kool et al., 2019,
    "Stochastic beams and where to find them"); the rounds are the relaxation of the NMSW paper (Jeon et al., 2025).

    Args:
        scores_N: float32 log weights of the windows.
        k: number of windows, at most the number of candidates.
        candidates_N: bool, the windows that may be drawn.
        temperature: of the relaxed softmax.
    """
    log_weights_N = scores_N.masked_fill(~candidates_N, -torch.inf)
    gumbel_N = -torch.empty_like(scores_N).exponential_().log()
    indices, log_probabilities, relaxed = [], [], []
    for _ in range(k):
        noisy_N = log_weights_N + gumbel_N
        index_1 = noisy_N.detach().argmax(0, keepdim=True)
        indices.append(index_1)
        log_probabilities.append(log_weights_N.log_softmax(0).gather(0, index_1))
        relaxed.append((noisy_N / temperature).softmax(0).gather(0, index_1))
        taken_N = torch.zeros_like(candidates_N).index_fill(0, index_1, True)
        log_weights_N = log_weights_N.masked_fill(taken_N, -torch.inf)
    return WindowSample(torch.cat(indices), torch.cat(log_probabilities), torch.cat(relaxed))


def window_entropy(scores_N: Tensor, candidates_N: Tensor) -> Tensor:
    """Entropy of the softmax over the candidates' scores, in nats: 0 for one certain window, log N for uniform."""
    log_p_N = scores_N.masked_fill(~candidates_N, -torch.inf).log_softmax(0)
    return -(log_p_N.exp() * log_p_N.masked_fill(~candidates_N, 0)).sum()


def _spread(scores_N: Tensor, candidates_N: Tensor) -> Tensor:
    """Standard deviation of the candidates' scores. Masked by products: a mask as index makes the host wait."""
    weight_N = candidates_N / candidates_N.sum()
    mean = (weight_N * scores_N).sum()
    return (weight_N * (scores_N - mean).square()).sum().sqrt()
