"""Ways of picking windows that NMSW is compared with.

Tensor suffixes: N windows of the grid, K chosen windows, 3 one coordinate per axis, C classes, d h w axes of the
low-resolution view.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from scipy import ndimage

from nnunet_nmsw.geometry import WindowGrid
from nnunet_nmsw.network import CoarsePrediction, NMSWNetwork, WindowChoice
from nnunet_nmsw.topk import top_k


def no_windows() -> WindowChoice:
    """None: what remains is the global branch."""
    return WindowChoice.fully_trusted(torch.zeros((0, 3), dtype=torch.int64), torch.zeros(0))


def random_windows(
    network: NMSWNetwork, coarse: CoarsePrediction, grid: WindowGrid, num_patches: int, seed: int
) -> WindowChoice:
    """Windows with predicted foreground in random order, then others; fewer of the same seed are a part of more."""
    generator = torch.Generator().manual_seed(seed)
    return _best(network, coarse, grid, num_patches, torch.rand(len(grid), generator=generator))


def entropy_windows(network: NMSWNetwork, coarse: CoarsePrediction, grid: WindowGrid, num_patches: int) -> WindowChoice:
    """Windows by the mean entropy of the coarse prediction, those with predicted foreground first."""
    return _best(network, coarse, grid, num_patches, grid.mean(network.entropy(coarse.logits_Cdhw)).cpu())


def object_windows(coarse: CoarsePrediction, grid: WindowGrid) -> WindowChoice:
    """Windows over the bounding box of each object of the coarse prediction, centred, off the grid.

    An object is a connected component of foreground (faces, edges and corners connect). A box larger than a patch is
    covered by nnU-Net's sliding window over the box. An object inside a window that is there already needs none of its
    own, and there are never more windows than in the grid. Windows have no scores; they are ordered by the objects'
    volume.
    """
    foreground_dhw = coarse.logits_Cdhw.argmax(0).cpu().numpy() > 0
    components_dhw, number = ndimage.label(foreground_dhw, np.ones((3, 3, 3)))
    volumes = ndimage.sum_labels(foreground_dhw, components_dhw, np.arange(1, number + 1))
    boxes = ndimage.find_objects(components_dhw)
    starts: dict[tuple[int, ...], None] = {}
    patch = np.array(grid.patch_size)
    for index in np.argsort(-np.atleast_1d(volumes), kind="stable"):
        factors = np.array(grid.downsampling_factor)
        box_first = np.array([extent.start for extent in boxes[index]]) * factors
        box_end = np.minimum(np.array([extent.stop for extent in boxes[index]]) * factors, grid.volume_shape)
        placed = np.array(list(starts)).reshape(-1, 3)
        if ((placed <= box_first) & (box_end <= placed + patch)).all(1).any():
            continue
        axis_starts = []
        for axis, (first, end) in enumerate(zip(box_first.tolist(), box_end.tolist(), strict=True)):
            size = grid.patch_size[axis]
            last_start = grid.volume_shape[axis] - size
            if end - first <= size:
                axis_starts.append([min(max((first + end - size) // 2, 0), last_start)])
            else:
                (steps,) = compute_steps_for_sliding_window((end - first,), (size,), grid.tile_step_size)
                axis_starts.append([first + step for step in steps])
        starts.update(dict.fromkeys(itertools.product(*axis_starts)))
    if not starts:
        return no_windows()
    kept = list(starts)[: len(grid)]
    return WindowChoice.fully_trusted(torch.tensor(kept, dtype=torch.int64), torch.zeros(len(kept)))


def _best(
    network: NMSWNetwork, coarse: CoarsePrediction, grid: WindowGrid, num_patches: int, scores_N: torch.Tensor
) -> WindowChoice:
    candidates_N = network.candidates(coarse.logits_Cdhw, grid, at_least=1).cpu()
    indices_K = top_k(scores_N, candidates_N, num_patches)
    return WindowChoice.fully_trusted(grid.starts_N3[indices_K], scores_N[indices_K].float())
