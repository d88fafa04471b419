"""The named variants, as nnU-Net's trainer lookup finds them: training length and mirroring."""

from pathlib import Path

import pytest
import torch
from commands import DATASET, environment, run_all
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_nmsw._register import register
from nnunet_nmsw.inference.predictor import NMSWPredictor

pytestmark = pytest.mark.integration

LENGTHS = {"": 1000, "_1epoch": 1} | {f"_{n}epochs": n for n in (1, 5, 10, 20, 50, 100, 250, 500, 2000)}


@pytest.mark.compatibility(
    "variants",
    "nnUNetTrainerNMSW_{1,5,10,20,50,100,250,500,2000}epochs, _NoMirroring, and both: "
    "found by name; epochs; mirrored axes in training and validation",
)
def test_variants(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment(workspace).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("nnUNet_extTrainer")
    register()  # as at the start of Python
    for length, epochs in LENGTHS.items():
        for mirrored, suffix in ((True, ""), (False, "_NoMirroring")):
            name = f"nnUNetTrainerNMSW{length}{suffix}"
            trainer = get_trainer_from_args(
                "998", "3d_fullres", 0, name, "nnUNetPlans_small", device=torch.device("cpu")
            )
            assert type(trainer).__name__ == name
            assert trainer.num_epochs == epochs
            trainer.initialize()
            assert trainer.lr_scheduler.max_steps == epochs
            trainer.get_dataloaders()
            assert (trainer.augmentation.mirror is not None) is mirrored
            assert trainer.inference_allowed_mirroring_axes == ((0, 1, 2) if mirrored else None)


@pytest.mark.compatibility("variants", "_NoMirroring: nnUNetv2_train; prediction with the model does not mirror either")
def test_a_model_without_mirroring(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = "nnUNetTrainerNMSW_tiny_NoMirroring"
    command = f"nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr {trainer} -device cpu"
    run_all(f"nnUNet_results={tmp_path} {command}", workspace=workspace)
    monkeypatch.setenv("nnUNet_extTrainer", environment(workspace)["nnUNet_extTrainer"])
    predictor = NMSWPredictor(device=torch.device("cpu"))
    model = tmp_path / DATASET / f"{trainer}__nnUNetPlans_small__3d_fullres"
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert predictor.use_mirroring
    assert predictor.allowed_mirroring_axes is None
