"""The command `nmsw_predict`: the flags of `nnUNetv2_predict`, and how many patches to spend."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_nmsw.config import PLANS_KEY, parse_num_patches
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.inference.automatic import DEFAULT_MAX_DROP
from nnunet_nmsw.inference.memory import parse_memory
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.ray_engine import RayPredictor, Workers
from nnunet_nmsw.inference.two_models import TwoModelPredictor
from nnunet_nmsw.start import importing

DEFAULT_TRAINER, DEFAULT_PLANS, DEFAULT_CONFIGURATION = "nnUNetTrainerNMSW", "nnUNetPlans", "3d_fullres"


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict a folder of images from the command line."""
    args = _parser().parse_args(arguments)
    num_patches = None if args.k is None else parse_num_patches(args.k, "-k", automatic=True)
    if not 0 <= args.part_id < args.num_parts:
        raise UserError(f"-part_id is {args.part_id}: give one from 0 to {args.num_parts - 1} (-num_parts - 1)")
    _check_model_flags(args)
    folder = find_model(args).resolve()
    folds = find_folds(folder, args.f, args.chk)
    cases = find_cases(args.i, folder)
    make = partial(make_predictor, args, num_patches, folder, folds)
    predictor = make("cpu" if args.engine == "ray" else args.device)
    _check_channels(cases, predictor)
    _check_previous_stage(cases, predictor, args.prev_stage_predictions)
    engine: nnUNetPredictor = predictor
    if args.engine == "ray":
        engine = for_ray(predictor, args, make)
    else:
        predictor.bound_memory(cases, args.npp)
    os.makedirs(args.o, exist_ok=True)
    engine.predict_from_files(
        args.i,
        args.o,
        save_probabilities=args.save_probabilities,
        overwrite=not args.continue_prediction,
        num_processes_preprocessing=args.npp,
        num_processes_segmentation_export=args.nps,
        num_parts=args.num_parts,
        part_id=args.part_id,
        folder_with_segs_from_prev_stage=args.prev_stage_predictions,
    )


def for_ray(predictor: NMSWPredictor, args: argparse.Namespace, make: Callable[[str], NMSWPredictor]) -> RayPredictor:
    """A predictor of the same model whose work is done by Ray's workers."""
    workers = Workers(
        partial(make, args.device), args.ray_address, args.device == "cuda", args.cores_per_worker, args.verbose
    )
    by_ray = RayPredictor(workers, device=torch.device("cpu"), allow_tqdm=not args.disable_progress_bar)
    by_ray.manual_initialization(
        predictor.network,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.list_of_parameters,
        predictor.dataset_json,
        predictor.trainer_name,
        predictor.allowed_mirroring_axes,
    )
    return by_ray


def make_predictor(
    args: argparse.Namespace, num_patches: int | str | None, folder: Path, folds: list[int | str], device: str
) -> NMSWPredictor:
    """A predictor as the flags ask for, with its model."""
    of_stock: dict[str, Any] = {
        "use_mirroring": not args.disable_tta,
        "perform_everything_on_device": not args.not_on_device,
        "device": prepare_device(device),
        "verbose": args.verbose,
        "verbose_preprocessing": args.verbose,
        "allow_tqdm": not args.disable_progress_bar,
    }
    of_nmsw: dict[str, Any] = {"num_patches": num_patches, "save_patches": args.save_patches, **of_stock}
    of_nmsw |= {"max_drop": args.max_drop, "max_memory": args.max_memory and parse_memory(args.max_memory)}
    of_nmsw |= {"bfloat16": args.bfloat16}
    if args.global_model is None:
        predictor = NMSWPredictor(**of_nmsw)
    else:
        of_global = _checked_model(args.global_model)
        coarse = nnUNetPredictor(**of_stock)
        load_model(coarse, of_global, find_folds(of_global, args.f, args.chk), args.chk)
        predictor = TwoModelPredictor(coarse, **of_nmsw)
    load_model(predictor, folder, folds, args.chk)
    return predictor


