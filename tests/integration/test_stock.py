"""Stock nnU-Net with this package installed and without: nothing differs."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from commands import DATASET, environment

pytestmark = pytest.mark.integration

TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerShort(nnUNetTrainer):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 5, 1
        super().initialize()
"""
SCRIPT = """
import json, os, random, sys

if __name__ == "__main__":
    import numpy as np
    import torch
    from nnunetv2.run.run_training import run_training_entry

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    run_training_entry()
    ours = sorted(name for name in sys.modules if "nmsw" in name)
    variables = {name: value for name, value in os.environ.items() if name.startswith("nnUNet")}
    with open(sys.argv[0] + ".json", "w") as file:
        json.dump({"modules": ours, "variables": variables}, file)
"""


def train(folder: Path, workspace: Path, python: list[str], **changes: str) -> tuple[dict, dict[str, str], dict]:
    """Train a stock trainer. Returns its checkpoint, the text files of its model, and what the process held of ours."""
    (folder / "trainers").mkdir(parents=True)
    (folder / "trainers" / "short.py").write_text(TRAINER)
    (folder / "train.py").write_text(SCRIPT)
    variables = {
        **environment(workspace),
        "nnUNet_extTrainer": str(folder / "trainers"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_n_proc_DA": "0",
        **changes,
    }
    command = [*python, str(folder / "train.py"), "998", "3d_fullres", "0", "-p", "nnUNetPlans_small"]
    command += ["-tr", "nnUNetTrainerShort", "-device", "cpu"]
    result = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    model = folder / "results" / DATASET / "nnUNetTrainerShort__nnUNetPlans_small__3d_fullres"
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    files = {name: (model / name).read_text() for name in ("plans.json", "dataset.json")}
    return checkpoint, files, json.loads((folder / "train.py.json").read_text())


@pytest.mark.compatibility(
    "stock code",
    "nnUNetv2_train of a stock trainer with this package registered and in an interpreter without it (python -S): the "
    "same weights bit for bit, the same plans, no module of ours but the registration",
)
def test_a_stock_training_does_not_notice_the_package(workspace, tmp_path):
    with_package = train(tmp_path / "with", workspace, [sys.executable])
    # Without `site` no .pth file is read, so nothing of ours runs.
    packages = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    without = train(tmp_path / "without", workspace, [sys.executable, "-S"], PYTHONPATH=packages)
    assert without[2]["modules"] == []
    assert set(with_package[2]["modules"]) <= {"nnunet_nmsw", "nnunet_nmsw._register"}
    for name in ("with", "without"):
        variables = (with_package if name == "with" else without)[2]["variables"]
        folders = variables.pop("nnUNet_extTrainer").split(os.pathsep)
        assert folders[0] == str(tmp_path / name / "trainers")  # the user's folder stays first
        variables.pop("nnUNet_results")
    assert with_package[2]["variables"] == without[2]["variables"]
    assert with_package[1] == without[1]
    assert "nmsw" not in with_package[1]["plans.json"].replace('"nmsw": {}', "")  # which small_plans writes
    weights, other = with_package[0]["network_weights"], without[0]["network_weights"]
    assert weights.keys() == other.keys()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert all(weight.isfinite().all() for weight in weights.values())
