"""Trainings on images that half precision cannot hold, and trainings that diverge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import DATASET, run, set_configurations, write_tiny_plans
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nnunet_nmsw.demo.phantom import write_dataset
from nnunet_nmsw.trainers.loader import for_travel

TRAIN = "-p nnUNetPlans_small -tr nnUNetTrainerNMSW_tiny -device cpu"


def noise(scale: float, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    """An image of noise, some of it large areas of one value."""
    volume = np.random.default_rng(seed).normal(offset, scale, (1, 24, 24, 24)).astype(np.float32)
    volume[:, :12] = offset
    return volume


@pytest.mark.parametrize(
    ("volume", "dtype"),
    [
        (noise(1.0), torch.float16),  # normalised
        (noise(20.0, 100.0), torch.float16),  # CT
        (noise(1.0) * 0, torch.float16),
        (noise(1e4, 2.5e5), torch.float32),  # PET in Bq/ml
        (np.full((1, 8, 8, 8), 65535.0, np.float32), torch.float32),  # a saturated scanner
        (noise(0.01, 1000.0), torch.float32),  # would be rounded away
        (np.full((1, 8, 8, 8), np.nan, np.float32), torch.float32),
        (np.concatenate([noise(1.0), noise(1.0, 1e5)]), torch.float32),  # one channel is enough
    ],
)
def test_what_half_precision_cannot_hold_travels_in_single(volume, dtype):
    assert for_travel(volume).dtype == dtype
    assert for_travel(volume).shape == volume.shape


@settings(max_examples=60)
@given(st.floats(-5, 6), st.floats(-5, 6), st.integers(0, 9))
def test_travelling_rounds_by_less_than_the_noise(log_scale, log_offset, seed):
    scale = 10.0**log_scale
    volume = noise(scale, 10.0**log_offset, seed)
    assume(np.ptp(volume) > 0)  # in single precision the noise may be gone
    error = (for_travel(volume).float() - torch.from_numpy(volume)).abs().max()
    assert error <= scale


def images_of(raw: Path, change) -> None:
    """Change the voxels of all images, and say that they are not CT."""
    for file in raw.glob("images*/*.nii.gz"):
        image = sitk.ReadImage(str(file))
        changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image).astype(np.float32)))
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))
    dataset = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**dataset, "channel_names": {"0": "noNorm"}}))


def prepare(workspace: Path, change) -> Path:
    raw = workspace / "nnUNet_raw" / DATASET
    write_dataset(raw, num_training=5, num_test=1, size=32)
    images_of(raw, change)
    run("nnUNetv2_plan_and_preprocess -d 998 -c 3d_fullres -npfp 1 -np 1", workspace)
    plans = write_tiny_plans(workspace, DATASET)
    assert "NoNormalization" in plans.read_text()
    return workspace / "nnUNet_results" / DATASET / "nnUNetTrainerNMSW_tiny__nnUNetPlans_small__3d_fullres" / "fold_0"


def losses(fold: Path) -> list[float]:
    (log,) = fold.glob("training_log_*.txt")
    return [float(line.split()[-1]) for line in log.read_text().splitlines() if "train_loss " in line]


def test_values_that_half_precision_cannot_hold_are_trained_on(tmp_path):
    """Up to 2.5e5, as in PET images: the loss was NaN from the first step."""
    fold = prepare(tmp_path, lambda array: np.abs(array) * 100 + 1e5)
    run(f"nnUNetv2_train 998 3d_fullres 0 {TRAIN}", tmp_path)
    assert len(losses(fold)) == 2
    assert np.isfinite(losses(fold)).all()
    assert (fold / "checkpoint_final.pth").is_file()


def test_a_training_that_diverges_stops_and_keeps_its_checkpoints(workspace, tmp_path):
    """One line, and nothing is saved over what was there."""
    shutil.copytree(workspace / "nnUNet_preprocessed", tmp_path / "nnUNet_preprocessed")
    plans = tmp_path / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_small.json"
    set_configurations(plans, **{"3d_fullres": {"nmsw": {"seed": 3}}})
    trainer = "nnUNetTrainerNMSW_diverging"
    command = f"nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr {trainer} -device cpu"
    result = run(command, tmp_path, check=False, nnUNet_n_proc_DA="0")
    fold = tmp_path / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans_small__3d_fullres" / "fold_0"
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("training stopped in epoch 1: the loss is not finite and weights of")
    assert "Traceback" not in result.stderr
    saved = sorted(fold.glob("checkpoint_*.pth"))
    assert [file.name for file in saved] == ["checkpoint_best.pth", "checkpoint_latest.pth"]
    for file in saved:
        checkpoint = torch.load(file, weights_only=False)
        assert checkpoint["current_epoch"] == 1  # of the epoch before
        assert all(weights.isfinite().all() for weights in checkpoint["network_weights"].values())