def find_model(args: argparse.Namespace) -> Path:
    """The model folder that --local_model, -m, or -d with -tr, -p and -c, names; else the only NMSW model there is.

    Raises:
        UserError: there is no such folder, or more than one model to choose from.
    """
    if args.m is not None or args.local_model is not None:
        return _checked_model(Path(args.m or args.local_model))
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
        except RuntimeError as error:
            raise UserError(
                f"-d {args.d}: no such dataset under nnUNet_raw, nnUNet_preprocessed or nnUNet_results"
            ) from error
        return _checked_model(Path(folder))
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
    if folds is None:
        trained = [fold for fold in range(5) if (folder / f"fold_{fold}" / checkpoint).is_file()]
        if not trained and (folder / "fold_all" / checkpoint).is_file():
            return ["all"]
        if not trained:
            raise UserError(f"no fold in {folder} has a {checkpoint}: finish a training, or name another one with -chk")
        print(f"Using folds {', '.join(map(str, trained))}")
        return list(trained)
    for fold in folds:
        if not (fold == "all" or fold.isdigit()):
            raise UserError(f'-f {fold}: give folds as numbers, or "all"')
        file = folder / f"fold_{fold}" / checkpoint
        if not file.is_file():
            raise UserError(f"there is no checkpoint {file}: train that fold, or choose with -f and -chk")
    return [fold if fold == "all" else int(fold) for fold in folds]


def find_cases(input_folder: str, model_folder: Path) -> list[list[str]]:
    """The images in a folder, one list of channel files a case.

    Raises:
        UserError: there is no folder, or no case in it.
    """
    file_ending = json.loads((model_folder / "dataset.json").read_text())["file_ending"]
    if not os.path.isdir(input_folder):
        raise UserError(f"the input folder {input_folder} does not exist")
    cases: list[list[str]] = create_lists_from_splitted_dataset_folder(input_folder, file_ending)
    if not cases:
        raise UserError(
            f"no cases in {input_folder}: the model expects files named CASE_0000{file_ending}, "
            "with _0000, _0001 and so on for the channels"
        )
    return cases


def load_model(predictor: nnUNetPredictor, folder: Path, folds: Sequence[int | str], checkpoint: str) -> None:
    """Load the folds' checkpoints into a predictor.

    Raises:
        UserError: a checkpoint cannot be read, or the predictor is NMSW's and the model is not.
    """
    try:
        with importing():  # nnU-Net imports trainers and networks when it needs them
            predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load {checkpoint} of folds {folds} in {folder}: {reason(error)}") from error
    if isinstance(predictor, NMSWPredictor):
        _ = predictor.nmsw_network  # raises for a model without one


def _check_model_flags(args: argparse.Namespace) -> None:
    if (args.global_model is None) != (args.local_model is None):
        raise UserError("--global_model and --local_model go together: the one predicts coarsely, the other patches")
    if args.global_model is not None and any(flag is not None for flag in (args.m, args.d, args.tr, args.p, args.c)):
        raise UserError("--global_model and --local_model are folders, without -m, -d, -tr, -p and -c")
    if args.global_model is not None and args.k == "auto":
        raise UserError("-k auto needs an NMSW model, which predicts the benefit of patches; two stock models do not")
    if args.global_model is not None and args.max_memory is not None:
        raise UserError("--max_memory needs an NMSW model: the sliding window of --global_model keeps whole volumes")
    if args.bfloat16 and args.device != "cpu":
        raise UserError(f"--bfloat16 is for -device cpu; -device {args.device} computes as nnU-Net does there")
    if args.engine != "ray" and (args.ray_address is not None or args.cores_per_worker is not None):
        raise UserError("--ray_address and --cores_per_worker are for --engine ray")
    if args.engine == "ray" and args.device == "mps":
        raise UserError("--engine ray works on GPUs or processors: give -device cuda or -device cpu")
    if args.cores_per_worker is not None and args.cores_per_worker < 1:
        raise UserError(f"--cores_per_worker is {args.cores_per_worker}: give 1 or more")
    if not args.max_drop >= 0:
        raise UserError(f"--max_drop is {args.max_drop}: give a Dice of 0 or more, such as {DEFAULT_MAX_DROP}")


def _checked_model(folder: Path) -> Path:
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not the folder of a trained model: it has no {name}")
    return folder


def _matches(folder: Path, args: argparse.Namespace) -> bool:
    asked = (args.tr, args.p, args.c)
    return all(a is None or a == part for a, part in zip(asked, folder.name.split("__"), strict=True))


def _trained_with_nmsw(folder: Path) -> bool:
    """Whether an NMSW trainer wrote this folder: a stock one is named otherwise and resolves no settings."""
    trainer, _, configuration = folder.name.split("__")
    plans = folder / "plans.json"
    if not plans.is_file() or not any(folder.glob("fold_*/checkpoint_*.pth")):
        return False
    settings = json.loads(plans.read_text())["configurations"].get(configuration, {}).get(PLANS_KEY, {})
    return "NMSW" in trainer or "downsampling_factor" in settings


