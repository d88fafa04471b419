"""Run a console command of nnU-Net or of this package with its networks in bfloat16 on the CPU.

    python benchmarks/bfloat16.py nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerNMSW_10epochs -device cpu

nnU-Net computes in float32 on a CPU. Processors with AMX or AVX512-BF16 are several times faster in bfloat16, which
makes experiments on a CPU feasible; stock and NMSW commands are run the same way.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import torch


def main() -> None:
    """Command line."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    name = sys.argv[1]
    commands = entry_points(group="console_scripts", name=name)
    if not commands:
        sys.exit(f"{name} is not an installed console command")
    sys.argv = sys.argv[1:]
    command = next(iter(commands)).load()
    # The cache of cast weights lives until autocast ends, which here is after the last optimiser step.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        command()


if __name__ == "__main__":
    main()
