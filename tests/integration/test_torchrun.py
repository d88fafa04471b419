"""A training with two processes, started by torchrun, to the end."""

import json
from pathlib import Path

import pytest
import torch
from commands import prepare, run_executable, set_configurations
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

pytestmark = pytest.mark.integration

DATASET = "Dataset989_Distributed"
TRAIN = "-m nnunet_nmsw.trainers.torchrun 989 3d_fullres 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_late -device cpu"


def stock_network(plans: Path) -> torch.nn.Module:
    configuration = PlansManager(json.loads(plans.read_text())).get_configuration("3d_fullres")
    network: torch.nn.Module = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=True,
    )
    return network


@pytest.mark.compatibility("distributed", "torchrun, two processes on loopback (gloo): training and validation")
def test_torchrun_trains_and_validates(tmp_path):
    plans = prepare(tmp_path, DATASET)
    set_configurations(plans, **{"3d_fullres": {"batch_size": 1}})
    # Three validation cases: the first process has one more than the second.
    keys = [f"case_{number:03d}" for number in range(5)]
    (plans.parent / "splits_final.json").write_text(json.dumps([{"train": keys[:2], "val": keys[2:]}]))
    torch.save({"network_weights": stock_network(plans).state_dict()}, tmp_path / "stock.pth")
    command = f"torchrun --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 {TRAIN}"
    result = run_executable(f"{command} -pretrained_weights {tmp_path / 'stock.pth'}", tmp_path)
    assert result.stdout.count("predicting case_") == 3
    assert "Loading pretrained weights from" in result.stdout

    model = tmp_path / "nnUNet_results" / DATASET / "nnUNetTrainerNMSW_late__nnUNetPlans_small__3d_fullres"
    fold = model / "fold_0"
    assert {file.name for file in model.iterdir()} >= {"plans.json", "dataset.json", "dataset_fingerprint.json"}
    files = {file.name for file in fold.iterdir()}
    assert files >= {"checkpoint_final.pth", "checkpoint_best.pth", "debug.json", "progress.png", "progress_nmsw.png"}
    assert len(list(fold.glob("training_log_*.txt"))) == 1
    assert {file.name for file in (fold / "sampling").iterdir()} == {"epoch_0000.png", "epoch_0001.png"}
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 3
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert all(tensor.isfinite().all() for tensor in checkpoint["network_weights"].values())
    assert not any(name.startswith("module.") for name in checkpoint["network_weights"])
    assert len(checkpoint["logging"]["nmsw_loss_fused"]) == 2
