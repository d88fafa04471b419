"""Kinds of input: channels, spacing, flat patches, thin volumes, and file formats, with the real commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from commands import run_all

from nnunet_nmsw.demo.phantom import LABELS, simulate_case
from nnunet_nmsw.demo.small_plans import write_small_plans

pytestmark = pytest.mark.integration

TRAIN = "3d_fullres 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_tiny -device cpu"
PREDICT = "-device cpu -npp 1 -nps 1 -k 3 --save_patches"
SPACING_ZYX = (12.0, 3.0, 3.0)
PATCH = [4, 16, 16]


def write_nrrd(array: np.ndarray, file: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING_ZYX[::-1])
    image.SetOrigin((10, -20, 30))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(file), True)


def write_tiff(array: np.ndarray, file: Path) -> None:
    """With the spacing where nnU-Net looks for it: a JSON file of the case's name."""
    tifffile.imwrite(file, array, photometric="minisblack")
    name = file.stem[:-5] if "images" in file.parent.name else file.stem
    file.with_name(f"{name}.json").write_text(json.dumps({"spacing": SPACING_ZYX}))


def write_flat_dataset(raw: Path, num_channels: int, ending: str, write) -> None:
    """Five training and two test cases of few slices; one of each is thinner than the patch in two axes."""
    for number in range(7):
        image, labels = simulate_case(number, 40)
        thin = number in (1, 6)
        cut = (slice(14, 23, 4), slice(8, 22)) if thin else (slice(1, None, 4),)
        image, labels = image[cut], labels[cut]
        split = "Tr" if number < 5 else "Ts"
        for folder in (f"images{split}", f"labels{split}"):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        for channel in range(num_channels):
            # Other channels have another contrast.
            values = (np.abs(image - 100.0 * channel)).astype(np.int16) if channel else image
            write(values, raw / f"images{split}" / f"case_{number:03d}_{channel:04d}{ending}")
        write(labels, raw / f"labels{split}" / f"case_{number:03d}{ending}")
    channels = {"0": "CT", "1": "MR T2"}
    content = {
        "channel_names": {key: channels[key] for key in list(channels)[:num_channels]},
        "labels": LABELS,
        "numTraining": 5,
        "file_ending": ending,
    }
    (raw / "dataset.json").write_text(json.dumps(content))


