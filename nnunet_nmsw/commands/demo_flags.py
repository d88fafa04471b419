"""The flags of `nmsw_demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.selection.budget import parse_num_patches

MARK = "nmsw_demo.json"
"""File by which a folder is known as a demonstration's."""

LEAST = {"training_cases": 5, "test_cases": 1, "size": 1, "patch_size": 1, "batch_size": 1}
"""The smallest numbers by flag: nnU-Net's splits need a case for each of five folds."""

QUICK = {
    "tr": "nnUNetTrainerNMSW_1epoch_NoMirroring",
    "tr_baseline": "none",
    "k": ["10%"],
    "size": 48,
    "training_cases": 6,
    "test_cases": 1,
}
"""Defaults of `--quick`, by argument."""


def read_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; with `--quick` what is not given is as in `QUICK`.

    Args:
        arguments: of the command; this process's where None.

    Raises:
        UserError: a number is out of range, or the folder holds what should not be lost.
    """
    flags = parser()
    if flags.parse_args(arguments).quick:
        flags.set_defaults(**QUICK)
    args = flags.parse_args(arguments)
    for k in args.k:
        parse_num_patches(k, "-k", auto=True)
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}: give a number of at least {least}")
    if args.o.exists() and not args.o.is_dir():
        raise UserError(f"-o {args.o} is a file: give a folder")
    if args.o.exists() and any(args.o.iterdir()):
        if not (args.o / MARK).is_file():
            raise UserError(f"{args.o} holds something else: give an empty or new folder with -o")
        if not args.overwrite:
            raise UserError(f"{args.o} holds an earlier demonstration: --overwrite removes it, or give -o a new folder")
    return args


def parser() -> argparse.ArgumentParser:
    """What reads the flags."""
    flags = argparse.ArgumentParser(
        prog="nmsw_demo",
        description="Train NMSW and stock nnU-Net for about the same time on a generated phantom, predict, and compare "
        "both. About 8 minutes on two CPU cores.",
    )
    flags.add_argument("-o", type=Path, default=Path("nmsw_demo"), help="output folder. Default: nmsw_demo")
    flags.add_argument("--overwrite", action="store_true", help="remove an earlier demonstration with all it has made")
    flags.add_argument(
        "--quick",
        action="store_true",
        help="a first look: NMSW alone, trained for one epoch on six cases, and compared with its own sliding window",
    )
    flags.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="Default: cpu")
    flags.add_argument(
        "-tr",
        default="nnUNetTrainerNMSW_5epochs_NoMirroring",
        help="Default: nnUNetTrainerNMSW_5epochs_NoMirroring",
    )
    flags.add_argument(
        "-tr_baseline",
        default="nnUNetTrainer_10epochs_NoMirroring",
        help='stock trainer, or "none". Default: nnUNetTrainer_10epochs_NoMirroring, which the demo brings',
    )
    flags.add_argument(
        "-k", nargs="+", default=["5%", "10%", "auto", "all"], help="patches a case. Default: 5%% 10%% auto all"
    )
    flags.add_argument("--training_cases", type=int, default=15, help="at least 5. Default: 15")
    flags.add_argument("--test_cases", type=int, default=2, help="Default: 2")
    flags.add_argument("--size", type=int, default=56, help="voxels along a volume's longest axis")
    flags.add_argument("--patch_size", type=int, default=16, help="voxels along each axis of a patch")
    flags.add_argument("--batch_size", type=int, default=2, help="patches of a training step. Default: 2")
    flags.add_argument("--features", type=int, nargs="+", default=[8, 16, 32], help="of the network's stages")
    return flags
