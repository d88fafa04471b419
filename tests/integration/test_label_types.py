"""Regions, an ignore label, both, and the cascade: trained and predicted with the real commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from commands import prepare, run, set_configurations

from nnunet_nmsw.settings import ALLOWED

pytestmark = pytest.mark.integration

TRAIN = "-p nnUNetPlans_small -tr nnUNetTrainerNMSW_tiny -device cpu"
PREDICT = "-tr nnUNetTrainerNMSW_tiny -p nnUNetPlans_small -device cpu -npp 0 -nps 0 --disable_tta"
REGIONS = {"labels": {"background": 0, "kidney and lesion": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}


def read(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


def ignore_all_but_some_slices(raw: Path) -> None:
    """A sparse annotation: every third slice."""
    for file in (raw / "labelsTr").glob("*.nii.gz"):
        image = sitk.ReadImage(str(file))
        labels = sitk.GetArrayFromImage(image)
        labels[np.arange(len(labels)) % 3 > 0] = 3
        sparse = sitk.GetImageFromArray(labels)
        sparse.CopyInformation(image)
        sitk.WriteImage(sparse, str(file))


def change_labels(regions: bool, ignore: bool):
    """Turns the generated dataset into one of a kind of labels."""

    def change(raw: Path) -> None:
        file = raw / "dataset.json"
        content = json.loads(file.read_text())
        content.update(REGIONS if regions else {})
        if ignore:
            content["labels"]["ignore"] = 3
            ignore_all_but_some_slices(raw)
        file.write_text(json.dumps(content))

    return change


def label_types(number: int, regions: bool, ignore: bool, name: str):
    what = f"{name}: nnUNetv2_train with validation, nmsw_predict --save_probabilities"
    return pytest.param(number, regions, ignore, id=name, marks=pytest.mark.compatibility("label types", what))


@pytest.mark.parametrize(
    ("number", "regions", "ignore"),
    [
        label_types(991, True, False, "regions"),
        label_types(992, False, True, "ignore label"),
        label_types(993, True, True, "regions and ignore label"),
    ],
)
def test_regions_and_ignore_label(number, regions, ignore, tmp_path):
    dataset = f"Dataset{number}_Labels"
    prepare(tmp_path, dataset, change_labels(regions, ignore))
    run(f"nnUNetv2_train {number} 3d_fullres 0 {TRAIN}", tmp_path)
    model = tmp_path / "nnUNet_results" / dataset / "nnUNetTrainerNMSW_tiny__nnUNetPlans_small__3d_fullres"
    metrics = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())["mean"]
    assert set(metrics) == ({"(1, 2)", "2"} if regions else {"1", "2"})
    settings = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["nmsw"]
    assert set(settings) == set(ALLOWED)  # what the dataset says is no setting
    images, output = tmp_path / "nnUNet_raw" / dataset / "imagesTs", tmp_path / "out"
    run(f"nmsw_predict -i {images} -o {output} -d {number} {PREDICT} -k 3 --save_probabilities", tmp_path)
    labels = read(output / "case_005.nii.gz")
    assert set(np.unique(labels)) <= {0, 1, 2}
    probabilities = np.load(output / "case_005.npz")["probabilities"]
    assert probabilities.shape == (2 if regions else 3, *labels.shape)
    # The labels are what these probabilities say.
    if regions:
        expected = np.where(probabilities[1] > 0.5, 2, np.where(probabilities[0] > 0.5, 1, 0))
    else:
        expected = probabilities.argmax(0)
    assert (labels == expected).mean() > 0.999


@pytest.mark.compatibility("configurations", "3d_lowres: nnUNetv2_train of fold all, nmsw_predict")
@pytest.mark.compatibility(
    "configurations", "3d_cascade_fullres: nnUNetv2_train, nmsw_predict -prev_stage_predictions; refused without lowres"
)
def test_cascade(tmp_path):
    dataset = "Dataset994_Cascade"
    plans = prepare(tmp_path, dataset)
    low_resolution = {
        "inherits_from": "3d_fullres",
        "data_identifier": "nnUNetPlans_small_3d_lowres",
        "spacing": [8.0] * 3,
        "next_stage": "3d_cascade_fullres",
    }
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    set_configurations(plans, **{"3d_lowres": low_resolution, "3d_cascade_fullres": cascade})
    run("nnUNetv2_preprocess -d 994 -plans_name nnUNetPlans_small -c 3d_lowres -np 2", tmp_path)
    images = tmp_path / "nnUNet_raw" / dataset / "imagesTs"

    early = run(f"nnUNetv2_train 994 3d_cascade_fullres 0 {TRAIN}", tmp_path, check=False)
    assert early.returncode != 0
    assert "3d_lowres" in early.stderr.strip().splitlines()[-1]
    run(f"nnUNetv2_train 994 3d_lowres all {TRAIN}", tmp_path)  # predicts every case, as five folds would
    results = tmp_path / "nnUNet_results" / dataset
    first = results / "nnUNetTrainerNMSW_tiny__nnUNetPlans_small__3d_lowres"
    saved = [file.stem for file in (first / "predicted_next_stage" / "3d_cascade_fullres").iterdir()]
    assert {name.split(".")[0] for name in saved} == {f"case_{n:03d}" for n in range(5)}
    run(f"nnUNetv2_train 994 3d_cascade_fullres 0 {TRAIN}", tmp_path)
    second = results / "nnUNetTrainerNMSW_tiny__nnUNetPlans_small__3d_cascade_fullres"
    assert (second / "fold_0" / "validation" / "summary.json").is_file()

    low, high = tmp_path / "low", tmp_path / "high"
    run(f"nmsw_predict -i {images} -o {low} -d 994 -c 3d_lowres -f all {PREDICT}", tmp_path)
    predict = f"nmsw_predict -i {images} -o {high} -d 994 -c 3d_cascade_fullres {PREDICT}"
    refused = run(predict, tmp_path, check=False)
    assert refused.returncode == 1
    assert "-prev_stage_predictions" in refused.stderr
    assert not high.exists()
    run(f"{predict} -prev_stage_predictions {low}", tmp_path)
    assert read(high / "case_005.nii.gz").shape == read(low / "case_005.nii.gz").shape
