"""Training and prediction on a GPU."""

import json

import pytest
import torch
from commands import prepare, run_all

pytestmark = pytest.mark.integration

DATASET = "Dataset997_Cuda"


@pytest.mark.compatibility("devices", "-device cuda: nnUNetv2_train and nmsw_predict with automatic mixed precision")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(tmp_path):
    prepare(tmp_path, DATASET)
    images = tmp_path / "nnUNet_raw" / DATASET / "imagesTs"
    model = "-p nnUNetPlans_small -tr nnUNetTrainerNMSW_tiny -device cuda"
    run_all(
        f"nnUNetv2_train 997 3d_fullres 0 {model}",
        f"nmsw_predict -d 997 -c 3d_fullres -i {images} -o {tmp_path}/out {model} -npp 1 -nps 1",
        workspace=tmp_path,
    )
    (fold,) = (tmp_path / "nnUNet_results" / DATASET).glob("*/fold_0")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["grad_scaler_state"]
    assert all(weight.isfinite().all() for weight in checkpoint["network_weights"].values())
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]
    assert (tmp_path / "out" / "case_005.nii.gz").is_file()
