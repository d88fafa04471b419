"""What every way of choosing windows takes and gives.

Tensor suffixes: C channels of the logits, G channels of the context, d h w axes of the low-resolution view, N windows
of the grid, K chosen windows, 3 one coordinate per axis.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import WindowGrid

SCORE_SCALE = 3.0
"""The score of a window is this times the mean of the score map over it. It sets how sharp the draw of training windows
is; with 1 or 9 the accuracy is the same (docs/ablations.md), with 10 the draw collapsed (docs/design-notes.md)."""

CANDIDATE_THRESHOLD = 0.1
"""A window is a candidate where the coarse prediction gives some voxel at least this probability of foreground. Without
candidates a training looks at air (docs/ablations.md)."""


class CoarsePrediction(NamedTuple):
    """What the global branch makes of a volume, float32 on the low-resolution grid.

    Attributes:
        logits_Cdhw: coarse logits.
        score_map_dhw: score of a patch, by voxel; the mean over a window is the window's.
        encoding: of the labels that the channels stand for.
        context_Gdhw: what the local branch is told of the volume; None where it is told nothing.
    """

    logits_Cdhw: Tensor
    score_map_dhw: Tensor
    encoding: LabelEncoding
    context_Gdhw: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class WindowChoice:
    """Chosen windows.

    Attributes:
        starts_K3: their first voxels in the order of choice, int64 on the host.
        scores_K: their scores, float32 on the host.
    """

    starts_K3: Tensor
    scores_K: Tensor

    @classmethod
    def nothing(cls) -> WindowChoice:
        """No window: what remains is the coarse prediction."""
        return cls(torch.zeros((0, 3), dtype=torch.int64), torch.zeros(0))


class Selector(Protocol):
    """A way of choosing windows."""

    @property
    def name(self) -> str:
        """For files."""
        ...

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """Choose windows of a volume.

        Args:
            coarse: prediction of the global branch.
            grid: the windows of nnU-Net's sliding window over the volume. A selector may place its own between them.
            budget: how many to take.
        """
        ...


def scores(score_map_dhw: Tensor, grid: WindowGrid) -> Tensor:
    """Scores of the windows, float32 of shape N."""
    return SCORE_SCALE * grid.mean(score_map_dhw)


def candidates(coarse: CoarsePrediction, grid: WindowGrid, at_least: int = 1) -> Tensor:
    """Windows in which the coarse prediction sees any foreground; all windows where these are fewer than `at_least`.

    It looks at probabilities and not at the winning class, or a lesion smaller than a low-resolution voxel would rule
    out its window for ever.

    Args:
        coarse: prediction of the global branch.
        grid: the windows.
        at_least: smallest number of candidates.

    Returns:
        bool of shape N.
    """
    foreground_dhw = coarse.encoding.foreground_probability(coarse.logits_Cdhw.detach())
    candidates_N = grid.max(foreground_dhw) >= CANDIDATE_THRESHOLD
    return candidates_N | (candidates_N.sum() < at_least)
