"""Cross-validation, ensembles, postprocessing, and sharing a model, with the real commands of nnU-Net."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from commands import DATASET, run_all

pytestmark = pytest.mark.integration

NMSW, STOCK = "nnUNetTrainerNMSW_tiny", "nnUNetTrainer_tiny"
CASES = ("case_005", "case_006")


def model(trainer: str) -> str:
    return f"3d_fullres -p nnUNetPlans_small -tr {trainer}"


def read(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


def probabilities(folder: Path, case: str) -> np.ndarray:
    array: np.ndarray = np.load(folder / f"{case}.npz")["probabilities"]
    return array.astype(np.float32)


@pytest.fixture(scope="module")
def folds(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All folds of NMSW, two of them with probabilities, as have two folds of a stock model; and their predictions."""
    folder = tmp_path_factory.mktemp("all_folds")
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(workspace / name, folder / name)
    images = folder / "nnUNet_raw" / DATASET / "imagesTs"
    nmsw, stock = (
        f"-c {model(trainer)} -i {images} -device cpu -npp 1 -nps 1 --disable_tta" for trainer in (NMSW, STOCK)
    )
    run_all(
        *(f"nnUNetv2_train 998 {model(NMSW).replace(' -p', f' {f} -p')} -device cpu --npz" for f in (0, 1)),
        *(f"nnUNetv2_train 998 {model(NMSW).replace(' -p', f' {f} -p')} -device cpu" for f in (2, 3, 4, "all")),
        *(f"nnUNetv2_train 998 {model(STOCK).replace(' -p', f' {f} -p')} -device cpu --npz" for f in (0, 1)),
        f"nmsw_predict -d 998 {nmsw} -f 0 1 2 3 4 -o {folder}/nmsw -k 10% --save_probabilities --save_patches",
        f"nmsw_predict -d 998 {nmsw} -f 0 1 2 3 4 -o {folder}/calibrated --save_probabilities",
        f"nmsw_predict -d 998 {nmsw} -f all -o {folder}/all",
        f"nnUNetv2_predict -d 998 {stock} -f 0 1 -o {folder}/stock --save_probabilities",
        f"nnUNetv2_accumulate_crossval_results 998 -c {model(NMSW)}",
        f"nnUNetv2_find_best_configuration 998 -c {model(NMSW)} {STOCK} -f 0 1 -np 1",
        f"nnUNetv2_ensemble -i {folder}/nmsw {folder}/stock -o {folder}/ensemble -np 1 --save_npz",
        workspace=folder,
    )
    return folder


@pytest.mark.compatibility("folds", "nnUNetv2_train of folds 0 to 4; nmsw_predict with their ensemble")
@pytest.mark.compatibility("folds", "nnUNetv2_train of fold all; nmsw_predict -f all")
def test_folds_and_their_ensemble(folds):
    results = folds / "nnUNet_results" / DATASET / f"{NMSW}__nnUNetPlans_small__3d_fullres"
    for fold in (0, 1, 2, 3, 4, "all"):
        summary = json.loads((results / f"fold_{fold}" / "validation" / "summary.json").read_text())
        assert len(summary["metric_per_case"]) == (5 if fold == "all" else 1)
    for case in CASES:
        windows = json.loads((folds / "nmsw" / "patches" / f"{case}.json").read_text())
        assert len(windows["patches_per_model"]) == 5
        assert {window["model"] for window in windows["windows"]} == set(range(5))
        assert read(folds / "all" / f"{case}.nii.gz").shape == read(folds / "nmsw" / f"{case}.nii.gz").shape


@pytest.mark.compatibility("folds", "nnUNetv2_accumulate_crossval_results of folds 0 to 4")
@pytest.mark.compatibility("folds", "nnUNetv2_find_best_configuration among NMSW, a stock model and their ensemble")
def test_cross_validation_results(folds):
    results = folds / "nnUNet_results" / DATASET
    merged = results / f"{NMSW}__nnUNetPlans_small__3d_fullres" / "crossval_results_folds_0_1_2_3_4" / "summary.json"
    assert len(json.loads(merged.read_text())["metric_per_case"]) == 5
    compared = json.loads((results / "inference_information.json").read_text())["all_results"]
    assert len(compared) == 3
    assert all(0 <= dice <= 1 for dice in compared.values())


@pytest.mark.compatibility("folds", "nnUNetv2_ensemble of NMSW's and a stock model's probabilities")
def test_ensemble_with_a_stock_model(folds):
    for case in CASES:
        nmsw, stock, both = (probabilities(folds / name, case) for name in ("nmsw", "stock", "ensemble"))
        assert not np.array_equal(nmsw, stock)
        assert np.allclose(both, (nmsw + stock) / 2, atol=1e-5)
        assert np.array_equal(both.argmax(0), read(folds / "ensemble" / f"{case}.nii.gz"))


@pytest.mark.compatibility("folds", "nnUNetv2_apply_postprocessing of what nnUNetv2_find_best_configuration determined")
@pytest.mark.compatibility(
    "sharing",
    "nnUNetv2_export_model_to_zip, nnUNetv2_install_pretrained_model_from_zip, and nmsw_predict on another "
    "nnUNet_results without nnUNet_raw and nnUNet_preprocessed: the same probabilities",
)
def test_postprocessing_and_sharing(folds):
    best = json.loads((folds / "nnUNet_results" / DATASET / "inference_information.json").read_text())
    best = best["best_model_or_ensemble"]
    elsewhere = folds / "elsewhere"
    elsewhere.mkdir()
    images = folds / "nnUNet_raw" / DATASET / "imagesTs"
    run_all(
        f"nnUNetv2_apply_postprocessing -i {folds}/nmsw -o {folds}/postprocessed -np 1 "
        f"-pp_pkl_file {best['postprocessing_file']} -plans_json {best['some_plans_file']}",
        f"nnUNetv2_export_model_to_zip -d 998 -o {folds}/model.zip -c {model(NMSW)} -f 0 1 2 3 4",
        f"nnUNet_results={elsewhere} nnUNetv2_install_pretrained_model_from_zip {folds}/model.zip",
        f"nnUNet_results={elsewhere} nnUNet_raw=/nowhere nnUNet_preprocessed=/nowhere "
        f"nmsw_predict -i {images} -o {folds}/shared -device cpu -npp 1 -nps 1 --disable_tta --save_probabilities",
        workspace=folds,
    )
    for case in CASES:
        labels = read(folds / "nmsw" / f"{case}.nii.gz")
        # As many patches as by the calibration, which travels in the checkpoints.
        shared, calibrated = folds / "shared", folds / "calibrated"
        assert np.array_equal(read(shared / f"{case}.nii.gz"), read(calibrated / f"{case}.nii.gz"))
        assert np.array_equal(probabilities(shared, case), probabilities(calibrated, case))
        kept = read(folds / "postprocessed" / f"{case}.nii.gz")
        assert ((kept == labels) | (kept == 0)).all()  # postprocessing takes components away
