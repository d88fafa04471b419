"""Every metric by hand on constructed predictions."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_nmsw.evaluation.metrics import METRICS, Masks, case_metrics, object_metrics


def surface_metrics(*masks):
    metrics = {name: metric.measure for name, metric in METRICS.items() if metric.measure is not None}
    return {name: measure(Masks(*masks)) for name, measure in metrics.items()}


def box(start: tuple[int, int, int], size: tuple[int, int, int], shape: tuple[int, int, int] = (20, 20, 20)):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return mask


def test_a_perfect_prediction():
    mask = box((5, 5, 5), (6, 6, 6))
    assert surface_metrics(mask, mask, [1, 1, 1], 2.0) == {"NSD": 1.0, "HD95": 0.0}


def test_distances_are_in_millimetres_of_the_axis_they_lie_along():
    reference, shifted = box((4, 4, 4), (8, 8, 8)), box((7, 4, 4), (8, 8, 8))
    # Faces across the shift are three voxels of 2 mm apart.
    assert surface_metrics(reference, shifted, [2, 1, 1], 2.0)["HD95"] == pytest.approx(6)
    assert surface_metrics(reference, shifted, [1, 1, 1], 2.0)["HD95"] == pytest.approx(3)


def test_surface_dice_counts_the_surface_within_the_tolerance():
    # A slab of 5 × 20 × 20 whose upper face moves by three voxels. Surfaces: 2 · 400 + 4 · 20 · 5 = 1200 and
    # 2 · 400 + 4 · 20 · 8 = 1440. Out of reach of 2 voxels are the reference's upper face but for a rim of two voxels
    # along the other's sides, 16 · 16; the prediction's upper face, 400; and the last layer of its sides, 80.
    reference, prediction = box((5, 5, 5), (5, 20, 20), (30, 30, 30)), box((5, 5, 5), (8, 20, 20), (30, 30, 30))
    by_hand = 1 - (256 + 400 + 80) / (1200 + 1440)
    assert surface_metrics(reference, prediction, [1, 1, 1], 2.0)["NSD"] == pytest.approx(by_hand, abs=0.03)
    assert surface_metrics(reference, prediction, [1, 1, 1], 3.0)["NSD"] == pytest.approx(1)
    assert surface_metrics(reference, prediction, [0.5, 1.0, 1.0], 2.0)["NSD"] == pytest.approx(1)


def test_empty_masks():
    mask, empty = box((5, 5, 5), (3, 3, 3), (10, 20, 20)), np.zeros((10, 20, 20), dtype=bool)
    assert all(math.isnan(value) for value in surface_metrics(empty, empty, [1, 1, 1], 2.0).values())
    for pair in ((mask, empty), (empty, mask)):
        metrics = surface_metrics(*pair, [2, 1, 1], 2.0)
        assert metrics["NSD"] == 0
        assert metrics["HD95"] == pytest.approx(math.sqrt(20**2 + 20**2 + 20**2))


def test_objects_found_missed_and_made_up():
    reference = box((1, 1, 1), (2, 2, 2)) | box((8, 8, 8), (3, 3, 3)) | box((15, 15, 15), (1, 1, 1))
    prediction = box((2, 2, 2), (1, 1, 1)) | box((10, 10, 10), (4, 4, 4)) | box((1, 15, 1), (2, 2, 2))
    metrics = object_metrics(reference, prediction, 0.5)
    assert metrics["objects"] == [[4.0, True], [13.5, True], [0.5, False]]
    assert metrics["missed_objects"] == 1
    assert metrics["false_positive_objects"] == 1
    # Corners connect.
    assert len(object_metrics(box((1, 1, 1), (1, 1, 1)) | box((2, 2, 2), (1, 1, 1)), prediction, 1)["objects"]) == 1
    nothing = object_metrics(np.zeros_like(reference), np.zeros_like(reference), 1)
    assert nothing == {"objects": [], "missed_objects": 0, "false_positive_objects": 0}


def write(file, labels: np.ndarray, spacing_xyz) -> str:
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(spacing_xyz)
    sitk.WriteImage(image, str(file))
    return str(file)


def test_files_by_class_with_ignored_voxels(tmp_path):
    reference, prediction = (np.zeros((20, 20, 20), int) for _ in range(2))
    reference[box((2, 2, 2), (4, 4, 4))] = 1  # 64 voxels
    prediction[box((4, 2, 2), (4, 4, 4))] = 1  # overlaps 32
    reference[box((12, 12, 12), (2, 2, 2))] = 2
    reference[box((17, 17, 17), (2, 2, 2))] = 3  # ignored, whatever is predicted
    prediction[box((17, 17, 17), (2, 2, 2))] = 1
    spacing_xyz = (1, 2, 3)
    files = [write(tmp_path / f"{n}.nii.gz", v, spacing_xyz) for n, v in (("r", reference), ("p", prediction))]
    metrics = case_metrics(*files, SimpleITKIO(), [1, 2, (1, 2)], 3, 2.0)
    assert list(metrics) == ["1", "2", "(1, 2)"]
    one, two, region = metrics.values()
    assert (one["TP"], one["FP"], one["FN"], one["n_ref"], one["n_pred"]) == (32, 32, 32, 64, 64)
    assert one["Dice"] == 0.5
    assert one["HD95"] == pytest.approx(6)  # two slices of 3 mm
    assert one["objects"] == [[64 * 6, True]]
    assert one["false_positive_objects"] == 0
    assert (two["Dice"], two["NSD"], two["missed_objects"]) == (0, 0, 1)
    assert region["Dice"] == pytest.approx(64 / (64 + 32 + 40))
