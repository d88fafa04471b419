"""Training and prediction on real scans: a part of Hippocampus of the Medical Segmentation Decathlon."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

pytestmark = [pytest.mark.integration, pytest.mark.real_data]

DATA = os.environ.get("NMSW_TEST_DATA")
CASES = 25


@pytest.mark.skipif(DATA is None, reason="NMSW_TEST_DATA names no folder with Dataset004_Hippocampus")
def test_hippocampus_is_learned(tmp_path):
    assert DATA is not None
    source = Path(DATA) / "Dataset004_Hippocampus"
    raw = tmp_path / "nnUNet_raw" / "Dataset004_Hippocampus"
    dataset = json.loads((source / "dataset.json").read_text())
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
        for file in sorted((source / folder).glob("*.nii.gz"))[:CASES]:
            (raw / folder / file.name).symlink_to(file.resolve())
    (raw / "dataset.json").write_text(json.dumps({**dataset, "numTraining": CASES}))
    run("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -np 2", tmp_path)
    small_plans = '-m nnunet_nmsw.demo.small_plans -d 4 --patch_size 16 16 16 --features 16 32 64 --nmsw {"seed":0}'
    folders = {key: str(tmp_path / key) for key in ("nnUNet_raw", "nnUNet_preprocessed")}
    subprocess.run([sys.executable, *small_plans.split()], env={**os.environ, **folders}, check=True)
    run("nnUNetv2_train 4 3d_fullres 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_short -device cpu", tmp_path)
    (summary,) = (tmp_path / "nnUNet_results").rglob("validation/summary.json")
    # 540 steps of a small network reached 0.58. 600 of a tiny one are a matter of luck; without learning it is near 0.
    assert json.loads(summary.read_text())["foreground_mean"]["Dice"] > 0.3
