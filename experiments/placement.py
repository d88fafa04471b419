"""Ways to place windows, compared on a model that is trained, or is being trained.

    python experiments/placement.py -d 731 -p PLANS -tr nnUNetTrainerNMSW -checkpoint FILE -o placement.json

Dice of the first validation cases, measured as in `ablation_run.py`. The way that is tried here takes the window that
wins most, then the window that wins most after it, and so on. A window sees its centre well and its border badly. A
place is worth its predicted benefit, times how well the best of the windows sees it. So a window wins what it sees
better than the windows before it: no second window goes to a place that is well seen.

Tensor suffixes: N windows, K chosen windows, a b c positions of windows by axis, D H W axes of the volume, d h w axes
of the low-resolution view or of its cells.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ablation_run import MOST_CASES, shared_fold
from nnunetv2.run.run_training import get_trainer_from_args
from torch import Tensor
from training_run import precision_of

from nnunet_nmsw.evaluation.shared import SharedFold
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts, Nothing
from nnunet_nmsw.inference.volume import Padded, Spending, choose
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.by_score import chosen, greedy_benefit, placement_grid
from nnunet_nmsw.selection.interface import CoarsePrediction, Selector, WindowChoice, candidates, scores
from nnunet_nmsw.trainers.cases import read_cases
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.validation import labels_of
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.precision import full_precision
from nnunet_nmsw.volume.windows import WindowGrid, downsample

CELLS = 8
"""Along each axis of a window, or some more: so finely the score map is looked at. Finer takes long."""


class Discounted(NamedTuple):
    """The package's greedy placement with another discount, or on nnU-Net's own grid.

    Attributes:
        discount: share of a place's benefit that is gone with the first window over it.
        on_grid: take positions of nnU-Net's grid, none between them.
    """

    discount: float
    on_grid: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        return f"discount {self.discount:g}" + ", on the grid" * self.on_grid

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        grid = grid if self.on_grid else placement_grid(grid)
        indices_K = greedy_benefit(coarse.score_map_dhw, candidates(coarse, grid), budget, grid, self.discount)
        return chosen(indices_K, scores(coarse.score_map_dhw, grid), grid)


class WellSeen(NamedTuple):
    """What is tried here.

    Attributes:
        bell: how fast a window's view gets worse from its centre on; see `views`.
        entropy: added to the predicted benefit of a place, by nat of the coarse prediction's entropy.
        on_grid: take positions of nnU-Net's grid, none between them.
    """

    bell: float
    entropy: float = 0.0
    on_grid: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        return f"well seen, bell {self.bell:g}, entropy {self.entropy:g}" + ", on the grid" * self.on_grid

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        grid = grid if self.on_grid else placement_grid(grid)
        map_dhw = coarse.score_map_dhw.float() + self.entropy * coarse.encoding.entropy(coarse.logits_Cdhw)
        indices_K = well_seen(map_dhw, candidates(coarse, grid), budget, grid, self.bell)
        return chosen(indices_K, scores(map_dhw, grid), grid)


def well_seen(map_dhw: Tensor, candidates_N: Tensor, budget: Budget, grid: WindowGrid, bell: float) -> Tensor:
    """The window that wins most, then the window that wins most after it, and so on; see the module.

    Args:
        map_dhw: predicted benefit by low-resolution voxel, float32.
        candidates_N: bool, the windows to take before others.
        budget: how many windows, and how good.
        grid: the windows.
        bell: see `views`.

    Returns:
        Window indices in the order of choice, candidates before others.
    """
    map_dhw, grid = in_cells(map_dhw, grid)
    of_axes = views(grid, bell)
    seen_dhw = torch.zeros_like(map_dhw)
    # What a window wins is the mean of the map where it is the same everywhere and nothing is seen.
    whole = math.prod(float(view.sum(1).max()) for view in of_axes)
    with full_precision(map_dhw.device):
        gains_abc = torch.einsum("ad,bh,cw,dhw->abc", *of_axes, map_dhw) / whole
    gains_N = gains_abc.view(-1)
    available_N, taken = torch.ones_like(candidates_N), []
    while len(taken) < min(budget.num_windows, len(grid)):
        first_N = available_N & candidates_N
        gain, best = gains_N.masked_fill(~(first_N if first_N.any() else available_N), -torch.inf).max(0)
        if budget.threshold is not None and gain <= budget.threshold:
            break
        taken.append(int(best))
        available_N[best] = False
        at = [extent.flatten() for extent in grid.touched(best)]
        here = np.unravel_index(int(best), gains_abc.shape)
        near = [positions_near(grid, axis, int(position)) for axis, position in enumerate(here)]
        views_at = [view[:, voxels] for view, voxels in zip(of_axes, at, strict=True)]
        view_dhw = outer([view[[position]] for view, position in zip(views_at, here, strict=True)])[0, 0, 0]
        before_dhw = seen_dhw[np.ix_(*at)]
        after_dhw = torch.maximum(before_dhw, view_dhw)
        seen_dhw[np.ix_(*at)] = after_dhw
        of_near = [view[positions] for view, positions in zip(views_at, near, strict=True)]
        gains_abc[tuple(near)] -= no_longer_won(map_dhw[np.ix_(*at)], before_dhw, after_dhw, of_near) / whole
    return torch.tensor(taken, dtype=torch.int64)


def in_cells(map_dhw: Tensor, grid: WindowGrid) -> tuple[Tensor, WindowGrid]:
    """A low-resolution map, averaged over cells, and the grid with cells for low-resolution voxels."""
    a, b, c = (
        max(1, size // (factor * CELLS)) for size, factor in zip(grid.patch_size, grid.downsampling_factor, strict=True)
    )
    d, h, w = grid.downsampling_factor
    cells = dataclasses.replace(grid, downsampling_factor=(a * d, b * h, c * w))
    return downsample(map_dhw[None, None], (a, b, c))[0, 0], cells


def views(grid: WindowGrid, bell: float) -> list[Tensor]:
    """How well the windows see low-resolution voxels, by axis; of a window the product over the axes.

    Args:
        grid: the windows.
        bell: standard deviation of the Gaussian around a window's centre, as a fraction of the patch size.

    Returns:
        By axis positions × voxels: the Gaussian, times the share of the voxel that the window covers.
    """
    of_axes = []
    for steps, size, factor, end_of_volume in zip(
        grid.steps, grid.patch_size, grid.downsampling_factor, grid.volume_shape, strict=True
    ):
        start = torch.tensor(steps, dtype=torch.float32)[:, None]
        edge = torch.arange(0, end_of_volume, factor, dtype=torch.float32)[None]
        first, end = torch.maximum(start, edge), torch.minimum(start + size, edge + factor)
        share = (end - first).clamp_min(0) / (end_of_volume - edge).clamp_max(factor)
        from_centre = ((first + end) / 2 - start) / size - 0.5
        of_axes.append(share * torch.exp(-0.5 * (from_centre / bell) ** 2))
    return of_axes


def positions_near(grid: WindowGrid, axis: int, position: int) -> slice:
    """Positions along an axis whose windows share a low-resolution voxel with the window at one of them."""
    size, factor = grid.patch_size[axis], grid.downsampling_factor[axis]
    voxels = [(step // factor, -(-(step + size) // factor)) for step in grid.steps[axis]]
    first, end = voxels[position]
    near = [index for index, (a, b) in enumerate(voxels) if a < end and first < b]
    return slice(near[0], near[-1] + 1)


def no_longer_won(benefit_dhw: Tensor, before_dhw: Tensor, after_dhw: Tensor, of_axes: Sequence[Tensor]) -> Tensor:
    """What windows do not win any more once some voxels are seen better.

    Args:
        benefit_dhw: of these voxels.
        before_dhw: how well they were seen.
        after_dhw: how well they are seen.
        of_axes: views of the windows, by axis positions × voxels.

    Returns:
        Sums over the voxels, of the shape of the positions.
    """
    first, *others = of_axes
    rows = []
    for view_d in first:  # one after the other: all at once take much memory
        won_bcdhw = torch.clamp(outer([view_d[None], *others])[0], before_dhw, after_dhw) - before_dhw
        rows.append((won_bcdhw * benefit_dhw).sum((-3, -2, -1)))
    return torch.stack(rows)


def outer(of_axes: Sequence[Tensor]) -> Tensor:
    """Views by axis as views of windows: positions of three axes × voxels of three axes."""
    d, h, w = of_axes
    return d[:, None, None, :, None, None] * h[:, None, None, :, None] * w[:, None, None, :]


WAYS_TRIED: tuple[Selector, ...] = (
    *(WAYS[name].selector(CaseFacts()) for name in ("greedy_benefit", "top_k", "entropy")),
    *(Discounted(discount) for discount in (0.2, 0.7, 1.0)),
    *(Discounted(discount, on_grid=True) for discount in (0.2, 0.4)),
    *(WellSeen(bell) for bell in (0.2, 0.3, 0.5)),
    WellSeen(0.3, on_grid=True),
    *(WellSeen(0.3, entropy) for entropy in (0.1, 0.3, 1.0, 1000.0)),
)
TRIED = {way.name: way for way in WAYS_TRIED}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset")
    parser.add_argument("-p", required=True, help="plans")
    parser.add_argument("-tr", default="nnUNetTrainerNMSW", help="trainer")
    parser.add_argument("-f", type=int, default=0, help="fold")
    parser.add_argument("-checkpoint", type=Path, required=True)
    parser.add_argument("-k", nargs="+", default=["5", "5%", "10%", "20%"], help="numbers of patches")
    parser.add_argument("-thresholds", nargs="*", type=float, default=[], help="of the automatic number of patches")
    parser.add_argument("-ways", nargs="+", default=list(TRIED), choices=TRIED, metavar="WAY", help="; ".join(TRIED))
    parser.add_argument("-cases", type=int, default=MOST_CASES)
    parser.add_argument("-o", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    trainer = get_trainer_from_args(args.d, "3d_fullres", args.f, args.tr, args.p, device=torch.device("cpu"))
    trainer.initialize()
    trainer.load_checkpoint(str(args.checkpoint))
    found: dict[str, dict[str, Any]] = {}
    with precision_of("cpu"), torch.inference_mode():
        for name, k, dice, windows in predicted(trainer, args):
            row = found.setdefault(f"{name}, K = {k}", {"dice": [], "windows": []})
            row["dice"].append(dice)
            row["windows"].append(windows)
    for name, row in found.items():
        by_class = np.nanmean(np.array(row["dice"]), 0)
        row["mean_dice"] = float(np.nanmean(by_class))
        row["dice"] = [[None if math.isnan(dice) else dice for dice in case] for case in row["dice"]]
        print(f"{name:60} {100 * row['mean_dice']:5.1f} {np.mean(row['windows']):6.1f} windows")
    args.o.write_text(json.dumps(found, indent=1))


def predicted(trainer: nnUNetTrainerNMSW, args: argparse.Namespace) -> Iterator[tuple[str, str, list[float], int]]:
    """Name of a way, K, Dice by class and number of windows, case by case."""
    network, encoding = trainer.nmsw_network.eval(), trainer.encoding
    trainer.set_deep_supervision_enabled(False)
    _, dataset = trainer.get_tr_and_val_datasets()
    for case in read_cases(dataset, dataset.identifiers[: args.cases], encoding):
        reference_DHW = torch.from_numpy(np.asarray(case.segmentation[0], dtype=np.int64)).clamp_min(0)
        padded = Padded.of(case.volume_CDHW, network.patch_size)
        fold = shared_fold(trainer, padded)
        dice_of = partial(dice_and_windows, fold, padded, reference_DHW, encoding)
        yield Nothing.name, "0", *dice_of(Spending(Nothing(), 1))
        yield "all windows", "all", *dice_of(Spending(WAYS["top_k"].selector(CaseFacts()), "all"))
        for way in (TRIED[name] for name in args.ways):
            for k in args.k:
                yield way.name, k, *dice_of(Spending(way, int(k) if k.isdigit() else k))
            for threshold in args.thresholds:
                yield way.name, f"auto {threshold:g}", *dice_of(Spending(way, "auto", threshold))
        fold.store.close()


def dice_and_windows(
    fold: SharedFold, padded: Padded, reference_DHW: Tensor, encoding: LabelEncoding, spending: Spending
) -> tuple[list[float], int]:
    """Dice by class, and the number of windows."""
    of_case = choose(fold, padded, spending)
    labels_DHW = labels_of(padded, of_case, reference_DHW.device)
    return encoding.dice(reference_DHW, labels_DHW).tolist(), len(of_case.windows.starts_K3)


if __name__ == "__main__":
    main()
