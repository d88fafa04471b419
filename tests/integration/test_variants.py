"""The named variants, as nnU-Net's trainer lookup finds them: training length and mirroring."""

from pathlib import Path

import pytest
import torch
from commands import environment
from nnunetv2.run.run_training import get_trainer_from_args

pytestmark = pytest.mark.integration

LENGTHS = {"": 1000, "_1epoch": 1} | {f"_{n}epochs": n for n in (1, 5, 10, 20, 50, 100, 250, 500, 2000)}


@pytest.mark.compatibility(
    "variants", "nnUNetTrainerNMSW_{1,5,10,20,50,100,250,500,2000}epochs, _NoMirroring, and both: found by name, epochs"
)
@pytest.mark.compatibility("variants", "_NoMirroring: neither the training's volumes nor prediction are mirrored")
def test_variants(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment(workspace).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("nnUNet_extTrainer")
    from nnunet_nmsw._register import register

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
