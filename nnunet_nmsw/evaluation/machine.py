"""What numbers depend on: the machine, and versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

GIB = 2**30


def machine(device: str) -> str:
    """Processor, memory and device in words."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    text = f"{os.cpu_count()} cores of {name}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        text += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB"
    accelerator = {"cuda": torch.cuda.get_device_name, "mps": lambda: "Apple GPU"}.get(device, lambda: "no GPU used")
    return f"{text}, {accelerator()}"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("nnunet-nmsw", "nnunetv2", "torch", "monai")}
