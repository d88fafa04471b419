"""The command `nmsw_retrofit`: a trained stock model becomes an NMSW model, which is compared with it at the end.

Every step is the console command that a user would type, shown before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_nmsw.commands import compare
from nnunet_nmsw.commands.shared_flags import add_device_flag, installed_here, require_extra
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import TRUST_FLAG
from nnunet_nmsw.imports import importing

if TYPE_CHECKING:
    from nnunet_nmsw.commands.stock_model import StockModel

DEFAULT_TRAINER = "nnUNetTrainerNMSW_retrofit"
AGAIN = "then give the same command again: it goes on from there"


def main(arguments: Sequence[str] | None = None) -> None:
    """Retrofit a stock model from the command line.

    Raises:
        UserError: a flag, the model or its dataset is wrong, which is said before anything is trained; or a step
            failed.
    """
    args = parser().parse_args(arguments)
    _check(args)
    with importing():
        from nnunet_nmsw.commands.retrofit_steps import step_of
        from nnunet_nmsw.commands.stock_model import (
            check_comparable,
            check_preprocessed,
            check_trainer,
            find_stock_model,
        )
        from nnunet_nmsw.inference.device import prepare_device
    prepare_device(args.device)  # raises where there is none
    stock = find_stock_model(args.m, args.d, args.f, args.chk)
    check_trainer(args.tr)
    check_preprocessed(stock)
    retrofit = stock.folder_of(args.tr)
    if not args.no_compare:
        check_comparable(stock, args.trust_model)
    steps = {fold: step_of(retrofit / f"fold_{fold}", stock.checkpoint(fold), args.trust_model) for fold in stock.folds}
    for fold, step in steps.items():
        print(f"Fold {fold}: {step.what}")
    train = ["nnUNetv2_train", stock.dataset, stock.configuration]
    how = ["-tr", args.tr, "-p", stock.plans, "-device", args.device, "-num_gpus", str(args.num_gpus)]
    for fold, step in steps.items():
        if step.flags is not None:
            _run([*train, str(fold), *how, *step.flags], f"fold {fold}")
    if args.no_compare:
        print(f"The model is in {retrofit}")
    else:
        _run(_comparison(args, stock), "the comparison")


def _comparison(args: argparse.Namespace, stock: StockModel) -> list[str]:
    """The command that compares both models."""
    report = args.o or stock.folder_of(args.tr) / "comparison"
    # The flags of --compare come first: of two flags of a kind the last one counts.
    words = ["nmsw_compare", *args.compare, "-d", stock.dataset, "-c", stock.configuration, "-p", stock.plans]
    words += ["-f", *map(str, stock.folds), "-tr", args.tr, "-tr_baseline", stock.model.trainer]
    words += ["-chk", "checkpoint_final.pth", "-chk_baseline", args.chk, "-device", args.device, "-o", str(report)]
    return [*words, TRUST_FLAG] if args.trust_model else words


def _run(words: Sequence[str], what: str) -> None:
    """Show a command and run it.

    Raises:
        UserError: it failed.
    """
    print(f"\n{shlex.join(words)}", flush=True)
    status = status_of(words)
    if status:
        raise UserError(f"{what}: {words[0]} ended with status {status}. Mend what it says above, {AGAIN}")


def status_of(words: Sequence[str]) -> int:
    """Run a command to its end, and return its exit status. It is killed where this one is interrupted."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it inherits: Ctrl-C is told of once, here
    try:
        process = subprocess.Popen(installed_here(words))
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        return process.wait()


def _check(args: argparse.Namespace) -> None:
    """See that the flags go together.

    Raises:
        UserError: they do not, or those of `nmsw_compare` are wrong, or what it needs is not installed.
    """
    if args.num_gpus < 1:
        raise UserError(f"-num_gpus is {args.num_gpus}: give 1 or more")
    if args.num_gpus > 1 and args.device != "cuda":
        raise UserError(f"-num_gpus {args.num_gpus} needs -device cuda, and -device is {args.device}")
    if args.no_compare and (args.compare or args.o is not None):
        raise UserError("--no_compare leaves out what -o and --compare are for: leave these out, too")
    if not args.no_compare:
        # Those that are known only when the model has been read cannot be wrong.
        flags = compare.read_flags([*args.compare, "-d", "", "-f", "0", "-o", str(args.o or "comparison")])
        require_extra("nmsw_retrofit (or give --no_compare)", "compare", compare.NEEDED)
        if flags.num_parts != 1:
            raise UserError("--compare -num_parts leaves the report unfinished: leave it out")
        if args.o is not None:
            with importing():
                from nnunet_nmsw.commands.images import check_output
                from nnunet_nmsw.evaluation.store import check_report_folder
            check_report_folder(args.o)
            check_output(str(args.o))


def parser() -> argparse.ArgumentParser:
    """What reads the flags."""
    flags = argparse.ArgumentParser(
        prog="nmsw_retrofit",
        description="Make an NMSW model of a trained stock model: train around each fold's network, from the "
        "checkpoint of the same fold, validate and calibrate with nnUNetv2_train, and compare the two models with "
        "nmsw_compare, whose answer comes last. Called again, it goes on from where it was interrupted. A fold whose "
        "stock checkpoint has changed since it began is refused.",
    )
    add: Any = flags.add_argument
    add("-m", type=Path, required=True, help="of the stock model, with plans.json and fold_X")
    add("-d", metavar="DATASET", help="name or id of the dataset, preprocessed. Default: that of the model's plans")
    add("-f", nargs="+", metavar="FOLD", help="folds to retrofit. Default: all that are trained")
    add(
        "-tr",
        default=DEFAULT_TRAINER,
        help=f"trainer, for another length, too: {DEFAULT_TRAINER}_50epochs, or {DEFAULT_TRAINER}_context. "
        f"Default: {DEFAULT_TRAINER}",
    )
    add("-chk", default="checkpoint_final.pth", help="checkpoint of the stock model. Default: checkpoint_final.pth")
    add("-num_gpus", type=int, default=1, help="GPUs to train a fold on. Default: 1")
    add_device_flag(flags)
    add("-o", type=Path, help="folder of the report. Default: comparison, in the folder of the new model")
    add("--no_compare", action="store_true", help="train, validate and calibrate only")
    add(TRUST_FLAG, action="store_true", help="see nmsw_predict; for nmsw_compare, as nnUNetv2_train has no such flag")
    add(
        "--compare",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="FLAGS",
        help="what follows are flags of nmsw_compare, such as -k 10%% auto -timed_cases 1",
    )
    return flags


if __name__ == "__main__":
    main()
