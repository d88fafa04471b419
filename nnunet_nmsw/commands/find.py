"""What the flags of `nmsw_predict` name: a model, its folds, and cases."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import DEFAULT_CONFIGURATION, DEFAULT_PLANS, DEFAULT_TRAINER
from nnunet_nmsw.inference.model_folder import checked_folder, read_document, trained_folds
from nnunet_nmsw.settings import PLANS_KEY


def find_model(args: argparse.Namespace) -> Path:
    """The model folder that --local_model, -m, or -d with -tr, -p and -c, names; else the only NMSW model there is.

    Raises:
        UserError: there is no such folder, or more than one model to choose from.
    """
    if args.m is not None or args.local_model is not None:
        return checked_folder(Path(args.m or args.local_model))
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


def find_cases(input_folder: str, model_folder: Path) -> list[list[str]]:
    """The images in a folder, one list of channel files a case.

    Raises:
        UserError: there is no folder, no case in it, a file that belongs to none, or a case lacks a channel.
    """
    dataset = read_document(model_folder, "dataset.json")
    ending, channels = dataset["file_ending"], len(dataset.get("channel_names") or dataset["modality"])
    convention = f"the model expects files named CASE_0000{ending}" + (
        f", with _0000 to _{channels - 1:04d} for the channels" if channels > 1 else ""
    )
    if not os.path.isdir(input_folder):
        what = "is a file, give the folder that holds it" if os.path.exists(input_folder) else "does not exist"
        raise UserError(f"-i {input_folder} {what}")
    try:
        names = sorted(name for name in os.listdir(input_folder) if name.endswith(ending))
    except OSError as error:
        raise UserError(f"-i {input_folder} cannot be read: {error.strerror}") from error
    cases: dict[str, list[str]] = {}
    for name in names:
        if not os.path.isfile(os.path.join(input_folder, name)):
            raise UserError(f"{os.path.join(input_folder, name)} is no file, or a link to a file that is missing")
        match = re.fullmatch(r"(.*)_(\d{4})", name.removesuffix(ending), re.DOTALL)
        if match is None:
            raise UserError(f"{input_folder} has {name}, and {convention}: rename the file or move it away")
        cases.setdefault(match[1], []).append(name)
    if not cases:
        raise UserError(f"no cases in {input_folder}: {convention}")
    for case, files in cases.items():
        if files != [f"{case}_{channel:04d}{ending}" for channel in range(channels)]:
            raise UserError(
                f"the model takes {channels} channel(s) a case, and {input_folder} has {', '.join(files)}: {convention}"
            )
    return [[os.path.join(input_folder, name) for name in files] for files in cases.values()]


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
