"""Trained stock models as a start: frozen, trained on, and two of them without any training."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import environment, prepare, run, run_all, set_configurations

from nnunet_nmsw.commands.predict import main

pytestmark = pytest.mark.integration

DATASET = "Dataset990_Stock"
PLANS = "-p nnUNetPlans_small -device cpu"
PREDICT = "-device cpu -npp 0 -nps 0 --disable_tta"
RETROFIT, WITH_CONTEXT = "nnUNetTrainerNMSW_retrofit_tiny", "nnUNetTrainerNMSW_retrofit_context_tiny"
MORTAL = "nnUNetTrainerNMSW_retrofit_mortal"


def labels(folder: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "case_005.nii.gz")))
    return array


def output(workspace: Path) -> str:
    return (workspace / "output.txt").read_text()


def weights(model: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    found: dict[str, torch.Tensor] = checkpoint["network_weights"]
    return found


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with stock models of 3d_fullres and of 3d_lowres, and all that the tests look at made of them."""
    folder = tmp_path_factory.mktemp("stock")
    plans = prepare(folder, DATASET)
    low_resolution = {"inherits_from": "3d_fullres", "data_identifier": "low", "spacing": [8.0] * 3}
    set_configurations(plans, **{"3d_lowres": low_resolution})
    fine, coarse = (model_of(folder, "nnUNetTrainer_tiny", c) for c in ("3d_fullres", "3d_lowres"))
    weights = f"-pretrained_weights {fine / 'fold_0' / 'checkpoint_final.pth'}"
    images = folder / "nnUNet_raw" / DATASET / "imagesTs"
    predict = f"nnUNetv2_predict -i {images} -d 990 -c 3d_fullres -f 0 {PLANS} -npp 0 -nps 0"
    result = run_all(
        "nnUNetv2_preprocess -d 990 -plans_name nnUNetPlans_small -c 3d_lowres -np 1",
        f"nnUNetv2_train 990 3d_fullres 0 {PLANS} -tr nnUNetTrainer_tiny",
        f"nnUNetv2_train 990 3d_lowres 0 {PLANS} -tr nnUNetTrainer_tiny",
        f"-nnUNetv2_train 990 3d_fullres 0 {PLANS} -tr {RETROFIT}",
        f"nnUNetv2_train 990 3d_fullres 0 {PLANS} -tr {RETROFIT} {weights}",
        f"nnUNetv2_train 990 3d_fullres 0 {PLANS} -tr {WITH_CONTEXT} {weights}",
        f"nnUNetv2_train 990 3d_fullres 0 {PLANS} -tr nnUNetTrainerNMSW_tiny {weights}",
        f"{predict} -tr nnUNetTrainer_tiny -o stock",
        f"{predict} -tr {RETROFIT} -o retrofit",
        f"nmsw_predict -i {images} -o context -d 990 -c 3d_fullres -f 0 {PLANS} -tr {WITH_CONTEXT} -npp 0 -nps 0 -k 3",
        f"nnUNet_results= nmsw_predict -i {images} -o two_models --global_model {coarse} --local_model {fine} "
        f"{PREDICT} -k 3 --save_patches",
        workspace=folder,
    )
    (folder / "output.txt").write_text(result.stdout + result.stderr)
    return folder


def model_of(workspace: Path, trainer: str, configuration: str = "3d_fullres") -> Path:
    return workspace / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans_small__{configuration}"


@pytest.mark.compatibility("pretrained weights", "a stock model's network, frozen; its sliding window stays as it was")
def test_retrofit(stock):
    assert f"{RETROFIT} needs a trained nnU-Net: give its checkpoint with -pretrained_weights" in output(stock)
    before, after = weights(model_of(stock, "nnUNetTrainer_tiny")), weights(model_of(stock, RETROFIT))
    assert all(torch.equal(weight, after[f"local_branch.{name}"]) for name, weight in before.items())
    assert np.array_equal(labels(stock / "stock"), labels(stock / "retrofit"))