def _check_channels(cases: list[list[str]], predictor: NMSWPredictor) -> None:
    channels = len(predictor.dataset_json.get("channel_names") or predictor.dataset_json["modality"])
    for files in cases:
        if len(files) != channels:
            names = ", ".join(os.path.basename(file) for file in files)
            raise UserError(f"the model takes {channels} channel(s) a case, the input folder has {names}")


def _check_previous_stage(cases: list[list[str]], predictor: NMSWPredictor, folder: str | None) -> None:
    previous_stage = predictor.configuration_manager.previous_stage_name
    if previous_stage is None:
        if folder is not None:
            raise UserError("-prev_stage_predictions is for the cascade, and this configuration has no previous stage")
        return
    if folder is None:
        raise UserError(
            f"the cascade needs the predictions of {previous_stage} for these images: make them with that "
            "configuration's model and give their folder with -prev_stage_predictions"
        )
    ending = predictor.dataset_json["file_ending"]
    for files in cases:
        name = os.path.basename(files[0])[: -len(f"_0000{ending}")] + ending
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"-prev_stage_predictions {folder} has no {name}, the {previous_stage} of an input image")


def prepare_device(name: str) -> torch.device:
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device: give -device cpu, or -device mps on a Mac")
        torch.set_num_threads(1)
    elif name == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())
    return torch.device(name)


def _absolute(path: str) -> Path:
    return Path(path).resolve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Predict with an nnU-Net model trained with nnUNetTrainerNMSW: a few chosen patches instead of a "
        "sliding window. The flags are those of nnUNetv2_predict.",
    )
    add: Any = parser.add_argument
    add("-i", required=True, help="input folder; files are named CASE_0000, CASE_0001 ... by channel, as for nnU-Net")
    add("-o", required=True, help="output folder, made if it does not exist")
    add("-d", help="dataset name or id; without it (and -m) the only NMSW model under nnUNet_results is taken")
    add("-p", help=f"plans identifier. Default: {DEFAULT_PLANS}")
    add("-tr", help=f"trainer the model was trained with. Default: {DEFAULT_TRAINER}")
    add("-c", help=f"configuration. Default: {DEFAULT_CONFIGURATION}")
    add("-f", nargs="+", help="folds to ensemble. Default: all of 0 to 4 that are trained")
    add("-m", help="model folder (with plans.json and fold_X in it) instead of -d, -p, -tr and -c")
    add(
        "--global_model",
        type=_absolute,
        metavar="FOLDER",
        help="without an NMSW model: folder of a stock model for the coarse prediction, such as 3d_lowres",
    )
    add(
        "--local_model",
        type=_absolute,
        metavar="FOLDER",
        help="and folder of a stock model of the same dataset for the patches, such as 3d_fullres",
    )
    add("-chk", default="checkpoint_final.pth", help="name of the checkpoint. Default: checkpoint_final.pth")
    add(
        "-k",
        "--num_patches",
        dest="k",
        metavar="K",
        help='patches a case: a number, a percentage of all windows such as "10%%", "all", or "auto": as many as are '
        "expected to help. Default: the model's setting",
    )
    add(
        "--max_drop",
        type=float,
        default=DEFAULT_MAX_DROP,
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
    add("-nps", type=int, default=int(os.environ.get("nnUNet_nps") or 3), help="files written at a time. Default: 3")
    add(
        "--max_memory",
        metavar="AMOUNT",
        help="memory of the host to keep within, such as 8G: fewer things go on at a time. Default: no bound",
    )
    add("-num_parts", type=int, default=1, help="number of nmsw_predict calls that share the folder. Default: 1")
    add("-part_id", type=int, default=0, help="which of them this is, from 0. Default: 0")
    add(
        "-device",
        choices=("cuda", "cpu", "mps"),
        default="cuda",
        help="Default: cuda. Choose the GPU with CUDA_VISIBLE_DEVICES",
    )
    add(
        "--bfloat16",
        action="store_true",
        help="with -device cpu: let the networks compute in bfloat16, much faster on processors that have it "
        "(AVX512-BF16 or AMX). Labels that are close calls change",
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
    add("--disable_progress_bar", action="store_true", help="no progress bars, for logs of batch systems")
    add("--not_on_device", action="store_true", help="keep results on the host: for volumes too large for the device")
    return parser


if __name__ == "__main__":
    main()
