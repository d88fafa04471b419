"""The command `nmsw_compare`: NMSW against the sliding window on the validation cases of trained folds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_nmsw.commands.shared_flags import (
    absolute,
    add_shared_flags,
    add_stock_flags,
    check_least,
    check_stock_models,
    measuring,
    mirrorings,
    require_extra,
)
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.flags import (
    DEFAULT_CONFIGURATION,
    DEFAULT_PLANS,
    DEFAULT_TRAINER,
    FLOAT32,
    OPENVINO,
    PYTORCH,
)
from nnunet_nmsw.selection.budget import parse_num_patches

if TYPE_CHECKING:
    from nnunet_nmsw.evaluation.store import Comparison

DEFAULT_NUM_PATCHES = ("5%", "10%", "20%", 5, 10, 30, "all")

STOCK_FLAGS = {
    name: f"{flag} is for stock models: name them with --global_model and --local_model"
    for name, flag in (
        ("i", "-i"),
        ("labels", "--labels"),
        ("explore", "--explore"),
        ("calibration", "--calibration"),
        ("orientation", "--orientation"),
    )
}
TRAINED_FLAGS = {
    name: f"-{name} names trained models of a dataset: leave it out beside --global_model and --local_model"
    for name in ("d", "c", "p", "tr", "tr_baseline", "p_baseline", "c_baseline", "chk_baseline")
}
"""What is said of a flag that is for the other kind of comparison, by the name of its argument."""

NEEDED = ("monai", "jinja2", "pandas", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare from the command line."""
    args = read_flags(arguments)
    require_extra("nmsw_compare", "compare", NEEDED)
    # These import what the line above asks for.
    if args.global_model is not None:
        from nnunet_nmsw.commands.compare_stock import stock_comparison

        comparison = stock_comparison(args)
    else:
        comparison = _comparison(args)
    comparison.open()
    try:
        _run(comparison, args)
    except OSError as error:
        raise UserError(f"cannot write into {args.o}: {reason(error)}; the same command goes on from there") from error
    except BrokenProcessPool as error:
        raise UserError(
            "a process died, perhaps for lack of memory: lower -nps; the same command goes on from what is done"
        ) from error


def _comparison(args: argparse.Namespace) -> Comparison:
    """Of trained folds."""
    from nnunet_nmsw.evaluation.about import about, remarks
    from nnunet_nmsw.evaluation.methods import build_methods
    from nnunet_nmsw.evaluation.models import dataset_name, find_cases, find_models
    from nnunet_nmsw.evaluation.store import Comparison, began_with_auto
    from nnunet_nmsw.inference.device import prepare_device
    from nnunet_nmsw.inference.openvino_branches import backend_named
    from nnunet_nmsw.selection.calibration import NO_BENEFITS

    given = list(args.k or DEFAULT_NUM_PATCHES)
    backend_named(args.backend, FLOAT32, prepare_device(args.device))  # raises where one is not there
    dataset = dataset_name(args.d)
    models = find_models(args, dataset)
    if args.k is None and models[-1].predicts_benefits and models[-1].calibrated_folds():
        given += ["auto"] * began_with_auto(args.o)  # folds may have been calibrated since
    num_patches = list(dict.fromkeys(given))
    if "auto" in num_patches:
        if not models[-1].predicts_benefits:
            raise UserError(NO_BENEFITS)
        for fold in args.f:
            models[-1].threshold(fold)  # raises where nothing is calibrated
    cases = find_cases(dataset, args.f, models)
    methods = build_methods(len(models) > 1, num_patches, mirrorings(args), args.backend)
    return Comparison(
        args.o,
        dataset,
        models,
        methods,
        cases,
        **measuring(args),
        about=about(models, cases),
        remarks=tuple(remarks(models, args.f, "auto" in num_patches)),
    )


def _run(comparison: Comparison, args: argparse.Namespace) -> None:
    from nnunet_nmsw.evaluation.report.write import write_report
    from nnunet_nmsw.evaluation.run import run_cases, run_timing

    progress = not args.disable_progress_bar
    run_cases(comparison, args.num_parts, args.part_id, args.nps, progress)
    if args.num_parts > 1:
        left = len(comparison.missing())
        print(
            f"Part {args.part_id} of {args.num_parts} is done, {left} cases are left to others. When all are done, "
            "call once more without -num_parts and -part_id: that measures time and writes the report."
        )
        return
    failures = run_timing(comparison, progress)
    answer = write_report(comparison, args.margin, args.cases_shown)
    print(f"Report: {args.o / 'index.html'}", *answer, sep="\n")
    failures.raise_any()


