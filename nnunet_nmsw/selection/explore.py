"""Windows where nobody expects anything: a guard against objects that the coarse prediction misses altogether.

Tensor suffixes: N windows to choose from, K windows, d h w axes of the low-resolution view, D H W axes of the volume,
3 one coordinate per axis.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import binary_fill_holes
from skimage.filters import threshold_otsu
from torch import Tensor

from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.by_score import chosen, greedy_benefit, placement_grid
from nnunet_nmsw.selection.interface import WindowChoice, scores
from nnunet_nmsw.volume.windows import WindowGrid, downsample, window_slices

WORTH_A_WINDOW = 0.05
"""Share of a window that has to be body without a window so far."""


def body_of(image_DHW: Tensor) -> Tensor:
    """Where the body is: what is brighter than air, and what that encloses, float32 of the same shape, 0 or 1.

    Otsu's threshold tells the two apart, in CT and in MR alike. Holes are filled plane by plane along each axis: lungs
    that a scan cuts are enclosed by the body in the planes across it.

    Args:
        image_DHW: an image in which air is darker than the rest.
    """
    array = np.nan_to_num(image_DHW.numpy())
    if array.min() == array.max():
        return torch.ones(array.shape)
    bright = array > threshold_otsu(array)
    filled = bright.copy()
    for axis in range(3):
        planes, found = np.moveaxis(bright, axis, 0), np.moveaxis(filled, axis, 0)
        for plane, into in zip(planes, found, strict=True):
            into |= binary_fill_holes(plane)
    return torch.from_numpy(filled).float()


def explored(windows: WindowChoice, body_dhw: Tensor, grid: WindowGrid, number: int) -> WindowChoice:
    """Chosen windows and more, placed greedily over the part of the body that no window covers.

    Args:
        windows: that are taken already.
        body_dhw: share of body in each low-resolution voxel.
        grid: of the volume.
        number: of windows to add, at most: none is added to what is covered.
    """
    if number == 0:
        return windows
    grid = placement_grid(grid)
    open_1DHW = torch.ones(1, *grid.volume_shape)
    for start in windows.starts_K3.tolist():
        open_1DHW[(0, *window_slices(start, grid.patch_size))] = 0
    left_dhw = body_dhw * downsample(open_1DHW[None], grid.downsampling_factor)[0, 0].to(body_dhw.device)
    all_N = torch.ones(len(grid), dtype=torch.bool, device=body_dhw.device)
    indices_K = greedy_benefit(left_dhw, all_N, Budget(number, WORTH_A_WINDOW), grid)
    more = chosen(indices_K, scores(left_dhw, grid), grid)
    return WindowChoice(torch.cat([windows.starts_K3, more.starts_K3]), torch.cat([windows.scores_K, more.scores_K]))
