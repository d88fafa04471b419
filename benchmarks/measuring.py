"""What the benchmarks share: measurements in processes of their own, and results in files, with machine and command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

MARK = "RESULT "
"""Before the line of a process that holds what it measured; libraries print, too."""


def tell(measured: dict[str, Any]) -> None:
    """Print what this process measured, for `in_new_process`."""
    print(MARK + json.dumps(measured))


def in_new_process(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a script measures and tells, called with these arguments and variables of the environment."""
    command, variables = [sys.executable, script, *arguments], {**os.environ, **environment}
    process = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in process.stdout.splitlines() if line.startswith(MARK))
    measured: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return measured


def write_results(file: Path, results: dict[str, Any], device: torch.device | None = None) -> None:
    """Write results into a JSON file, with the command and the machine; with the GPU's name where the device is one."""
    machine = {"cores": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}
    if device is not None and device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name()
    file.write_text(json.dumps({"command": sys.argv, "machine": machine, **results}, indent=1))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
