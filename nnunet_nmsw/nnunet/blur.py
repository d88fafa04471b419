"""What is private of batchgeneratorsv2's blur.

Tensor suffixes: C channels, D H W axes of a view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor


class BlurOfViews(GaussianBlurTransform):
    """nnU-Net's blur with its parameters, on the device of the image and for axes of any length.

    The original builds its kernel on the host, reflects more voxels than a thin view has, and times two implementations
    for every new shape, which here is every volume.
    """

    def _benchmark_wrapper(self, img: Tensor, sigma: float, dim_to_blur: int) -> Tensor:
        half = max(1, round(3 * sigma))
        offsets = torch.arange(-half, half + 1, device=img.device, dtype=img.dtype)
        kernel = (-0.5 * (offsets / sigma).square()).softmax(0)
        lines = img.movedim(dim_to_blur + 1, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (half, half), mode="replicate")
        return F.conv1d(padded, kernel[None, None]).view(lines.shape).movedim(-1, dim_to_blur + 1)


def with_blur_of_views(transform: BasicTransform) -> BasicTransform:
    """The transform, or `BlurOfViews` in the place of a blur."""
    if isinstance(transform, RandomTransform):
        transform.transform = with_blur_of_views(transform.transform)
    elif isinstance(transform, GaussianBlurTransform):
        return BlurOfViews(
            transform.blur_sigma,
            transform.synchronize_channels,
            transform.synchronize_axes,
            transform.p_per_channel,
            benchmark=True,
        )
    return transform
