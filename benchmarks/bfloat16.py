"""Run a console command of nnU-Net or of this package with its networks in bfloat16 on the CPU.

    python benchmarks/bfloat16.py nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerNMSW_10epochs -device cpu

nnU-Net computes in float32 on a CPU. Processors with AMX or AVX512-BF16 are several times faster in bfloat16, which
makes experiments on a CPU feasible; stock and NMSW commands are run the same way.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


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
    register_optimizer_step_pre_hook(leave_out_what_is_not_finite)
    # The cache of cast weights lives until autocast ends, which here is after the last optimiser step.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        command()


def leave_out_what_is_not_finite(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Let a step with a gradient that is not finite change nothing.

    oneDNN's bfloat16 weight gradient of some small convolutions reads memory that nobody wrote: mostly noise, now and
    then NaN, and one is the end of a training. In float32 it does not happen.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


if __name__ == "__main__":
    main()
