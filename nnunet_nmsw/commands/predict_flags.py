"""The flags of `nmsw_predict`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from nnunet_nmsw.commands.shared_flags import (
    absolute,
    add_shared_flags,
    add_stock_flags,
    check_least,
    check_max_drop,
    check_stock_models,
)
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import (
    AUTO,
    BACKENDS,
    BFLOAT16,
    DEFAULT_CONFIGURATION,
    DEFAULT_MAX_DROP,
    DEFAULT_PLANS,
    DEFAULT_TRAINER,
    FLOAT32,
    INT8,
    OPENVINO,
    PRECISIONS,
    PYTORCH,
    parse_memory,
    parse_orientation,
)
from nnunet_nmsw.selection.budget import parse_num_patches


def read_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked.

    Args:
        arguments: of the command; this process's where None.

    Raises:
        UserError: they do not go together.
    """
    args = parser().parse_args(arguments)
    args.k = None if args.k is None else parse_num_patches(args.k, "-k", auto=True)
    args.orientation = args.orientation and parse_orientation(args.orientation)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """See that the flags go together.

    Raises:
        UserError: they do not.
    """
    check_least(args, npp=0, nps=0)
    ignored = [flag for flag in ("d", "tr", "p", "c") if getattr(args, flag) is not None]
    if args.m is not None and ignored:
        raise UserError(f"-{ignored[0]} beside -m: -m names the model's folder, leave out one of them")
    check_stock_models(args)
    if args.global_model is not None and any(flag is not None for flag in (args.m, args.d, args.tr, args.p, args.c)):
        raise UserError("--global_model and --local_model are folders, without -m, -d, -tr, -p and -c")
    if args.global_model is not None and args.k == "auto" and args.calibration is None:
        raise UserError(
            "-k auto needs an NMSW model, which predicts the benefit of patches; stock models do not. A set of them "
            "can be calibrated with --calibrate"
        )
    if args.orientation and args.save_probabilities:
        raise UserError(
            "--orientation turns labels back and no probabilities: leave out --save_probabilities, or turn the images "
            "yourself"
        )
    _check_calibration(args)
    if args.explore < 0:
        raise UserError(f"--explore is {args.explore}: give a number of patches, 0 or more")
    if args.global_model is not None and args.max_memory is not None:
        raise UserError("--max_memory needs an NMSW model: the sliding window of --global_model keeps whole volumes")
    if args.max_memory is not None:
        parse_memory(args.max_memory)
    if args.precision != FLOAT32 and args.device != "cpu":
        raise UserError(
            f"--precision {args.precision} is for -device cpu; -device {args.device} computes as nnU-Net does there"
        )
    if args.precision == INT8 and (args.global_model is not None or args.backend == PYTORCH):
        raise UserError("--precision int8 is for an NMSW model with --backend openvino, after nmsw_quantize")
    if args.backend == OPENVINO and args.device != "cpu":
        raise UserError(f"--backend {args.backend} is for -device cpu: leave it out with -device {args.device}")
    if args.engine != "ray" and (args.ray_address is not None or args.cores_per_worker is not None):
        raise UserError("--ray_address and --cores_per_worker are for --engine ray")
    if args.engine == "ray" and args.device == "mps":
        raise UserError("--engine ray works on GPUs or processors: give -device cuda or -device cpu")
    if args.cores_per_worker is not None and args.cores_per_worker < 1:
        raise UserError(f"--cores_per_worker is {args.cores_per_worker}: give 1 or more")
    args.max_drop = DEFAULT_MAX_DROP if args.max_drop is None else args.max_drop
    check_max_drop(args.max_drop, DEFAULT_MAX_DROP)


def _check_calibration(args: argparse.Namespace) -> None:
    """See that nothing is asked for that a calibration, or a prediction with one, does not do."""
    if args.calibration is not None and args.max_drop is not None:
        raise UserError("--max_drop beside --calibration: that file has its threshold, give --max_drop to --calibrate")
    if args.calibrate is None:
        return
    if args.calibration is not None:
        raise UserError("--calibrate makes the file that --calibration takes: give one of them")
    for flag, is_given in {
        "-num_parts": args.num_parts != 1,
        "--engine ray": args.engine == "ray",
        "--continue_prediction": args.continue_prediction,
        "--save_patches": args.save_patches,
        "-prev_stage_predictions": args.prev_stage_predictions is not None,
    }.items():
        if is_given:
            raise UserError(f"--calibrate writes one file and predicts nothing: leave out {flag}")


