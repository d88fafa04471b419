"""Windows for a model whose classes may not be there."""

from __future__ import annotations

from typing import NamedTuple

from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.by_score import TopK
from nnunet_nmsw.selection.interface import CoarsePrediction, Selector, WindowChoice, candidates
from nnunet_nmsw.volume.windows import WindowGrid


class OfPresentClasses(NamedTuple):
    """Spends nothing on windows in which the coarse prediction sees none of the classes; see `candidates`.

    Attributes:
        selector: chooses among the others.
    """

    selector: Selector

    @property
    def name(self) -> str:
        """See `Selector`."""
        return f"{self.selector.name}_of_present_classes"

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`. No more windows than those of the grid that have a class."""
        number = int(candidates(coarse, grid, at_least=0).sum())
        if number == 0:
            return WindowChoice.nothing()
        if budget.num_windows >= len(grid) and budget.threshold is None:
            return TopK().choose(coarse, grid, Budget(number))  # every window that has a class
        return self.selector.choose(coarse, grid, budget._replace(num_windows=min(budget.num_windows, number)))
