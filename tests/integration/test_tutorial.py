"""The commands of the tutorial, on a phantom in the place of the data, with trainings of a few steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk
from commands import environment

from nnunet_nmsw.demo.phantom import LABELS, simulate_case
from nnunet_nmsw.files import write_json

pytestmark = pytest.mark.integration

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
OURS = re.compile(r"^(nnUNetv2_train|nmsw_\w+) .*$", re.MULTILINE)


def commands_of(text: str) -> str:
    """The tutorial's commands as a shell script, but for the lines marked "not run"."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    script = "\n".join(line for line in blocks.splitlines() if not line.endswith("# not run"))
    for trainer in ("nnUNetTrainer", "nnUNetTrainerNMSW"):
        script = script.replace(f"{trainer}_50epochs", f"{trainer}_tiny")
    script = OURS.sub(lambda line: f"{line[0]} -device cpu", script.replace("16 32 64", "4 8 16"))
    # Processes take longer to start than so few cases: each measurement of time is one, each worker of a pool another.
    few = {
        "nnUNetv2_convert_MSD_dataset": "-np 1",
        "nnUNetv2_plan_and_preprocess": "-np 1 -npfp 1",
        "nmsw_compare": "-k 10% -timed_cases 0 -nps 1",
    }
    for command, flags in few.items():
        script = script.replace(f"{command} ", f"{command} {flags} ")
    return script


def write_decathlon_dataset(folder: Path) -> None:
    """Five training cases and a test case as the Medical Segmentation Decathlon has them."""
    for number in range(6):
        image, labels = simulate_case(number, 24)
        name = f"hippocampus_{number:03d}.nii.gz"
        files = {"imagesTr": image, "labelsTr": labels} if number < 5 else {"imagesTs": image}
        for kind, array in files.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / kind / name))
    names = {str(value): name for name, value in LABELS.items()}
    about = {"modality": {"0": "MRI"}, "labels": names, "numTraining": 5, "training": [], "test": []}
    write_json(folder / "dataset.json", about)


def test_the_commands_of_the_tutorial(tmp_path):
    write_decathlon_dataset(tmp_path / "Task04_Hippocampus")
    script = commands_of(TUTORIAL.read_text())
    assert len(OURS.findall(script)) == 4  # two trainings, a prediction, a comparison
    variables = environment(tmp_path) | {"PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "preds" / "hippocampus_005.nii.gz").is_file()
    assert (tmp_path / "preds" / "patches" / "hippocampus_005.nii.gz").is_file()
    assert "<title>NMSW against the sliding window" in (tmp_path / "report" / "index.html").read_text()