def parser() -> argparse.ArgumentParser:
    """What reads the flags."""
    flags = argparse.ArgumentParser(
        prog="nmsw_predict",
        description="Predict with an nnU-Net model trained with nnUNetTrainerNMSW: a few chosen patches instead of a "
        "sliding window. The flags are those of nnUNetv2_predict.",
    )
    add: Any = flags.add_argument
    add(
        "-i",
        required=True,
        nargs="+",
        help="input folder; files are named CASE_0000, CASE_0001 ... by channel, as for nnU-Net. Or the file of one "
        "image, of any name; several where it has several channels",
    )
    add("-o", required=True, help="output folder, made if it does not exist; the file to write where -i is a file")
    add("-d", help="dataset name or id; without it (and -m) the only NMSW model under nnUNet_results is taken")
    add("-p", help=f"plans identifier. Default: {DEFAULT_PLANS}")
    add("-tr", help=f"trainer the model was trained with. Default: {DEFAULT_TRAINER}")
    add("-c", help=f"configuration. Default: {DEFAULT_CONFIGURATION}")
    add("-f", nargs="+", help="folds to ensemble. Default: all that are trained")
    add("-m", help="model folder (with plans.json and fold_X in it) instead of -d, -p, -tr and -c")
    add_stock_flags(flags)
    add(
        "--calibrate",
        type=absolute,
        metavar="FOLDER",
        help="of a set of models: do not predict. Fit the fusion of its models, and find the threshold of -k auto, to "
        "the reference labels in this folder, files CASE with the coarse model's numbers. -i is the folder of their "
        "images, a handful suffices, and -o the JSON file to write",
    )
    add("-chk", default="checkpoint_final.pth", help="name of the checkpoint. Default: checkpoint_final.pth")
    add(
        "-k",
        "--num_patches",
        dest="k",
        metavar="K",
        help='patches a case: a number, a percentage of all windows such as "10%%", "all", or "auto": as many as are '
        "expected to help. Default: the model's setting, which is auto unless the plans say otherwise",
    )
    add(
        "--max_drop",
        type=float,
        metavar="DICE",
        help="with -k auto: Dice (of 1) that may be lost on the validation cases for fewer patches. "
        f"Default: {DEFAULT_MAX_DROP}",
    )
    add(
        "--save_patches",
        action="store_true",
        help="write which windows were taken, into the folder patches of the output: coordinates and scores as JSON, "
        "and an overlay image",
    )
    add("--disable_tta", action="store_true", help="no test time augmentation by mirroring: faster, less accurate")
    add("--save_probabilities", action="store_true", help="also save class probabilities, for ensembles")
    add("--continue_prediction", action="store_true", help="leave out cases whose prediction exists")
    add(
        "-prev_stage_predictions",
        help="folder with the predictions of the previous stage, for the cascade (3d_cascade_fullres)",
    )
    add(
        "-npp",
        type=int,
        default=int(os.environ.get("nnUNet_npp") or 3),
        help="cases that are preprocessed while others are predicted. Default: 3",
    )
    add(
        "--max_memory",
        metavar="AMOUNT",
        help="memory of the host to keep within, such as 8G: fewer things go on at a time. Default: no bound",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default=FLOAT32,
        help="with -device cpu: what the networks compute in. bfloat16 is much faster on processors that have it "
        "(AVX512-BF16 or AMX), and labels that are close calls change. int8 is faster still, for models that "
        "nmsw_quantize has prepared. Default: float32",
    )
    add("--bfloat16", dest="precision", action="store_const", const=BFLOAT16, help="the same as --precision bfloat16")
    add(
        "--backend",
        choices=BACKENDS,
        default=AUTO,
        help="what computes the networks: pytorch, or with -device cpu openvino, which is faster there "
        "(pip install 'nnunet-nmsw[openvino]'). Default: auto, openvino where it is installed",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: share the folder out to many machines or GPUs. They need the same folders and this package with its "
        "extra [ray]. Default: local",
    )
    add(
        "--ray_address",
        help="of a running Ray cluster. Default: RAY_ADDRESS, else the one that runs here, else one is started here",
    )
    add("--cores_per_worker", type=int, help="with Ray on a CPU: cores of a worker. Default: those of a machine")
    add("--verbose", action="store_true", help="tell what is being done")
    add("--not_on_device", action="store_true", help="keep results on the host: for volumes too large for the device")
    add_shared_flags(flags)
    return flags
