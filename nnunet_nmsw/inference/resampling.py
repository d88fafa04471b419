"""nnU-Net's resampling of images, one axis after the other.

Spline interpolation is linear in the image and separable: along each axis it is a product with a matrix. The matrix is
what nnU-Net's own function makes of single voxels, so the result is nnU-Net's up to the rounding of float32, in a small
part of the time: on a large volume products of matrices are as fast as a processor can be.

Tensor suffixes: C channels, D H W axes of the source, t target voxels and s source voxels of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import ANISO_THRESHOLD, determine_do_sep_z_and_axis
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from skimage.transform import resize
from torch import Tensor

from nnunet_nmsw.inference.device import stream_of_its_own, unless_out_of_memory
from nnunet_nmsw.inference.preprocessor import ImagePreprocessor
from nnunet_nmsw.volume.interpolation import nearest_axis

KNOWN_RESAMPLING = "resample_data_or_seg_to_shape"
"""nnU-Net's default for images and probabilities: splines, of order 0 along the axis of an anisotropic image."""


def is_known(configuration: ConfigurationManager, what: str) -> bool:
    """Whether the plans resample in the way this package knows: splines, of order 0 along an anisotropic axis.

    Args:
        configuration: of the plans.
        what: "data" or "probabilities".
    """
    settings = configuration.configuration
    keywords = settings[f"resampling_fn_{what}_kwargs"]
    known = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
    return (
        settings[f"resampling_fn_{what}"] == KNOWN_RESAMPLING
        and keywords.get("order_z", 0) == 0
        and not keywords.get("is_seg", False)
        and set(keywords) <= known
    )


class InferenceConfiguration(ConfigurationManager):
    """A configuration of the plans whose images are preprocessed faster, for a prediction.

    Args:
        configuration: of the plans.
        device: to resample on.
        with_segmentation: resample what nnU-Net takes for the segmentation, too. Without a previous stage this is the
            mask of what is not zero, of which a prediction makes no use.
    """

    def __init__(self, configuration: ConfigurationManager, device: torch.device, with_segmentation: bool) -> None:
        super().__init__(configuration.configuration)
        self.device, self.with_segmentation = device, with_segmentation

    @property
    def preprocessor_class(self) -> type[DefaultPreprocessor]:
        """See the parent."""
        of_plans: type[DefaultPreprocessor] = super().preprocessor_class
        return ImagePreprocessor if of_plans is DefaultPreprocessor else of_plans

    @property
    def resampling_fn_data(self) -> Callable[..., Any]:
        """See the parent."""
        if not is_known(self, "data"):
            of_plans: Callable[..., Any] = super().resampling_fn_data
            return of_plans
        return partial(resample_image, device=self.device, **self.configuration["resampling_fn_data_kwargs"])

    @property
    def resampling_fn_seg(self) -> Callable[..., Any]:
        """See the parent."""
        if not self.with_segmentation:
            return lambda mask, *_: mask
        of_plans: Callable[..., Any] = super().resampling_fn_seg
        return of_plans


def resample_image(
    data: np.ndarray,
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    is_seg: bool = False,
    order: int = 3,
    order_z: int = 0,
    force_separate_z: bool | None = False,
    separate_z_anisotropy_threshold: float = ANISO_THRESHOLD,
    device: torch.device | None = None,
) -> np.ndarray:
    """An image on another grid: `resample_data_or_seg_to_shape` of nnU-Net, whose arguments these are.

    Args:
        data: shape C, D, H, W.
        new_shape: voxels by axis.
        current_spacing: mm by axis.
        new_spacing: mm by axis.
        is_seg: must be false.
        order: of the splines.
        order_z: along the axis of an anisotropic image; must be 0.
        force_separate_z: whether an axis is treated in this way; by the spacings where None.
        separate_z_anisotropy_threshold: ratio of spacings from which on it is.
        device: to compute on; the host where None, and where the device has too little memory.

    Returns:
        The same type as `data`.
    """
    assert not is_seg
    assert order_z == 0
    if tuple(data.shape[1:]) == tuple(new_shape):
        return data
    separate, axis = determine_do_sep_z_and_axis(
        force_separate_z, current_spacing, new_spacing, separate_z_anisotropy_threshold
    )
    channels, host = [], torch.device("cpu")
    for channel_DHW in data:
        arguments = (torch.from_numpy(np.ascontiguousarray(channel_DHW)), new_shape, order, axis if separate else None)
        with stream_of_its_own(device or host):
            on_device, on_host = (partial(_resampled, *arguments, place) for place in (device or host, host))
            resampled = unless_out_of_memory(on_device, on_host, device or host)
        channels.append(resampled.numpy().astype(data.dtype, copy=False))
    return channels[0][None] if len(channels) == 1 else np.stack(channels)


def _resampled(
    volume_DHW: Tensor, new_shape: Sequence[int], order: int, nearest: int | None, device: torch.device
) -> Tensor:
    volume_DHW = volume_DHW.to(device, torch.float32)
    # nnU-Net's values stay between the smallest and the largest, of a plane where these are resampled one by one.
    of_range = tuple(axis for axis in range(3) if axis != nearest)
    smallest, largest = volume_DHW.amin(of_range, keepdim=True), volume_DHW.amax(of_range, keepdim=True)
    for axis in sorted(of_range, key=lambda axis: new_shape[axis] / volume_DHW.shape[axis]):
        volume_DHW = _along(axis, volume_DHW, int(new_shape[axis]), order)
    # In place: where nothing was resampled, nothing changes.
    volume_DHW = torch.clamp(volume_DHW, smallest, largest, out=volume_DHW)
    if nearest is not None and volume_DHW.shape[nearest] != new_shape[nearest]:
        index = nearest_axis(volume_DHW.shape[nearest], int(new_shape[nearest])).lower
        volume_DHW = volume_DHW.index_select(nearest, index.to(device))
    return volume_DHW.cpu()


def _along(axis: int, volume_DHW: Tensor, size: int, order: int) -> Tensor:
    if size == volume_DHW.shape[axis]:
        return volume_DHW
    matrix_ts = spline_matrix(volume_DHW.shape[axis], size, order).to(volume_DHW.device)
    if axis == 2:
        return volume_DHW @ matrix_ts.T
    if axis == 1:
        return matrix_ts @ volume_DHW
    return (matrix_ts @ volume_DHW.flatten(1)).view(size, *volume_DHW.shape[1:])


@lru_cache(maxsize=16)
def spline_matrix(source_size: int, target_size: int, order: int) -> Tensor:
    """What the voxels of an axis count in those of another size, float32 of shape t, s.

    Args:
        source_size: voxels of the axis.
        target_size: voxels of the new one.
        order: of the splines.
    """
    rows = [
        resize(voxel, (target_size,), order, mode="edge", anti_aliasing=False, clip=False)
        for voxel in np.eye(source_size)
    ]
    return torch.from_numpy(np.stack(rows, 1).astype(np.float32))
