"""nnU-Net's preprocessing of an image that is to be predicted, without what only a training needs.

nnU-Net fills the holes of what is not zero, and keeps the filled mask for trainings and for some normalisations. On a
large image this takes longer than the resampling. The border of the mask, which the image is cropped to, is the same
with holes and without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

NORMALISATIONS = {
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
    "ZScoreNormalization",
}
"""nnU-Net's, which look at the mask only where the plans say so."""


class ImagePreprocessor(DefaultPreprocessor):
    """nnU-Net's preprocessor, faster for an image alone in three dimensions."""

    def run_case_npy(
        self,
        data: np.ndarray,
        seg: np.ndarray | None,
        properties: dict[str, Any],
        plans_manager: Any,
        configuration_manager: ConfigurationManager,
        dataset_json: Any,
    ) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
        """See the parent. The mask of what is not zero is not returned where it is not needed."""
        if seg is not None or len(configuration_manager.spacing) != 3 or _needs_mask(configuration_manager):
            of_nnunet: tuple[np.ndarray, np.ndarray | None, dict[str, Any]] = super().run_case_npy(
                data, seg, properties, plans_manager, configuration_manager, dataset_json
            )
            return of_nnunet
        order = plans_manager.transpose_forward
        image_CDHW = data.astype(np.float32, copy=False).transpose([0, *[axis + 1 for axis in order]])
        spacing = [properties["spacing"][axis] for axis in order]
        box = get_bbox_from_mask((image_CDHW != 0).any(0) if len(image_CDHW) > 1 else image_CDHW[0] != 0)
        properties["shape_before_cropping"] = image_CDHW.shape[1:]
        properties["bbox_used_for_cropping"] = box
        cropped_CDHW = np.array(image_CDHW[(slice(None), *bounding_box_to_slice(box))])
        shape = cropped_CDHW.shape[1:]
        properties["shape_after_cropping_and_before_resampling"] = shape
        new_shape = compute_new_shape(shape, spacing, configuration_manager.spacing)
        intensities = plans_manager.foreground_intensity_properties_per_channel
        no_mask = np.broadcast_to(np.int8(0), (1, *shape))
        cropped_CDHW = self._normalize(cropped_CDHW, no_mask, configuration_manager, intensities)
        resample = configuration_manager.resampling_fn_data
        return resample(cropped_CDHW, new_shape, spacing, configuration_manager.spacing), None, properties


def _needs_mask(configuration: ConfigurationManager) -> bool:
    """Whether an image is normalised by what is in the mask, or by a class that may look at it."""
    unknown = not NORMALISATIONS.issuperset(configuration.normalization_schemes)
    return unknown or any(configuration.use_mask_for_norm)
