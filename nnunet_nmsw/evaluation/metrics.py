"""Metrics of one predicted case against its reference.

Dice is nnU-Net's own, surface distances are MONAI's, objects are SciPy's connected components.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, label_or_region_to_key, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from scipy import ndimage

Label = int | tuple[int, ...]


def case_metrics(
    reference_file: str,
    prediction_file: str,
    reader_writer: BaseReaderWriter,
    labels: list[Label],
    ignore_label: int | None,
    tolerance_mm: float,
) -> dict[str, dict[str, Any]]:
    """Metrics of a case by class.

    Args:
        reference_file: label image.
        prediction_file: label image on the same grid.
        reader_writer: nnU-Net's of the dataset.
        labels: labels or regions to evaluate.
        ignore_label: voxels of this reference label do not count.
        tolerance_mm: of the normalised surface Dice.

    Returns:
        By label (as nnU-Net writes it into JSON): nnU-Net's own metrics, and those of `surface_metrics` and
        `object_metrics`.
    """
    overlap = compute_metrics(reference_file, prediction_file, reader_writer, labels, ignore_label)["metrics"]
    reference, properties = reader_writer.read_seg(reference_file)
    prediction, _ = reader_writer.read_seg(prediction_file)
    counted = np.ones_like(reference[0], dtype=bool) if ignore_label is None else reference[0] != ignore_label
    spacing = [float(mm) for mm in properties["spacing"]]
    result = {}
    for label in labels:
        reference_mask = region_or_label_to_mask(reference[0], label) & counted
        prediction_mask = region_or_label_to_mask(prediction[0], label) & counted
        result[label_or_region_to_key(label)] = {
            **{name: value if isinstance(value, float) else value.item() for name, value in overlap[label].items()},
            **surface_metrics(reference_mask, prediction_mask, spacing, tolerance_mm),
            **object_metrics(reference_mask, prediction_mask, math.prod(spacing)),
        }
    return result


def surface_metrics(
    reference: np.ndarray, prediction: np.ndarray, spacing: list[float], tolerance_mm: float
) -> dict[str, float]:
    """Normalised surface Dice and 95th percentile of the Hausdorff distance.

    The surface Dice counts surface area by the voxels' neighbourhood as in Nikolov et al. (2018, arXiv:1809.04430).
    HD95 is the larger of the two directed 95th percentiles.

    Args:
        reference: bool, shape (z, y, x).
        prediction: bool, same shape.
        spacing: mm by axis, same order.
        tolerance_mm: surfaces closer than this agree.

    Returns:
        `NSD` and `HD95` in mm. Both masks empty: NaN, as nnU-Net's Dice. One of them empty: 0, and the diagonal of the
        image, the worst there can be.
    """
    if not reference.any() and not prediction.any():
        return {"NSD": math.nan, "HD95": math.nan}
    if not reference.any() or not prediction.any():
        diagonal = math.dist([0.0] * reference.ndim, [n * mm for n, mm in zip(reference.shape, spacing, strict=True)])
        return {"NSD": 0.0, "HD95": diagonal}
    (box,) = ndimage.find_objects((reference | prediction).astype(np.uint8))
    reference_11DHW, prediction_11DHW = (
        torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (reference, prediction)
    )
    nsd = compute_surface_dice(
        prediction_11DHW,
        reference_11DHW,
        [tolerance_mm],
        include_background=True,
        spacing=spacing,
        use_subvoxels=True,
    )
    hd95 = compute_hausdorff_distance(
        prediction_11DHW, reference_11DHW, include_background=True, percentile=95, spacing=spacing
    )
    return {"NSD": float(nsd), "HD95": float(hd95)}


def object_metrics(reference: np.ndarray, prediction: np.ndarray, voxel_mm3: float) -> dict[str, Any]:
    """Objects (connected components; faces, edges and corners connect) that were found, missed and made up.

    An object is found where the prediction overlaps it by a voxel; a predicted object that overlaps no reference is a
    false positive.

    Returns:
        `objects`, by reference object its volume in mm³ and whether it was found; `missed_objects` and
        `false_positive_objects`, their numbers.
    """
    neighbours = np.ones((3,) * reference.ndim)
    reference_objects, number = ndimage.label(reference, neighbours)
    volumes = np.bincount(reference_objects.ravel(), minlength=number + 1)[1:] * voxel_mm3
    found = np.isin(np.arange(1, number + 1), reference_objects[prediction])
    predicted_objects, predicted_number = ndimage.label(prediction, neighbours)
    matched = np.unique(predicted_objects[reference])
    return {
        "objects": [[float(volume), bool(hit)] for volume, hit in zip(volumes, found, strict=True)],
        "missed_objects": int((~found).sum()),
        "false_positive_objects": predicted_number - int((matched > 0).sum()),
    }
