"""The named variants, as nnU-Net's trainer lookup finds them, and the smallest network that plans can ask for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DATASET, environment, run_all
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_nmsw._register import register
from nnunet_nmsw.inference.predictor import NMSWPredictor

pytestmark = pytest.mark.integration

TINY = "nnUNetTrainerNMSW_tiny"
LENGTHS = {"": 1000, "_1epoch": 1} | {f"_{n}epochs": n for n in (1, 5, 10, 20, 50, 100, 250, 500, 2000)}


def set_environment(workspace: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For trainers in this process, without worker processes."""
    for name, value in environment(workspace).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(results))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


@pytest.mark.compatibility(
    "variants",
    "nnUNetTrainerNMSW_{1,5,10,20,50,100,250,500,2000}epochs, _NoMirroring, and both: "
    "found by name; epochs; mirrored axes in training and validation",
)
def test_variants(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    set_environment(workspace, tmp_path, monkeypatch)
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
    trainer = f"{TINY}_NoMirroring"
    command = f"nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr {trainer} -device cpu"
    run_all(f"nnUNet_results={tmp_path} {command}", workspace=workspace)
    monkeypatch.setenv("nnUNet_extTrainer", environment(workspace)["nnUNet_extTrainer"])
    predictor = NMSWPredictor(device=torch.device("cpu"))
    model = tmp_path / DATASET / f"{trainer}__nnUNetPlans_small__3d_fullres"
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert predictor.use_mirroring
    assert predictor.allowed_mirroring_axes is None


@pytest.mark.compatibility("plans", "a network of two stages, whose deep supervision has one output: a training step")
def test_a_network_of_two_stages(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    set_environment(workspace, tmp_path, monkeypatch)
    small_plans = workspace / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_small.json"
    plans = small_plans.with_stem("nnUNetPlans_two_stages")
    content = json.loads(small_plans.read_text())
    kwargs = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        kwargs[name] = kwargs[name][:2]
    kwargs.update(n_stages=2, n_conv_per_stage_decoder=kwargs["n_conv_per_stage_decoder"][:1])
    plans.write_text(json.dumps({**content, "plans_name": plans.stem}))
    trainer = get_trainer_from_args("998", "3d_fullres", 0, TINY, plans.stem, device=torch.device("cpu"))
    plans.unlink()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert all(np.isfinite(losses[name]).all() for name in ("loss", "loss_local", "loss_global", "loss_fused"))
    assert all(weights.isfinite().all() for weights in trainer.network.parameters())


@pytest.mark.compatibility("variants", "nnUNetTrainerNMSW_paper: nnUNetv2_train, nmsw_predict, nmsw_compare")
def test_the_papers_method(workspace: Path, tmp_path: Path):
    trainer = "nnUNetTrainerNMSW_paper_tiny"
    model = tmp_path / DATASET / f"{trainer}__nnUNetPlans_small__3d_fullres"
    images = workspace / "nnUNet_raw" / DATASET / "imagesTs"
    flags = "-device cpu --disable_tta"
    run_all(
        f"nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr {trainer} -device cpu",
        f"nmsw_predict -i {images} -o {tmp_path}/out -m {model} -k 3 --save_patches {flags} -npp 0",
        f"nmsw_compare -d 998 -f 0 -p nnUNetPlans_small -tr {trainer} -o {tmp_path}/report -k 3 -timed_cases 0 {flags}",
        workspace=workspace,
        nnUNet_results=str(tmp_path),
    )
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert len(checkpoint["network_weights"]["fusion_parameters"]) == 1  # a weight by class
    settings = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["nmsw"]
    assert (settings["sampled_windows"], settings["random_windows"]) == (4, 1)
    windows = json.loads((tmp_path / "out" / "patches" / "case_005.json").read_text())["windows"]
    scores = [window["score"] for window in windows]
    assert scores == sorted(scores, reverse=True)  # the best scores, and nothing taken off for overlap
    answer = json.loads((tmp_path / "report" / "results.json").read_text())["answer"]
    assert answer[0].startswith("NMSW, top-k, K = 3")  # what the model itself does
