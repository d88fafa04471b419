"""Windows picked by someone who knows the truth: what any selector could reach with the same two networks.

Tensor suffixes: N windows of the grid, C channels of the logits, F foreground classes or regions, D H W axes of the
volume or of a patch, S sums by foreground class (true positives, then predicted voxels; 2 × F).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_nmsw.model.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.interface import CoarsePrediction, WindowChoice
from nnunet_nmsw.volume.interpolation import upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import WindowGrid, crop, window_slices

SLAB = 16
"""Slices of the volume whose coarse logits are upsampled at once."""


class Oracle:
    """Chooses as `oracle_windows` does.

    Args:
        patch_logits: logits of a window by its first voxel, shape C, patch size.
        weights: of the fusion.
        reference_DHW: the truth, integer labels of the padded volume.
        devices: to compute on; a later one where one has too little memory.
    """

    name: ClassVar[str] = "oracle"

    def __init__(
        self,
        patch_logits: Callable[[Sequence[int]], Tensor],
        weights: FusionWeights,
        reference_DHW: Tensor,
        devices: Sequence[torch.device],
    ) -> None:
        self.patch_logits, self.weights, self.reference_DHW = patch_logits, weights, reference_DHW
        self.devices = list(dict.fromkeys(devices))
        self._chosen: list[tuple[int, float]] = []
        self._further: Iterator[tuple[int, float]] | None = None

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`. Of the same case each time."""
        while self._further is None or len(self._chosen) < budget.num_windows:
            try:
                self._further = self._further or self._ask_on(self.devices[0], coarse, grid)
                self._chosen.append(next(self._further))
            except StopIteration:
                break
            except torch.OutOfMemoryError:
                if len(self.devices) == 1:
                    raise
                self.devices, self._chosen, self._further = self.devices[1:], [], None
        chosen = self._chosen[: budget.num_windows]
        indices_K = torch.tensor([window for window, _ in chosen], dtype=torch.int64)
        return WindowChoice(grid.starts_N3[indices_K], torch.tensor([gain for _, gain in chosen]))

    def _ask_on(self, device: torch.device, coarse: CoarsePrediction, grid: WindowGrid) -> Iterator[tuple[int, float]]:
        def patch_logits(window: int) -> Tensor:
            return self.patch_logits(grid.starts_N3[window].tolist()).to(device)

        of_case = (coarse.logits_Cdhw.to(device), self.weights.to(device), self.reference_DHW.to(device))
        return oracle_windows(patch_logits, *of_case, grid, coarse.encoding)


def oracle_windows(
    patch_logits: Callable[[int], Tensor],
    coarse_logits_Cdhw: Tensor,
    weights: FusionWeights,
    reference_DHW: Tensor,
    grid: WindowGrid,
    encoding: LabelEncoding,
) -> Iterator[tuple[int, float]]:
    """Take the window that raises the mean Dice of the foreground classes, or regions, most, until none raises it.

    The Dice is that of the prediction that follows from the windows taken so far, blended and fused. The choice is
    greedy, so a close estimate of the best set of windows and not a proof of it. Needs the memory of one volume of half
    precision logits, as nnU-Net's sliding window does.

    Args:
        patch_logits: logits of a window by its index in the grid, shape C, patch size.
        coarse_logits_Cdhw: coarse prediction.
        weights: of the fusion.
        reference_DHW: the truth, integer labels. Ignored voxels do not count.
        grid: the windows.
        encoding: of the labels.

    Yields:
        A window's index in the order of choice, and by how much it raises the mean Dice. What is not asked for is not
        worked out.
    """
    num_classes, device = len(coarse_logits_Cdhw), coarse_logits_Cdhw.device
    gaussian_DHW = gaussian_weights(grid.patch_size, device)
    sum_CDHW = torch.zeros((num_classes, *grid.volume_shape), dtype=torch.half, device=device)
    weight_DHW = torch.zeros(grid.volume_shape, device=device)
    boxes = [window_slices(start, grid.patch_size) for start in grid.starts_N3.tolist()]

    def coarse_CDHW(start: Sequence[int], size: Sequence[int]) -> Tensor:
        return upsample_window(coarse_logits_Cdhw, start, size, grid.downsampling_factor)

    depth, height, width = grid.volume_shape

    def labels_of(logits_CDHW: Tensor) -> Tensor:
        return encoding.labels_of(encoding.decided(logits_CDHW))

    # Labels that the dataset does not have belong to no class.
    reference_DHW = torch.where(reference_DHW < encoding.num_labels, reference_DHW, 0).clamp_min(0)
    labels_DHW = torch.cat(
        [labels_of(coarse_CDHW((z, 0, 0), (min(SLAB, depth - z), height, width))) for z in range(0, depth, SLAB)]
    )

    def sums(prediction: Tensor, truth: Tensor) -> Tensor:
        """The sums S, and what the reference holds of each foreground class."""
        hit_F, wrong_F, missed_F = encoding.hits(truth, prediction)
        return torch.stack([hit_F, hit_F + wrong_F, hit_F + missed_F]).double()

    def labels_with(window: int) -> Tensor:
        """Labels inside a window if it were taken, too."""
        start = grid.starts_N3[window].tolist()
        blended_CDHW = crop(sum_CDHW, start, grid.patch_size) + gaussian_DHW * patch_logits(window).float()
        blended_CDHW /= crop(weight_DHW, start, grid.patch_size) + gaussian_DHW
        fused_CDHW = fuse(blended_CDHW, coarse_CDHW(start, grid.patch_size), weights)
        return labels_of(fused_CDHW)

    def change(window: int) -> Tensor:
        """What taking a window adds to the sums S."""
        old, new, truth = labels_DHW[boxes[window]], labels_with(window), reference_DHW[boxes[window]]
        changed = old != new
        old, new, truth = old[changed], new[changed], truth[changed]
        return sums(new, truth)[:2] - sums(old, truth)[:2]

    *of_prediction, reference_F = sums(labels_DHW, reference_DHW)
    sums_S = torch.stack(of_prediction)
    changes_NS = torch.stack([change(window) for window in range(len(grid))])

    def mean_dice(sums_S: Tensor) -> Tensor:
        # One voxel of smoothing: for a class that is not there, fewer predicted voxels are still better.
        true_positives, predicted = sums_S[..., 0, :], sums_S[..., 1, :]
        return ((2 * true_positives + 1) / (predicted + reference_F + 1)).mean(-1)

    order: list[int] = []
    while len(order) < len(grid):
        gain_N = mean_dice(sums_S + changes_NS) - mean_dice(sums_S)
        gain_N[order] = -torch.inf
        best = int(gain_N.argmax())
        if gain_N[best] <= 0:
            break
        order.append(best)
        yield best, float(gain_N[best])
        sums_S = sums_S + changes_NS[best]
        labels_DHW[boxes[best]] = labels_with(best)
        sum_CDHW[(slice(None), *boxes[best])] += gaussian_DHW * patch_logits(best).float()
        weight_DHW[boxes[best]] += gaussian_DHW
        distance_N3 = (grid.starts_N3 - grid.starts_N3[best]).abs()
        for window in (distance_N3 < torch.tensor(grid.patch_size)).all(1).nonzero()[:, 0].tolist():
            changes_NS[window] = change(window)
