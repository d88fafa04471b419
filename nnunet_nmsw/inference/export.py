"""From labels of the cropped image to a file, and when labels can be had without a volume of logits.

Tensor suffixes: Z Y X axes of the cropped image, transposed as the plans say.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.preprocessing.resampling.default_resampling import ANISO_THRESHOLD, determine_do_sep_z_and_axis
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.inference.interpolation import Axis, linear_axis, nearest_axis
from nnunet_nmsw.inference.resampling import is_known


def can_stream(configuration: ConfigurationManager) -> bool:
    """Whether the plans resample probabilities in a way that `resampling_axes` knows: linearly."""
    linear = configuration.configuration["resampling_fn_probabilities_kwargs"].get("order") == 1
    return linear and is_known(configuration, "probabilities")


def resampling_axes(
    plans: PlansManager, configuration: ConfigurationManager, properties: dict[str, Any], shape: Sequence[int]
) -> list[Axis]:
    """How nnU-Net's export resamples a preprocessed volume to the cropped image.

    Args:
        plans: the model's plans.
        configuration: one that `can_stream`.
        properties: nnU-Net's of the preprocessed image.
        shape: of the volume, without padding.
    """
    keywords = configuration.configuration["resampling_fn_probabilities_kwargs"]
    separate, separate_axis = determine_do_sep_z_and_axis(
        keywords.get("force_separate_z", False),
        configuration.spacing,
        [properties["spacing"][axis] for axis in plans.transpose_forward],
        keywords.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD),
    )
    target = properties["shape_after_cropping_and_before_resampling"]
    return [
        (nearest_axis if separate and axis == separate_axis else linear_axis)(int(n), int(m))
        for axis, (n, m) in enumerate(zip(shape, target, strict=True))
    ]


def labels_of(decisions: Tensor, labels: LabelManager) -> np.ndarray:
    """Labels, integers of any shape, of decisions: of regions their numbers, see `streaming.decided`."""
    numbers: np.ndarray = decisions.numpy()
    return np.array([0, *labels.regions_class_order], numbers.dtype)[numbers] if labels.has_regions else numbers


def in_image(
    decisions_ZYX: Tensor, plans: PlansManager, labels: LabelManager, properties: dict[str, Any]
) -> np.ndarray:
    """Labels of the whole image, in the axis order of nnU-Net's reader.

    Args:
        decisions_ZYX: labels of the cropped image; of regions their numbers, see `streaming.decided`.
        plans: the model's plans.
        labels: of the dataset.
        properties: nnU-Net's of the preprocessed image.
    """
    dtype = np.uint8 if len(labels.foreground_labels) < 255 else np.uint16
    image = np.zeros(properties["shape_before_cropping"], dtype)
    segmentation = labels_of(decisions_ZYX, labels).astype(dtype)
    image = insert_crop_into_image(image, segmentation, properties["bbox_used_for_cropping"])
    transposed: np.ndarray = image.transpose(plans.transpose_backward)
    return transposed


def write_labels(
    segmentation: np.ndarray, file: str, file_ending: str, plans: PlansManager, properties: dict[str, Any]
) -> None:
    """Write labels with nnU-Net's writer, under another name until all is written.

    Args:
        segmentation: of `in_image`.
        file: without the ending.
        file_ending: the dataset's.
        plans: the model's plans.
        properties: nnU-Net's of the preprocessed image.

    Raises:
        UserError: it cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(file))
    try:
        # A folder, since some writers leave a second file beside the first.
        with tempfile.TemporaryDirectory(prefix=f".{name}_", dir=folder) as unfinished:
            plans.image_reader_writer_class().write_seg(
                segmentation, os.path.join(unfinished, name + file_ending), properties
            )
            check_whole(os.path.join(unfinished, name + file_ending))
            for written in sorted(os.listdir(unfinished), key=lambda other: other == name + file_ending):
                os.replace(os.path.join(unfinished, written), os.path.join(folder, written))
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(f"cannot write {file}{file_ending}: {reason(error)}") from error


def check_whole(file: str) -> None:
    """See that a compressed file is complete: SimpleITK's writer of NIfTI says nothing when the disk is full.

    Raises:
        EOFError: it is not.
    """
    if file.endswith(".gz"):
        with gzip.open(file) as compressed:
            while compressed.read(1 << 20):
                pass
