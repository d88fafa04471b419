"""What the benchmarks share: measurements in processes of their own, and results in files, with machine and command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nnunet_nmsw.evaluation.machine import machine

FAST = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Of /proc/cpuinfo, what decides how fast a type of numbers is."""

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
    file.write_text(json.dumps({"command": sys.argv, "machine": measured_on(device), **results}, indent=1))


def measured_on(device: torch.device | None = None) -> dict[str, Any]:
    """What numbers depend on: the machine, fast types that its processor has, threads, versions, and the commit."""
    information = Path("/proc/cpuinfo")
    flags = set(information.read_text().split()) if information.is_file() else set()
    return {
        "machine": machine("cpu" if device is None else device.type),
        "processor": [name for name in FAST if name in flags],
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("nnunet-nmsw", "nnunetv2", "torch", "openvino")},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """What is measured, where it is a repository."""
    if shutil.which("git") is None:
        return None
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).resolve().parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
