"""Ways of choosing windows in a comparison: NMSW's own, and yardsticks for them.

A new one is a class with the method `choose` (`selection.interface.Selector`), and a row in `WAYS`.

Tensor suffixes: N windows of the grid, K chosen windows, 3 one coordinate per axis, d h w axes of the low-resolution
view.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from scipy import ndimage
from torch import Tensor

from nnunet_nmsw.evaluation.oracle import Oracle
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.by_score import GreedyBenefit, GreedyCoverage, TopK, top_k
from nnunet_nmsw.selection.interface import CoarsePrediction, Selector, WindowChoice, candidates
from nnunet_nmsw.volume.windows import WindowGrid


@dataclasses.dataclass(frozen=True)
class CaseFacts:
    """What a way of choosing windows may know of a case.

    Attributes:
        seed: of the case.
        make_oracle: makes the oracle, who knows the reference and all patches.
    """

    seed: int = 0
    make_oracle: Callable[[], Oracle] | None = None

    @cached_property
    def oracle(self) -> Oracle:
        """Asked once: its choice of few windows is the beginning of its choice of many."""
        assert self.make_oracle is not None
        return self.make_oracle()


class Nothing:
    """No window: the global branch alone."""

    name: ClassVar[str] = "none"

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        return WindowChoice.nothing()


@dataclasses.dataclass(frozen=True)
class Random:
    """Windows with predicted foreground in random order, then others; fewer of the same seed are a part of more."""

    name: ClassVar[str] = "random"

    seed: int

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        generator = torch.Generator().manual_seed(self.seed)
        return _best(coarse, grid, budget, torch.rand(len(grid), generator=generator))


class Entropy:
    """Windows by the mean entropy of the coarse prediction, those with predicted foreground first."""

    name: ClassVar[str] = "entropy"

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        return _best(coarse, grid, budget, grid.mean(coarse.encoding.entropy(coarse.logits_Cdhw)).cpu())


class Objects:
    """Windows over the bounding box of each object of the coarse prediction, centred, off the grid.

    An object is a connected component of foreground (faces, edges and corners connect). A box larger than a patch is
    covered by nnU-Net's sliding window over the box. An object inside a window that is there already needs none of its
    own. Windows have no scores; they are ordered by the objects' volume.
    """

    name: ClassVar[str] = "objects"

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        foreground_dhw = coarse.encoding.decided(coarse.logits_Cdhw).cpu().numpy() > 0
        components_dhw, number = ndimage.label(foreground_dhw, np.ones((3, 3, 3)))
        volumes = ndimage.sum_labels(foreground_dhw, components_dhw, np.arange(1, number + 1))
        boxes = ndimage.find_objects(components_dhw)
        starts: dict[tuple[int, ...], None] = {}
        patch, factors = np.array(grid.patch_size), np.array(grid.downsampling_factor)
        for index in np.argsort(-np.atleast_1d(volumes), kind="stable"):
            first = np.array([extent.start for extent in boxes[index]]) * factors
            end = np.minimum(np.array([extent.stop for extent in boxes[index]]) * factors, grid.volume_shape)
            placed = np.array(list(starts)).reshape(-1, 3)
            if not ((placed <= first) & (end <= placed + patch)).all(1).any():
                starts.update(dict.fromkeys(_over(first.tolist(), end.tolist(), grid)))
        if not starts:
            return WindowChoice.nothing()
        kept = list(starts)[: budget.num_windows]
        return WindowChoice(torch.tensor(kept, dtype=torch.int64), torch.zeros(len(kept)))


def _over(first: list[int], end: list[int], grid: WindowGrid) -> list[tuple[int, ...]]:
    """First voxels of windows over a box."""
    axis_starts = []
    for axis, (a, b) in enumerate(zip(first, end, strict=True)):
        size = grid.patch_size[axis]
        if b - a <= size:
            axis_starts.append([min(max((a + b - size) // 2, 0), grid.volume_shape[axis] - size)])
        else:
            (steps,) = compute_steps_for_sliding_window((b - a,), (size,), grid.tile_step_size)
            axis_starts.append([a + step for step in steps])
    return list(itertools.product(*axis_starts))


def _best(coarse: CoarsePrediction, grid: WindowGrid, budget: Budget, scores_N: Tensor) -> WindowChoice:
    indices_K = top_k(scores_N, candidates(coarse, grid).cpu(), budget.num_windows)
    return WindowChoice(grid.starts_N3[indices_K], scores_N[indices_K].float())


class Way(NamedTuple):
    """A way of choosing windows, as a comparison shows it.

    Attributes:
        title: in the report.
        selector: makes the selector for a case.
        takes_k: it takes as many windows as it is told; else it decides itself.
        with_all: it is shown with all windows, too. They are the same whoever picks them.
        with_auto: it is shown with the number "auto", too, which goes with the predicted benefit.
        can_be_used: somebody could deploy it.
    """

    title: str
    selector: Callable[[CaseFacts], Selector]
    takes_k: bool = True
    with_all: bool = False
    with_auto: bool = False
    can_be_used: bool = True


WAYS: dict[str, Way] = {
    GreedyBenefit.name: Way("NMSW", lambda case: GreedyBenefit(), with_all=True, with_auto=True),
    TopK.name: Way("NMSW, top-k", lambda case: TopK()),
    GreedyCoverage.name: Way("NMSW, greedy coverage", lambda case: GreedyCoverage()),
    Nothing.name: Way("global branch alone", lambda case: Nothing(), takes_k=False),
    Random.name: Way("random foreground windows", lambda case: Random(case.seed), can_be_used=False),
    Entropy.name: Way("windows by entropy", lambda case: Entropy(), can_be_used=False),
    Objects.name: Way("zoom-in on predicted objects", lambda case: Objects(), takes_k=False),
    # It leaves out windows that harm, so that all of them are a choice.
    Oracle.name: Way("oracle", lambda case: case.oracle, with_all=True, can_be_used=False),
}
"""By the name in files."""
