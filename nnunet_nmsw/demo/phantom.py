"""Simulated abdominal scans: large volumes with two small kidneys, lesions in them, and things that look alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_nmsw.files import write_json

LABELS = {"background": 0, "kidney": 1, "lesion": 2}
SPACING_MM = 3.0


def simulate_case(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Simulate one scan.

    Kidneys with bright lesions lie left and right of the spine. Elsewhere in the body are blobs of similar intensities,
    some with a bright core: position tells them apart, which a small patch does not see.

    Args:
        seed: the case.
        size: voxels along the longest axis.

    Returns:
        Image in Hounsfield units, int16, and labels, uint8, both (z, y, x) with `SPACING_MM` isotropic.
    """
    rng = np.random.default_rng(seed)
    unit = size / 96  # positions and radii below are voxels of a volume of 96
    shape = np.array([rng.integers(size * 3 // 4, size), rng.integers(size * 4 // 5, size), size])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    middle = shape / 2 + unit * rng.uniform(-3, 3, 3)

    def ellipsoid(centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
        inside: np.ndarray = (((grid - centre.reshape(3, 1, 1, 1)) / radii.reshape(3, 1, 1, 1)) ** 2).sum(0) < 1
        return inside

    body = ellipsoid(middle, np.array([shape[0], shape[1] * 0.45, shape[2] * 0.47]))
    image = np.where(body, 30.0, -1000.0)
    labels = np.zeros(tuple(shape), np.uint8)
    for _ in range(8):
        offset = rng.uniform(-0.42, 0.42, 3) * shape
        if abs(offset[1] - 6 * unit) < 14 * unit and abs(offset[0]) < 20 * unit:
            continue  # where kidneys are
        image[ellipsoid(middle + offset, unit * rng.uniform(4, 9, 3)) & body] = rng.uniform(60, 220)
        if rng.random() < 0.5:
            image[ellipsoid(middle + offset, unit * rng.uniform(2, 4, 3)) & body] = 250
    spine = ellipsoid(middle + unit * np.array([0, 16, 0]), np.array([shape[0], 7 * unit, 7 * unit]))
    image[spine & body] = 350
    for side in (-1, 1):
        offset = np.array([rng.uniform(-5, 5), 6 + rng.uniform(-2, 2), side * rng.uniform(18, 23)])
        centre = middle + unit * offset
        radii = unit * np.array([14, 9, 8]) * rng.uniform(0.8, 1.15)
        kidney = ellipsoid(centre, radii)
        labels[kidney] = LABELS["kidney"]
        image[kidney] = rng.uniform(150, 190)
        image[ellipsoid(centre, 0.6 * radii)] -= 80  # a darker medulla, which look-alikes do not have
        if side == 1 or rng.random() < 0.5:
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            lesion = ellipsoid(centre + direction * radii * 0.7, np.full(3, unit * rng.uniform(4, 7)))
            labels[lesion] = LABELS["lesion"]
            image[lesion] = 250
    image = ndimage.gaussian_filter(image, 0.5) + rng.normal(0, 18, tuple(shape))
    return image.clip(-1024, 1500).astype(np.int16), labels


def write_dataset(folder: Path, num_training: int, num_test: int, size: int = 96) -> None:
    """Write an nnU-Net raw dataset with test images and their labels; cases are reproducible from their number."""
    for number in range(num_training + num_test):
        split = "Tr" if number < num_training else "Ts"
        image, labels = simulate_case(number, size)
        for array, name in (
            (image, f"images{split}/case_{number:03d}_0000"),
            (labels, f"labels{split}/case_{number:03d}"),
        ):
            file = folder / f"{name}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            itk_image = sitk.GetImageFromArray(array)
            itk_image.SetSpacing([SPACING_MM] * 3)
            sitk.WriteImage(itk_image, str(file), True)
    dataset = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": num_training, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", dataset)
