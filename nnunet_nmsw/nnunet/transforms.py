"""What is private of batchgeneratorsv2's transforms: their parameters, drawn on the host, and what a GPU cannot do.

Tensor suffixes: C channels, D H W axes of a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from nnunet_nmsw.transfer import sent

BY_SHAPE = (
    GaussianNoiseTransform,
    GaussianBlurTransform,
    MultiplicativeBrightnessTransform,
    ContrastTransform,
    SimulateLowResolutionTransform,
    GammaTransform,
)
"""Transforms whose parameters depend on the shape of an image and not on its values."""


def transformed(transform: BasicTransform, view: dict[str, Any]) -> dict[str, Any]:
    """A view after a transform.

    What nnU-Net's own transforms draw is drawn on the host: to draw it on a GPU, and look at it, lets the host wait.

    Args:
        transform: of batchgeneratorsv2.
        view: `image` (C, D, H, W) and `segmentation` (1, D, H, W), changed in place.
    """
    stand_in = torch.empty(1).expand(view["image"].shape)
    if isinstance(transform, RandomTransform) and isinstance(transform.transform, BY_SHAPE):
        if not transform.get_parameters(image=stand_in)["apply_transform"]:
            return view
        transform = transform.transform
    if not isinstance(transform, BY_SHAPE):
        after: dict[str, Any] = transform(**view)
        return after
    return transform.apply(view, **transform.get_parameters(image=stand_in))


class NoiseOfViews(GaussianNoiseTransform):
    """nnU-Net's noise, with parameters that were drawn on the host."""

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        return super()._apply_to_image(img, **{**params, "apply_idx": sent(params["apply_idx"], img.device)})


class OneHotOfViews(MoveSegAsOneHotToDataTransform):
    """nnU-Net's channels of a previous stage's labels, on the device of the image. nnU-Net makes them on the host."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """See the parent."""
        image_CDHW, labels = data_dict["image"], data_dict["segmentation"].unbind()
        labels_DHW = labels[self.source_channel_idx]
        channels = torch.stack([labels_DHW == label for label in self.all_labels]).to(image_CDHW.dtype)
        data_dict["image"] = torch.cat([image_CDHW, channels])
        if self.remove_channel_from_source:
            left = [of_one for number, of_one in enumerate(labels) if number != self.source_channel_idx]
            data_dict["segmentation"] = torch.stack(left)
        return data_dict


def on_device_of_mask(operator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A morphological operator of a mask and a structuring element, which nnU-Net makes on the host."""

    def applied(mask_DHW: Tensor, element_DHW: Tensor) -> Tensor:
        return operator(mask_DHW, sent(element_DHW, mask_DHW.device))

    return applied


class DrawnAnew(BasicTransform):
    """Mixin of transforms that shuffle their channels in place: a draw does not depend on the draws before."""

    channel_idx: list[int]

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """See the parent."""
        self.channel_idx = sorted(self.channel_idx)
        parameters: dict[str, Any] = super().get_parameters(**data_dict)
        return parameters


class OperatorOfViews(DrawnAnew, ApplyRandomBinaryOperatorTransform):
    """nnU-Net's morphological operators."""


class RemovalOfViews(DrawnAnew, RemoveRandomConnectedComponentFromOneHotEncodingTransform):
    """nnU-Net's removal of components, which are found on the host."""

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        if not params["apply_to_channels"] or img.device.type == "cpu":
            return super()._apply_to_image(img, **params)
        return sent(super()._apply_to_image(img.cpu(), **params), img.device)


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


def for_views(transform: BasicTransform) -> BasicTransform:
    """The transform, or what stands in for it here."""
    if isinstance(transform, RandomTransform):
        transform.transform = for_views(transform.transform)
    elif isinstance(transform, GaussianBlurTransform):
        return BlurOfViews(
            transform.blur_sigma,
            transform.synchronize_channels,
            transform.synchronize_axes,
            transform.p_per_channel,
            benchmark=True,
        )
    elif isinstance(transform, MoveSegAsOneHotToDataTransform):
        return OneHotOfViews(transform.source_channel_idx, transform.all_labels, transform.remove_channel_from_source)
    elif isinstance(transform, ApplyRandomBinaryOperatorTransform):
        operators = tuple(on_device_of_mask(operator) for operator in transform.any_of_these)
        return OperatorOfViews(transform.channel_idx, operators, transform.strel_size, transform.p_per_label)
    elif isinstance(transform, RemoveRandomConnectedComponentFromOneHotEncodingTransform):
        return RemovalOfViews(
            transform.channel_idx,
            transform.fill_with_other_class_p,
            transform.dont_do_if_covers_more_than_x_percent,
            transform.p_per_label,
        )
    elif isinstance(transform, GaussianNoiseTransform):
        return NoiseOfViews(transform.noise_variance, transform.p_per_channel, transform.synchronize_channels)
    return transform
