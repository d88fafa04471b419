"""Labels of a fused prediction on the image's grid where it costs less to compute than to decide what to compute.

A GPU waits for the host at each decision that depends on data, and interpolates millions of values in the time in which
a kernel is launched. So all logits of a slab of planes are worked out, resampled and decided, without a look at them.
`inference.planes` has what a processor does; the labels are the same, up to ties that rounding decides.

Tensor suffixes: C channels of the logits, D H W axes of the padded volume, Z Y X axes of the cropped image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_nmsw.inference.planes import FusedPrediction, slabs_of
from nnunet_nmsw.transfer import fetched
from nnunet_nmsw.volume.interpolation import Axis, interpolated_between
from nnunet_nmsw.volume.windows import Shape

COPIES = 6
"""Of a slab's logits in single precision, while they are fused and resampled: counted, and rounded up."""

SHARE_OF_FREE_MEMORY = 0.25
"""For a slab. The logits of windows and activations of the networks take the rest."""

MOST_PLANES = 128
"""Further ones make a slab no faster."""


def segment_slabs(
    prediction: FusedPrediction, axes: Sequence[Axis], offset: Sequence[int], inside: Shape, planes_at_once: int
) -> Tensor:
    """Labels on the grid of the cropped image; arguments and result as in `planes.segment`."""
    # What is asked of an axis is asked on the host.
    needed = [None if axis.is_identity(n) else axis for axis, n in zip(axes, inside, strict=True)]
    in_plane = [axis and axis.to(prediction.device) for axis in needed[1:]]
    box = [slice(offset[axis], offset[axis] + inside[axis]) for axis in (1, 2)]
    shape = [len(axis.lower) for axis in axes]
    result_ZYX = torch.empty(shape, dtype=torch.int16, device=prediction.device)
    for slab, first, end in slabs_of(axes[0], planes_at_once):
        across = needed[0] and axes[0].part(slab.start, slab.stop).to(prediction.device)
        end = end if across is not None else first + slab.stop - slab.start
        logits_CDHW = prediction.dense(offset[0] + first, offset[0] + end, box)
        logits_CZYX = interpolated_between(logits_CDHW, [across, *in_plane])
        result_ZYX[slab] = prediction.encoding.decided(logits_CZYX)
        del logits_CDHW, logits_CZYX  # before the next ones are made
    return fetched(result_ZYX)


def planes_of_slab(memory: float, num_channels: int, axes: Sequence[Axis], inside: Shape) -> int:
    """Planes of the volume that a slab may have.

    Args:
        memory: bytes for the slab.
        num_channels: of the logits.
        axes: from the volume to the image.
        inside: voxels of the volume by axis.
    """
    planes = max(1.0, len(axes[0].lower) / inside[0])  # of the image, for each of the volume
    voxels = max(math.prod(inside[1:]), planes * len(axes[1].lower) * len(axes[2].lower))
    return max(1, min(MOST_PLANES, int(memory / (COPIES * 4 * num_channels * voxels))))


def free_memory(device: torch.device, otherwise: int) -> float:
    """Bytes of a device for a slab.

    Args:
        device: that computes.
        otherwise: where the device does not say how much is free.
    """
    if device.type != "cuda":
        return otherwise
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return SHARE_OF_FREE_MEMORY * free
