"""Trained stock models as a start: frozen, trained on, and two of them without any training."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import environment, prepare, run, set_configurations

from nnunet_nmsw.inference.command import main

pytestmark = pytest.mark.integration

DATASET = "Dataset990_Stock"
PLANS = "-p nnUNetPlans_small -device cpu"
PREDICT = "-device cpu -npp 1 -nps 1 --disable_tta"


def labels(folder: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "case_005.nii.gz")))
    return array


def weights(model: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    found: dict[str, torch.Tensor] = checkpoint["network_weights"]
    return found


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with stock models of 3d_fullres and of 3d_lowres."""
    folder = tmp_path_factory.mktemp("stock")
    plans = prepare(folder, DATASET)
    low_resolution = {"inherits_from": "3d_fullres", "data_identifier": "low", "spacing": [8.0] * 3}
    set_configurations(plans, **{"3d_lowres": low_resolution})
    run("nnUNetv2_preprocess -d 990 -plans_name nnUNetPlans_small -c 3d_lowres -np 2", folder)
    for configuration in ("3d_fullres", "3d_lowres"):
        run(f"nnUNetv2_train 990 {configuration} 0 {PLANS} -tr nnUNetTrainer_tiny", folder)
    return folder


def model_of(workspace: Path, trainer: str, configuration: str = "3d_fullres") -> Path:
    return workspace / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans_small__{configuration}"


def test_retrofit(stock):
    checkpoint = model_of(stock, "nnUNetTrainer_tiny") / "fold_0" / "checkpoint_final.pth"
    train = f"nnUNetv2_train 990 3d_fullres 0 {PLANS} -tr nnUNetTrainerNMSW_retrofit_tiny"
    refused = run(train, stock, check=False)
    assert refused.returncode == 1
    assert "-pretrained_weights" in refused.stderr.strip().splitlines()[-1]
    run(f"{train} -pretrained_weights {checkpoint}", stock)

    before, after = weights(checkpoint.parents[1]), weights(model_of(stock, "nnUNetTrainerNMSW_retrofit_tiny"))
    assert all(torch.equal(weight, after[f"local_branch.{name}"]) for name, weight in before.items())
    images = stock / "nnUNet_raw" / DATASET / "imagesTs"
    for trainer in ("nnUNetTrainer_tiny", "nnUNetTrainerNMSW_retrofit_tiny"):
        flags = f"-d 990 -c 3d_fullres -p nnUNetPlans_small -tr {trainer} -f 0 -device cpu -npp 1 -nps 1"
        run(f"nnUNetv2_predict -i {images} -o {stock / trainer} {flags}", stock)
    assert np.array_equal(labels(stock / "nnUNetTrainer_tiny"), labels(stock / "nnUNetTrainerNMSW_retrofit_tiny"))


def test_training_on_from_a_stock_model(stock):
    checkpoint = model_of(stock, "nnUNetTrainer_tiny") / "fold_0" / "checkpoint_final.pth"
    trained = run(
        f"nnUNetv2_train 990 3d_fullres 0 {PLANS} -tr nnUNetTrainerNMSW_tiny -pretrained_weights {checkpoint}", stock
    )
    assert f"Loading pretrained weights from {checkpoint}" in trained.stdout
    before, after = weights(checkpoint.parents[1]), weights(model_of(stock, "nnUNetTrainerNMSW_tiny"))
    # A few steps away from where it started; two networks at random are 1.4 times their size apart.
    compared = [(w, after[f"local_branch.{name}"]) for name, w in before.items() if ".seg_layers." not in name]
    start, end = (torch.cat([pair[side].flatten() for pair in compared]) for side in (0, 1))
    assert 0 < (end - start).norm() / start.norm() < 0.7


def test_two_stock_models_without_training(stock, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", environment(stock)["nnUNet_extTrainer"])
    images, output = stock / "nnUNet_raw" / DATASET / "imagesTs", stock / "two_models"
    fine, coarse = (model_of(stock, "nnUNetTrainer_tiny", c) for c in ("3d_fullres", "3d_lowres"))
    models = f"--global_model {coarse} --local_model {fine}"
    run(f"nmsw_predict -i {images} -o {output} {models} {PREDICT} -k 3 --save_patches", stock, nnUNet_results="")
    assert labels(output).shape == labels(stock / "nnUNet_raw" / DATASET / "labelsTs").shape
    windows = json.loads((output / "patches" / "case_005.json").read_text())
    assert windows["patches_per_model"] == [3]
    assert windows["windows_to_choose_from"] > 3

    other = stock / "other_labels"
    other.mkdir()
    for name in ("plans.json", "fold_0"):
        (other / name).symlink_to(coarse / name)
    dataset = json.loads((coarse / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, "spleen": 1, "lesion": 2}
    (other / "dataset.json").write_text(json.dumps(dataset))
    for name, says in (
        (f"--global_model {other} --local_model {fine}", "differ in their labels"),
        (f"--global_model {coarse}", "go together"),
        (f"{models} -d 990", "without -m"),
    ):
        with pytest.raises(SystemExit, match=says):
            main(["-i", str(images), "-o", str(stock / "out"), *PREDICT.split(), *name.split()])
    assert not (stock / "out").exists()
