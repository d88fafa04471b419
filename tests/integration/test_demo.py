"""The demonstration, smaller."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def test_demo(tmp_path):
    executable = shutil.which("nmsw_demo", path=os.path.dirname(sys.executable))
    assert executable
    small = "--quick --training_cases 5 --test_cases 1 --size 28 --features 4 8 16 -k 10%"
    small += " -tr nnUNetTrainerNMSW_tiny -tr_baseline nnUNetTrainer_tiny"
    command = [executable, "-o", str(tmp_path / "demo"), *small.split()]
    trainers = {**os.environ, "nnUNet_extTrainer": str(Path(__file__).parent / "trainers")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=trainers)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NMSW, K = 10%: too few cases" in result.stdout  # 5 training cases, so fold 0 has one to validate on
    assert "<title>NMSW against the sliding window" in (tmp_path / "demo" / "report" / "index.html").read_text()
    assert (tmp_path / "demo" / "predictions" / "case_005.nii.gz").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    refused = subprocess.run([executable, "-o", str(tmp_path / "other")], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "holds something else" in refused.stderr
    assert (tmp_path / "other" / "precious.txt").exists()
