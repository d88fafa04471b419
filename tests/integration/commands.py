"""Running the installed console commands on nnU-Net's folders inside a workspace."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_nmsw.demo.phantom import write_dataset

TRAINER = "nnUNetTrainerNMSW_1epoch"
DATASET = "Dataset998_Tiny"


def environment(workspace: Path) -> dict[str, str]:
    """This process's environment with nnU-Net's folders inside a workspace and few processes."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")},
        **{key: str(workspace / key) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "2",
        # Threads that wait by spinning cost more than all the rest where cores are few and processes many.
        "OMP_WAIT_POLICY": "PASSIVE",
        "nnUNet_extTrainer": str(Path(__file__).parent / "trainers"),
    }


def run(command: str, workspace: Path, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a console command of this environment with nnU-Net's folders inside a workspace."""
    name, *arguments = command.split()
    executable = shutil.which(name, path=os.path.dirname(sys.executable))
    assert executable, f"{name} is not installed"
    variables = {**environment(workspace), **changes}
    variables = {key: value for key, value in variables.items() if value}
    result = subprocess.run(
        [executable, *arguments], env=variables, cwd=workspace, capture_output=True, text=True, check=False
    )
    if check and result.returncode:
        pytest.fail(f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result


def run_all(*commands: str, workspace: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run console commands by `forked_commands.py`, which saves most of the seconds that starting each takes."""
    launcher = [sys.executable, str(Path(__file__).with_name("forked_commands.py")), *commands]
    variables = {**environment(workspace), "nnUNet_def_n_proc": "1", **changes}
    result = subprocess.run(launcher, env=variables, cwd=workspace, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.fail(f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result


def set_configurations(file: Path, **configurations: dict[str, object]) -> None:
    """Change configurations of a plans file, or add them."""
    plans = json.loads(file.read_text())
    for name, changes in configurations.items():
        plans["configurations"].setdefault(name, {}).update(changes)
    file.write_text(json.dumps(plans))


def prepare(workspace: Path, dataset: str, change_dataset: Callable[[Path], None] | None = None) -> Path:
    """Generate a tiny dataset, plan and preprocess it, and write small plans. Returns these."""
    raw = workspace / "nnUNet_raw" / dataset
    write_dataset(raw, num_training=5, num_test=1, size=32)
    if change_dataset is not None:
        change_dataset(raw)
    number = dataset[7:10]
    run(f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -np 2", workspace)
    small_plans = [sys.executable, "-m", "nnunet_nmsw.demo.small_plans", "-d", number]
    subprocess.run(
        [*small_plans, "--patch_size", "16", "16", "16", "--features", "4", "8", "8"],
        env=environment(workspace),
        check=True,
    )
    return workspace / "nnUNet_preprocessed" / dataset / "nnUNetPlans_small.json"
