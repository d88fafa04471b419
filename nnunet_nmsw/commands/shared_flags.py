"""What commands share: flags that mean the same in `nmsw_predict` and `nmsw_compare`, libraries of extras, and how one
command runs another."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import TRUST_FLAG


def absolute(path: str) -> Path:
    """A path of the command line, without links."""
    return Path(path).resolve()


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add them to what reads a command's flags."""
    add: Any = parser.add_argument
    add("-nps", type=int, default=int(os.environ.get("nnUNet_nps") or 3), help="cases written at a time. Default: 3")
    add("-num_parts", type=int, default=1, help="number of calls that share the cases. Default: 1")
    add("-part_id", type=int, default=0, help="which of them this is, from 0. Default: 0")
    add_device_flag(parser)
    add(
        TRUST_FLAG,
        action="store_true",
        help="load models as nnU-Net does, with whatever code their checkpoints and plans hold: for models of your own "
        "whose networks are your own, too",
    )
    add("--disable_progress_bar", action="store_true", help="no progress bars, for logs of batch systems")


def add_stock_flags(parser: argparse.ArgumentParser) -> None:
    """Add what names stock models that predict without training, and says how."""
    add: Any = parser.add_argument
    add(
        "--global_model",
        type=absolute,
        metavar="FOLDER",
        help="without an NMSW model: folder of a stock model for the coarse prediction, such as 3d_lowres",
    )
    add(
        "--local_model",
        type=absolute,
        nargs="+",
        metavar="FOLDER",
        help="and folder of a stock model for the patches, such as 3d_fullres; or folders of several, each with some "
        "of the coarse model's classes. Classes are matched by name",
    )
    add(
        "--explore",
        type=int,
        default=0,
        metavar="N",
        help="of a set of models: N further patches of each fine model for a case, over the part of the body where it "
        "has none, for objects that the coarse model misses. Default: 0",
    )
    add("--calibration", type=absolute, metavar="FILE", help="take what --calibrate wrote for these models")
    add(
        "--orientation",
        metavar="RAS",
        help="for models that were trained on images in one orientation: turn each image into it, and the labels "
        "back. The letters say where the axes x, y and z point to; RAS is nibabel's canonical one",
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add what nnU-Net's commands call it."""
    parser.add_argument(
        "-device",
        choices=("cuda", "cpu", "mps"),
        default="cuda",
        help="Default: cuda. Choose the GPU with CUDA_VISIBLE_DEVICES",
    )


def check_least(args: argparse.Namespace, **least: int) -> None:
    """See that numbers are large enough, and that the call is one of its parts.

    Args:
        args: the flags.
        **least: by name of a flag without its dash.

    Raises:
        UserError: one is not.
    """
    for name, minimum in {**least, "num_parts": 1}.items():
        if getattr(args, name) < minimum:
            raise UserError(f"-{name} is {getattr(args, name)}: give a number of at least {minimum}")
    if not 0 <= args.part_id < args.num_parts:
        raise UserError(f"-part_id is {args.part_id}: give one from 0 to {args.num_parts - 1} (-num_parts - 1)")


def mirrorings(args: argparse.Namespace) -> list[bool]:
    """What `-tta` of `nmsw_compare` asks for: with mirroring, without, or both."""
    return {"on": [True], "off": [False], "both": [True, False]}["off" if args.disable_tta else args.tta]


def measuring(args: argparse.Namespace) -> dict[str, Any]:
    """How a comparison measures, whatever it compares: arguments of `Comparison`."""
    return {
        "tolerance_mm": args.tolerance,
        "device": args.device,
        "timed_cases": args.timed_cases,
        "rounds": args.rounds,
    }


def check_stock_models(args: argparse.Namespace) -> None:
    """See that a coarse and a fine stock model are given, or neither.

    Raises:
        UserError: one of them is missing.
    """
    if (args.global_model is None) != (args.local_model is None):
        raise UserError("--global_model and --local_model go together: the one predicts coarsely, the other patches")


def check_max_drop(value: float, example: float) -> None:
    """See that a Dice that may be lost is a number that means something.

    Raises:
        UserError: it is not.
    """
    if not 0 <= value < math.inf:
        raise UserError(f"--max_drop is {value}: give a Dice of 0 or more, such as {example}")


def require_extra(command: str, extra: str, libraries: Sequence[str]) -> None:
    """See that the libraries of an extra are installed.

    Raises:
        UserError: one is not.
    """
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{command} needs {', '.join(missing)}: pip install 'nnunet-nmsw[{extra}]'")


def installed_here(words: Sequence[str]) -> list[str]:
    """The words of a command, the first one as the executable beside this Python where there is one."""
    name, *arguments = words
    return [shutil.which(name, path=os.path.dirname(sys.executable)) or name, *arguments]
