"""Choosing windows by their scores, without noise.

Tensor suffixes: N windows of the grid, K chosen windows, d h w axes of the low-resolution view.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.interface import SCORE_SCALE, CoarsePrediction, WindowChoice, candidates, scores
from nnunet_nmsw.volume.windows import WindowGrid, window_slices

COVERAGE_DISCOUNT = 0.7
"""Share of the worth of a place that is gone with the first window over it: see docs/design-notes.md."""

ENTROPY_WORTH = 0.3
"""What a nat of the coarse prediction's entropy adds to the predicted benefit: see docs/design-notes.md."""

PLACEMENT_STEP = 0.25
"""Step between the positions that `GreedyBenefit` chooses from, as a fraction of the patch size."""

PICKS_BETWEEN_LOOKS = 32
"""On a GPU, where it takes longer to look at a number than to pick some windows for nothing."""


class TopK:
    """The windows of the best scores."""

    name: ClassVar[str] = "top_k"

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        scores_N = scores(coarse.score_map_dhw, grid)
        indices_K = top_k(scores_N, candidates(coarse, grid), budget.num_windows)
        if budget.threshold is not None:
            indices_K = indices_K[scores_N[indices_K] > SCORE_SCALE * budget.threshold]
        return chosen(indices_K, scores_N, grid)


class GreedyCoverage:
    """The best window, then the best of what it does not cover, and so on."""

    name: ClassVar[str] = "greedy_coverage"

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        if budget.num_windows >= len(grid):
            return TopK().choose(coarse, grid, budget)
        scores_N = scores(coarse.score_map_dhw, grid)
        indices_K = greedy_coverage(scores_N, candidates(coarse, grid), budget.num_windows, grid)
        return chosen(indices_K, scores_N, grid)


@dataclasses.dataclass(frozen=True)
class GreedyBenefit:
    """The window of the largest worth, then the best of what it leaves, between the grid's positions, too.

    A place is worth its predicted benefit, and something more where the coarse prediction is uncertain. All windows are
    those of the grid.

    Attributes:
        entropy_worth: what a nat of entropy adds; 0 where the score map is an entropy itself.
        discount: share of the worth of a place that is gone with the first window over it.
    """

    name: ClassVar[str] = "greedy_benefit"

    entropy_worth: float = ENTROPY_WORTH
    discount: float = COVERAGE_DISCOUNT

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        worth_dhw = coarse.score_map_dhw.float()
        if self.entropy_worth > 0:
            worth_dhw = worth_dhw + self.entropy_worth * coarse.encoding.entropy(coarse.logits_Cdhw)
        if budget.num_windows >= len(grid) and budget.threshold is None:
            return TopK().choose(coarse._replace(score_map_dhw=worth_dhw), grid, budget)
        grid = placement_grid(grid)
        scores_N = scores(worth_dhw, grid)
        indices_K = greedy_benefit(worth_dhw, candidates(coarse, grid), budget, grid, self.discount)
        return chosen(indices_K, scores_N, grid)


GREEDY_BY_ENTROPY = GreedyBenefit(entropy_worth=0)
"""For stock models, whose score map is the entropy itself."""


def chosen(indices_K: Tensor, scores_N: Tensor, grid: WindowGrid) -> WindowChoice:
    """Windows of a grid as a choice."""
    # One copy from the device: the bits of scores are whole numbers, too.
    bits_K = scores_N.index_select(0, indices_K).float().view(torch.int32)
    indices_K, bits_K = torch.stack([indices_K.to(torch.int32), bits_K]).cpu().unbind()
    indices_K, scores_K = indices_K.long(), bits_K.view(torch.float32)
    return WindowChoice(grid.starts_N3[indices_K], scores_K)


def placement_grid(grid: WindowGrid) -> WindowGrid:
    """The positions of a grid and more between them."""
    return dataclasses.replace(grid, tile_step_size=min(PLACEMENT_STEP, grid.tile_step_size))


def top_k(scores_N: Tensor, candidates_N: Tensor, k: int) -> Tensor:
    """The `k` best windows, candidates before others, best first, ties by position."""
    by_score = torch.argsort(scores_N, descending=True, stable=True)
    candidates_first = torch.argsort((~candidates_N[by_score]).to(torch.uint8), stable=True)
    return by_score[candidates_first][:k]


def greedy_coverage(scores_N: Tensor, candidates_N: Tensor, k: int, grid: WindowGrid) -> Tensor:
    """The best window, then the best of what it does not cover, and so on.

    A window's weight exp(score) is discounted by the share of its voxels that windows already taken cover.

    Returns:
        `k` window indices in the order of choice, candidates before others.
    """
    uncovered_DHW = torch.ones(grid.low_shape, device=scores_N.device)
    penalty_N = torch.where(candidates_N, 0.0, -1e6).to(scores_N)
    taken: list[int] = []
    for _ in range(k):
        gain_N = scores_N + penalty_N + grid.mean(uncovered_DHW).clamp_min(1e-6).log()
        if taken:
            gain_N[taken] = -torch.inf
        best = int(gain_N.argmax())
        taken.append(best)
        start = [s // f for s, f in zip(grid.starts_N3[best].tolist(), grid.downsampling_factor, strict=True)]
        size = [-(-n // f) for n, f in zip(grid.patch_size, grid.downsampling_factor, strict=True)]
        uncovered_DHW[window_slices(start, size)] = 0
    return torch.tensor(taken, device=scores_N.device)


def greedy_benefit(
    worth_dhw: Tensor, candidates_N: Tensor, budget: Budget, grid: WindowGrid, discount: float = 1.0
) -> Tensor:
    """The window of the largest worth, then the best of what it leaves, and so on.

    What a window covers is worth less to the windows after it. Not nothing: predictions of overlapping windows are
    blended, and two see a place better than one.

    Args:
        worth_dhw: of a low-resolution voxel, such that its mean over a window is the window's.
        candidates_N: bool, the windows to take before others.
        budget: how many windows, and how good.
        grid: the windows.
        discount: share of the worth of a place that the first window over it wins (or loses).

    Returns:
        Window indices in the order of choice, candidates before others.
    """
    left_dhw = worth_dhw.float().clone()
    means_N = grid.mean(left_dhw)
    available_N = torch.ones_like(candidates_N)
    taken, gains = [], []
    # All on the device of the map. Only to know whether to stop the host waits for the device, now and then.
    between_looks = 1 if left_dhw.device.type == "cpu" else PICKS_BETWEEN_LOOKS
    for number in range(1, min(budget.num_windows, len(grid)) + 1):
        first_N = available_N & candidates_N
        allowed_N = torch.where(first_N.any(), first_N, available_N)
        gain, best = means_N.masked_fill(~allowed_N, -torch.inf).max(0)
        taken.append(best)
        gains.append(gain)
        if budget.threshold is not None and number % between_looks == 0 and gain <= budget.threshold:
            break
        available_N.index_fill_(0, best[None], False)
        at = grid.touched(best)
        gone_dhw = left_dhw[at] * (discount * grid.coverage(best, at))
        left_dhw[at] -= gone_dhw
        means_N = means_N - grid.mean(gone_dhw, at)
    taken_K = torch.stack(taken)
    if budget.threshold is None:
        return taken_K
    too_small_K = torch.stack(gains) <= budget.threshold
    return taken_K[: int((too_small_K.cumsum(0) == 0).sum())]
