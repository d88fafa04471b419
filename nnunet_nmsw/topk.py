"""Choosing windows by their scores: sampled without replacement in training, deterministic at inference.

Tensor suffixes: N windows of the grid, K chosen windows, in the order of choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.geometry import WindowGrid, window_slices


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
        index = noisy_N.detach().argmax()
        indices.append(index)
        log_probabilities.append(log_weights_N.log_softmax(0)[index])
        relaxed.append((noisy_N / temperature).softmax(0)[index])
        taken_N = torch.zeros_like(candidates_N).index_fill(0, index[None], True)
        log_weights_N = log_weights_N.masked_fill(taken_N, -torch.inf)
    return WindowSample(torch.stack(indices), torch.stack(log_probabilities), torch.stack(relaxed))


def window_entropy(scores_N: Tensor, candidates_N: Tensor) -> Tensor:
    """Entropy of the softmax over the candidates' scores, in nats: 0 for one certain window, log N for uniform."""
    log_p = scores_N[candidates_N].log_softmax(0)
    return -(log_p.exp() * log_p).sum()


def candidate_windows(foreground_dhw: Tensor, grid: WindowGrid, threshold: float, at_least: int) -> Tensor:
    """Windows in which the global prediction sees any foreground; all windows where these are fewer than `at_least`.

    The mask looks at probabilities and not at the winning class, or a lesion smaller than a low-resolution voxel would
    rule out its window for ever.

    Args:
        foreground_dhw: probability of foreground on the low-resolution grid.
        grid: the windows.
        threshold: smallest probability that counts.
        at_least: smallest number of candidates.

    Returns:
        bool of shape N.
    """
    candidates_N = grid.max(foreground_dhw) >= threshold
    return candidates_N if int(candidates_N.sum()) >= at_least else torch.ones_like(candidates_N)


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
    benefit_dhw: Tensor,
    candidates_N: Tensor,
    k: int,
    grid: WindowGrid,
    discount: float = 1.0,
    stop_at: float | None = None,
) -> Tensor:
    """The window of the largest predicted benefit, then the best of what it leaves, and so on.

    What a window covers is worth less to the windows after it. Not nothing: predictions of overlapping windows are
    blended, and two see a place better than one.

    Args:
        benefit_dhw: predicted benefit by low-resolution voxel, such that its mean over a window is the window's.
        candidates_N: bool, the windows to take before others.
        k: number of windows.
        grid: the windows.
        discount: share of the benefit of a place that the first window over it wins (or loses).
        stop_at: take no window whose benefit is not above this.

    Returns:
        Window indices in the order of choice, at most `k`, candidates before others.
    """
    left_dhw = benefit_dhw.float().clone()
    available_N = torch.ones_like(candidates_N)
    taken: list[int] = []
    while len(taken) < min(k, len(grid)):
        gain_N = grid.mean(left_dhw)
        first_N = available_N & candidates_N
        gain_N = gain_N.masked_fill(~(first_N if first_N.any() else available_N), -torch.inf)
        best = int(gain_N.argmax())
        if stop_at is not None and gain_N[best] <= stop_at:
            break
        taken.append(best)
        available_N[best] = False
        left_dhw *= 1 - discount * grid.coverage(best, left_dhw.device)
    return torch.tensor(taken, dtype=torch.int64, device=benefit_dhw.device)