@pytest.mark.compatibility(
    "pretrained weights", "nmsw_retrofit: killed in the training, it goes on, and ends in the answer of nmsw_compare"
)
def test_retrofit_by_one_command(stock):
    start = f"nmsw_retrofit -m {model_of(stock, 'nnUNetTrainer_tiny')} -device cpu -tr"
    done = run(f"{start} {RETROFIT} --no_compare", stock)
    assert "Fold 0: done" in done.stdout
    assert "nnUNetv2_train" not in done.stdout

    settings = "-k 10% -timed_cases 0 -cases_shown 0 -nps 1 --disable_tta --disable_progress_bar"
    command = f"{start} {MORTAL} --compare {settings}"
    killed = run(command, stock, check=False, NMSW_TEST_KILL="epoch 1 step 0", nnUNet_n_proc_DA="0")
    assert killed.returncode == -signal.SIGKILL
    result = run(command, stock, nnUNet_n_proc_DA="0")
    assert "Fold 0: training goes on from its checkpoint_latest.pth" in result.stdout
    retrofit = model_of(stock, MORTAL)
    before, after = weights(model_of(stock, "nnUNetTrainer_tiny")), weights(retrofit)
    assert all(torch.equal(weight, after[f"local_branch.{name}"]) for name, weight in before.items())
    answer = json.loads((retrofit / "comparison" / "results.json").read_text())["answer"]
    assert result.stdout.endswith("\n".join(answer) + "\n")


@pytest.mark.compatibility("pretrained weights", "a stock model's network, told of the whole volume by an addition")
def test_retrofit_with_context(stock):
    before, after = weights(model_of(stock, "nnUNetTrainer_tiny")), weights(model_of(stock, WITH_CONTEXT))
    start = torch.cat([weight.flatten() for weight in before.values()])
    end = torch.cat([after[f"local_branch.{name}"].flatten() for name in before])
    assert 0 < (end - start).norm() / start.norm() < 0.2  # with a low rate
    assert (after["context.addition.2.weight"] != 0).all()  # which is 0 at the start
    assert labels(stock / "context").shape == labels(stock / "stock").shape


@pytest.mark.compatibility("pretrained weights", "a stock model's network, trained on")
def test_training_on_from_a_stock_model(stock):
    assert "Loading pretrained weights from" in output(stock)
    before, after = weights(model_of(stock, "nnUNetTrainer_tiny")), weights(model_of(stock, "nnUNetTrainerNMSW_tiny"))
    # A few steps away from where it started; two networks at random are 1.4 times their size apart.
    compared = [
        # The first layer takes context, too, behind the image.
        (w, after[f"local_branch.{name}"][:, : w.shape[1]] if w.ndim > 1 else after[f"local_branch.{name}"])
        for name, w in before.items()
        if ".seg_layers." not in name
    ]
    start, end = (torch.cat([pair[side].flatten() for pair in compared]) for side in (0, 1))
    assert 0 < (end - start).norm() / start.norm() < 0.7


@pytest.mark.compatibility("pretrained weights", "3d_lowres and 3d_fullres of stock nnU-Net, without training")
def test_two_stock_models_without_training(stock, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", environment(stock)["nnUNet_extTrainer"])
    assert labels(stock / "two_models").shape == labels(stock / "nnUNet_raw" / DATASET / "labelsTs").shape
    windows = json.loads((stock / "two_models" / "patches" / "case_005.json").read_text())
    assert windows["patches_per_model"] == [3]
    assert windows["windows_to_choose_from"] > 3

    fine, coarse = (model_of(stock, "nnUNetTrainer_tiny", c) for c in ("3d_fullres", "3d_lowres"))
    other = stock / "other_labels"
    other.mkdir()
    for name in ("plans.json", "fold_0"):
        (other / name).symlink_to(coarse / name)
    dataset = json.loads((coarse / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, "spleen": 1, "heart": 2}
    (other / "dataset.json").write_text(json.dumps(dataset))
    images = stock / "nnUNet_raw" / DATASET / "imagesTs"
    for models, says in (
        (f"--global_model {other} --local_model {fine}", "no class of --global_model"),
        (f"--global_model {coarse}", "go together"),
        (f"--global_model {coarse} --local_model {fine} -d 990", "without -m"),
    ):
        with pytest.raises(SystemExit, match=says):
            main(["-i", str(images), "-o", str(stock / "out"), *PREDICT.split(), *models.split()])
    assert not (stock / "out").exists()
