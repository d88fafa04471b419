"""What the flags of `nmsw_predict` name: a model and its folds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import DEFAULT_CONFIGURATION, DEFAULT_PLANS, DEFAULT_TRAINER
from nnunet_nmsw.inference.model_folder import checked_folder, read_document, trained_folds
from nnunet_nmsw.settings import PLANS_KEY


def find_model(args: argparse.Namespace) -> Path:
    """The model folder that -m, or -d with -tr, -p and -c, names; else the only NMSW model there is.

    Of stock models it is the one whose files the predictions get: the fine one of two models of the same labels, the
    coarse one of a set.

    Raises:
        UserError: there is no such folder, or more than one model to choose from.
    """
    if args.global_model is not None:
        return checked_folder(args.global_model if is_set(args) else args.local_model[0])
    if args.m is not None:
        return checked_folder(Path(args.m))
    if not nnUNet_results.is_set():
        raise UserError("nnUNet_results is not set: export it as for nnU-Net, or name a model folder with -m")
    results = Path(str(nnUNet_results))
    if args.d is not None:
        try:
            folder = get_output_folder(
                args.d,
                args.tr or DEFAULT_TRAINER,
                args.p or DEFAULT_PLANS,
                args.c or DEFAULT_CONFIGURATION,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"-d {args.d}: no such dataset under nnUNet_raw, nnUNet_preprocessed or nnUNet_results"
            ) from error
        return checked_folder(Path(folder))
    candidates = [
        folder
        for folder in sorted(results.glob("Dataset*/*__*__*"))
        if _matches(folder, args) and _trained_with_nmsw(folder)
    ]
    if len(candidates) == 1:
        print(f"Using the only NMSW model: {candidates[0].relative_to(results)}")
        return candidates[0]
    wanted = " that match -tr, -p and -c" if args.tr or args.p or args.c else ""
    if not candidates:
        raise UserError(
            f"no NMSW models{wanted} under nnUNet_results ({results}): "
            "train one with nnUNetv2_train DATASET 3d_fullres FOLD -tr nnUNetTrainerNMSW"
        )
    names = "\n".join(f"  -m {folder}" for folder in candidates)
    raise UserError(f"{len(candidates)} NMSW models{wanted}, choose one with -d (and -tr, -p, -c) or with -m:\n{names}")


def is_set(args: argparse.Namespace) -> bool:
    """Whether stock models are a set, matched by the names of their classes, and no two models of the same labels.

    Raises:
        UserError: a folder is not the folder of a trained model.
    """
    if args.global_model is None:
        return False
    coarse, *fine = (
        read_document(checked_folder(folder), "dataset.json")["labels"]
        for folder in (args.global_model, *args.local_model)
    )
    return len(fine) > 1 or fine[0] != coarse


def find_folds(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> list[int | str]:
    """The folds to ensemble: those asked for, else every one that is trained.

    Raises:
        UserError: a checkpoint is missing.
    """
    if not checkpoint or os.path.basename(checkpoint) != checkpoint:
        raise UserError(
            f"-chk {checkpoint}: give the name of a file in the folders fold_X, such as checkpoint_best.pth"
        )
    if folds is None:
        trained = trained_folds(folder, checkpoint)
        if not trained and (folder / "fold_all" / checkpoint).is_file():
            return ["all"]
        if not trained:
            raise UserError(f"no fold in {folder} has a {checkpoint}: finish a training, or name another one with -chk")
        print(f"Using folds {', '.join(map(str, trained))}")
        return list(trained)
    for fold in folds:
        if not (fold == "all" or (fold.isascii() and fold.isdigit())):
            raise UserError(f'-f {fold}: give folds as numbers, or "all"')
    numbers: list[int | str] = [fold if fold == "all" else int(fold) for fold in folds]
    for number in numbers:
        file = folder / f"fold_{number}" / checkpoint
        if not file.is_file():
            raise UserError(f"there is no checkpoint {file}: train that fold, or choose with -f and -chk")
    return list(dict.fromkeys(numbers))


def _matches(folder: Path, args: argparse.Namespace) -> bool:
    asked, parts = (args.tr, args.p, args.c), folder.name.split("__")
    return len(parts) == len(asked) and all(a is None or a == part for a, part in zip(asked, parts, strict=True))


def _trained_with_nmsw(folder: Path) -> bool:
    """Whether an NMSW trainer wrote this folder: a stock one is named otherwise and resolves no settings."""
    trainer, _, name = folder.name.split("__")
    if not (folder / "plans.json").is_file() or not any(folder.glob("fold_*/checkpoint_*.pth")):
        return False
    try:
        settings = read_document(folder, "plans.json")["configurations"].get(name, {}).get(PLANS_KEY)
    except UserError as error:  # one broken folder must not hide the others
        print(f"WARNING: left out: {error}")
        return False
    return "NMSW" in trainer or (isinstance(settings, dict) and "downsampling_factor" in settings)
