"""Running the installed console commands on nnU-Net's folders inside a workspace."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from nnunet_nmsw.demo.phantom import write_dataset
from nnunet_nmsw.demo.small_plans import write_small_plans

TRAINER = "nnUNetTrainerNMSW_1epoch"
DATASET = "Dataset998_Tiny"


def environment(workspace: Path) -> dict[str, str]:
    """This process's environment with nnU-Net's folders inside a workspace and few processes."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")},
        **{key: str(workspace / key) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        # Threads that wait by spinning cost more than all the rest where cores are few and processes many.
        "OMP_WAIT_POLICY": "PASSIVE",
        "nnUNet_extTrainer": str(Path(__file__).parent / "trainers"),
    }


def run(
    command: str,
    workspace: Path,
    check: bool = True,
    meanwhile: Callable[[int], None] | None = None,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    """Run a console command of this environment with nnU-Net's folders inside a workspace, see `command_server.py`.

    Args:
        command: name and arguments, as in a shell.
        workspace: the working folder.
        check: fail where the command does.
        meanwhile: is called with the command's number as a process, and process group, while it runs.
        **changes: of the environment; an empty value takes the variable out.
    """
    variables = {key: value for key, value in {**environment(workspace), **changes}.items() if value}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
        request = {"arguments": shlex.split(command), "variables": variables, "folder": str(workspace), **files}
        server = command_server()
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            print(json.dumps(request), file=server.stdin, flush=True)
            process = int(server.stdout.readline())
            if meanwhile is not None:
                meanwhile(process)
            status = int(server.stdout.readline())
        except BaseException:  # the next test would read what answers this one
            server.kill()
            command_server.cache_clear()
            raise
        stdout, stderr = (Path(file).read_text() for file in files.values())
    if check and status:
        pytest.fail(f"{command}\n{stdout[-3000:]}\n{stderr[-3000:]}")
    # A diverged network passes every test of files and shapes.
    if check and "train_loss nan" in stdout:
        pytest.fail(f"{command}\nthe training loss is NaN\n{stdout[-3000:]}")
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def run_all(*commands: str, workspace: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other. Variables may be set before a command, and a minus says that it may fail."""
    results = []
    for command in commands:
        words, variables = shlex.split(command.removeprefix("-")), dict(changes)
        while "=" in words[0]:
            name, value = words.pop(0).split("=", 1)
            variables[name] = value
        results.append(run(shlex.join(words), workspace, check=not command.startswith("-"), **variables))
    stdout, stderr = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(list(commands), results[-1].returncode, stdout, stderr)


@functools.cache
def command_server() -> subprocess.Popen[str]:
    """The server of all tests. It ends with this process, which holds its standard input."""
    script = Path(__file__).with_name("command_server.py")
    variables = environment(script.parent)  # what nnU-Net reads when it is imported is the same for all
    return subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
    )


def run_executable(command: str, workspace: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the installed executable of a command as a shell would."""
    name, *arguments = shlex.split(command)
    executable = shutil.which(name, path=os.path.dirname(sys.executable))
    assert executable, f"{name} is not installed"
    result = subprocess.run(
        [executable, *arguments], env=environment(workspace), cwd=workspace, capture_output=True, text=True, check=False
    )
    if check and result.returncode:
        pytest.fail(f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
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
    run(f"nnUNetv2_plan_and_preprocess -d {dataset[7:10]} -c 3d_fullres -npfp 1 -np 1", workspace)
    return write_tiny_plans(workspace, dataset)


def write_tiny_plans(workspace: Path, dataset: str) -> Path:
    """Write plans with a small patch and few features for a planned dataset. Returns the file."""
    with mock.patch.dict(os.environ, {"nnUNet_preprocessed": str(workspace / "nnUNet_preprocessed")}):
        return write_small_plans(dataset, [16, 16, 16], [4, 8, 16], "nnUNetPlans_small", {})
