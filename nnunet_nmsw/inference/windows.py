"""Which windows a prediction took, for people: voxel and world coordinates, scores, and an overlay image.

nnU-Net transposes, crops and resamples an image before it predicts; everything written here is back in the image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nibabel.orientations import io_orientation
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.inference.export import write_labels
from nnunet_nmsw.inference.volume import ChosenWindows

MAX_OVERLAY_RANK = 255
"""Windows of this rank and later share one value in the overlay, so that it fits the smallest label type."""


def write_windows(
    folder: Path,
    case: str,
    chosen: list[ChosenWindows],
    properties: dict[str, Any],
    plans_manager: PlansManager,
    file_ending: str,
) -> None:
    """Write `<case>.json` and an overlay image `<case>.nii.gz` into a folder.

    In the overlay every voxel holds the rank, from 1, of the best window over it, and 0 where no patch was taken. It is
    NIfTI wherever nnU-Net's reader of the dataset can write that, else of the dataset's own type. Voxels are counted as
    in the file, whose axes a reader may have turned.

    Args:
        folder: within one that `written_whole` gave.
        case: name of the case.
        chosen: one entry a fold of the ensemble.
        properties: nnU-Net's properties of the preprocessed image.
        plans_manager: the model's plans.
        file_ending: the dataset's.

    Raises:
        OSError: something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = np.array(properties["shape_before_cropping"])[plans_manager.transpose_backward]
    overlay = np.zeros(shape, np.uint8)
    affine, axes = index_to_world(properties), axes_in_file(properties)
    windows: list[dict[str, Any]] = []
    for fold, choice in enumerate(chosen):
        edges = edges_in_image(choice, properties, plans_manager.transpose_backward)
        for rank in range(len(edges), 0, -1):
            first, end = np.round(edges[rank - 1]).astype(int).clip(0, shape)
            box = overlay[tuple(slice(a, b) for a, b in zip(first, end, strict=True))]
            box[(box == 0) | (box > rank)] = min(rank, MAX_OVERLAY_RANK)
        for rank, (edge, score) in enumerate(zip(edges, choice.scores, strict=True), 1):
            first, last = in_file(edge[:, ::-1].round().astype(int).clip(0, shape[::-1]), shape[::-1], axes)
            centre = affine @ [*(edge.mean(0)[::-1] - 0.5), 1]
            windows.append(
                {
                    "model": fold,
                    "rank": rank,
                    "score": round(float(score), 6),
                    "first_voxel_xyz": first.tolist(),
                    "last_voxel_xyz": last.tolist(),
                    "centre_mm_lps": centre[:3].round(3).tolist(),
                }
            )
    endings = plans_manager.image_reader_writer_class().supported_file_endings
    ending = ".nii.gz" if ".nii.gz" in endings else file_ending
    write_labels(overlay, folder / (case + ending), plans_manager, properties)
    content = {
        "case": case,
        "windows_to_choose_from": chosen[0].num_windows,
        "windows_to_choose_from_per_model": [choice.num_windows for choice in chosen],  # a set's patches differ in size
        "patches_per_model": [len(choice.starts) for choice in chosen],
        # In nnU-Net's order and under its name: where the overlay is a TIFF, nnU-Net looks for its spacing here.
        "spacing": list(map(float, properties["spacing"])),
        "image_shape_xyz": [int(shape[::-1][axis]) for axis, _ in axes],
        "windows": windows,
    }
    (folder / f"{case}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def axes_in_file(properties: dict[str, Any]) -> list[tuple[int, bool]]:
    """Where the axes of a file (x, y, z) are in the image as its reader gave it: number there, and whether turned over.

    nnU-Net's readers `NibabelIOWithReorient` and `SimpleITKIOWithReorient` bring images into RAS.
    """
    if "reoriented_affine" in properties.get("nibabel_stuff", {}):
        axes = io_orientation(properties["nibabel_stuff"]["original_affine"])
        return [(int(axis), direction < 0) for axis, direction in axes]
    if "original_orientation" in properties.get("sitk_stuff", {}):
        of_image = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(properties["sitk_stuff"]["direction"])
        pairs = [next(pair for pair in ("RL", "AP", "IS") if letter in pair) for letter in of_image]
        of_file = properties["sitk_stuff"]["original_orientation"]
        numbers = [next(axis for axis in range(3) if letter in pairs[axis]) for letter in of_file]
        return [(axis, letter != of_image[axis]) for axis, letter in zip(numbers, of_file, strict=True)]
    return [(0, False), (1, False), (2, False)]


def in_file(edges: np.ndarray, shape: np.ndarray, axes: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel of a box as the file counts them.

    Args:
        edges: first voxel and the one behind the last, 2 × 3 integers, as the image has been read; x, y, z.
        shape: voxels of the image as it has been read; x, y, z.
        axes: of `axes_in_file`.
    """
    first, last = edges[0], edges[1] - 1
    boxes = [
        (shape[axis] - 1 - last[axis], shape[axis] - 1 - first[axis]) if turned else (first[axis], last[axis])
        for axis, turned in axes
    ]
    return np.array([box[0] for box in boxes]), np.array([box[1] for box in boxes])


def edges_in_image(choice: ChosenWindows, properties: dict[str, Any], transpose_backward: list[int]) -> np.ndarray:
    """Lower and upper edges of the windows in the image, in voxels; voxel i reaches from i to i + 1.

    Returns:
        float, windows × 2 × 3, axes in nnU-Net's order of the image as read (z, y, x).
    """
    cropped = np.array(properties["shape_after_cropping_and_before_resampling"], float)
    crop_start = np.array(properties["bbox_used_for_cropping"], float)[:, 0]
    edges = np.stack([choice.starts, choice.starts + np.array(choice.patch_size)], 1)
    in_image: np.ndarray = (crop_start + edges * cropped / np.array(choice.volume_shape))[..., transpose_backward]
    return in_image


def index_to_world(properties: dict[str, Any]) -> np.ndarray:
    """The 4 × 4 matrix from voxel indices (x, y, z) to millimetres, LPS as in SimpleITK and DICOM.

    Files without a position in space (2D slices, TIFF) get their spacing alone.
    """
    affine = np.eye(4)
    geometry = properties.get("sitk_stuff", {})
    if len(geometry.get("spacing", ())) == 3:
        affine[:3, :3] = np.array(geometry["direction"]).reshape(3, 3) * np.array(geometry["spacing"])
        affine[:3, 3] = geometry["origin"]
    elif "nibabel_stuff" in properties:
        geometry = properties["nibabel_stuff"]
        # nibabel is RAS
        affine = np.diag([-1.0, -1, 1, 1]) @ geometry.get("reoriented_affine", geometry["original_affine"])
    else:
        affine[:3, :3] = np.diag(properties["spacing"][::-1])
    return affine
