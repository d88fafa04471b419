"""Running the installed console commands on nnU-Net's folders inside a workspace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = "nnUNetTrainerNMSW_1epoch"
DATASET = "Dataset998_Tiny"


def environment(workspace: Path) -> dict[str, str]:
    """This process's environment with nnU-Net's folders inside a workspace and few processes."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")},
        **{key: str(workspace / key) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "2",
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
