"""The command `nmsw_predict`: the flags of `nnUNetv2_predict`, and how many patches to spend."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.checkpoint import TRUST_FLAG, configuration_of, read_checkpoint
from nnunet_nmsw.config import PLANS_KEY, NMSWConfig, parse_num_patches
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import remove_leftovers, written_whole
from nnunet_nmsw.inference.automatic import DEFAULT_MAX_DROP
from nnunet_nmsw.inference.memory import check_least, parse_memory
from nnunet_nmsw.inference.model_folder import (
    checked_folder,
    load_model,
    read_configuration,
    read_document,
    trained_folds,
)
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.ray_engine import RayPredictor, Workers
from nnunet_nmsw.inference.two_models import TwoModelPredictor

DEFAULT_TRAINER, DEFAULT_PLANS, DEFAULT_CONFIGURATION = "nnUNetTrainerNMSW", "nnUNetPlans", "3d_fullres"


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict a folder of images from the command line."""
    args = _parser().parse_args(arguments)
    num_patches = None if args.k is None else parse_num_patches(args.k, "-k", automatic=True)
    _check_flags(args)
    if args.engine != "ray":  # whose workers have devices of their own
        prepare_device(args.device)
    folder = find_model(args).resolve()
    folds = find_folds(folder, args.f, args.chk)
    cases = find_cases(args.i, folder)
    _check_output(args.o)
    if args.max_memory is not None:
        _check_memory(args, cases, folder, folds[0])
    make = partial(make_predictor, args, num_patches, folder, folds)
    predictor = make("cpu" if args.engine == "ray" else args.device)
    _check_previous_stage(cases, predictor, args.prev_stage_predictions)
    engine: nnUNetPredictor = predictor
    if args.engine == "ray":
        engine = for_ray(predictor, args, make)
    else:
        predictor.bound_memory(cases, args.npp)
    try:
        remove_leftovers(Path(args.o))
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
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except OSError as error:  # not of a case: these are reported with the case
        raise UserError(f"cannot write into {args.o}: {reason(error)}") from error


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
    of_nmsw |= {"bfloat16": args.bfloat16, "trust_model": args.trust_model}
    if args.global_model is None:
        predictor = NMSWPredictor(**of_nmsw)
    else:
        of_global = checked_folder(args.global_model)
        coarse = nnUNetPredictor(**of_stock)
        load_model(coarse, of_global, find_folds(of_global, args.f, args.chk), args.chk, args.trust_model)
        predictor = TwoModelPredictor(coarse, **of_nmsw)
    load_model(predictor, folder, folds, args.chk, args.trust_model)
    return predictor


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


def _check_flags(args: argparse.Namespace) -> None:
    for name, value, least in (("-npp", args.npp, 0), ("-nps", args.nps, 0), ("-num_parts", args.num_parts, 1)):
        if value < least:
            raise UserError(f"{name} is {value}: give a number of at least {least}")
    if not 0 <= args.part_id < args.num_parts:
        raise UserError(f"-part_id is {args.part_id}: give one from 0 to {args.num_parts - 1} (-num_parts - 1)")
    ignored = [flag for flag in ("d", "tr", "p", "c") if getattr(args, flag) is not None]
    if args.m is not None and ignored:
        raise UserError(f"-{ignored[0]} beside -m: -m names the model's folder, leave out one of them")
    if (args.global_model is None) != (args.local_model is None):
        raise UserError("--global_model and --local_model go together: the one predicts coarsely, the other patches")
    if args.global_model is not None and any(flag is not None for flag in (args.m, args.d, args.tr, args.p, args.c)):
        raise UserError("--global_model and --local_model are folders, without -m, -d, -tr, -p and -c")
    if args.global_model is not None and args.k == "auto":
        raise UserError("-k auto needs an NMSW model, which predicts the benefit of patches; two stock models do not")
    if args.global_model is not None and args.max_memory is not None:
        raise UserError("--max_memory needs an NMSW model: the sliding window of --global_model keeps whole volumes")
    if args.max_memory is not None:
        parse_memory(args.max_memory)
    if args.bfloat16 and args.device != "cpu":
        raise UserError(f"--bfloat16 is for -device cpu; -device {args.device} computes as nnU-Net does there")
    if args.engine != "ray" and (args.ray_address is not None or args.cores_per_worker is not None):
        raise UserError("--ray_address and --cores_per_worker are for --engine ray")
    if args.engine == "ray" and args.device == "mps":
        raise UserError("--engine ray works on GPUs or processors: give -device cuda or -device cpu")
    if args.cores_per_worker is not None and args.cores_per_worker < 1:
        raise UserError(f"--cores_per_worker is {args.cores_per_worker}: give 1 or more")
    if not 0 <= args.max_drop < math.inf:
        raise UserError(f"--max_drop is {args.max_drop}: give a Dice of 0 or more, such as {DEFAULT_MAX_DROP}")


def _check_output(folder: str) -> None:
    """See that files can be written into a folder, or into the one that it will be made in.

    Raises:
        UserError: they cannot.
    """
    there = Path(os.path.abspath(folder))
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(f"-o {folder}: {there} is a file, give a folder")
    try:
        with written_whole(there):
            pass
    except OSError as error:
        raise UserError(f"-o {folder} cannot be written into: {error.strerror or reason(error)}") from error


def _check_memory(args: argparse.Namespace, cases: list[list[str]], folder: Path, fold: int | str) -> None:
    """See that memory suffices but for what the network itself takes, which is known when it is loaded.

    Raises:
        UserError: it does not.
    """
    file = folder / f"fold_{fold}" / args.chk
    name = configuration_of(read_checkpoint(file, args.trust_model, mmap=True), file)
    resolved, dataset = read_configuration(folder, name), read_document(folder, "dataset.json")
    plans = PlansManager(read_document(folder, "plans.json"))
    configuration = plans.get_configuration(name)
    channels = determine_num_input_channels(plans, configuration, dataset)
    classes = plans.get_label_manager(dataset).num_segmentation_heads
    factor = NMSWConfig.from_configuration(resolved).downsampling_factor
    check_least(parse_memory(args.max_memory), cases, plans, configuration, channels, classes, factor)


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
    """The device of this name, with as many threads as go with it.

    Raises:
        UserError: there is none.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device: give -device cpu, or -device mps on a Mac")
        torch.set_num_threads(1)
    elif name == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no MPS device, which Macs with Apple's processors have: give -device cpu")
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
    add("-f", nargs="+", help="folds to ensemble. Default: all that are trained")
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
    add(
        TRUST_FLAG,
        action="store_true",
        help="load the model as nnU-Net does, with whatever code its checkpoints and plans hold: for a model of your "
        "own whose network is your own, too",
    )
    add("--verbose", action="store_true", help="tell what is being done")
    add("--disable_progress_bar", action="store_true", help="no progress bars, for logs of batch systems")
    add("--not_on_device", action="store_true", help="keep results on the host: for volumes too large for the device")
    return parser


if __name__ == "__main__":
    main()