def read_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked.

    Args:
        arguments: of the command; this process's where None.

    Raises:
        UserError: one of them is wrong, or they do not go together.
    """
    args = parser().parse_args(arguments)
    _check(args)
    args.k = args.k and [parse_num_patches(k, "-k", auto=True) for k in args.k]
    return args


def _check(args: argparse.Namespace) -> None:
    check_least(args, nps=1, timed_cases=0, rounds=1, cases_shown=0)
    if not (args.tolerance > 0 and math.isfinite(args.tolerance)):
        raise UserError(f"-tolerance is {args.tolerance}: give a distance in mm above 0")
    if not (args.margin >= 0 and math.isfinite(args.margin)):
        raise UserError(f"-margin is {args.margin}: give Dice points of at least 0")
    check_stock_models(args)
    check_unused(args, STOCK_FLAGS if args.global_model is None else TRAINED_FLAGS)
    if args.global_model is None:
        _check_trained(args)
    elif args.i is None:
        raise UserError("-i is missing: name the folder of images that the stock models are compared on")
    if args.o.exists() and not args.o.is_dir():
        raise UserError(f"-o {args.o} is a file: give a folder")


def check_unused(args: argparse.Namespace, flags: Mapping[str, str]) -> None:
    """See that flags that are for something else are not given.

    Args:
        args: the flags.
        flags: by the name of the argument, the flag and what it is for.

    Raises:
        UserError: one is given.
    """
    given = next((name for name in flags if getattr(args, name) not in (None, 0)), None)
    if given is not None:
        raise UserError(flags[given])


def _check_trained(args: argparse.Namespace) -> None:
    if args.d is None:
        raise UserError("-d is missing: name the dataset; or stock models with --global_model and --local_model")
    args.f = args.f or ["0", "1", "2", "3", "4"]
    for fold in args.f:
        if not (fold.isascii() and fold.isdigit()):
            hint = ": its validation cases were trained on" if fold == "all" else ""
            raise UserError(f"-f {fold}{hint}; give folds as numbers from 0")
    if args.tr_baseline == "none" and (args.p_baseline or args.c_baseline or args.chk_baseline):
        raise UserError(
            "-p_baseline, -c_baseline and -chk_baseline name the baseline's model, and -tr_baseline none asks for none"
        )
    args.f = sorted({int(fold) for fold in args.f})
    args.c, args.p, args.tr = args.c or DEFAULT_CONFIGURATION, args.p or DEFAULT_PLANS, args.tr or DEFAULT_TRAINER


def parser() -> argparse.ArgumentParser:
    """What reads the flags."""
    flags = argparse.ArgumentParser(
        prog="nmsw_compare",
        description="Compare NMSW with the sliding window on the validation cases of trained folds: accuracy, time "
        "and memory by number of patches, as a report (index.html) for people. Or, with --global_model and "
        "--local_model, what nmsw_predict makes of stock models with their sliding windows. Interrupted, it goes on "
        "where it stopped when called again.",
    )
    add: Any = flags.add_argument
    add("-d", help="dataset name or id")
    add("-o", type=Path, required=True, help="folder of the report, new or of the same comparison")
    add("-f", nargs="+", help="folds. Default: 0 1 2 3 4; of stock models all that are trained")
    add("-c", help=f"configuration. Default: {DEFAULT_CONFIGURATION}")
    add("-p", help=f"plans identifier. Default: {DEFAULT_PLANS}")
    add("-tr", help=f"NMSW trainer. Default: {DEFAULT_TRAINER}")
    add(
        "-tr_baseline",
        help='stock trainer to compare with; "none" for no baseline. Default: nnUNetTrainer if it has the folds',
    )
    add("-p_baseline", help="plans identifier of the baseline. Default: that of -p")
    add("-c_baseline", help="configuration of the baseline. Default: that of -c")
    add_stock_flags(flags)
    add("-i", metavar="FOLDER", help="of stock models: images to compare on, named as for nmsw_predict")
    add(
        "--labels",
        type=absolute,
        metavar="FOLDER",
        help="of stock models: reference labels of these images, files CASE, with the numbers of a set's coarse model. "
        "Without, predictions are compared with the stock sliding windows",
    )
    add("-chk", default="checkpoint_final.pth", help="name of the checkpoints. Default: checkpoint_final.pth")
    add("-chk_baseline", help="name of the baseline's checkpoints. Default: that of -chk")
    add(
        "-k",
        nargs="+",
        metavar="K",
        help='patches a case: numbers, percentages of all windows, "all", or "auto" as in nmsw_predict. '
        "Default: 5%% 10%% 20%% 5 10 30 all, and auto where the model is calibrated; of stock models 5%% 10%% 20%% "
        "all, and auto with --calibration",
    )
    add(
        "-tta",
        choices=("on", "off", "both"),
        default="on",
        help="test time augmentation by mirroring, for all methods. Default: on, as in nnUNetv2_predict",
    )
    add("--disable_tta", action="store_true", help="the same as -tta off")
    add(
        "--backend",
        choices=(PYTORCH, OPENVINO),
        default=PYTORCH,
        help="with -device cpu: openvino compares NMSW computed by OpenVINO, too. All other methods are computed by "
        "PyTorch. Default: pytorch",
    )
    add("-tolerance", type=float, default=2.0, help="mm, of the normalised surface Dice. Default: 2")
    add("-margin", type=float, default=0.5, help="loss in Dice points (per cent) that would matter. Default: 0.5")
    add("-timed_cases", type=int, default=3, help="cases of the first fold to time; 0: no timing. Default: 3")
    add("-rounds", type=int, default=3, help="how often each of them is timed. Default: 3")
    add("-cases_shown", type=int, default=3, help="cases to look at in the report. Default: 3")
    add_shared_flags(flags)
    return flags


if __name__ == "__main__":
    main()
