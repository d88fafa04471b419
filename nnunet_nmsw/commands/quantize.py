"""The command `nmsw_quantize`: prepares a trained model for `nmsw_predict --precision int8`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_nmsw.commands.shared_flags import require_extra
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import TRUST_FLAG
from nnunet_nmsw.imports import importing

NEEDED = ("nncf", "openvino")

MAX_DROP = 0.002
"""Dice, of 1, that int8 may cost on the validation cases of a fold."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantise a model from the command line.

    Raises:
        UserError: the extra is not installed, the model or its dataset is not there, or int8 costs too much Dice.
    """
    args = parser().parse_args(arguments)
    require_extra("nmsw_quantize", "quantize", NEEDED)
    if args.cases < 1:
        raise UserError(f"-cases is {args.cases}: give 1 or more")
    with importing():
        import torch
        from nnunetv2.paths import nnUNet_preprocessed
        from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

        from nnunet_nmsw.commands.find import find_folds
        from nnunet_nmsw.evaluation.quantization import QuantizedFold
        from nnunet_nmsw.inference.loading import load_model
        from nnunet_nmsw.inference.model_folder import checked_folder, read_document
        from nnunet_nmsw.inference.predictor import NMSWPredictor
    model = checked_folder(Path(args.m))
    folds = find_folds(model, args.f, args.chk)
    if not nnUNet_preprocessed.is_set():
        raise UserError("nnUNet_preprocessed is not set: export it as for nnU-Net")
    try:
        name = args.d or read_document(model, "plans.json").get("dataset_name", "")
        dataset = Path(str(nnUNet_preprocessed)) / maybe_convert_to_dataset_name(name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f'-d: there is no dataset "{name}" under nnUNet_preprocessed') from error
    failed = []
    for fold in folds:
        predictor = NMSWPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        load_model(predictor, model, [fold], args.chk, args.trust_model)
        try:
            print(QuantizedFold(predictor, dataset, fold).quantize(model / f"fold_{fold}", args.cases, args.max_drop))
        except UserError as error:  # the other folds may do
            if len(folds) == 1:
                raise
            print(error)
            failed.append(str(fold))
    if failed:
        raise UserError(f"not quantised: fold {', '.join(failed)} (see above)")


def parser() -> argparse.ArgumentParser:
    """What reads the flags."""
    flags = argparse.ArgumentParser(
        prog="nmsw_quantize",
        description="Prepare an NMSW model for nmsw_predict --precision int8: the convolutions of its local branches "
        "in 8-bit integers, calibrated on preprocessed training cases and measured on the validation cases of each "
        "fold. Needs the extra quantize.",
    )
    add: Any = flags.add_argument
    add("-m", required=True, metavar="FOLDER", help="of the model. Files are written into its folders fold_X")
    add("-d", metavar="DATASET", help="name or id of the dataset, preprocessed. Default: that of the model's plans")
    add("-f", nargs="+", metavar="FOLD", help="folds to quantise. Default: all that are trained")
    add("-chk", default="checkpoint_final.pth", help="checkpoint of a fold. Default: checkpoint_final.pth")
    add("-cases", type=int, default=16, help="training cases to calibrate with. Default: 16")
    add(
        "--max_drop",
        type=float,
        default=MAX_DROP,
        help=f"Dice, of 1, that may be lost; a fold that loses more is not quantised. Default: {MAX_DROP}",
    )
    add(TRUST_FLAG, action="store_true", help="see nmsw_predict")
    return flags
