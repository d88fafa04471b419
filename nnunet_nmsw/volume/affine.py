"""Windows of a rotated and scaled volume.

Tensor suffixes: 1 a batch of one, C channels, D H W axes of the volume or of a window, N steps along all axes, 3 one
coordinate per axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_nmsw.transfer import sent
from nnunet_nmsw.volume.windows import crop

OUTSIDE = -1
"""nnU-Net's label of voxels outside of the image."""


def sample_affine(
    volume_1CDHW: Tensor,
    affine_33: np.ndarray,
    start: Sequence[int],
    size: Sequence[int],
    centre: np.ndarray | None = None,
    nearest: bool = False,
    outside: float = 0.0,
) -> Tensor:
    """A window of a rotated and scaled volume, linearly interpolated.

    The value at position x of the rotated volume is that of the volume at A (x - c) + c.

    Args:
        volume_1CDHW: any floating type.
        affine_33: A.
        start: first voxel of the window in the rotated volume, which has the volume's shape.
        size: voxels of the window by axis.
        centre: c, in voxels; the volume's centre where None.
        nearest: take the nearest voxel's value instead.
        outside: the value outside of the volume.

    Returns:
        float32 of shape 1, C, `size`. Only what the window looks at is read and converted.
    """
    shape, device = np.array(volume_1CDHW.shape[2:]), volume_1CDHW.device
    if centre is None:
        centre = (shape - 1) / 2
    corners = np.array(list(itertools.product(*((a, a + n - 1) for a, n in zip(start, size, strict=True)))))
    reached = (corners - centre) @ affine_33.T + centre
    first = np.clip(np.floor(reached.min(0)).astype(int), 0, shape - 1)
    end = np.clip(np.ceil(reached.max(0)).astype(int) + 1, first + 1, shape)
    piece_1CDHW = crop(volume_1CDHW, first.tolist(), (end - first).tolist()).float() - outside
    # grid_sample's positions: -1 and 1 are the outer edges of the first and the last voxel, axes in reverse order.
    scale = 2 / (end - first)
    linear = torch.as_tensor(affine_33 * scale[:, None], dtype=torch.float32)
    origin = affine_33 @ (np.array(start) - centre) + centre - first
    along = [torch.arange(n, dtype=torch.float32)[:, None] * linear[:, axis] for axis, n in enumerate(size)]
    along_N3 = torch.cat([torch.as_tensor((origin + 0.5) * scale - 1, dtype=torch.float32)[None], *along])
    position_DHW3, *along = sent(along_N3, device).split([1, *size])
    for axis, n in enumerate(size):
        position_DHW3 = position_DHW3 + along[axis].view([n if a == axis else 1 for a in range(3)] + [3])
    sampled_1CDHW = F.grid_sample(
        piece_1CDHW,
        position_DHW3.flip(-1)[None],
        mode="nearest" if nearest else "bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled_1CDHW + outside


def sample_labels_affine(
    labels_11DHW: Tensor,
    affine_33: np.ndarray,
    start: Sequence[int],
    size: Sequence[int],
    centre: np.ndarray | None = None,
) -> Tensor:
    """A window of a rotated and scaled label map, the nearest voxel's label; -1 outside. See `sample_affine`."""
    sampled = sample_affine(labels_11DHW, affine_33, start, size, centre, nearest=True, outside=OUTSIDE)
    return sampled.round().to(labels_11DHW.dtype)