def train(workspace: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plan, preprocess, and train with a flat patch. Returns the model's folder."""
    number = dataset[7:10]
    run_all(f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -np 1", workspace=workspace)
    monkeypatch.setenv("nnUNet_preprocessed", str(workspace / "nnUNet_preprocessed"))
    write_small_plans(dataset, PATCH, [4, 8, 8], "nnUNetPlans_small", {})
    run_all(f"nnUNetv2_train {number} {TRAIN}", workspace=workspace)
    return workspace / "nnUNet_results" / dataset / "nnUNetTrainerNMSW_tiny__nnUNetPlans_small__3d_fullres"


def check_training(model: Path) -> None:
    """It learned from numbers, validated every case, and did so with the flat patch."""
    configuration = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == PATCH
    assert configuration["architecture"]["arch_kwargs"]["strides"][1] == [1, 2, 2]
    assert configuration["nmsw"]["downsampling_factor"][0] < configuration["nmsw"]["downsampling_factor"][1]
    (log,) = (model / "fold_0").glob("training_log_*.txt")
    text = log.read_text()
    assert "do_dummy_2d_data_aug: True" in text
    losses = [float(line.split()[-1]) for line in text.splitlines() if "_loss " in line]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert "foreground_mean" in json.loads((model / "fold_0" / "validation" / "summary.json").read_text())


def check_windows(output: Path, case: str, image_shape: tuple[int, ...], overlay: np.ndarray) -> None:
    windows = json.loads((output / "patches" / f"{case}.json").read_text())
    assert windows["image_shape_xyz"] == list(image_shape[::-1])
    assert overlay.shape == image_shape
    best = windows["windows"][0]
    first, last = np.array(best["first_voxel_xyz"]), np.array(best["last_voxel_xyz"])
    assert (first >= 0).all()
    assert (last < image_shape[::-1]).all()
    middle = (first + last) // 2
    assert overlay[tuple(middle[::-1])] == 1
    assert 1 <= windows["patches_per_model"][0] <= 3


@pytest.mark.compatibility(
    "input",
    "NRRD, two channels, spacing 12 × 3 × 3 mm with a patch of 4 × 16 × 16 (dummy 2D augmentation), volumes thinner "
    "than the patch: plan, preprocess, train, validate, nmsw_predict --save_patches",
)
@pytest.mark.compatibility("input", "MHA: nmsw_predict --save_patches of the same images with the same model")
def test_nrrd_and_mha_with_channels_flat_patch_and_thin_volumes(tmp_path, monkeypatch):
    dataset = "Dataset981_Flat"
    raw = tmp_path / "nnUNet_raw" / dataset
    write_flat_dataset(raw, 2, ".nrrd", write_nrrd)
    model = train(tmp_path, dataset, monkeypatch)
    check_training(model)

    mha_model, mha_images = tmp_path / "mha_model", tmp_path / "mha_images"
    shutil.copytree(model, mha_model)
    file = mha_model / "dataset.json"
    file.write_text(file.read_text().replace(".nrrd", ".mha"))
    mha_images.mkdir()
    for image in (raw / "imagesTs").iterdir():
        sitk.WriteImage(sitk.ReadImage(str(image)), str(mha_images / f"{image.stem}.mha"))
    run_all(
        f"nmsw_predict -i {raw / 'imagesTs'} -o {tmp_path / 'nrrd'} -m {model} {PREDICT} --save_probabilities",
        f"nmsw_predict -i {mha_images} -o {tmp_path / 'mha'} -m {mha_model} {PREDICT} --save_probabilities",
        workspace=tmp_path,
    )
    for case in ("case_005", "case_006"):
        image = sitk.ReadImage(str(raw / "imagesTs" / f"{case}_0000.nrrd"))
        labels = sitk.ReadImage(str(tmp_path / "nrrd" / f"{case}.nrrd"))
        same = sitk.ReadImage(str(tmp_path / "mha" / f"{case}.mha"))
        overlay = sitk.ReadImage(str(tmp_path / "nrrd" / "patches" / f"{case}.nii.gz"))
        for written in (labels, same, overlay):
            assert written.GetSize() == image.GetSize()
            assert np.allclose(written.GetSpacing(), image.GetSpacing())
            assert np.allclose(written.GetOrigin(), image.GetOrigin())
            assert np.allclose(written.GetDirection(), image.GetDirection())
        assert np.array_equal(sitk.GetArrayFromImage(labels), sitk.GetArrayFromImage(same))
        nrrd, mha = (np.load(tmp_path / name / f"{case}.npz")["probabilities"] for name in ("nrrd", "mha"))
        assert np.array_equal(nrrd, mha)
        check_windows(tmp_path / "nrrd", case, image.GetSize()[::-1], sitk.GetArrayFromImage(overlay))


@pytest.mark.compatibility(
    "input", "3D TIFF with the spacing in JSON files: plan, preprocess, train, validate, nmsw_predict --save_patches"
)
def test_tiff(tmp_path, monkeypatch):
    dataset = "Dataset982_Tiff"
    raw = tmp_path / "nnUNet_raw" / dataset
    write_flat_dataset(raw, 1, ".tif", write_tiff)
    model = train(tmp_path, dataset, monkeypatch)
    check_training(model)
    output = tmp_path / "out"
    run_all(f"nmsw_predict -i {raw / 'imagesTs'} -o {output} -m {model} {PREDICT}", workspace=tmp_path)
    for case in ("case_005", "case_006"):
        shape = tifffile.imread(raw / "imagesTs" / f"{case}_0000.tif").shape
        assert tifffile.imread(output / f"{case}.tif").shape == shape
        assert json.loads((output / f"{case}.json").read_text())["spacing"] == list(SPACING_ZYX)
        check_windows(output, case, shape, tifffile.imread(output / "patches" / f"{case}.tif"))
        # nnU-Net reads the overlay's spacing from the file of the windows.
        assert json.loads((output / "patches" / f"{case}.json").read_text())["spacing"] == list(SPACING_ZYX)
