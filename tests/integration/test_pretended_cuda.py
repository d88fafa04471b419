"""Training and prediction on a pretended GPU: no operation on tensors of two devices, and few waits of the host.

What the host waits for costs a GPU its lead, and one more wait is soon written. The bounds are for a step, and for a
volume whose labels are worked out in one slab.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretended_cuda import stand_ins

pytestmark = pytest.mark.integration

FOLDER = Path(stand_ins.__file__).parent
OF_A_STEP = 5
OF_A_VOLUME = 5 + 3
OF_A_SET = 1000  # models meet on the host; how often it waits for each of their slabs is not bounded
OF_A_CASCADE = OF_A_STEP + 2 * 4  # components of its windows' previous labels are removed on the host


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the scenarios did."""
    if torch.version.cuda is None or sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux, PyTorch with CUDA, and a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    python_path = f"{FOLDER}:{FOLDER.parent}"
    environment = {**stand_ins.environment(folder), "PYTHONPATH": python_path, "CUDA_VISIBLE_DEVICES": ""}
    file = folder / "found.json"
    subprocess.run([sys.executable, FOLDER / "scenarios.py", file], env=environment, check=True)
    content: dict = json.loads(file.read_text())
    return content


def bound_of(name: str) -> int:
    """How often the host may wait in a scenario."""
    if "set" in name:
        return OF_A_SET
    if "cascade" in name:
        return OF_A_CASCADE
    return OF_A_STEP if name.startswith("training") else OF_A_VOLUME


@pytest.mark.compatibility("devices", "a pretended CUDA device: every operation on one device, few waits of the host")
def test_the_host_rarely_waits(found):
    bounds = {name: bound_of(name) for name in found}
    errors = {name: result["error"] for name, result in found.items() if "error" in result}
    assert not errors
    too_many = {name: result for name, result in found.items() if sum(result["waits"].values()) > bounds[name]}
    assert not too_many


def test_an_ensemble_waits_once_more_for_each_fold(found):
    of_one, of_two = (sum(found[name]["waits"].values()) for name in ("prediction", "prediction of an ensemble"))
    assert of_two - of_one <= 1
