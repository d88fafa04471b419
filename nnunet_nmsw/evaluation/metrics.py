"""Metrics of one predicted case against its reference.

A new one is a function of `Masks` and a row in `METRICS`, from where it goes into files, tables and pages. Dice is
nnU-Net's own, surface distances are MONAI's, objects are SciPy's connected components.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, label_or_region_to_key, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from torch import Tensor

Label = int | tuple[int, ...]


def evaluated_labels(manager: LabelManager, dataset_json: dict[str, Any]) -> dict[Label, str]:
    """Names of the labels or regions that are evaluated, in nnU-Net's order.

    Args:
        manager: of the labels.
        dataset_json: nnU-Net's description of the dataset.
    """
    by_label = {tuple(v) if isinstance(v, list) else v: name for name, v in dataset_json["labels"].items()}
    evaluated = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    return {label: by_label[label] for label in evaluated}


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
        By label (as nnU-Net writes it into JSON): nnU-Net's own metrics, those of `METRICS`, and those of
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
        masks = Masks(reference_mask, prediction_mask, spacing, tolerance_mm)
        result[label_or_region_to_key(label)] = {
            **{name: value if isinstance(value, float) else value.item() for name, value in overlap[label].items()},
            **{name: metric.measure(masks) for name, metric in METRICS.items() if metric.measure is not None},
            **object_metrics(reference_mask, prediction_mask, math.prod(spacing)),
        }
    return result


class Masks(NamedTuple):
    """A class of a case.

    Attributes:
        reference: bool, shape (z, y, x).
        prediction: bool, same shape.
        spacing: mm by axis, same order.
        tolerance_mm: surfaces closer than this agree.
    """

    reference: np.ndarray
    prediction: np.ndarray
    spacing: list[float]
    tolerance_mm: float

    def cropped(self) -> tuple[Tensor, Tensor]:
        """Prediction and reference around what is in either, as MONAI takes them, shape 1, 1, z, y, x."""
        (box,) = ndimage.find_objects((self.reference | self.prediction).astype(np.uint8))
        pair = (torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (self.prediction, self.reference))
        prediction, reference = pair
        return prediction, reference


def surface_dice(masks: Masks) -> float:
    """Normalised surface Dice: surface area by the voxels' neighbourhood (Nikolov et al., 2018, arXiv:1809.04430).

    NaN where both masks are empty, as nnU-Net's Dice; 0 where one is.
    """
    if not masks.reference.any() or not masks.prediction.any():
        return 0.0 if masks.reference.any() or masks.prediction.any() else math.nan
    dice = compute_surface_dice(
        *masks.cropped(), [masks.tolerance_mm], include_background=True, spacing=masks.spacing, use_subvoxels=True
    )
    return float(dice)


def hausdorff_distance(masks: Masks) -> float:
    """The larger of the two directed 95th percentiles of the Hausdorff distance, in mm.

    NaN where both masks are empty; the diagonal of the image, the worst there can be, where one is.
    """
    shape = masks.reference.shape
    if not masks.reference.any() or not masks.prediction.any():
        diagonal = math.dist([0.0] * len(shape), [n * mm for n, mm in zip(shape, masks.spacing, strict=True)])
        return diagonal if masks.reference.any() or masks.prediction.any() else math.nan
    distance = compute_hausdorff_distance(
        *masks.cropped(), include_background=True, percentile=95, spacing=masks.spacing
    )
    return float(distance)


class Metric(NamedTuple):
    """A metric as files, tables and pages show it.

    Attributes:
        measure: of a class of a case; None for what nnU-Net measures itself.
        percent: it is shown in per cent.
        meaning: for the notes under tables, a sentence.
    """

    measure: Callable[[Masks], float] | None
    percent: bool
    meaning: str


METRICS: dict[str, Metric] = {
    "Dice": Metric(None, True, "Dice in per cent."),
    "NSD": Metric(surface_dice, True, "NSD: normalised surface Dice at {tolerance_mm:g} mm in per cent."),
    "HD95": Metric(
        hausdorff_distance,
        False,
        "HD95 in mm; that of a class that only one of prediction and reference has is the diagonal of the image.",
    ),
}
"""By name."""


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
