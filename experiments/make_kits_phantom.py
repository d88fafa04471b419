"""The KiTS phantom: an nnU-Net raw dataset of large abdominal volumes with small targets.

    python experiments/make_kits_phantom.py --kits19 KITS19/data --labels kits_labels_3mm      # once
    python experiments/make_kits_phantom.py --labels kits_labels_3mm --out $nnUNet_raw/Dataset903_KiTSPhantom3mm \
        --spacing 3 --train 100 --test 0

Geometry is real: the manual segmentations of kidneys and tumours of KiTS19 (https://github.com/neheller/kits19, folders
`data/case_00000/segmentation.nii.gz` and so on, CC BY-NC-SA 4.0). Intensities are simulated, and each case follows from
its number: body, fat, soft tissue, spine, aorta, look-alikes, kidneys with a darker core, tumours. Labels: 1 kidney, 2
tumour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

SPACING = 3.0
"""Of the label maps, mm."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="folder of label maps at 3 mm")
    parser.add_argument("--kits19", type=Path, help="write these label maps, from the folder data of KiTS19")
    parser.add_argument("--out", type=Path, help="folder of the dataset to write")
    parser.add_argument("--train", type=int, default=60)
    parser.add_argument("--test", type=int, default=12)
    parser.add_argument("--spacing", type=float, default=SPACING, help="mm, isotropic")
    args = parser.parse_args()
    if args.kits19:
        args.labels.mkdir(parents=True, exist_ok=True)
        for file in sorted(args.kits19.glob("case_*/segmentation.nii.gz")):
            sitk.WriteImage(at_3_mm(sitk.ReadImage(str(file))), str(args.labels / f"{file.parent.name}.nii.gz"), True)
    if args.out:
        write_dataset(args.labels, args.out, args.train, args.test, args.spacing)


def at_3_mm(labels: sitk.Image) -> sitk.Image:
    """A label map of KiTS19 at 3 mm, each label interpolated by itself; axes are z, y, x afterwards."""
    array = np.moveaxis(sitk.GetArrayFromImage(labels), 2, 0)  # KiTS19's first axis is z
    x, y, z = labels.GetSpacing()
    image = sitk.GetImageFromArray(resampled(array, [s / SPACING for s in (x, z, y)]))
    image.SetSpacing([SPACING] * 3)
    return image


def write_dataset(labels: Path, folder: Path, train: int, test: int, spacing: float) -> None:
    """Write the raw dataset; its cases are the first label maps.

    Args:
        labels: folder of label maps.
        folder: of the dataset.
        train: number of training cases.
        test: number of test cases.
        spacing: mm, isotropic.
    """
    files = sorted(labels.glob("*.nii.gz"))
    if train + test > len(files):
        raise SystemExit(f"{labels} has {len(files)} label maps, fewer than --train + --test, {train + test}")
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, file in enumerate(files[: train + test]):
        split = "Tr" if index < train else "Ts"
        number = int(file.name.split("_")[1].split(".")[0])
        labels_zyx = resampled(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), [SPACING / spacing] * 3)
        for array, target in (
            (simulated_ct(labels_zyx, number, spacing), folder / f"images{split}" / f"kits_{number:03d}_0000.nii.gz"),
            (labels_zyx, folder / f"labels{split}" / f"kits_{number:03d}.nii.gz"),
        ):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing([spacing] * 3)
            sitk.WriteImage(image, str(target), True)
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "kidney": 1, "tumour": 2},
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1))


def resampled(labels_zyx: np.ndarray, factors: list[float]) -> np.ndarray:
    """A label map with so many times the voxels by axis, each label interpolated linearly by itself."""
    if all(factor == 1 for factor in factors):
        return labels_zyx
    found, best = np.zeros(0), np.zeros(0)
    for label in (1, 2):
        soft = ndimage.zoom((labels_zyx == label).astype(np.float32), factors, order=1, grid_mode=True, mode="nearest")
        if label == 1:
            found, best = np.zeros(soft.shape, np.uint8), np.full(soft.shape, 0.5, np.float32)
        wins = soft > best
        found[wins], best[wins] = label, soft[wins]
    return found


def simulated_ct(labels_zyx: np.ndarray, seed: int, spacing: float) -> np.ndarray:
    """Hounsfield units for a label map.

    Args:
        labels_zyx: 1 kidney, 2 tumour.
        seed: of all that is random.
        spacing: mm, isotropic.
    """
    random = np.random.default_rng(seed)
    shape = labels_zyx.shape
    depth, height, width = shape
    z, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    centre = np.argwhere(labels_zyx > 0).mean(0)
    centre_y, centre_x = centre[1] - 12 / spacing, centre[2]
    radius_y, radius_x = random.uniform(115, 140) / spacing, random.uniform(165, 195) / spacing
    skin = 22 / spacing

    def ellipse(a: float, b: float) -> np.ndarray:
        inside: np.ndarray = (((y - centre_y) / a) ** 2 + ((x - centre_x) / b) ** 2 < 1) & (z >= 0)
        return inside

    def smooth_field(scale_mm: float, amplitude: float) -> np.ndarray:
        coarse = [max(2, int(np.ceil(n * spacing / scale_mm))) + 1 for n in shape]
        factors = [n / c for n, c in zip(shape, coarse, strict=True)]
        field = ndimage.zoom(random.standard_normal(coarse), factors, order=1)
        missing = [(0, max(0, n - m)) for n, m in zip(shape, field.shape, strict=True)]
        padded: np.ndarray = amplitude * np.pad(field, missing, mode="edge")[:depth, :height, :width]
        return padded

    body, inner = ellipse(radius_y, radius_x), ellipse(radius_y - skin, radius_x - skin)
    ct = np.full(shape, -1000.0, np.float32)
    ct[body], ct[inner] = -100, 30
    ct += np.where(body, smooth_field(40, 15), 0)
    for _ in range(int(random.integers(14, 24))):  # organs; some are as bright as kidneys
        at = (
            random.uniform(0, depth),
            centre_y + random.uniform(-0.7, 0.7) * radius_y,
            centre_x + random.uniform(-0.7, 0.7) * radius_x,
        )
        r = random.uniform(8, 45, 3) / spacing
        blob = ((z - at[0]) / r[0]) ** 2 + ((y - at[1]) / r[1]) ** 2 + ((x - at[2]) / r[2]) ** 2 < 1
        ct[blob & inner & (labels_zyx == 0)] = random.choice([random.uniform(35, 100), random.uniform(215, 280)])
    for behind, radius, brightness in ((0.45, 18, 300), (0.2, 11, 180)):  # spine, aorta
        tube = ((y - centre_y - behind * radius_y) ** 2 + (x - centre_x) ** 2 < (radius / spacing) ** 2) & (z >= 0)
        ct[tube & (labels_zyx == 0)] = brightness
    kidney = labels_zyx == 1
    ct[kidney] = random.uniform(120, 190)
    ct[ndimage.binary_erosion(labels_zyx > 0, iterations=max(1, round(9 / spacing))) & kidney] -= 45
    ct[labels_zyx == 2] = random.uniform(50, 95)
    ct = ndimage.gaussian_filter(ct, 0.5) + random.normal(0, random.uniform(15, 30), shape)
    rounded: np.ndarray = ct.clip(-1024, 1500).astype(np.int16)
    return rounded


if __name__ == "__main__":
    main()
